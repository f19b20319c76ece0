"""The study's own criterion: the smallest magnitudes go first."""

import torch

from common.blocks.find import Block
from common.pruning.masks import keep_largest


def head_scores(q, k, v, heads):
    """l1 norm of every head's rows in the three projections together.

    Args:
        q, k, v: weights of shape (heads * head_dim, d_model).
    Returns:
        float64 tensor of shape (heads,). Double precision, so that the ranking does not depend on the order of sums.
    """
    rows = torch.cat([w.detach().view(heads, -1) for w in (q, k, v)], dim=1)  # (heads, 3 * head_dim * d_model)
    return rows.abs().sum(dim=1, dtype=torch.float64)


def neuron_scores(inner, out):
    """l1 norm of every feed-forward neuron: of its row in the inner Linears and its column in the output Linear.

    Args:
        inner: weights of shape (neurons, d_model); out: weight of shape (d_model, neurons).
    Returns:
        float64 tensor of shape (neurons,).
    """
    rows = torch.cat([*(w.detach() for w in inner), out.detach().T], dim=1)  # (neurons, d_model * Linears)
    return rows.abs().sum(dim=1, dtype=torch.float64)


class L1:
    """A `criteria.Criterion` that needs no data."""

    version = 1

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor], sums=None):
        self.block, self.tensors = block, tensors
        self.inner = [tensors[f"{name}.weight"] for name in block.inner]
        self.out = tensors[f"{block.output}.weight"]

    def head_scores(self) -> torch.Tensor:
        return head_scores(*self.inner, self.block.heads)

    def neuron_scores(self) -> torch.Tensor:
        return neuron_scores(self.inner, self.out)

    def weight_mask(self, linear: str, removed: int, features: torch.Tensor, keeps: dict) -> torch.Tensor:
        """Weights are ranked over the whole Linear, whatever heads and neurons are removed."""
        return keep_largest(self.tensors[f"{linear}.weight"].abs(), removed)
