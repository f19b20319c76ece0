"""What the experiments leave in their folders: results of stages, reports of evaluations, and records."""

import json
import os
import re
from pathlib import Path

from common.evaluation.pictures import metric_name
from common.runtime.records import RECORD_NAME, read_json
from common.training.stats import read_seconds

METRICS = {"bleu": 1, "rouge_l": 1, "accuracy": 3}  # the digits that are shown
FINGERPRINT = 64  # digits of a digest


def read(path):
    return read_json(path, "this experiment")


def read_results(folder):
    """What the stages printed, run after run."""
    with open(Path(folder) / "results.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def metric_of(evaluation):
    """The metric by which models are compared."""
    return next(name for name in METRICS if name in evaluation)


def by_name(result):
    """The models of an evaluation by their names: {} of another stage's result."""
    models = result.get("models", [result])
    return {name_of(each["model"]): each for each in models if any(metric in each for metric in METRICS)}


def name_of(model):
    """How a model's report is named: after its folder, or its .pth."""
    return Path(model).name.removesuffix(".pth")


def interval_of(evaluation, metric):
    """The ends of a metric's interval, or None where it is not known."""
    return evaluation.get("intervals", {}).get(metric)


def block_level_seconds(stats):
    """Of all runs of the block level for a library, by its stats: they know of interrupted runs, too."""
    return round(sum(read_seconds(stats).values()), 3)


def evaluated_on(evaluation):
    """What a quality was measured on, as the evaluation says."""
    told = ("task", "split", "examples", "device", "precision", "signature", "beams")
    known = {name: evaluation[name] for name in told if name in evaluation}
    return known | ({"data": name_of(evaluation["data"])} if "data" in evaluation else {})


def provenance(folder, results):
    """How an experiment was made: the commands of its stages, and what the records of its libraries say.

    Returns:
        {"experiment": its own command, "commands": [...], "versions": {package: [...]}, "libraries": {name: {"digest",
        "settings"}}, "digests": {what: digest}}
    """
    suite, folder = Path(__file__).resolve().parent.parent, Path(folder).resolve()
    where = os.path.relpath(suite, folder) if folder.is_relative_to(suite) else str(suite)
    commands = [f"python {where}/{result['command']}" for result in results if "command" in result]
    commands = [re.sub(rf"{re.escape(str(suite))}(?![\w.-])", where, command) for command in commands]
    commands = list(reversed(dict.fromkeys(reversed(commands))))  # each once, where it was run last
    own = [result["experiment"] for result in results if result.get("experiment")]
    made = {
        "experiment": own[-1] if own else None,
        "commands": commands,
        "versions": {},
        "libraries": {},
        "digests": {},
    }
    for path in sorted(folder.glob(f"*/{RECORD_NAME}")):
        record = read(path)
        for name, version in record.get("versions", {}).items():
            versions = made["versions"].setdefault(name, [])
            versions += [version] * (version not in versions)
        if "variants" in record and record.get("model"):  # a library
            entries = [record["shared"]] if record.get("shared") else list(record["variants"].values())
            settings = entries[0].get("made_from", {}) if entries else {}
            of_files = {name: value for name, value in settings.items() if is_digest(value)}
            made["libraries"][path.parent.name] = {
                "digest": record.get("digest"),
                "settings": {name: plain(value) for name, value in settings.items() if is_setting(name, value)},
            }
            made["digests"] |= {"model": record["model"]["fingerprint"]}
            made["digests"] |= {name: value for name, value in of_files.items() if name.endswith("examples")}
    return made


def rates_in(conf, numbers):
    """{module: {"kind", "rates": {label: rate}}} of some configurations of a conf.json; `numbers`: {label: number}."""
    return {
        name: {
            "kind": module["kind"],
            "rates": {label: conf["configs"][n].get(name, 0) for label, n in numbers.items()},
        }
        for name, module in conf["modules"].items()
    }


def uniform_rates(rates, label):
    """{kind: rate} of a configuration whose modules of a kind have one rate, else {}."""
    distinct = {}
    for module in rates.values():
        distinct.setdefault(module["kind"], set()).add(module["rates"][label])
    is_uniform = all(len(values) == 1 for values in distinct.values())
    return {kind: min(values) for kind, values in distinct.items()} if is_uniform else {}


def rates_text(rates):
    """{kind: rate} in words."""
    return ", ".join(f"{kind.replace('_', '-')} {rate:g}" for kind, rate in rates.items())


def ratio_range(ratios):
    """The least and the greatest ratio, in words."""
    low, high = (f"{end(ratio for ratio in ratios if ratio is not None):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def quality_text(summary, quality, interval=None):
    """A quality with its metric's name, and its interval if that is known."""
    digits = METRICS[summary["metric"]]
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{metric_name(summary['metric'])} {quality:.{digits}f}{ends}"


def row_of(model):
    """The name of a model's row in a page."""
    return "-".join(filter(None, (model["series"], model["name"])))


def plain(value):
    """A setting without its inner names: {"attention": "l1", "linear": "l1"} is "l1"."""
    return " and ".join(dict.fromkeys(map(str, value.values()))) if isinstance(value, dict) else value


def is_setting(name, value):
    """Whether what an entry was made from is a setting of the whole run, and neither a digest nor the entry's own."""
    return name not in ("block", "removed") and not is_digest(value)


def is_digest(value):
    return isinstance(value, str) and len(value) == FINGERPRINT and not set(value) - set("0123456789abcdef")
