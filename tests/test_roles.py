"""Roles that share a Linear, as ModernBERT's queries, keys and values do, against Linears of their own."""

import pytest
import torch

from common.blocks.find import Block
from common.blocks.tensors import parameter_masks
from common.composing.configurations import SIZES
from common.composing.search.costs import working_parts
from common.models.compact import working_heads, working_neurons
from common.pruning.closed_form.attention import AttentionSums, solve_attention
from common.pruning.closed_form.feed_forward import FeedForwardSums, lost_neurons_alone, solve_feed_forward
from common.pruning.l1 import L1
from common.pruning.prune_block import count_removed, prune_block
from common.pruning.reconstruction import Reconstruction

WIDTH, HEADS, NEURONS, DIRECTIONS = 16, 4, 24, 3
REMOVED = {"attention": {"heads": 2, "weights": {}}, "feed_forward": {"heads": 0, "neurons": 9, "weights": {}}}


def gated(module, *outputs):
    first, gate = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    return torch.nn.functional.gelu(first) * gate


def fused(tensors, names):
    """{"q.weight": …, "q": …} as if these Linears were one, "all"."""
    ends = {name.removeprefix(names[0]) for name in tensors if name.startswith(names[0])}
    others = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in names}
    return others | {f"all{end}": torch.cat([tensors[f"{name}{end}"] for name in names]) for end in ends}


def model_of(tensors):
    """A model whose block "b" has these tensors."""
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in tensors.items() if tensor.dim() == 2}
    linears = {name: torch.nn.Linear(inputs, outputs) for name, (outputs, inputs) in shapes.items()}
    model = torch.nn.ModuleDict({"b": torch.nn.ModuleDict(linears)})
    model.load_state_dict({f"b.{name}": tensor for name, tensor in tensors.items()})
    return model


def outcome(kind, roles, tensors, inputs, criterion):
    """What a criterion, the closed form, compact models and costs make of a block: (tensors, masks, parts, counts)."""
    heads, neurons = (HEADS, 0) if kind == "attention" else (0, NEURONS)
    block = Block("b", "b", kind, roles, "out", heads, neurons, "encoder", True, gated)
    if kind == "attention":
        attended = inputs.roll(1, 0)[:, : HEADS * DIRECTIONS]  # stands for what value projections may add
        with_bias = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        sums = AttentionSums(with_bias.T @ with_bias, None)
    else:
        sums = FeedForwardSums(model_of(tensors), block, inputs, tensors)
    criteria = dict.fromkeys(SIZES, criterion(block, tensors, sums))
    variant, _ = prune_block(block, tensors, REMOVED[kind], criteria)
    if kind == "attention":
        rows = torch.cat([inputs, attended, with_bias[:, -1:]], dim=1)
        sums = AttentionSums(rows.T @ rows, torch.eye(WIDTH)[:, :DIRECTIONS])
        solved = variant.tensors | solve_attention(sums, tensors, variant, ridge=1e-3)
        works = working_heads(block, variant.tensors)
    else:
        assert lost_neurons_alone(block, variant.keeps)
        solved = solve_feed_forward(sums, variant, ridge=1e-3)
        works, _ = working_neurons(model_of(variant.tensors), block)
    assert torch.equal(works, working_parts(block, variant.keeps))
    counts = count_removed(block, variant.keeps)
    return solved, parameter_masks(block, variant.keeps), works, (counts["heads_removed"], counts["neurons_removed"])


@pytest.mark.parametrize("criterion", [L1, Reconstruction])
@pytest.mark.parametrize("kind, names", [("attention", "qkv"), ("feed_forward", "ab")])
def test_a_fused_linear_is_its_parts(kind, names, criterion):
    """Oracle: the block whose roles are Linears of their own."""
    torch.manual_seed(0)
    width = WIDTH if kind == "attention" else NEURONS
    shapes = dict.fromkeys(names, (width, WIDTH)) | {"out": (WIDTH, width)}
    apart = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    apart |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    inputs = torch.randn(500, WIDTH)
    tensors, masks, works, counts = outcome(kind, tuple(names), apart, inputs, criterion)
    found = outcome(kind, ("all",) * len(names), fused(apart, names), inputs, criterion)
    for given, expected in zip(found, (fused(tensors, names), fused(masks, names))):
        assert given.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(given[name], tensor, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], works)
    assert found[3] == counts == ((2, 0) if kind == "attention" else (0, 9)) and int((~works).sum()) == max(counts)
