"""How models are written: the type of their weights, modes.

A type is tested against torch's own cast of the float32 model, and against what transformers makes of the folder.
"""

import json
import os
import stat

import pytest
import torch
import transformers
from helpers import build_model, fails, loss_per_token, outcome, padded_batch, pairs_of, read_json, run
from safetensors.torch import load_file

from common.models.load import load_model
from common.models.saving import damage, save_model
from common.runtime.errors import UserError

HALVES = ["bfloat16"]


@pytest.fixture
def composing(workshop, chain, tmp_path):
    """The flags of compose_model.py for an output in tmp_path; `model` is another original."""

    def flags(output, *others, model=workshop / "model" / "t5"):
        where = ["-m", model, "-t", workshop / "tokenizer" / "t5", "-p", chain / "tuned", "-c", chain / "conf.json"]
        return [*where, "-n", 1, "-o", tmp_path / output, *others]

    return flags


def tensors_of(folder):
    """What a folder's safetensors files hold, as they hold it."""
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def holds(model, tensors):
    """Whether a model's tensors are these, {name: tensor}, bit for bit."""
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], each) for name, each in tensors.items())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("output", ["folder", "file.pth"])
def test_a_written_model_is_the_float32_one_rounded(composing, tmp_path, dtype, output):
    """Oracle: torch's cast of every tensor. Masks are as they were, and removed weights are zero."""
    wanted = run("compose_model.py", *composing("whole.pth" if output == "file.pth" else "whole"))
    found = run("compose_model.py", *composing(output, "--dtype", dtype))
    whole, half = (load_model(wanted["output"]), load_model(found["output"]))
    assert (whole.dtype, half.dtype) == ("float32", dtype)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    rounded = {name: each.to(getattr(torch, dtype)).float() for name, each in whole.model.state_dict().items()}
    assert holds(half.model, rounded) and not holds(half.model, whole.model.state_dict())
    assert half.masks.keys() == whole.masks.keys()
    assert all(torch.equal(half.masks[name], mask) for name, mask in whole.masks.items())
    assert found["nonzero_parameters"] == sum(int(p.count_nonzero()) for p in half.model.parameters())
    if output == "file.pth":
        content = torch.load(tmp_path / output, weights_only=True)
        assert {each.dtype for each in content["state_dict"].values()} == {getattr(torch, dtype)}
        assert json.loads(content["config"])["dtype"] == dtype
    else:
        assert read_json(tmp_path / output / "config.json")["dtype"] == dtype
        floats = {each.dtype for each in tensors_of(tmp_path / output).values()}
        assert floats == {getattr(torch, dtype)}
        assert damage(found["output"]) is None


@pytest.mark.parametrize("dtype", HALVES)
def test_transformers_loads_a_compact_folder_in_its_type(composing, tmp_path, dtype):
    """Its logits in half precision are those of the float32 model, as near as the type can tell; again, the same."""
    whole = run("compose_model.py", *composing("whole", "--compact"))
    run("compose_model.py", *composing("half", "--compact", "--dtype", dtype))
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")}
    assert 0.45 < sizes["half"] / sizes["whole"] < 0.6
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained
    half = load(tmp_path / "half").eval()
    assert half.dtype == getattr(torch, dtype) and half.config.dtype == half.dtype
    with torch.no_grad():
        expected = load_model(whole["output"]).model(**padded_batch("t5")).logits
        logits = half(**padded_batch("t5")).logits
        half.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again").eval()(**padded_batch("t5")).logits
    assert logits.dtype == half.dtype and torch.equal(logits, again)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02 if dtype == "float16" else 0.2)


def test_a_half_original_gives_half_models_unless_told_otherwise(composing, workshop, tmp_path):
    """The type goes from config.json through all stages; a key says it only where it is not what it always was."""
    original = tmp_path / "original"
    loaded = load_model(workshop / "model" / "t5")
    halved = loaded.model.to(torch.bfloat16)
    halved.save_pretrained(original)
    (original / "record.json").write_text((workshop / "model" / "t5" / "record.json").read_text())
    assert load_model(original).dtype == "bfloat16"
    settings = read_json(original / "config.json")
    del settings["dtype"]
    for named, dtype in ({}, "float32"), ({"dtype": "float64"}, "float32"):
        (original / "config.json").write_text(json.dumps(settings | named))
        assert load_model(original).dtype == dtype, named

    place = {"-o": tmp_path, "--checkpoint": original, "--name": "mine"}
    halved.save_pretrained(original)
    transformers.AutoTokenizer.from_pretrained(workshop / "tokenizer" / "t5").save_pretrained(original)
    (original / "record.json").unlink()
    run("download_model.py t5", *[item for pair in place.items() for item in pair])
    mine = tmp_path / "model" / "mine"
    assert load_model(mine).dtype == "bfloat16" and holds(load_model(mine).model, loaded.model.float().state_dict())
    place["--name"] = "single"
    run("download_model.py t5", *[item for pair in place.items() for item in pair], "--dtype", "float32")
    assert load_model(tmp_path / "model" / "single").dtype == "float32"

    records = {}
    for name, flags in (("default", []), ("float32", ["--dtype", "float32"])):
        conf = tmp_path / "conf.json"
        code, _, err = outcome(f"config_generator.py -m {mine} -o {conf} --attention 0.5 --linear 0.3 -n 1")
        assert code == 0, err
        run(f"prune_scheme_generator.py -i {conf} -o {tmp_path}/scheme.json")
        run(f"prune.py -m {mine} -c {tmp_path}/scheme.json -o {tmp_path}/pruned")
        where = ["-m", mine, "-p", tmp_path / "pruned", "-c", conf, "-n", 0, "-o", tmp_path / name]
        run("compose_model.py", *where, *flags)
        records[name] = read_json(tmp_path / name / "record.json")["made_from"]
        assert load_model(tmp_path / name).dtype == ("bfloat16" if name == "default" else "float32")
    assert records["default"] == records["float32"] | {"dtype": "bfloat16"}
    err = fails("compose_model.py", *where[:-1], tmp_path / "default", "--dtype", "float16")
    assert "dtype: 'bfloat16' there, 'float16' asked for" in err


def test_what_is_written_is_what_was_measured(workshop, chain, tokenizer, tmp_path):
    """Oracle: the loss of the written model, one pair at a time. Another type needs no second training."""
    model = workshop / "model" / "t5"
    flags = ["-m", model, "-p", chain / "pruned", "-c", chain / "conf.json", "-n", 0, "--epochs", 1, "--batch-size", 8]
    results = {
        dtype: run("model-level_finetuning.py", *flags, "-o", tmp_path / dtype, "--dtype", dtype)
        for dtype in ("float32", "bfloat16")
    }
    half, whole = results["bfloat16"], results["float32"]
    assert half["val_loss_float32"] == whole["val_loss"] != half["val_loss"]
    assert "val_loss_float32" not in whole
    pairs = pairs_of(workshop, "val")
    for dtype, result in results.items():
        loaded = load_model(tmp_path / dtype)
        assert result["val_loss"] == pytest.approx(loss_per_token(loaded.model, tokenizer, pairs), rel=1e-5)
        assert loaded.record["measured"]["val_loss"] == result["val_loss"]
    # The bfloat16 loss is another one than float32's by far more than that tolerance.
    assert abs(half["val_loss"] - whole["val_loss"]) > 1e-4 * whole["val_loss"]


def test_what_float16_cannot_hold_is_refused(composing, workshop, chain, tmp_path):
    """In one line, before any work, and nothing is there afterwards; bfloat16 can hold it."""
    large = tmp_path / "large"
    model = build_model("t5")
    with torch.no_grad():
        model.shared.weight[5, 5] = 1e5
    save_model(large, model, read_json(workshop / "model" / "t5" / "record.json"))
    conf = tmp_path / "conf.json"
    assert outcome(f"config_generator.py -m {large} -o {conf} --attention 0.5 --linear 0.3 -n 1")[0] == 0
    assert outcome(f"prune_scheme_generator.py -i {conf} -o {tmp_path}/scheme.json")[0] == 0
    assert outcome(f"prune.py -m {large} -c {tmp_path}/scheme.json -o {tmp_path}/pruned")[0] == 0
    where = ["-m", large, "-t", workshop / "tokenizer" / "t5", "-p", tmp_path / "pruned", "-c", conf, "-n", 0]
    training = ["--data", workshop / "data" / "t5", "--epochs", 1, "--batch-size", 8]
    for script, flags in (("compose_model.py", []), ("model-level_finetuning.py", training)):
        for output in ("out", "out.pth"):
            err = fails(script, *where, *flags, "-o", tmp_path / output, "--dtype", "float16", "--quiet")
            assert "shared.weight holds 100000, and float16 ends at 65504" in err and "--dtype" in err
            assert not (tmp_path / output).exists() and not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match="float16 ends at 65504"):
        save_model(tmp_path / "out", model, {}, dtype="float16")
    assert outcome("compose_model.py", *where, "-o", tmp_path / "out", "--dtype", "bfloat16")[0] == 0


# --- modes -------------------------------------------------------------------------------------------------------


def test_outputs_have_the_modes_of_plain_files_and_folders(composing, workshop, chain, tmp_path):
    """Oracle: what open() and mkdir() make under the same umask."""
    before = os.umask(0o027)
    try:
        (tmp_path / "oracle").mkdir()
        (tmp_path / "oracle" / "file").touch()
        for output in ("folder", "file.pth"):
            run("compose_model.py", *composing(output, "--compact", "--dtype", "float16"))
        model, conf = workshop / "model" / "t5", chain / "conf.json"
        run(f"prune_scheme_generator.py -i {conf} -o {tmp_path}/scheme.json")
        run(f"prune.py -m {model} -c {tmp_path}/scheme.json -o {tmp_path}/library")
        flags = ["--epochs", 1, "--batch-size", 8, "--limit", 8]
        tuning = ["-m", model, "-c", conf, "-p", tmp_path / "library", "-n", 0, "-o", tmp_path / "tuned"]
        run("model-level_finetuning.py", *tuning, *flags)
        measuring = ["-m", tmp_path / "tuned", "--limit", 2, "--max-new-tokens", 2]
        run("evaluate-t5.py", *measuring, "--report", tmp_path / "report.json")
        run(f"plot_loss.py {tmp_path}/tuned.csv -o {tmp_path}/loss.png")
    finally:
        os.umask(before)
    kinds = {path: (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*")}
    assert (kinds[tmp_path / "oracle"], kinds[tmp_path / "oracle" / "file"]) == ((True, 0o750), (False, 0o640))
    assert len(kinds) > 40
    assert {mode for is_folder, mode in kinds.values() if is_folder} == {0o750}
    assert {path.name: mode for path, (is_folder, mode) in kinds.items() if not is_folder and mode != 0o640} == {}
