"""One pass of the teacher, the original model, that serves all variants of all blocks.

Each variant is run on the very inputs that its block had, and is compared with the output that it gave.
"""

import torch

from common.blocks.calls import block_calls, real_rows
from common.blocks.find import Block
from common.composing.scheme import Pair, by_block
from common.data.batching import evaluation_batches
from common.data.examples import Examples, rows_of
from common.pruning.closed_form import Context
from common.runtime.devices import Runtime, in_full_precision
from common.runtime.settings import TrainingSettings
from common.training.losses import Loss, forward


class BlockObjective:
    """The loss of block variants, for learners named by their `scheme.Pair`.

    It is the mean squared error over real tokens, divided by the mean square of the teacher's output.
    """

    def __init__(self, teacher: torch.nn.Module, blocks: dict[str, Block], recipe: TrainingSettings):
        self.teacher = teacher.eval().requires_grad_(False)  # dropout would make the targets noisy
        self.blocks, self.recipe = blocks, recipe

    def losses(self, batch, learners, training):
        """A `Loss` for each learner, block by block, from one pass of the teacher; its weight is the squared output."""
        pairs = by_block(learners)
        with forward(batch["labels"].device, self.recipe, training=False):
            calls = block_calls(self.teacher, [self.blocks[name] for name in pairs], batch)
        while calls:
            call = calls.pop(0)  # and let go of it when its variants are done
            real = real_rows(call.block, batch)
            target = _rows(call.output, real)
            power = target.pow(2).sum()
            for pair in pairs[call.block.name]:
                with forward(target.device, self.recipe, training):
                    error = _squared_error(call.replay(learners[pair].parameters), real, target)
                    loss = error / power
                yield Loss(pair, loss, power)


def _rows(output, real):
    """The rows of a block's output that are real tokens, (tokens, d_model), in float32 at least."""
    rows = rows_of(output, real)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _squared_error(output, real, target):
    return (_rows(output, real) - target).pow(2).sum()


@in_full_precision
def held_out_errors(
    teacher: torch.nn.Module,
    blocks: dict[str, Block],
    candidates: dict[Pair, list[dict[str, torch.Tensor]]],
    examples: Examples,
    runtime: Runtime,
    context: Context | None = None,
) -> dict[Pair, list[float]]:
    """The error of blocks with given tensors on examples that no solution has seen, in one teacher pass.

    Args:
        candidates: {pair: [tensors, …]}, on the device.
        context: where the blocks stand; None for the original.
    Returns:
        {pair: [NMSE, …]}: squared error over real tokens, relative to the wanted output's square.
    """
    teacher.eval()
    pairs = by_block(candidates)
    wanted = [blocks[name] for name in pairs]
    rows = {pair: [] for pair in candidates}  # a tensor (candidates + 1,) a batch: squared errors, teacher's square
    order = runtime.processes.share(evaluation_batches(examples, runtime.batch_size))
    for positions in runtime.talk.progress(order, "held-out error", size=examples.tokens_in):
        batch = examples.batch(positions, runtime.device)
        if context is None:
            calls = ((call, call.output) for call in block_calls(teacher, wanted, batch))
        else:
            calls = context.calls(wanted, batch)
        for call, output in calls:
            real = real_rows(call.block, batch)
            target = _rows(output, real)
            power = target.pow(2).sum()
            for pair in pairs[call.block.name]:  # errors are read at the end: nothing waits here
                errors = [_squared_error(call.replay(tensors), real, target) for tensors in candidates[pair]]
                rows[pair].append(torch.stack([*errors, power]))
    for pair, tensors in candidates.items():
        rows[pair] = rows[pair] or [torch.zeros(len(tensors) + 1)]  # of a process without a batch
    sums = {pair: torch.stack(batches).cpu().double().sum(0) for pair, batches in rows.items()}
    runtime.processes.add(list(sums.values()))
    return {pair: (total[:-1] / total[-1]).tolist() for pair, total in sums.items()}
