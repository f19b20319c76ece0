"""The table of explore.sh: the smallest configuration that keeps the quality, beside the original.

Reads the files that explore.sh leaves in a folder, writes table.json there, and prints the table as text.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from summarize import COSTS, aligned, by_name, name_of, read, read_results

from common.training.stats import last_run, read_seconds


def summarize(folder):
    """The figures of the experiment in `folder`, as JSON values."""
    explored, report, results = (
        read(folder / "explored.json"),
        read(folder / "report-smallest.json"),
        read_results(folder),
    )
    metric, (found, *_) = explored["metric"], explored["found"]
    scores = {}
    for result in results:  # a later one of the same model counts
        for name, each in by_name(result).items():
            scores.setdefault(name, {})[each["split"]] = each[metric]
    quality = {"original": scores[name_of(report["original"])], "smallest": scores["smallest"]}
    finishing = {}
    if not found["good_enough"]:
        finishing = read_seconds(folder / "smallest.csv", {last_run(folder / "smallest.csv")})
    return {
        "metric": metric,
        "measure": explored["measure"],
        "wanted": found["wanted"],
        "drop": found["drop"],
        "quality": quality,
        "good_enough": quality["smallest"]["validation"] >= found["wanted"],
        "fine_tuned": not found["good_enough"],
        "configuration": found["configuration"],
        "kept": found["kept"],
        "configurations": len(explored["configurations"]),
        "looked_at": found["looked_at"],
        "measured": found["measured"],
        "cost": report["figures"],
        "seconds": {
            "pruning": round(sum(result["seconds"] for result in results if "pruned" in result), 3),
            **read_seconds(folder / "library.csv"),
            **found["seconds"],
            "finishing": round(sum(finishing.values()), 3),
        },
    }


def as_text(summary):
    """The table for people."""
    metric, quality = summary["metric"], summary["quality"]
    digits = {"bleu": 1, "accuracy": 3}[metric]
    costs = [name for name in COSTS if name in summary["cost"]]
    lines = [["", "kept", f"{metric}, validation", "test", *(COSTS[name] for name in costs)]]
    for name, kept, ratios in (
        ("original", 1.0, [1.0] * len(costs)),
        (
            f"configuration {summary['configuration']}",
            summary["kept"],
            [summary["cost"][each]["ratio"] for each in costs],
        ),
    ):
        scores = quality["original" if name == "original" else "smallest"]
        lines.append(
            [
                name,
                f"{kept:.3f}",
                *(f"{scores[split]:.{digits}f}" for split in ("validation", "test")),
                *(f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    seconds = summary["seconds"]
    outcome = "good enough" if summary["good_enough"] else "not good enough"
    return "\n".join(
        [
            f"wanted: {metric} of at least {summary['wanted']:.{digits + 1}f} on the validation split, "
            f"{summary['drop']:g} below the original's",
            f"kept: fraction of the blocks' {summary['measure']}; other sizes and times: relative to the original",
            *aligned(lines),
            "",
            f"{outcome} {'after fine-tuning' if summary['fine_tuned'] else 'as composed'}; of "
            f"{summary['configurations']} configurations {summary['looked_at']} were looked at (loss) and "
            f"{summary['measured']} measured ({metric})",
            f"seconds: {', '.join(f'{part} {spent:.1f}' for part, spent in seconds.items())}; "
            f"{sum(seconds.values()):.1f} in all",
        ]
    )


if __name__ == "__main__":
    experiment = Path(sys.argv[1])
    figures = summarize(experiment)
    (experiment / "table.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(as_text(figures))
