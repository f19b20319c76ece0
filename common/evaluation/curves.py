"""Losses and metrics by epoch: read from stats CSVs, and drawn."""

import itertools
import textwrap
from collections import namedtuple
from pathlib import Path

from common.evaluation.pictures import COLOURS, LOOKS, MARKERS, metric_name, plain, set_ticks
from common.runtime.errors import UserError

WRITERS = "block-level_finetuning.py and model-level_finetuning.py write"  # stats
FAR_APART = 8  # times the median: on a linear axis the lower half of all losses would have an eighth of it
MARKED_EPOCHS = 25  # a longer curve has markers at some epochs only, else they would run together

KNOWN = {"epoch", "train_loss", "val_loss", "train_seconds", "val_seconds", "seconds", "run"}
KNOWN |= {"block", "variant", "composition"}  # any other column is a metric
LOSS, ERROR = "loss", "error of a block's output (NMSE)"
TIMES = (("seconds", 1, 600), ("minutes", 60, 3 * 3600), ("hours", 3600, float("inf")))  # unit, its size, up to

# By epoch: validation and training loss, and the validation losses of a library's variants (epochs x variants), or of
# the models composed of it. Of these, `val` is the median and `train` is None; of one run, `variants` is None.
# `seconds`: of training and validation up to each epoch, None of variants; `metric`: as `val`, named; None without one;
# `quantity`: what the loss is, for the axis.
Losses = namedtuple("Losses", "val train variants seconds metric quantity", defaults=(None, None, LOSS))


def read_stats(path):
    """The `Losses` of the last run in a stats CSV, or of each variant's last; a UserError if it is none.

    Variants that have stopped early keep their last loss in the median.
    """
    import pandas

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {WRITERS} stats")
    try:
        table = pandas.read_csv(path, dtype=dict.fromkeys(("block", "variant", "composition", "run"), str))
        numbers = sorted({"epoch", "train_loss", "val_loss", "train_seconds", "val_seconds"} & {*table})
        table[numbers] = table[numbers].astype(float).replace([float("inf"), float("-inf")], float("nan"))  # diverged
        if table["val_loss"].isna().all():
            raise ValueError("no losses")
        return _losses_of_variants(table) if {"variant", "composition"} & {*table} else _losses_of_run(table, path)
    except (ValueError, KeyError):
        needs = "epoch, train_loss and val_loss, in numbers, and one row for an epoch"
        raise UserError(f"{path}: is no stats CSV (it needs the columns {needs})") from None


def _losses_of_run(table, path):
    import pandas

    quantity = LOSS
    if "run" in table:
        run = table["run"].iloc[-1]
        table = table[table["run"] == run]
        if run in _runs_in(path, "blocks") - _runs_in(path, "compositions"):
            quantity = ERROR  # of blocks that were tuned apart, not of a model
    table = table.set_index("epoch", verify_integrity=True)
    metrics = [name for name in table if name not in KNOWN and table[name].notna().any()]
    metric = pandas.to_numeric(table[metrics[0]], errors="coerce") if metrics else None
    seconds = None
    if {"train_seconds", "val_seconds"} <= {*table}:
        spent = table["train_seconds"] + table["val_seconds"]
        seconds = spent.where(spent.index > 0, 0.0).cumsum()  # those of epoch 0 only measure
    return Losses(table["val_loss"], table["train_loss"], None, seconds, metric, quantity)


def _runs_in(path, what):
    """The runs that are in the second stats of block-level fine-tuning beside some stats: of blocks or compositions."""
    import pandas

    beside = Path(path).with_name(f"{Path(path).stem}-{what}.csv")
    return set(pandas.read_csv(beside, dtype=str).get("run", ())) if beside.is_file() else set()


def _losses_of_variants(table):
    parts = ["block", "variant"] if "variant" in table else ["composition"]
    if "run" in table:
        last = table.groupby(parts)["run"].transform("last") if "variant" in table else table["run"].iloc[-1]
        table = table[table["run"] == last]
    losses = table.pivot(index="epoch", columns=parts, values="val_loss")
    if losses.empty:
        raise ValueError("no variants")
    return Losses(losses.ffill().median(axis=1), None, losses, quantity=ERROR if "variant" in table else LOSS)


def draw(curves, labels, *, over=("epochs",), title=None):
    """The figure of some `Losses`: over epochs and seconds side by side; losses, errors, metrics below each other."""
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    draws = [quantity for quantity in (LOSS, ERROR) if any(losses.quantity == quantity for losses in curves)]
    draws += ["metric"] * any(losses.metric is not None for losses in curves)
    looks = looks_of(labels)
    handles = handles_of(curves, labels, looks)
    texts = [handle.get_label().split("\n") for handle in handles]
    columns = 1 if max(len(line) for text in texts for line in text) > 45 else 1 + len(over)  # of the legend
    width, height = (7 if len(over) == 1 else 10.4), 3.6 * len(draws) + 0.18 * sum(map(len, texts)) / columns
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(draws), len(over), squeeze=False, sharey="row")
    for row, what in zip(grid, draws):
        for axis, along in zip(row, over):
            draw_panel(axis, curves, looks, what, along)
    figure.legend(handles=handles, fontsize=8, ncols=columns, loc="outside lower center")
    if title:
        figure.suptitle(plain(textwrap.fill(title, round(12 * width))))
    return figure


def draw_panel(axis, curves, looks, what, across):
    """Draw a quantity or the metric over epochs or seconds into a matplotlib axis; see `draw`."""
    longest = max((losses.seconds.max() for losses in curves if losses.seconds is not None), default=0)
    unit, size = next(
        ((unit, size) for unit, size, most in TIMES if longest <= most), TIMES[-1][:2]
    )  # NaN: a cell is empty
    for losses, look in zip(curves, looks):
        look = look | {"markevery": -(-len(losses.val) // MARKED_EPOCHS)}
        if what == "metric":
            if losses.metric is not None:
                axis.plot(*points(losses.metric, losses, across, size), **look)
        elif losses.quantity != what:
            continue
        elif losses.variants is None:
            axis.plot(*points(losses.val, losses, across, size), **look)
            look |= {"markersize": 4, "markerfacecolor": "white", "linestyle": ":"}
            axis.plot(*points(losses.train, losses, across, size), **look)
        else:
            faint = max(0.1, min(0.4, 2 / losses.variants.shape[1] ** 0.5))  # else they would hide the median
            for _, variant in losses.variants.items():
                axis.plot(variant.dropna(), color=look["color"], linewidth=0.6, alpha=faint, zorder=1)
            axis.plot(losses.val, linewidth=3, markersize=8, **look)
    log = what != "metric" and far_apart([losses for losses in curves if losses.quantity == what])
    if log:
        axis.set_yscale("log")
    set_ticks(axis.xaxis, whole=across == "epochs")
    set_ticks(axis.yaxis, log=log)
    axis.set_xlabel("epoch" if across == "epochs" else f"{unit} of training and validation")
    if axis.get_subplotspec().is_first_col():
        if what == "metric":
            names = dict.fromkeys(metric_name(losses.metric.name) for losses in curves if losses.metric is not None)
            axis.set_ylabel(plain(f"{' or '.join(names)} on validation data"))
        else:
            axis.set_ylabel(what)
    axis.grid(alpha=0.3)


def points(figures, losses, across, size):
    """(x, y) of a curve of figures by epoch, over epochs or over seconds in units of `size`."""
    return (figures.index if across == "epochs" else losses.seconds / size), figures


def far_apart(curves):
    """Whether most losses would lie on the lower edge of a linear axis: a few are far larger than the median."""
    import pandas

    losses = [curve.val if curve.variants is None else curve.variants.unstack() for curve in curves]
    values = pandas.concat([series.reset_index(drop=True) for series in losses]).dropna()
    return values.min() > 0 and values.max() > FAR_APART * values.median()


def looks_of(labels):
    """The colour and marker of each curve; of the only baseline, such as "baseline-0", those of any picture."""
    series = [label.partition("-")[0] for label in labels]
    known = {name: LOOKS[name] for name in series if name in LOOKS and series.count(name) == 1}
    free = [
        [each for each in every if each not in used] for every, used in zip((COLOURS, MARKERS), zip(*known.values()))
    ]
    others = zip(*map(itertools.cycle, free or (COLOURS, MARKERS)))
    looks = [known[name] if name in known else next(others) for name in series]
    return [{"color": colour, "marker": marker} for colour, marker in looks]


def handles_of(curves, labels, looks):
    """What the legend shows: the curves by name, and then the kinds of lines."""
    from matplotlib.lines import Line2D

    handles, kinds = [], {"validation": {}}
    for losses, label, look in zip(curves, labels, looks):
        if losses.variants is not None:
            label += f" (median of {losses.variants.shape[1]})"
            look = look | {"linewidth": 3, "markersize": 8}
            kinds["one variant"] = {"linewidth": 0.6}
        else:
            kinds["training"] = {"linestyle": ":", "marker": "o", "markersize": 4, "markerfacecolor": "white"}
        handles.append(Line2D([], [], label=plain(textwrap.fill(label, 90)), **look))
    return handles + [Line2D([], [], color="grey", label=kind, **look) for kind, look in kinds.items()]
