"""What composability gave, configuration by configuration and over the sweep: the report of composability.sh.

Baselines are pruned by l1. Where the library's blocks are pruned by another criterion, so is a second baseline of each
configuration, *matched*, which differs from the composed model in the tuning alone.
"""

from common.evaluation.pictures import metric_name
from common.evaluation.tables import COSTS, aligned, wrapped
from common.pruning.criteria import DEFAULT
from common.runtime.errors import UserError
from common.training.stats import read_stats
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
    quality_text,
    rates_in,
    rates_text,
    ratio_range,
    read,
    read_results,
)

LEFT = ("nonzero_parameters", "multiply_adds")  # in the table of quality
WAYS = ("baseline", "composed")
STATES = ("pruned", "baseline", "matched", "composed")  # matched: not where all are pruned by l1
KINDS = ("attention", "linear", "feed_forward")
NO_GAIN = 0.95  # of the original's seconds a token


def is_here(folder):
    return (folder / "conf_prune.json").is_file() and any(folder.glob("report-composed-*-*.json"))


def summarize(folder, criterion=None):
    """The figures of the experiment in `folder`, as JSON values.

    A configuration of which a file is missing is left out, and named.

    Args:
        criterion: what the library's blocks were pruned by, if there are several; the baselines' are pruned by l1.
    """
    scheme, conf, results = read(folder / "conf_prune.json"), read(folder / "conf.json"), read_results(folder)
    if criterion is None:
        criterion, *others = sorted({path.stem.split("-")[2] for path in folder.glob("report-composed-*-*.json")})
        if others:
            raise UserError(f"{folder}: has libraries by {', '.join([criterion, *others])}; name one with --criterion")
    evaluations = {}
    for result in results:  # a later one of the same model counts
        evaluations |= by_name(result)
    reports = {path.stem.removeprefix("report-"): read(path) for path in folder.glob("report-*.json")}
    evaluations |= {name: report["evaluation"] for name, report in reports.items()}
    original = name_of(next(reports[name] for name in reports if name.startswith(f"composed-{criterion}-"))["original"])
    rows, missing = [], []
    for n, requested in enumerate(scheme["requested"]):
        names = {"pruned": f"pruned-{n}", "baseline": f"baseline-{n}", "composed": f"composed-{criterion}-{n}"}
        names |= {} if criterion == DEFAULT else {"matched": f"baseline-{criterion}-{n}"}
        files = [f"{name}.csv" for state, name in names.items() if state != "pruned"]
        files += [f"report-{names[way]}.json" for way in WAYS]
        lacking = [file for file in files if not (folder / file).is_file()]
        plain = [name for state, name in names.items() if state not in WAYS]
        lacking += [f"an evaluation of {name}" for name in plain if name not in evaluations]
        if lacking:
            missing.append({"configuration": n, "files": lacking})
            continue
        rows.append(configuration(folder, n, requested, names, evaluations, reports))
    if not rows:
        raise UserError(f"{folder}: no configuration is complete ({missing[0]['files'][0]} is missing); run it again")
    seconds = sweep_seconds(folder, results, criterion, rows)
    metric = metric_of(evaluations[original])
    return {
        "experiment": "composability",
        "model": conf["model"],
        "evaluated_on": evaluated_on(evaluations[original]),
        "metric": metric,
        "criterion": criterion,
        "original": {"quality": evaluations[original][metric], "interval": interval_of(evaluations[original], metric)},
        "configurations": rows,
        "blocks": [result for result in results if "blocks_with_reuse" in result][-1],
        "seconds": seconds,
        "cheaper_from": cheaper_from(seconds, rows),
        "rates": rates_in(conf, {str(row["configuration"]): row["configuration"] for row in rows}),
        "missing": missing,
        "made": provenance(folder, results),
    }


def configuration(folder, n, requested, names, evaluations, reports):
    """The figures of one configuration."""
    metric = metric_of(evaluations[names["composed"]])
    curves = {state: read_curve(folder / f"{name}.csv") for state, name in names.items() if state != "pruned"}
    return {
        "configuration": n,
        **{f"{kind}_rate": rate for kind, rate in requested.items()},
        "quality": {state: evaluations[name][metric] for state, name in names.items()},
        "interval": {state: interval_of(evaluations[name], metric) for state, name in names.items()},
        "val_loss": {
            "pruned": curves["baseline"][0]["val_loss"],
            **{way: best(curve)["val_loss"] for way, curve in curves.items()},
        },
        **{way: {name: best(curve)[name] for name in ("epoch", "seconds")} for way, curve in curves.items()},
        "cost": {way: reports[names[way]]["figures"] for way in WAYS},
    }


def sweep_seconds(folder, results, criterion, rows):
    """Seconds of pruning, and of training and validation: of all configurations one by one, and of one library.

    Baselines and composed models count until their best epoch, the library with all of its epochs.
    """
    fine_tuning = {way: round(sum(row[way]["seconds"] for row in rows), 3) for way in WAYS}
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


def pruning_seconds(results, library):
    """Of all runs of pruning for a library, choosing what goes included."""
    return sum(result["seconds"] for result in results if "pruned" in result and result["output"] == library)


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


# --- in words ------------------------------------------------------------------------------------------------------


def as_text(summary):
    """The outcome and the tables, for people."""
    rows, metric = summary["configurations"], summary["metric"]
    digits = METRICS[metric]
    states = [state for state in STATES if state in rows[0]["quality"]]
    qualities = table(
        {
            "": str(row["configuration"]),
            **{kind.replace("_", "-"): f"{row[f'{kind}_rate']:g}" for kind in KINDS if f"{kind}_rate" in row},
            **ratios(row, LEFT),
            **{state: f"{row['quality'][state]:.{digits}f}" for state in states},
        }
        for row in rows
    )
    tuned = table(
        {
            "": str(row["configuration"]),
            **{f"loss, {state}": f"{row['val_loss'][state]:.4f}" for state in states[1:]},
            **{f"seconds, {state}": f"{row[state]['seconds']:.1f}" for state in states[1:-1]},
        }
        for row in rows
    )
    others = [name for name in COSTS if name not in LEFT]
    costs = table({"": str(row["configuration"]), **ratios(row, others)} for row in rows)
    blocks, remarks = summary["blocks"], notes(summary)
    return "\n".join(
        [
            *wrapped(answer(summary)),
            "",
            f"quality: {metric}, of the original {summary['original']['quality']:.{digits}f}",
            *qualities,
            "",
            "validation loss, and each baseline's seconds of fine-tuning:",
            *tuned,
            "",
            "the composed models' size and time, relative to the original:",
            *costs,
            "",
            *([*wrapped(*remarks), ""] if remarks else []),
            f"blocks to fine-tune: {blocks['blocks_with_reuse']} with reuse, {blocks['blocks_without_reuse']} without",
            "seconds of fine-tuning, and of pruning before it:",
            *aligned([[f"  {title}", f"{seconds:8.1f}", more] for title, seconds, more in spent(summary)]),
            *wrapped(*conclusions(summary)),
        ]
    )


def spent(summary):
    """(What took time, its seconds, what is among them)."""
    seconds, count = summary["seconds"], len(summary["configurations"])
    parts = [
        ("baselines", f"{count} baselines, one after the other", "pruning by l1"),
        ("library", "one library", f"pruning by {summary['criterion']}"),
        ("composed", f"{count} models composed of it", None),
    ]
    return [
        (title, sum(seconds[way].values()), f" ({pruning} {seconds[way]['pruning']:.1f})" if pruning else "")
        for way, title, pruning in parts
    ]


def conclusions(summary):
    """What the seconds and the qualities come to, a line each."""
    rows, cheaper = summary["configurations"], summary["cheaper_from"]
    (_, one_by_one, _), (_, library, _), (_, composed, _) = spent(summary)
    share, count = (library + composed) / one_by_one, len(rows)
    found = [
        f"the library took {share:.2f} of the baselines' time, as long as {share * count:.1f} of them; "
        + (f"cheaper from {cheaper} on" if cheaper else "too long for so few configurations")
    ]
    for rival, name in {"baseline": "baseline", "matched": "matched baseline"}.items():
        if rival not in rows[0]["quality"]:
            continue
        by_quality, by_loss = as_good(rows, "quality", 1, rival), as_good(rows, "val_loss", -1, rival)
        found.append(
            f"composed is at least as good as its {name} in {by_quality} of {count} by {summary['metric']}, "
            f"in {by_loss} of {count} by validation loss"
        )
    return found


def notes(summary):
    """What the tables do not say by themselves, a sentence each."""
    found, criterion = [], summary["criterion"]
    costs = [row["cost"]["composed"] for row in summary["configurations"]]
    tokens = [each["seconds_per_generated_token"]["ratio"] for each in costs if "seconds_per_generated_token" in each]
    if tokens and None not in tokens and min(tokens) > NO_GAIN:
        batch = ratio_range([figures["seconds_per_batch"]["ratio"] for figures in costs])
        found.append(
            f"at this size a compact model gains no time a generated token in transformers (×{ratio_range(tokens)}); a "
            f"batch takes ×{batch}. In CTranslate2 a token of a small T5 took a seventeenth (docs/shipping.md)"
        )
    if "matched" in summary["configurations"][0]["quality"]:
        found.append(
            f"pruned and baseline are pruned by l1; matched is a baseline pruned by {criterion}, as the library is: it "
            "differs from composed in the tuning alone"
        )
    return found


def answer(summary):
    """The outcome in one sentence."""
    rows, name, count = summary["configurations"], metric_name(summary["metric"]), len(summary["configurations"])
    (_, one_by_one, _), (_, library, _), (_, composed, _) = spent(summary)
    spans = {way: span(summary, [row["quality"][way] for row in rows]) for way in WAYS}
    matched = ""
    if "matched" in rows[0]["quality"]:
        as_good_as_matched = as_good(rows, "quality", 1, "matched")
        matched = f"; beside baselines that are pruned as the library is, {as_good_as_matched} are"
    return (
        f"Composed of one library, {as_good(rows, 'quality', 1)} of {count} models are at least as good as baselines "
        f"fine-tuned one by one ({name} {spans['composed']} against {spans['baseline']}; the original has "
        f"{summary['original']['quality']:.{METRICS[summary['metric']]}f}{matched}), and all of them took "
        f"{library + composed:.1f} s of pruning and fine-tuning instead of {one_by_one:.1f} s."
    )


def span(summary, values):
    low, high = (f"{end(values):.{METRICS[summary['metric']]}f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def distinct_rates(rows):
    """The rates of each kind that any configuration has, in words."""
    kinds = [kind for kind in KINDS if f"{kind}_rate" in rows[0]]
    rates = {kind: sorted({row[f"{kind}_rate"] for row in rows}) for kind in kinds}
    return "; ".join(f"{kind.replace('_', '-')} {', '.join(f'{rate:g}' for rate in rates[kind])}" for kind in kinds)


def rates_of(row):
    return rates_text({kind: row[f"{kind}_rate"] for kind in KINDS if f"{kind}_rate" in row})


def ratios(row, names):
    """{title: a composed model's cost relative to the original}, of those costs that the models have."""
    costs = row["cost"]["composed"]
    found = {COSTS[name][0]: costs[name]["ratio"] for name in names if name in costs}
    return {title: "-" if ratio is None else f"{ratio:.2f}" for title, ratio in found.items()}  # None: unknown original


def as_good(rows, figure, sign, rival="baseline"):
    """In how many configurations the composed model is no worse; `sign`: 1 if more is better, else -1."""
    return sum(sign * row[figure]["composed"] >= sign * row[figure][rival] for row in rows)


def table(rows):
    """Dictionaries of equal keys as lines of text, under their keys."""
    rows = list(rows)
    return aligned([list(rows[0]), *(row.values() for row in rows)])


# --- the page ------------------------------------------------------------------------------------------------------


def page(summary):
    """What the page shows; see report.py."""
    metric, rows = summary["metric"], summary["configurations"]
    models = [
        {
            "series": way,
            "name": str(row["configuration"]),
            "rates": rates_of(row),
            "quality": row["quality"][way],
            "interval": row["interval"][way],
            "before": row["quality"]["pruned"] if way == "baseline" else None,
            "loss": row["val_loss"][way],
            "figures": row["cost"].get(way, {}),
            "seconds": row[way]["seconds"],
        }
        for row in rows
        for way in STATES[1:]
        if way in row
    ]
    (one_by_one, library, composed) = spent(summary)
    series = {
        "baseline": "baseline, pruned by l1 and fine-tuned on its own",
        "matched": f"baseline, pruned by {summary['criterion']} as the library is",
        "composed": "composed of the library",
    }
    return {
        "title": f"Composability: {len(rows)} pruned versions of {summary['model']['name']}",
        "asked": {
            "question": "Are models that are composed of one fine-tuned library as good as those that are pruned and "
            "fine-tuned one by one, and what does either take?",
            "criterion": f"{summary['criterion']} for the library, l1 for the baselines",
            "configurations": f"{len(rows)}, of the rates {distinct_rates(rows)}",
            "blocks to fine-tune": f"{summary['blocks']['blocks_with_reuse']} with reuse, "
            f"{summary['blocks']['blocks_without_reuse']} without",
        },
        "answer": answer(summary),
        "original": summary["original"],
        "notes": [f"{line[0].upper()}{line[1:]}." for line in (*conclusions(summary), *notes(summary))],
        "models": models,
        "titles": {"before": f"{metric_name(metric)} as pruned", "seconds": "seconds of its own"},
        "pictures": [("When each model is there", timeline(summary))],
        "series": {state: text for state, text in series.items() if state in rows[0]},
        "spent": [(title, seconds, more.strip(" ()")) for title, seconds, more in (one_by_one, library, composed)],
        "missing": [
            f"Configuration {each['configuration']} is left out, also of the sums: {', '.join(each['files'])} missing."
            for each in summary["missing"]
        ],
    }


def timeline(summary):
    """Quality over seconds of pruning and fine-tuning in all: a baseline's line is as long as its fine-tuning took."""
    seconds, rows, points, lines = summary["seconds"], summary["configurations"], [], []
    library = sum(seconds["library"].values())
    for way, now in {"baseline": seconds["baselines"]["pruning"], "composed": library}.items():
        for row in rows:
            start, now = now, now + row[way]["seconds"]
            quality, n = row["quality"][way], row["configuration"]
            interval = row["interval"][way]
            title = f"{way} {n}: {rates_of(row)}; {quality_text(summary, quality, interval)} after {now:.1f} s"
            points.append(Point(now, quality, way, interval, str(n), title, f"{way}-{n}"))
            if way == "baseline":
                lines.append(Line([(start, quality), (now, quality)], "baseline dashed"))
    lines[0] = lines[0]._replace(legend="a baseline's pruning and fine-tuning")
    dense = summary["original"]["quality"]
    lines.append(Line([(None, dense), (None, dense)], "dotted", "the original"))
    ready = {way: max(point.x for point in points if point.series == way) for way in WAYS}
    return draw(
        points,
        "seconds of pruning and fine-tuning in all",
        f"{metric_name(summary['metric'])} on the {summary['evaluated_on']['split']} split",
        legend={
            "composed": f"composed of one library: all {len(rows)} after {ready['composed']:.0f} s",
            "baseline": f"baselines, one after the other: all {len(rows)} after {ready['baseline']:.0f} s",
        },
        lines=lines,
        band=(0, library, "the library is made"),
        numbers="number of the configuration",
        from_zero=True,
    )
