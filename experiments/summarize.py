"""The table of an experiment: what composability gave, configuration by configuration and over the sweep.

Reads the files that composability.sh leaves in a folder, writes table.json and timeline.png there and prints the table
as text.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.evaluation.pictures import COLOURS, metric_name, place_labels, save_picture, set_ticks
from common.training.stats import read_seconds, read_stats

METRICS = ("bleu", "accuracy")
BLUE, ORANGE = COLOURS[:2]  # markers and lines differ too, for black and white
LEFT = {"nonzero_parameters": "non-zeros", "multiply_adds": "multiply-adds"}  # in the table of quality
COSTS = {
    "parameters": "parameters",
    "bytes_on_disk": "bytes on disk",
    "bytes_in_memory": "in memory",
    "seconds_per_batch": "seconds a batch",
    "seconds_per_generated_token": "a generated token",
}
STATES = ("pruned", "baseline", "composed")


def summarize(folder, criterion="l1"):
    """The figures of the experiment in `folder`, as JSON values.

    Args:
        criterion: what the library's blocks were pruned by; the baseline's are pruned by l1.
    """
    scheme = read(folder / "conf_prune.json")
    results = read_results(folder)
    scores = {}
    for result in results:  # a later one of the same model counts
        scores |= by_name(result)
    reports = {path.stem.removeprefix("report-"): read(path) for path in folder.glob("report-*.json")}
    scores |= {name: report["evaluation"] for name, report in reports.items()}
    scores["dense"] = scores[name_of(reports[f"composed-{criterion}-0"]["original"])]
    metric = next(name for name in METRICS if name in scores["dense"])
    rows = []
    for n, requested in enumerate(scheme["requested"]):
        names = {
            "dense": "dense",
            "pruned": f"pruned-{n}",
            "baseline": f"baseline-{n}",
            "composed": f"composed-{criterion}-{n}",
        }
        baseline, composed = (read_curve(folder / f"{names[way]}.csv") for way in ("baseline", "composed"))
        rows.append(
            {
                "configuration": n,
                **{f"{kind}_rate": rate for kind, rate in requested.items()},
                "quality": {state: scores[name][metric] for state, name in names.items()},
                "val_loss": {
                    "pruned": baseline[0]["val_loss"],
                    "baseline": best(baseline)["val_loss"],
                    "composed": best(composed)["val_loss"],
                },
                "baseline": {name: best(baseline)[name] for name in ("epoch", "seconds")},
                "composed": {name: best(composed)[name] for name in ("epoch", "seconds")},
                "cost": reports[names["composed"]]["figures"],
            }
        )
    seconds = sweep_seconds(folder, results, criterion, rows)
    return {
        "metric": metric,
        "criterion": criterion,
        "configurations": rows,
        "blocks": [result for result in results if "blocks_with_reuse" in result][-1],
        "seconds": seconds,
        "cheaper_from": cheaper_from(seconds, rows),
    }


def sweep_seconds(folder, results, criterion, rows):
    """Seconds of pruning, and of training and validation: of all configurations one by one, and of one library.

    Baselines and composed models count until their best epoch, the library with all of its epochs.
    """
    fine_tuning = {way: round(sum(row[way]["seconds"] for row in rows), 3) for way in ("baseline", "composed")}
    return {
        "baselines": {"pruning": pruning_seconds(results, "pruned-l1"), "fine_tuning": fine_tuning["baseline"]},
        "library": {
            "pruning": pruning_seconds(results, f"pruned-{criterion}"),
            "fine_tuning": block_level_seconds(folder / f"library-{criterion}.csv"),
        },
        "composed": {"fine_tuning": fine_tuning["composed"]},
    }


def cheaper_from(seconds, rows):
    """The least number of configurations, in their order, for which the library takes no longer than the baselines.

    None if it takes longer for all of them.
    """
    one_by_one, by_library = seconds["baselines"]["pruning"], sum(seconds["library"].values())
    for count, row in enumerate(rows, start=1):
        one_by_one += row["baseline"]["seconds"]
        by_library += row["composed"]["seconds"]
        if by_library <= one_by_one:
            return count
    return None


def read_results(folder):
    """What the stages printed, run after run."""
    with open(folder / "results.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def block_level_seconds(stats):
    """Of all runs of the block level for a library, by its stats: they know of interrupted runs, too."""
    return round(sum(read_seconds(stats).values()), 3)


def pruning_seconds(results, library):
    """Of all runs of pruning for a library, choosing what goes included."""
    return sum(result["seconds"] for result in results if "pruned" in result and result["output"] == library)


def by_name(result):
    """The models of an evaluation by their names: {} of another stage's result."""
    models = result.get("models", [result])
    return {name_of(each["model"]): each for each in models if any(metric in each for metric in METRICS)}


def name_of(model):
    """How a model's report is named: after its folder, or its .pth."""
    return Path(model).name.removesuffix(".pth")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_curve(path):
    """[{epoch, val_loss, seconds of training and validation so far}] of the last run in a stats CSV.

    Epoch 0 only measures what there is before any training; its seconds do not count.
    """
    curve, seconds = [], 0.0
    for row in read_stats(path):
        epoch = int(row["epoch"])
        if epoch > 0:
            seconds += float(row["train_seconds"]) + float(row["val_seconds"])
        curve.append({"epoch": epoch, "val_loss": float(row["val_loss"]), "seconds": round(seconds, 3)})
    return curve


def best(curve):
    """The epoch whose weights were kept."""
    return min(curve, key=lambda row: row["val_loss"])


def as_text(summary):
    """The table for people."""
    rows, metric, criterion = summary["configurations"], summary["metric"], summary["criterion"]
    digits = {"bleu": 1, "accuracy": 3}[metric]
    qualities = [
        {
            "configuration": f"{row['configuration']}: {rates_of(row)}",
            **ratios(row, LEFT),
            **{state: f"{row['quality'][state]:.{digits}f}" for state in STATES},
            "loss, baseline": f"{row['val_loss']['baseline']:.4f}",
            "loss, composed": f"{row['val_loss']['composed']:.4f}",
            "baseline's seconds": f"{row['baseline']['seconds']:.1f}",
        }
        for row in rows
    ]
    costs = [{"configuration": str(row["configuration"]), **ratios(row, COSTS)} for row in rows]
    seconds, blocks, count = summary["seconds"], summary["blocks"], len(rows)
    in_all = {way: sum(parts.values()) for way, parts in seconds.items()}
    spent = [
        ("baselines", f"{count} baselines, one after the other", "pruning by l1"),
        ("library", "one library", f"pruning by {criterion}"),
        ("composed", f"{count} models composed of it", None),
    ]
    share = (in_all["library"] + in_all["composed"]) / in_all["baselines"]
    cheaper = summary["cheaper_from"]
    return "\n".join(
        [
            f"quality: {metric}, of the original {rows[0]['quality']['dense']:.{digits}f}; baseline pruned by l1, "
            f"composed by {criterion}",
            *table(qualities),
            "",
            "the composed models' size and time, relative to the original:",
            *table(costs),
            "",
            f"blocks to fine-tune: {blocks['blocks_with_reuse']} with reuse, {blocks['blocks_without_reuse']} without",
            "seconds of fine-tuning, and of pruning before it:",
            *aligned(
                [
                    [
                        f"  {title}",
                        f"{in_all[way]:8.1f}",
                        f" ({pruning} {seconds[way]['pruning']:.1f})" if pruning else "",
                    ]
                    for way, title, pruning in spent
                ]
            ),
            f"the library took {share:.2f} of the baselines' time, as long as {share * count:.1f} of them; "
            + (f"cheaper from {cheaper} configurations on" if cheaper else "too long for so few configurations"),
            f"composed is at least as good as its baseline in {as_good(rows, 'quality', 1)} of {count} by {metric}, in "
            f"{as_good(rows, 'val_loss', -1)} of {count} by validation loss",
        ]
    )


def rates_of(row):
    kinds = [kind for kind in ("attention", "linear", "feed_forward") if f"{kind}_rate" in row]
    return ", ".join(f"{kind.replace('_', '-')} {row[f'{kind}_rate']:g}" for kind in kinds)


def ratios(row, titles):
    """{title: a cost relative to the original}, of those costs that the models have."""
    found = {title: row["cost"][name]["ratio"] for name, title in titles.items() if name in row["cost"]}
    return {title: "-" if ratio is None else f"{ratio:.2f}" for title, ratio in found.items()}  # None: unknown original


def as_good(rows, figure, sign):
    """In how many configurations the composed model is no worse; `sign`: 1 if more is better, else -1."""
    return sum(sign * row[figure]["composed"] >= sign * row[figure]["baseline"] for row in rows)


def table(lines):
    """Dictionaries of equal keys as lines of text, under their keys."""
    return aligned([list(lines[0]), *(line.values() for line in lines)])


def aligned(lines):
    """Cells as lines of text, their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


# --- the timeline: quality over seconds of fine-tuning in all -------------------------------------------------------


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


def draw_timeline(summary):
    """The figure: a baseline's line is as long as its fine-tuning took; from it upwards stands what composing adds."""
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display
    from matplotlib.lines import Line2D

    found, rows = moments(summary), summary["configurations"]
    ready = sum(summary["seconds"]["library"].values())
    end = max(now for points in found.values() for now, _ in points)
    keys = [f"{row['configuration']}: {rates_of(row)}" for row in rows]  # what the numbers mean
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


if __name__ == "__main__":
    experiment = Path(sys.argv[1])
    figures = summarize(experiment, *sys.argv[2:])
    (experiment / "table.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    save_picture(experiment / "timeline.png", draw_timeline(figures))
    print(as_text(figures))
