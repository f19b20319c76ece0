"""Closed-form block-level fine-tuning: masked least squares from statistics of one teacher pass.

With the mask fixed, the kept weights of a Linear that best reproduce the teacher solve, row by row,

    minimise ‖A W'ᵀ − Y‖² + λ · mean(diag H) · ‖W' − W‖²   over the kept entries of W', with H = AᵀA, G = YᵀA,

where A (tokens, in) are the Linear's inputs in the pruned block, Y (tokens, out) the teacher's outputs and W the
pruned weights. A bias is one more column of W over a constant input.

- Attention: the out-projection is solved over the kept heads' context features, which are the teacher's, so one H
  serves every variant of the block, and G = W H; then the value projections, and the out-projection once more.
- Feed-forward: the inner Linears are solved from the teacher's inputs, then the output Linear on the features that
  they really produce.

The inputs are the original's own, or those among pruned blocks; see `context`.

Each block uses a random part of the calibration tokens, about OVERSAMPLING for each unknown of a row. Bytes held in
float32, for attention with h heads of width w, at most, and for feed-forward with d_ff neurons:

    4 · (h·w + VALUE_WIDTH + 1)²        and        4 · OVERSAMPLING · d_ff · d_model

While a block is solved, some three matrices of the size of its H come on top, and for feed-forward its inputs twice.

Sources: SparseGPT (arXiv 2301.00774) and optimal weight updates for pruned models by ADMM (arXiv 2401.02938) for the
layer-wise problem; LIAR (arXiv 2407.13331) and CORP (arXiv 2602.05243) for reconstruction after removing heads and
neurons. The solver is in `least_squares`.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from common.blocks.calls import real_rows, token_mask, watch
from common.blocks.find import Block
from common.blocks.tensors import Variant, block_tensors
from common.composing.scheme import Pair
from common.data.batching import evaluation_batches
from common.data.examples import Examples, rows_of, to_device
from common.data.splits import FIXED_SEED
from common.pruning.closed_form.attention import (
    AttentionSums,
    attention_probabilities,
    attention_rows,
    solve_attention,
    value_directions,
)
from common.pruning.closed_form.context import Context
from common.pruning.closed_form.feed_forward import FeedForwardSums, solve_feed_forward
from common.pruning.closed_form.least_squares import add_gram, symmetric
from common.runtime import plan
from common.runtime.devices import Runtime, in_full_precision

VERSION = 2  # part of the key of every output; raise it when results change
OVERSAMPLING = 8  # tokens for each unknown of a row
STATISTICS_BYTES = 2**30  # of the blocks that share a teacher pass
Sums = AttentionSums | FeedForwardSums


@in_full_precision
def reconstruct(
    teacher: torch.nn.Module,
    variants: dict[Pair, Variant],
    examples: Examples,
    runtime: Runtime,
    *,
    ridges: Sequence[float],
    context: Context | None = None,
) -> dict[Pair, list[dict[str, torch.Tensor]]]:
    """Solve all variants. Each process has its share of the calibration examples, and of the blocks to solve.

    Args:
        variants: the pruned weights and masks, on the device.
        ridges: pulls towards the pruned weights, relative to the mean of diag H.
        context: where the blocks stand; None for the original.
    Returns:
        {pair: [{"o.weight": …}, all tensors of the block, for each ridge]}.
    """
    solved = {pair: [dict(variant.tensors) for _ in ridges] for pair, variant in variants.items()}
    pruned = {}  # {block: {pair: variant}}, without variants that nothing is removed from
    for pair, variant in variants.items():
        if not all(bool(keep.all()) for keep in variant.keeps.values()):
            pruned.setdefault(variant.block, {})[pair] = variant
    for block, sums in statistics(teacher, list(pruned), examples, runtime, context=context):
        weights = block_tensors(teacher, block)
        for pair, variant in runtime.talk.progress(list(pruned[block].items()), block.name):
            for number, ridge in enumerate(ridges):
                if block.kind == "attention":
                    solved[pair][number] |= solve_attention(sums, weights, variant, ridge=ridge)
                else:
                    solved[pair][number] |= solve_feed_forward(sums, variant, ridge=ridge)
    processes = runtime.processes
    for number, block in enumerate(pruned if processes.count > 1 else ()):
        for tensors in (tensors for pair in pruned[block] for tensors in solved[pair]):
            for name, tensor in tensors.items():
                tensors[name] = tensor.clone()
                processes.spread(tensors[name], number % processes.count)
    return solved


def too_few(teacher: torch.nn.Module, blocks: Iterable[Block], examples: Examples) -> str | None:
    """What speaks against solving some blocks on so few examples; None where there are enough.

    A classifier reads one vector of each text, so that there should be as many texts as that has entries.
    """
    for block in blocks:
        tokens, wanted = tokens_of(block, examples), OVERSAMPLING * Regression(teacher, block).unknowns
        if tokens < wanted:
            return f"{block.name} has {tokens} calibration tokens, and should have {wanted}"
    width = teacher.config.hidden_size
    if examples.task.name == "classification" and len(examples) < width:
        return f"there are {len(examples)} calibration texts for vectors of {width} entries"
    return None


class Regression:
    """The sizes of a block's largest regression.

    `directions`: in how many each value projection may move, 0 if not at all; `unknowns`: the length of a row; `bytes`.
    """

    def __init__(self, teacher: torch.nn.Module, block: Block, values: bool = True):
        weights = block_tensors(teacher, block)
        d_model = weights[f"{block.inner[0]}.weight"].shape[1]
        self.block = block
        self.directions = value_directions(block, d_model) if values and block.kind == "attention" else 0
        self.unknowns = weights[f"{block.output}.weight"].shape[1] + block.heads * self.directions + block.has_bias
        self.bytes = 4 * self.unknowns * (self.unknowns if block.kind == "attention" else OVERSAMPLING * d_model)

    def positions(self, number: int, length: int, examples: Examples) -> torch.Tensor:
        """Which positions of the `number`-th batch of the examples, of this length, are read."""
        fraction = OVERSAMPLING * self.unknowns / tokens_of(self.block, examples)
        if self.block.kind == "attention" and not self.directions:
            fraction = 1.0  # of the context features alone, the products of all tokens cost little
        return sample_positions(length, fraction, f"{FIXED_SEED}/{number}/{self.block.name}")


def tokens_of(block: Block, examples: Examples) -> int:
    """How many tokens of the examples flow through a block."""
    return sum(map(len, examples.targets if block.side == "decoder" else examples.inputs))


def sample_positions(length: int, fraction: float, seed: str) -> torch.Tensor:
    """About `fraction` of the positions 0 … length - 1, at random, but one at least: int64 (positions,)."""
    count = min(length, max(1, round(fraction * length)))
    return torch.tensor(random.Random(seed).sample(range(length), count))


def statistics(
    teacher: torch.nn.Module,
    blocks: list[Block],
    examples: Examples,
    runtime: Runtime,
    *,
    values: bool = True,
    context: Context | None = None,
    label: str = "solving",
    are_all_needed: bool = False,
) -> Iterator[tuple[Block, Sums]]:
    """Yield (block, sums): what the solutions need of the data, in as few teacher passes as the memory allows.

    Each process has its share of the examples, and is given the sums of all for its share of the blocks.

    Args:
        values: whether value projections are to be solved too.
        context: where the blocks stand; None for the original.
        label: what is done with a block's sums, for the progress.
        are_all_needed: whether a plan cannot do with the sums of some blocks.
    """
    teacher.eval()  # dropout would blur inputs and targets
    processes = runtime.processes
    owner = {block: number % processes.count for number, block in enumerate(blocks)}
    regressions = {block: Regression(teacher, block, values) for block in blocks}
    passes = groups({block: regression.bytes for block, regression in regressions.items()})
    for group in runtime.talk.progress(passes, "passes"):
        gathered = gather(teacher, [regressions[block] for block in group], examples, runtime, context)
        mine = {block: gathered[block] for block in group if owner[block] == processes.number}
        del gathered
        size = None if are_all_needed else lambda block: regressions[block].bytes
        for block in runtime.talk.progress(list(mine), label, size=size):
            yield block, sums_of(teacher, block, mine.pop(block))


@in_full_precision
def sums_of(teacher, block, gathered) -> Sums:
    """Those of a block, from what `gather` has of it."""
    if block.kind == "attention":
        return gathered
    inputs, targets = gathered
    return FeedForwardSums(teacher, block, inputs, block_tensors(teacher, block), targets)


def groups(needed: dict[Block, int]) -> list[list[Block]]:
    """Blocks that share a teacher pass, of {block: bytes}: lists, each within STATISTICS_BYTES or of one block."""
    lists, room = [], 0
    for block, size in needed.items():
        if size > room:
            lists.append([])
            room = STATISTICS_BYTES
        lists[-1].append(block)
        room -= size
    return lists


def blocks_by_pass(teacher: torch.nn.Module, sizes: dict[Block, int]) -> list[list[Block]]:
    """The same where more is held of each block than its statistics; `sizes`: {block: bytes of that}."""
    return groups({block: size + Regression(teacher, block).bytes for block, size in sizes.items()})


@in_full_precision
def gather(
    teacher: torch.nn.Module,
    regressions: list[Regression],
    examples: Examples,
    runtime: Runtime,
    context: Context | None = None,
) -> dict:
    """What the sums of some blocks are made of, in one teacher pass: {block: `AttentionSums`, or of a feed-forward
    block its inputs and wanted outputs of the sampled tokens, (tokens, d_model) each}. See `statistics`."""
    processes, regression_of = runtime.processes, {regression.block: regression for regression in regressions}
    grams, crosses, bases = {}, {}, {}
    inputs, targets = ({block: {} for block in regression_of} for _ in range(2))  # {number of a batch: rows}

    def read(batch, number, call, target=None):
        block = call.block
        positions = regression_of[block].positions(number, token_mask(block, batch.host).shape[1], examples)
        real, positions = real_rows(block, batch, positions), to_device(positions, runtime.device)
        wanted = None if target is None else rows_of(target[:, positions], real)
        if block.kind == "attention":
            rows = attention_rows(call, positions, real, regression_of[block].directions, bases)
            grams[block] = add_gram(grams.get(block), rows)
            if wanted is not None:
                crosses[block] = crosses.get(block, 0) + wanted.to(rows).T @ rows
        else:
            inputs[block][number] = rows_of(call.inputs[block.inner[0]][:, positions], real)
            targets[block][number] = wanted

    def run(batches):
        for number, positions in runtime.talk.progress(
            batches, "statistics", size=lambda batch: examples.tokens_in(batch[1])
        ):
            batch = examples.batch(positions, runtime.device)
            if context is None:
                watch(teacher, regression_of, batch, partial(read, batch, number))
            else:
                for call, target in context.calls(regression_of, batch):
                    read(batch, number, call, target)

    batches = processes.share(list(enumerate(evaluation_batches(examples, runtime.batch_size))))
    with attention_probabilities(context.model if context else teacher):
        if processes.count > 1:  # the bases are those of the first batch, for all
            run(batches[:1] if processes.is_first else [])
            bases = processes.agree({block.name: basis.cpu() for block, basis in bases.items()})
            bases = {block: bases[block.name].to(runtime.device) for block in regression_of if block.name in bases}
        run(batches[1:] if processes.count > 1 and processes.is_first else batches)
    gathered = {}
    for block, regression in regression_of.items():
        like = next(iter(block_tensors(teacher, block).values()))
        if block.kind == "attention":
            size = regression.unknowns
            sums = [grams.pop(block, like.new_zeros(size, size, dtype=torch.float32))]
            if context is not None:
                d_model = block_tensors(teacher, block)[f"{block.output}.weight"].shape[0]
                zeros = like.new_zeros(d_model, size, dtype=torch.float32)
                sums.append(crosses.pop(block, zeros))
            processes.add(sums)
            gathered[block] = AttentionSums(symmetric(sums[0]), bases.get(block), *sums[1:])
        else:
            numbers = [number for number, _ in batches]
            joined = [processes.join_rows(plan.filled(inputs.pop(block), numbers), like)]
            joined.append(
                None if context is None else processes.join_rows(plan.filled(targets.pop(block), numbers), like)
            )
            gathered[block] = joined
    return gathered
