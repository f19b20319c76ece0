"""A feed-forward block's closed-form solution. See `solve` for the problem and its sources."""

from functools import cached_property

import torch

from common.blocks.calls import features
from common.blocks.find import Block
from common.blocks.tensors import Variant
from common.pruning.closed_form.least_squares import (
    add_gram,
    at_least_float32,
    augmented_inputs,
    augmented_mask,
    augmented_weight,
    solve,
    split_augmented,
    symmetric,
)

CHUNK = 4096  # tokens that go through a feed-forward block at once


class FeedForwardSums:
    """What a feed-forward block's regressions need of the data: sums over the sampled tokens."""

    def __init__(
        self,
        teacher: torch.nn.Module,
        block: Block,
        inputs: torch.Tensor,
        weights: dict[str, torch.Tensor],
        targets: torch.Tensor | None = None,
    ):
        """
        Args:
            inputs: of the block, (tokens, d_model).
            weights: the teacher's tensors of the block.
            targets: wanted outputs, (tokens, d_model); None: what these give.
        """
        self.teacher, self.block, self.weights = teacher, block, weights
        rows = at_least_float32(augmented_inputs(inputs, block.has_bias))
        self.inner_gram = symmetric(add_gram(None, rows))  # H of the inner Linears
        self.chunks = inputs.split(CHUNK)
        if targets is None:
            weight = augmented_weight(weights, block.output).to(rows)
            self.targets = [self._features(weights, chunk) @ weight.T for chunk in self.chunks]
        else:
            self.targets = at_least_float32(targets).split(CHUNK)

    def gram(self, linear: str) -> torch.Tensor:
        """H (in, in) of a Linear's inputs in the original."""
        return self.teachers_output[0] if linear == self.block.output else self.inner_gram

    def inner(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """H (in, in) and G (out, in) of an inner Linear."""
        return self.inner_gram, augmented_weight(self.weights, linear).to(self.inner_gram) @ self.inner_gram

    def output(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the output Linear, over the features that the block's `tensors` produce."""
        gram, cross = None, 0
        for chunk, target in zip(self.chunks, self.targets):
            rows = self._features(tensors, chunk)
            gram, cross = add_gram(gram, rows), cross + target.T @ rows
        return symmetric(gram), cross

    @cached_property
    def teachers_output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over the teacher's features."""
        return self.output(self.weights)

    def _features(self, tensors, chunk):
        rows = features(self.teacher, self.block, tensors, chunk)
        return at_least_float32(augmented_inputs(rows, self.block.has_bias))


def solve_feed_forward(sums: FeedForwardSums, variant: Variant, *, ridge: float) -> dict[str, torch.Tensor]:
    """Solve the inner Linears of a variant, then its output Linear on what these then produce: all its tensors.

    Where nothing but whole neurons is missing, the features that are left are the teacher's, and all such variants
    share their sums.
    """
    out, solved = sums.block.output, dict(variant.tensors)
    if lost_neurons_alone(sums.block, variant.keeps):
        return solved | solve_linear(variant, out, *sums.teachers_output, ridge=ridge)
    for linear in sums.block.inner:
        if not bool(variant.keeps[linear].all()):
            solved |= solve_linear(variant, linear, *sums.inner(linear), ridge=ridge)
    return solved | solve_linear(variant, out, *sums.output(solved), ridge=ridge)


def solve_linear(
    variant: Variant, linear: str, gram: torch.Tensor, cross: torch.Tensor, *, ridge: float
) -> dict[str, torch.Tensor]:
    """The new tensors of one Linear of a variant, {"wo.weight": …, "wo.bias": …}; see `least_squares.solve`."""
    start, mask = augmented_weight(variant.tensors, linear), augmented_mask(variant, linear)
    return split_augmented(solve(gram, cross, start, mask, ridge=ridge), variant.tensors, linear)


def lost_neurons_alone(block, keeps):
    """Whether each neuron has all its rows in the inner Linears, or none of them and no column in the output Linear."""
    rows = block.by_role(keeps)
    intact = torch.stack([keep.all(dim=1) for keep in rows]).all(dim=0)  # (neurons,)
    gone = ~torch.stack([*(keep.any(dim=1) for keep in rows), keeps[block.output].any(dim=0)]).any(dim=0)
    return bool((intact | gone).all())
