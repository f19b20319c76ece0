"""Solving blocks among pruned ones: what has drifted there, what is wanted, and the solutions."""

import copy

import pytest
import torch
from oracles import pruned_variants, reconstruct
from tiny import MODELS, OPTIONS, build_model, examples, padded_batch

from common.blocks.calls import block_calls
from common.blocks.find import find_blocks
from common.blocks.tensors import set_block
from common.pruning import closed_form
from common.pruning.closed_form import context as contexts
from common.pruning.closed_form.context import Context
from common.training.block_level.teacher import held_out_errors


def context_of(model, variants):
    return Context(model, {pair.block: variant.tensors for pair, variant in variants.items()})


def composed(model, variants):
    """A copy of a model with variants in its blocks, made without a context."""
    copied = copy.deepcopy(model)
    for block, tensors, _ in variants.values():
        set_block(copied, block, tensors)
    return copied


def hidden_states(model, batch, side):
    output = model(**batch, output_hidden_states=True)
    return getattr(output, f"{side}_hidden_states", None) or output.hidden_states


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "toy"])
def test_what_has_drifted_is_what_enters_a_layer(kind, monkeypatch):
    """Oracle: transformers' own hidden states, of both models, in front of every layer's first block."""
    monkeypatch.setattr(contexts, "ANSWER", 0.0)
    monkeypatch.setattr(contexts, "DRIFT", 1.0)
    model, batch = build_model(kind), padded_batch(kind)
    variants = pruned_variants(model, 2, 0.5)
    pruned = composed(model, variants)
    layers = {"encoder": -1, "decoder": -1}
    for call, wanted in context_of(model, variants).calls(find_blocks(model).values(), batch):
        block = call.block
        is_first_of_layer = block.heads and "cross" not in block.name.lower() and "encdec" not in block.name.lower()
        if not is_first_of_layer or "encoder_attn" in block.name:
            continue
        layers[block.side] += 1
        states = [hidden_states(each, batch, block.side)[layers[block.side]] for each in (model, pruned)]
        torch.testing.assert_close(wanted - call.output, states[0] - states[1], rtol=1e-4, atol=1e-5)
        assert layers[block.side] == 0 or (states[0] - states[1]).abs().max() > 1e-3
    assert max(layers.values()) > 0


@pytest.mark.parametrize("kind", ["t5", "t5-gated", "distilbert", "bert", "bart"])
def test_calls_in_a_context_are_the_original_blocks_on_what_reaches_them_there(kind):
    """Oracle: the context with one block put back at a time."""
    model, batch = build_model(kind), padded_batch(kind)
    variants = pruned_variants(model, 2, 0.5)
    calls = {call.block: call for call, _ in context_of(model, variants).calls(find_blocks(model).values(), batch)}
    for block in find_blocks(model).values():
        others = {pair: variant for pair, variant in variants.items() if pair.block != block.name}
        (expected,) = block_calls(composed(model, others), [block], batch)
        torch.testing.assert_close(calls[block].output, expected.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "distilbert", "bert", "marian"])
def test_in_the_original_as_a_context_the_solution_is_the_plain_one(kind):
    model, data = build_model(kind), examples(kind, 96)
    variants = pruned_variants(model, 2, 0.3)
    plain = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    found = closed_form.reconstruct(model, variants, data, **OPTIONS, ridges=[1e-3], context=context_of(model, {}))
    candidates = {pair: [variant.tensors, plain[pair], *found[pair]] for pair, variant in variants.items()}
    errors = held_out_errors(model, find_blocks(model), candidates, examples(kind, 64, seed=9), **OPTIONS)
    for pair, (before, once, again) in errors.items():
        assert once < before and again == pytest.approx(once, rel=0.05), pair


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_blocks_solved_in_context_compose_to_what_is_nearer_to_the_original(kind):
    """Of a model with much removed, on examples that no solution has seen."""
    model, data, unseen = build_model(kind), examples(kind, 256), examples(kind, 64, seed=9)
    variants = pruned_variants(model, 3, 0.7)

    batch = unseen.batch(range(64))
    side, real = ("decoder", batch["labels"] >= 0) if kind == "t5" else ("encoder", batch["attention_mask"].bool())

    def distance(solved):
        with_them = {pair: variant._replace(tensors=solved[pair]) for pair, variant in variants.items()}
        with torch.no_grad():
            ours, theirs = (hidden_states(each, batch, side)[-1][real] for each in (composed(model, with_them), model))
        return (ours - theirs).square().sum().item()

    solved = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    first = distance(solved)
    for _ in range(2):
        context = context_of(model, {p: variant._replace(tensors=solved[p]) for p, variant in variants.items()})
        found = closed_form.reconstruct(model, variants, data, **OPTIONS, ridges=[1e-3], context=context)
        solved = {pair: tensors for pair, (tensors,) in found.items()}
    assert distance(solved) < 0.95 * first
