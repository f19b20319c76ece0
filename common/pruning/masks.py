"""Masks: exact-k masks out of scores, masks of a block's parameters, and keeping removed weights at zero in training.

A mask is a bool tensor named `keep`: True = kept. Exactly k entries are removed, chosen by rank, ties by position
(the earlier goes first), never by a threshold, which would remove more than asked wherever weights tie.
"""

import torch


def keep_largest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """Keep all but the `removed` smallest scores: bool, of the scores' shape; a ValueError if there are fewer.

    Where no scores tie, this is the mask of `torch.nn.utils.prune.l1_unstructured` for scores |W|.
    """
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"cannot remove {removed} of {scores.numel()}")
    order = torch.argsort(scores.flatten(), stable=True)
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:removed]] = False
    return keep.view(scores.shape)


class HeldMasks:
    """Keeps the removed entries of some parameters at exactly zero while they are trained.

    Call `mask_gradients` after the backward pass and before clipping, and `apply` after each optimizer step. The first
    keeps removed entries out of the gradient norm and of the optimizer's moments; the second makes sure, whatever the
    optimizer is, for about a hundredth of a step.
    """

    def __init__(self, parameters, masks):
        """`parameters` and `masks` are {name: tensor} of equal shapes; a parameter without a mask is left free."""
        self.parameters = {n: p for n, p in parameters.items() if n in masks and not bool(masks[n].all())}
        # The bool masks' memory, read as ones and zeros: a quarter of what floats would take.
        self.masks = {n: masks[n].to(p.device).view(torch.uint8) for n, p in self.parameters.items()}

    @torch.no_grad()
    def mask_gradients(self):
        self._mask({name: p.grad for name, p in self.parameters.items() if p.grad is not None})

    @torch.no_grad()
    def apply(self):
        """To the parameters that have a gradient; the others have not been stepped."""
        self._mask({name: p for name, p in self.parameters.items() if p.grad is not None})

    def _mask(self, tensors):
        if tensors:
            torch._foreach_mul_(list(tensors.values()), [self.masks[name] for name in tensors])

    def intact(self):
        """Whether every removed entry is exactly zero."""
        return all(bool((p.detach()[m == 0] == 0).all()) for p, m in zip(self.parameters.values(), self.masks.values()))
