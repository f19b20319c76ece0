"""What all ten scripts promise, each walked from end to end."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, as_arguments, call_apart, good_flags, is_one_line, load_script

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
    "config_generator.py": ["--attention", "--linear", "-n"],
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
    assert len([action for action in actions if action.option_strings]) <= 33  # 31, help and version
    assert ("--overwrite" in known) == (not script.startswith(("evaluate", "prune_scheme")))


@pytest.mark.parametrize("script, flag", [(script, flag) for script in REQUIRED for flag in REQUIRED[script]])
def test_missing_flag(call, tmp_path, script, flag):
    flags = good_flags(script, tmp_path, tmp_path, tmp_path)  # paths that are not there: no run gets that far
    del flags[flag]
    code, result, err = call(script, *as_arguments(flags))
    assert (code, result) == (2, None)
    assert is_one_line(err) and ": error: " in err and flag in err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("extra", [["--no-such-flag"]])
def test_unknown_flag_or_value(call, tmp_path, script, extra):
    code, result, err = call(script, *as_arguments(good_flags(script, tmp_path, tmp_path, tmp_path)), *extra)
    assert (code, result) == (2, None)
    assert is_one_line(err) and ": error: " in err and extra[0] in err


# Runs scripts in processes of their own, forked from one that has imported what takes seconds. It reads
# [[script, arguments, folder], …] from stdin and writes [[exit code, stdout, stderr], …] to stdout.
FORKS = """
import json, os, pathlib, runpy, sys
import common.composing.compose, common.evaluation.answers, common.training.loop, torchtext.datasets
results = []
for script, arguments, folder in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        os._exit(99)  # the script has not called sys.exit
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *((pathlib.Path(folder) / name).read_text() for name in ("stdout.log", "stderr.log"))])
print(json.dumps(results))
"""
AFRESH = ("prune_scheme_generator.py", "evaluate-t5.py", "plot_loss.py")  # as a user does, imports and all


@pytest.fixture(scope="module")
def finished(workshop, chain, tmp_path_factory):
    """Every script run in a process of its own, from a foreign folder, with relative paths.

    Returns {script: (flags, exit code, stdout, stderr)}.
    """
    jobs, done = {}, {}
    for script in SCRIPTS:
        foreign = tmp_path_factory.mktemp("foreign")
        flags = good_flags(script, workshop, chain, foreign)
        arguments = [
            os.path.relpath(value, foreign) if isinstance(value, os.PathLike) else str(value)
            for value in as_arguments(flags)
        ]
        jobs[script] = flags, [*arguments, "--quiet"], foreign
    for script in AFRESH:
        process = call_apart(script, *jobs[script][1], cwd=jobs[script][2])
        done[script] = jobs[script][0], process.returncode, process.stdout, process.stderr
    forked = [script for script in SCRIPTS if script not in AFRESH]
    orders = json.dumps([[str(ROOT / script), jobs[script][1], str(jobs[script][2])] for script in forked])
    server = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=orders,
        text=True,
        capture_output=True,
        timeout=300,
        cwd=tmp_path_factory.mktemp("server"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (server.returncode, server.stderr) == (0, "")
    return done | {script: (jobs[script][0], *result) for script, result in zip(forked, json.loads(server.stdout))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_is_one_line_of_json(finished, script):
    flags, code, out, err = finished[script]
    assert (code, err) == (0, "")
    assert is_one_line(out)
    assert isinstance(json.loads(out, parse_constant=pytest.fail), dict)  # no NaN: that is not JSON
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
