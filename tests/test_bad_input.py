"""Whatever is wrong with the input: exit code 2, one line that names it and the remedy, and every file as it was."""

import errno
import json
import os
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from helpers import (
    FEED_FORWARD,
    SCRIPTS,
    call_apart,
    command_of,
    edited_json,
    fails,
    files_in,
    good_flags,
    is_one_line,
    rate,
    run,
    save_forged,
)
from tiny import build_tokenizer

from common.runtime.records import file_digest

OUTPUTS = [
    ("download_model.py", "-o"),
    ("config_generator.py", "-o"),
    ("prune_scheme_generator.py", "-o"),
    ("prune.py", "-o"),
    ("block-level_finetuning.py", "-o"),
    ("block-level_finetuning.py", "--stats"),
    ("compose_model.py", "-o"),
    ("model-level_finetuning.py", "-o"),
    ("model-level_finetuning.py", "--stats"),
    ("plot_loss.py", "-o"),
]
INPUTS = [
    ("config_generator.py", "-m"),
    ("prune_scheme_generator.py", "-i"),
    ("prune.py", "-c"),
    ("block-level_finetuning.py", "-p"),
    ("block-level_finetuning.py", "-t"),
    ("block-level_finetuning.py", "--data"),
    ("compose_model.py", "-p"),
    ("compose_model.py", "-c"),
    ("model-level_finetuning.py", "-m"),
    ("evaluate-t5.py", "-t"),
    ("evaluate-distilbert.py", "--data"),
    ("plot_loss.py", "CSV"),
]
ATTENTION = "encoder.block.0.layer.0.SelfAttention"
LIBRARY_FILE = f"{FEED_FORWARD}.wi-461_wo-461.npy"  # 0.3 of 48 * 32 weights each


@pytest.fixture
def command(workshop, chain, tmp_path):
    """command(script, {flag: value}): what makes good outputs in tmp_path, with some flags changed."""
    return lambda script, changes: command_of(script, good_flags(script, workshop, chain, tmp_path) | changes)


@pytest.fixture
def refuses(command, workshop, chain, tmp_path):
    """refuses(script, {flag: value}): the one line on stderr, once it is sure that no file was touched or made.

    A library that was begun, and holds nothing yet, does no harm.
    """

    def run(script, changes, more=""):
        before = files_in(workshop, chain, tmp_path)
        err = fails(f"{command(script, changes)} {more}")
        after = files_in(workshop, chain, tmp_path)
        begun = [path for path in after.keys() - before.keys() if path.name in ("record.json", ".lock")]
        assert all(json.loads(path.read_text())["variants"] == {} for path in begun if path.name == "record.json")
        assert {path: digest for path, digest in after.items() if path not in begun} == before
        return err

    return run


class MakesMarker:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def all_in(words, text):
    return [word for word in map(str, words) if word not in text] == []


# --- paths and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flag", INPUTS)
@pytest.mark.parametrize("kind", ["missing", "binary file", "empty folder"])
def test_input_that_is_none(refuses, tmp_path, script, flag, kind):
    path = tmp_path / "given"
    if kind == "binary file":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "empty folder":
        path.mkdir()
    assert str(path) in refuses(script, {flag: path})


@pytest.mark.parametrize("script, flag", OUTPUTS)
def test_output_that_cannot_be_written(refuses, tmp_path, script, flag):
    """Not even root can write below a file; --overwrite never replaces a folder of something else."""
    (tmp_path / "a file").write_text("precious")
    path = tmp_path / "a file" / "nowhere" / "out.png"
    assert all_in([path, "cannot be written"], refuses(script, {flag: path}))
    path = tmp_path / "holiday.png"
    path.mkdir()
    (path / "beach.txt").write_text("precious")
    more = "" if script == "prune_scheme_generator.py" else "--overwrite"
    assert script == "download_model.py" or str(path) in refuses(script, {flag: path}, more)


def test_no_network_and_no_model_cached(tmp_path):
    """In a process of its own: the hub's client looks for its cache, and whether it is offline, when it is imported."""
    started = time.monotonic()
    process = call_apart(
        "download_model.py", "t5", "--quiet", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")
    )
    assert time.monotonic() - started < 60  # no minutes of retries, on however busy a machine
    assert (process.returncode, process.stdout) == (2, "") and is_one_line(process.stderr)
    assert all_in(["google-t5/t5-small", "t5-demo"], process.stderr) and files_in(tmp_path) == {}


# --- configurations and schemes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"--attention": [0.25, 0.5, 0.5]}, ["--attention", "3 rates", "2 configurations"]),
        ({"-n": 3}, ["--attention", "2 rates", "3 configurations"]),
        ({"--linear": [0.3, 1]}, ["--linear", "'1'", "below 1"]),
        ({"--attention": [0.3, 1.01]}, ["--attention", "'1.01'", "from 0 to 1"]),
        ({"--attention": [0.25, 0.9]}, ["configuration 1", "SelfAttention", "all 4 heads", "0.75"]),
    ],
)
def test_rates_on_the_command_line(refuses, changes, words):
    assert all_in(words, refuses("config_generator.py", changes))


@pytest.mark.parametrize("module, key, value", [(ATTENTION, "heads", 10), (f"{FEED_FORWARD}.wi", "weights", 9999)])
def test_modules_that_are_not_the_models(refuses, chain, tmp_path, module, key, value):
    """conf.json's list of modules was edited: 0.5 of 10 heads are more than the model's 4."""

    def edit(content):
        content["modules"][module][key] = value
        for config in content["configs"]:
            config[module] = 0.5

    conf, scheme = edited_json(chain / "conf.json", tmp_path / "mine.json", edit), tmp_path / "scheme.json"
    run(f"prune_scheme_generator.py -i {conf} -o {scheme}")
    err = refuses("prune.py", {"-c": scheme})
    assert all_in([scheme, module.removesuffix(".wi"), "config_generator.py"], err)


# --- what belongs to another model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, kind, remedy",
    [("evaluate-t5.py", "distilbert", "evaluate-distilbert.py"), ("evaluate-distilbert.py", "t5", "evaluate-t5.py")],
)
def test_evaluated_by_the_other_script(refuses, workshop, script, kind, remedy):
    model = workshop / "model" / kind
    assert all_in([model, remedy], refuses(script, {"-m": model}))


def test_tokenizer_with_more_words_than_the_model(refuses, tmp_path):
    """Its larger ids would run out of the model's 64 embeddings in the middle of the work."""
    tokenizer = build_tokenizer("t5")
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "large")
    assert all_in([tmp_path / "large", "64"], refuses("evaluate-t5.py", {"-t": tmp_path / "large"}))


# --- libraries -------------------------------------------------------------------------------------------------


def save_arrays(path, **arrays):
    with path.open("wb") as handle:
        np.savez(handle, **arrays)


DAMAGE = {  # ways in which module files get spoilt
    "missing": lambda path, marker: path.unlink(),
    "bit flipped": lambda path, marker: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "other shape": lambda path, marker: np.save(
        path, np.zeros((), [("wi.weight", np.float32, (4, 4)), ("wi.keep", bool, (4, 4))])
    ),
}
VISIBLE = {  # without the record's digest, too
    "truncated": lambda path, marker: path.write_bytes(path.read_bytes()[:-100]),
    "truncated header": lambda path, marker: path.write_bytes(path.read_bytes()[:40]),
    "header spoilt": lambda path, marker: path.write_bytes(path.read_bytes().replace(b"]", b"[", 1)),
    "plain array": lambda path, marker: np.save(path, np.zeros((48, 32), np.float32)),
    "pickled": lambda path, marker: np.save(path, np.array([MakesMarker(marker)], object)),
    "pickled field": lambda path, marker: np.save(path, np.array((MakesMarker(marker),), [("wi.weight", object)])),
    "archive": lambda path, marker: save_arrays(path, **{"wi.weight": np.zeros((48, 32), np.float32)}),
}


@pytest.mark.parametrize("how", [*DAMAGE, *VISIBLE])
def test_damaged_module_file(refuses, chain, tmp_path, how):
    """With a record that matches the damaged file, the reader of module files itself has to refuse it."""
    library, marker = tmp_path / "library", tmp_path / "marker"
    shutil.copytree(chain / "tuned", library)
    (DAMAGE | VISIBLE)[how](library / LIBRARY_FILE, marker)
    assert str(library / LIBRARY_FILE) in refuses("compose_model.py", {"-p": library})
    if how in VISIBLE:

        def forge(content):
            content["variants"][LIBRARY_FILE.removesuffix(".npy")]["sha256"] = file_digest(library / LIBRARY_FILE)

        edited_json(library / "record.json", library / "record.json", forge)
        assert str(library / LIBRARY_FILE) in refuses("compose_model.py", {"-p": library})
    assert not marker.exists()


@pytest.mark.parametrize(
    "script, flag, name, there",
    [
        ("config_generator.py", "-m", "model/t6", ["model/distilbert", "model/t5"]),
        ("compose_model.py", "-p", "tunes", ["pruned", "tuned"]),
        ("compose_model.py", "-c", "config.json", ["conf.json", "conf_prune.json"]),
        ("prune.py", "-c", "prune.json", ["conf.json", "conf_prune.json"]),
        ("evaluate-t5.py", "-m", "tuned-1.pth", ["composed-0", "composed-1", "composed-2", "pruned-0.pth"]),
    ],
)
def test_a_name_that_is_not_there_brings_those_that_are(refuses, workshop, chain, script, flag, name, there):
    place = workshop if name.startswith("model/") else chain
    paths = ", ".join(str(place / path) for path in there)
    assert all_in([f"{place / name}: no such ", f"; there are {paths}"], refuses(script, {flag: place / name}))


@pytest.mark.parametrize("flag", ["--report", "--save-predictions"])
def test_a_file_for_each_of_two_models_that_are_called_alike_is_refused_before_any_work(refuses, chain, tmp_path, flag):
    """Neither model is there to be loaded."""
    models = [tmp_path / folder / "0" for folder in ("tuned", "other")]
    for model in models:
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    err = refuses("evaluate-t5.py", {"-m": models, flag: tmp_path / "{name}.json"})
    assert all_in([flag, f"{models[0]} and {models[1]} would have one file", "evaluated one by one"], err)


# --- models and tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, words",
    [
        ("holds code", ["more than plain tensors"]),
        ("truncated", []),
        ("state dict alone", ["model-level_finetuning.py"]),
        ("without weights", ["its weights are not those of a T5ForConditionalGeneration"]),
        ("list", []),
    ],
)
def test_bad_pth(refuses, chain, tmp_path, how, words):
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    good = chain / "tuned-0.pth"
    content = torch.load(good, weights_only=True)
    if how == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif how == "without weights":
        save_forged(content | {"state_dict": {}, "masks": {}}, path)
    else:
        contents = {
            "holds code": content | {"masks": MakesMarker(marker)},
            "state dict alone": content["state_dict"],
            "list": [1, 2],
        }
        torch.save(contents[how], path)
    assert all_in([path, *words], refuses("evaluate-t5.py", {"-m": path}))
    assert not marker.exists()


def pickle_weights(folder, marker):
    (folder / "model.safetensors").unlink()
    torch.save(MakesMarker(marker), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, marker: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1000]
        ),
        lambda folder, marker: (folder / "model.safetensors").unlink(),
        pickle_weights,
    ],
    ids=["truncated", "no weights", "pickled"],
)
def test_bad_model_folder(refuses, workshop, tmp_path, spoil):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(workshop / "model" / "t5", folder)
    spoil(folder, marker)
    assert str(folder) in refuses("evaluate-t5.py", {"-m": folder})
    assert not marker.exists()


@pytest.mark.parametrize(
    "flag, part, name",
    [("-m", "model", "model.safetensors"), ("-t", "tokenizer", "tokenizer.json"), ("--data", "data", "test2016.en")],
)
def test_what_git_lfs_has_not_fetched_is_named(refuses, workshop, tmp_path, flag, part, name):
    """Two text files of pointers have as many lines, and would be translated. A pointer as Git LFS writes it."""
    folder = tmp_path / part
    shutil.copytree(workshop / part / "t5", folder)
    for path in {folder / name, folder / name.replace("2016.en", "2016.de")}:
        oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12345\n")
    err = refuses("evaluate-t5.py", {flag: folder})
    assert all_in([folder, f"{name} is a pointer of Git LFS, not the file; run `git lfs pull` where it lies"], err)


# --- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, file, content, words",
    [
        ("t5", "test2016.de", None, ["no such file"]),
        ("t5", "test2016.de", b"ein Hund\n", ["16"]),
        ("distilbert", "test.jsonl", None, ["has no test split"]),
        ("distilbert", "test.jsonl", b"", ["empty"]),
        ("distilbert", "test.jsonl", b"{\n", ["line 1", "JSON"]),
        ("distilbert", "test.jsonl", b'{"text": "good", "label": 7}\n', ["label 7"]),  # the model knows two classes
        ("distilbert", "test.jsonl", b'{"text": "good", "label": "bad"}\n', ["label 'bad'", "LABEL_0, LABEL_1"]),
    ],
)
def test_bad_data_folder(refuses, workshop, tmp_path, kind, file, content, words):
    folder = tmp_path / "data"
    shutil.copytree(workshop / "data" / kind, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    err = refuses(f"evaluate-{kind}.py", {"--data": folder})
    assert all_in([folder, *words], err), err


# --- outputs that are there already ----------------------------------------------------------------------------


@pytest.fixture
def remakes(chain, tmp_path):
    """What to change so that a script would make something else in the same place: {script: {flag: value}}."""
    return {
        "download_model.py": {"--checkpoint": chain / "composed-2"},
        "config_generator.py": {"--linear": [0.3, 0.6]},
        "prune_scheme_generator.py": {"-i": edited_json(chain / "conf.json", tmp_path / "edited.json", rate(0.6))},
        "block-level_finetuning.py": {"--lr": 0.01},
        "compose_model.py": {"-n": 2},
        "model-level_finetuning.py": {"--lr": 0.01},
        "plot_loss.py": {"--title": "other"},
    }


DERIVED = ("prune_scheme_generator.py", "plot_loss.py")  # whose outputs nobody edits
REMADE = [script for script in SCRIPTS if not script.startswith(("evaluate", "prune.py", *DERIVED))]


@pytest.mark.parametrize("script", REMADE)
def test_existing_output_is_replaced_only_when_asked(refuses, command, remakes, tmp_path, script):
    run(command(script, {}))
    assert all_in([tmp_path, "--overwrite"], refuses(script, remakes[script]))
    before = files_in(tmp_path)
    run(f"{command(script, remakes[script])} --overwrite")
    assert files_in(tmp_path) != before


@pytest.mark.parametrize("script", DERIVED)
def test_a_derived_output_follows_its_input_and_a_foreign_file_stays(refuses, command, remakes, script):
    output = run(command(script, {}))["output"]
    with open(output, "rb") as file:
        before = file.read()
    run(command(script, remakes[script]))
    with open(output, "r+b") as file:
        assert file.read() != before
        file.seek(0)
        file.write(b'{"of": "the user"}')
        file.truncate()
    assert f"{output}: exists already and is no" in refuses(script, remakes[script])


@pytest.mark.parametrize(
    "script, name, content",
    [
        ("download_model.py", "tokenizer/t5/record.json", b""),
        ("config_generator.py", "conf.json", bytes(5000)),
        ("prune_scheme_generator.py", "conf_prune.json", bytes(2**20 + 1)),
        ("prune.py", "library/record.json", b""),
        ("block-level_finetuning.py", "library/record.json", bytes(5000)),
        ("compose_model.py", "composed/record.json", bytes(5000)),
        ("model-level_finetuning.py", "model.pth", b""),
        ("plot_loss.py", "loss.png", bytes(5000)),
    ],
)
def test_what_a_full_disk_has_left_of_an_output_is_made_again(refuses, command, tmp_path, script, name, content):
    """Nothing, or zeros alone: no file of somebody else's. Oracle: the file as it was made at first."""
    run(command(script, {}))
    path = tmp_path / name
    before = files_in(tmp_path)[path]
    path.write_bytes(content)
    if script not in DERIVED:
        assert all_in([path, "as a full disk leaves a file", "--overwrite"], refuses(script, {}))
    run(command(script, {}) + (" --overwrite" if script != "prune_scheme_generator.py" else ""))
    assert files_in(tmp_path)[path] == before


# --- a full disk -----------------------------------------------------------------------------------------------


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("script", ["config_generator.py", "compose_model.py"])
def test_full_disk_leaves_the_old_output(refuses, command, remakes, monkeypatch, tmp_path, script):
    """The disk fills up as the file is flushed: the old one stays whole, nothing temporary is left (see `refuses`)."""
    run(command(script, {}))
    monkeypatch.setattr(os, "fsync", no_space)
    assert all_in(["No space left", tmp_path], refuses(script, remakes[script], "--overwrite --quiet"))


@pytest.mark.parametrize("script, changes", [("prune.py", {}), ("compose_model.py", {}), ("compose_model.py", ".pth")])
def test_write_that_fails_half_way(refuses, tmp_path, script, changes):
    """The kernel refuses to let any file grow beyond 4 kB (torch and safetensors write from C, past Python)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        err = refuses(script, {"-o": tmp_path / "model.pth"} if changes else {}, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all_in(["File too large", tmp_path], err)
