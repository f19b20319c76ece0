"""What all ten scripts promise, and what the sources keep to, each walked from end to end."""

import ast
import json
import os
import re
import resource
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import ROOT, SCRIPTS, call_apart, load_script

# The spellings are fixed: users' own scripts hang on them.
SPELLINGS = {
    "download_model.py": ["MODEL_TYPE"],
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
    "evaluate-distilbert.py": ["-m", "-t", "--data", "--split", "--limit", "--batch-size", "--beams"],
    "plot_loss.py": ["CSV", "-o"],
}
REQUIRED = {
    "download_model.py": ["MODEL_TYPE"],
    "config_generator.py": ["-m", "--attention", "--linear", "-n"],
    "prune_scheme_generator.py": [],
    "prune.py": ["-m", "-o"],
    "block-level_finetuning.py": ["-m", "-p", "-o", "--stats"],
    "compose_model.py": ["-m", "-p", "-n", "-o"],
    "model-level_finetuning.py": ["-m", "-p", "-n", "-o", "--stats"],
    "evaluate-t5.py": ["-m"],
    "evaluate-distilbert.py": ["-m"],
    "plot_loss.py": ["CSV"],
}
BY_THE_SCRIPT = {"config_generator.py": ["--attention", "--linear", "-n"]}  # its parser allows for --search instead
HEAVY = {"torch", "transformers", "numpy", "pandas", "matplotlib", "datasets", "sacrebleu", "accelerate"}


def good_flags(script, workshop, chain, out):
    """Flags with which a script does its work on the tiny models, writing to the folder `out`: {flag: value}."""
    model, data, tokenizer = (workshop / part / "t5" for part in ("model", "data", "tokenizer"))
    conf, training = chain / "conf.json", {"--stats": out / "stats.csv", "--epochs": 1, "--batch-size": 8}
    composing = {"-m": model, "-t": tokenizer, "-p": chain / "tuned", "-c": conf, "-n": 1}
    return {
        "download_model.py": {"MODEL_TYPE": "t5", "--checkpoint": chain / "composed-0", "-o": out},  # a local one
        "config_generator.py": {
            "-m": model,
            "-o": out / "conf.json",
            "--attention": [0.25, 0.5],
            "--linear": [0.3, 0.5],
            "-n": 2,
        },
        "prune_scheme_generator.py": {"-i": conf, "-o": out / "conf_prune.json"},
        "prune.py": {"-m": model, "-c": chain / "conf_prune.json", "-o": out / "library"},
        "block-level_finetuning.py": {
            "-m": model,
            "-p": chain / "pruned",
            "-o": out / "library",
            "-t": tokenizer,
            "--data": data,
            "--method": "train",
            **training,
        },
        "compose_model.py": {**composing, "-o": out / "composed"},
        "model-level_finetuning.py": {**composing, "-o": out / "model.pth", "--data": data, **training},
        "evaluate-t5.py": {"-m": model, "-t": tokenizer, "--data": data, "--limit": 4},
        "evaluate-distilbert.py": {
            "-m": workshop / "model" / "distilbert",
            "-t": workshop / "tokenizer" / "distilbert",
            "--data": workshop / "data" / "distilbert",
            "--limit": 4,
        },
        "plot_loss.py": {"CSV": [chain / "pruned-0.csv", chain / "tuned-0.csv"], "-o": out / "loss.png"},
    }[script]


def as_arguments(flags):
    """{flag: value or list} as an argument list; positional arguments have a name without a dash."""
    arguments = []
    for flag, value in flags.items():
        arguments += ([flag] if flag.startswith("-") else []) + (value if isinstance(value, list) else [value])
    return arguments


def is_one_line(text):
    return text.endswith("\n") and text.count("\n") == 1


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_can_be_started_as_a_program(script):
    assert (ROOT / script).read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    assert os.access(ROOT / script, os.X_OK), f"chmod +x {script}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_common_flags_and_spellings(script):
    actions = load_script(script).build_parser()._actions
    known = {name for action in actions for name in (*action.option_strings, action.metavar)}
    assert known >= {"--device", "--seed", "--quiet", *SPELLINGS[script]}
    assert ("--overwrite" in known) == (not script.startswith("evaluate"))
    names = {name: action for action in actions for name in (*action.option_strings, action.metavar)}
    assert [name for name in SPELLINGS[script] if names[name].required] == [
        name for name in SPELLINGS[script] if name in REQUIRED[script] and name not in BY_THE_SCRIPT.get(script, [])
    ]


@pytest.mark.parametrize("script, flag", [(script, flag) for script in SCRIPTS for flag in REQUIRED[script]])
def test_missing_flag(call, tmp_path, script, flag):
    flags = good_flags(script, tmp_path, tmp_path, tmp_path)  # paths that are not there: no run gets that far
    del flags[flag]
    code, result, err = call(script, *as_arguments(flags))
    assert (code, result) == (2, None)
    assert is_one_line(err) and ": error: " in err and flag in err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("extra", [["--no-such-flag"], ["--seed", "-1"], ["--seed", "x"], ["--qui"]])
def test_unknown_flag_or_value(call, tmp_path, script, extra):
    code, result, err = call(script, *as_arguments(good_flags(script, tmp_path, tmp_path, tmp_path)), *extra)
    assert (code, result) == (2, None)
    assert is_one_line(err) and ": error: " in err and extra[0] in err


# Runs scripts in processes of their own, forked from one that has imported what takes seconds. It reads
# [[script, arguments, folder], …] from stdin and writes [[exit code, stdout, stderr], …] to stdout.
FORKS = """
import json, os, pathlib, runpy, sys
import common.composition, common.evaluation, common.training, torchtext.datasets
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


# --- the sources -----------------------------------------------------------------------------------------------

FLOORS = {
    "errors": 0,
    "cli": 1,
    "records": 1,
    "schemes": 1,
    "masking": 2,
    "architectures": 2,
    "library": 2,
    "models": 2,
    "modeling_compact": 2,
    "sparse": 2,
    "checkpoints": 2,
    "stats": 2,
    "least_squares": 2,
    "attention": 3,
    "compact": 3,
    "data": 3,
    "captions": 3,
    "reviews": 3,
    "composition": 4,
    "evaluation": 4,
    "reconstruction": 4,
    "training": 4,
    "scoring": 4,
    "report": 5,
    "costs": 6,
    "search": 6,
    "budgets": 7,
    "demo": 7,
}
SCRIPT_FLOOR = 8
SAME_FLOOR = {
    ("models", "architectures"),
    ("models", "modeling_compact"),
    ("models", "sparse"),
    ("schemes", "records"),
}  # the only ones; none looks back
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
SUITE = [path for path in SOURCES if path.parent in (ROOT, ROOT / "common") and path.name != "__init__.py"]
TESTS = [path for path in SOURCES if ROOT / "tests" in path.parents]


def relative(path):
    return str(path.relative_to(ROOT))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(nodes):
    """The dotted names that some nodes import; `from common import cli` is common.cli."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += inner if node.module == "common" else [node.module]
    return names


def calls(tree):
    """(dotted name, keywords) of every call whose function is a plain dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SUITE, ids=relative)
def test_imports_only_from_lower_floors(path):
    is_script = path.parent == ROOT
    assert is_script or path.stem in FLOORS, "a new file: give it a floor"
    floor = SCRIPT_FLOOR if is_script else FLOORS[path.stem]
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    for name in imports(ast.walk(parsed(path))):
        assert name not in scripts, f"{path.name} imports the script {name}"
        package, _, module = name.partition(".")
        if package == "common" and (path.stem, module) not in SAME_FLOOR:
            assert FLOORS[module.partition(".")[0]] < floor, f"{path.name} (floor {floor}) imports {name}"


@pytest.mark.parametrize("path", [path for path in SUITE if FLOORS.get(path.stem, 0) < 2], ids=relative)
def test_the_lowest_floors_and_the_scripts_start_with_the_standard_library_alone(path):
    """Else `--help` would take seconds. tqdm may be imported inside a function, by the floors; scripts do as needed."""
    tree = parsed(path)
    allowed = sys.stdlib_module_names | {"common"}
    assert {name.partition(".")[0] for name in imports(tree.body)} <= allowed
    light = {"errors", "cli", "records", "schemes"}
    assert {name.split(".")[1] for name in imports(tree.body) if name.startswith("common.")} <= light
    if path.parent != ROOT:
        assert {name.partition(".")[0] for name in imports(ast.walk(tree))} <= allowed | {"tqdm"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles(path):
    tree = parsed(path)
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(imports(ast.walk(tree)))
    for function, keywords in calls(tree):
        assert keywords.get("allow_pickle", "False") == "False", function
        if function == "torch.load":
            assert keywords.get("weights_only") == "True"


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in TESTS], ids=relative)
def test_no_device_is_hard_coded(path):
    tree = parsed(path)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in strings if re.search(r"\b(cuda|mps|xpu):\d", text)]
    assert not [function for function, _ in calls(tree) if function.endswith(".cuda")]


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_no_test_reaches_for_the_network(path):
    tree = parsed(path)
    modules = {name.partition(".")[0] for name in imports(ast.walk(tree))}
    assert not modules & {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket"}
    reaching = ("load_dataset", "snapshot_download", "hf_hub_download", "urlopen", "urlretrieve")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert not function.endswith(reaching), function
            if function.endswith("from_pretrained") and node.args:
                assert not isinstance(node.args[0], ast.Constant), "a hub id"


def test_the_hubs_client_knows_that_it_is_offline():
    """It looks at HF_HUB_OFFLINE when it is imported, and transformers imports it."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
