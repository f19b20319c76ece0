"""Model cards: what they say is what the records say, their snippet runs, and the hub's own reader understands them."""

import os
import re
import subprocess
import sys

import pytest
from helpers import build_model, load_script, read_json
from huggingface_hub import ModelCard

from common.models.cards import license_of
from common.models.compact import make_compact
from common.models.saving import save_model

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def card_of(folder):
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module", params=["t5", "distilbert"])
def composed(request, workshop, tmp_path_factory):
    """(kind, folder of a compact model of that kind, with half of the heads gone)."""
    kind, folder = request.param, tmp_path_factory.mktemp("cards")

    def run(script, *arguments):
        assert load_script(script).main([*map(str, arguments), "--quiet"]) == 0

    model, conf, scheme = workshop / "model" / kind, folder / "conf.json", folder / "scheme.json"
    run("config_generator.py", "-m", model, "-o", conf, "--attention", 0.5, "--linear", 0.25, "-n", 1)
    run("prune_scheme_generator.py", "-i", conf, "-o", scheme)
    run("prune.py", "-m", model, "-c", scheme, "-o", folder / "pruned")
    run("compose_model.py", "-m", model, "-p", folder / "pruned", "-c", conf, "-n", 0, "-o", folder / "m", "--compact")
    return kind, folder / "m"


def test_a_card_says_what_the_model_is(composed, workshop):
    """Oracle: the hub's own reader of cards for the header, and the record."""
    kind, folder = composed
    card, removed = card_of(folder), read_json(folder / "record.json")["removed"]["attention"]
    assert card.data.to_dict() == {
        "base_model": kind,
        "library_name": "transformers",
        "pipeline_tag": {"t5": "translation", "distilbert": "text-classification"}[kind],
        "tags": ["composable-pruning", "pruned", "compact"],
    }
    heads, weights = removed["heads"], removed["weights"]
    assert f"\n| attention: heads | {heads[0]} | {heads[1]} |\n" in card.text and heads[0] == heads[1] // 2 > 0
    assert f"\n| attention: weights | {weights[0]:,} | {weights[1]:,} |\n" in card.text
    assert str(folder.parent) not in str(card) and str(workshop) not in str(card)


def test_the_snippet_runs_as_it_stands(composed, tmp_path):
    """In a process that knows nothing of the suite, in the folder that the model lies in."""
    kind, folder = composed
    (snippet,) = SNIPPET.findall(card_of(folder).text)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder.parent, text=True, capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[" if kind == "t5" else "LABEL_")


def test_measured_figures_and_a_license_are_said_where_they_are_known(tmp_path):
    record = {"task": "translation", "base_model": "a/b", "license": "mit", "measured": {"val_loss": 1.5, "what": "x"}}
    for name, content in (("known", record), ("unknown", {})):
        save_model(tmp_path / name, build_model("t5"), content)
        save_model(tmp_path / f"{name}-compact", make_compact(build_model("t5"), {})[0], content)
    assert "\n| val loss | 1.5 |\n" in card_of(tmp_path / "known").text and license_of(tmp_path / "known") == "mit"
    assert "measured" not in card_of(tmp_path / "unknown").text and license_of(tmp_path / "unknown") is None
    for content in (b"\xff\xfe", b"---\n: : :\n---\n", b"---\nlicense: [1]\n---\n", b"no header"):
        (tmp_path / "README.md").write_bytes(content)
        assert license_of(tmp_path) is None
