"""Losses and metrics by epoch: read from stats CSVs, and drawn."""

import textwrap
from collections import namedtuple
from pathlib import Path

from common.evaluation.pictures import COLOURS, MARKERS, metric_name, plain, set_ticks
from common.runtime.errors import UserError

WRITERS = "block-level_finetuning.py and model-level_finetuning.py write"  # stats
FAR_APART = 8  # times the median: on a linear axis the lower half of all losses would have an eighth of it
MARKED_EPOCHS = 25  # a longer curve has markers at some epochs only, else they would run together

KNOWN = {"epoch", "train_loss", "val_loss", "train_seconds", "val_seconds", "seconds", "run"}
KNOWN |= {"block", "variant", "composition"}  # any other column is a metric
ERROR = "error of a block's output (NMSE)"
TIMES = (("seconds", 1, 600), ("minutes", 60, 3 * 3600), ("hours", 3600, float("inf")))  # unit, its size, up to

# By epoch: validation and training loss, and the validation losses of a library's variants (epochs x variants), or of
# the models composed of it. Of these, `val` is the median and `train` is None; of one run, `variants` is None.
# `seconds`: of training and validation up to each epoch, None of variants; `metric`: as `val`, named; None without one;
# `quantity`: what the loss is, for the axis.
Losses = namedtuple("Losses", "val train variants seconds metric quantity", defaults=(None, None, "loss"))


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
        return _losses_of_variants(table) if {"variant", "composition"} & {*table} else _losses_of_run(table)
    except (ValueError, KeyError):
        needs = "epoch, train_loss and val_loss, in numbers, and one row for an epoch"
        raise UserError(f"{path}: is no stats CSV (it needs the columns {needs})") from None


def _losses_of_run(table):
    import pandas

    if "run" in table:
        table = table[table["run"] == table["run"].iloc[-1]]
    table = table.set_index("epoch", verify_integrity=True)
    metrics = [name for name in table if name not in KNOWN and table[name].notna().any()]
    metric = pandas.to_numeric(table[metrics[0]], errors="coerce") if metrics else None
    seconds = None
    if {"train_seconds", "val_seconds"} <= {*table}:
        spent = table["train_seconds"] + table["val_seconds"]
        seconds = spent.where(spent.index > 0, 0.0).cumsum()  # those of epoch 0 only measure
    return Losses(table["val_loss"], table["train_loss"], None, seconds, metric)


def _losses_of_variants(table):
    parts = ["block", "variant"] if "variant" in table else ["composition"]
    if "run" in table:
        last = table.groupby(parts)["run"].transform("last") if "variant" in table else table["run"].iloc[-1]
        table = table[table["run"] == last]
    losses = table.pivot(index="epoch", columns=parts, values="val_loss")
    if losses.empty:
        raise ValueError("no variants")
    return Losses(losses.ffill().median(axis=1), None, losses, quantity=ERROR if "variant" in table else "loss")


def draw(curves, labels, *, over=("epochs",), title=None):
    """The figure of some `Losses`: over epochs and seconds side by side; below the losses the metrics, if any."""
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    draws = ["loss", "metric"] if any(losses.metric is not None for losses in curves) else ["loss"]
    handles = handles_of(curves, labels)
    texts = [handle.get_label().split("\n") for handle in handles]
    columns = 1 if max(len(line) for text in texts for line in text) > 45 else 1 + len(over)  # of the legend
    width, height = (7 if len(over) == 1 else 10.4), 3.6 * len(draws) + 0.18 * sum(map(len, texts)) / columns
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(draws), len(over), squeeze=False, sharey="row")
    for row, what in zip(grid, draws):
        for axis, along in zip(row, over):
            draw_panel(axis, curves, what, along)
    figure.legend(handles=handles, fontsize=8, ncols=columns, loc="outside lower center")
    if title:
        figure.suptitle(plain(textwrap.fill(title, round(12 * width))))
    return figure


def draw_panel(axis, curves, what, across):
    """Draw the loss or the metric over epochs or seconds into a matplotlib axis; see `draw`."""
    longest = max((losses.seconds.max() for losses in curves if losses.seconds is not None), default=0)
    unit, size = next(
        ((unit, size) for unit, size, most in TIMES if longest <= most), TIMES[-1][:2]
    )  # NaN: a cell is empty
    for index, losses in enumerate(curves):
        look = look_of(index) | {"markevery": -(-len(losses.val) // MARKED_EPOCHS)}
        if what == "metric":
            if losses.metric is not None:
                axis.plot(*points(losses.metric, losses, across, size), **look)
        elif losses.variants is None:
            axis.plot(*points(losses.val, losses, across, size), **look)
            look |= {"markersize": 4, "markerfacecolor": "white", "linestyle": ":"}
            axis.plot(*points(losses.train, losses, across, size), **look)
        else:
            faint = max(0.1, min(0.4, 2 / losses.variants.shape[1] ** 0.5))  # else they would hide the median
            for _, variant in losses.variants.items():
                axis.plot(variant.dropna(), color=look["color"], linewidth=0.6, alpha=faint, zorder=1)
            axis.plot(losses.val, linewidth=3, markersize=8, **look)
    log = what == "loss" and far_apart(curves)
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
            axis.set_ylabel(" or ".join(dict.fromkeys(losses.quantity for losses in curves)))
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


def look_of(index):
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def handles_of(curves, labels):
    """What the legend shows: the curves by name, and then the kinds of lines."""
    from matplotlib.lines import Line2D

    handles, kinds = [], {"validation": {}}
    for index, (losses, label) in enumerate(zip(curves, labels)):
        look = look_of(index)
        if losses.variants is not None:
            label += f" (median of {losses.variants.shape[1]})"
            look |= {"linewidth": 3, "markersize": 8}
            kinds["one variant"] = {"linewidth": 0.6}
        else:
            kinds["training"] = {"linestyle": ":", "marker": "o", "markersize": 4, "markerfacecolor": "white"}
        handles.append(Line2D([], [], label=plain(textwrap.fill(label, 90)), **look))
    return handles + [Line2D([], [], color="grey", label=kind, **look) for kind, look in kinds.items()]
