#!/usr/bin/env python3
"""Plot training and validation loss of one stats CSV or several, side by side in one picture."""

import io
import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.records import check_writable, keeps_existing, write_bytes

FORMATS = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # and what to leave out


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument("csv", nargs="+", metavar="CSV", help="stats of block-level or model-level fine-tuning")
    parser.add_argument("-o", "--output", default="loss.png", help=f"the picture ({', '.join(FORMATS)})")
    parser.add_argument("--labels", nargs="+", help="a name for each CSV; without it the file's own")
    parser.add_argument(
        "--panels", type=cli.positive, default=1, help="spread the CSVs evenly, in order, over so many panels"
    )
    parser.add_argument("--log", action="store_true", help="a logarithmic axis for the loss")
    parser.add_argument("--title", help="heading of the picture")
    return parser


def run(args):
    labels = args.labels or [Path(path).stem for path in args.csv]
    if len(labels) != len(args.csv):
        raise UserError(f"--labels: {len(labels)} names for {len(args.csv)} files; give one for each")
    if len(args.csv) % args.panels:
        raise UserError(f"--panels: {len(args.csv)} files cannot be spread evenly over {args.panels} panels")
    suffix = Path(args.output).suffix[1:].lower()
    if suffix not in FORMATS:
        raise UserError(f"{args.output}: must end in one of {', '.join('.' + name for name in FORMATS)}")
    check_writable(args.output, is_file=True)
    tables = [read_stats(path) for path in args.csv]
    figure = draw(tables, labels, args.panels, args.log, args.title)
    picture = io.BytesIO()
    # without the date or version that matplotlib adds, equal inputs give equal files
    figure.savefig(picture, format=suffix, dpi=150, bbox_inches="tight", metadata=FORMATS[suffix])
    if not keeps_existing(args.output, picture.getvalue(), args.overwrite):
        write_bytes(args.output, picture.getvalue())
    best = {label: round(float(table["val_loss"].min()), 6) for label, table in zip(labels, tables)}
    cli.Talk(args.quiet).say(f"{args.output}: {len(tables)} curves")
    return {"output": args.output, "best_val_loss": best}


def read_stats(path):
    """A stats CSV as a data frame.

    Raises:
        UserError: absent, or not such a CSV.
    """
    import pandas

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; block-level_finetuning.py and model-level_finetuning.py write stats")
    try:
        table = pandas.read_csv(path)
        numbers = table[["epoch", "train_loss", "val_loss"]].astype(float)
    except (ValueError, KeyError, UnicodeDecodeError, pandas.errors.ParserError, pandas.errors.EmptyDataError):
        raise UserError(
            f"{path}: is no stats CSV (it needs the columns epoch, train_loss and val_loss, in numbers)"
        ) from None
    if numbers.empty:
        raise UserError(f"{path}: has no epoch in it")
    if numbers["val_loss"].isna().all():
        raise UserError(f"{path}: its val_loss is empty")
    return numbers


def draw(tables, labels, panels, log, title):
    """The figure: validation loss as a solid line and training loss as a dotted one, a colour a table."""
    import matplotlib

    matplotlib.use("Agg")  # no window is wanted, and there may be no display
    matplotlib.rcParams["svg.hashsalt"] = "plot_loss"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(7 if panels == 1 else 4.2 * panels, 4.2), squeeze=False, sharey=True
    )
    per_panel = len(tables) // panels
    for index, (table, label) in enumerate(zip(tables, labels)):
        axis = axes[0, index // per_panel]
        (line,) = axis.plot(table["epoch"], table["val_loss"], marker="o", markersize=3.5, label=label)
        axis.plot(table["epoch"], table["train_loss"], linestyle=":", color=line.get_color())
    for number, axis in enumerate(axes[0]):
        axis.plot([], [], color="grey", label="validation")
        axis.plot([], [], color="grey", linestyle=":", label="training")
        axis.set(xlabel="epoch", title=f"configuration {number}" if panels > 1 else "")
        if log:
            axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("loss")
    if title:
        figure.suptitle(title)
    return figure


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
