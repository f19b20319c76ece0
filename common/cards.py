"""Model cards: the README.md of a model folder, which says to the hub and to its reader what the model is.

A card says what the record and the model say, and nothing else: equal models have equal cards, and no path of this
machine is in them.
"""

import json
import re
import tomllib
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from common.evaluation import parameter_counts
from common.families import COMPACT
from common.modeling_compact import needed_transformers
from common.studies import study_of
from common.tasks import TASKS

CARD_NAME = "README.md"
SUITE = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
PIPELINES = {"translation": "translation", "summarization": "summarization", "classification": "text-classification"}
AUTO_CLASSES = {True: "AutoModelForSeq2SeqLM", False: "AutoModelForSequenceClassification"}  # by whether it generates
LANGUAGE = re.compile("[a-z]{2,3}")
# What makes a figure or a setting readable; the others' names say enough.
WORDS = {
    "val_loss": "validation loss",
    "val_loss_before": "validation loss before fine-tuning",
    "val_loss_float32": "validation loss in float32, before the weights were rounded",
    "lr": "peak learning rate",
}


def license_of(folder: str | Path) -> str | None:
    """The license that the card in a folder names, if there is one."""
    try:
        found = (metadata_load(Path(folder) / CARD_NAME) or {}).get("license")
    except Exception:  # no file, no YAML, no text: many classes
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.-]{1,60}", found) else None


def model_card(name: str, model, record: dict, *, dtype: str, has_tokenizer: bool) -> str:
    """The card of a model in a folder.

    Args:
        name: of the folder.
        record: the model's, see `docs/formats.md`; what it does not know is left out.
        dtype: of the weights.
        has_tokenizer: whether the tokenizer lies in the folder.
    """
    task, base = TASKS.get(record.get("task")), record.get("base_model")
    is_compact = model.config.model_type.startswith(COMPACT)
    parts = [
        f"---\n{_header(record, base, task, is_compact)}\n---",
        f"# {base or record['original']['name']}, pruned" if "original" in record else f"# {name}",
        _introduction(model, record, base, task, is_compact),
        _removed(model, record),
        _made(record),
        _measured(record),
        _use(name, model, record, task, dtype, has_tokenizer=has_tokenizer, is_compact=is_compact),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(record, base, task, is_compact):
    """The YAML header, as the hub reads it."""
    data = record.get("data") or {}
    base = base or record.get("original", {}).get("name")
    header = ModelCardData(
        base_model=base if base and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else None,
        datasets=[data["hub"]] if "hub" in data else None,
        language=_languages(record, task),
        library_name="transformers",
        license=record.get("license"),
        metrics=[task.metric] if task else None,
        pipeline_tag=PIPELINES.get(task.name) if task else None,
        tags=[SUITE["name"], *(["pruned"] if "original" in record else []), *(["compact"] if is_compact else [])],
    )
    return header.to_yaml(line_break="\n")


def _languages(record, task):
    """Of a translation: those of its data, if they are known as codes."""
    data = record.get("data")
    if task is None or task.name != "translation" or not data:
        return None
    if "source_lang" in data:
        named = [data["source_lang"], data.get("target_lang")]
    else:
        named = [] if "source_column" in data else ["en", "de"]
    return named if named and all(isinstance(each, str) and LANGUAGE.fullmatch(each) for each in named) else None


def _introduction(model, record, base, task, is_compact):
    kind = type(model).__name__.removeprefix("Compact")
    purpose = f" for {task.name}" if task else ""
    if "original" not in record:
        copied = f", a copy of `{base}`" if base else ""
        return f"A `{kind}`{purpose}{copied}, as {SUITE['name']} saved it."
    text = f"A pruned `{kind}`{purpose}, made of `{base or record['original']['name']}` by {SUITE['name']}."
    if is_compact:
        text += " What was removed is not there any more: the model is compact, smaller and faster."
    return text


def _removed(model, record):
    """What the configuration asked for, what is gone, and what is left."""
    if "original" not in record:
        return None
    lines = ["## What was removed", ""]
    if "configuration" in record:
        rates = [f"{_kind(kind)} {rate:g}" for kind, rate in record["configuration"]["rates"].items()]
        lines += [f"Configuration {record['configuration']['number']}, mean rates: {', '.join(rates)}.", ""]
    if "removed" in record:
        lines += ["| | removed | of |", "|---|---|---|"]
        for kind, parts in record["removed"].items():
            lines += [f"| {_kind(kind)}: {part} | {gone:,} | {of:,} |" for part, (gone, of) in parts.items()]
        lines += ["", "Weights are counted with those of removed heads and neurons."]
    counts = parameter_counts(model)
    left, nonzero = counts["parameters"], counts["nonzero_parameters"]
    lines.append(f"The model has {left:,} parameters, {nonzero:,} of them not zero.")
    return "\n".join(lines)


def _made(record):
    lines = []
    if "script" in record:
        settings = _list(record.get("made_from", {}))
        lines.append(f"By `{record['script']}` of {SUITE['name']} {SUITE['version']}{settings}.")
    if "library_stage" in record:
        settings = _list(record.get("made_with", {}))
        lines.append(f"The blocks are of one library ({record['library_stage']}){settings}.")
    for library in record.get("libraries", ()):
        lines.append(f"{len(library['blocks'])} of the blocks are of a library ({library['stage']}).")
    if "versions" in record:
        lines.append("With " + ", ".join(" ".join(each) for each in record["versions"].items()) + ".")
    data = record.get("data") or {}
    if "hub" in data or "folder" in data:
        lines.append(f"The data: `{data['hub'] if 'hub' in data else Path(data['folder']).name}`.")
    return "\n".join(["## How it was made", "", *lines]) if lines else None


def _measured(record):
    figures = {name: value for name, value in (record.get("measured") or {}).items() if isinstance(value, int | float)}
    if not figures:
        return None
    rows = [f"| {_words(name)} | {_shown(value)} |" for name, value in figures.items()]
    return "\n".join(["## What was measured", "", "| | |", "|---|---|", *rows])


def _use(name, model, record, task, dtype, *, has_tokenizer, is_compact):
    """A snippet that works, and what it needs."""
    has_code = model._auto_class is not None  # in the folder: of a compact model, or another of the suite's own
    auto = model._auto_class or AUTO_CLASSES[model.can_generate()]
    options = ", trust_remote_code=True" if has_code else ""
    lines = [
        f"from transformers import {auto}{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        f"folder = {json.dumps(name, ensure_ascii=False)}  # this folder, or its repository on the hub",
        f"model = {auto}.from_pretrained(folder{options})",
    ]
    if has_tokenizer:
        prefix = (record.get("data") or {}).get("prefix")
        if prefix is None and task:
            prefix = study_of(model.config.model_type, task.name).prefix
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
        text = json.dumps((prefix or "") + "A text.", ensure_ascii=False)
        lines.append(f'batch = tokenizer([{text}], return_tensors="pt")')
        if model.can_generate():
            lines.append("tokens = model.generate(**batch, max_new_tokens=60)")
            lines.append("print(tokenizer.batch_decode(tokens, skip_special_tokens=True))")
        else:
            lines.append("print(model.config.id2label[model(**batch).logits.argmax().item()])")
    needs = [f"The weights are {dtype}."]
    if has_code:
        needs.append("The model's code lies in the folder, hence `trust_remote_code`.")
    if is_compact:
        needs.append(f"It needs transformers {needed_transformers(model.config)}.")
    return "\n".join(["## Use", "", "```python", *lines, "```", "", " ".join(needs)])


def _list(settings):
    """Those of some settings that say something to a reader, as a list that goes on: no digests, tables and paths."""
    plain = {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float)
        or (isinstance(value, str) and not re.fullmatch(r"[0-9a-f]{64}|.*[/\\].*", value))
    }
    return "".join(f", {_words(name)} {_shown(value)}" for name, value in plain.items())


def _kind(name):
    return name.replace("_", "-")


def _words(name):
    return WORDS.get(name, name.replace("_", " "))


def _shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else value
