"""Quality over seconds of fine-tuning in all: baselines one after the other, against one library.

Reads the table.json of summarize.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common import cli
from common.pictures import check_picture, save_picture
from common.records import read_json
from common.schema import ListOf, MapOf, Number, Object, Text, check

METRICS = {"bleu": "BLEU on the test split", "accuracy": "accuracy on the test split"}
SECONDS = Number(0, 1e9)
ROW = Object(
    {
        **{way: Object({"seconds": SECONDS}, others=True) for way in ("baseline", "composed")},
        "quality": Object({way: Number(0, 100) for way in ("baseline", "composed", "dense")}, others=True),
    },
    others=True,
)
TABLE = Object(  # what is read of it here
    {
        "metric": Text(tuple(METRICS)),
        "seconds": Object(
            {"baselines": Object({"pruning": SECONDS}, others=True), "library": MapOf(SECONDS)}, others=True
        ),
        "configurations": ListOf(ROW, "configuration", shortest=1),
    },
    others=True,
)
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette; markers and lines differ too, for black and white
APART = 0.035  # of the axis' height: the least distance between two labels


def build_parser():
    parser = cli.Parser(__doc__.partition("\n\n")[0])
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


def spread(heights, apart):
    """Heights of labels near those of their points, and at least so far apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(200):  # neighbours that are too close push each other away, by half of what is missing
        for low in range(len(placed) - 1):
            missing = apart - (placed[low + 1] - placed[low])
            if missing > 0:
                placed[low] -= missing / 2
                placed[low + 1] += missing / 2
    return [placed[order.index(i)] for i in range(len(heights))]


def draw(summary):
    """The figure: a baseline's line is as long as its fine-tuning took; from it upwards stands what composing adds."""
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    found, count = moments(summary), len(summary["configurations"])
    ready = sum(summary["seconds"]["library"].values())
    end = max(now for points in found.values() for now, _ in points)
    figure = Figure(figsize=(7.5, 4.8))
    axis = figure.subplots()
    axis.margins(y=0.1)
    dense = summary["configurations"][0]["quality"]["dense"]
    axis.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="the original")
    axis.axvspan(0, ready, facecolor="0.95", edgecolor="0.85", hatch="//", linewidth=0, label="the library is made")
    by_library, one_by_one = found["composed"], found["baseline"]
    label = f"composed of one library: all {count} after {by_library[-1][0]:.0f} s"
    axis.plot(*zip(*by_library), marker="o", color=BLUE, linewidth=1, label=label)
    label = f"baselines, one after the other: all {count} after {one_by_one[-1][0]:.0f} s"
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
    low, high = axis.get_ylim()
    for number, (now, quality) in enumerate(one_by_one):
        axis.text(now + 0.012 * end, quality, str(number), fontsize=8, va="center")
    heights = [quality for _, quality in by_library]
    for number, ((now, _), height) in enumerate(zip(by_library, spread(heights, APART * (high - low)))):
        axis.text(now + 0.012 * end, height, str(number), fontsize=8, va="center")
    axis.set(
        xlim=(0, 1.04 * end), xlabel="seconds of pruning and fine-tuning in all", ylabel=METRICS[summary["metric"]]
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def run(args):
    check_picture(args.output)
    table = read_json(args.table, "summarize.py")
    check(args.table, table, TABLE, "summarize.py writes such a file")
    figure = draw(table)
    save_picture(args.output, figure)
    return {"output": args.output}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
