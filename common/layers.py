"""How the layers of a whole model run while it is trained: as they are, or so that they hold less memory.

A model's layers are the elements of its outermost ModuleLists, those of its encoder and of its decoder. What they run
by is put into them for one forward pass and taken out of them after it, so that there is nothing of it in a model that
is copied, saved or used otherwise.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from common.devices import computing


def layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The elements of the outermost ModuleLists in a module, in their order."""
    if isinstance(module, torch.nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers_of(child)]


@contextlib.contextmanager
def recomputed(model: torch.nn.Module, precision: str) -> Iterator[None]:
    """While it lasts, layers run so that what is computed in them is computed again in the backward pass, not kept.

    Of each layer only its inputs are kept (Chen et al., arXiv 1604.06174). The gradients are the same: what a layer
    computes again is done as it was the first time, with the same random numbers where there is dropout. There must be
    no cache of keys and values, which would be added to twice.

    Args:
        precision: of the forward pass, see `devices.computing`; the backward pass may come after its end.
    """
    device, layers = next(model.parameters()).device, layers_of(model)
    again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=model.training,
        context_fn=lambda: (contextlib.nullcontext(), computing(device, precision)),
    )
    for layer in layers:
        layer.forward = partial(again, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
