"""An attention block's closed-form solution. See `solve` for the problem and its sources."""

import contextlib
from typing import NamedTuple

import torch

from common.data.examples import rows_of
from common.pruning.closed_form.least_squares import (
    at_least_float32,
    at_least_rounding,
    augmented_inputs,
    augmented_mask,
    augmented_weight,
    conjugate_gradients,
    finite,
    solve,
    split_augmented,
)

VALUE_ROUNDS = 1  # how often the value projections are solved
VALUE_WIDTH = 1024  # heads times directions that value projections can move in: bounds the Gram matrix


class AttentionSums(NamedTuple):
    """What an attention block's regressions need of the data: the sum of the products of `attention_rows`."""

    products: torch.Tensor
    basis: torch.Tensor | None  # of the directions in which value projections may move, (d_model, directions)
    cross: torch.Tensor | None = None  # of wanted outputs with those rows, (d_model, rows); None: the original's own

    def gram(self, linear: str) -> torch.Tensor:
        """H (in, in) of the output Linear's inputs in the original; for sums without directions."""
        return self.products


def value_directions(block, d_model):
    """In how many directions each value projection of an attention block may move."""
    return min(d_model, max(1, VALUE_WIDTH // block.heads))


@contextlib.contextmanager
def attention_probabilities(model):
    """While this is open, the model's attention blocks return their probabilities (others than "eager" don't)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_rows(call, positions, real, directions, bases):
    """What an attention block's solution needs of the data: (tokens, heads * width + heads * directions [+ 1]).

    Per token: the teacher's context features; then, for every head, the mean of the value projection's inputs under
    the head's attention, in a basis of a few directions (the principal ones of the first batch); a one for biases.

    Args:
        positions: those to read; `real`: which rows of (batch, positions) are no padding.
        bases: {block: (d_model, directions)}; filled here on the block's first call.
    """
    block = call.block
    values, out = block.values, block.output
    features = at_least_float32(rows_of(call.inputs[out][:, positions], real))  # (tokens, heads * width)
    if not directions:
        return augmented_inputs(features, block.has_bias)
    attended = torch.einsum("bhqk,bkd->bqhd", call.probabilities[:, :, positions], call.inputs[values])
    attended = at_least_float32(rows_of(attended, real))  # (tokens, heads, d_model)
    if block not in bases:
        d_model, flat = attended.shape[-1], attended.flatten(0, 1)
        power = torch.nan_to_num(flat.T @ flat, nan=0, posinf=0, neginf=0)  # eigh refuses what overflowed
        bases[block] = (
            torch.eye(d_model).to(flat)
            if directions == d_model
            else torch.linalg.eigh(power).eigenvectors[:, -directions:]
        )
    return augmented_inputs(torch.cat([features, (attended @ bases[block]).flatten(1)], dim=1), block.has_bias)


def solve_attention(sums, teacher_weights, variant, *, ridge):
    """Solve the out-projection over the kept heads' features, then their value projections, then the former again.

    q and k stay, and with them each head's attention, so the block's output is linear in either projection. A value
    projection moves within the basis: V' = V + D basisᵀ.

    Returns:
        the changed tensors: none where nothing was removed, or where the sums overflowed.
    """
    (gram, basis, cross), (block, tensors, keeps) = sums, variant
    values, out = block.values, block.output
    kept_values = block.by_role(keeps)[2]
    if bool(kept_values.all() & keeps[out].all()) or not finite(gram):
        return {}
    width, directions = tensors[f"{out}.weight"].shape[1] // block.heads, basis.shape[1]
    inner, device = block.heads * width, gram.device
    heads = kept_values.view(block.heads, -1).all(dim=1).nonzero().flatten()  # (kept heads,)
    c = (heads[:, None] * width + torch.arange(width, device=device)).flatten()  # their context features
    z = (inner + heads[:, None] * directions + torch.arange(directions, device=device)).flatten()
    one = torch.arange(len(gram) - 1, len(gram), device=device) if block.has_bias else c[:0]
    if cross is None:
        teacher_rows = torch.cat([torch.arange(inner, device=device), one])
        cross = augmented_weight(teacher_weights, out).to(gram.dtype) @ gram[teacher_rows]
    if not finite(cross):
        return {}
    weights, mask = augmented_weight(tensors, out), augmented_mask(variant, out)
    columns = torch.cat([c, torch.arange(inner, inner + len(one), device=device)])  # of the out-projection
    plain, change = torch.cat([c, one]), None  # of the rows; no change yet
    rounds = VALUE_ROUNDS if len(heads) else 0  # of a block that is left out, the output bias alone is solved
    for turn in range(rounds + 1):
        if change is None:
            feature_gram, feature_cross = gram[plain][:, plain], cross[:, plain]
        else:
            spread = torch.zeros(len(z), len(plain), dtype=gram.dtype, device=device)  # rows' z to features
            spread[:, : len(c)] = torch.block_diag(*change.transpose(1, 2))
            mixed = gram[plain][:, z] @ spread
            feature_gram = gram[plain][:, plain] + mixed + mixed.T + spread.T @ gram[z][:, z] @ spread
            feature_cross = cross[:, plain] + cross[:, z] @ spread
        weights = weights.clone()
        weights[:, columns] = solve(feature_gram, feature_cross, weights[:, columns], mask[:, columns], ridge=ridge)
        if turn < rounds:
            error = cross[:, z] - weights[:, columns].to(gram.dtype) @ gram[plain][:, z]  # (d_model, same as z)
            change = _solve_values(gram[z][:, z], error, weights[:, c].to(gram.dtype), len(heads), ridge)

    if change is None:
        return split_augmented(weights, tensors, out)
    moved = tensors[f"{values}.weight"].clone()
    rows = moved.chunk(block.folds)[-1].view(block.heads, width, -1)  # the values' come last
    rows[heads] += (change @ basis.T).to(moved.dtype)
    return split_augmented(weights, tensors, out) | {f"{values}.weight": moved}


def _solve_values(gram, error, out, heads, ridge, *, tolerance=1e-4, max_iterations=40):
    """The changes D (heads, width, directions) that minimise ‖E − Σ_h Z_h D_hᵀ O_hᵀ‖² + damping ‖D‖².

    Args:
        gram: ZᵀZ, (heads * directions, same); error: EᵀZ, (d_model, heads * directions); out: O, (d_model, heads *
            width), for the kept heads.
    """
    width, directions = out.shape[1] // heads, len(gram) // heads
    pairs = gram.view(heads, directions, heads, directions).permute(0, 2, 1, 3)  # [h, g] = Z_hᵀ Z_g
    products = out.T @ out  # [g, h] = O_gᵀ O_h
    damping = at_least_rounding(ridge, gram.dtype) * products.diagonal().mean() * gram.diagonal().mean()
    products = products.view(heads, width, heads, width).permute(0, 2, 1, 3)
    diagonal = out.square().sum(0).view(heads, width, 1) * gram.diagonal().view(heads, 1, directions) + damping
    target = torch.einsum("ogw,ogr->gwr", out.view(-1, heads, width), error.view(-1, heads, directions))

    def image(change):
        moved = torch.einsum("hwr,hgrs->hgws", change, pairs)
        return torch.einsum("ghvw,hgws->gvs", products, moved) + damping * change

    return conjugate_gradients(
        image,
        target,
        torch.zeros_like(target),
        lambda rest: rest / diagonal,
        lambda a, b: (a * b).sum(),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
