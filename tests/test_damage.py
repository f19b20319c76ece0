"""Files that are damaged or made by an attacker: one line with exit code 2, no code run, no memory taken for them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    FEED_FORWARD,
    as_arguments,
    build_model,
    build_tokenizer,
    call_apart,
    edited_json,
    fails,
    good_flags,
    is_one_line,
    make_digests_fit,
    outcome,
    save_forged,
)
from safetensors.torch import load_file, save_file

from common.blocks.find import find_blocks
from common.blocks.tensors import Variant
from common.composing.library import Library
from common.models.load import load_model
from common.models.saving import save_model
from common.runtime.errors import UserError

WEIGHT = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


@pytest.fixture
def refuses(workshop, chain, tmp_path):
    """refuses(script, {flag: value}): all that a script with these flags instead of good ones says, one line."""

    def run(script, changes):
        code, result, err = outcome(
            f"{script}", *as_arguments(good_flags(script, workshop, chain, tmp_path) | changes), "--quiet"
        )
        assert "Traceback" not in err, err
        assert (code, result) == (2, None), err
        assert is_one_line(err) and ": error: " in err, err
        return err

    return run


@pytest.fixture
def model_copy(workshop, tmp_path):
    """model_copy(kind): a copy of a tiny model's folder, which knows its tokenizer and its data."""

    def make(kind="t5"):
        folder = shutil.copytree(workshop / "model" / kind, tmp_path / "model" / kind)
        for part in ("tokenizer", "data"):
            shutil.copytree(workshop / part / kind, tmp_path / part / kind)
        return folder

    return make


def changed(folder, file, **changes):
    edited_json(folder / file, folder / file, lambda content: content.update(changes))


# --- models ------------------------------------------------------------------------------------------------------

CODE = "open({!r}, 'w').close()\nclass C: pass\n"


@pytest.mark.parametrize(
    "file, model_type", [("config.json", "t5"), ("config.json", "mine"), ("tokenizer_config.json", "mine")]
)
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
    if file == "tokenizer_config.json":
        changed(given, file, tokenizer_class="C")
    process = call_apart("evaluate-t5.py", "-m", folder, "--quiet", cwd=tmp_path, input="y\n" * 9)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert is_one_line(process.stderr) and str(given.name) in process.stderr
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
        ({"quantization_config": {"quant_method": "gptq"}}, ["'quantization_config'"]),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(refuses, model_copy, settings, words):
    folder = model_copy()
    changed(folder, "config.json", **settings)
    err = refuses("evaluate-t5.py", {"-m": folder})
    assert all(word in err for word in [str(folder), *words]), err


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6}, {"length_penalty": [1]}, {"eos_token_id": 640}], ids=str)
def test_a_generation_config_that_does_not_fit(refuses, model_copy, settings):
    """The first is a mode whose code lies on the hub."""
    folder = model_copy()
    changed(folder, "generation_config.json", **settings)
    err = refuses("evaluate-t5.py", {"-m": folder})
    assert str(folder) in err and next(iter(settings)) in err, err


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


def test_outputs_that_are_not_finite(refuses, model_copy):
    """Each weight is finite; their products with others are not."""
    folder = model_copy()
    rewritten(lambda tensors: tensors[WEIGHT].fill_(3e38))(folder / "model.safetensors")
    assert "outputs are not finite" in refuses("evaluate-t5.py", {"-m": folder})


def rewritten(change):
    def spoil(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


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
    ],
    ids=["missing", "foreign", "shape", "header"],
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
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match="larger than" if "larger" in words else ""):
        load_model(tmp_path / "m.pth")  # its digest no longer fits
    if "larger" not in words:
        save_forged(content, tmp_path / "m.pth")
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "m.pth")


def test_a_torchscript_file(refuses, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.pth")
    assert "cannot be loaded as a model" in refuses("evaluate-t5.py", {"-m": tmp_path / "m.pth"})


# --- libraries ---------------------------------------------------------------------------------------------------

NAME = f"{FEED_FORWARD}.wi-461_wo-461"  # 0.3 of 48 * 32 weights each


@pytest.fixture
def library(chain, tmp_path):
    return shutil.copytree(chain / "pruned", tmp_path / "library-1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_library_takes_no_variant_that_is_not_finite(tmp_path, value):
    block = find_blocks(build_model("t5"))[FEED_FORWARD]
    tensors = {"wi.weight": torch.full((48, 32), value), "wo.weight": torch.ones(32, 48)}
    keeps = {name: torch.ones(48, 32).bool() if name == "wi" else torch.ones(32, 48).bool() for name in ("wi", "wo")}
    model = {"name": "m", "type": "t5", "fingerprint": "00"}
    made = Library.open_or_create(tmp_path / "l", "prune.py", model, "pruned")
    with pytest.raises(UserError, match="its wi.weight holds values that are not finite"):
        made.write("v", Variant(block, tensors, keeps), {})
    assert not (tmp_path / "l" / f"{FEED_FORWARD}.v.npy").exists() and made.variants() == []


# --- configurations and schemes ----------------------------------------------------------------------------------

ATTENTION = "encoder.block.0.layer.0.SelfAttention"


def put(*keys, value):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit, words",
    [
        (put("comment", value="x"), ["'comment'", "nothing"]),
        (put("model", "owner", value="x"), ["'owner'"]),
        (put("model", "fingerprint", value="../x"), ["'fingerprint'"]),
        (put("modules", ATTENTION, "size", value=3), [ATTENTION, "'size'"]),
        (put("modules", ATTENTION, "heads", value=10**400), [ATTENTION, "'heads'", "1000"]),
        (put("modules", ATTENTION, "heads", value=4.0), [ATTENTION, "'heads'", "4.0"]),
        (put("modules", ATTENTION, "heads", value=8), [ATTENTION, "does not fit the model"]),
        (put("modules", f"{ATTENTION}.o", "block", value="elsewhere"), [f"{ATTENTION}.o", "does not fit the model"]),
        (put("modules", f"{ATTENTION}.o", "linear", value="q"), [f"{ATTENTION}.o", "does not fit the model"]),
        (put("configs", value={"0": {}}), ["'configs'", "list"]),
    ],
)
def test_configurations_that_do_not_fit(refuses, chain, tmp_path, edit, words):
    path = edited_json(chain / "conf.json", tmp_path / "mine.json", edit)
    err = refuses("compose_model.py", {"-c": path, "-n": 0})
    assert all(word in err for word in [str(path), *words]), err


BLOCK, VARIANT = FEED_FORWARD, "wi-461_wo-461"


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"'), "cannot be used"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer.json", model={"type": "zork"}), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer_config.json", tokenizer_class=3), "cannot be used"),
        (lambda folder: changed(folder, "tokenizer_config.json", tokenizer_class="C"), "no class of transformers"),
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


def test_more_tokens_than_the_model_has_positions(refuses, model_copy):
    """The tiny DistilBERT has 64 positions, T5 any number of them."""
    model = model_copy("distilbert")
    err = refuses("evaluate-distilbert.py", {"-m": model, "--max-length": 65})
    assert "--max-length 65" in err and "64" in err


def test_as_many_tokens_as_there_are_positions_are_fine(workshop, chain, tmp_path):
    for kind, length in (("distilbert", 64), ("t5", 4096)):
        script = f"evaluate-{kind}.py"
        flags = good_flags(script, workshop, chain, tmp_path) | {"--max-length": length}
        assert outcome(script, *as_arguments(flags))[0] == 0


# --- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, file, content, words",
    [
        ("distilbert", "test.jsonl", '{"text": "\\ud800 a", "label": 1}\n', ["line 1", "surrogate"]),
        ("distilbert", "test.jsonl", '{"text": "a", "label": 1}\n' + "[" * 9000 + "\n", ["line 2", "malformed JSON"]),
        ("distilbert", "test.jsonl", '{"text": "a", "label": 1' + "0" * 5000 + "}\n", ["line 1", "malformed JSON"]),
        ("distilbert", "test.jsonl", '{"text": "a", "label": NaN}\n', ["line 1", "label"]),
        ("distilbert", "test.jsonl", '{"text": "a", "label": 1, "label": 0}\n', ["line 1", "twice"]),
        ("distilbert", "test.jsonl", '{"text": "a", "label": 1}\n\n', ["line 2", "malformed JSON"]),
        ("t5", "test2016.de", "ein Hund\n" * 3 + " \n" + "ein Hund\n" * 12, ["line 4", "empty"]),
        ("t5", "test2016.en", "\n" + "a dog\n" * 15, ["line 1", "empty"]),
    ],
)
def test_data_line_by_line(refuses, workshop, tmp_path, kind, file, content, words):
    folder = shutil.copytree(workshop / "data" / kind, tmp_path / "data")
    (folder / file).write_text(content)
    err = refuses(f"evaluate-{kind}.py", {"--data": folder})
    assert all(word in err for word in [str(folder / file), *words]), err


def test_a_label_of_many_digits(refuses, workshop, tmp_path):
    folder = shutil.copytree(workshop / "data" / "distilbert", tmp_path / "data")
    (folder / "test.jsonl").write_text('{"text": "a", "label": 1' + "0" * 400 + "}\n")
    err = refuses("evaluate-distilbert.py", {"--data": folder})
    assert f"{folder}: test example 0 has label 1000" in err and "the model knows only 0 to 1" in err


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flag", [("prune_scheme_generator.py", "-i"), ("compose_model.py", "-t"), ("evaluate-t5.py", "-m")]
)
def test_a_link_that_leads_nowhere(refuses, tmp_path, script, flag):
    path = tmp_path / "given"
    path.symlink_to("no-such-file")
    assert str(path) in refuses(script, {flag: path})


# --- names and flags ---------------------------------------------------------------------------------------------


def test_names_that_are_not_utf_8(tmp_path, workshop):
    """A configuration of that name is read and written; what is wrong is told in ASCII."""
    odd = os.fsdecode(b"od\xffd.json")
    for arguments, code in (
        (["config_generator.py", "-m", workshop / "model" / "t5", "--attention", 0.25, "--linear", 0.3, "-n", 1], 0),
        (["prune_scheme_generator.py", "-i", "absent-" + odd], 2),
    ):
        process = call_apart(*arguments, "-o", odd, "--quiet", cwd=tmp_path, PYTHONUTF8="1")
        assert process.returncode == code and "Traceback" not in process.stderr, process.stderr
        assert (process.stdout + process.stderr).isascii()
    assert os.path.exists(os.fsencode(tmp_path / odd))


@pytest.mark.parametrize("number", ["1" + "0" * 30, "1e400", "1" * 5000, "-1e400", "nan", "", "one"])
@pytest.mark.parametrize("flag", ["--batch-size", "--lr", "--warmup", "--ridge", "--seed"])
def test_numbers_that_are_none(flag, number):
    assert f"{flag}: " in fails(f"block-level_finetuning.py {flag}={number!r}")


@pytest.mark.parametrize("device", ["cuda:" + "9" * 30, "cpu:-1", "privateuseone", "hpu", "mps:0:0", "vulkan", "\x00"])
def test_devices_that_are_none(refuses, device):
    assert "--device" in refuses("evaluate-t5.py", {"--device": device})


# --- plots and reports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, words",
    [
        ("0,,1e400\n", "val_loss is empty"),
        ("0,,1e300\n", "a loss above"),
        ("0,-1e31,1\n", "a loss above"),
        ("1000000000,,1\n", "epochs"),
        ("-1,,1\n", "epochs"),
        ("1e400,,1\n", "epochs"),
        ("nan,,1\n", "epochs"),
        ("0,,nan\n", "val_loss is empty"),
        ("0,," + "1" * 5000 + "\n", "val_loss is empty"),
    ],
)
def test_absurd_stats(refuses, tmp_path, rows, words):
    (tmp_path / "mine.csv").write_text("epoch,train_loss,val_loss\n" + rows)
    err = refuses("plot_loss.py", {"CSV": [tmp_path / "mine.csv"]})
    assert str(tmp_path / "mine.csv") in err and words in err, err


def test_a_dollar_is_shown_as_it_is(workshop, chain, tmp_path):
    """Two of them would be a formula, and this one is malformed."""
    flags = good_flags("plot_loss.py", workshop, chain, tmp_path) | {"--title": r"$\frac{$ 5", "--labels": ["$", "$^$"]}
    assert outcome("plot_loss.py", *as_arguments(flags), "--quiet")[0] == 0


EVALUATION = {"evaluation": {"bleu": 3.0}, "figures": {"seconds_per_batch": {"model": 1.0, "ratio": None}}}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"evaluation": {"bleu": "high"}}, "'bleu'"),
        ({"evaluation": {}}, "'evaluation'"),
        ({"figures": {"seconds_per_batch": 3}}, "'seconds_per_batch'"),
        ({"figures": {"seconds_per_batch": {"model": 10**400, "ratio": 1}}}, "1000"),
        ({"figures": []}, "'figures'"),
    ],
)
def test_a_damaged_evaluation_report(tmp_path, changes, words):
    (tmp_path / "r.json").write_text(json.dumps(EVALUATION | changes))
    process = call_apart("experiments/pareto.py", tmp_path / "r.json", "-o", tmp_path / "p.png", cwd=tmp_path)
    assert process.returncode == 2 and is_one_line(process.stderr) and words in process.stderr, process.stderr
