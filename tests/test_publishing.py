"""Model cards say what the records say, and their snippet runs; and what the hub's client is asked to do."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
from helpers import fails, read_json, run, snippets
from huggingface_hub import ModelCard, RepoUrl


def card_of(folder):
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module", params=["t5", "distilbert"])
def composed(request, workshop, tmp_path_factory):
    """(kind, folder of a compact model of that kind, with half of the heads gone)."""
    kind, folder = request.param, tmp_path_factory.mktemp("cards")
    model, conf = workshop / "model" / kind, folder / "conf.json"
    run(f"config_generator.py -m {model} -o {conf} --attention 0.5 --linear 0.25 -n 1")
    run(f"prune_scheme_generator.py -i {conf} -o {folder}/scheme.json")
    run(f"prune.py -m {model} -c {folder}/scheme.json -o {folder}/pruned")
    run(f"compose_model.py -m {model} -p {folder}/pruned -c {conf} -n 0 -o {folder}/m --compact")
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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", *snippets(card_of(folder).text)]
    done = subprocess.run(command, cwd=folder.parent, text=True, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[" if kind == "t5" else "LABEL_")


def test_a_folder_is_pushed_and_a_failure_is_one_line(t5, chain, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    composing = f"compose_model.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 0 -o m --push-to-hub me/small"
    pushed = []

    def fail(**asked):
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, exist_ok: RepoUrl(f"https://huggingface.co/{name}")
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    assert "could not be pushed to me/small (the same command tries again): nobody there" in fails(
        f"{composing} --quiet"
    )
    assert (here / "m" / "config.json").is_file()
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **asked: pushed.append(asked))
    assert run(composing)["pushed_to"] == "https://huggingface.co/me/small"
    assert [(asked["repo_id"], str(asked["folder_path"])) for asked in pushed] == [("me/small", "m")]
