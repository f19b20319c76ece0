"""The study's own criterion: the smallest magnitudes go first."""

import torch

from common.blocks.find import Block
from common.pruning.masks import keep_largest


class L1:
    """A `criteria.Criterion` that needs no data. Scores are sums in double precision."""

    version = 1

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor], sums=None):
        self.block = block
        self.weights = {linear: tensors[f"{linear}.weight"].detach() for linear in block.linears}
        self.inner = block.by_role(self.weights)

    def head_scores(self) -> torch.Tensor:
        """l1 norm of every head's rows in the three projections together, (heads,)."""
        rows = torch.cat([weight.view(self.block.heads, -1) for weight in self.inner], dim=1)
        return rows.abs().sum(dim=1, dtype=torch.float64)

    def neuron_scores(self) -> torch.Tensor:
        """l1 norm of every neuron's row in the inner Linears and column in the output Linear together, (neurons,)."""
        rows = torch.cat([*self.inner, self.weights[self.block.output].T], dim=1)  # (neurons, d_model * Linears)
        return rows.abs().sum(dim=1, dtype=torch.float64)

    def weight_mask(self, linear: str, removed: int, features: torch.Tensor, keeps: dict) -> torch.Tensor:
        """Weights are ranked over the whole Linear, whatever heads and neurons are removed."""
        return keep_largest(self.weights[linear].abs(), removed)
