"""Watching and replaying the calls of a model's blocks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.func import functional_call
from torch.nn.functional import linear as apply_linear

from common.blocks.families import family_of
from common.blocks.find import Block
from common.data.examples import Batch
from common.data.tasks import IGNORED


def token_mask(block: Block, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a block's output are real: bool (batch, length). Padding belongs in no loss or statistic."""
    return batch["labels"] != IGNORED if block.side == "decoder" else batch["attention_mask"].bool()


def real_rows(block: Block, batch: Batch, some: torch.Tensor | None = None) -> torch.Tensor:
    """The same as numbers for `data.rows_of`, int64 (tokens,) on the batch's device.

    Args:
        some: positions, on the CPU; of these alone, counted as they stand there.
    """
    mask = token_mask(block, batch.host)
    return batch.numbers(mask if some is None else mask[:, some])


def features(
    model: torch.nn.Module, block: Block, tensors: dict[str, torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """What enters a feed-forward block's output Linear, (…, neurons), for rows (…, d_model) and the block's tensors."""
    outputs = [_apply(tensors, linear, rows) for linear in block.inner]
    return block.between(model.get_submodule(block.root), *outputs)


def _apply(tensors, linear, rows):
    return apply_linear(rows, tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias"))


@dataclass
class BlockCall:
    """One call of a model's block: what went in, what came out, and the means to run it with other tensors.

    `args`, `kwargs`: of an attention block's root module: hidden states, mask, position bias, cross-attention states.
    T5 needs all of them: without its position bias a block silently computes something else.
    `inputs`: {Linear: what entered it, (batch, length, in)}, of an attention block; of a feed-forward block its first
    Linear's alone. `output`: (batch, length, d_model). `probabilities`: of an attention block, (batch, heads, length,
    keys), or None where the attention implementation does not return them.
    """

    model: torch.nn.Module
    block: Block
    inputs: dict[str, torch.Tensor]
    args: tuple = ()
    kwargs: dict | None = None
    output: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None

    def replay(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The block's output (batch, length, d_model) on the very same inputs, with `tensors` for its own."""
        return self.again(tensors).output

    def again(self, tensors: dict[str, torch.Tensor]) -> "BlockCall":
        """The same call of the block with `tensors` for its own."""
        if self.block.kind == "feed_forward":
            rows = features(self.model, self.block, tensors, self.inputs[self.block.inner[0]])
            return replace(self, output=_apply(tensors, self.block.output, rows))
        root, found = self.model.get_submodule(self.block.root), []
        handles = list(_hooks(self.model, self.block, found.append))
        try:
            functional_call(root, tensors, self.args, self.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found[0]


def watch(
    model: torch.nn.Module, blocks: Iterable[Block], batch: dict[str, torch.Tensor], visit: Callable[[BlockCall], None]
) -> None:
    """Run all blocks of a model on a batch; `visit(call)` is called as soon as one of `blocks` has run."""
    handles = [handle for block in blocks for handle in _hooks(model, block, visit)]
    try:
        family_of(model.config).run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model, block, visit):
    """Hooks that note a block's calls: begun at its root or its first Linear, ended when all of it is known."""
    root, first, out = model.get_submodule(block.root), block.inner[0], block.output
    call = None

    def begin(module, args, kwargs):
        nonlocal call
        call = BlockCall(model, block, {}, args, kwargs)

    def note_input(linear):
        def hook(module, args):
            call.inputs.setdefault(linear, args[0])  # the first; DeBERTa's go on to project positions

        return hook

    def note_output(module, args, output):
        call.output = output
        if block.kind == "feed_forward":
            visit(call)

    def end(module, args, output):
        call.probabilities = output[-1]
        visit(call)

    if block.kind == "feed_forward":
        inner = root.get_submodule(first)
        yield inner.register_forward_pre_hook(begin, with_kwargs=True)
        yield inner.register_forward_pre_hook(note_input(first))
        yield root.get_submodule(out).register_forward_hook(note_output)
    else:
        yield root.register_forward_pre_hook(begin, with_kwargs=True)
        for linear in block.linears:
            yield root.get_submodule(linear).register_forward_pre_hook(note_input(linear))
        yield root.get_submodule(out).register_forward_hook(note_output)
        yield root.register_forward_hook(end)


def block_calls(model: torch.nn.Module, blocks: Iterable[Block], batch: dict[str, torch.Tensor]) -> list[BlockCall]:
    """One run of a model on a batch: the calls of some of its blocks, in the order of execution.

    What all of them read and wrote is held at once: of an attention block three tensors (batch, length, d_model), or
    of the inner width, and of a feed-forward block two. That is less than a training step of the model holds.
    """
    calls = []
    watch(model, blocks, batch, calls.append)
    return calls
