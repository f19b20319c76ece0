"""Model folders for others: the card, a README.md that says what the model is, and pushing to the hub.

A card says what the record and the model say, and nothing else: equal models have equal cards.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from jinja2 import Template

from common.blocks.defaults import study_of
from common.blocks.families import COMPACT
from common.blocks.tensors import parameter_counts
from common.models.engines import ENGINES
from common.models.plain import form_of
from common.runtime.errors import UserError, as_user_error
from common.runtime.progress import Talk
from common.runtime.records import CARD_NAME

AUTO_CLASSES = {True: "AutoModelForSeq2SeqLM", False: "AutoModelForSequenceClassification"}  # by whether it generates
TEMPLATE = """---
{{ card_data }}
---

# {{ base_model or name }}{{ ", pruned" if pruned }}

A {{ "pruned " if pruned }}`{{ kind }}`{{ " for " + task if task }}{{ ", made of `" + base_model + "`" if base_model }}
{{- " by `" + script + "`" if script }} of composable-pruning. It has {{ "{:,}".format(parameters) }} parameters,
{{ "{:,}".format(nonzero_parameters) }} of them not zero. How it was made is in `record.json`.
{%- if answers_of %} The data that it names are texts with the answers of `{{ answers_of }}` as targets: a score or loss
on them is agreement with that model, not quality.
{%- endif %}
{% if removed %}
| | removed | of |
|---|---|---|
{% for kind, parts in removed.items() %}{% for part, (gone, all) in parts.items() -%}
| {{ kind.replace("_", "-") }}: {{ part }} | {{ "{:,}".format(gone) }} | {{ "{:,}".format(all) }} |
{% endfor %}{% endfor %}{% endif %}{% if measured %}
| measured | |
|---|---|
{% for figure, value in measured.items() if value is number and value is not boolean -%}
| {{ figure.replace("_", " ") }} | {{ ("{:,}" if value is integer else "{:.6g}").format(value) }} |
{% endfor %}{% endif %}{% if vocabulary %}
It knows {{ "{:,}".format(vocabulary.vocabulary_after) }} tokens of
{{ "{:,}".format(vocabulary.vocabulary_before) }}, chosen by its training data; use the tokenizer in this folder.
{% endif %}
```python
{% if engine -%}
{{ code }}
{%- else -%}
from transformers import {{ auto_class }}{{ ", AutoTokenizer" if has_tokenizer }}

folder = {{ folder }}  # this folder, or its repository on the hub
model = {{ auto_class }}.from_pretrained(folder{{ ", trust_remote_code=True" if has_code }})
{%- if has_tokenizer %}
tokenizer = AutoTokenizer.from_pretrained(folder{{ ", trust_remote_code=True" if has_code }})
batch = tokenizer([{{ text }}], return_tensors="pt")
{% if generates -%}
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=60), skip_special_tokens=True))
{%- else -%}
print(model.config.id2label[model(**batch).logits.argmax().item()])
{%- endif %}
{%- endif %}
{%- endif %}
```

The weights are {{ dtype }}.
{%- if engine %} The folder is for [{{ engine.title }}]({{ engine.address }})
(`pip install "{{ engine.requirements[-1] }}" transformers`).
{%- elif has_code %} The model's code lies in the folder, hence `trust_remote_code`; no ordinary config can say what is
left ({{ why_not_plain }}).
{%- elif pruned %} It is an ordinary `{{ kind }}`, and needs no further code.
{%- endif %}
"""


def license_of(folder: str | Path) -> dict[str, str]:
    """{"license": what the card in a folder says}, for records; {} where it says nothing."""
    try:
        name = ModelCard.load(Path(folder) / CARD_NAME, ignore_metadata_errors=True).data.license
    except Exception:  # no file, no YAML, no text: many classes
        return {}
    return {"license": name} if isinstance(name, str) else {}


def pipeline_tag(task: str | None) -> str | None:
    """What the hub calls a task."""
    return "text-classification" if task == "classification" else task


def model_card(name: str, model, record: dict, dtype: str, has_tokenizer: bool, snippet: dict | None = None) -> str:
    """The card of a model in a folder; `name` is the folder's, `dtype` its weights', `snippet` what `write` of an
    engine returned."""
    engine = ENGINES[record["engine"]["format"]] if "engine" in record else None
    task, data, is_pruned = record.get("task"), record.get("data") or {}, "removed" in record
    base_model = record.get("base_model") or record.get("original", {}).get("name")
    prefix = data.get("prefix", study_of(model.config.model_type, task).prefix)
    header = ModelCardData(
        base_model=base_model,
        datasets=[data["hub"]] if "hub" in data else None,
        library_name=record["engine"]["format"] if engine else "transformers",
        license=record.get("license"),
        pipeline_tag=pipeline_tag(task),
        tags=[
            "composable-pruning",
            *["pruned"] * is_pruned,
            *["compact"] * (model.config.model_type.startswith(COMPACT) and engine is None),
        ],
    )
    values = {
        "folder": json.dumps(name, ensure_ascii=False),
        "text": json.dumps((prefix or "") + "A text.", ensure_ascii=False),
    }
    card = ModelCard.from_template(
        header,
        template_str=TEMPLATE,
        **{key: record.get(key) for key in ("task", "script", "removed", "measured", "vocabulary")},
        **parameter_counts(model),
        answers_of=data.get("answers_of"),
        name=name,
        dtype=dtype,
        pruned=is_pruned,
        has_tokenizer=has_tokenizer,
        engine=engine,
        code=Template(engine.code.SNIPPET).render(**values, **snippet) if engine else None,
        kind=type(model).__name__.removeprefix("Compact"),
        auto_class=model._auto_class or AUTO_CLASSES[model.can_generate()],
        **form_of(model),
        has_code=model._auto_class is not None,  # in the folder: of a compact model
        generates=model.can_generate(),
        **values,
    )
    return str(card) + "\n"


def check_push(ids: Iterable[str]) -> None:
    """Make sure, before any work, that there is a token and that ids are ids of repositories."""
    for repository in ids:
        with as_user_error(f"--push-to-hub {repository}", "is no id of a repository"):
            validate_repo_id(repository)
        if huggingface_hub.get_token() is None:
            raise UserError("--push-to-hub: there is no token; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: str | Path, repository: str, talk: Talk) -> str:
    """Upload a finished folder to a repository of models on the hub, which is made if it is not there.

    Other files of the repository stay, but for weights. Returns its address.
    """
    if talk.quiet or not talk.stream.isatty():
        disable_progress_bars()
    talk.say(f"{folder}: is pushed to {repository}")
    with as_user_error(folder, f"is there, but could not be pushed to {repository} (the same command tries again)"):
        address = huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="A model of composable-pruning",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return str(address)
