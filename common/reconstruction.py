"""Closed-form block-level fine-tuning: masked least squares from statistics of one teacher pass.

With the mask fixed, the kept weights of a Linear that best reproduce the teacher solve, row by row,

    minimise ‖A W'ᵀ − Y‖² + λ · mean(diag H) · ‖W' − W‖²   over the kept entries of W', with H = AᵀA, G = YᵀA,

where A (tokens, in) are the Linear's inputs in the pruned block, Y (tokens, out) the teacher's outputs and W the
pruned weights. A bias is one more column of W over a constant input.

- Attention: q and k of the kept heads stay, and so does the attention they pay. The out-projection is solved over
  their context features, which are the teacher's own, so one H serves every variant of the block, and G = W H. The
  block's output is linear in the value projections too, so these are solved next, and the out-projection once more.
- Feed-forward: the inner Linears are solved from the teacher's inputs (one H, again for all variants), then the
  output Linear on the features that they really produce for the same inputs.

A regression is well determined long before every token is in it, so each block uses a random part of the calibration
tokens: about `oversampling` for each unknown of a row. An attention block sums its H as the teacher runs; a
feed-forward block keeps its inputs of those tokens, and solves from them. Bytes held in float32, for attention with
h heads of width w, and for feed-forward with d_ff neurons:

    4 · (h·w + VALUE_WIDTH + 1)²        and        4 · oversampling · d_ff · d_model

Blocks share a teacher pass while together they stay within STATISTICS_BYTES; a model that needs more is done in
several passes. While a block is solved, some three matrices of the size of its H come on top: (h·w + VALUE_WIDTH)²
or d_ff².

Sources: SparseGPT (arXiv 2301.00774) and optimal weight updates for pruned models by ADMM (arXiv 2401.02938) for the
layer-wise problem; LIAR (arXiv 2407.13331) and CORP (arXiv 2602.05243) for reconstruction after removing heads and
neurons. The solver is in `least_squares`.
"""

import contextlib
import random

import torch
from torch.func import functional_call

from common.architectures import block_tensors, token_mask, watched
from common.data import FIXED_SEED, evaluation_batches
from common.least_squares import conjugate_gradients, in_full_precision, solve

OVERSAMPLING = 8            # tokens for each unknown of a row
VALUE_WIDTH = 1024          # heads times directions that value projections can move in
STATISTICS_BYTES = 2**30    # of the blocks that share a teacher pass
CHUNK = 4096                # tokens that go through a feed-forward block at once


# --- matrices with their biases --------------------------------------------------------------------------------

def with_ones(rows, has_bias):
    """Rows (tokens, in), with a column of ones if the Linear has a bias: (tokens, in + 1)."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if has_bias else rows


def joined(tensors, linear):
    """A Linear's weight (out, in), with its bias as a last column if it has one."""
    weight, bias = tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias")
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def parted(matrix, tensors, linear):
    """The inverse of `joined`: {"o.weight": …, "o.bias": …}."""
    if f"{linear}.bias" not in tensors:
        return {f"{linear}.weight": matrix}
    return {f"{linear}.weight": matrix[:, :-1].contiguous(), f"{linear}.bias": matrix[:, -1].contiguous()}


def kept(keep, has_bias):
    """A weight's mask (out, in), with a column for the bias, which is always kept."""
    return torch.cat([keep, keep.new_ones(len(keep), 1)], dim=1) if has_bias else keep


def at_least_float32(rows):
    return rows if rows.dtype == torch.float64 else rows.float()


# --- the stage -------------------------------------------------------------------------------------------------

@in_full_precision
def reconstruct(teacher, family, variants, examples, *, ridge, batch_size, device, talk, value_rounds=1,
                oversampling=OVERSAMPLING):
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
                    solved[name] |= solve_attention(block, gram, basis, own[block], tensors, keeps, ridge=ridge,
                                                    rounds=value_rounds)
            else:
                solved |= solve_feed_forward(teacher, block, statistics.pop(block), own[block], mine, ridge=ridge)
    return solved


def unknowns(block, tensors):
    """The length of a row of a block's largest regression."""
    out = tensors[f"{block.linears[-1]}.weight"].shape[1]
    return out + block.heads * directions(block, tensors) + block.has_bias


def directions(block, tensors):
    """In how many directions each of a block's value projections may move (0: it has none)."""
    if block.kind != "attention":
        return 0
    d_model = tensors[f"{block.linears[-2]}.weight"].shape[1]
    return min(d_model, max(1, VALUE_WIDTH // block.heads))


def groups(own, oversampling):
    """Blocks that share a teacher pass: lists, in order, each within STATISTICS_BYTES or of one block."""
    lists, room = [], 0
    for block, tensors in own.items():
        size = unknowns(block, tensors)
        needed = 4 * size * (size if block.kind == "attention" else
                             oversampling * tensors[f"{block.linears[0]}.weight"].shape[1])
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
        some = some_positions(real.shape[1], oversampling * unknowns(block, own[block]) / tokens[block.side],
                              f"{FIXED_SEED}/{number}/{block.name}").to(device)
        if block.kind == "attention":
            rows = attention_rows(block, call, some, real[:, some], directions(block, own[block]), bases)
            if block in grams:
                grams[block].addmm_(rows.T, rows)
            else:
                grams[block] = rows.T @ rows
        else:
            inputs[block].append(call.inputs[block.linears[0]][:, some][real[:, some]])

    with attention_probabilities(teacher):
        passes(teacher, family, blocks, examples, batch_size, device, talk, "statistics", visit)
    return {block: (grams[block], bases[block]) if block.kind == "attention" else torch.cat(inputs[block])
            for block in blocks}


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

    Args:
        inputs: of the block, (tokens, d_model).
        own: the teacher's tensors.
        variants: {name: (tensors, keeps)}.
    Returns:
        {name: all tensors of the block}.
    """
    *inner, out = block.linears
    rows = at_least_float32(with_ones(inputs, block.has_bias))
    gram = rows.T @ rows
    chunks = inputs.split(CHUNK)
    targets = [feed(teacher, block, own, chunk)[1].to(gram) for chunk in chunks]

    def solution(linear, gram, cross, tensors, keeps):
        return parted(solve(gram, cross, joined(tensors, linear), kept(keeps[linear], block.has_bias), ridge=ridge),
                      tensors, linear)

    solved = {}
    for name, (tensors, keeps) in variants.items():
        new = dict(tensors)
        for linear in inner:
            if not bool(keeps[linear].all()):  # else it has the teacher's weights and inputs: nothing to mend
                new |= solution(linear, gram, joined(own, linear).to(gram) @ gram, tensors, keeps)
        feature_gram, cross = 0, 0
        for chunk, target in zip(chunks, targets):
            features = at_least_float32(with_ones(feed(teacher, block, new, chunk)[0], block.has_bias))
            feature_gram, cross = feature_gram + features.T @ features, cross + target.T @ features
        solved[name] = new | solution(out, feature_gram, cross, tensors, keeps)
    return solved


def feed(teacher, block, tensors, rows):
    """Run a feed-forward block with `tensors` for its own on rows (tokens, d_model).

    Returns:
        what enters its output Linear, (tokens, d_ff), and its output, (tokens, d_model).
    """
    calls = []
    with watched(teacher, [block], lambda block, call: calls.append(call)):
        functional_call(teacher.get_submodule(block.name), tensors, (rows[None],))
    return calls[0].inputs[block.linears[-1]][0], calls[0].output[0]


# --- attention -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def attention_probabilities(model):
    """While this is open, the model's attention blocks return their probabilities (others than "eager" don't)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_rows(block, call, some, real, directions, bases):
    """What an attention block's solution needs of the data: (tokens, heads * width + heads * directions [+ 1]).

    Per token: the teacher's context features; then, for every head, the mean of the value projection's inputs under
    the head's attention, in a basis of a few directions; and a one if there are biases. Where the basis has fewer
    directions than the model, it holds the principal ones of the first batch.

    Args:
        some: the positions to read; `real`: which tokens there are no padding, (batch, positions).
        bases: {block: (d_model, directions)}; filled here on the block's first call.
    """
    *_, values, out = block.linears
    attended = torch.einsum("bhqk,bkd->bqhd", call.probabilities[:, :, some], call.inputs[values])[real]
    attended = at_least_float32(attended)                                                 # (tokens, heads, d_model)
    if block not in bases:
        d_model, flat = attended.shape[-1], attended.flatten(0, 1)
        bases[block] = (torch.eye(d_model).to(flat) if directions == d_model
                        else torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -directions:])
    features = call.inputs[out][:, some][real].to(attended)                               # (tokens, heads * width)
    return with_ones(torch.cat([features, (attended @ bases[block]).flatten(1)], dim=1), block.has_bias)


def solve_attention(block, gram, basis, own, tensors, keeps, *, ridge, rounds):
    """Solve the out-projection over the kept heads' features, then their value projections, then the former again.

    q and k stay, and with them each head's attention, so the block's output is linear in either projection. A value
    projection moves within the basis: V' = V + D basisᵀ.

    Args:
        gram: sum of the products of `attention_rows`.
        own: the teacher's tensors; `tensors`, `keeps`: the variant's.
        rounds: how often the value projections are solved.
    Returns:
        the changed tensors.
    """
    *qkv, out = block.linears
    values = qkv[-1]
    if bool(keeps[values].all()) and bool(keeps[out].all()):
        return {}
    width, directions = tensors[f"{values}.weight"].shape[0] // block.heads, basis.shape[1]
    inner, device = block.heads * width, gram.device
    heads = keeps[values].view(block.heads, -1).all(dim=1).nonzero().flatten()            # (kept heads,)
    c = (heads[:, None] * width + torch.arange(width, device=device)).flatten()           # their context features
    z = (inner + heads[:, None] * directions + torch.arange(directions, device=device)).flatten()
    one = torch.arange(len(gram) - 1, len(gram), device=device) if block.has_bias else c[:0]
    teacher_rows = torch.cat([torch.arange(inner, device=device), one])
    cross = joined(own, out).to(gram.dtype) @ gram[teacher_rows]                          # teacher's output by rows
    weights, mask = joined(tensors, out), kept(keeps[out], block.has_bias)
    columns = torch.cat([c, torch.arange(inner, inner + len(one), device=device)])        # of the out-projection
    plain, change = torch.cat([c, one]), None                                             # of the rows; no change yet

    for turn in range(rounds + 1):
        if change is None:
            feature_gram, feature_cross = gram[plain][:, plain], cross[:, plain]
        else:
            spread = torch.zeros(len(z), len(plain), dtype=gram.dtype, device=device)     # rows' z to features
            spread[:, :len(c)] = torch.block_diag(*change.transpose(1, 2))
            mixed = gram[plain][:, z] @ spread
            feature_gram = gram[plain][:, plain] + mixed + mixed.T + spread.T @ gram[z][:, z] @ spread
            feature_cross = cross[:, plain] + cross[:, z] @ spread
        weights = weights.clone()
        weights[:, columns] = solve(feature_gram, feature_cross, weights[:, columns], mask[:, columns], ridge=ridge)
        if turn < rounds:
            error = cross[:, z] - weights[:, columns].to(gram.dtype) @ gram[plain][:, z]  # (d_model, same as z)
            change = _solve_values(gram[z][:, z], error, weights[:, c].to(gram.dtype), len(heads), ridge)

    if change is None:
        return parted(weights, tensors, out)
    moved = tensors[f"{values}.weight"].clone()
    moved.view(block.heads, width, -1)[heads] += (change @ basis.T).to(moved.dtype)
    return parted(weights, tensors, out) | {f"{values}.weight": moved}


def _solve_values(gram, error, out, heads, ridge, *, tolerance=1e-4, max_iterations=40):
    """The changes D_h that minimise ‖E − Σ_h Z_h D_hᵀ O_hᵀ‖² + damping ‖D‖², by conjugate gradients.

    Args:
        gram: ZᵀZ, (heads * directions, same); error: EᵀZ, (d_model, heads * directions); out: O, (d_model, heads *
            width), for the kept heads.
    Returns:
        D: (heads, width, directions).
    """
    width, directions = out.shape[1] // heads, len(gram) // heads
    pairs = gram.view(heads, directions, heads, directions).permute(0, 2, 1, 3)           # [h, g] = Z_hᵀ Z_g
    products = out.T @ out                                                                # [g, h] = O_gᵀ O_h
    damping = ridge * products.diagonal().mean() * gram.diagonal().mean()
    products = products.view(heads, width, heads, width).permute(0, 2, 1, 3)
    diagonal = (out.square().sum(0).view(heads, width, 1) * gram.diagonal().view(heads, 1, directions) + damping)
    target = torch.einsum("ogw,ogr->gwr", out.view(-1, heads, width), error.view(-1, heads, directions))

    def image(change):
        moved = torch.einsum("hwr,hgrs->hgws", change, pairs)
        return torch.einsum("ghvw,hgws->gvs", products, moved) + damping * change

    return conjugate_gradients(image, target, torch.zeros_like(target), diagonal, lambda a, b: (a * b).sum(),
                                tolerance=tolerance, max_iterations=max_iterations)


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
