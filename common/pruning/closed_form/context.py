"""What a block is to do in a context: among variants of the other blocks, instead of in the original.

What reaches a block there has drifted from what reached it in the original, and its variants are solved on that. The
wanted output is between the original block's answer to these inputs and its answer to the original's, and takes back a
part of what the hidden states have drifted by, so that errors do not add up from block to block.

Sources: QEP (arXiv 2504.09629) for targets that know of the drift; Týr-the-Pruner (arXiv 2503.09657) for inputs that
expect pruned blocks before. A block is solved once, in one typical context, and used in all.
"""

from collections.abc import Iterable, Iterator

import torch

from common.blocks.calls import BlockCall, block_calls
from common.blocks.families import family_of
from common.blocks.find import Block, find_blocks
from common.blocks.tensors import aliasing_copy, block_tensors, set_block

ANSWER = 0.5  # share of the answer to the original's inputs
DRIFT = 0.25  # share of the drift that is taken back


class Context:
    """The original, and a model with variants in its blocks."""

    def __init__(self, original: torch.nn.Module, inside: dict[str, dict[str, torch.Tensor]]):
        """`inside`: {block: tensors of one of its variants}; other blocks are the original's."""
        self.original, self.model = original, aliasing_copy(original).eval()
        self.blocks, self.norm_first = find_blocks(original), family_of(original.config).norm_first
        for name, tensors in inside.items():
            set_block(self.model, self.blocks[name], tensors)

    @torch.no_grad()
    def calls(
        self, blocks: Iterable[Block], batch: dict[str, torch.Tensor]
    ) -> Iterator[tuple[BlockCall, torch.Tensor]]:
        """For some blocks their calls with the original's tensors among the variants, each with the wanted output
        (batch, length, d_model), in the order of execution. Both models run once, and all of their calls are held."""
        every, wanted = self.blocks.values(), set(blocks)
        theirs = {call.block: call for call in block_calls(self.original, every, batch)}
        drifts = {}  # {side: of the hidden states so far}, where nothing normalizes them
        for given in block_calls(self.model, every, batch):
            block = given.block
            first, call = block.inner[0], theirs.pop(block)
            drift = drifts.get(block.side, 0.0) if self.norm_first else call.inputs[first] - given.inputs[first]
            if block in wanted:
                own = given.again(block_tensors(self.original, block))
                yield own, torch.lerp(own.output, call.output, ANSWER) + DRIFT * drift
            drifts[block.side] = drifts.get(block.side, 0.0) + (call.output - given.output)
