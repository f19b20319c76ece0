"""What goes by reconstruction, against brute force; exact counts; and prune.py's criteria from flags to records."""

import itertools

import numpy as np
import pytest
import torch
from helpers import load_script, read_json
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import reconstruct
from tiny import KINDS, OPTIONS, build_model, examples

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors
from common.composing.configurations import SIZES
from common.composing.scheme import Pair
from common.pruning import reconstruction as selection
from common.pruning.closed_form import statistics
from common.pruning.closed_form.attention import AttentionSums
from common.pruning.closed_form.feed_forward import FeedForwardSums
from common.pruning.prune_block import prune_block
from common.pruning.reconstruction import Reconstruction, elimination_order, gradual_mask
from common.runtime.errors import UserError
from common.training.block_level.teacher import held_out_errors


def problem(seed, tokens, width, rows):
    """Correlated inputs (tokens, width) and a weight (rows, width), float64 arrays."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)), rng.normal(size=(rows, width))


def error_left(inputs, weight, columns):
    """Oracle: the squared error of numpy's best weights on some columns, with the ridge as further equations."""
    damping = selection.RIDGE * np.mean(np.sum(inputs**2, axis=0))
    equations = np.vstack([inputs, np.sqrt(damping) * np.eye(inputs.shape[1])])
    outputs = equations @ weight.T
    if not columns:
        return np.sum(outputs**2)
    best = np.linalg.lstsq(equations[:, columns], outputs, rcond=None)[0]
    return np.sum((equations[:, columns] @ best - outputs) ** 2)


def of_groups(groups, size, bias):
    return [group * size + i for group in groups for i in range(size)] + bias


# --- heads and neurons ---------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 5),
    size=st.integers(1, 3),
    rows=st.integers(1, 4),
    bias=st.booleans(),
)
def test_each_step_removes_what_brute_force_would(seed, count, size, rows, bias):
    inputs, weight = problem(seed, 60, count * size + bias, rows)
    if bias:
        inputs[:, -1] = 1
    constant = [count * size] if bias else []
    order = elimination_order(torch.tensor(inputs.T @ inputs), torch.tensor(weight), count, size, 1).tolist()
    assert sorted(order) == list(range(count))
    left = set(range(count))
    for group in order:
        errors = {each: error_left(inputs, weight, of_groups(sorted(left - {each}), size, constant)) for each in left}
        assert errors[group] <= min(errors.values()) * (1 + 1e-6) + 1e-9  # the best of all, or as good
        left.remove(group)


def test_a_neuron_that_others_can_replace_goes_before_a_smaller_one_that_none_can():
    """By hand: inputs 0 and 1 are the same, input 2 is independent and has a smaller weight. l1 would remove 2."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 500))
    inputs, weight = np.stack([one, one, other], axis=1), np.array([[3.0, 2.0, 1.0]])
    order = elimination_order(torch.tensor(inputs.T @ inputs), torch.tensor(weight), 3, 1, 1)
    assert order[0].item() in (0, 1) and order[1].item() == 2


# --- single weights ------------------------------------------------------------------------------------------------


def error_of_mask(inputs, weight, keep):
    return sum(
        error_left(inputs, weight[row : row + 1], np.flatnonzero(kept).tolist()) for row, kept in enumerate(keep)
    )


def test_gradual_masks_come_close_to_the_best_of_all_masks():
    """Over 30 problems of 2 x 5 weights, of which 4 go: all 210 masks are tried, and l1 is far from them."""
    found, by_size, best = [], [], []
    for seed in range(30):
        inputs, weight = problem(seed, 100, 5, 2)
        gram = inputs.T @ inputs
        keep = gradual_mask(*map(torch.tensor, (gram, weight @ gram, weight)), 5, 4).numpy()
        assert (~keep).sum() == 4
        errors = []
        for gone in itertools.combinations(range(10), 4):
            mask = np.ones(10, dtype=bool)
            mask[list(gone)] = False
            errors.append(error_of_mask(inputs, weight, mask.reshape(2, 5)))
        order = np.argsort(np.abs(weight), axis=None)
        smallest = np.ones(10, dtype=bool)
        smallest[order[:4]] = False
        best.append(min(errors))
        found.append(error_of_mask(inputs, weight, keep) / np.sum((inputs @ weight.T) ** 2))
        by_size.append(error_of_mask(inputs, weight, smallest.reshape(2, 5)) / np.sum((inputs @ weight.T) ** 2))
        best[-1] /= np.sum((inputs @ weight.T) ** 2)
    assert np.mean(best) <= np.mean(found) <= 2 * np.mean(best)
    assert np.mean(found) < 0.5 * np.mean(by_size)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), removed=st.integers(0, 24), bias=st.booleans())
def test_gradual_masks_remove_exactly_as_many_and_never_a_bias(seed, removed, bias):
    inputs, weight = problem(seed, 40, 6 + bias, 4)
    gram = torch.tensor(inputs.T @ inputs)
    weight = torch.tensor(weight)
    keep = gradual_mask(gram, weight @ gram, weight, 6, removed)
    assert keep.shape == (4, 6) and int((~keep).sum()) == removed


# --- blocks ----------------------------------------------------------------------------------------------------------


def criteria_of(model, kind, count=40):
    blocks = find_blocks(model)
    return {
        block.name: Reconstruction(block, block_tensors(model, block), sums)
        for block, sums in statistics(model, list(blocks.values()), examples(kind, count), values=False, **OPTIONS)
    }


def half_of(block, own, linears=True, parts=True):
    sizes = (block.output,) if block.heads else block.linears
    return {
        "heads": block.heads // 2 if parts else 0,
        "neurons": block.neurons // 2 if parts else 0,
        "weights": {name: own[f"{name}.weight"].numel() // 2 for name in sizes} if linears else {},
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["parts", "linears", "both"])
def test_variants_have_the_counts_of_l1_and_leave_less_error(kind, what):
    torch.manual_seed(0)
    model = build_model(kind).eval()
    blocks, by_data = find_blocks(model), criteria_of(model, KINDS[kind])
    l1, chosen = {}, {}
    for name, block in blocks.items():
        own = block_tensors(model, block)
        removed = half_of(block, own, linears=what != "parts", parts=what != "linears")
        l1[name], of_l1 = prune_block(block, own, removed)
        chosen[name], by_rate = prune_block(block, own, removed, dict.fromkeys(SIZES, by_data[name]))
        assert by_rate == of_l1 == removed["weights"]
        out = block.output
        for keeps in (l1[name].keeps, chosen[name].keeps):
            if what == "parts":
                assert int((~keeps[out]).all(dim=0).sum()) == keeps[out].shape[1] // 2
        for tensor, keep in (
            (chosen[name].tensors[f"{linear}.weight"], chosen[name].keeps[linear]) for linear in block.linears
        ):
            assert not bool(tensor[~keep].any())

    errors = []
    for variants in (l1, chosen):
        pairs = {Pair(name, "half"): variant for name, variant in variants.items()}
        solved = reconstruct(model, pairs, examples(KINDS[kind], 40), ridge=1e-3, **OPTIONS)
        found = held_out_errors(
            model, blocks, {p: [t] for p, t in solved.items()}, examples(KINDS[kind], 64, seed=9), **OPTIONS
        )
        errors.append(np.mean([error for (error,) in found.values()]))
    assert errors[1] < errors[0]


def test_sums_that_overflow_are_refused():
    model = build_model("t5").eval()
    block = next(iter(find_blocks(model).values()))
    gram = torch.full((24, 24), torch.inf)
    with pytest.raises(UserError, match="overflow"):
        Reconstruction(block, block_tensors(model, block), AttentionSums(gram, None)).head_scores()
    block = next(block for block in find_blocks(model).values() if block.neurons)
    huge = torch.full((50, block_tensors(model, block)["wi.weight"].shape[1]), 1e30)
    weights = {name: tensor.detach() for name, tensor in block_tensors(model, block).items()}
    criterion = Reconstruction(block, weights, FeedForwardSums(model, block, huge, weights))
    with pytest.raises(UserError, match="overflow"):
        criterion.neuron_scores()


# --- prune.py ---------------------------------------------------------------------------------------------------------


def prune(workshop, chain, output, *flags):
    model = workshop / "model" / "t5"
    return load_script("prune.py").main(
        [*map(str, ("-m", model, "-c", chain / "conf_prune.json", "-o", output, "--quiet", *flags))]
    )


def test_criteria_are_in_the_keys_of_what_they_choose(workshop, chain, tmp_path, capsys):
    data = ("--criterion", "reconstruction", "--calibration", 20)
    assert prune(workshop, chain, tmp_path / "new", *data) == 0
    assert prune(workshop, chain, tmp_path / "heads", *data, "--linear-criterion", "l1") == 0
    new, heads, plain = (
        read_json(path / "record.json")["variants"] for path in (tmp_path / "new", tmp_path / "heads", chain / "pruned")
    )
    assert new.keys() == heads.keys() == plain.keys()
    for name, entry in new.items():
        made_from = entry["made_from"]
        wanted = {"linear": "reconstruction"} | (
            {"attention": "reconstruction"} if made_from["removed"]["heads"] else {}
        )
        assert made_from["criteria"] == wanted and len(made_from["calibration_examples"]) == 64
        assert entry["weights_removed_by_rate"] == plain[name]["weights_removed_by_rate"]
        assert entry["heads_removed"] == plain[name]["heads_removed"]
        if made_from["removed"]["heads"]:
            assert heads[name]["made_from"]["criteria"] == {"attention": "reconstruction", "linear": "l1"}
        else:  # nothing there was chosen by data, so it is the very variant that a plain run makes
            assert heads[name]["key"] == plain[name]["key"] and heads[name]["sha256"] == plain[name]["sha256"]
    assert any(new[name]["sha256"] != plain[name]["sha256"] for name in new)
    assert prune(workshop, chain, tmp_path / "new", *data) == 0
    assert '"pruned": 0' in capsys.readouterr().out.splitlines()[-1]
    assert prune(workshop, chain, tmp_path / "new") == 2  # l1 now: other settings
    assert "other settings" in capsys.readouterr().err
