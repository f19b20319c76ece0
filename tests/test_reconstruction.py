"""The closed form against numpy's least squares, row by row, and what it may and may not touch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import least_squares, objective, pruned_variants, reconstruct
from tiny import OPTIONS, build_model, examples

from common.blocks.families import family_of
from common.blocks.find import find_blocks
from common.pruning.closed_form import attention
from common.pruning.closed_form import solve as closed_form
from common.pruning.closed_form.least_squares import add_gram, preconditioner, solve, symmetric
from common.pruning.closed_form.solve import sample_positions
from common.training.block_level.teacher import held_out_errors

CPU = torch.device("cpu")


def problem(seed, tokens, width, rows, *, condition=1.0, rate=0.5, shared=False, constant=False):
    """Inputs (tokens, width) with singular values from 1 down to 1/condition, outputs, start and mask."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(tokens, width)) @ np.diag(np.geomspace(1, 1 / condition, width))
    inputs = inputs @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    if constant:
        inputs[:, -1] = 1  # a bias is a weight on a constant input, and always kept
    start = rng.normal(size=(rows, width))
    outputs = inputs @ start.T + 0.1 * rng.normal(size=(tokens, rows))
    keep = np.tile(rng.random(width) >= rate, (rows, 1)) if shared else rng.random((rows, width)) >= rate
    keep[:, -1] |= constant
    keep[0, 0] = True
    return inputs, outputs, start * keep, keep


def solve_with_suite(inputs, outputs, start, keep, ridge, dtype=torch.float64, **stopping):
    A, Y, start = (torch.tensor(matrix, dtype=dtype) for matrix in (inputs, outputs, start))
    stopping = stopping or {"tolerance": 1e-9, "max_iterations": 2000}
    return solve(A.T @ A, Y.T @ A, start, torch.tensor(keep), ridge=ridge, **stopping).double().numpy()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 24),
    rows=st.integers(1, 12),
    rate=st.floats(0, 0.95),
    extra=st.integers(0, 60),
    shared=st.booleans(),
)
def test_solve_equals_numpy_lstsq_whatever_the_shape_and_rate(seed, width, rows, rate, extra, shared):
    case = problem(seed, width + extra, width, rows, rate=rate, shared=shared)
    inputs, outputs, start, keep = case
    expected, damping = least_squares(*case, ridge=1e-3)
    found = solve_with_suite(*case, ridge=1e-3)
    best = objective(inputs, outputs, expected, start, damping, keep)
    assert objective(inputs, outputs, found, start, damping, keep) <= best * (1 + 1e-4) + 1e-9
    assert not found[~keep].any()


def test_solve_in_float32_with_default_settings_is_within_a_percent_of_the_best_improvement():
    inputs, outputs, start, keep = case = problem(1, 600, 64, 32, condition=100.0)
    expected, damping = least_squares(*case, ridge=1e-3)
    A, Y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(outputs, dtype=torch.float32)
    found = solve(A.T @ A, Y.T @ A, torch.tensor(start, dtype=torch.float32), torch.tensor(keep), ridge=1e-3)
    before, after, best = (
        objective(inputs, outputs, weights, start, damping, keep)
        for weights in (start, found.double().numpy(), expected)
    )
    assert before - after >= 0.99 * (before - best)


def test_a_row_that_keeps_nothing_comes_back_as_zeros():
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[1, 2] = True
    found = solve(torch.eye(4), torch.ones(3, 4), torch.ones(3, 4), keep, ridge=0.0)
    assert torch.equal(found, torch.tensor([[0.0] * 4, [0, 0, 1, 0], [0] * 4]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), width=st.integers(1, 40), counts=st.lists(st.integers(0, 20), min_size=1, max_size=3)
)
def test_products_added_by_halves_are_the_gram_matrix(seed, width, counts):
    generator, lower = torch.Generator().manual_seed(seed), None
    parts = [torch.randn(count, width, generator=generator, dtype=torch.float64) for count in counts]
    for rows in parts:
        lower = add_gram(lower, rows)
    rows, gram = torch.cat(parts), symmetric(lower)
    assert torch.equal(gram, gram.T) and torch.allclose(gram, rows.T @ rows, rtol=1e-12, atol=1e-12)


def preconditioned(case, ridge):
    """For each row of a problem: m·H·m over its kept weights, and the preconditioner there, both dense."""
    inputs, _, _, keep = case
    gram = torch.tensor(inputs.T @ inputs)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    mask = torch.tensor(keep).double()
    apply = preconditioner(gram, mask)
    columns = torch.stack([apply(unit * mask) for unit in torch.eye(len(gram)).double()], dim=-1)  # (rows, in, in)
    for row, kept in enumerate(torch.tensor(keep)):
        assert not columns[row][~kept].any()
        yield gram[kept][:, kept], columns[row][kept][:, kept]


def test_preconditioner_is_symmetric_positive_definite_and_better_than_the_diagonal():
    """Of features with a few strong directions, as a Transformer's are: by the condition that is left."""
    rng = np.random.default_rng(0)
    inputs, _, start, keep = problem(0, 600, 96, 8)
    inputs = rng.normal(size=(600, 96)) + 5 * rng.normal(size=(600, 6)) @ rng.normal(size=(6, 96))
    for matrix, inverse in preconditioned((inputs, None, start, keep), ridge=1e-3):
        assert torch.allclose(inverse, inverse.T, atol=1e-9 * float(inverse.abs().max()))
        factor = torch.linalg.cholesky(inverse)  # it has one: positive definite
        scale = matrix.diagonal().rsqrt()
        left = torch.linalg.cond(factor.T @ matrix @ factor)
        assert left < torch.linalg.cond(scale[:, None] * matrix * scale) / 20


def test_weights_of_inputs_that_are_always_zero_stay_without_a_ridge():
    """And the others are solved: the scaling divides by nothing."""
    inputs, outputs, start, keep = problem(3, 200, 40, 6, rate=0.3)
    inputs[:, 5:9] = 0
    found = solve_with_suite(inputs, outputs, start, keep, ridge=0.0)
    for row, kept in enumerate(keep):
        kept = kept & (inputs != 0).any(axis=0)
        expected = np.linalg.lstsq(inputs[:, kept], outputs[:, row], rcond=None)[0]
        assert np.allclose(found[row, kept], expected, atol=1e-5)
    idle = keep & ~(inputs != 0).any(axis=0)
    assert np.allclose(found[idle], start[idle], rtol=1e-12)


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (1, torch.float32), (3, torch.float64)])
def test_hardly_any_data_without_a_ridge_leaves_finite_weights_and_no_higher_error(rank, dtype):
    inputs, outputs, start, keep = problem(4, 200, 128, 6, rate=0.3)
    inputs[rank:] = 0
    found = solve_with_suite(inputs, outputs, start, keep, ridge=0.0, dtype=dtype)
    before, after = (objective(inputs, outputs, weights, start, 0.0, keep) for weights in (start, found))
    assert np.isfinite(found).all() and after <= before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_overflowed_leave_the_pruned_weights(value):
    keep = torch.tensor([[True, False, True]])
    gram, cross, start = torch.eye(3), torch.ones(1, 3), torch.tensor([[2.0, 5.0, 3.0]])
    for broken in (gram, cross):
        broken[0, 0] = value
        assert torch.equal(solve(gram, cross, start, keep, ridge=1e-3), torch.tensor([[2.0, 0.0, 3.0]]))
        broken[0, 0] = 1.0


# --- blocks ----------------------------------------------------------------------------------------------------


def test_a_block_with_nothing_pruned_comes_back_unchanged(setting):
    model, kind = setting
    variants = pruned_variants(model, 0, 0.0)
    solved = reconstruct(model, variants, examples(kind, 64), ridge=1e-3, **OPTIONS)
    for name, (_, tensors, _) in variants.items():
        for key, tensor in tensors.items():
            assert torch.equal(solved[name][key], tensor), (name, key)


def test_removed_weights_stay_zero_and_held_out_error_falls(setting):
    model, kind = setting
    variants = pruned_variants(model, 2, 0.3)
    solved = reconstruct(model, variants, examples(kind, 128), ridge=1e-3, **OPTIONS)
    candidates = {name: [tensors, solved[name]] for name, (_, tensors, _) in variants.items()}
    errors = held_out_errors(model, find_blocks(model), candidates, examples(kind, 64, seed=9), **OPTIONS)
    for name, variant in variants.items():
        for linear, keep in variant.keeps.items():
            assert not solved[name][f"{linear}.weight"][~keep].any(), (name, linear)
        assert errors[name][1] < errors[name][0], name


@pytest.mark.parametrize("value_width", [8, 1024], ids=["a few directions", "all directions"])
def test_a_model_that_overflows_keeps_its_pruned_blocks(value_width, monkeypatch):
    monkeypatch.setattr(attention, "VALUE_WIDTH", value_width)
    model = build_model("t5")
    variants = pruned_variants(model, 2, 0.3)
    name = next(iter(find_blocks(model)))
    with torch.no_grad():
        model.get_parameter(f"{name}.q.weight")[0, 0] = float("nan")
    solved = reconstruct(model, variants, examples("t5", 40), ridge=1e-3, **OPTIONS)
    for pair, (_, tensors, _) in variants.items():
        assert all(torch.equal(solved[pair][key], tensors[key]) for key in tensors if pair[0] == name), pair
        assert all(bool(torch.isfinite(tensor).all()) for tensor in solved[pair].values()), pair


def test_the_out_projection_is_the_least_squares_fit_of_the_kept_heads(setting, monkeypatch):
    """Oracle: numpy's lstsq on the features of the kept heads, gathered by a plain hook in a plain forward pass."""
    model, kind = setting
    variants = pruned_variants(model, 2, 0.0)
    name, (block, tensors, keeps) = next((name, v) for name, v in variants.items() if v[0].kind == "attention")
    data = examples(kind, 40)
    out = block.output
    monkeypatch.setattr(attention, "VALUE_ROUNDS", 0)
    solved = reconstruct(model, {name: variants[name]}, data, ridge=1e-6, **OPTIONS)[name]
    features, outputs = [], []
    linear = model.get_submodule(f"{block.name}.{out}")

    def note(module, args, output):
        features.append(args[0][0])
        outputs.append(output[0])

    handle = linear.register_forward_hook(note)
    with torch.no_grad():
        for i in range(len(data)):
            family_of(model.config).run(model, data.batch([i]))
    handle.remove()
    features, outputs = (torch.cat(rows).double().numpy() for rows in (features, outputs))
    kept = keeps[out].any(dim=0).numpy()
    inputs = features[:, kept]
    if block.has_bias:
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    found = solved[f"{out}.weight"].double().numpy()[:, kept]
    if block.has_bias:
        found = np.hstack([found, solved[f"{out}.bias"].double().numpy()[:, None]])
    best, error = (
        np.sum((inputs @ weights - outputs) ** 2)
        for weights in (np.linalg.lstsq(inputs, outputs, rcond=None)[0], found.T)
    )
    assert error <= best * 1.001 + 1e-6 * np.sum(outputs**2)

    # With the value projections solved as well, the block comes closer than any out-projection alone can.
    monkeypatch.setattr(attention, "VALUE_ROUNDS", 1)
    moved = reconstruct(model, {name: variants[name]}, data, ridge=1e-6, **OPTIONS)[name]
    (nmse,) = held_out_errors(model, find_blocks(model), {name: [moved]}, data, **OPTIONS)[name]
    assert nmse * np.sum(outputs**2) < 0.99 * best


@pytest.mark.parametrize("bytes_allowed", [2**30, 1], ids=["all blocks together", "block by block"])
def test_blocks_within_the_memory_allowed_share_a_pass(monkeypatch, bytes_allowed):
    model, batches = build_model("t5"), 4
    variants, data = pruned_variants(model, 2, 0.3), examples("t5", 32)
    expected = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    monkeypatch.setattr(closed_form, "STATISTICS_BYTES", bytes_allowed)
    runs = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    found = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    assert len(runs) == batches * (1 if bytes_allowed > 1 else len(variants))
    assert all(torch.equal(found[name][key], expected[name][key]) for name in variants for key in expected[name])


def test_a_variant_is_solved_alike_alone_and_among_others(setting, monkeypatch):
    monkeypatch.setattr(closed_form, "OVERSAMPLING", 0.5)
    model, kind = setting
    variants = pruned_variants(model, 2, 0.3)
    data = examples(kind, 200)
    together = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    for name in list(variants)[:2]:
        alone = reconstruct(model, {name: variants[name]}, data, ridge=1e-3, **OPTIONS)
        for key in alone[name]:
            assert torch.equal(alone[name][key], together[name][key]), (name, key)


def test_positions_are_a_random_fraction_but_one_at_least():
    counts = np.zeros(20)
    for seed in range(2000):
        chosen = sample_positions(20, 0.25, str(seed)).tolist()
        assert len(set(chosen)) == 5
        counts[chosen] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.05  # five standard errors of a binomial count
    assert len(sample_positions(7, 0.001, "")) == 1 and sorted(sample_positions(7, 3.0, "").tolist()) == list(range(7))


def test_statistics_leave_autocast_out():
    """Inside an autocast region products run in bfloat16; a Gram matrix made so would ruin the solution."""
    model = build_model("distilbert")
    variants, data = pruned_variants(model, 2, 0.3), examples("distilbert", 32)
    plain = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    assert all(torch.equal(plain[name][key], inside[name][key]) for name in variants for key in plain[name])
