"""A feed-forward block's closed-form solution. See `reconstruction` for the problem and its sources.

The inner Linears are solved from the teacher's inputs, then the output Linear on the features that they really produce
for the same inputs. Where whole neurons are all that is missing, these features are the teacher's.
"""

from functools import cached_property

import torch

from common.blocks.calls import features
from common.blocks.find import Block
from common.blocks.tensors import Variant, parameter_masks
from common.composing.scheme import Pair
from common.pruning.closed_form.least_squares import (
    add_products,
    at_least_float32,
    joined,
    kept,
    parted,
    solve,
    whole,
    with_ones,
)

CHUNK = 4096  # tokens that go through a feed-forward block at once


class Sums:
    """What a feed-forward block's regressions need of the data: sums over the sampled tokens."""

    def __init__(self, teacher: torch.nn.Module, block: Block, inputs: torch.Tensor, own: dict[str, torch.Tensor]):
        """
        Args:
            inputs: of the block, (tokens, d_model).
            own: the teacher's tensors.
        """
        self.teacher, self.block, self.own = teacher, block, own
        rows = at_least_float32(with_ones(inputs, block.has_bias))
        self.inputs = whole(add_products(None, rows))  # H of the inner Linears
        self.chunks = inputs.split(CHUNK)
        weight = joined(own, block.output).to(rows)
        self.targets = [self._features(own, chunk) @ weight.T for chunk in self.chunks]

    def inner(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """H (in, in) and G (out, in) of an inner Linear."""
        return self.inputs, joined(self.own, linear).to(self.inputs) @ self.inputs

    def output(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the output Linear, over the features that the block's `tensors` produce."""
        gram, cross = None, 0
        for chunk, target in zip(self.chunks, self.targets):
            rows = self._features(tensors, chunk)
            gram, cross = add_products(gram, rows), cross + target.T @ rows
        return whole(gram), cross

    @cached_property
    def teachers_output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over the teacher's features."""
        return self.output(self.own)

    def _features(self, tensors, chunk):
        return at_least_float32(with_ones(features(self.teacher, self.block, tensors, chunk), self.block.has_bias))


def solve_feed_forward(
    sums: Sums, variants: dict[Pair, Variant], *, ridge: float
) -> dict[Pair, dict[str, torch.Tensor]]:
    """Solve the inner Linears of all variants, then their output Linears on what these then produce.

    Where nothing but whole neurons is missing, the inner rows that are left have the teacher's weights and inputs, and
    nothing to solve. Such variants share the features' sums, and with no other mask on it, the output Linear's rows
    share a support: one Cholesky is the exact solution.

    Returns:
        {pair: all tensors of the block}.
    """
    inner, out = sums.block.inner, sums.block.output
    solved = {}
    for pair, variant in variants.items():
        if lost_neurons_alone(sums.block, variant.keeps):
            solved[pair] = variant.tensors | solve_linear(variant, out, *sums.teachers_output, ridge=ridge)
            continue
        new = dict(variant.tensors)
        for linear in inner:
            if not bool(variant.keeps[linear].all()):
                new |= solve_linear(variant, linear, *sums.inner(linear), ridge=ridge)
        solved[pair] = new | solve_linear(variant, out, *sums.output(new), ridge=ridge)
    return solved


def solve_linear(
    variant: Variant, linear: str, gram: torch.Tensor, cross: torch.Tensor, *, ridge: float
) -> dict[str, torch.Tensor]:
    """The new tensors of one Linear of a variant: {"wo.weight": …, "wo.bias": …}.

    Args:
        gram, cross: H (in, in) and G (out, in) of that Linear, a bias's input included; see `least_squares.solve`.
        ridge: relative to the mean of diag H.
    """
    block, tensors, keeps = variant
    start, keep = joined(tensors, linear), kept(parameter_masks(block, keeps), tensors, linear)
    return parted(solve(gram, cross, start, keep, ridge=ridge), tensors, linear)


def lost_neurons_alone(block, keeps):
    """Whether each neuron has all its rows in the inner Linears, or none of them and no column in the output Linear."""
    inner, out = block.inner, block.output
    whole = torch.stack([keeps[linear].all(dim=1) for linear in inner]).all(dim=0)  # (neurons,)
    gone = ~torch.stack([*(keeps[linear].any(dim=1) for linear in inner), keeps[out].any(dim=0)]).any(dim=0)
    return bool((whole | gone).all())
