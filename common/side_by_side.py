"""Variants of a block side by side: each operation runs once for several of them, over stacked tensors.

A small block's operations end sooner on a GPU than the next ones are given to it, and its time is that of their number.
torch.func.vmap makes of an operation on one variant's tensors the same one on those of all.
"""

from collections.abc import Callable, Sequence

import torch
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.cli import Talk


class SideBySide:
    """How many variants of a block run side by side at most, and which blocks' variants cannot."""

    def __init__(self, most: int = 1, talk: Talk | None = None):
        """`talk` is told of the first block whose variants cannot."""
        self.most, self.talk = most, talk
        self.can = {}  # {block's name: whether its variants can}

    def groups(self, call, items: Sequence[tuple]) -> list[Sequence[tuple]]:
        """Variants in groups of those that run side by side.

        Args:
            call: the `blocks.BlockCall` that they are to replay, under the precision that surrounds this.
            items: (whatever it belongs to, a variant's tensors).
        """
        several = self.most > 1 and len(items) > 1 and self._can(call, items[0][1])
        size = self.most if several else 1
        return [items[start : start + size] for start in range(0, len(items), size)]

    @torch.no_grad()
    def _can(self, call, tensors):
        """Whether vmap can take the block, tried out once: it refuses what depends on values, for instance."""
        name = call.block.name
        if name not in self.can:
            try:
                outcomes(call, [tensors, tensors], lambda output: output)
                self.can[name] = True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if self.talk and all(self.can.values()):
                    self.talk.say(f"{name}: its variants run one after another, they cannot side by side: {reason}")
                self.can[name] = False
        return self.can[name]


def outcomes(
    call, several: Sequence[dict[str, torch.Tensor]], function: Callable[[torch.Tensor], torch.Tensor]
) -> Sequence[torch.Tensor]:
    """A function of a block's output, for each of several variants; of more than one they run side by side.

    Args:
        call: the `blocks.BlockCall` to replay.
        several: each variant's tensors, by name.
        function: of the output (batch, length, d_model) of one of them.
    """
    if len(several) == 1:
        return [function(call.replay(several[0]))]
    stacked = {name: _stack([tensors[name] for tensors in several]) for name in several[0]}
    device = next(iter(stacked.values())).device.type
    if torch.is_autocast_enabled(device):
        # vmap takes a Linear apart before autocast sees it, and its bias would be added in float32.
        stacked = {name: tensor.to(torch.get_autocast_dtype(device)) for name, tensor in stacked.items()}
    # Fused attention has no rule for vmap on a CPU, and on a GPU one that fails with a mask (PyTorch issue 161310).
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(lambda tensors: function(call.replay(tensors)))(stacked).unbind()


def _stack(tensors):
    """The tensors as one: a copy, which takes a few percent of a step (benchmarks/side_by_side.py).

    The gradient of a product's factor is a transposed matrix here. It is laid out anew as a whole, and each tensor's
    own is a view; else autograd would copy one by one.
    """
    stacked = torch.stack(tensors)
    if stacked.requires_grad:
        stacked.register_hook(torch.Tensor.contiguous)
    return stacked
