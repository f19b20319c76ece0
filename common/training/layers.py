"""How the layers of a whole model run in a training step: as they are, computed again for the gradients, or compiled.

A model's layers are the elements of its outermost ModuleLists, those of its encoder and of its decoder. What they run
by is put into them for one forward pass and taken out of them after it, so that there is nothing of it in a model that
is copied, saved, validated or used otherwise.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from common.runtime.devices import computing
from common.runtime.errors import UserError

BACKEND = "inductor"
# With dropout the same random numbers are drawn as without compiling; the compiler's own would be others.
OPTIONS = {"inductor": {"fallback_random": True}}
# Of one function: all layers have the same one, and each kind of layer is compiled for itself. A compact model has as
# many kinds as layers.
MOST_KINDS = 256


def layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The elements of the outermost ModuleLists in a module, in their order."""
    if isinstance(module, torch.nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers_of(child)]


class Layers:
    """The layers of a model, and what they run by."""

    def __init__(self, model: torch.nn.Module, *, checkpointing: bool = False, compiling: bool = False):
        """
        Args:
            checkpointing: keep of each layer its inputs alone, and compute what is in it again in the backward pass
                (Chen et al., arXiv 1604.06174). The gradients are the same: it is done as it was the first time, with
                the same random numbers where there is dropout. There must be no cache of keys and values, which would
                be added to twice.
            compiling: compile each layer by itself, for any number of examples and tokens. Layers that differ in
                nothing but their weights share what is compiled.
        Raises:
            UserError: nothing can be compiled here.
        """
        self.model, self.layers, self.checkpointing = model, layers_of(model), checkpointing
        self.device = next(model.parameters()).device
        self.forwards = None
        if compiling:
            check_compiler(self.device)
            self.forwards = [compiled(layer.forward) for layer in self.layers]

    @contextlib.contextmanager
    def running(self, precision: str) -> Iterator[None]:
        """While it lasts, the layers run as was asked for.

        Args:
            precision: of the forward pass, see `devices.computing`; the backward pass may come after its end.
        Raises:
            UserError: a layer cannot be compiled.
        """
        if not self.forwards and not self.checkpointing:
            yield
            return
        ways = self.forwards or [layer.forward for layer in self.layers]
        if self.checkpointing:
            again = partial(
                checkpoint,
                use_reentrant=False,
                preserve_rng_state=self.model.training,
                context_fn=lambda: (contextlib.nullcontext(), computing(self.device, precision)),
            )
            ways = [partial(again, way) for way in ways]
        for layer, way in zip(self.layers, ways):
            layer.forward = way
        try:
            yield
        except RuntimeError as error:
            if self.forwards and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise cannot_compile(error) from error
            raise
        finally:
            for layer in self.layers:
                del layer.forward


def compiled(function: Callable) -> Callable:
    """A function that compiles another when it is called, for tensors of any length."""
    return torch.compile(
        function, dynamic=True, backend=BACKEND, options=OPTIONS.get(BACKEND), recompile_limit=MOST_KINDS
    )


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Make sure that something can be compiled for a device.

    Raises:
        UserError: nothing can, for instance because there is no C++ compiler, which PyTorch needs on a CPU.
    """
    example = torch.ones(8, device=device, requires_grad=True)
    try:
        compiled(lambda tensor: tensor.exp().sum())(example).backward()
    except Exception as error:  # whatever it is, it is not of this suite
        raise cannot_compile(error) from error


def cannot_compile(error: Exception) -> UserError:
    told = str(getattr(error, "inner_exception", error))  # the compiler's, which dynamo wraps
    reason = next((line for line in told.splitlines() if line.strip()), type(error).__name__)
    return UserError(f"--compile: cannot be used here, leave it out ({reason})")
