"""Closed-form block-level fine-tuning: masked least squares from statistics of a few teacher passes.

With the mask fixed, the kept weights of a Linear that best reproduce the teacher solve, row by row,

    minimise ‖A W'ᵀ − Y‖² + λ · mean(diag H) · ‖W' − W‖²   over the kept entries of W', with H = AᵀA, G = YᵀA,

where A (tokens, in) are the Linear's inputs in the pruned block, Y (tokens, out) the teacher's outputs and W the
pruned weights. H and G are all that must be kept of the data. A bias is one more column of W over a constant input.

- Attention: q, k and v of the kept heads stay; the out-projection is solved over their context features, which are
  the teacher's own, so one H serves every variant of the block, and G = W H.
- Feed-forward: the inner Linears are solved from the teacher's inputs (one H, again for all variants); then, in a
  second pass, the output Linear on the features that they really produce.

Sources: SparseGPT (arXiv 2301.00774) and optimal weight updates for pruned models by ADMM (arXiv 2401.02938) for the
layer-wise problem; LIAR (arXiv 2407.13331) and CORP (arXiv 2602.05243) for reconstruction after removing heads and
neurons. The rows' supports differ, so all rows are solved at once by preconditioned conjugate gradients (Hestenes
and Stiefel, 1952), masked: one matrix product an iteration. Rows that share one support need one Cholesky instead.
"""

import functools

import torch

from common.architectures import block_tensors, token_mask, watched
from common.data import evaluation_batches


# --- the solver ------------------------------------------------------------------------------------------------

def in_full_precision(function):
    """Run a function without gradients and outside any autocast region.

    Inside one, products of float32 matrices silently run in bfloat16, and a Gram matrix made so ruins the solution.
    """
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)
    return run


@in_full_precision
def solve(gram, cross, start, keep, *, ridge, tolerance=1e-4, max_iterations=200):
    """The kept weights that minimise the reconstruction error (see the module's text).

    Args:
        gram: H, (in, in), symmetric, positive semi-definite.
        cross: G, (out, in).
        start: W, (out, in): where the search starts and what the ridge pulls towards; removed entries are ignored.
        keep: bool (out, in), True = kept.
        ridge: λ, relative to the mean of diag H.
        tolerance: stop once an iteration lowers the objective by less than this fraction of what all have so far.
    Returns:
        W', (out, in), in `start`'s dtype, exactly zero where not kept.
    """
    used = keep.any(dim=0)  # a column that no row keeps (a removed head's) drops out of the problem
    weights = torch.zeros_like(start)
    if not bool(used.any()):
        return weights
    gram, cross, origin, mask = gram[used][:, used], cross[:, used], start[:, used].to(gram), keep[:, used]
    damping = ridge * gram.diagonal().mean()
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    target = cross + damping * origin
    if bool(mask.all()):
        solved = _cholesky_solve(damped, target)
    else:
        solved = None
    if solved is None:
        solved = _conjugate_gradients(damped, target, origin, mask.to(gram.dtype), tolerance, max_iterations)
    weights[:, used] = torch.where(mask, solved, 0).to(start.dtype)
    return weights


def _cholesky_solve(matrix, target):
    """X with X · matrix = target, or None where the matrix is not positive definite to working precision."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    return torch.cholesky_solve(target.T, factor).T


def _conjugate_gradients(matrix, target, start, mask, tolerance, max_iterations):
    """Rows x of the result solve (m·matrix·m) x = m·target for their own masks m; Jacobi-preconditioned."""
    inverse_diagonal = 1 / matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny)
    x = start * mask                                        # (out, in), as all below
    residual = (target - x @ matrix) * mask
    z = residual * inverse_diagonal
    direction = z
    rho = (residual * z).sum(dim=1, keepdim=True)           # (out, 1)
    lowered = 0.0
    for _ in range(max_iterations):
        image = (direction @ matrix) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, rho / curvature, 0)  # a row that is solved has no curvature left
        x = x + step * direction
        residual = residual - step * image
        gain = float((step * rho).sum())                    # by which this iteration lowered twice the objective
        lowered += gain
        if gain <= tolerance * lowered:
            break
        z = residual * inverse_diagonal
        previous, rho = rho, (residual * z).sum(dim=1, keepdim=True)
        direction = z + torch.where(previous > 0, rho / previous, 0) * direction
    return x


# --- statistics ------------------------------------------------------------------------------------------------

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


class Sums:
    """A running sum of matrix products, in float32 at least, on the device where the data are."""

    def __init__(self):
        self.total = None

    def add(self, left, right):
        """Add leftᵀ right, for (tokens, m) and (tokens, n)."""
        left, right = (side if side.dtype == torch.float64 else side.float() for side in (left, right))
        if self.total is None:
            self.total = left.T @ right
        else:
            self.total.addmm_(left.T, right)


def passes(teacher, family, blocks, examples, batch_size, device, talk, label, visit):
    """Run the teacher once over the examples; `visit(block, call, real)` with the mask of the real tokens."""
    for positions in talk.progress(evaluation_batches(examples, batch_size), label):
        batch = examples.batch(positions, device)
        with watched(teacher, blocks, lambda block, call: visit(block, call, token_mask(block, batch))):
            family.run(teacher, batch)


@in_full_precision
def reconstruct(teacher, family, variants, examples, *, ridge, batch_size, device, talk):
    """Solve all variants in two teacher passes.

    Args:
        variants: {(block name, variant): (block, tensors, keeps)}: the pruned weights and masks, on the device.
        examples: the calibration examples.
    Returns:
        {(block name, variant): {"o.weight": …}}: all tensors of the block.
    """
    by_block = {}
    for name, (block, _, _) in variants.items():
        by_block.setdefault(block, []).append(name)
    teacher.eval()  # dropout would blur inputs and targets
    inputs = {block: Sums() for block in by_block}

    def gather_inputs(block, call, real):
        rows = with_ones((call.features if block.kind == "attention" else call.inputs)[real], block.has_bias)
        inputs[block].add(rows, rows)

    passes(teacher, family, list(by_block), examples, batch_size, device, talk, "statistics", gather_inputs)
    solved = {}
    for block, names in by_block.items():
        linears = block.linears[-1:] if block.kind == "attention" else block.linears[:-1]
        gram, own = inputs.pop(block).total, block_tensors(teacher, block)
        crosses = {linear: joined(own, linear) @ gram for linear in linears}
        for name in names:
            _, tensors, keeps = variants[name]
            solved[name] = dict(tensors)
            for linear in linears:
                if bool(keeps[linear].all()):  # nothing removed, and the teacher's own inputs: nothing to mend
                    continue
                matrix = solve(gram, crosses[linear], joined(tensors, linear), kept(keeps[linear], block.has_bias),
                               ridge=ridge)
                solved[name] |= parted(matrix, tensors, linear)

    pruned = [name for name in variants if not all(bool(keep.all()) for keep in variants[name][2].values())]
    inner = {block: [name for name in names if name in pruned] for block, names in by_block.items()
             if block.kind == "feed_forward"}
    grams, crosses = ({name: Sums() for names in inner.values() for name in names} for _ in range(2))

    def gather_features(block, call, real):
        target = call.output[real]
        for name in inner[block]:
            rows = with_ones(call.replay_features(solved[name])[1][real], block.has_bias)
            grams[name].add(rows, rows)
            crosses[name].add(target, rows)

    if inner:
        passes(teacher, family, list(inner), examples, batch_size, device, talk, "features", gather_features)
    for block, names in inner.items():
        for name in names:
            _, tensors, keeps = variants[name]
            linear = block.linears[-1]
            matrix = solve(grams.pop(name).total, crosses.pop(name).total, joined(tensors, linear),
                           kept(keeps[linear], block.has_bias), ridge=ridge)
            solved[name] |= parted(matrix, tensors, linear)
    return solved


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

    def measure(block, call, real):
        target = call.output[real].float()
        power[block] += float(target.pow(2).sum())
        for name in by_block[block]:
            for i, tensors in enumerate(candidates[name]):
                errors[name][i] += float((call.replay(tensors)[real].float() - target).pow(2).sum())

    passes(teacher, family, list(by_block), examples, batch_size, device, talk, "held-out error", measure)
    return {name: [error / power[variants[name][0]] for error in each] for name, each in errors.items()}
