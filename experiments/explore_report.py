"""The smallest configuration that keeps the quality, beside the original: the report of explore.sh."""

from common.evaluation.pictures import metric_name
from common.evaluation.tables import COSTS, aligned, wrapped
from common.training.stats import last_run, read_seconds
from experiments.results import (
    METRICS,
    by_name,
    evaluated_on,
    interval_of,
    name_of,
    provenance,
    rates_in,
    read,
    read_results,
)


def is_here(folder):
    return (folder / "explored.json").is_file()


def summarize(folder):
    """The figures of the experiment in `folder`, as JSON values."""
    explored, report, results = (
        read(folder / "explored.json"),
        read(folder / "report-smallest.json"),
        read_results(folder),
    )
    metric, (found, *_) = explored["metric"], explored["found"]
    scores, intervals = {}, {}
    for result in results:  # a later one of the same model counts
        for name, each in by_name(result).items():
            scores.setdefault(name, {})[each["split"]] = each[metric]
            intervals.setdefault(name, {})[each["split"]] = interval_of(each, metric)
    original = name_of(report["original"])
    finishing = {}
    if not found["good_enough"]:
        finishing = read_seconds(folder / "smallest.csv", {last_run(folder / "smallest.csv")})
    conf = read(folder / "conf.json")
    return {
        "experiment": "explore",
        "model": conf["model"],
        "evaluated_on": evaluated_on(report["evaluation"]),
        "metric": metric,
        "measure": explored["measure"],
        "wanted": found["wanted"],
        "drop": found["drop"],
        "quality": {"original": scores[original], "smallest": scores["smallest"]},
        "interval": {"original": intervals[original], "smallest": intervals["smallest"]},
        "good_enough": scores["smallest"]["validation"] >= found["wanted"],
        "fine_tuned": not found["good_enough"],
        "configuration": found["configuration"],
        "kept": found["kept"],
        "configurations": len(explored["configurations"]),
        "looked_at": found["looked_at"],
        "measured": found["measured"],
        "examples": explored["examples"],
        "models": [
            {name: row[name] for name in ("configuration", "kept", "loss", "quality") if name in row}
            for row in explored["configurations"]
            if "loss" in row or "quality" in row
        ],
        "cost": report["figures"],
        "seconds": {
            "pruning": round(sum(result["seconds"] for result in results if "pruned" in result), 3),
            **read_seconds(folder / "library.csv"),
            **found["seconds"],
            "finishing": round(sum(finishing.values()), 3),
        },
        "rates": rates_in(conf, {f"configuration {found['configuration']}": found["configuration"]}),
        "made": provenance(folder, results),
    }


# --- in words ------------------------------------------------------------------------------------------------------


def as_text(summary):
    """The outcome and the tables, for people."""
    metric, quality, digits = summary["metric"], summary["quality"], METRICS[summary["metric"]]
    costs = [name for name in COSTS if name in summary["cost"]]
    lines = [["", "kept", f"{metric}, validation", "test", *(COSTS[name][0] for name in costs)]]
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
    return "\n".join(
        [
            *wrapped(answer(summary)),
            "",
            *wrapped(
                f"kept: fraction of the blocks' {summary['measure']}; other sizes and times: relative to the original"
            ),
            *aligned(zip(*lines)),
            "",
            *wrapped(*conclusions(summary)),
        ]
    )


def conclusions(summary):
    """How it was found and what that took, a line each."""
    seconds = summary["seconds"]
    outcome = "good enough" if summary["good_enough"] else "not good enough"
    return [
        f"{outcome} {'after fine-tuning' if summary['fine_tuned'] else 'as composed'}; of "
        f"{summary['configurations']} configurations {summary['looked_at']} were looked at (loss) and "
        f"{summary['measured']} measured ({summary['metric']})",
        f"seconds: {', '.join(f'{part} {spent:.1f}' for part, spent in seconds.items())}; "
        f"{sum(seconds.values()):.1f} in all",
    ]


def answer(summary):
    """The outcome in one sentence."""
    digits, quality = METRICS[summary["metric"]] + 1, summary["quality"]["smallest"]["validation"]
    outcome = "good enough" if summary["good_enough"] else "not good enough"
    return (
        f"Configuration {summary['configuration']} keeps {summary['kept']:.1%} of the blocks' {summary['measure']} and "
        f"has {metric_name(summary['metric'])} {quality:.{digits}f} on the validation split, where at least "
        f"{summary['wanted']:.{digits}f} was wanted ({summary['drop']:g} below the original): it is {outcome} "
        f"{'after fine-tuning' if summary['fine_tuned'] else 'as composed'}."
    )


# --- the page ------------------------------------------------------------------------------------------------------


def page(summary):
    """What the page shows; see report.py."""
    named, wanted = metric_name(summary["metric"]), f"{summary['wanted']:.{METRICS[summary['metric']] + 1}f}"
    scores = {
        way: {
            "quality": summary["quality"][way]["validation"],
            "interval": summary["interval"][way]["validation"],
            "test": summary["quality"][way]["test"],
            "test_interval": summary["interval"][way]["test"],
        }
        for way in ("original", "smallest")
    }
    models = []
    for row in summary["models"]:
        is_found = row["configuration"] == summary["configuration"]
        model = {"series": "smallest" if is_found else "other", "name": str(row["configuration"]), **row}
        models.append(model | scores["smallest"] | {"figures": summary["cost"]} if is_found else model)
    others = summary["configurations"] - len(models)
    return {
        "title": f"The smallest {summary['model']['name']} that keeps the quality",
        "asked": {
            "question": f"Which is the smallest of {summary['configurations']} configurations whose composed model "
            f"loses at most {summary['drop']:g} {named}?",
            "size": f"the blocks' {summary['measure']}",
            "wanted": f"{named} of at least {wanted} on the validation split",
            "measured on": ", ".join(f"{count} examples for the {what}" for what, count in summary["examples"].items()),
        },
        "answer": answer(summary),
        "original": {"kept": 1.0, **scores["original"]},
        "notes": [
            f"{conclusions(summary)[0].capitalize()}.",
            "A model without a quality has no lower a loss than a smaller one that was not good enough.",
        ],
        "models": models,
        "titles": {
            "kept": f"kept of the blocks' {summary['measure']}",
            "quality": f"{named} on the validation split",
            "test": f"{named} on the test split",
            "loss": "loss on a sample",
        },
        "series": {"smallest": "the smallest found", "other": "another that was measured"},
        "levels": {f"wanted: {wanted}": summary["wanted"]},
        "pictures": [],
        "spent": [(part, seconds, "") for part, seconds in summary["seconds"].items()],
        "missing": [f"Not looked at, as a smaller one was good enough: {others} larger configurations."] * (others > 0),
    }
