"""Compact models that an ordinary config can say: transformers' own classes, against the masked models."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import edited_json, fails, read_json, run
from oracles import same_state
from tiny import CLASSIFIERS, build_model, lively, padded_batch

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors
from common.models.compact import make_compact
from common.models.load import load_model
from common.models.plain import form_of
from common.models.saving import save_model
from common.pruning.criteria import criterion_class
from common.pruning.stacks import rank, stacks_of

# {kind: {pattern of blocks' names: the heads, or how many neurons, that they keep}}; a block's first pattern counts.
EVEN = {
    "t5-deep": {
        r"encoder.block.0|decoder.block.1": 0,
        r"encoder.*Self": {0, 2},
        r"decoder.*Self": {1, 3},
        r"EncDec": {0, 1},
        r"Dense": 20,
    },
    "umt5": {r"decoder.block.0": 0, r"block.0.*Self": {0, 1, 3}, r"block.1.*Self": {0, 2, 3}, r"EncDec": {1, 2, 3}},
    "marian": {r"encoder.*feed": 20, r"decoder.*feed": 30},
    "mbart": {r"decoder.*feed": 1},
    "m2m_100": {r"encoder.*feed": 20},
    "bert": {r"feed": 20},
    "modernbert": {r"mlp": 20},
    "distilbert": {r"ffn": 47},
}
UNEVEN = [  # (kind, the same, why that is not plain)
    ("t5", {r"encoder.block.1.*Self": {0, 2}}, "encoder.block.1.layer.0.SelfAttention has 2 heads, encoder.block.0"),
    (
        "t5",
        {r"block.0.*Self": {0, 2}, r"block.1.*Self": {0, 3}, r"EncDec": {1, 2}},
        "the self-attentions of encoder.block share a position bias, and have other heads",
    ),
    ("mt5", {r"decoder": 0}, "a stack has no layer left"),
    ("t5", {r"encoder.block.0": 0}, "the decoder has more layers left than the encoder"),
    ("bart", {r"layers.1.self": {0, 2}}, "model.encoder.layers.1.self_attn has 2 of 4 heads, which no ordinary config"),
    ("pegasus", {r"encoder.layers.1": 0}, "model.encoder.layers.1.self_attn is left out"),
    ("bert", {r"layer.1.feed": 20}, "bert.encoder.layer.1.feed_forward has 20 neurons, bert.encoder.layer.0.feed_"),
]


@torch.no_grad()
def masked(kind, parts):
    """A model in which biases matter, with zeros for what `parts` does not keep; and its masks."""
    model = lively(kind) if kind in ("t5-deep", "distilbert") else build_model(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter += 0.1 * torch.randn_like(parameter)
    masks = {}
    for name, block in find_blocks(model).items():
        kept = next((kept for pattern, kept in parts.items() if re.search(pattern, name)), None)
        if kept is None:
            continue
        size, out = block.heads or block.neurons, model.get_submodule(f"{block.root}.{block.output}")
        kept = kept if isinstance(kept, set) else range(kept)
        gone = torch.tensor([number not in kept for number in range(size)]).repeat_interleave(out.in_features // size)
        out.weight[:, gone] = 0
        masks[f"{block.root}.{block.output}.weight"] = out.weight != 0
    return model, masks


PROGRAM = """
import json, sys, torch, transformers
for kind, batch in json.loads(sys.argv[1]).items():
    auto = "AutoModelForSequenceClassification" if "labels" not in batch else "AutoModelForSeq2SeqLM"
    model, report = getattr(transformers, auto).from_pretrained(kind, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(**{name: torch.tensor(rows) for name, rows in batch.items()}).logits
    print(json.dumps([type(model).__name__, "common" in sys.modules, logits.tolist()]))
"""


def test_what_an_ordinary_config_can_say_needs_no_code(here):
    """Oracle: the masked model, in a process that has nothing but transformers and the folder."""
    batches, models = {}, {}
    for kind, parts in EVEN.items():
        model, masks = masked(kind, parts)
        smaller, smaller_masks = make_compact(model, masks)
        assert type(smaller) is type(model) and form_of(smaller) == {"plain": True}
        shapes = {name: parameter.shape for name, parameter in smaller.named_parameters()}
        assert smaller_masks and all(shapes[name] == mask.shape for name, mask in smaller_masks.items())
        assert [p.requires_grad for p in smaller.parameters()].count(False) == (2 if kind == "marian" else 0)
        save_model(kind, smaller, {})
        assert not list((here / kind).glob("*.py"))
        assert same_state(load_model(kind).model, smaller)
        models[kind], batch = model, dict(padded_batch(kind))
        if kind in CLASSIFIERS:
            del batch["labels"]
        batches[kind] = {name: tensor.tolist() for name, tensor in batch.items()}
    assert (smaller.config.hidden_dim, len(models["t5-deep"].encoder.block)) == (47, 3)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(batches)]
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    for (kind, model), line in zip(models.items(), done.stdout.splitlines(), strict=True):
        name, suite, logits = json.loads(line)
        assert (name, suite) == (type(model).__name__, False)
        with torch.no_grad():
            expected = model(**padded_batch(kind)).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5, msg=kind)


@pytest.mark.parametrize("kind, parts, reason", UNEVEN)
def test_what_it_cannot_say_has_its_reason(kind, parts, reason):
    smaller, _ = make_compact(*masked(kind, parts))
    form = form_of(smaller)
    assert not form["plain"] and reason in form["why_not_plain"] and type(smaller).__name__.startswith("Compact")


def test_a_plain_model_goes_through_the_stages_again(model_of, here):
    """By hand: the first of two decoder layers goes, and of 48 neurons 12; then of 36 9. A .pth keeps its masks."""
    source, rates = model_of("t5"), "--attention 0 --linear 0.25 --feed-forward 0.25 -n 1"
    for folder, decoder_layers, neurons in (("once", 1, 36), ("twice", 1, 27)):
        run(f"config_generator.py -m {source} {rates} -o {folder}.json")
        if folder == "once":
            edited_json(here / "once.json", here / "once.json", without_first_layer)
        run(f"prune_scheme_generator.py -i {folder}.json -o {folder}-scheme.json")
        run(f"prune.py -m {source} -c {folder}-scheme.json -o {folder}-pruned")
        tuning = (
            f"model-level_finetuning.py -m {source} -p {folder}-pruned -c {folder}.json -n 0 --compact --distill 0.5"
        )
        for output in (folder, f"{folder}.pth"):
            result = run(f"{tuning} --epochs 1 --batch-size 8 -o {output}")
            assert result["plain"] and "why_not_plain" not in result
        card = (here / folder / "README.md").read_text()
        assert "an ordinary `T5ForConditionalGeneration`" in card and "trust_remote_code" not in card
        assert run(f"{tuning} --epochs 1 --batch-size 8 -o {folder}")["skipped"]
        loaded = load_model(f"{folder}.pth")
        config, parameters = loaded.model.config, dict(loaded.model.named_parameters())
        assert (config.num_layers, config.num_decoder_layers, config.d_ff) == (2, decoder_layers, neurons)
        assert len(loaded.masks) == 3 * 2 + 4  # wi and wo of three layers, o of four attentions
        assert all(not parameters[name][~mask].any() for name, mask in loaded.masks.items())
        source = folder
    evaluated = run("evaluate-t5.py -m once twice --limit 8 --report report-{name}.json")["models"]
    assert evaluated[1]["parameters"] == result["parameters"]
    figures = read_json(here / "report-twice.json")["figures"]
    assert figures["parameters"]["original"] == evaluated[0]["parameters"]  # what it was made of, by its record


def without_first_layer(content):
    (config,) = content["configs"]
    for name, module in content["modules"].items():
        if name.startswith("decoder.block.0.") and module["kind"] != "linear":
            config[name] = 1


@pytest.mark.parametrize("criterion", ["l1", "reconstruction"])
def test_heads_ranked_over_a_stack_make_a_plain_model(model_of, here, criterion):
    """By hand: each self-attention keeps the two heads whose shares of their blocks' scores sum to most."""
    model = model_of("t5")
    run(f"config_generator.py -m {model} --attention 0.25 0.5 --linear 0 0 --feed-forward 0.5 0.5")
    run("prune_scheme_generator.py")
    pruning = f"prune.py -m {model} --criterion {criterion} -o"
    run(f"{pruning} plain --plain-heads")
    run(f"{pruning} free")
    assert "pass --overwrite" in fails(f"{pruning} free --plain-heads")
    for n, heads in enumerate((3, 2)):
        result = run(f"compose_model.py -m {model} -p plain -n {n} -o plain-{n} --compact")
        assert result["plain"] and load_model(f"plain-{n}").model.config.num_heads == heads
    assert not run(f"compose_model.py -m {model} -p free -n 1 -o free-1 --compact")["plain"]
    if criterion == "l1":
        encoder, small = load_model(model).model.encoder, load_model("plain-1").model.encoder
        shares = 0
        for layer in range(2):
            attention = encoder.block[layer].layer[0].SelfAttention
            scores = sum(getattr(attention, name).weight.abs().view(4, -1).sum(1) for name in "qkv")
            shares = shares + scores / scores.sum()
        kept = sorted(shares.topk(2).indices.tolist())
        for layer in range(2):
            table, q = (each.block[layer].layer[0].SelfAttention.q.weight for each in (encoder, small))
            assert torch.equal(q.view(2, 6, 32), table.view(4, 6, 32)[kept])


def test_a_block_of_zeros_has_no_say_in_its_stacks_heads():
    """Oracle: the shares of the other block's own scores."""
    model = build_model("t5")
    blocks, (stack, _) = find_blocks(model), stacks_of(model)
    tensors = {name: block_tensors(model, blocks[name]) for name in stack}
    tensors[stack[0]] = {name: torch.zeros_like(tensor) for name, tensor in tensors[stack[0]].items()}
    other = criterion_class("l1")(blocks[stack[1]], tensors[stack[1]], None).head_scores()
    ranked = rank([stack], "l1", tensors, [(blocks[name], None) for name in stack])
    for name in stack:
        torch.testing.assert_close(ranked[name].head_scores(), other / other.sum())


def plain_choices(kind, variants):
    """By hand: heads and neurons alike wherever a block is; a T5's layers gone as a whole, of two in each stack one at
    most, and none of the encoder's alone; a BERT's heads and layers stay."""
    if kind == "bert":
        half = {block: "neurons-24" if "feed" in block else "dense" for block in variants}
        return [dict.fromkeys(variants, "dense"), half]
    choices, layers = [], ("01", "0", "1")
    for heads, neurons, encoder, decoder in itertools.product(
        ("dense", "heads-2"), ("dense", "neurons-24"), layers, layers
    ):
        if len(decoder) <= len(encoder):
            left = {f"encoder.block.{n}." for n in encoder} | {f"decoder.block.{n}." for n in decoder}
            parts = {
                block: (heads, "heads-4") if "Attention" in block else (neurons, "neurons-48") for block in variants
            }
            choices.append({block: names[block[:16] not in left] for block, names in parts.items()})
    return choices


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_search_among_plain_models_finds_the_best_of_them(model_of, here, kind):
    """Oracle: the sums of all plain choices, one after the other. Without --plain-heads no two layers' heads agree."""
    model = model_of(kind)
    run(f"config_generator.py -m {model} --grid --attention 0 0.5 1 --linear 0 --feed-forward 0 0.5 1 -o grid.json")
    run("prune_scheme_generator.py -i grid.json")
    searching = (
        f"config_generator.py -m {model} -c grid.json --plain --score-examples 8 --batch-size 8 --report found.json"
    )
    if kind == "t5":
        run(f"prune.py -m {model} -o free")
        assert "prune.py --plain-heads" in fails(f"{searching} --search free --budget 0.5")
    run(f"prune.py -m {model} -o pruned {'--plain-heads' * (kind == 't5')}")
    budgets = (0.7, 0.4) if kind == "t5" else (1, 0.8)
    result = run(f"{searching} --search pruned --budget", *budgets)
    report = read_json(here / "found.json")
    assert result["plain"] and report["plain"]
    costs = {block: {"dense": cost} for block, cost in report["blocks"].items()}
    scores = {block: {"dense": 0} for block in costs}
    for each in report["variants"]:
        scores[each["block"]][each["variant"]] = each["kl"]
        costs[each["block"]][each["variant"]] = each["cost"]
    sums = [
        [sum(of[block][variant] for block, variant in choice.items()) for of in (costs, scores)]
        for choice in plain_choices(kind, costs)
    ]
    for n, budget in enumerate(budgets):
        best = min(score for cost, score in sums if cost <= budget * report["original"])
        assert result["found"][n]["predicted"] == pytest.approx(best, rel=1e-9)
        assert run(f"compose_model.py -m {model} -p pruned -n {n} -o found-{n} --compact")["plain"]
    least = min(cost for cost, _ in sums)
    assert f"cost {least / report['original']:.4g} to 1 of" in fails(f"{searching} --search pruned --budget 0.01")
