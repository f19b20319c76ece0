"""The processes that share a run's work, each with its share of the examples or of the blocks.

torchrun or `accelerate launch` starts them. All run the same code on the same data, and meet in the operations below;
the first alone writes. For a run that was started alone all of them do nothing.
"""

import atexit
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from common.runtime import plan
from common.runtime.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many there are.

    `control`: a group for what lies in the CPU's memory, so that the decision of `any`, once a step, waits for no GPU.
    """

    number: int = 0
    count: int = 1
    control: object = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks; in a plan none does."""
        return self.number == 0 and not plan.current()

    def share(self, items: Sequence) -> list:
        """This process's share of some items: every `count`-th."""
        return list(items[self.number :: self.count])

    def agree(self, value, source: int = 0):
        """The value of one process, the first unless `source` says which, in all: any that pickle can take."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value], from_process=source)[0]

    def gather(self, value) -> list:
        """The values of all processes, in all, by number: any that pickle can take, tensors of the CPU too."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any of the processes."""
        counts = torch.tensor(flags, dtype=torch.int64)
        self.add([counts])
        return counts.bool().tolist()

    @torch.no_grad()
    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum each tensor over the processes, in place. The sum is the same, bit for bit, in all of them."""
        for tensor in tensors if self.count > 1 else ():
            distributed.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)

    def spread(self, tensor: torch.Tensor, source: int) -> None:
        """Give a tensor the values that it has in the process `source`, in place."""
        if self.count > 1:
            tensor.copy_(self.agree(tensor.cpu(), source))

    def join_rows(self, rows: dict[int, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, (rows, width), in the order of their numbers, on the device of `like`.

        `rows`: {number: (rows, width)}, this process's share.
        """
        if self.count > 1:
            shares = self.gather({number: share.cpu() for number, share in rows.items()})
            rows = dict(sorted(pair for share in shares for pair in share.items()))
        return torch.cat(list(rows.values())).to(like.device)


def own_number() -> int:
    """This process's number, from 0, before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


ALONE = Processes()


@functools.cache
def join(device: torch.device) -> Processes:
    """Join the processes that this one was started with, each on a device of its own.

    Raises:
        UserError: they cannot be joined; they would be copies that overwrite each other's work.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes != count or not distributed.is_initialized():
        raise UserError(f"{count} processes were started that do not know each other; start them with torchrun")
    atexit.register(distributed.destroy_process_group)
    return Processes(state.process_index, count, distributed.new_group(backend="gloo"))
