"""How models are written: the type of their weights, modes.

A type is tested against torch's own cast of the float32 model, and against what transformers makes of the folder.
"""

import json

import pytest
import torch
import transformers
from helpers import fails, read_json, run, touched
from oracles import loss_per_token
from safetensors.torch import load_file
from tiny import build_model, padded_batch, pairs_of

from common.models.load import load_model, resolve
from common.models.saving import damage, save_model
from common.runtime.errors import UserError


@pytest.fixture
def composing(t5, chain):
    return f"compose_model.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 1"


def holds(model, tensors):
    """Whether a model's tensors are these, {name: tensor}, bit for bit."""
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("output", ["folder", "file.pth"])
def test_a_written_model_is_the_float32_one_rounded(here, composing, output):
    """Oracle: torch's cast of every tensor. Masks are as they were, and removed weights are zero."""
    run(f"{composing} -o whole-{output}")
    result = run(f"{composing} -o {output} --dtype bfloat16")
    whole, half = load_model(f"whole-{output}"), load_model(output)
    assert (whole.dtype, half.dtype) == ("float32", "bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    rounded = {name: tensor.bfloat16().float() for name, tensor in whole.model.state_dict().items()}
    assert holds(half.model, rounded) and not holds(half.model, whole.model.state_dict())
    assert half.masks.keys() == whole.masks.keys()
    assert all(torch.equal(half.masks[name], mask) for name, mask in whole.masks.items())
    assert result["nonzero_parameters"] == sum(int(p.count_nonzero()) for p in half.model.parameters())
    if output == "file.pth":
        content = torch.load(output, weights_only=True)
        tensors, config = content["state_dict"], json.loads(content["config"])
    else:
        tensors, config = load_file(here / output / "model.safetensors"), read_json(here / output / "config.json")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and config["dtype"] == "bfloat16"
    assert damage(output) is None


def test_transformers_loads_a_compact_folder_in_its_type(here, composing):
    """Its logits in half precision are those of the float32 model, as near as the type can tell; again, the same."""
    run(f"{composing} --compact -o whole")
    run(f"{composing} --compact -o half --dtype bfloat16")
    sizes = {name: (here / name / "model.safetensors").stat().st_size for name in ("whole", "half")}
    assert 0.45 < sizes["half"] / sizes["whole"] < 0.6
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained
    half = load(here / "half").eval()
    assert half.dtype == half.config.dtype == torch.bfloat16
    with torch.no_grad():
        expected = load_model("whole").model(**padded_batch("t5")).logits
        logits = half(**padded_batch("t5")).logits
        half.save_pretrained(here / "again")
        assert torch.equal(load(here / "again").eval()(**padded_batch("t5")).logits, logits)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.2)


def test_a_finished_model_is_written_in_another_form(here, t5, chain):
    """Oracles: the logits of the fine-tuned masked model, and its record; a head has 768 weights, see test_compact."""
    masked, written = load_model(chain / "tuned-0.pth"), []
    parameters = masked.counts["parameters"] - 768 * masked.record["removed"]["attention"]["heads"][0]
    for source, form in ((masked.path, "--compact -o fast"), ("fast", "--dtype bfloat16 -o deeper/half")):
        result = run(f"compose_model.py -m {source} {form}")
        files, loaded = touched(here), load_model(result["output"])
        assert run(f"compose_model.py -m {source} {form}") == result and touched(here) == files
        for name in ("task", "base_model", "variants", "removed", "configuration", "library_stage", "made_with"):
            assert loaded.record[name] == masked.record[name]
        assert result["parameters"] == parameters < masked.counts["parameters"]
        assert t5.samefile(resolve(loaded.record["original"]["model"], loaded.path))
        written.append(loaded.model)
    with torch.no_grad():
        expected, whole, half = (model(**padded_batch("t5")).logits for model in (masked.model, *written))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(half, expected, rtol=0, atol=0.2)


def test_a_whole_model_in_another_form_is_not_called_pruned_and_refusals_say_why(here, t5):
    convert = f"compose_model.py -m {t5} -o same.pth"
    run(f"{convert} --format transformers")
    run("compose_model.py -m same.pth --vocabulary data -o smaller")
    assert load_model("smaller").record["original"]["fingerprint"] == load_model(t5).identity["fingerprint"]
    assert "pruned" not in (here / "smaller" / "README.md").read_text()
    assert "-n: which configurations (-n 0 1), or what other form" in fails(convert)
    assert "without -n give a name without it" in fails(f"compose_model.py -m {t5} --compact")
    assert "--library: goes with -n" in fails(f"{convert} --compact -p pruned")


def test_a_half_original_gives_half_models_unless_told_otherwise(here, t5, tokenizer):
    """The type goes from config.json through all stages."""
    halved = load_model(t5).model.to(torch.bfloat16)
    halved.save_pretrained(here / "original")
    tokenizer.save_pretrained(here / "original")
    config = read_json(here / "original" / "config.json")
    for dtype, expected in ((None, "float32"), ("float64", "float32"), ("bfloat16", "bfloat16")):
        (here / "original" / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert load_model("original").dtype == expected
    run("download_model.py t5 --checkpoint original --name mine")
    run("download_model.py t5 --checkpoint original --name single --dtype float32")
    assert [load_model(f"model/{name}").dtype for name in ("mine", "single")] == ["bfloat16", "float32"]
    assert holds(load_model("model/mine").model, halved.float().state_dict())

    run("config_generator.py -m model/mine --attention 0.5 --linear 0.3 -n 1")
    run("prune_scheme_generator.py")
    run("prune.py -m model/mine -o pruned")
    composing = "compose_model.py -m model/mine -p pruned -n 0 -o"
    run(f"{composing} default")
    run(f"{composing} float32 --dtype float32")
    records = {name: read_json(here / name / "record.json")["made_from"] for name in ("default", "float32")}
    assert records["default"] == records["float32"] | {"dtype": "bfloat16"}
    assert [load_model(name).dtype for name in records] == ["bfloat16", "float32"]
    assert "dtype: 'bfloat16' there, 'float16' asked for" in fails(f"{composing} default --dtype float16")


def test_what_is_written_is_what_was_measured(here, workshop, t5, chain, tokenizer):
    """Oracle: the loss of the written model, one pair at a time. Another type needs no second training."""
    tuning = f"model-level_finetuning.py -m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0 --epochs 1 --batch-size 8"
    whole, half = (run(f"{tuning} -o {dtype} --dtype {dtype}") for dtype in ("float32", "bfloat16"))
    assert half["val_loss_float32"] == whole["val_loss"] != half["val_loss"] and "val_loss_float32" not in whole
    for dtype, result in (("float32", whole), ("bfloat16", half)):
        loaded = load_model(dtype)
        expected = loss_per_token(loaded.model, tokenizer, pairs_of(workshop, "val"))
        assert result["val_loss"] == loaded.record["measured"]["val_loss"] == pytest.approx(expected, rel=1e-5)
    # The bfloat16 loss is another one than float32's by far more than that tolerance.
    assert abs(half["val_loss"] - whole["val_loss"]) > 1e-4 * whole["val_loss"]


def test_what_float16_cannot_hold_is_refused(here, workshop, t5):
    """In one line, before any work, and nothing is there afterwards; bfloat16 can hold it."""
    model = build_model("t5")
    with torch.no_grad():
        model.shared.weight[5, 5] = 1e5
    save_model("large", model, {"tokenizer": {"folder": str(workshop / "tokenizer" / "t5")}})
    run("config_generator.py -m large --attention 0.5 --linear 0.3 -n 1")
    run("prune_scheme_generator.py")
    run("prune.py -m large -o pruned")
    where = "-m large -p pruned -n 0"
    for script, more in (("compose_model.py", ""), ("model-level_finetuning.py", f"--data {workshop}/data/t5")):
        for output in ("out", "out.pth"):
            err = fails(f"{script} {where} {more} -o {output} --dtype float16 --quiet")
            assert "shared.weight holds 100000, and float16 ends at 65504" in err and "--dtype" in err
            assert not list(here.glob("out*"))
    with pytest.raises(UserError, match="float16 ends at 65504"):
        save_model("out", model, {}, dtype="float16")
    run(f"compose_model.py {where} -o out --dtype bfloat16")


def test_activations_that_float16_cannot_hold_are_refused(here, workshop):
    """Every weight fits, but not what they make of an input: as transformers loads the folder, it gives NaN."""
    model = build_model("t5-gated")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 1e3 if ".wi_" in name else 1e-6 if "DenseReluDense.wo" in name else 1
    tokenizer, data = workshop / "tokenizer" / "t5", workshop / "data" / "t5"
    save_model("large", model, {"tokenizer": {"folder": str(tokenizer)}, "data": {"folder": str(data)}})
    batch = padded_batch("t5")
    half = transformers.AutoModelForSeq2SeqLM.from_pretrained(here / "large", dtype=torch.float16)
    assert half(**batch).logits.isnan().any() and model(**batch).logits.isfinite().all()
    run("config_generator.py -m large --attention 0.5 --linear 0.3 -n 1")
    run("prune_scheme_generator.py")
    run("prune.py -m large -o pruned")
    for script in ("compose_model.py", "model-level_finetuning.py"):
        for output in ("out", "out.pth"):
            err = fails(f"{script} -m large -p pruned -n 0 -o {output} --dtype float16 --quiet")
            assert "loaded in float16, its predictions would be NaN" in err and "--dtype bfloat16" in err
            assert not list(here.glob("out*"))
    assert "NaN" in fails(f"download_model.py --checkpoint large -t {tokenizer} --dtype float16 --quiet")
    run("compose_model.py -m large -p pruned -n 0 -o out --dtype bfloat16")
