"""The commands and snippets of the documents, run as they stand."""

import re
import shutil

import pytest
from helpers import read_json, run, section, snippets


def commands(text):
    """The lines that start with "$ python"; those that download a model are left out."""
    found = re.findall(r"^\$ python (.+)$", text, re.MULTILINE)
    return [command for command in found if not command.startswith("download_model.py")]


@pytest.fixture
def folder(workshop, tmp_path, monkeypatch):
    """A folder with a tiny T5 in the demo's place."""
    for part in ("model", "tokenizer", "data"):
        shutil.copytree(workshop / part / "t5", tmp_path / part / "t5-demo")
    record = tmp_path / "model" / "t5-demo" / "record.json"
    record.write_text(record.read_text().replace("/t5", "/t5-demo"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_stages_run_as_they_stand(folder):
    found = commands(section("README.md", "The stages"))
    assert len(found) == 8
    for command in found:
        run(command)
    assert (folder / "loss.png").is_file()


def test_the_readmes_hand_made_configuration_goes_on(folder):
    """By hand: half the decoder's 4 + 4 + 4 + 4 heads, and half of its Linears' weights."""
    run("config_generator.py --attention 0.25 --linear 0.3 --feed-forward 0.25 -n 1")
    (code,) = snippets(section("README.md", "Your own configuration"))
    exec(code, {})
    run("prune_scheme_generator.py")
    result = run("prune.py")["configurations"]
    assert len(result) == 2 and result[1]["attention"]["measured"] == pytest.approx(2 / 3 / 2)
    assert set(read_json(folder / "conf.json")["configs"][1]) >= {"decoder.block.0.layer.0.SelfAttention"}


def test_the_readmes_shipping_ends_in_a_model_that_transformers_loads(folder):
    text = section("README.md", "Shipping a pruned model")
    for command in commands(text):
        run(command)
    names = {}
    (code,) = snippets(text)
    exec(code, names)
    report = read_json(folder / "report.json")["figures"]
    assert sum(p.numel() for p in names["model"].parameters()) == report["parameters"]["model"]
    assert report["multiply_adds"]["ratio"] < 0.7


def test_the_search_by_hand_runs_as_it_stands(folder):
    """But for fewer rates."""
    for command in commands(section("docs/search.md", "By hand")):
        result = run(command.replace("0 0.25 0.5 0.75", "0 0.5").replace("0 0.3 0.5 0.7 0.9", "0 0.9"))
    assert [found["fraction"] <= budget for found, budget in zip(result["found"], (0.5, 0.4))] == [True, True]
    run("compose_model.py -p library -c conf.json -n 0")
