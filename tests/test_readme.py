"""The commands and snippets of the documents, run as they stand."""

import re
import shlex
import shutil

import pytest
from helpers import ROOT, read_json, run, section, snippets


def commands(text):
    """[(script, arguments)] of the lines that start with "$ python"; those that download a model are left out."""
    found = [shlex.split(line) for line in re.findall(r"^\$ python (.+)$", text, re.MULTILINE)]
    return [(script, arguments) for script, *arguments in found if script != "download_model.py"]


@pytest.fixture
def folder(workshop, tmp_path, monkeypatch):
    """A folder with a tiny T5 in the demo's place."""
    for part in ("model", "tokenizer", "data"):
        shutil.copytree(workshop / part / "t5", tmp_path / part / "t5-demo")
    record = tmp_path / "model" / "t5-demo" / "record.json"
    record.write_text(record.read_text().replace("/t5", "/t5-demo"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_stages_run_as_they_stand(folder, succeeds):
    found = commands(section("README.md", "The stages"))
    assert len(found) == 8
    for script, arguments in found:
        succeeds(script, *arguments)
    assert (folder / "loss.png").is_file()


@pytest.mark.parametrize("more", [[], ["--feed-forward", 0.25]], ids=["without neurons", "with neurons"])
def test_the_readmes_hand_made_configuration_goes_on(folder, succeeds, more):
    """By hand: half the decoder's 4 + 4 + 4 + 4 heads, and half of its Linears' weights."""
    succeeds("config_generator.py", "--attention", 0.25, "--linear", 0.3, "-n", 1, *more)
    (code,) = snippets(section("README.md", "Your own configuration"))
    exec(code, {})
    run("prune_scheme_generator.py")
    result = run("prune.py")["configurations"]
    assert len(result) == 2 and result[1]["attention"]["measured"] == pytest.approx(2 / 3 / 2)
    assert set(read_json(folder / "conf.json")["configs"][1]) >= {"decoder.block.0.layer.0.SelfAttention"}


def test_the_readmes_shipping_ends_in_a_model_that_transformers_loads(folder, succeeds):
    text = section("README.md", "Shipping a pruned model")
    for script, arguments in commands(text):
        succeeds(script, *arguments)
    names = {}
    (code,) = snippets(text)
    exec(code, names)
    report = read_json(folder / "report.json")["figures"]
    assert sum(p.numel() for p in names["model"].parameters()) == report["parameters"]["model"]
    assert report["multiply_adds"]["ratio"] < 0.7


def test_the_search_by_hand_runs_as_it_stands(folder, succeeds):
    for script, arguments in commands(section("docs/search.md", "By hand")):
        result = succeeds(script, *arguments)
    assert [each["fraction"] <= budget for each, budget in zip(result["found"], (0.5, 0.4))] == [True, True]
    run("compose_model.py -p library -c conf.json -n 0")


def test_links_between_the_documents_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
