#!/usr/bin/env python3
"""Plot loss, and the metric if there is one, of one stats CSV or several, over epochs or seconds, in one picture."""

import os
import re
import sys
from pathlib import Path

from common.cli.flags import FINE_TUNED, FINE_TUNED_LIBRARY, Parser
from common.cli.launch import launch
from common.evaluation.curves import LOSS, WRITERS, draw, read_stats
from common.evaluation.pictures import FORMATS, check_picture, save_picture
from common.runtime.errors import UserError
from common.runtime.files import check_apart
from common.runtime.progress import Talk

BLOCK_STATS = f"{FINE_TUNED_LIBRARY}.csv"  # where block-level fine-tuning leaves its stats


def build_parser():
    example = "plot_loss.py baseline-0.csv composed-0.csv --labels baseline composed -o loss.png"
    parser = Parser(__doc__, usage="%(prog)s [CSV ...] [flags]", example=example, overwrite=True)
    group = parser.group("picture")
    csv_help = (
        f"stats, or stats of blocks or compositions, that fine-tuning wrote; without it {BLOCK_STATS} and "
        f"{FINE_TUNED}/*.csv"
    )
    group.add_argument("csv", nargs="*", default=None, metavar="CSV", help=csv_help)
    group.add_argument("-o", "--output", default="loss.png", help=f"the picture ({', '.join(FORMATS)})")
    group.add_argument("--labels", nargs="+", help="a name for each CSV; without it the file's own")
    group.add_argument(
        "--over",
        nargs="+",
        choices=["epochs", "seconds"],
        default=["epochs"],
        help="the horizontal axis; both are drawn side by side",
    )
    group.add_argument("--title", help="heading of the picture")
    return parser


def run(args):
    paths = args.csv or stats_here()
    labels = args.labels or default_labels(paths)
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} names for {len(paths)} files; give one for each")
    check_apart({"-o": args.output}, {"CSV": paths})
    check_picture(args.output)
    curves = [read_stats(path) for path in paths]
    for path, losses in zip(paths, curves):
        if "seconds" in args.over and losses.seconds is None:
            raise UserError(f"{path}: knows no seconds of a run; draw it --over epochs")
    save_picture(args.output, draw(curves, labels, over=args.over, title=args.title))
    Talk(args.quiet).say(f"{args.output}: {len(curves)} curve{'s' * (len(curves) > 1)}")
    names = labels if len(set(labels)) == len(labels) else paths
    result = {"output": args.output}
    for name, losses in zip(names, curves):
        best = result.setdefault("best_val_loss" if losses.quantity == LOSS else "best_error", {})
        best[name] = round(float(losses.val.min()), 6)
    return result


def stats_here():
    """The stats that fine-tuning leaves in this folder by default: of the blocks, then of the models by number.

    Raises:
        UserError: there are none.
    """
    models = [path for path in Path(FINE_TUNED).glob("*.csv") if not path.stem.endswith(("-blocks", "-compositions"))]
    models.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)])
    paths = [str(path) for path in (Path(BLOCK_STATS), *models) if path.is_file()]
    if not paths:
        raise UserError(f"neither {BLOCK_STATS} nor {FINE_TUNED}/*.csv is here; {WRITERS} them, or name CSVs")
    return paths


def default_labels(paths):
    """STEM, or FOLDER/STEM where that repeats or is a bare number, or the path where even that repeats."""
    full = [Path(os.path.abspath(path)) for path in paths]
    stems = [path.stem for path in full]
    unclear = [stem.isdecimal() or stems.count(stem) > 1 for stem in stems]
    labels = [f"{path.parent.name}/{path.stem}" if more else path.stem for path, more in zip(full, unclear)]
    return [label if labels.count(label) == 1 else path for label, path in zip(labels, paths)]


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
