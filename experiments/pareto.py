"""Quality against size and against speed, a point for each report of an evaluation script (--report).

The broken line joins the points that no other one beats in both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.cli.flags import Parser
from common.cli.launch import launch
from common.evaluation.pictures import (
    COLOURS,
    MARKERS,
    check_picture,
    metric_name,
    place_labels,
    plain,
    save_picture,
    set_ticks,
)
from common.runtime.errors import UserError
from common.runtime.records import read_json
from common.runtime.schema import check

LINES = ("--", "-.", ":")  # of the series, in turn: to tell them apart in black and white
MOST_COLUMNS = 3
METRICS = ("bleu", "rouge_l", "accuracy")
REPORT = {  # what is read of it here
    "evaluation": {**{f"{metric}?": float for metric in METRICS}, str: object},
    "figures": {str: {"model": (float,), "ratio": (float,), str: object}},
    str: object,
}
AXES = {
    "nonzero_parameters": ("million parameters that are not zero", 1e6),
    "bytes_on_disk": ("MB on disk", 1e6),
    "bytes_in_memory": ("MB in memory", 1e6),
    "multiply_adds": ("million multiply-adds", 1e6),
    "seconds_per_batch": ("ms per batch", 1e-3),
    "seconds_per_generated_token": ("ms per generated token", 1e-3),
}


def build_parser():
    parser = Parser(__doc__.partition("\n\n")[0])
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
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    columns = min(len(axes), MOST_COLUMNS)
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.9 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(axes) :]:
        panel.remove()
    for panel, axis in zip(panels.flat, axes):
        title, unit = (f"{axis.replace('_', ' ')}, relative to the original", 1) if relative else AXES[axis]
        for index, name in enumerate(dict.fromkeys(series)):
            mine = [
                (values[axis] / unit, quality) for (_, quality, values), owner in zip(points, series) if owner == name
            ]
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            look = {"color": colour, "linestyle": LINES[index % len(LINES)], "linewidth": 1}
            panel.plot(*zip(*frontier(mine)), **look)
            label = plain(name) if name else "a model"
            panel.scatter(*zip(*mine), color=colour, marker=marker, s=26, label=label, zorder=3)
        if original:
            star = {"marker": "*", "s": 110, "color": "black", "label": "the original", "zorder": 3}
            panel.scatter(original[2][axis] / unit, original[1], **star)
        panel.margins(0.08)
        panel.set(xlabel=title)
        for each in (panel.xaxis, panel.yaxis):
            set_ticks(each)
        panel.grid(alpha=0.3)
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(metric_name(points[0][0]))
    handles, _ = panels.flat[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles))
    figure.draw_without_rendering()  # the axes are where they will be
    for panel, axis in zip(panels.flat, axes):
        unit = 1 if relative else AXES[axis][1]
        place_labels(panel, [(values[axis] / unit, quality) for _, quality, values in points], labels)
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
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
