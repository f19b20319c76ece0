"""The table and the pictures of search.sh: searched against uniform configurations at equal cost.

Reads the files that search.sh leaves in a folder, writes table.json and prediction.png there, and prints the
table as text.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from summarize import METRICS, aligned, block_level_seconds, by_name, name_of, read, read_results

from common.evaluation.pictures import COLOURS, save_picture, set_ticks

WAYS = ("uniform", "searched")


def summarize(folder):
    """The figures of the experiment in `folder`, as JSON values."""
    report = read(folder / "search.json")
    results = read_results(folder)
    evaluations = [result for result in results if by_name(result)]
    composed, finetuned = (
        {name: each for result in evaluations for name, each in by_name(result).items() if is_pth(each) == pth}
        for pth in (False, True)
    )
    scores = {"composed": composed} | ({"finetuned": finetuned} if finetuned else {})
    original = next(each for result in evaluations for each in result["models"])  # evaluated first
    metric = next(name for name in METRICS if name in original)
    training = {name_of(run["output"]): run for result in results for run in trained(result)}
    dense = report["dense"]["validation"]["loss"]
    rows = []
    for n, (uniform, searched) in enumerate(zip(report["uniform"], report["searched"], strict=True)):
        loss = {"uniform": uniform["validation"]["loss"], "searched": searched["validation"]["loss"]}
        row = {
            "uniform_configuration": uniform["configuration"],
            "kept": {"uniform": uniform["fraction"], "searched": searched["fraction"]},
            "loss": loss,
            "gap_closed": (loss["uniform"] - loss["searched"]) / (loss["uniform"] - dense),
            "predicted": searched["predicted"],
            "additive": searched["additive"],
            "history": searched["history"],
        }
        numbers = {"uniform": uniform["configuration"], "searched": n}
        for stage, found in scores.items():
            row[f"{stage}_{metric}"] = {way: found[f"{way}-{numbers[way]}"][metric] for way in WAYS}
        if training:
            row["finetuned_loss"] = {way: training[f"{way}-{numbers[way]}"]["val_loss"] for way in WAYS}
        rows.append(row)
    return {
        "metric": metric,
        "measure": report["measure"],
        "dense_loss": dense,
        f"dense_{metric}": original[metric],
        "budgets": rows,
        "seconds": report["seconds"],
        "library_seconds": block_level_seconds(folder / "blocks.csv"),
        "variants": len(report["variants"]),
        "blocks": len(report["blocks"]),
        "models": len(report["models"]),
        "rank_correlation": rank_correlation(report),
    }


def is_pth(evaluated):
    """Whether an evaluated model is a fine-tuned one, which search.sh writes as .pth."""
    return evaluated["model"].endswith(".pth")


def trained(result):
    """The configurations that a stage's result says were fine-tuned."""
    return [each for each in result.get("models", [result]) if "val_loss_before" in each]


def rank_correlation(report):
    """Spearman's, of the predicted and the measured objective over all models that the search measured."""
    from scipy.stats import spearmanr

    models = report["models"]
    return float(spearmanr(*([model[which] for model in models] for which in ("predicted", report["objective"])))[0])


def as_text(summary):
    """The table for people."""
    metric, digits = summary["metric"], {"bleu": 1, "accuracy": 3}[summary["metric"]]
    heads = ["kept", "loss uniform", "searched", "gap closed"]
    for stage in ("composed", "finetuned"):
        if f"{stage}_{metric}" in summary["budgets"][0]:
            heads += [f"{metric} {stage}: uniform", "searched"]
    if "finetuned_loss" in summary["budgets"][0]:
        heads += ["loss finetuned: uniform", "searched"]
    lines = []
    for row in summary["budgets"]:
        line = [
            f"{row['kept']['searched']:.3f}",
            *(f"{row['loss'][way]:.4f}" for way in WAYS),
            f"{row['gap_closed']:.0%}",
        ]
        for stage in ("composed", "finetuned"):
            line += [f"{row[f'{stage}_{metric}'][way]:.{digits}f}" for way in WAYS if f"{stage}_{metric}" in row]
        line += [f"{row['finetuned_loss'][way]:.4f}" for way in WAYS if "finetuned_loss" in row]
        lines.append(line)
    spent, one = summary["seconds"], summary["seconds"]["one pass"]
    return "\n".join(
        [
            f"kept: fraction of the blocks' {summary['measure']}; loss: on all validation examples; dense: loss "
            f"{summary['dense_loss']:.4f}, {metric} {summary[f'dense_{metric}']:.{digits}f}",
            *aligned([heads, *lines]),
            "",
            f"{summary['variants']} variants of {summary['blocks']} blocks; in passes over the scoring examples "
            f"({one:.1f} s each): library {summary['library_seconds'] / one:.0f}, scores {spent['scores'] / one:.0f}, "
            f"search {spent['search'] / one:.0f}",
            f"rank correlation of the scores' sum and what was measured, over the {summary['models']} models that the "
            f"search measured: {summary['rank_correlation']:.3f}",
        ]
    )


def draw_prediction(report):
    """The figure: the loss by the scores' sum, against the measured one."""
    from matplotlib.figure import Figure

    objective = report["objective"]
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    points = [(model["predicted"], model[objective]) for model in report["models"]]
    faint = max(0.25, min(0.8, 20 / len(points)))  # where many lie on each other, they show how many
    axis.scatter(*zip(*points), s=20, alpha=faint, color=COLOURS[0], linewidth=0, label="a model that was measured")
    ends = [min(map(min, points)), max(map(max, points))]
    axis.plot(ends, ends, color="0.3", linewidth=1, linestyle="--", label="as predicted")
    named = {"kl": "divergence from the original (nats)", "loss": "loss (nats)"}[objective]
    axis.set(xlabel=f"predicted: {named}", ylabel=f"measured: {named}", aspect="equal")
    for each in (axis.xaxis, axis.yaxis):
        set_ticks(each)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    experiment = Path(sys.argv[1])
    figures = summarize(experiment)
    (experiment / "table.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    save_picture(experiment / "prediction.png", draw_prediction(read(experiment / "search.json")))
    print(as_text(figures))
