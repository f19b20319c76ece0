"""Losses and metrics by epoch: read from stats CSVs, and drawn."""

import textwrap
from collections import namedtuple
from pathlib import Path

from common.evaluation.pictures import COLOURS, MARKERS, metric_name, plain, set_ticks
from common.runtime.errors import UserError

WRITERS = "block-level_finetuning.py and model-level_finetuning.py write"  # stats
LARGEST_EPOCH, LARGEST_LOSS, LONGEST_EPOCH = 10**7, 1e30, 1e9  # the last one in seconds
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
    """The `Losses` in a stats CSV, of the last run where it tells of several, and of a variant's last run.

    Variants that have stopped early keep their last loss in the median.

    Raises:
        UserError: absent, or not such a CSV.
    """
    import pandas

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {WRITERS} stats")
    try:
        table = pandas.read_csv(path, dtype=dict.fromkeys(("block", "variant", "composition", "run"), str))
        if "run" in table and len(table):
            run, last = table["run"].fillna(""), table["run"].fillna("").iloc[-1]
            if "variant" in table:
                last = run.groupby([table[name].fillna("") for name in ("block", "variant")]).transform("last")
            table = table[run == last].copy()
        if "composition" in table:
            table["train_loss"] = float("nan")
        numbers = table[["epoch", "train_loss", "val_loss"]].astype(float)
        if not numbers["epoch"].between(0, LARGEST_EPOCH).all():
            raise ValueError("an epoch is no number")
    except (ValueError, KeyError, TypeError, OverflowError):
        needs = "it needs the columns epoch, train_loss and val_loss, in numbers, and epochs from 0 up"
        raise UserError(f"{path}: is no stats CSV ({needs})") from None
    if numbers.empty:
        raise UserError(f"{path}: has no epoch in it")
    numbers = numbers.replace([float("inf"), float("-inf")], float("nan"))  # of a training that has diverged
    if numbers[["train_loss", "val_loss"]].abs().gt(LARGEST_LOSS).any(axis=None):
        raise UserError(f"{path}: holds a loss above {LARGEST_LOSS:g}, which is none")
    if numbers["val_loss"].isna().all():
        raise UserError(f"{path}: its val_loss is empty")
    parts = next((each for each in (["composition"], ["block", "variant"]) if {*each} <= {*table}), None)
    if parts is None:
        by_epoch = numbers.set_index("epoch")
        more = table.set_index(by_epoch.index)
        metrics = [name for name in more if name not in KNOWN and more[name].notna().any()]
        metric = pandas.to_numeric(more[metrics[0]], errors="coerce") if metrics else None
        if metric is not None:
            metric = metric.where(metric.abs() <= LARGEST_LOSS)
        return Losses(by_epoch["val_loss"], by_epoch["train_loss"], None, seconds_up_to(more), metric)
    rows = numbers.assign(**{name: table[name].fillna("") for name in parts})
    if rows.duplicated([*parts, "epoch"]).any():
        raise UserError(f"{path}: a {parts[-1]} has several rows for one epoch; keep one of them")
    losses = rows.pivot(index="epoch", columns=parts, values="val_loss")
    quantity = ERROR if parts == ["block", "variant"] else "loss"
    return Losses(losses.ffill().median(axis=1), None, losses, quantity=quantity)


def seconds_up_to(table):
    """Seconds of training and validation up to each epoch, by epoch; those of epoch 0 only measure. None: not known."""
    import pandas

    if not {"train_seconds", "val_seconds"} <= {*table}:
        return None
    spent = sum(pandas.to_numeric(table[name], errors="coerce") for name in ("train_seconds", "val_seconds"))
    spent[spent.index == 0] = 0.0
    return spent.cumsum() if spent.between(0, LONGEST_EPOCH).all() else None


def draw(curves, labels, *, panels=1, over=("epochs",), draws=("loss",), log=None, title=None, titles=None):
    """The figure: validation losses as solid lines, a run's training loss as a dotted one of the same colour.

    Panels stand side by side, or if there is one alone, epochs and seconds do; all else is below each other.

    Args:
        curves: list of `Losses`. Variants' are thin, light lines, with their median as a thick one.
        panels: a divisor of the number of curves.
        log: None: where losses lie far apart.
        titles: of the panels.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    places = [(what, along) for what in draws for along in over]
    rows, columns = (len(draws), len(over)) if panels == 1 else (len(places), panels)
    width = {1: 7, 2: 5.2}.get(columns, 4.2)
    size = len(curves) // panels
    parts = [slice(start, start + size) for start in range(0, len(curves), size)]
    legends = [handles_of(curves[part], labels[part]) for part in parts]
    longest = max(len(line) for legend in legends for handle in legend for line in handle.get_label().split("\n"))
    across = 1 if panels > 1 or longest > 45 else 1 + columns  # names below each other, or some side by side
    lines = max(sum(1 + handle.get_label().count("\n") for handle in legend) for legend in legends) / across
    figure = Figure(figsize=(width * columns, 3.6 * rows + 0.18 * lines), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row").T  # [panel or axis across][from above]
    for number, (part, handles) in enumerate(zip(parts, legends)):
        for axis, (what, along) in zip(grid.T.flat if panels == 1 else grid[number], places):
            draw_panel(axis, curves[part], what, along, log)
        look = {"handles": handles, "fontsize": 8, "ncols": across}
        if panels == 1:
            figure.legend(loc="outside lower center", **look)
        else:  # below the axes, where it covers no curve
            grid[number][-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), **look)
            name, _, rates = (titles[number] if titles else "").partition(": ")
            grid[number][0].set_title(plain(f"{name}\n{rates}".strip()), fontsize=9)
    if title:
        figure.suptitle(plain(textwrap.fill(title, round(12 * width * columns))))
    return figure


def draw_panel(axis, curves, what, across, log):
    """Draw the loss or the metric over epochs or seconds into a matplotlib axis; see `draw`."""
    spent = [losses.seconds.max() for losses in curves if losses.seconds is not None]
    unit, size = next((unit, size) for unit, size, most in TIMES if max(spent, default=0) <= most)
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
            count = losses.variants.shape[1]
            faint = max(0.1, min(0.4, 2 / count**0.5))  # the more there are, the fainter, else they hide the rest
            for _, variant in losses.variants.items():
                axis.plot(variant.dropna(), color=look["color"], linewidth=0.6, alpha=faint, zorder=1)
            axis.plot(losses.val, linewidth=3, markersize=8, **look)
    if what == "loss" and log is None:
        log = far_apart(curves)
    log = bool(log) and what == "loss"
    if log:
        axis.set_yscale("log")
    set_ticks(axis.xaxis, whole=across == "epochs")
    set_ticks(axis.yaxis, log=log)
    if what == "metric":
        named = dict.fromkeys(metric_name(str(losses.metric.name)) for losses in curves if losses.metric is not None)
        quantity = plain(f"{' or '.join(named)} on validation data")
    else:
        quantities = dict.fromkeys(losses.quantity for losses in curves)
        quantity = next(iter(quantities)) if len(quantities) == 1 else "loss or error"
    axis.set_xlabel("epoch" if across == "epochs" else f"{unit} of training and validation")
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel(quantity)
    axis.grid(alpha=0.3)


def points(figures, losses, across, size):
    """(x, y) of a curve of figures by epoch, over epochs or over seconds in units of `size`."""
    return (figures.index if across == "epochs" else losses.seconds / size), figures


def far_apart(curves):
    """Whether most losses would lie on the lower edge of a linear axis: a few are far larger than the median."""
    import pandas

    every = [losses.val if losses.variants is None else losses.variants.unstack() for losses in curves]
    values = pandas.concat([each.reset_index(drop=True) for each in every]).dropna()
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
