"""Whatever is wrong with the input: exit code 2, one line that names it and the remedy, and every file as it was."""

import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FEED_FORWARD,
    SCRIPTS,
    as_arguments,
    build_tokenizer,
    call_apart,
    edited_json,
    files_in,
    good_flags,
    is_one_line,
    rate,
    save_forged,
)

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
    ("prune.py", "-m"),
    ("prune.py", "-c"),
    ("block-level_finetuning.py", "-m"),
    ("block-level_finetuning.py", "-p"),
    ("block-level_finetuning.py", "-t"),
    ("block-level_finetuning.py", "--data"),
    ("compose_model.py", "-m"),
    ("compose_model.py", "-t"),
    ("compose_model.py", "-p"),
    ("compose_model.py", "-c"),
    ("model-level_finetuning.py", "-m"),
    ("model-level_finetuning.py", "-t"),
    ("model-level_finetuning.py", "-p"),
    ("model-level_finetuning.py", "-c"),
    ("model-level_finetuning.py", "--data"),
    ("evaluate-t5.py", "-m"),
    ("evaluate-t5.py", "-t"),
    ("evaluate-t5.py", "--data"),
    ("evaluate-distilbert.py", "-m"),
    ("evaluate-distilbert.py", "-t"),
    ("evaluate-distilbert.py", "--data"),
    ("plot_loss.py", "CSV"),
]
ATTENTION = "encoder.block.0.layer.0.SelfAttention"
LIBRARY_FILE = f"{FEED_FORWARD}.wi-461_wo-461.npy"  # 0.3 of 48 * 32 weights each


@pytest.fixture
def refuses(call, workshop, chain, tmp_path):
    """refuses(script, *arguments): the one line on stderr, once it is sure that no file was touched or made.

    A library that was begun, and holds nothing yet, does no harm.
    """

    def run(script, *arguments):
        before = files_in(workshop, chain, tmp_path)
        code, result, err = call(script, *arguments)
        assert "Traceback" not in err, err
        assert (code, result) == (2, None)
        assert is_one_line(err) and ": error: " in err, err
        after = files_in(workshop, chain, tmp_path)
        begun = [path for path in after.keys() - before.keys() if path.name in ("record.json", ".lock")]
        assert all(json.loads(path.read_text())["variants"] == {} for path in begun if path.name == "record.json")
        assert {path: digest for path, digest in after.items() if path not in begun} == before
        return err

    return run


@pytest.fixture
def arguments(workshop, chain, tmp_path):
    """arguments(script, changes): what makes the script write good outputs to tmp_path, with some flags changed."""

    def make(script, changes):
        return as_arguments(good_flags(script, workshop, chain, tmp_path) | changes)

    return make


class MakesMarker:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# --- paths and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flag, kind",
    [
        *((script, flag, "missing") for script, flag in INPUTS),
        *((script, flag, "binary file") for script, flag in INPUTS if script in ("prune.py", "evaluate-t5.py")),
        *((script, flag, "empty folder") for script, flag in INPUTS if script.startswith("model-level")),
    ],
)
def test_input_that_is_none(refuses, arguments, tmp_path, script, flag, kind):
    path = tmp_path / "given"
    if kind == "binary file":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "empty folder":
        path.mkdir()
    assert str(path) in refuses(script, *arguments(script, {flag: path}))


@pytest.mark.parametrize("script, flag", OUTPUTS)
def test_output_that_cannot_be_written(refuses, arguments, tmp_path, script, flag):
    """Not even root can write below a file."""
    (tmp_path / "a file").write_text("precious")
    path = tmp_path / "a file" / "nowhere" / "out.png"
    err = refuses(script, *arguments(script, {flag: path}))
    assert str(path) in err and "cannot be written" in err


@pytest.mark.parametrize("script, flag", OUTPUTS[1:])
def test_output_that_is_somebody_elses_folder(refuses, arguments, tmp_path, script, flag):
    """--overwrite replaces an earlier output of ours, never a folder of something else."""
    path = tmp_path / "holiday.png"
    path.mkdir()
    (path / "beach.txt").write_text("precious")
    assert str(path) in refuses(script, *arguments(script, {flag: path}), "--overwrite")


@pytest.mark.parametrize("script", ["block-level_finetuning.py", "model-level_finetuning.py"])
def test_stats_that_are_somebody_elses_file(refuses, arguments, chain, tmp_path, script):
    shutil.copy(chain / "conf.json", tmp_path)
    assert str(tmp_path / "conf.json") in refuses(script, *arguments(script, {"--stats": tmp_path / "conf.json"}))


@pytest.mark.parametrize("script, device", [("prune.py", "banana"), ("evaluate-t5.py", "cuda:99")])
def test_unknown_device(refuses, arguments, script, device):
    assert f"--device {device}" in refuses(script, *arguments(script, {"--device": device}))


def test_no_network_and_no_model_cached(workshop, chain, tmp_path):
    """In a process of its own: the hub's client looks for its cache, and whether it is offline, when it is imported."""
    started = time.monotonic()
    process = call_apart(
        "download_model.py", "t5", "--quiet", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")
    )
    assert time.monotonic() - started < 60  # no minutes of retries, on however busy a machine
    assert (process.returncode, process.stdout) == (2, "")
    assert is_one_line(process.stderr) and "google-t5/t5-small" in process.stderr and "t5-demo" in process.stderr
    assert files_in(tmp_path) == {}


# --- configurations and schemes --------------------------------------------------------------------------------


def in_conf(*keys, value):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit, words",
    [
        (rate(0.1, "encoder.nowhere"), ["configuration 1", "encoder.nowhere", "'modules'"]),
        *(
            (rate(value), ["configuration 1", f"{FEED_FORWARD}.wi", remedy])
            for value, remedy in [
                (1.2, "[0, 1)"),
                (1, "[0, 1)"),
                (-0.1, "[0, 1)"),
                (10**400, "[0, 1)"),
                ("0.3", "such as 0.3"),
                (True, "such as 0.3"),
                (None, "such as 0.3"),
                ([0.3], "such as 0.3"),
            ]
        ),
        *((rate(float(value)), ["configuration 1", "[0, 1)"]) for value in ("nan", "inf")),
        (rate(0.9, ATTENTION), ["configuration 1", ATTENTION, "all 4 heads", "0.75", "1, which leaves the block out"]),
        (rate(1.2, ATTENTION), ["configuration 1", ATTENTION, "[0, 1]"]),
        (in_conf("configs", value=[]), ["'configs'"]),
        (in_conf("configs", 1, value=[0.3]), ["configuration 1", "object"]),
        (in_conf("modules", value={}), ["'modules'", "config_generator.py"]),
        (in_conf("modules", ATTENTION, "heads", value="4"), [ATTENTION, "'heads'"]),
        (in_conf("modules", ATTENTION, "kind", value="convolution"), [ATTENTION, "'kind'"]),
        (in_conf("model", value="t5"), ["'model'", "config_generator.py"]),
        (in_conf("version", value=99), ["99", "config_generator.py"]),
    ],
)
def test_configurations_edited_wrongly(refuses, arguments, chain, tmp_path, edit, words):
    path = edited_json(chain / "conf.json", tmp_path / "mine.json", edit)
    err = refuses("prune_scheme_generator.py", *arguments("prune_scheme_generator.py", {"-i": path}))
    assert all(word in err for word in [str(path), *words]), err


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["malformed JSON"]),
        ('{"version": 1,', ["malformed JSON", "line 1"]),
        ("[1, 2]", ["list", "object"]),
        ('{"version": 1, "version": 1}', ["'version'", "twice"]),
        ("[" * 100_000, ["malformed JSON"]),
        ('{"configs": [{"a": ' + "1" * 5000 + "}]}", ["malformed JSON"]),
        ("\x80\xff", ["not a JSON text"]),
    ],
)
def test_not_the_json_that_belongs_there(refuses, arguments, tmp_path, text, words):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1")
    err = refuses("prune.py", *arguments("prune.py", {"-c": path}))
    assert all(word in err for word in [str(path), *words]), err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"--attention": [0.25, 0.5, 0.5]}, ["--attention", "3 rates", "-n", "2"]),
        ({"--linear": [0.3]}, ["--linear", "1 rates", "-n", "2"]),
        ({"-n": 3}, ["--attention", "2 rates", "3 configurations"]),
        ({"--linear": [0.3, 1.2]}, ["--linear", "'1.2'", "pruning rate"]),
        ({"--linear": [0.3, 1]}, ["--linear", "'1'", "below 1"]),
        ({"--attention": [0.3, 1.01]}, ["--attention", "'1.01'", "from 0 to 1"]),
        ({"--attention": [0.25, 0.9]}, ["configuration 1", "SelfAttention", "all 4 heads", "0.75"]),
    ],
)
def test_rates_on_the_command_line(refuses, arguments, changes, words):
    err = refuses("config_generator.py", *arguments("config_generator.py", changes))
    assert all(word in err for word in words), err


@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_no_such_configuration(refuses, arguments, script):
    err = refuses(script, *arguments(script, {"-n": 3}))
    assert "conf.json" in err and "0 to 2" in err


@pytest.mark.parametrize(
    "keys, value",
    [
        (("configs", 0, FEED_FORWARD), "dense"),
        (("requested", 0, "linear"), 0.31),
        (("digest",), "0" * 64),
        (("comment",), "hello"),
    ],
)
def test_scheme_edited_by_hand(refuses, arguments, chain, tmp_path, keys, value):
    path = edited_json(chain / "conf_prune.json", tmp_path / "mine.json", in_conf(*keys, value=value))
    err = refuses("prune.py", *arguments("prune.py", {"-c": path}))
    assert str(path) in err and "regenerate" in err and "prune_scheme_generator.py" in err


@pytest.mark.parametrize(
    "script, flag, given, remedy",
    [
        ("prune.py", "-c", "conf.json", "prune_scheme_generator.py"),
        ("compose_model.py", "-c", "conf_prune.json", "conf.json"),
        ("prune_scheme_generator.py", "-i", "conf_prune.json", "conf.json"),
    ],
)
def test_configurations_and_scheme_confused(refuses, arguments, chain, script, flag, given, remedy):
    err = refuses(script, *arguments(script, {flag: chain / given}))
    assert str(chain / given) in err and remedy in err


@pytest.mark.parametrize("module, key, value", [(ATTENTION, "heads", 10), (f"{FEED_FORWARD}.wi", "weights", 9999)])
@pytest.mark.parametrize("script", ["prune.py"])
def test_modules_that_are_not_the_models(call, refuses, arguments, chain, tmp_path, script, module, key, value):
    """conf.json's list of modules was edited: 0.5 of 10 heads are more than the model's 4."""

    def edit(content):
        content["modules"][module][key] = value
        for config in content["configs"]:
            config[module] = 0.5

    conf, scheme = edited_json(chain / "conf.json", tmp_path / "mine.json", edit), tmp_path / "scheme.json"
    assert call("prune_scheme_generator.py", "-i", conf, "-o", scheme)[0] == 0
    given = scheme if script == "prune.py" else conf
    err = refuses(script, *arguments(script, {"-c": given}))
    assert str(given) in err and module.removesuffix(".wi") in err and "config_generator.py" in err


# --- what belongs to another model -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_library_of_another_model(call, refuses, arguments, chain, tmp_path, other_model, script):
    conf = tmp_path / "other.json"
    assert call("config_generator.py", *arguments("config_generator.py", {"-m": other_model, "-o": conf}))[0] == 0
    err = refuses(script, *arguments(script, {"-m": other_model, "-c": conf}))
    assert str(chain / "tuned") in err and "another model (t5)" in err


@pytest.mark.parametrize(
    "script, kind, remedy",
    [("evaluate-t5.py", "distilbert", "evaluate-distilbert.py"), ("evaluate-distilbert.py", "t5", "evaluate-t5.py")],
)
def test_evaluated_by_the_other_script(refuses, arguments, workshop, script, kind, remedy):
    model = workshop / "model" / kind
    err = refuses(script, *arguments(script, {"-m": model}))
    assert str(model) in err and remedy in err


def test_tokenizer_with_more_words_than_the_model(refuses, arguments, tmp_path):
    """Its larger ids would run out of the model's 64 embeddings in the middle of the work."""
    tokenizer = build_tokenizer("t5")
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "large")
    err = refuses("evaluate-t5.py", *arguments("evaluate-t5.py", {"-t": tmp_path / "large"}))
    assert str(tmp_path / "large") in err and "64" in err


# --- libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_variant_that_the_library_has_not(refuses, arguments, chain, tmp_path, script):
    path = edited_json(chain / "conf.json", tmp_path / "mine.json", rate(0.6))
    err = refuses(script, *arguments(script, {"-c": path}))
    assert all(word in err for word in [str(chain / "tuned"), "wi-922_wo-461", FEED_FORWARD, "prune.py"])


def damage(path, how, marker):
    """Spoil a module file, in one of the ways in which files get spoilt."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "bit flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "truncated":
        path.write_bytes(content[:-100])
    elif how == "truncated header":
        path.write_bytes(content[:40])
    elif how == "header spoilt":
        path.write_bytes(content.replace(b"]", b"[", 1))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "plain array":
        np.save(path, np.zeros((48, 32), np.float32))
    elif how == "pickled":
        np.save(path, np.array([MakesMarker(marker)], object))
    elif how == "pickled field":
        np.save(path, np.array((MakesMarker(marker),), [("wi.weight", object)]))
    elif how == "archive":
        with path.open("wb") as handle:
            np.savez(handle, **{"wi.weight": np.zeros((48, 32), np.float32)})
    elif how == "other shape":
        np.save(path, np.zeros((), [("wi.weight", np.float32, (4, 4)), ("wi.keep", bool, (4, 4))]))


VISIBLE = [
    "truncated",
    "truncated header",
    "header spoilt",
    "empty",
    "plain array",
    "pickled",
    "pickled field",
    "archive",
]  # without the record's digest, too


@pytest.mark.parametrize(
    "how, forged",
    [*((how, False) for how in ["missing", "bit flipped", "other shape", *VISIBLE]), *((how, True) for how in VISIBLE)],
)
def test_damaged_module_file(refuses, arguments, chain, tmp_path, how, forged):
    """With a record that matches the damaged file, the reader of module files itself has to refuse it."""
    library, marker = tmp_path / "library", tmp_path / "marker"
    shutil.copytree(chain / "tuned", library)
    damage(library / LIBRARY_FILE, how, marker)
    if forged:

        def forge(content):
            content["variants"][LIBRARY_FILE.removesuffix(".npy")]["sha256"] = file_digest(library / LIBRARY_FILE)

        edited_json(library / "record.json", library / "record.json", forge)
    err = refuses("compose_model.py", *arguments("compose_model.py", {"-p": library}))
    assert str(library / LIBRARY_FILE) in err
    assert not marker.exists()


@pytest.mark.parametrize(
    "script, changes",
    [
        ("block-level_finetuning.py", {"-p": "tuned"}),  # a fine-tuned library where a pruned one belongs
        ("prune.py", {"-o": "tuned"}),
        ("block-level_finetuning.py", {"-o": "pruned", "-p": "copy"}),
    ],
)
def test_library_of_the_other_stage(refuses, arguments, chain, tmp_path, script, changes):
    shutil.copytree(chain / "pruned", tmp_path / "copy")
    paths = {flag: (tmp_path if name == "copy" else chain) / name for flag, name in changes.items()}
    err = refuses(script, *arguments(script, paths))
    assert "where a" in err and any(str(path) in err for path in paths.values())


# --- models and tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, words",
    [
        ("holds code", ["more than plain tensors"]),
        ("truncated", []),
        ("foreign", ["model-level_finetuning.py"]),
        ("state dict alone", ["model-level_finetuning.py"]),
        ("without weights", ["its weights are not those of a T5ForConditionalGeneration"]),
        ("list", []),
    ],
)
def test_bad_pth(refuses, arguments, chain, tmp_path, how, words):
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    good = chain / "tuned-0.pth"
    content = torch.load(good, weights_only=True)
    if how == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif how == "without weights":
        save_forged(content | {"state_dict": {}, "masks": {}}, path)
    else:
        torch.save(
            {
                "holds code": content | {"masks": MakesMarker(marker)},
                "foreign": {"a": 1},
                "state dict alone": content["state_dict"],
                "list": [1, 2],
            }[how],
            path,
        )
    err = refuses("evaluate-t5.py", *arguments("evaluate-t5.py", {"-m": path}))
    assert all(word in err for word in [str(path), *words]), err
    assert not marker.exists()


@pytest.mark.parametrize(
    "how",
    [
        "truncated weights",
        "no weights",
        "pickled weights",
        "malformed config",
        "other type",
        "other shape",
        "malformed record",
    ],
)
def test_bad_model_folder(refuses, arguments, workshop, tmp_path, how):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(workshop / "model" / "t5", folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how in ("no weights", "pickled weights"):
        weights.unlink()
        if how == "pickled weights":
            torch.save(MakesMarker(marker), folder / "pytorch_model.bin")
    elif how == "malformed config":
        config.write_text("{")
    elif how == "malformed record":
        (folder / "record.json").write_text("{")
    else:
        edited_json(
            config,
            config,
            in_conf(
                *{"other type": ("model_type",), "other shape": ("d_ff",)}[how],
                value={"other type": "bert", "other shape": 56}[how],
            ),
        )
    assert str(folder) in refuses("evaluate-t5.py", *arguments("evaluate-t5.py", {"-m": folder}))
    assert not marker.exists()


# --- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("test2016.de", None, ["no such file"]),
        ("test2016.de", "ein Hund\n", ["16", "1;"]),
        ("test2016.de", b"\xff\xfe\n" * 16, ["UTF-8"]),
        ("test2016.en", "", ["lines"]),
    ],
)
def test_bad_translation_folder(refuses, arguments, workshop, tmp_path, file, content, words):
    err = refuses_data(refuses, arguments, workshop, tmp_path, "t5", file, content)
    assert all(word in err for word in [str(tmp_path / "data"), file.split(".")[0], *words]), err


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["has no test split", "--test-file"]),
        ("", ["empty"]),
        ("{\n", ["line 1", "JSON"]),
        (b'{"text": "\xff", "label": 1}', ["UTF-8"]),
        *(
            ('{"text": "good", "label": 1}\n' + row + "\n", ["line 2", "'label'"])
            for row in ['{"text": "bad", "label": 0.5}', '{"text": "bad"}', "[]"]
        ),
        ('{"text": "good", "label": 7}\n', ["label 7"]),
        ('{"text": "good", "label": -1}\n', ["label -1"]),
        ('{"text": "good", "label": "bad"}\n', ["label 'bad'", "LABEL_0, LABEL_1"]),
    ],
)
def test_bad_classification_folder(refuses, arguments, workshop, tmp_path, content, words):
    """The last label is a good number, but the model knows two classes."""
    err = refuses_data(refuses, arguments, workshop, tmp_path, "distilbert", "test.jsonl", content)
    assert all(word in err for word in [str(tmp_path / "data"), *words]), err


def refuses_data(refuses, arguments, workshop, tmp_path, kind, file, content):
    """The error line of an evaluation whose data folder has another (None: no) `file`."""
    folder = tmp_path / "data"
    shutil.copytree(workshop / "data" / kind, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return refuses(f"evaluate-{kind}.py", *arguments(f"evaluate-{kind}.py", {"--data": folder}))


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


@pytest.fixture
def remake(call, arguments, remakes):
    """remake(script): arguments that would replace the output that the script has just made."""

    def make(script):
        assert call(script, *arguments(script, {}))[0] == 0
        return arguments(script, remakes[script])

    return make


@pytest.mark.parametrize("script", REMADE)
def test_existing_output_is_replaced_only_when_asked(refuses, remake, call, tmp_path, script):
    again = remake(script)
    err = refuses(script, *again)
    assert str(tmp_path) in err and "--overwrite" in err
    before = files_in(tmp_path)
    assert call(script, *again, "--overwrite")[0] == 0
    assert files_in(tmp_path) != before


@pytest.mark.parametrize("script", DERIVED)
def test_a_derived_output_follows_its_input_and_a_foreign_file_stays(refuses, remake, arguments, call, script):
    again = remake(script)
    output = Path(again[again.index("-o") + 1])
    before = output.read_bytes()
    assert call(script, *again)[0] == 0 and output.read_bytes() != before
    output.write_text('{"of": "the user"}')
    assert f"{output}: exists already and is no" in refuses(script, *again, "--overwrite")


# --- a full disk -----------------------------------------------------------------------------------------------


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def without_notes(monkeypatch):
    """Fine-tuning without the files that it writes as it goes, so that its real output is what meets the full disk."""
    for name in ("checkpoints.Checkpoint.save", "stats.write_stats", "stats.write_variant_stats"):
        monkeypatch.setattr(f"common.{name}", lambda *_: None)


@pytest.mark.parametrize("script", ["config_generator.py", "compose_model.py", "model-level_finetuning.py"])
def test_full_disk_leaves_the_old_output(refuses, remake, without_notes, monkeypatch, tmp_path, script):
    """The disk fills up as the file is flushed: the old one stays whole, nothing temporary is left (see `refuses`)."""
    again = remake(script)
    monkeypatch.setattr(os, "fsync", no_space)
    err = refuses(script, *again, "--overwrite", "--quiet")
    assert "No space left" in err and str(tmp_path) in err


@pytest.mark.parametrize("script", ["prune.py", "compose_model.py", "model-level_finetuning.py"])
def test_write_that_fails_half_way(refuses, arguments, without_notes, tmp_path, script):
    """The kernel refuses to let any file grow beyond 4 kB (torch and safetensors write from C, past Python)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        err = refuses(script, *arguments(script, {}), "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in err and str(tmp_path) in err


# --- plots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["no such file"]),
        ("", ["stats CSV"]),
        (b"\x89PNG\r\n\x1a\n\xff", ["stats CSV"]),
        ("epoch,train_loss,val_loss\n1,high,low\n", ["numbers"]),
        ("epoch,train_loss,val_loss\n", ["no epoch"]),
        ("epoch,train_loss,val_loss\n0,,\n", ["val_loss"]),
    ],
)
def test_plot_of_no_stats(refuses, arguments, chain, tmp_path, content, words):
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    err = refuses("plot_loss.py", *arguments("plot_loss.py", {"CSV": [chain / "pruned-0.csv", path]}))
    assert all(word in err for word in [str(path), *words]), err
