"""Quality against size and against speed, a point for each report of an evaluation script (--report).

The broken line joins the points that no other one beats in both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common import cli
from common.errors import UserError
from common.pictures import check_picture, save_picture
from common.records import read_json
from common.schema import MapOf, Maybe, Number, Object, check

MARKERS, LINES = "os^Dv", ("--", "-.", ":")  # of the series, in turn: to tell them apart in black and white
METRICS = ("bleu", "accuracy")
FIGURE = Maybe(Number(0, 1e18))
REPORT = Object(  # what is read of it here
    {
        "evaluation": Object({}, dict.fromkeys(METRICS, Number(0, 100)), others=True),
        "figures": MapOf(Object({"model": FIGURE, "ratio": FIGURE}, others=True)),
    },
    others=True,
)
AXES = {
    "nonzero_parameters": ("million parameters that are not zero", 1e6),
    "bytes_on_disk": ("MB on disk", 1e6),
    "bytes_in_memory": ("MB in memory", 1e6),
    "multiply_adds": ("million multiply-adds", 1e6),
    "seconds_per_batch": ("ms per batch", 1e-3),
    "seconds_per_generated_token": ("ms per generated token", 1e-3),
}


def build_parser():
    parser = cli.Parser(__doc__.partition("\n\n")[0])
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="what evaluate-t5.py or -distilbert.py wrote")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="a name for each report; without it its file's")
    parser.add_argument(
        "--series",
        nargs="+",
        metavar="NAME",
        help="which series each report belongs to; a series has a colour, a marker and a line of its own",
    )
    parser.add_argument(
        "--against", nargs="+", choices=AXES, default=["bytes_in_memory", "seconds_per_batch"], help="a panel for each"
    )
    parser.add_argument(
        "--relative",
        action="store_true",
        help="figures relative to the original, as each report measured the two side by side; seconds of "
        "different runs compare badly on a machine that does other work too",
    )
    parser.add_argument("--original", metavar="REPORT", help="the original model's own report, drawn as a star")
    parser.add_argument("-o", "--output", required=True, help="the picture, .png, .svg or .pdf")
    return parser


def read_point(path, relative=False):
    """(quality's name, its value, {figure: value}) of a report; `relative`: {figure: ratio to the original's}.

    Raises:
        UserError: not a report, or it has no such ratios.
    """
    report = read_json(path, "evaluate-t5.py --report or evaluate-distilbert.py --report")
    check(path, report, REPORT, "this is not a report of an evaluation script")
    metric = next((name for name in METRICS if name in report["evaluation"]), None)
    if metric is None:
        raise UserError(f"{path}: 'evaluation': has no score; is not a report of an evaluation script")
    figures = {name: each["ratio" if relative else "model"] for name, each in report["figures"].items()}
    if None in figures.values():
        raise UserError(f"{path}: has no ratios to the original; evaluate the model again, with --original")
    return metric, report["evaluation"][metric], figures


def frontier(points):
    """Those (cost, quality) that no other point beats, by rising cost: none costs less and is as good."""
    best, line = float("-inf"), []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if quality > best:
            best = quality
            line.append((cost, quality))
    return line


def draw(points, labels, series, original, axes, relative=False):
    """The figure: a panel an axis, a colour and a marker a series, the original as a star.

    `relative`: the figures are ratios.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window is wanted, and there may be no display
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(axes), figsize=(5 * len(axes), 4.2), squeeze=False, sharey=True)
    for panel, axis in zip(panels[0], axes):
        title, unit = (f"{axis.replace('_', ' ')}, relative to the original", 1) if relative else AXES[axis]
        for index, name in enumerate(dict.fromkeys(series)):
            mine = [
                (values[axis] / unit, quality, label)
                for (_, quality, values), label, owner in zip(points, labels, series)
                if owner == name
            ]
            style, marker = LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]
            (line,) = panel.plot(*zip(*frontier([point[:2] for point in mine])), linestyle=style, linewidth=1)
            panel.scatter(*list(zip(*mine))[:2], color=line.get_color(), marker=marker, s=22, label=name or None)
            for cost, quality, label in mine:
                panel.annotate(label, (cost, quality), fontsize=7, xytext=(3, -8), textcoords="offset points")
        if original:
            panel.scatter(original[2][axis] / unit, original[1], marker="*", s=110, color="black", label="original")
        panel.set(xlabel=title)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(points[0][0])
    if original or any(series):
        panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def run(args):
    labels = args.labels or [Path(path).stem for path in args.reports]
    series = args.series or [""] * len(args.reports)
    for flag, names in (("--labels", labels), ("--series", series)):
        if len(names) != len(args.reports):
            raise UserError(f"{flag} has {len(names)} names for {len(args.reports)} reports; give one for each")
    check_picture(args.output)
    points = [read_point(path, args.relative) for path in args.reports]
    original = read_point(args.original) if args.original else None
    if original and args.relative:
        original = (*original[:2], dict.fromkeys(original[2], 1.0))
    for path, point in zip([*args.reports, args.original], [*points, *([original] if original else [])]):
        lacking = [axis for axis in args.against if axis not in point[2]]
        if lacking or point[0] != points[0][0]:
            raise UserError(
                f"{path}: reports {point[0]} and has no {', '.join(lacking) or points[0][0]}; "
                "compare models of one kind"
            )
    figure = draw(points, labels, series, original, args.against, args.relative)
    save_picture(args.output, figure)
    return {"output": args.output, "points": len(points)}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
