"""The table of an experiment: what composability gave, configuration by configuration and over the sweep.

Reads the files that composability.sh leaves in a folder, writes table.json there and prints the table as text.
"""

import csv
import json
import sys
from pathlib import Path

METRICS = ("bleu", "accuracy")
COSTS = {
    "parameters": "parameters",
    "nonzero_parameters": "non-zeros",
    "bytes_on_disk": "bytes on disk",
    "bytes_in_memory": "in memory",
    "multiply_adds": "multiply-adds",
    "seconds_per_batch": "seconds a batch",
    "seconds_per_generated_token": "a generated token",
}
STATES = ("dense", "pruned", "block-tuned", "baseline", "composed")
OF_ALL_CRITERIA = ("dense", "pruned", "baseline", "baseline's best loss")  # columns; the baseline is pruned by l1


def summarize(folder, criterion="l1"):
    """The figures of the experiment in `folder`, as JSON values. Seconds are training and validation time.

    A configuration has a row for l1, and one for the criterion if that is another.
    """
    suffixes = {"l1": ""} | ({} if criterion == "l1" else {criterion: f"-{criterion}"})
    scheme = read(folder / "conf_prune.json")
    results = read_results(folder)
    scores = {}
    for result in results:  # a later one of the same model counts
        scores |= by_name(result)
    reports = {path.stem.removeprefix("report-"): read(path) for path in folder.glob("report-*.json")}
    scores |= {name: report["evaluation"] for name, report in reports.items()}
    scores["dense"] = scores[name_of(reports["composed-0"]["original"])]
    metric = next(name for name in METRICS if name in scores["dense"])
    rows = []
    for n, requested in enumerate(scheme["requested"]):
        baseline = read_curve(folder / f"baseline-{n}.csv")
        best = min(baseline, key=lambda row: row["val_loss"])
        for each, suffix in suffixes.items():
            names = {
                "dense": "dense",
                "pruned": f"pruned-{n}",
                "block-tuned": f"tuned{suffix}-{n}",
                "baseline": f"baseline-{n}",
                "composed": f"composed{suffix}-{n}",
            }
            composed = read_curve(folder / f"composed{suffix}-{n}.csv")
            reached = next((row for row in composed if row["val_loss"] <= best["val_loss"]), None)
            rows.append(
                {
                    "configuration": n,
                    "criterion": each,
                    **{f"{kind}_rate": rate for kind, rate in requested.items()},
                    "quality": {state: scores[name][metric] for state, name in names.items()},
                    "val_loss": {
                        "pruned": baseline[0]["val_loss"],
                        "block-tuned": composed[0]["val_loss"],
                        "baseline": best["val_loss"],
                        "composed": min(row["val_loss"] for row in composed),
                    },
                    "baseline_best": {"epoch": best["epoch"], "seconds": best["seconds"]},
                    "composed_reaches_it": reached and {"epoch": reached["epoch"], "seconds": reached["seconds"]},
                    "composed_seconds_in_all": composed[-1]["seconds"],
                    "cost": reports[f"composed{suffix}-{n}"]["figures"],
                }
            )
    return {
        "metric": metric,
        "configurations": rows,
        "blocks": [result for result in results if "blocks_with_reuse" in result][-1],
        "sweep_seconds": {
            each: sweep_seconds(
                folder / f"blocks{suffix}-blocks.csv",
                block_level_seconds(results, f"tuned{suffix}"),
                [row for row in rows if row["criterion"] == each],
                scheme["configs"],
            )
            for each, suffix in suffixes.items()
        },
    }


def sweep_seconds(blocks_csv, with_reuse, rows, configs):
    """Seconds until every configuration has the baseline's best validation loss, three ways.

    With reuse, the block level took `with_reuse` seconds. What it took to choose what to prune is not in them.

    Without reuse, every configuration would fine-tune all its own blocks: that figure is computed from the measured
    seconds of each variant, and of the teacher's passes, which each configuration would then run for itself.
    """
    own = {}
    with open(blocks_csv, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            pair = row["block"], row["variant"]
            own[pair] = own.get(pair, 0.0) + float(row["seconds"])
    shared = max(with_reuse - sum(own.values()), 0.0)
    without_reuse = sum(shared + sum(own.get(pair, 0.0) for pair in config.items()) for config in configs)
    to_target = sum(
        row["composed_reaches_it"]["seconds"] if row["composed_reaches_it"] else row["composed_seconds_in_all"]
        for row in rows
    )
    return {
        "baseline": sum(row["baseline_best"]["seconds"] for row in rows),
        "composed_with_reuse": with_reuse + to_target,
        "composed_without_reuse": without_reuse + to_target,
        "block_level_with_reuse": with_reuse,
        "block_level_without_reuse": without_reuse,
        "not_reached": [row["configuration"] for row in rows if row["composed_reaches_it"] is None],
    }


def read_results(folder):
    """What the stages printed, run after run."""
    with open(folder / "results.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def block_level_seconds(results, library):
    """Of all runs of the block level for a library: later ones add what changed."""
    return sum(result["seconds"] for result in results if "fine_tuned" in result and result["output"] == library)


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
    """[{epoch, val_loss, seconds since the start}] of a stats CSV."""
    curve, seconds = [], 0.0
    with open(path, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            seconds += float(row["train_seconds"]) + float(row["val_seconds"])
            curve.append({"epoch": int(row["epoch"]), "val_loss": float(row["val_loss"]), "seconds": round(seconds, 1)})
    return curve


def as_text(summary):
    """The table for people."""
    digits = {"bleu": 1, "accuracy": 3}[summary["metric"]]
    several = len(summary["sweep_seconds"]) > 1
    lines = []
    for row in summary["configurations"]:
        rates = ", ".join(
            f"{kind.replace('_', '-')} {row[f'{kind}_rate']:g}"
            for kind in ("attention", "linear", "feed_forward")
            if f"{kind}_rate" in row
        )
        best, reached, loss = row["baseline_best"], row["composed_reaches_it"], row["val_loss"]
        line = {
            "configuration": f"{row['configuration']}: {rates}",
            **({"criterion": row["criterion"]} if several else {}),
            **{state: f"{row['quality'][state]:.{digits}f}" for state in STATES},
            "baseline's best loss": f"{loss['baseline']:.4f}, epoch {best['epoch']}, {best['seconds']:.0f} s",
            "composed reaches it": f"epoch {reached['epoch']}, {reached['seconds']:.0f} s"
            if reached
            else f"no ({loss['composed']:.4f})",
        }
        if row["criterion"] != "l1":
            line |= dict.fromkeys(OF_ALL_CRITERIA, "")
        lines.append(line)
    costs = [(name, title) for name, title in COSTS.items() if name in summary["configurations"][0]["cost"]]
    ratios = [
        {
            "configuration": str(row["configuration"]),
            **({"criterion": row["criterion"]} if several else {}),
            **{title: as_ratio(row["cost"][name]["ratio"]) for name, title in costs},
        }
        for row in summary["configurations"]
    ]
    blocks, sweeps = summary["blocks"], summary["sweep_seconds"]
    seconds = [["  baseline", f"{sweeps['l1']['baseline']:8.1f}", ""]]
    for criterion, sweep in sweeps.items():
        composed = f"  composed, {criterion}" if several else "  composed"
        for way, note in (("with", ""), ("without", ", computed from the variants' own seconds")):
            seconds.append(
                [
                    f"{composed}, {way} reuse",
                    f"{sweep[f'composed_{way}_reuse']:8.1f}",
                    f" (block level {sweep[f'block_level_{way}_reuse']:.1f}{note})",
                ]
            )
    return "\n".join(
        [
            f"quality: {summary['metric']}",
            *aligned([list(lines[0]), *(line.values() for line in lines)]),
            "",
            "the composed models' size and time, relative to the original:",
            *aligned([list(ratios[0]), *(line.values() for line in ratios)]),
            "",
            f"blocks to fine-tune: {blocks['blocks_with_reuse']} with reuse, {blocks['blocks_without_reuse']} without",
            "seconds until every configuration is as good as its baseline's best:",
            *aligned(seconds),
        ]
    )


def as_ratio(ratio):
    return "-" if ratio is None else f"{ratio:.2f}"  # none without an original that is known


def aligned(lines):
    """Cells as lines of text, their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


if __name__ == "__main__":
    experiment = Path(sys.argv[1])
    figures = summarize(experiment, *sys.argv[2:])
    (experiment / "table.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(as_text(figures))
