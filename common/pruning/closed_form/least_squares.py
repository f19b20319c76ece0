"""Masked least squares from sums over the data, for all rows of a weight matrix at once.

Every row keeps other entries, so its normal equations are a different part of one Gram matrix. Preconditioned conjugate
gradients (Hestenes and Stiefel, 1952), with the masks inside, need one matrix product an iteration for all rows. Rows
that share one support need a single Cholesky instead.

The preconditioner is a diagonal and the few directions that hold most of the features' power, found by randomized
subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061) and restricted to each row's mask; what it does for
one system is analysed by Frangella, Tropp and Udell (arXiv 2110.02820).
"""

import torch

from common.blocks.tensors import parameter_masks
from common.runtime.devices import in_full_precision

STRIPES = 4  # of a Gram matrix
PRECONDITIONER_RANK = 32  # principal directions


# A bias is a weight on a constant input: "augmented" matrices have it as their last column.


def augmented_inputs(rows, has_bias):
    """Rows (tokens, in), with a column of ones if the Linear has a bias: (tokens, in + 1)."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if has_bias else rows


def augmented_weight(tensors, linear):
    """A Linear's weight (out, in), with its bias as a last column if it has one."""
    weight, bias = tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias")
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def split_augmented(matrix, tensors, linear):
    """The inverse of `augmented_weight`: {"o.weight": …, "o.bias": …}."""
    if f"{linear}.bias" not in tensors:
        return {f"{linear}.weight": matrix}
    return {f"{linear}.weight": matrix[:, :-1].contiguous(), f"{linear}.bias": matrix[:, -1].contiguous()}


def augmented_mask(variant, linear):
    """The mask of a variant's Linear (out, in), with its bias's as a last column if it has one."""
    masks, bias = parameter_masks(variant.block, variant.keeps), f"{linear}.bias"
    mask = masks[f"{linear}.weight"]
    if bias not in variant.tensors:
        return mask
    return torch.cat([mask, masks.get(bias, mask.new_ones(len(mask)))[:, None]], dim=1)


def finite(*matrices):
    """Whether no sum overflowed."""
    return all(bool(torch.isfinite(matrix).all()) for matrix in matrices)


def at_least_float32(rows):
    return rows if rows.dtype == torch.float64 else rows.float()


def at_least_rounding(ridge, dtype):
    """A relative ridge, but no less than rounding errors: in a singular problem, nothing else bounds what they do."""
    return max(ridge, 32 * torch.finfo(dtype).eps)


def add_gram(lower, rows):
    """Add AᵀA of rows A (tokens, in) to the lower triangle of a matrix (in, in), in place; None stands for zeros.

    Four stripes, each up to its diagonal, take five eighths of the multiplications. `symmetric` fills the rest.
    """
    width = rows.shape[1]
    if lower is None:
        lower = rows.new_zeros(width, width)
    stripe = -(-width // STRIPES)
    for start in range(0, width, stripe):
        end = min(start + stripe, width)
        lower[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])
    return lower


def symmetric(lower):
    """The symmetric matrix (in, in) of a lower triangle, in place."""
    return lower.tril_().add_(lower.tril(-1).T)


@in_full_precision
def solve(gram, cross, start, keep, *, ridge, tolerance=3e-4, max_iterations=200):
    """The kept weights that minimise the reconstruction error (see the module's text).

    Args:
        gram: H, (in, in), symmetric, positive semi-definite.
        cross: G, (out, in).
        start: W, (out, in): where the search starts and what the ridge pulls towards; removed entries are ignored.
        keep: bool (out, in), True = kept.
        ridge: λ, relative to the mean of diag H; taken for some rounding errors where it is less than that.
        tolerance: stop once an iteration lowers the objective by less than this fraction of what all have so far.
    Returns:
        W', (out, in), in `start`'s dtype, exactly zero where not kept; W where sums overflowed and say nothing.
    """
    # A column that no row keeps (a removed head's or neuron's) drops out of the problem, and so does a row.
    rows, used = keep.any(dim=1), keep.any(dim=0)
    weights = torch.zeros_like(start)
    if not bool(used.any()):
        return weights
    if not finite(gram, cross):
        return torch.where(keep, start, 0)
    gram, cross, mask = gram[used][:, used], cross[rows][:, used], keep[rows][:, used]
    origin = start[rows][:, used].to(gram)
    damping = at_least_rounding(ridge, gram.dtype) * gram.diagonal().mean()
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    target = cross + damping * origin
    solved = _cholesky_solve(damped, target) if bool(mask.all()) else None
    if solved is None:
        # Rows w of the result solve (m·damped·m) w = m·target for their own masks m.
        ones = mask.to(gram.dtype)
        solved = conjugate_gradients(
            lambda rows: (rows @ damped) * ones,
            target * ones,
            origin * ones,
            preconditioner(damped, ones),
            lambda a, b: (a * b).sum(dim=1, keepdim=True),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
    weights[rows[:, None] & used] = torch.where(mask, solved, 0).to(start.dtype).flatten()
    return weights


def _cholesky_solve(matrix, target):
    """X with X · matrix = target, or None where the matrix is not positive definite to working precision."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    return torch.cholesky_solve(target.T, factor).T


def preconditioner(matrix, mask):
    """An approximate inverse of m·matrix·m for every row m of a mask: a function of (out, in), zero where not kept.

    With its diagonal scaled to ones, the matrix is close to τ·(I + W Wᵀ), W spanning its principal directions. Each
    mask's part of that is inverted by Woodbury's identity, with a matrix of the size of the directions.

    Args:
        matrix: (in, in), symmetric, positive semi-definite.
        mask: of 0 and 1, (out, in), in the matrix's dtype.
    """
    size = len(matrix)
    count = min(PRECONDITIONER_RANK, size // 4)
    diagonal = matrix.diagonal()
    silent = 64 * torch.finfo(matrix.dtype).eps * diagonal.mean()
    scale = torch.where(diagonal > silent, diagonal.rsqrt(), 0)  # weights of inputs that are always zero stay
    scaled = scale[:, None] * matrix * scale
    basis = torch.randn(size, count, generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(2):
        basis = torch.linalg.qr(scaled @ basis).Q
    powers, turn = torch.linalg.eigh(basis.T @ scaled @ basis)
    rest = ((scaled.trace() - powers.sum()) / (size - count)).clamp_min(1e-2)  # τ; less would amplify rounding errors
    spikes = (basis @ turn) * ((powers - rest).clamp_min(0) / rest).sqrt()  # W, (in, directions)
    products = (spikes[:, :, None] * spikes[:, None, :]).flatten(1)
    small = (mask @ products).view(len(mask), count, count) + torch.eye(count).to(matrix)  # I + Wᵀ m W, row by row
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(small))

    def apply(rows):
        rows = rows * scale
        weights = torch.einsum("oij,oj->oi", inverse, rows @ spikes)
        return (rows - (weights @ spikes.T) * mask) * scale

    return apply


def conjugate_gradients(apply, target, start, precondition, inner, *, tolerance, max_iterations):
    """x with apply(x) = target, for a symmetric, positive definite `apply`.

    Args:
        target, start: of one shape, which `apply` keeps.
        precondition: an approximate inverse of `apply`, symmetric and positive definite too.
        inner: the inner product. One that sums over some dimensions only, and keeps them, solves the systems along
            the others side by side, each with steps of its own.
        tolerance: stop once an iteration lowers the objective by less than this fraction of what all have so far.
    """
    x = start
    residual = target - apply(x)
    z = precondition(residual)
    direction = z
    rho = inner(residual, z)
    lowered = 0.0
    for _ in range(max_iterations):
        image = apply(direction)
        curvature = inner(direction, image)
        step = torch.where(curvature > 0, rho / curvature, 0)  # a system that is solved has no curvature left
        x = x + step * direction
        residual = residual - step * image
        gain = float((step * rho).sum())  # by which this iteration lowered twice the objective
        lowered += gain
        if gain <= tolerance * lowered:
            break
        z = precondition(residual)
        previous, rho = rho, inner(residual, z)
        direction = z + torch.where(previous > 0, rho / previous, 0) * direction
    return x
