"""Model cards say what the records say, and their snippet runs; and what the hub's client is asked to do."""

import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from helpers import fails, read_json, run, snippets
from huggingface_hub import EvalResult, ModelCard, RepoUrl

from common.models.saving import damage


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
    assert f"\n| parameters | {read_json(folder / 'record.json')['measured']['parameters']:,} |\n" in card.text
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


def test_scores_go_into_the_card_and_nothing_else_changes(composed, tmp_path):
    """Oracles: the hub's own reader, and the evaluation's result. A second evaluation takes the place of the first."""
    kind, folder = composed
    copy = shutil.copytree(folder, folder.parent / "measured", dirs_exist_ok=True)
    card = card_of(copy)
    other = EvalResult("translation", "wmt16", "WMT16", "sacrebleu", 20.5, dataset_split="test", metric_name="BLEU")
    card.data.eval_results, card.data.model_name = [other], "mine"
    (copy / "README.md").write_text(f"{card}\nWritten by hand: größer\n", encoding="utf-8")
    before = card_of(copy)
    script = {"t5": "evaluate-t5.py --max-new-tokens 4", "distilbert": "evaluate-distilbert.py"}[kind]
    for more in ("--split validation", "--bootstrap 0", "--bootstrap 9"):
        result = run(f"{script} -m {copy} --update-card {more}")
    after, header = card_of(copy), card_of(copy).data.to_dict()
    assert result["card"] == str(copy / "README.md") and after.text == before.text
    metrics = {"t5": ["sacrebleu", "chrf"], "distilbert": ["accuracy", "f1", "matthews_correlation"]}[kind]
    names = {"sacrebleu": "bleu", "matthews_correlation": "matthews"}
    first, *found = after.data.eval_results
    assert first == other and after.data.model_name == "mine"
    assert [(each.dataset_split, each.metric_type) for each in found] == [
        (split, metric) for split in ("validation", "test") for metric in metrics
    ]
    for each in found[len(metrics) :]:
        name = names.get(each.metric_type, each.metric_type)
        assert each.metric_value == pytest.approx(result[name], abs=1e-4) and each.dataset_name == kind
        assert each.metric_args["interval"] == pytest.approx(result["intervals"][name], abs=1e-4)
        assert each.task_type == header["pipeline_tag"]
    assert {**header, "model-index": 0} == {**before.data.to_dict(), "model-index": 0}
    assert damage(copy) is None


def test_a_card_that_cannot_be_added_to_is_refused_before_any_work(composed, t5, tmp_path):
    for model, more, words in (
        ("none.pth", "", "none.pth has no card"),
        ("bare", "", "bare has no card"),
        ("bare", "--limit 2", "leave out --limit 2"),
        ("odd", "", "has metadata that are no model card's"),
    ):
        shutil.copytree(t5, tmp_path / "bare", dirs_exist_ok=True)
        shutil.copytree(t5, tmp_path / "odd", dirs_exist_ok=True)
        (tmp_path / "odd" / "README.md").write_text("---\n- a list\n---\n")
        (tmp_path / "none.pth").touch()
        assert words in fails(f"evaluate-t5.py -m {tmp_path / model} --update-card {more}")


def test_agreement_with_a_model_goes_into_no_card(composed, workshop, tmp_path):
    kind, folder = composed
    data = shutil.copytree(workshop / "data" / kind, tmp_path / "data")
    (data / "record.json").write_text('{"answers_of": "teacher"}')
    script = {"t5": "evaluate-t5.py", "distilbert": "evaluate-distilbert.py"}[kind]
    assert "references are the answers of teacher" in fails(f"{script} -m {folder} --data {data} --update-card")


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
