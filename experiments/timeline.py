"""Quality over seconds of fine-tuning in all: baselines one after the other, against one library.

Reads the table.json of summarize.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.cli.flags import Parser
from common.cli.launch import launch
from common.evaluation.pictures import COLOURS, check_picture, metric_name, place_labels, save_picture, set_ticks
from common.runtime.records import read_json
from common.runtime.schema import check

METRICS = ("bleu", "accuracy")
KINDS = ("attention", "linear", "feed_forward")
ROW = {
    "baseline": {"seconds": float, str: object},
    "composed": {"seconds": float, str: object},
    "configuration": range(10**6),
    "quality": {"baseline": float, "composed": float, "dense": float, str: object},
    **{f"{kind}_rate?": float for kind in KINDS},
    str: object,
}
TABLE = {  # what is read of it here
    "metric": set(METRICS),
    "seconds": {"baselines": {"pruning": float, str: object}, "library": {str: float}, str: object},
    "configurations": [ROW],
    str: object,
}
BLUE, ORANGE = COLOURS[:2]  # markers and lines differ too, for black and white


def build_parser():
    parser = Parser(__doc__.partition("\n\n")[0])
    parser.add_argument("table", help="what summarize.py wrote: table.json")
    parser.add_argument("-o", "--output", required=True, help="the picture, .png, .svg or .pdf")
    return parser


def moments(summary):
    """When each configuration's model is there, in seconds from the start: {way: [(seconds, quality)]}."""
    seconds, found = summary["seconds"], {}
    starts = {"baseline": seconds["baselines"]["pruning"], "composed": sum(seconds["library"].values())}
    for way, now in starts.items():
        found[way] = []
        for row in summary["configurations"]:
            now += row[way]["seconds"]
            found[way].append((now, row["quality"][way]))
    return found


def draw(summary):
    """The figure: a baseline's line is as long as its fine-tuning took; from it upwards stands what composing adds."""
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display
    from matplotlib.lines import Line2D

    found, rows = moments(summary), summary["configurations"]
    ready = sum(summary["seconds"]["library"].values())
    end = max(now for points in found.values() for now, _ in points)
    keys = [f"{row['configuration']}: {rates_of(row)}" for row in rows if rates_of(row)]  # what the numbers mean
    figure = Figure(figsize=(7.5, 4.6 + 0.1 * len(keys)), layout="constrained")
    axis = figure.subplots()
    axis.margins(y=0.1)
    dense = rows[0]["quality"]["dense"]
    axis.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="the original")
    axis.axvspan(0, ready, facecolor="0.95", edgecolor="0.85", hatch="//", linewidth=0, label="the library is made")
    by_library, one_by_one = found["composed"], found["baseline"]
    count = f"all {len(rows)}" if len(rows) > 1 else "there"
    label = f"composed of one library: {count} after {by_library[-1][0]:.0f} s"
    at_once = by_library[0][0] == by_library[-1][0]  # else a line would only lead from one configuration to another
    look = {"marker": "o", "color": BLUE, "linewidth": 1, "linestyle": "-" if at_once else "", "zorder": 3}
    axis.plot(*zip(*by_library), **look, label=label)
    label = f"baselines, one after the other: {count} after {one_by_one[-1][0]:.0f} s"
    axis.plot(*zip(*one_by_one), marker="s", color=ORANGE, markerfacecolor="white", linestyle="", zorder=3, label=label)
    axis.vlines(
        *zip(*((now, low, high) for (now, low), (_, high) in zip(one_by_one, by_library))),
        color="0.4",
        linewidth=1,
        label="from a baseline to its composed model",
    )
    starts = [summary["seconds"]["baselines"]["pruning"], *(now for now, _ in one_by_one)]
    for start, (now, quality) in zip(starts, one_by_one):
        axis.plot([start, now], [quality, quality], color=ORANGE, linestyle="--", linewidth=1)
    axis.set(
        xlim=(0, 1.04 * end),
        xlabel="seconds of pruning and fine-tuning in all",
        ylabel=f"{metric_name(summary['metric'])} on the test split",
    )
    set_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    handles, _ = axis.get_legend_handles_labels()
    blank = Line2D([], [], linestyle="", label="")
    handles += [blank, *(Line2D([], [], linestyle="", label=key) for key in keys)]  # five kinds, and a row each two
    handles += [blank] * (len(handles) % 2)
    figure.legend(handles=handles[::2] + handles[1::2], fontsize=8, loc="outside lower center", ncols=2)  # by rows
    figure.draw_without_rendering()  # the axes are where they will be
    numbers = [str(row["configuration"]) for row in rows]
    place_labels(axis, one_by_one + by_library, numbers * 2)
    return figure


def rates_of(row):
    """A configuration's rates as text; "" where the table has none."""
    rates = [f"{kind.replace('_', '-')} {row[f'{kind}_rate']:g}" for kind in KINDS if f"{kind}_rate" in row]
    return ", ".join(rates)


def run(args):
    check_picture(args.output)
    table = read_json(args.table, "summarize.py")
    check(args.table, table, TABLE, "summarize.py writes such a file")
    figure = draw(table)
    save_picture(args.output, figure)
    return {"output": args.output}


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
