"""What several test files share: running the scripts as commands, files, records, documents."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test that reached out would fail, not hang
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.runtime.records import content_digest, file_digest, sealed, write_record  # noqa: E402

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def load_script(name):
    """A top-level script as a module, whatever its name looks like."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(command, *more):
    """Run a command, as it would stand in a shell, in this process: (exit code, JSON result or None, stderr).

    `more`: further arguments, one by one.
    """
    script, *arguments = [*shlex.split(str(command)), *map(str, more)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = load_script(script).main(arguments)
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, json.loads(out.getvalue()) if out.getvalue().strip() else None, err.getvalue()


def run(command, *more):
    """run("prune.py -m model -o pruned"): the result of a command that has to succeed."""
    code, result, err = outcome(command, *more)
    assert code == 0, err
    return result


def fails(command, *more):
    """The one line on stderr of a command that a mistake of the user ends."""
    code, result, err = outcome(command, *more)
    assert (code, result) == (2, None) and is_one_line(err), err
    return err


def call_apart(script, *arguments, cwd, input=None, **environment):
    """Run a script in a process of its own, from a foreign folder; `input` is what it may read from stdin."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        input=input,
        text=True,
        capture_output=True,
        env=os.environ | environment,
        timeout=120,
    )


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


def command_of(script, flags):
    """A command out of {flag: value or list}; positional arguments have a name without a dash."""
    return shlex.join(map(str, [script, *as_arguments(flags)]))


def is_one_line(text):
    return text.endswith("\n") and text.count("\n") == 1


def read_csv(path):
    """The rows of a CSV."""
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def touched(folder):
    return {path: (path.stat().st_mtime_ns, digest) for path, digest in files_in(folder).items()}


FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense"


def files_in(*folders):
    """{path: digest} of every file under some folders."""
    return {path: file_digest(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def edited_json(source, target, edit):
    """A copy of a JSON file, changed by `edit`, which gets its content. A record's own digest fits again."""
    content = json.loads(source.read_text())
    edit(content)
    target.write_text(json.dumps(sealed(content) if source.name == "record.json" else content))
    return target


def save_forged(content, path):
    """Write what a `.pth` holds, with a digest that fits."""
    content = {name: value for name, value in content.items() if name != "digest"}
    torch.save({**content, "digest": content_digest(content)}, path)


def make_digests_fit(folder):
    """Let a model's record fit its files as they are now, and itself."""
    write_record(folder, without_digests(read_json(folder / "record.json")))


def without_digests(record):
    """A record as it was given to be written."""
    return {name: value for name, value in record.items() if name not in ("digest", "files")}


def rate(value, module=f"{FEED_FORWARD}.wi"):
    def edit(content):
        content["configs"][1][module] = value

    return edit


def section(document, title):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
