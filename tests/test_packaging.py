"""`pip install .`: the stages as one command."""

import subprocess
import sys
import tomllib
import zipfile

import pytest
from helpers import ROOT

from common import __main__ as umbrella


def test_every_script_is_a_stage_with_its_help(monkeypatch, capsys):
    assert set(umbrella.STAGES.values()) == set(ROOT.glob("*.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for stage, path in umbrella.STAGES.items():
        monkeypatch.setattr(sys, "argv", ["composable-pruning", stage, "--help"])
        with pytest.raises(SystemExit) as end:
            umbrella.main()
        assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {path.name}")
    monkeypatch.setattr(sys, "argv", ["composable-pruning", "prun"])
    assert umbrella.main() == 2 and "no stage 'prun'" in capsys.readouterr().err


def test_the_wheel_holds_the_scripts_and_the_package(tmp_path):
    """Oracle: the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "*.py", "common"], cwd=ROOT, capture_output=True, text=True)
    known = {name for name in listed.stdout.split() if "/" not in name or name.startswith("common/")}
    if listed.returncode or not known:
        pytest.skip("needs a clone")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    flags = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, source], capture_output=True, text=True)
    if "BackendUnavailable" in done.stderr or "No module named pip" in done.stderr:
        pytest.skip("needs pip and setuptools")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.removeprefix("composable_pruning/") for name in zipfile.ZipFile(wheel).namelist()}
    assert known <= names and {name for name in names - known if ".dist-info/" not in name} == set()


def test_constraints_are_within_the_requirements():
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "requirements.txt").read_text().split("\n") if line]
    tested = dict(line.split("==") for line in (ROOT / "tests" / "constraints.txt").read_text().split("\n")[1:] if line)
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(tested.pop(requirement.name))
    assert not tested
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
