"""Selection by reconstruction: what goes is what a block's output loses least by, once the rest has been solved again.

- Heads and neurons go by greedy backward elimination on the Gram matrix of the output Linear's inputs: at each step
  those whose removal raises the error least after the optimal update of all weights that are left. That is the optimal
  brain surgeon (Hassibi and Stork, 1993) by groups, as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110).
- Single weights go by ADMM with a gradual mask (arXiv 2401.02938): the unconstrained solution is pulled, step by step,
  towards a sparse one, whose support is chosen anew each time, with more and more entries removed. The output Linear's
  mask is chosen on the features that the inner Linears produce once they are solved.
"""

from functools import cached_property

import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant
from common.pruning.closed_form import Sums
from common.pruning.closed_form.feed_forward import solve_linear
from common.pruning.closed_form.least_squares import augmented_weight, finite
from common.pruning.masks import keep_largest
from common.runtime.devices import in_full_precision
from common.runtime.errors import UserError

RIDGE = 1e-3  # relative to the mean of diag H
NEURONS_AT_ONCE = 16  # at most, and at most one of 32; one at a time gave nothing better
ITERATIONS = 20  # of ADMM; the mask has its final number of weights after three quarters of them


class Reconstruction:
    """A `criteria.Criterion`: what the block's output loses, once what is left has been solved again.

    All methods raise a UserError if sums overflowed.
    """

    version = 1

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor], sums: Sums):
        self.block, self.sums = block, sums
        self.weights = {name: tensor.detach() for name, tensor in tensors.items()}

    def head_scores(self) -> torch.Tensor:
        """The turn in which each head, or neuron, would go: (heads,) or (neurons,)."""
        return self._turns

    neuron_scores = head_scores

    @cached_property
    def _turns(self):
        count = self.block.heads or self.block.neurons
        step = 1 if self.block.heads else max(1, min(NEURONS_AT_ONCE, count // 32))
        gram, _ = self._output({})
        out = self.block.output
        size = self.weights[f"{out}.weight"].shape[1] // count
        order = elimination_order(gram, augmented_weight(self.weights, out), count, size, step)
        turns = torch.empty_like(order)
        turns[order] = torch.arange(count, device=order.device)
        return turns

    def weight_mask(self, linear: str, removed: int, features: torch.Tensor, keeps: dict) -> torch.Tensor:
        """The gradual mask, chosen among the rows or columns of the heads and neurons that stay, at the rate of the
        Linear. How many fall on the others, which go anyway, is counted as if they went at that rate too."""
        is_output = linear == self.block.output
        weight = self.weights[f"{linear}.weight"]
        rows = features.repeat(self.block.folds)  # of an inner Linear
        within = features.expand(weight.shape) if is_output else rows[:, None].expand(weight.shape)
        inside = min(round(removed * int(within.sum()) / within.numel()), int(within.sum()))
        inside = max(inside, removed - int((~within).sum()))
        keep = torch.ones_like(weight, dtype=torch.bool)
        keep[~within] = keep_largest(weight[~within].abs(), removed - inside)
        gram, cross = self._output(keeps) if is_output else self._finite(*self.sums.inner(linear))
        start = augmented_weight(self.weights, linear).to(gram)
        if is_output:
            used = torch.cat([features, features.new_ones(len(gram) - len(features))])  # the bias's column too
            gram, cross, start = gram[used][:, used], cross[:, used], start[:, used]
        else:
            cross, start = cross[rows], start[rows]
        prunable = start.shape[1] - self.block.has_bias
        if start[:, :prunable].numel():
            keep[within] = gradual_mask(gram, cross, start, prunable, inside).flatten()
        return keep

    def _output(self, keeps):
        """H and G of the output Linear, over what its inputs are once the inner Linears with masks are solved."""
        if self.block.kind == "attention":
            gram = self.sums.gram(self.block.output)
            return self._finite(gram, augmented_weight(self.weights, self.block.output).to(gram) @ gram)
        if all(bool(keep.all(dim=1).logical_or(~keep.any(dim=1)).all()) for keep in keeps.values()):
            # Whole neurons are missing at most, and their columns are not used.
            return self._finite(*self.sums.teachers_output)
        intact = {
            name: torch.ones_like(self.weights[f"{name}.weight"], dtype=torch.bool) for name in self.block.linears
        }
        variant = Variant(self.block, self.weights, intact | keeps)
        solved = dict(self.weights)
        for linear in keeps:
            solved |= solve_linear(variant, linear, *self.sums.inner(linear), ridge=RIDGE)
        return self._finite(*self.sums.output(solved))

    def _finite(self, gram, cross):
        if not finite(gram, cross):
            raise UserError(f"{self.block.name}: its activations overflow, so nothing can be told from them; use l1")
        return gram, cross


@in_full_precision
def elimination_order(gram: torch.Tensor, weight: torch.Tensor, count: int, size: int, step: int) -> torch.Tensor:
    """The order (count,) in which groups of inputs go, those first whose removal raises the reconstruction error least.

    Args:
        gram: H, (in, in).
        weight: (out, in), the solution with all inputs.
        count: of groups, one after the other; a bias's input may follow, which stays.
        size: of each, in inputs.
        step: how many groups go at once.
    """
    gram, weight = gram.double(), weight.double()
    damping = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram)).to(gram))
    left, order = torch.arange(count, device=gram.device), []
    while len(left):
        grouped = len(left) * size
        parts = weight[:, :grouped].view(-1, len(left), size).permute(1, 2, 0)  # (groups, size, out)
        blocks = inverse[:grouped, :grouped].reshape(len(left), size, len(left), size)
        diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, size, size)
        rises = (parts * torch.linalg.solve(diagonal, parts)).sum(dim=(1, 2))
        stays = keep_largest(rises, min(step, len(left)))
        order.append(left[~stays][rises[~stays].argsort(stable=True)])
        stay = torch.ones(len(inverse), dtype=torch.bool, device=gram.device)
        stay[:grouped] = stays.repeat_interleave(size)
        # What is left takes over as much as it can: the inverse of the smaller matrix, and its solution.
        taken = torch.linalg.solve(inverse[~stay][:, ~stay], inverse[~stay][:, stay])
        weight = weight[:, stay] - weight[:, ~stay] @ taken
        inverse = inverse[stay][:, stay] - inverse[stay][:, ~stay] @ taken
        left = left[stays]
    return torch.cat(order)


@in_full_precision
def gradual_mask(
    gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor, prunable: int, removed: int
) -> torch.Tensor:
    """Which weights stay, bool (out, prunable), so that those reconstruct best, by ADMM.

    Args:
        gram: H, (in, in); cross: G, (out, in); start: W, (out, in).
        prunable: how many of the inputs have weights that may go; the bias's input, which follows, stays.
        removed: how many of them go.
    """
    # With each input scaled to the same power, a weight's size is what it adds to the output, and one ρ suits all.
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    eye = torch.eye(len(gram)).to(gram)
    start = start * scale
    target = cross / scale + RIDGE * start
    inverse = torch.linalg.inv(gram / scale / scale[:, None] + (RIDGE + 1) * eye)  # of the damped matrix + ρ, ρ = 1
    solved, dual = start, torch.zeros_like(start)
    for turn in range(1, ITERATIONS + 1):
        progress = min(1.0, turn / (0.75 * ITERATIONS))
        sparse = solved + dual
        sizes, gone = sparse[:, :prunable].abs(), round(removed * (1 - (1 - progress) ** 3))
        if turn == ITERATIONS:
            keep = keep_largest(sizes, gone)
        else:  # ties may go together here, and a threshold takes a tenth of the time of a full order
            keep = sizes > (sizes.flatten().kthvalue(gone).values if gone else -1)
        sparse[:, :prunable] *= keep
        dual += solved - sparse
        solved = (target + sparse - dual) @ inverse
    return keep
