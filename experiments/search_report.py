"""Searched against uniform configurations at equal cost: the report of search.sh."""

from common.evaluation.pictures import metric_name
from common.evaluation.tables import aligned, wrapped
from common.runtime.errors import UserError
from experiments.drawing import Line, Point, draw
from experiments.results import (
    METRICS,
    block_level_seconds,
    by_name,
    evaluated_on,
    interval_of,
    metric_of,
    name_of,
    provenance,
    rates_in,
    rates_text,
    read,
    read_results,
    uniform_rates,
)

WAYS = ("uniform", "searched")
NAMED = {"kl": "divergence from the original (nats)", "loss": "loss (nats)"}  # objectives


def is_here(folder):
    return (folder / "search.json").is_file()


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
    numbers = {
        "uniform": [row["configuration"] for row in report["uniform"]],
        "searched": range(len(report["searched"])),
    }
    names = [f"{way}-{n}" for way in WAYS for n in numbers[way]]
    lacking = [name for found in scores.values() for name in names if name not in found]
    if lacking:
        raise UserError(f"{folder}: {', '.join(lacking)} not evaluated yet; run experiments/search.sh into it again")
    original = next(each for result in evaluations for each in result["models"])  # evaluated first
    metric = metric_of(original)
    training = {name_of(run["output"]): run for result in results for run in trained(result)}
    dense = report["dense"]["validation"]["loss"]
    grid, conf = read(folder / "grid.json"), read(folder / "conf.json")
    rows, missing = [], []
    for n, (uniform, searched) in enumerate(zip(report["uniform"], report["searched"], strict=True)):
        loss = {"uniform": uniform["validation"]["loss"], "searched": searched["validation"]["loss"]}
        gap = loss["uniform"] - dense
        row = {
            "uniform_configuration": uniform["configuration"],
            "kept": {"uniform": uniform["fraction"], "searched": searched["fraction"]},
            "loss": loss,
            "gap_closed": (loss["uniform"] - loss["searched"]) / gap if gap > 0 else None,  # there is none to close
            "predicted": searched["predicted"],
            "additive": searched["additive"],
            "history": searched["history"],
            "figures": {},
        }
        names = {"uniform": f"uniform-{uniform['configuration']}", "searched": f"searched-{n}"}
        for stage, found in scores.items():
            row[f"{stage}_{metric}"] = {way: found[names[way]][metric] for way in WAYS}
            row[f"{stage}_interval"] = {way: interval_of(found[names[way]], metric) for way in WAYS}
        for way in WAYS:
            file = folder / f"report-{names[way]}.json"
            row["figures"][way] = read(file)["figures"] if file.is_file() else {}
            missing += [] if file.is_file() else [f"{file.name}: sizes and times of {names[way]} are not known"]
        if training:
            row["finetuned_loss"] = {way: training[names[way]]["val_loss"] for way in WAYS}
        rows.append(row)
    uniform = {f"uniform {row['uniform_configuration']}": row["uniform_configuration"] for row in rows}
    rates, searched = rates_in(grid, uniform), rates_in(conf, {f"searched {n}": n for n in range(len(rows))})
    for name, module in rates.items():
        module["rates"] |= searched[name]["rates"]
    return {
        "experiment": "search",
        "model": conf["model"],
        "evaluated_on": evaluated_on(original),
        "metric": metric,
        "measure": report["measure"],
        "objective": report["objective"],
        "dense_loss": dense,
        f"dense_{metric}": original[metric],
        "dense_interval": interval_of(original, metric),
        "budgets": rows,
        "seconds": report["seconds"],
        "library_seconds": block_level_seconds(folder / "blocks.csv"),
        "variants": len(report["variants"]),
        "blocks": len(report["blocks"]),
        "models": len(report["models"]),
        "measured": [[model["predicted"], model[report["objective"]]] for model in report["models"]],
        "rank_correlation": rank_correlation(report),
        "rates": rates,
        "missing": missing,
        "made": provenance(folder, results),
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


# --- in words ------------------------------------------------------------------------------------------------------


def as_text(summary):
    """The outcome and the tables, for people."""
    metric, digits = summary["metric"], METRICS[summary["metric"]]
    groups, heads = ["", "loss", "", ""], ["kept", *WAYS, "gap closed"]
    for title, found in (
        ("composed", f"composed_{metric}"),
        ("fine-tuned", f"finetuned_{metric}"),
        ("loss", "finetuned_loss"),
    ):
        if found in summary["budgets"][0]:
            groups += [title, ""]
            heads += WAYS
    lines = []
    for row in summary["budgets"]:
        line = [
            f"{row['kept']['searched']:.3f}",
            *(f"{row['loss'][way]:.4f}" for way in WAYS),
            percent(row["gap_closed"]),
        ]
        for stage in ("composed", "finetuned"):
            line += [f"{row[f'{stage}_{metric}'][way]:.{digits}f}" for way in WAYS if f"{stage}_{metric}" in row]
        line += [f"{row['finetuned_loss'][way]:.4f}" for way in WAYS if "finetuned_loss" in row]
        lines.append(line)
    return "\n".join(
        [
            *wrapped(answer(summary)),
            "",
            *wrapped(
                f"kept: fraction of the blocks' {summary['measure']}; loss: on all validation examples; composed and "
                f"fine-tuned: {metric}; the original: loss {summary['dense_loss']:.4f}, {metric} "
                f"{summary[f'dense_{metric}']:.{digits}f}"
            ),
            *aligned([groups, heads, *lines]),
            "",
            *wrapped(*conclusions(summary)),
        ]
    )


def conclusions(summary):
    """What the search took, and how far its scores can be trusted, a line each."""
    spent, one = summary["seconds"], summary["seconds"]["one pass"]
    return [
        f"{summary['variants']} variants of {summary['blocks']} blocks; in passes over the scoring examples "
        f"({one:.1f} s each): library {summary['library_seconds'] / one:.0f}, scores {spent['scores'] / one:.0f}, "
        f"search {spent['search'] / one:.0f}",
        f"rank correlation of the scores' sum and what was measured, over the {summary['models']} models that the "
        f"search measured: {summary['rank_correlation']:.3f}",
    ]


def percent(fraction):
    return "-" if fraction is None else f"{round(fraction, 2) + 0.0:.0%}"  # + 0.0: no -0


def answer(summary):
    """The outcome in one sentence."""
    rows, metric, digits = summary["budgets"], summary["metric"], METRICS[summary["metric"]]
    stage = "finetuned" if f"finetuned_{metric}" in rows[0] else "composed"
    better = sum(row[f"{stage}_{metric}"]["searched"] >= row[f"{stage}_{metric}"]["uniform"] for row in rows)
    gaps = [row["gap_closed"] for row in rows if row["gap_closed"] is not None]
    closed = dict.fromkeys(percent(end(gaps, default=None)) for end in (min, max))
    smallest = min(rows, key=lambda row: row["kept"]["searched"])
    qualities = (f"{smallest[f'{stage}_{metric}'][way]:.{digits}f}" for way in ("searched", "uniform"))
    return (
        f"At equal cost, the searched configurations close {' to '.join(closed)} of the loss that "
        f"uniform ones have above the original, and {better} of {len(rows)} are at least as good by "
        f"{metric_name(metric)}, {'fine-tuned' if stage == 'finetuned' else 'as composed'} (with "
        f"{smallest['kept']['searched']:.0%} of the blocks' {summary['measure']}: {' against '.join(qualities)}; the "
        f"original has {summary[f'dense_{metric}']:.{digits}f})."
    )


# --- the page ------------------------------------------------------------------------------------------------------


def page(summary):
    """What the page shows; see report.py."""
    rows, metric = summary["budgets"], summary["metric"]
    models = []
    for n, row in enumerate(rows):
        for way in WAYS:
            number = row["uniform_configuration"] if way == "uniform" else n
            label = f"{way} {number}"
            models.append(
                {
                    "series": way,
                    "name": str(number),
                    "rates": rates_text(uniform_rates(summary["rates"], label)) or "a rate of its own for each module",
                    "kept": row["kept"][way],
                    "quality": row[f"composed_{metric}"][way],
                    "interval": row["composed_interval"][way],
                    "loss": row["loss"][way],
                    "figures": row["figures"][way],
                    "finetuned": row.get(f"finetuned_{metric}", {}).get(way),
                    "finetuned_loss": row.get("finetuned_loss", {}).get(way),
                }
            )
    return {
        "title": f"Searched configurations of {summary['model']['name']}",
        "asked": {
            "question": "Are configurations that were searched, with a rate of its own for each module, better than "
            "uniform ones of the same cost?",
            "budgets": f"{summary['measure']} of the blocks of the grid's configurations "
            f"{', '.join(str(row['uniform_configuration']) for row in rows)}",
            "variants": f"{summary['variants']} of {summary['blocks']} blocks",
            "objective": NAMED[summary["objective"]],
        },
        "answer": answer(summary),
        "original": {
            "kept": 1.0,
            "quality": summary[f"dense_{metric}"],
            "interval": summary["dense_interval"],
            "loss": summary["dense_loss"],
        },
        "notes": [f"{line[0].upper()}{line[1:]}." for line in conclusions(summary)],
        "models": models,
        "titles": {
            "kept": f"kept of the blocks' {summary['measure']}",
            "finetuned": f"{metric_name(metric)} after fine-tuning",
            "finetuned_loss": "loss after fine-tuning",
        },
        "series": {"uniform": "uniform: one rate for all modules of a kind", "searched": "searched"},
        "pictures": [("Predicted and measured", prediction(summary))],
        "spent": [
            ("the library", summary["library_seconds"], "closed form or training"),
            *((part, summary["seconds"][part], "") for part in ("scores", "search")),
        ],
        "missing": [f"{line}." for line in summary["missing"]],
    }


def prediction(summary):
    """The loss by the scores' sum, against the measured one."""
    named, measured = NAMED[summary["objective"]], summary["measured"]
    ends = min(map(min, measured)), max(map(max, measured))
    points = [Point(x, y, "measured", title=f"predicted {x:.4g}, measured {y:.4g}") for x, y in measured]
    lines = [Line([(end, end) for end in ends], "dashed", "as predicted")]
    legend = {"measured": "a model that the search measured"}
    return draw(points, f"predicted: {named}", f"measured: {named}", legend=legend, lines=lines)
