#!/usr/bin/env python3
"""Plot training and validation loss of one stats CSV or several, side by side in one picture."""

import os
import re
import sys
from collections import namedtuple
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files import check_apart, check_regular
from common.pictures import FORMATS, check_picture, save_picture

WRITERS = "block-level_finetuning.py and model-level_finetuning.py write"
BLOCK_STATS = f"{cli.FINE_TUNED_LIBRARY}.csv"  # where block-level fine-tuning leaves its stats
# Okabe and Ito's colour-blind safe palette, without its yellow, which is too faint on white. As 7 colours and
# 11 markers come round at different times, the first 77 curves of a panel all look different.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"]
MARKERS = "os^DvPX*<p>"
LARGEST_EPOCH, LARGEST_LOSS = 10**7, 1e30
MARKED_EPOCHS = 25  # a longer curve has markers at some epochs only, else they would run together

# By epoch: validation and training loss, and the validation losses of a library's variants (epochs x variants), or of
# the models composed of it. Of these, `val` is the median and `train` is None; of one run, `variants` is None.
Losses = namedtuple("Losses", "val train variants")


def build_parser():
    example = "plot_loss.py baseline-0.csv composed-0.csv --labels baseline composed -o loss.png"
    parser = cli.build_parser(__doc__, overwrite=True, example=example)
    csv_help = (
        f"stats, or stats of blocks or compositions, that fine-tuning wrote; without it {BLOCK_STATS} and "
        f"{cli.FINE_TUNED}/*.csv"
    )
    parser.add_argument("csv", nargs="*", default=None, metavar="CSV", help=csv_help)
    parser.add_argument("-o", "--output", default="loss.png", help=f"the picture ({', '.join(FORMATS)})")
    parser.add_argument("--labels", nargs="+", help="a name for each CSV; without it the file's own")
    parser.add_argument(
        "--panels", type=cli.positive, default=1, help="spread the CSVs evenly, in order, over so many panels"
    )
    parser.add_argument("--log", action="store_true", help="a logarithmic axis for the loss")
    parser.add_argument("--title", help="heading of the picture")
    return parser


def run(args):
    paths = args.csv or stats_here()
    labels = args.labels or default_labels(paths)
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} names for {len(paths)} files; give one for each")
    if len(paths) % args.panels:
        raise UserError(f"--panels: {len(paths)} files cannot be spread evenly over {args.panels} panels")
    check_apart({"-o": args.output}, {"CSV": paths})
    check_picture(args.output)
    curves = [read_stats(path) for path in paths]
    save_picture(args.output, draw(curves, labels, panels=args.panels, log=args.log, title=args.title))
    names = labels if len(set(labels)) == len(labels) else paths  # panels may use a label each
    best = {name: round(float(losses.val.min()), 6) for name, losses in zip(names, curves)}
    cli.Talk(args.quiet).say(f"{args.output}: {len(curves)} curve{'s' * (len(curves) > 1)}")
    return {"output": args.output, "best_val_loss": best}


def stats_here():
    """The stats that fine-tuning leaves in this folder by default: of the blocks, then of the models by number.

    Raises:
        UserError: there are none.
    """
    models = [
        path for path in Path(cli.FINE_TUNED).glob("*.csv") if not path.stem.endswith(("-blocks", "-compositions"))
    ]
    models.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)])
    paths = [str(path) for path in (Path(BLOCK_STATS), *models) if path.is_file()]
    if not paths:
        raise UserError(f"neither {BLOCK_STATS} nor {cli.FINE_TUNED}/*.csv is here; {WRITERS} them, or name CSVs")
    return paths


def default_labels(paths):
    """STEM, or FOLDER/STEM where that repeats or is a bare number, or the path where even that repeats."""
    full = [Path(os.path.abspath(path)) for path in paths]
    stems = [path.stem for path in full]
    unclear = [stem.isdecimal() or stems.count(stem) > 1 for stem in stems]
    labels = [f"{path.parent.name}/{path.stem}" if more else path.stem for path, more in zip(full, unclear)]
    return [label if labels.count(label) == 1 else path for label, path in zip(labels, paths)]


def read_stats(path):
    """The `Losses` in a stats CSV, of the last run where it tells of several, and of a variant's last run.

    Variants that have stopped early keep their last loss in the median.

    Raises:
        UserError: absent, or not such a CSV.
    """
    import pandas

    check_regular(path)
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
        return Losses(by_epoch["val_loss"], by_epoch["train_loss"], None)
    rows = numbers.assign(**{name: table[name].fillna("") for name in parts})
    if rows.duplicated([*parts, "epoch"]).any():
        raise UserError(f"{path}: a {parts[-1]} has several rows for one epoch; keep one of them")
    losses = rows.pivot(index="epoch", columns=parts, values="val_loss")
    return Losses(losses.ffill().median(axis=1), None, losses)


def draw(curves, labels, *, panels=1, log=False, title=None):
    """The figure: validation losses as solid lines, a run's training loss as a dotted one of the same colour.

    Args:
        curves: list of `Losses`. Variants' are thin, light lines, with their median as a thick one.
        panels: a divisor of the number of curves.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7 if panels == 1 else 4.2 * panels, 4.2))
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    per_panel = len(curves) // panels
    for number, axis in enumerate(axes):
        named, kinds = [], {"validation": {}}  # for the legend: lines with a name, and the look of each kind of line
        mine = slice(number * per_panel, (number + 1) * per_panel)
        for index, (losses, label) in enumerate(zip(curves[mine], map(plain, labels[mine]))):
            marker = MARKERS[index % len(MARKERS)]
            style = {"color": COLOURS[index % len(COLOURS)], "markevery": -(-len(losses.val) // MARKED_EPOCHS)}
            if losses.variants is None:
                named += axis.plot(losses.val, marker=marker, label=label, **style)
                axis.plot(losses.train, marker=marker, markersize=4, markerfacecolor="white", linestyle=":", **style)
                kinds["training"] = {"linestyle": ":"}
            else:
                count = losses.variants.shape[1]
                faint = max(0.1, min(0.4, 2 / count**0.5))  # the more there are, the fainter, else they hide the rest
                for _, variant in losses.variants.items():
                    axis.plot(variant.dropna(), linewidth=0.6, alpha=faint, zorder=1, **style)
                label = f"{label} (median of {count})"
                named += axis.plot(losses.val, linewidth=3, marker=marker, markersize=8, label=label, **style)
                kinds["one variant"] = {"linewidth": 0.6}
        for kind, look in kinds.items():
            named += axis.plot([], [], color="grey", label=kind, **look)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}  # below the axes, where it covers no curve
        axis.legend(handles=named, fontsize=8, ncols=2 if panels == 1 else 1, **place)
        axis.set(xlabel="epoch", title=f"configuration {number}" if panels > 1 else "")
        if log:
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss")
    if title:
        figure.suptitle(plain(title))
    return figure


def plain(text):
    """Text that matplotlib shows as it is: what stands between two $ is no formula, and no character is unprintable."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text).replace("$", r"\$")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
