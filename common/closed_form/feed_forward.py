"""A feed-forward block's closed-form solution. See `reconstruction` for the problem and its sources.

The inner Linears are solved from the teacher's inputs, then the output Linear on the features that they really produce
for the same inputs. Where whole neurons are all that is missing, these features are the teacher's.
"""

import torch

from common.blocks import Block, Variant, features
from common.closed_form.least_squares import (
    add_products,
    at_least_float32,
    joined,
    kept,
    parted,
    solve,
    whole,
    with_ones,
)
from common.masking import parameter_masks
from common.schemes import Pair

CHUNK = 4096  # tokens that go through a feed-forward block at once


def solve_feed_forward(
    teacher: torch.nn.Module,
    block: Block,
    inputs: torch.Tensor,
    own: dict[str, torch.Tensor],
    variants: dict[Pair, Variant],
    *,
    ridge: float,
    wanted: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[Pair, dict[str, torch.Tensor]]:
    """Solve the inner Linears of all variants, then their output Linears on what these then produce.

    Where nothing but whole neurons is missing, the inner rows that are left have the teacher's weights and inputs, and
    nothing to solve. Such variants share the features' sums, and with no other mask on it, the output Linear's rows
    share a support: one Cholesky is the exact solution.

    Args:
        inputs: of the block, (tokens, d_model).
        own: the teacher's tensors.
        wanted: for inputs that are not the teacher's own: the teacher's for the same tokens, and what the output is to
            be, both (tokens, d_model). All rows of the inner Linears are then solved, for what the teacher's give.
    Returns:
        {pair: all tensors of the block}.
    """
    *inner, out = block.linears
    rows = at_least_float32(with_ones(inputs, block.has_bias))
    gram = whole(add_products(None, rows))
    inner_cross = gram if wanted is None else with_ones(wanted[0], block.has_bias).to(rows).T @ rows
    chunks = inputs.split(CHUNK)

    def feature_rows(tensors, chunk):
        return at_least_float32(with_ones(features(teacher, block, tensors, chunk), block.has_bias))

    if wanted is None:
        targets = [feature_rows(own, chunk) @ joined(own, out).to(gram).T for chunk in chunks]
    else:
        targets = wanted[1].to(gram).split(CHUNK)

    def feature_sums(tensors):
        feature_gram, cross = None, 0
        for chunk, target in zip(chunks, targets):
            rows = feature_rows(tensors, chunk)
            feature_gram, cross = add_products(feature_gram, rows), cross + target.T @ rows
        return whole(feature_gram), cross

    def solution(variant, linear, gram, cross):
        masks = parameter_masks(block, variant.keeps)
        start, keep = joined(variant.tensors, linear), kept(masks, variant.tensors, linear)
        return parted(solve(gram, cross, start, keep, ridge=ridge), variant.tensors, linear)

    solved, shared = {}, None
    for pair, variant in variants.items():
        if wanted is None and lost_neurons_alone(block, variant.keeps):
            shared = shared or feature_sums(own)
            solved[pair] = variant.tensors | solution(variant, out, *shared)
            continue
        new = dict(variant.tensors)
        for linear in inner:
            if wanted or not bool(variant.keeps[linear].all()):
                new |= solution(variant, linear, gram, joined(own, linear).to(gram) @ inner_cross)
        solved[pair] = new | solution(variant, out, *feature_sums(new))
    return solved


def lost_neurons_alone(block, keeps):
    """Whether each neuron has all its rows in the inner Linears, or none of them and no column in the output Linear."""
    *inner, out = block.linears
    whole = torch.stack([keeps[linear].all(dim=1) for linear in inner]).all(dim=0)  # (neurons,)
    gone = ~torch.stack([*(keeps[linear].any(dim=1) for linear in inner), keeps[out].any(dim=0)]).any(dim=0)
    return bool((whole | gone).all())
