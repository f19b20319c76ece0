"""Every benchmark answers --help; their figures are no test's business."""

import importlib

import pytest
from helpers import ROOT

FOLDER = ROOT / "benchmarks"
PROGRAMS = {path.stem for path in FOLDER.glob("*.py")} - {"measure", "render"}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_benchmarks_answer_help(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    program = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_tables_of_the_results_are_those_of_the_data(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import render

    text = render.DOCUMENT.read_text(encoding="utf-8")
    assert render.rendered(text) == text
    assert {match[2] for match in render.TABLE.finditer(text)} == {path.stem for path in render.FOLDER.glob("*.json")}
