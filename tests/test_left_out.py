"""Blocks that are left out (rate 1), through every stage and in every family.

Such a block adds its output Linear's bias and nothing else. The oracle of compact models is the masked model; what is
counted is worked by hand.
"""

import re

import pytest
import torch
from helpers import edited_json, fails, read_json, run
from oracles import logits, reconstruct
from tiny import CLASSIFIERS, OPTIONS, build_model, examples

from common.blocks.calls import block_calls, token_mask
from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_counts, set_block
from common.composing.scheme import Pair
from common.evaluation.cost import multiply_adds
from common.models.compact import make_compact
from common.models.load import load_model
from common.models.saving import save_model
from common.pruning.prune_block import prune_block

KINDS = ["t5-gated", "marian", "distilbert"]
TUNING = ("--method", "both", "--batch-size", 8, "--epochs", 1)


def in_first_layer(name):
    return re.search(r"\d", name)[0] == "0"


def add_configurations(content):
    """Two more for a conf.json: without the blocks of the first layers, and without any block."""
    parts = [name for name, module in content["modules"].items() if module["kind"] != "linear"]
    content["configs"] += [{name: 1 if in_first_layer(name) else 0.25 for name in parts}, dict.fromkeys(parts, 1)]


def emptied(model):
    """Of every block the variant that is left out, {pair: variant}."""
    variants = {}
    for name, block in find_blocks(model).items():
        removed = {"heads": block.heads, "neurons": block.neurons, "weights": {}}
        variants[Pair(name, "out")], _ = prune_block(block, block_tensors(model, block), removed)
    return variants


@pytest.fixture
def library_of(model_of, tmp_path, monkeypatch):
    """library_of(kind, *flags): the folder of a model, with libraries of four configurations beside it.

    In the first all feed-forward blocks are left out, in the second all attention, in the third the first layers, in
    the fourth everything.
    """

    def make(kind, *flags):
        model = model_of(kind)
        lively = load_model(model).model
        with torch.no_grad():
            for name, parameter in lively.named_parameters():
                if name.endswith(".bias"):  # they are zero as yet
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        lively.save_pretrained(model)
        monkeypatch.chdir(tmp_path)
        rates = ("--attention", 0.25, 1, "--linear", 0, 0.3, "--feed-forward", 1, 0.25)
        run("config_generator.py", *rates, "-n", 2)
        edited_json(tmp_path / "conf.json", tmp_path / "conf.json", add_configurations)
        run("prune_scheme_generator.py")
        run("prune.py")
        run("block-level_finetuning.py", *flags)
        return model

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_left_out_at_every_stage(kind, library_of, tmp_path):
    model = load_model(library_of(kind, *TUNING)).model
    blocks = find_blocks(model)
    gone = [
        {name for name, block in blocks.items() if block.kind == "feed_forward"},
        {name for name, block in blocks.items() if block.kind == "attention"},
        set(filter(in_first_layer, blocks)),
        set(blocks),
    ]
    pruned, tuned = (read_json(tmp_path / f"modules-{stage}" / "record.json") for stage in ("pruned", "finetuned"))
    left_out = set()
    for pair, entry in pruned["variants"].items():
        block = blocks[entry["block"]]
        if (entry["heads_removed"], entry["neurons_removed"]) == (block.heads, block.neurons):
            left_out.add(pair)
            sizes = {linear: block_tensors(model, block)[f"{linear}.weight"].numel() for linear in block.linears}
            assert entry["weights_removed"] == sizes
    assert {pruned["variants"][pair]["block"] for pair in left_out} == set(blocks)
    measured = run("prune.py")["configurations"]
    assert [(each["attention"]["measured"], each["feed_forward"]["measured"]) for each in measured] == [
        (0.25, 1),
        (1, 0.25),
        (0.625, 0.625),  # of two layers
        (1, 1),
    ]
    for pair, entry in tuned["variants"].items():
        if pair in left_out and not blocks[entry["block"]].has_bias:  # nothing of it is left
            assert entry["nmse_after"] == entry["nmse_before"] == pytest.approx(1)
        else:
            assert entry["nmse_after"] < entry["nmse_before"]

    numbers = ("-n", *range(4))
    masked = run("compose_model.py", *numbers, "-o", "masked-{n}")["models"]
    compact = run("compose_model.py", *numbers, "-o", "compact-{n}", "--compact")["models"]
    for n, names in enumerate(gone):
        expected = logits(f"masked-{n}", kind)
        torch.testing.assert_close(logits(f"compact-{n}", kind), expected, rtol=1e-5, atol=1e-5)
        small = load_model(f"compact-{n}").model
        if kind == "t5-gated" and n == 2:  # without its first layers it is plain, and the second ones are the first
            assert compact[n]["plain"] and find_blocks(small).keys() == names
            continue
        assert not compact[n]["plain"] and blocks.keys() - find_blocks(small).keys() == names
        for name in names:
            left = {each: tensor.numel() for each, tensor in block_tensors(small, blocks[name]).items()}
            assert {each for each, size in left.items() if size} == (
                {f"{blocks[name].linears[-1]}.bias"} if blocks[name].has_bias else set()
            )
        assert compact[n]["parameters"] < masked[n]["parameters"]

    evaluate = "evaluate-distilbert.py" if kind in CLASSIFIERS else "evaluate-t5.py"
    models = [f"{form}-{n}" for form in ("masked", "compact") for n in range(4)]
    scores = run(f"{evaluate} -m", *models, "--report", "{name}.json")["models"]
    scores = [each["accuracy" if kind in CLASSIFIERS else "bleu"] for each in scores]
    assert scores[:4] == scores[4:]
    for n in range(4):
        figures = read_json(tmp_path / f"compact-{n}.json")["figures"]
        assert figures["multiply_adds"]["ratio"] < 0.9 and figures["seconds_per_batch"]["model"] > 0


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_model_with_blocks_left_out_is_pruned_and_fine_tuned_further(kind, library_of, tmp_path):
    """Its first layers have no modules any more, in a T5 no numbers. Oracle for the compact model: the masked one."""
    library_of(kind, "--method", "reconstruct")
    tuned = run("model-level_finetuning.py -n 2 --epochs 1 --batch-size 8 --compact -o small")
    assert tuned["parameters"] == parameter_counts(load_model("small").model)["parameters"]

    further = ("-m", "small", "-c", "further.json")
    rates = ("--attention", 1, "--linear", 0.2, "--feed-forward", 0.5, "-n", 1)
    run("config_generator.py -m small -o further.json", *rates)
    (layer,) = {re.search(r"\d", name)[0] for name in read_json(tmp_path / "further.json")["modules"]}
    assert layer == ("0" if kind == "t5" else "1")
    run("prune_scheme_generator.py -i further.json -o scheme.json")
    run("prune.py -m small -c scheme.json -o pruned")
    run("block-level_finetuning.py -m small -p pruned -o tuned", *TUNING)
    for form, flags in (("masked", []), ("compact", ["--compact"]), ("file.pth", ["--compact"])):
        run("compose_model.py", *further, "-p", "tuned", "-n", 0, "-o", form, *flags)
        torch.testing.assert_close(logits(form, kind), logits("masked", kind), rtol=1e-5, atol=1e-5)
    assert all(block.kind == "feed_forward" for block in find_blocks(load_model("compact").model).values())
    training = ("--epochs", 1, "--batch-size", 8, "--compact", "-o", "end")
    run("model-level_finetuning.py", *further, "-p", "tuned", "-n", 0, *training)
    evaluate = "evaluate-distilbert.py" if kind in CLASSIFIERS else "evaluate-t5.py"
    run(f"{evaluate} -m end --original small --report end.json")
    assert read_json(tmp_path / "end.json")["figures"]["multiply_adds"]["ratio"] < 1


@pytest.mark.parametrize("kind, measure", [("t5", "parameters"), ("bert", "multiply-adds"), ("distilbert", "bytes")])
def test_a_search_counts_what_the_compact_model_costs(kind, measure, library_of, tmp_path):
    """Oracles: the parameters, the FlopCounter's products, and the bytes of the weights file, less its header.

    What the fourth configuration costs allows no block but those that are left out: biases alone.
    """
    library_of(kind, "--method", "reconstruct")
    (figures,) = run(
        *("config_generator.py", "--search", "modules-finetuned", "-c", "conf.json", "-o", "found.json"),
        *("--budget-of", 3, "--measure", measure, "--score-examples", 8, "--rounds", 0, "--report", "report.json"),
    )["found"]
    report = read_json(tmp_path / "report.json")
    biases = 0 if kind == "t5" else 32 * len(report["blocks"])
    each = {"parameters": 1, "multiply-adds": 0, "bytes": 4}[measure]
    assert figures["cost"] == pytest.approx(report["rest"] + each * biases)
    composing = ("compose_model.py", "-p", "modules-finetuned", "-c", "found.json", "-n", 0, "--compact")
    if measure == "bytes":
        run(*composing, "-o", "small")
        content = (tmp_path / "small" / "model.safetensors").read_bytes()
        assert figures["cost"] == len(content) - 8 - int.from_bytes(content[:8], "little")
    else:
        made = run(*composing, "-o", "small")
        assert figures["cost"] == (made["parameters"] if each else multiply_adds(load_model("small")))


def test_a_model_without_any_block_has_nothing_to_prune(tmp_path):
    model = build_model("bart")
    for block, tensors, _ in emptied(model).values():
        set_block(model, block, tensors)
    save_model(tmp_path / "empty", make_compact(model, {})[0], {})
    rates = ("--attention", 0.5, "--linear", 0.5, "-n", 1)
    err = fails(f"config_generator.py -m {tmp_path}/empty -o {tmp_path}/conf.json", *rates)
    assert "all of its blocks are left out" in err
    assert not (tmp_path / "conf.json").exists()


# --- closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "distilbert"])
def test_the_closed_form_gives_the_bias_the_mean_of_the_teachers_output(kind, monkeypatch):
    """Oracle: the mean over all real tokens, taken from one pass over one batch."""
    model, data = build_model(kind), examples(kind, 24)
    monkeypatch.setattr("common.pruning.closed_form.solve.OVERSAMPLING", 10**6)
    solved = reconstruct(model, emptied(model), data, ridge=0.0, **OPTIONS)
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        calls = block_calls(model, find_blocks(model).values(), batch)
    for call in calls:
        tensors = solved[Pair(call.block.name, "out")]
        out = call.block.output
        mean = call.output[token_mask(call.block, batch)].mean(dim=0)
        torch.testing.assert_close(tensors[f"{out}.bias"], mean, rtol=1e-4, atol=1e-5)
        assert not any(tensor.any() for name, tensor in tensors.items() if name != f"{out}.bias")
