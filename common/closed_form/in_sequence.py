"""Closed-form solutions of one configuration's blocks, each on what the blocks before it really produce.

`reconstruction` solves every block on the teacher's own inputs, so that the solution fits any configuration; in a
composed model the errors of its blocks then add up. Here the blocks are solved one after another, in the order of
execution, in a student that already holds the solutions of those before. Each makes up for the errors so far: where the
residual stream is x in the teacher and x̃ in the student, and the teacher's block adds y, the student's is to add

    y + (x − x̃)

so that the stream after it is the teacher's again (as in K-prune, Park et al., ICLR 2024, arXiv 2308.03449). The
solutions fit this one configuration only.

- Attention: the queries and keys of the kept heads stay, and the attention that they pay is the student's own. Products
  with the target come from the data, since it is no linear function of the features.
- Feed-forward: the inner Linears are solved for what the teacher's give for the same tokens, whole rows included; then
  the output Linear on the features that they really produce.

Teacher and student run up to the block, once for every block: with B blocks, about B whole passes over the calibration
examples. What is held at a time is one block's share of the statistics in `reconstruction`, for feed-forward three
times over, and the student.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from common.batching import evaluation_batches
from common.blocks import (
    Block,
    BlockCall,
    Variant,
    block_calls,
    block_tensors,
    real_rows,
    share_block,
    sharing_copy,
    token_mask,
    watch,
)
from common.closed_form.attention import attention_probabilities, attention_rows, directions, solve_attention
from common.closed_form.feed_forward import Sums, solve_feed_forward
from common.closed_form.least_squares import add_products, whole
from common.closed_form.reconstruction import OVERSAMPLING, sampling
from common.data import Examples, rows_of, to_device
from common.devices import Runtime, in_full_precision
from common.families import family_of
from common.schemes import Pair


@in_full_precision
def reconstruct_in_sequence(
    teacher: torch.nn.Module,
    variants: dict[Pair, Variant],
    examples: Examples,
    runtime: Runtime,
    *,
    ridge: float,
    value_rounds: int = 1,
    oversampling: int = OVERSAMPLING,
) -> dict[Pair, dict[str, torch.Tensor]]:
    """Solve the variants of one configuration, block after block; blocks without a variant stay the teacher's.

    Args:
        variants: the pruned weights and masks, on the device: one variant a block.
        examples: the calibration examples.
        ridge, value_rounds, oversampling: see `reconstruction.reconstruct`.
    Returns:
        {pair: {"o.weight": …}}: all tensors of the block, in the order of execution.
    """
    teacher.eval()  # dropout would blur inputs and targets
    student = sharing_copy(teacher)
    pairs = {variant.block: pair for pair, variant in variants.items()}
    order = [call.block for call in block_calls(teacher, pairs, examples.batch([0], runtime.device))]
    solved = {}
    with attention_probabilities(teacher), attention_probabilities(student):
        for block in runtime.talk.progress(order, "in sequence"):
            pair = pairs[block]
            variant, own = variants[pair], block_tensors(teacher, block)
            samples = gather(teacher, student, block, examples, runtime, oversampling)
            if block.kind == "attention":
                gram, cross, basis = attention_sums(samples, directions(block, own))
                tensors = solve_attention(gram, basis, own, variant, ridge=ridge, rounds=value_rounds, cross=cross)
            else:
                inputs, *wanted = feed_forward_rows(samples)
                sums = Sums(teacher, block, inputs, own, wanted)
                tensors = solve_feed_forward(sums, {pair: variant}, ridge=ridge)[pair]
            solved[pair] = variant.tensors | tensors
            share_block(student, block, solved[pair])
    return solved


# --- statistics ------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A batch's part in a block's regressions: of the tokens at the positions `some` those that are no padding.

    `real`: their numbers among (batch, chosen positions). `target`: what the student's block is to add there, (tokens,
    d_model).
    """

    student: BlockCall
    teacher: BlockCall
    some: torch.Tensor
    real: torch.Tensor
    target: torch.Tensor

    def inputs(self, call: BlockCall) -> torch.Tensor:
        """What one of the two calls' first Linear read there, (tokens, d_model)."""
        return rows_of(call.inputs[call.block.linears[0]][:, self.some], self.real)


def gather(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    block: Block,
    examples: Examples,
    runtime: Runtime,
    oversampling: int,
) -> Iterator[Sample]:
    """Run both models up to a block, batch by batch, at the positions that `reconstruction` reads."""
    own = block_tensors(teacher, block)
    positions_of = sampling(block, own, directions(block, own), examples, oversampling)
    for number, positions in enumerate(evaluation_batches(examples, runtime.batch_size)):
        batch = examples.batch(positions, runtime.device)
        some = positions_of(number, token_mask(block, batch.host).shape[1])
        real, some = real_rows(block, batch, some), to_device(some, runtime.device)
        (right, stream), (call, own_stream) = (run_up_to(block, model, batch) for model in (teacher, student))
        target = rows_of((right.output + stream - own_stream)[:, some], real)
        yield Sample(call, right, some, real, target)


def attention_sums(samples, directions):
    """(H, G, basis): see `solve_attention`."""
    gram, cross, bases = None, 0, {}
    for sample in samples:
        rows = attention_rows(sample.student, sample.some, sample.real, directions, bases)
        gram, cross = add_products(gram, rows), cross + sample.target.to(rows).T @ rows
    (basis,) = bases.values()
    return whole(gram), cross, basis


def feed_forward_rows(samples):
    """(student's inputs, teacher's inputs, target), each (tokens, d_model)."""
    parts = [(sample.inputs(sample.student), sample.inputs(sample.teacher), sample.target) for sample in samples]
    return tuple(torch.cat(each) for each in zip(*parts))


class _Reached(Exception):
    """Ends a run at the block that it was for."""


def run_up_to(block: Block, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[BlockCall, torch.Tensor]:
    """A block's call, and the residual stream that its output is added to, (batch, length, d_model).

    What comes after the block isn't run.
    """
    calls, streams = [], deque(maxlen=1)

    def stop(call):
        calls.append(call)
        raise _Reached

    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    handles = [norm.register_forward_pre_hook(lambda module, args: streams.append(args[0])) for norm in norms]
    try:
        watch(model, [block], batch, stop)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    (call,) = calls
    # Where a block reads what a norm made of the stream, that is the last norm before it.
    return call, streams[-1] if family_of(model.config).pre_norm else call.inputs[block.linears[0]]
