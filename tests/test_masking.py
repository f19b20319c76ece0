"""Masks against torch.nn.utils.prune and hand-worked counts; removed heads against attention over the kept ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import torch_mask
from tiny import build_model
from torch.nn.utils import prune

from common.blocks.find import Block, find_blocks
from common.blocks.tensors import block_tensors, parameter_masks, set_block
from common.composing.configurations import removed_count
from common.pruning.l1 import L1
from common.pruning.masks import HeldMasks, keep_largest
from common.pruning.prune_block import prune_block

T5_SELF = "encoder.block.0.layer.0.SelfAttention"  # block 0 holds the position biases
DISTILBERT_SELF = "distilbert.transformer.layer.0.attention"


def distinct_weights(shape, seed):
    """float32 weights whose absolute values are all different, with random signs."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    sizes = (torch.randperm(count, generator=generator) + 1).float() / count
    return (sizes * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)).view(shape)


def block_and_tensors(kind, name):
    """A block of a tiny model with distinct random weights and biases in place of the initial ones."""
    model = build_model(kind)
    block = find_blocks(model)[name]
    tensors = {
        key: distinct_weights(tensor.shape, seed)
        for seed, (key, tensor) in enumerate(block_tensors(model, block).items())
    }
    set_block(model, block, tensors)
    return model, block, tensors


# --- ranks -----------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(shape=SHAPES, rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_keep_largest_is_the_mask_of_torch_l1_unstructured(shape, rate, seed):
    weight = distinct_weights(shape, seed)
    count = removed_count(rate, weight.numel())
    keep = keep_largest(weight.abs(), count)
    assert torch.equal(keep, torch_mask(prune.l1_unstructured, weight, amount=rate))
    assert torch.equal(keep, torch_mask(prune.l1_unstructured, weight, amount=count))


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [3, 8])
def test_head_masks_are_those_of_torch_ln_structured(heads, head_dim):
    torch.manual_seed(heads + head_dim)
    q, k, v = (torch.randn(heads * head_dim, 16) for _ in range(3))
    block = Block("a", "a", "attention", ("q", "k", "v"), "o", heads=heads, neurons=0, side="encoder", has_bias=False)
    weights = {"q.weight": q, "k.weight": k, "v.weight": v, "o.weight": torch.zeros(16, heads * head_dim)}
    scores = L1(block, weights).head_scores()
    matrix = torch.cat([w.view(heads, head_dim * 16) for w in (q, k, v)], dim=1)  # (heads, 3 * head_dim * d_model)
    for removed in range(heads):
        expected = torch_mask(prune.ln_structured, matrix, amount=removed, n=1, dim=0)[:, 0]
        assert torch.equal(keep_largest(scores, removed), expected)


def test_among_ties_exactly_k_go_and_earlier_positions_first():
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.5, 1.0]])
    expected = torch.tensor([[True, False, False], [True, False, True]])  # 0.5, then the first two of the ones
    assert torch.equal(keep_largest(scores, 3), expected)


# --- blocks ----------------------------------------------------------------------------------------------------


def weakest_heads(tensors, linears, heads, count):
    """The heads of the smallest sum of absolute weights in q, k and v, added up head by head in plain Python."""
    scores = []
    for head in range(heads):
        width = tensors[f"{linears[0]}.weight"].shape[0] // heads
        scores.append(
            sum(
                tensors[f"{name}.weight"][head * width : (head + 1) * width].double().abs().sum().item()
                for name in linears[:3]
            )
        )
    return sorted(range(heads), key=scores.__getitem__)[:count]


@pytest.mark.parametrize("kind, name, width", [("t5", T5_SELF, 6), ("distilbert", DISTILBERT_SELF, 8)])
def test_a_removed_head_loses_its_rows_its_biases_and_its_columns(kind, name, width):
    """Counts by hand: 4 heads of 6 (T5, d_model 32) or 8 (DistilBERT); 2 of them removed."""
    _, block, tensors = block_and_tensors(kind, name)
    (_, pruned, keeps), by_rate = prune_block(block, tensors, {"heads": 2, "weights": {}})
    gone = weakest_heads(tensors, block.linears, 4, 2)
    features = [head * width + i for head in gone for i in range(width)]
    qkv, out = block.inner, block.output
    for linear in qkv:
        assert int((~keeps[linear]).sum()) == 2 * width * 32
        assert not keeps[linear][features].any()
    assert int((~keeps[out]).sum()) == 2 * width * 32
    assert not keeps[out][:, features].any()
    assert by_rate == {}
    for parameter, tensor in tensors.items():
        linear, what = parameter.split(".")
        kept = torch.ones_like(tensor, dtype=torch.bool)
        if linear != out:
            kept[features] = False  # rows of the weight, entries of the bias
        elif what == "weight":
            kept[:, features] = False
        assert torch.equal(pruned[parameter], torch.where(kept, tensor, 0.0)), parameter  # the out bias stays whole


@pytest.mark.parametrize(
    "kind, name, out, total, columns",
    [
        ("t5", T5_SELF, "o", 32 * 24, 32 * 6),  # (d_model, heads * head_dim)
        ("distilbert", DISTILBERT_SELF, "out_lin", 32 * 32, 32 * 8),
    ],
)
def test_the_out_projection_is_ranked_as_a_whole_and_the_heads_columns_go_on_top(kind, name, out, total, columns):
    _, block, tensors = block_and_tensors(kind, name)
    own = torch_mask(prune.l1_unstructured, tensors[f"{out}.weight"], amount=total // 4)
    (_, _, keeps), by_rate = prune_block(block, tensors, {"heads": 1, "weights": {out: total // 4}})
    (head,) = weakest_heads(tensors, block.linears, 4, 1)
    width = columns // 32
    in_both = int((~own[:, head * width : (head + 1) * width]).sum())
    assert by_rate == {out: total // 4}
    assert int((~keeps[out]).sum()) == total // 4 + columns - in_both
    own[:, head * width : (head + 1) * width] = False
    assert torch.equal(keeps[out], own)


# --- removed heads against attention over the kept heads only ----------------------------------------------------


def attention_over(kept, x, linears, scale, bias):
    """Attention computed head by head over the kept heads: x (batch, length, d_model) -> the same shape.

    linears: {"q": (weight, bias or None)}; bias: added to the scores, (batch or 1, heads, length, length).
    """
    heads = bias.shape[1]
    total = 0
    for head in kept:
        rows = {}
        for name in ("q", "k", "v"):
            weight, offset = linears[name]
            width = weight.shape[0] // heads
            mine = slice(head * width, (head + 1) * width)
            rows[name] = x @ weight[mine].T + (0 if offset is None else offset[mine])
        scores = torch.einsum("bid,bjd->bij", rows["q"], rows["k"]) * scale + bias[:, head]
        context = torch.softmax(scores, dim=-1) @ rows["v"]
        total = total + context @ linears["o"][0][:, mine].T
    return total if linears["o"][1] is None else total + linears["o"][1]


@pytest.mark.parametrize("kind, name", [("t5", T5_SELF), ("distilbert", DISTILBERT_SELF)])
def test_a_block_with_masked_heads_is_attention_over_the_kept_heads(kind, name):
    model, block, tensors = block_and_tensors(kind, name)
    module = model.get_submodule(name)
    torch.manual_seed(1)
    x = torch.randn(2, 7, 32)
    hidden = torch.zeros(2, 1, 7, 7)
    hidden[1, :, :, 5:] = torch.finfo(torch.float32).min  # two tokens of padding in the second example
    linears = {
        key: (tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias")) for key, linear in zip("qkvo", block.linears)
    }
    kept = sorted(set(range(4)) - set(weakest_heads(tensors, block.linears, 4, 2)))

    (_, pruned, _), _ = prune_block(block, tensors, {"heads": 2, "weights": {}})
    set_block(model, block, pruned)
    with torch.no_grad():
        if kind == "t5":  # T5 does not scale; its position bias is learnt, one number a head and distance
            bias = hidden + module.compute_bias(7, 7)
            output, scale = module(x, mask=hidden)[0], 1.0
        else:
            output, scale, bias = module(x, attention_mask=hidden)[0], 8**-0.5, hidden.expand(2, 4, 7, 7)
        torch.testing.assert_close(output, attention_over(kept, x, linears, scale, bias), rtol=1e-4, atol=1e-4)
        everything = attention_over(range(4), x, linears, scale, bias)
    assert not torch.allclose(output, everything, atol=1e-2)  # the removed heads did matter


# --- zeros that stay -----------------------------------------------------------------------------------------------


def trained(optimizer_class, steps, apply=True, **options):
    """A masked T5 after some steps on random tokens: (model, masks, parameters before).

    `apply`: whether the weights are masked after each step, as they should be, or only the gradients before it.
    """
    model = build_model("t5")
    masks = {}
    for name, block in find_blocks(model).items():
        own = block_tensors(model, block)
        counts = {
            linear: own[f"{linear}.weight"].numel() // 2
            for linear in block.linears
            if block.kind == "feed_forward" or linear == "o"
        }
        (_, pruned, keeps), _ = prune_block(block, own, {"heads": 1 if block.heads else 0, "weights": counts})
        set_block(model, block, pruned)
        masks |= {f"{name}.{key}": mask for key, mask in parameter_masks(block, keeps).items()}
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    held, optimizer = HeldMasks(parameters, masks), optimizer_class(parameters.values(), **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids, labels = (torch.randint(2, 64, (2, 5), generator=generator) for _ in range(2))
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        held.mask_gradients()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if apply:
            held.apply()
    assert held.intact()
    return model, masks, before


@pytest.mark.parametrize("apply", [True, False], ids=["applied", "gradients alone"])
@pytest.mark.parametrize(
    "optimizer, options",
    [
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),  # the Learner's
        (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ],
    ids=["fused AdamW", "Nesterov"],
)
def test_after_50_steps_the_same_weights_are_zero_and_the_kept_ones_have_moved(optimizer, options, apply):
    """Oracle: the masks themselves, read back from the weights; removed ones have no bit set, so none is -0."""
    model, masks, before = trained(optimizer, 50, apply, **options)
    parameters = dict(model.named_parameters())
    assert len(masks) == 2 * 6 + 2 * 10  # weights of an encoder and of a decoder layer
    for name, mask in masks.items():
        assert torch.equal(parameters[name] == 0, ~mask), name
        assert not parameters[name][~mask].view(torch.int32).any(), name
        moved = parameters[name][mask] != before[name][mask]
        assert moved.float().mean() > 0.99, name


def test_the_gradient_norm_leaves_removed_entries_out():
    """By hand: of the gradient (3, 4, 12) the last entry is removed, and the norm is 5."""
    parameter = torch.ones(3, requires_grad=True)
    held = HeldMasks({"w": parameter}, {"w": torch.tensor([True, True, False])})
    (parameter * torch.tensor([3.0, 4.0, 12.0])).sum().backward()
    held.mask_gradients()
    assert torch.nn.utils.clip_grad_norm_([parameter], 100.0).item() == 5.0


def test_a_revived_weight_is_noticed_and_put_back():
    parameter = torch.tensor([1.0, 0.0])
    held = HeldMasks({"w": parameter, "free": torch.ones(2)}, {"w": torch.tensor([True, False])})
    parameter[1] = 1e-30
    assert not held.intact()
    parameter.grad = torch.ones(2)  # only what a step has touched is looked at
    held.apply()
    assert held.intact() and parameter.tolist() == [1.0, 0.0]
