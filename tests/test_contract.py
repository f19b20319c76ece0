"""What all ten scripts promise, each walked from end to end."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, as_arguments, call_apart, fails, good_flags, is_one_line, load_script, outcome

# The spellings are fixed: users' own scripts depend on them.
SPELLINGS = {
    "download_model.py": ["MODEL_TYPE", "--checkpoint", "-t", "--task", "--data", "--train-file", "--prefix"],
    "config_generator.py": ["-m", "-o", "--attention", "--linear", "-n"],
    "prune_scheme_generator.py": ["-i", "-o"],
    "prune.py": ["-m", "-c", "-o"],
    "block-level_finetuning.py": [
        "-m",
        "-p",
        "-o",
        "--stats",
        "-t",
        "--data",
        "--method",
        "--calibration",
        "--epochs",
        "--batch-size",
        "--lr",
        "--early-stop",
    ],
    "compose_model.py": ["-m", "-t", "-p", "-c", "-n", "-o"],
    "model-level_finetuning.py": [
        "-m",
        "-p",
        "-c",
        "-n",
        "-o",
        "--stats",
        "-t",
        "--data",
        "--epochs",
        "--batch-size",
        "--lr",
        "--early-stop",
        "--distill",
        "--target-loss",
    ],
    "evaluate-t5.py": ["-m", "-t", "--data", "--split", "--limit", "--batch-size", "--beams"],
    "evaluate-distilbert.py": ["-m", "-t", "--data", "--split", "--limit", "--batch-size"],
    "plot_loss.py": ["CSV", "-o"],
}
REQUIRED = {  # flags that have no default
    "config_generator.py": ["--attention", "--linear"],
    "compose_model.py": ["-n"],
    "model-level_finetuning.py": ["-n"],
}
HEAVY = {"torch", "transformers", "numpy", "pandas", "matplotlib", "datasets", "sacrebleu", "accelerate"}


# --- the command line ------------------------------------------------------------------------------------------


def test_the_ten_scripts_are_there():
    assert sorted(SPELLINGS) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_neither_torch_nor_a_second(script, tmp_path):
    """Oracles: python's own import log, and the child's CPU time as the kernel counts it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, "--help"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 0
    assert "argparse" in imported and not HEAVY & imported
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert all(flag in done.stdout for flag in SPELLINGS[script])
    assert f"example: {script} " in done.stdout
    following = " ".join(done.stdout.split()).partition("next stage: ")[2]
    assert script == "plot_loss.py" or any(each in following for each in SCRIPTS if each != script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_can_be_started_as_a_program(script):
    assert (ROOT / script).read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    assert os.access(ROOT / script, os.X_OK), f"chmod +x {script}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_common_flags_and_spellings(script):
    actions = load_script(script).build_parser()._actions
    known = {name for action in actions for name in (*action.option_strings, action.metavar)}
    assert known >= {"--quiet", "--version", *SPELLINGS[script]}
    assert len([action for action in actions if action.option_strings]) <= 38  # 35, help, version and plan
    assert ("--overwrite" in known) == (not script.startswith(("evaluate", "prune_scheme")))


@pytest.mark.parametrize("script, flag", [(script, flag) for script in REQUIRED for flag in REQUIRED[script]])
def test_missing_flag(tmp_path, script, flag):
    flags = good_flags(script, tmp_path, tmp_path, tmp_path)  # paths that are not there: no run gets that far
    del flags[flag]
    err = fails(script, *as_arguments(flags))
    assert ": error: " in err and flag in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag(tmp_path, script):
    assert "--no-such-flag" in fails(script, *as_arguments(good_flags(script, *[tmp_path] * 3)), "--no-such-flag")


AFRESH = ("prune_scheme_generator.py", "evaluate-t5.py", "plot_loss.py")  # as a user does, imports and all


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_is_one_line_of_json(workshop, chain, tmp_path, monkeypatch, script):
    """From a foreign folder, with relative paths."""
    flags = good_flags(script, workshop, chain, tmp_path)
    arguments = [
        os.path.relpath(value, tmp_path) if isinstance(value, os.PathLike) else str(value)
        for value in as_arguments(flags)
    ]
    if script in AFRESH:
        process = call_apart(script, *arguments, "--quiet", cwd=tmp_path)
        assert (process.returncode, process.stderr) == (0, "") and is_one_line(process.stdout)
        result = json.loads(process.stdout, parse_constant=pytest.fail)  # no NaN: that is not JSON
    else:
        monkeypatch.chdir(tmp_path)
        code, result, err = outcome(script, *arguments, "--quiet")
        assert (code, err) == (0, "")
    assert isinstance(result, dict)
    assert all(flags[flag].exists() for flag in ("-o", "--stats") if flag in flags)


@pytest.mark.parametrize(
    "command",
    [
        "config_generator.py -m nowhere --attention 0.5 --linear 0.5 -n 1",
        "prune_scheme_generator.py -i nowhere",
        "prune.py -c nowhere",
        "block-level_finetuning.py -m nowhere",
        "compose_model.py -m nowhere -n 0",
        "model-level_finetuning.py -m nowhere -n 0",
        "evaluate-t5.py -m nowhere",
        "evaluate-distilbert.py -m nowhere",
        "plot_loss.py nowhere",
    ],
)
def test_a_missing_path_is_refused_before_torch_is_imported(command, tmp_path):
    """Oracle: python's own import log."""
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, *arguments], cwd=tmp_path, text=True, capture_output=True
    )
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 2 and "nowhere" in done.stderr.splitlines()[-1] and "torch" not in imported
