"""Closed-form block-level fine-tuning: masked least squares from statistics of one teacher pass.

With the mask fixed, the kept weights of a Linear that best reproduce the teacher solve, row by row,

    minimise ‖A W'ᵀ − Y‖² + λ · mean(diag H) · ‖W' − W‖²   over the kept entries of W', with H = AᵀA, G = YᵀA,

where A (tokens, in) are the Linear's inputs in the pruned block, Y (tokens, out) the teacher's outputs and W the
pruned weights. A bias is one more column of W over a constant input.

- Attention: q and k of the kept heads stay, and so does the attention they pay. The out-projection is solved over
  their context features, which are the teacher's own, so one H serves every variant of the block, and G = W H. The
  block's output is linear in the value projections too, so these are solved next, and the out-projection once more.
- Feed-forward: the inner Linears are solved from the teacher's inputs (one H, again for all variants), then the
  output Linear on the features that they really produce for the same inputs. Where whole neurons are all that is
  missing, these features are the teacher's, and one H serves all variants here too.

A regression is well determined long before every token is in it, so each block uses a random part of the calibration
tokens: about `oversampling` for each unknown of a row. An attention block sums its H as the teacher runs; a
feed-forward block keeps its inputs of those tokens, and solves from them. Bytes held in float32, for attention with
h heads of width w, at most, and for feed-forward with d_ff neurons:

    4 · (h·w + VALUE_WIDTH + 1)²        and        4 · oversampling · d_ff · d_model

Blocks share a teacher pass while together they stay within STATISTICS_BYTES; a model that needs more is done in
several passes. While a block is solved, some three matrices of the size of its H come on top: (h·w + VALUE_WIDTH)²
or d_ff², and for feed-forward its inputs twice over; for the preconditioner, PRECONDITIONER_RANK² numbers a row twice.

Sources: SparseGPT (arXiv 2301.00774) and optimal weight updates for pruned models by ADMM (arXiv 2401.02938) for the
layer-wise problem; LIAR (arXiv 2407.13331) and CORP (arXiv 2602.05243) for reconstruction after removing heads and
neurons. The solver is in `least_squares`.
"""

import random

import torch

from common.architectures import block_tensors, features, token_mask, watched
from common.attention import attention_probabilities, attention_rows, directions, solve_attention
from common.data import FIXED_SEED, evaluation_batches
from common.least_squares import (
    add_products,
    at_least_float32,
    in_full_precision,
    joined,
    kept,
    parted,
    solve,
    whole,
    with_ones,
)
from common.masking import parameter_masks

OVERSAMPLING = 8  # tokens for each unknown of a row
STATISTICS_BYTES = 2**30  # of the blocks that share a teacher pass
CHUNK = 4096  # tokens that go through a feed-forward block at once


# --- the stage -------------------------------------------------------------------------------------------------


@in_full_precision
def reconstruct(
    teacher, family, variants, examples, *, ridge, batch_size, device, talk, value_rounds=1, oversampling=OVERSAMPLING
):
    """Solve all variants, in one teacher pass unless the statistics are too large for the memory allowed.

    Args:
        variants: {(block name, variant): (block, tensors, keeps)}: the pruned weights and masks, on the device.
        examples: the calibration examples.
        value_rounds: how often the value projections are solved, each time followed by the out-projection.
        oversampling: tokens in a regression for each unknown of a row.
    Returns:
        {(block name, variant): {"o.weight": …}}: all tensors of the block.
    """
    solved = {name: dict(tensors) for name, (_, tensors, _) in variants.items()}
    pruned = {}  # {block: [(block name, variant), …]}, without variants that nothing is removed from
    for name, (block, _, keeps) in variants.items():
        if not all(bool(keep.all()) for keep in keeps.values()):
            pruned.setdefault(block, []).append(name)
    own = {block: block_tensors(teacher, block) for block in pruned}
    teacher.eval()  # dropout would blur inputs and targets
    for group in groups(own, oversampling):
        statistics = gather(teacher, family, group, examples, batch_size, device, talk, oversampling)
        for block in group:
            mine = {name: variants[name][1:] for name in pruned[block]}
            if block.kind == "attention":
                gram, basis = statistics.pop(block)
                for name, (tensors, keeps) in mine.items():
                    solved[name] |= solve_attention(
                        block, gram, basis, own[block], tensors, keeps, ridge=ridge, rounds=value_rounds
                    )
            else:
                solved |= solve_feed_forward(teacher, block, statistics.pop(block), own[block], mine, ridge=ridge)
    return solved


def unknowns(block, tensors):
    """The length of a row of a block's largest regression."""
    out = tensors[f"{block.linears[-1]}.weight"].shape[1]
    return out + block.heads * directions(block, tensors) + block.has_bias


def groups(own, oversampling):
    """Blocks that share a teacher pass: lists, in order, each within STATISTICS_BYTES or of one block."""
    lists, room = [], 0
    for block, tensors in own.items():
        size = unknowns(block, tensors)
        needed = (
            4
            * size
            * (size if block.kind == "attention" else oversampling * tensors[f"{block.linears[0]}.weight"].shape[1])
        )
        if needed > room:
            lists.append([])
            room = STATISTICS_BYTES
        lists[-1].append(block)
        room -= needed
    return lists


def passes(teacher, family, blocks, examples, batch_size, device, talk, label, visit):
    """Run the teacher once over the examples; `visit(block, call, real, number)` with the mask of the real tokens and
    the number of the batch."""
    for number, positions in enumerate(talk.progress(evaluation_batches(examples, batch_size), label)):
        batch = examples.batch(positions, device)
        with watched(teacher, blocks, lambda block, call: visit(block, call, token_mask(block, batch), number)):
            family.run(teacher, batch)


def gather(teacher, family, blocks, examples, batch_size, device, talk, oversampling):
    """What the solutions of some blocks need of the data, in one teacher pass.

    Returns:
        {block: (H, basis)} of an attention block, see `attention_rows`; {block: inputs}, (tokens, d_model), of a
        feed-forward block.
    """
    own = {block: block_tensors(teacher, block) for block in blocks}
    tokens = {"encoder": sum(map(len, examples.inputs))}
    if any(block.side == "decoder" for block in blocks):
        tokens["decoder"] = sum(map(len, examples.targets))
    grams, bases, inputs = {}, {}, {block: [] for block in blocks}

    def visit(block, call, real, number):
        some = some_positions(
            real.shape[1],
            oversampling * unknowns(block, own[block]) / tokens[block.side],
            f"{FIXED_SEED}/{number}/{block.name}",
        ).to(device)
        if block.kind == "attention":
            rows = attention_rows(block, call, some, real[:, some], directions(block, own[block]), bases)
            grams[block] = add_products(grams.get(block), rows)
        else:
            inputs[block].append(call.inputs[block.linears[0]][:, some][real[:, some]])

    with attention_probabilities(teacher):
        passes(teacher, family, blocks, examples, batch_size, device, talk, "statistics", visit)
    return {
        block: (whole(grams[block]), bases[block]) if block.kind == "attention" else torch.cat(inputs[block])
        for block in blocks
    }


def some_positions(length, fraction, seed):
    """About `fraction` of the positions 0 … length - 1, at random, but one at least.

    All sequences of a batch are read there. The choice hangs on the seed alone, so that a block's solution does not
    depend on which others are solved with it.
    """
    count = min(length, max(1, round(fraction * length)))
    return torch.tensor(random.Random(seed).sample(range(length), count))


# --- feed-forward ----------------------------------------------------------------------------------------------


def solve_feed_forward(teacher, block, inputs, own, variants, *, ridge):
    """Solve the inner Linears of all variants, then their output Linears on what these then produce.

    Where nothing but whole neurons is missing, the inner rows that are left have the teacher's weights and inputs, and
    nothing to mend. Such variants share the features' sums, and with no other mask on it, the output Linear's rows
    share a support: one Cholesky is the exact solution.

    Args:
        inputs: of the block, (tokens, d_model).
        own: the teacher's tensors.
        variants: {name: (tensors, keeps)}.
    Returns:
        {name: all tensors of the block}.
    """
    *inner, out = block.linears
    rows = at_least_float32(with_ones(inputs, block.has_bias))
    gram = whole(add_products(None, rows))
    chunks = inputs.split(CHUNK)

    def feature_rows(tensors, chunk):
        return at_least_float32(with_ones(features(teacher, block, tensors, chunk), block.has_bias))

    targets = [feature_rows(own, chunk) @ joined(own, out).to(gram).T for chunk in chunks]

    def feature_sums(tensors):
        feature_gram, cross = None, 0
        for chunk, target in zip(chunks, targets):
            rows = feature_rows(tensors, chunk)
            feature_gram, cross = add_products(feature_gram, rows), cross + target.T @ rows
        return whole(feature_gram), cross

    solved, shared = {}, None
    for name, (tensors, keeps) in variants.items():
        masks = parameter_masks(block, keeps)

        def solution(linear, gram, cross):
            return parted(
                solve(gram, cross, joined(tensors, linear), kept(masks, tensors, linear), ridge=ridge), tensors, linear
            )

        if lost_neurons_alone(block, keeps):
            shared = shared or feature_sums(own)
            solved[name] = tensors | solution(out, *shared)
            continue
        new = dict(tensors)
        for linear in inner:
            if not bool(keeps[linear].all()):
                new |= solution(linear, gram, joined(own, linear).to(gram) @ gram)
        solved[name] = new | solution(out, *feature_sums(new))
    return solved


def lost_neurons_alone(block, keeps):
    """Whether each neuron has all its rows in the inner Linears, or none of them and no column in the output Linear."""
    *inner, out = block.linears
    whole = torch.stack([keeps[linear].all(dim=1) for linear in inner]).all(dim=0)  # (neurons,)
    gone = ~torch.stack([*(keeps[linear].any(dim=1) for linear in inner), keeps[out].any(dim=0)]).any(dim=0)
    return bool((whole | gone).all())


# --- held-out error --------------------------------------------------------------------------------------------


@in_full_precision
def held_out_errors(teacher, family, variants, candidates, examples, *, batch_size, device, talk):
    """The error of blocks with given tensors on examples that no solution has seen, in one teacher pass.

    Args:
        variants: as for `reconstruct`.
        candidates: {(block name, variant): [tensors, …]}.
    Returns:
        {(block name, variant): [NMSE, …]}: squared error over real tokens by the teacher's squared output.
    """
    by_block = {}
    for name in candidates:
        by_block.setdefault(variants[name][0], []).append(name)
    errors = {name: [0.0] * len(each) for name, each in candidates.items()}
    power = dict.fromkeys(by_block, 0.0)
    teacher.eval()

    def measure(block, call, real, number):
        target = call.output[real].float()
        power[block] += float(target.pow(2).sum())
        for name in by_block[block]:
            for i, tensors in enumerate(candidates[name]):
                errors[name][i] += float((call.replay(tensors)[real].float() - target).pow(2).sum())

    passes(teacher, family, list(by_block), examples, batch_size, device, talk, "held-out error", measure)
    return {name: [error / power[variants[name][0]] for error in each] for name, each in errors.items()}
