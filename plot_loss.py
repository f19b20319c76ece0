#!/usr/bin/env python3
"""Plot loss, and the metric if there is one, of one stats CSV or several, over epochs or seconds, in one picture."""

import argparse
import os
import re
import sys
from collections import namedtuple
from pathlib import Path

from common.cli import flags as cli
from common.composing.configurations import read_configurations
from common.composing.scheme import DENSE, make_scheme
from common.evaluation.curves import WRITERS, draw, read_stats
from common.evaluation.pictures import FORMATS, check_picture, save_picture
from common.runtime.errors import UserError
from common.runtime.files import check_apart
from common.runtime.records import read_record

BLOCK_STATS = f"{cli.FINE_TUNED_LIBRARY}.csv"  # where block-level fine-tuning leaves its stats
UNITS = {"classification": "loss (nats per example)"}  # of the other tasks: per token


def build_parser():
    example = "plot_loss.py baseline-0.csv composed-0.csv --labels baseline composed -o loss.png"
    parser = cli.build_parser(__doc__, overwrite=True, example=example)
    csv_help = (
        f"stats, or stats of blocks or compositions, that fine-tuning wrote; without it {BLOCK_STATS} and "
        f"{cli.FINE_TUNED}/*.csv"
    )
    parser.add_argument("csv", nargs="*", default=None, metavar="CSV", help=csv_help)
    parser.add_argument("-o", "--output", default="loss.png", help=f"the picture ({', '.join(FORMATS)})")
    parser.add_argument(
        "--labels",
        nargs="+",
        help="a name for each CSV; without it the configuration and its rates, where the record of the model beside "
        "the CSV tells, else the file's own name",
    )
    parser.add_argument(
        "-c",
        "--configurations",
        metavar="CONF",
        help="the configurations, for their rates; without it ./conf.json, if there is one",
    )
    parser.add_argument(
        "--over",
        nargs="+",
        choices=["epochs", "seconds"],
        default=["epochs"],
        help="the horizontal axis; both are drawn side by side",
    )
    parser.add_argument(
        "--draw",
        nargs="+",
        choices=["loss", "metric"],
        help="the vertical axis; both are drawn below each other; without it the loss, and the metric where a CSV has "
        "one",
    )
    parser.add_argument(
        "--panels", type=cli.positive, default=1, help="spread the CSVs evenly, in order, over so many panels"
    )
    parser.add_argument(
        "--log",
        action=argparse.BooleanOptionalAction,
        help="a logarithmic axis for the loss; without it where losses lie far apart",
    )
    parser.add_argument("--title", help="heading of the picture")
    return parser


def run(args):
    paths = args.csv or stats_here()
    labels = args.labels or default_labels(paths)
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} names for {len(paths)} files; give one for each")
    if len(paths) % args.panels:
        raise UserError(f"--panels: {len(paths)} files cannot be spread evenly over {args.panels} panels")
    check_apart({"-o": args.output}, {"CSV": paths, "-c": args.configurations})
    check_picture(args.output)
    curves = [read_stats(path) for path in paths]
    named = configurations_of(paths, args.configurations)
    curves = [losses._replace(quantity=each.unit) if each else losses for losses, each in zip(curves, named)]
    draws = args.draw or ["loss", *(["metric"] if any(losses.metric is not None for losses in curves) else [])]
    if "metric" in draws and all(losses.metric is None for losses in curves):
        raise UserError("--draw metric: no CSV has a column for one; --metric-for-best writes it")
    for path, losses in zip(paths, curves):
        if "seconds" in args.over and losses.seconds is None:
            raise UserError(f"{path}: knows no seconds of a whole run; draw it --over epochs")
    names = [each.name if each else label for each, label in zip(named, labels)]
    titles = titles_of(names, labels, args.panels)
    if args.labels or args.panels > 1:
        names = labels
    elif len(set(names)) < len(names):  # one configuration, several ways
        names = [f"{label}, {name}" if name != label else name for name, label in zip(names, labels)]
    log = {"log": args.log, "title": args.title, "titles": titles}
    save_picture(args.output, draw(curves, names, panels=args.panels, over=args.over, draws=draws, **log))
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


Configuration = namedtuple("Configuration", "name unit")


def configurations_of(paths, given):
    """A `Configuration`, its number and rates as a name, for each CSV beside the model of one; None for the others.

    Args:
        given: a `conf.json`; None for ./conf.json, if there is one that can be read.
    """
    scheme = None
    if given or Path("conf.json").is_file():
        try:
            scheme = make_scheme(read_configurations(given or "conf.json"))
        except UserError:
            if given:
                raise
    return [scheme and _configuration_of(Path(path).with_suffix(""), scheme) for path in paths]


def _configuration_of(model, scheme):
    try:
        record = read_record(model / "record.json") if (model / "record.json").is_file() else {}
    except UserError:  # the model is damaged; its losses are not
        return None
    original = record.get("original")
    if not isinstance(original, dict) or original.get("fingerprint") != scheme.model["fingerprint"]:
        return None
    for number, config in enumerate(scheme.configs):
        if {block: variant for block, variant in config.items() if variant != DENSE} == record.get("variants"):
            rates = [f"{kind.replace('_', '-')} {round(rate, 3):g}" for kind, rate in scheme.requested[number].items()]
            unit = UNITS.get(str(record.get("task")), "loss (nats per token)")
            return Configuration(f"configuration {number}: {', '.join(rates)}", unit)
    return None


def titles_of(names, labels, panels):
    """A title for each panel: the configuration that all its curves are of, or else what they are called."""
    size, titles = len(names) // panels, []
    for start in range(0, len(names), size):
        of_panel = dict.fromkeys(names[start : start + size])
        titles.append(next(iter(of_panel)) if len(of_panel) == 1 else "")
    return titles if panels > 1 else [""]


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
