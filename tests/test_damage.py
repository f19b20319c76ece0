"""Files that are damaged or made by an attacker: one line with exit code 2, no code run, no memory taken for them."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    call_apart,
    command_of,
    edited_json,
    fails,
    good_flags,
    is_one_line,
    make_digests_fit,
    run,
    save_forged,
)
from safetensors.torch import load_file, save_file
from tiny import build_model, build_tokenizer

from common.models.load import load_model
from common.models.saving import save_model
from common.runtime.errors import UserError

WEIGHT = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


@pytest.fixture
def refuses(workshop, chain, tmp_path):
    """refuses(script, {flag: value}): the one line that a script with these flags instead of good ones says."""
    return lambda script, changes: fails(
        f"{command_of(script, good_flags(script, workshop, chain, tmp_path) | changes)} --quiet"
    )


@pytest.fixture
def model_copy(workshop, tmp_path):
    """model_copy(kind): a copy of a tiny model's folder, which knows its tokenizer and its data."""

    def make(kind="t5"):
        for part in ("model", "tokenizer", "data"):
            shutil.copytree(workshop / part / kind, tmp_path / part / kind)
        return tmp_path / "model" / kind

    return make


def changed(folder, file, **changes):
    edited_json(folder / file, folder / file, lambda content: content.update(changes))


# --- models ------------------------------------------------------------------------------------------------------

CODE = "open({!r}, 'w').close()\nclass C: pass\n"


@pytest.mark.parametrize("file, model_type", [("config.json", "t5"), ("tokenizer_config.json", "mine")])
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(model_copy, tmp_path, file, model_type):
    """In a process of its own, with a `y` for whoever asks on stdin."""
    folder = model_copy()
    given = folder if file == "config.json" else tmp_path / "tokenizer" / "t5"
    for module in ("mine", "custom_generate/generate"):
        path = given / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(str(tmp_path / "marker")))
    classes = ("AutoConfig", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    changed(given, file, auto_map=dict.fromkeys(classes, "mine.C"), model_type=model_type)
    process = call_apart("evaluate-t5.py", "-m", folder, "--quiet", cwd=tmp_path, input="y\n" * 9)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert (
        is_one_line(process.stderr) and f"{given.parent.name}/t5:" in process.stderr and "never run" in process.stderr
    )
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_layers": 10**9}, ["'num_layers'", "up to 1000"]),
        ({"num_layers": 3}, ["lacks encoder.block.2"]),
        ({"d_ff": 10**6}, ["another shape", "wi.weight"]),
        ({"d_model": 10**400}, ["cannot be loaded as a model"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"model_type": "gpt2"}, ["gpt2", "known are t5"]),
        ({"decoder_start_token_id": None}, ["decoder_start_token_id"]),
        ({"pad_token_id": 64}, ["pad_token_id", "64", "0 to 63"]),
        ({"attn_implementation": "somebody/kernel"}, ["'attn_implementation'"]),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(model_copy, settings, words):
    folder = model_copy()
    changed(folder, "config.json", **settings)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert all(word in str(error.value) for word in [str(folder), *words]), error.value


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6}, {"length_penalty": [1]}, {"eos_token_id": 640}], ids=str)
def test_a_generation_config_that_does_not_fit(model_copy, settings):
    """The first is a mode whose code lies on the hub."""
    folder = model_copy()
    changed(folder, "generation_config.json", **settings)
    with pytest.raises(UserError, match=f"{folder}.*{next(iter(settings))}"):
        load_model(folder)


def python_lacks(*_, **__):
    raise MemoryError


def torch_lacks(*_, **__):
    torch.empty(2**58)


@pytest.mark.parametrize("lacks", [python_lacks, torch_lacks])
@pytest.mark.parametrize("where", ["load_file", "torch.load", "find_blocks"])
def test_a_lack_of_memory_is_told_and_no_file_blamed(t5, tmp_path, monkeypatch, lacks, where):
    """While a folder's weights are read, a .pth, or later. Oracle: what Python and torch's own allocator raise."""
    save_model(tmp_path / "m.pth", build_model("t5"), {})
    model = tmp_path / "m.pth" if where == "torch.load" else t5
    monkeypatch.setattr(f"common.models.load.{where}", lacks)
    err = fails(f"config_generator.py -m {model} -o {tmp_path}/c.json --attention 0.5 --linear 0.5 -n 1")
    assert "there is not enough memory" in err and str(model) not in err


@pytest.mark.parametrize("form, value", [("folder", float("nan")), ("m.pth", float("inf"))])
def test_weights_that_are_not_finite(tmp_path, form, value):
    """Put into the file, whose digests fit again: none of ours is ever written with such weights."""
    model, path = build_model("t5"), tmp_path / form
    with torch.no_grad():
        model.get_parameter(WEIGHT)[3, 5] = 12345.0
    save_model(path, model, {})
    if form == "m.pth":
        content = torch.load(path, weights_only=True)
        content["state_dict"][WEIGHT][3, 5] = value
        save_forged(content, path)
    else:
        file = path / "model.safetensors"
        before, after = (np.float32(number).tobytes() for number in (12345.0, value))
        file.write_bytes(file.read_bytes().replace(before, after))
        make_digests_fit(path)
    with pytest.raises(UserError, match=f"{WEIGHT} holds values that are not finite"):
        load_model(path)
    with torch.no_grad():
        model.get_parameter(WEIGHT)[3, 5] = value
    with pytest.raises(UserError, match=f"{WEIGHT} would hold values that are not finite"):
        save_model(tmp_path / "other", model, {})


def rewritten(change):
    def spoil(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (rewritten(lambda tensors: tensors.pop(WEIGHT)), f"lacks {WEIGHT}"),
        (rewritten(lambda tensors: tensors.update(foreign=torch.zeros(3))), "has a foreign foreign"),
        (
            rewritten(lambda tensors: tensors.update({WEIGHT: torch.zeros(32, 48)})),
            f"another shape for {WEIGHT} ((32, 48)",
        ),
        (lambda path: path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:]), "cannot be loaded"),
        (pipe, "has no weights (model.safetensors)"),
    ],
    ids=["missing", "foreign", "shape", "header", "pipe"],
)
def test_weights_that_are_not_the_models(model_copy, spoil, words):
    folder = model_copy()
    spoil(folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": "[1]"}, "cannot be loaded as a model"),
        ({"record": '{"task": "cooking"}'}, "not for cooking"),
        ({"state_dict": [1]}, "cannot be loaded as a model"),
        ({"state_dict": {WEIGHT: torch.zeros(1).expand(10**6, 10**6)}}, "larger than the file"),
    ],
)
def test_what_a_pth_holds(tmp_path, changes, words):
    save_model(tmp_path / "m.pth", build_model("t5"), {})
    content = torch.load(tmp_path / "m.pth", weights_only=True) | changes
    if "larger" in words:  # no digest of it is computed
        torch.save(content, tmp_path / "m.pth")
    else:
        save_forged(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "m.pth")


def test_what_is_no_file(tmp_path):
    """Nothing, a link that leads nowhere, a pipe, which would never end."""
    (tmp_path / "link.pth").symlink_to("no-such-file")
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("nothing.pth", "link.pth", "pipe.pth"):
        with pytest.raises(UserError, match=f"{name}: no such model; download_model.py saves one"):
            load_model(tmp_path / name)


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"'), "cannot be used"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer.json", model={"type": "zork"}), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer_config.json", tokenizer_class=3), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer_config.json", tokenizer_class="C"), "none of transformers ('C')"),
        (lambda folder: changed(folder, "tokenizer_config.json", model_max_length="x"), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer_config.json", extra_ids=10**9), "'extra_ids'"),
    ],
)
def test_a_damaged_tokenizer(refuses, model_copy, tmp_path, spoil, words):
    model, folder = model_copy(), tmp_path / "tokenizer" / "t5"
    spoil(folder)
    err = refuses("evaluate-t5.py", {"-m": model, "-t": folder})
    assert str(folder) in err and words in err, err


def test_a_tokenizer_without_padding_token(refuses, model_copy, tmp_path):
    model = model_copy("distilbert")
    tokenizer = build_tokenizer("distilbert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "t")
    changed(tmp_path / "t", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert "has no padding token" in refuses("evaluate-distilbert.py", {"-m": model, "-t": tmp_path / "t"})


def test_more_tokens_than_the_model_has_positions(refuses, workshop):
    """The tiny DistilBERT has 64 positions."""
    err = refuses("evaluate-distilbert.py", {"--max-length": 65})
    assert "--max-length 65" in err and "64" in err
    run(f"evaluate-distilbert.py -m {workshop}/model/distilbert --max-length 64 --limit 2")


# --- names and flags ---------------------------------------------------------------------------------------------


def test_names_that_are_not_utf_8(tmp_path, t5):
    """A configuration of that name is read and written; what is wrong is told in ASCII."""
    odd = os.fsdecode(b"od\xffd.json")
    for arguments, code in (
        (["config_generator.py", "-m", t5, "--attention", 0.25, "--linear", 0.3, "-n", 1], 0),
        (["prune_scheme_generator.py", "-i", "absent-" + odd], 2),
    ):
        process = call_apart(*arguments, "-o", odd, "--quiet", cwd=tmp_path, PYTHONUTF8="1")
        assert process.returncode == code and "Traceback" not in process.stderr, process.stderr
        assert (process.stdout + process.stderr).isascii()
    assert os.path.exists(os.fsencode(tmp_path / odd))


@pytest.mark.parametrize("number", ["1e400", "1" * 5000, "nan", "", "one"])
@pytest.mark.parametrize("flag", ["--batch-size", "--lr", "--warmup", "--ridge", "--seed"])
def test_numbers_that_are_none(flag, number):
    assert f"{flag}: " in fails(f"block-level_finetuning.py {flag}={number!r}")
