"""Feed-forward neurons as whole parts: which go, what the closed form then solves, and what the scripts say and keep.

The tiny models' feed-forward modules have 48 neurons and d_model 32. Which neurons go is always asked of
torch.nn.utils.prune, on the matrix [wi | woᵀ] whose rows are the neurons.
"""

import contextlib
import functools
import io
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    OPTIONS,
    build_model,
    edited_json,
    examples,
    is_one_line,
    least_squares,
    load_script,
    objective,
    only_removed_is_zero,
    outcome,
    run,
    torch_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from common.blocks import Block, Variant, block_tensors, find_blocks
from common.closed_form.feed_forward import lost_neurons_alone
from common.closed_form.reconstruction import reconstruct
from common.families import family_of
from common.masks import parameter_masks
from common.models import load_model
from common.prune_block import prune_block
from common.scheme import Pair
from common.teacher import held_out_errors

T5_FF = [
    *(f"encoder.block.{i}.layer.1.DenseReluDense" for i in range(2)),
    *(f"decoder.block.{i}.layer.2.DenseReluDense" for i in range(2)),
]
DISTILBERT_FF = [f"distilbert.transformer.layer.{i}.ffn" for i in range(2)]
FEED_FORWARD = {"t5": T5_FF, "t5-gated": T5_FF, "distilbert": DISTILBERT_FF}
LINEARS = {"t5": ("wi", "wo"), "distilbert": ("lin1", "lin2")}
NEURONS, WEIGHTS = 48, 48 * 32


@functools.cache
def a_block(kind):
    """The first feed-forward block of a tiny model, and the shapes of its tensors."""
    model = build_model(kind)
    block = find_blocks(model)[FEED_FORWARD[kind][0]]
    return block, {name: tensor.shape for name, tensor in block_tensors(model, block).items()}


def block_with_weights(kind, seed):
    """(block, its tensors: normally distributed weights and biases)."""
    block, shapes = a_block(kind)
    generator = torch.Generator().manual_seed(seed)
    return block, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kept_by_torch(block, tensors, removed):
    """Oracle: the neurons that ln_structured keeps of the rows of [wi | woᵀ], bool (neurons,)."""
    inner, out = block.inner, block.output
    matrix = torch.cat(
        [*(tensors[f"{name}.weight"].detach() for name in inner), tensors[f"{out}.weight"].detach().T], dim=1
    ).double()
    return torch_mask(prune.ln_structured, matrix, amount=removed, n=1, dim=0)[:, 0]


# --- which neurons go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEED_FORWARD)
@settings(max_examples=15, deadline=None)
@given(removed=st.integers(1, NEURONS - 1), seed=st.integers(0, 2**16))
def test_the_neurons_that_go_are_those_of_torch_ln_structured(kind, removed, seed):
    """They lose their rows, their biases and their columns; nothing else changes."""
    block, tensors = block_with_weights(kind, seed)
    (_, pruned, keeps), by_rate = prune_block(block, tensors, {"heads": 0, "neurons": removed, "weights": {}})
    kept, out = kept_by_torch(block, tensors, removed), block.output
    assert int((~kept).sum()) == removed and by_rate == {}
    masks = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
    for name, mask in masks.items():
        if name == f"{out}.weight":
            mask[:, ~kept] = False
        elif name != f"{out}.bias":
            mask[~kept] = False  # rows of the inner weights, entries of their biases
        assert torch.equal(pruned[name], torch.where(mask, tensors[name], 0.0)), name
        assert not pruned[name][~mask].view(torch.int32).any(), name  # not even -0
    assert {f"{linear}.weight" for linear in keeps} == {name for name in masks if name.endswith("weight")}
    found = parameter_masks(block, keeps)
    assert found.keys() == masks.keys() - {f"{out}.bias"}  # which is free
    assert all(torch.equal(found[name], masks[name]) for name in found)


@pytest.mark.parametrize("kind", FEED_FORWARD)
@settings(max_examples=10, deadline=None)
@given(
    removed=st.integers(1, NEURONS - 1), seed=st.integers(0, 2**16), counts=st.tuples(*[st.integers(0, WEIGHTS)] * 3)
)
def test_each_linear_is_ranked_as_a_whole_and_the_neurons_go_on_top(kind, removed, seed, counts):
    """Oracle: torch's l1_unstructured on each weight, the neurons' own included, and ln_structured."""
    block, tensors = block_with_weights(kind, seed)
    counts = dict(zip(block.linears, counts))
    (_, pruned, keeps), by_rate = prune_block(block, tensors, {"heads": 0, "neurons": removed, "weights": counts})
    kept, out = kept_by_torch(block, tensors, removed), block.output
    assert by_rate == counts
    masks = parameter_masks(block, keeps)
    for linear, count in counts.items():
        expected = torch_mask(prune.l1_unstructured, tensors[f"{linear}.weight"], amount=count)
        expected &= kept[None, :] if linear == out else kept[:, None]
        assert torch.equal(keeps[linear], expected) and torch.equal(masks[f"{linear}.weight"], expected), linear
        assert torch.equal(pruned[f"{linear}.weight"], torch.where(expected, tensors[f"{linear}.weight"], 0.0)), linear
    if block.has_bias:
        assert not masks["lin1.bias"][~kept].any() and not pruned["lin1.bias"][~kept].any()
        assert torch.equal(pruned["lin2.bias"], tensors["lin2.bias"])


@pytest.mark.parametrize("kind", FEED_FORWARD)
@pytest.mark.parametrize(
    "removed", [{"heads": 0, "weights": {}}, {"heads": 0, "neurons": 0, "weights": {}}], ids=["not named", "none"]
)
def test_without_neurons_to_remove_nothing_goes(kind, removed):
    block, tensors = block_with_weights(kind, 0)
    (_, pruned, keeps), _ = prune_block(block, tensors, removed)
    assert all(bool(keep.all()) for keep in keeps.values())
    assert all(bool(mask.all()) for mask in parameter_masks(block, keeps).values())
    assert all(torch.equal(pruned[name], tensor) for name, tensor in tensors.items())


def test_a_bias_goes_with_all_of_its_neurons_weights_and_not_before():
    """By hand, for 4 neurons: whole; without its row; without its column; without both."""
    block = Block("ff", "ff", "feed_forward", ("lin1", "lin2"), heads=0, neurons=4, side="encoder", has_bias=True)
    rows, columns = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    masks = parameter_masks(block, {"lin1": rows[:, None].repeat(1, 2), "lin2": columns[None, :].repeat(2, 1)})
    assert masks["lin1.bias"].tolist() == [True, True, True, False]
    assert masks.keys() == {"lin1.weight", "lin2.weight", "lin1.bias"}


# --- lost_neurons_alone ------------------------------------------------------------------------------------------

YES, NO = [1, 1], [0, 0]  # all and none of a neuron's two weights


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        ([[YES, YES, YES]], [YES, YES, YES], True),  # nothing is missing
        ([[YES, NO, YES]], [YES, NO, YES], True),  # a whole neuron is
        ([[NO, NO, NO]], [NO, NO, NO], True),  # all of them are
        ([[YES, NO, YES]], [[1, 0], NO, YES], True),  # and a weight of wo, which is solved anyway
        ([[YES, YES, YES]], [YES, NO, YES], True),  # an unread neuron, with nothing to solve in wi
        ([[YES, [1, 0], YES]], [YES, YES, YES], False),  # a single weight of wi
        ([[YES, [1, 0], YES]], [YES, NO, YES], False),  # the same, where wo does not read it
        ([[YES, NO, YES]], [YES, YES, YES], False),  # an empty row of wi that wo still reads
        ([[YES, NO, YES]], [YES, [0, 1], YES], False),  # or reads in part
        ([[YES, NO, YES], [YES, NO, YES]], [YES, NO, YES], True),  # gated: a whole neuron
        ([[YES, YES, YES], [YES, NO, YES]], [YES, NO, YES], False),  # gated: only one of its rows
        ([[YES, YES, YES], [YES, [0, 1], YES]], [YES, YES, YES], False),
        ([[YES, YES, YES], [YES, YES, YES]], [YES, [0, 1], NO], True),
    ],
)
def test_whether_whole_neurons_are_all_that_is_missing(rows, columns, expected):
    """By hand, for 3 neurons and d_model 2: the rows of each inner Linear, and the columns of the output Linear."""
    inner = ("wi",) if len(rows) == 1 else ("wi_0", "wi_1")
    block = Block("ff", "ff", "feed_forward", (*inner, "wo"), heads=0, neurons=3, side="encoder", has_bias=False)
    keeps = {name: torch.tensor(each).bool() for name, each in zip(inner, rows)}  # (3, 2)
    keeps["wo"] = torch.tensor(columns).bool().T  # (2, 3)
    assert lost_neurons_alone(block, keeps) is expected


# --- the closed form -----------------------------------------------------------------------------------------------

ALL_TOKENS = OPTIONS | {"oversampling": 1e9}
MIXTURES = {
    "neurons": (24, {}),
    "more neurons": (40, {}),
    "and output weights": (24, {"out": 0.3}),
    "and inner weights": (24, {"inner": 0.3}),
    "and both": (12, {"inner": 0.5, "out": 0.5}),
    "no neurons": (0, {"inner": 0.3, "out": 0.3}),
}


def variants_of(model, kind, mixtures=MIXTURES):
    """{(block, mixture): (block, tensors, keeps)} of the first and the last feed-forward block."""
    blocks, variants = find_blocks(model), {}
    for name in (FEED_FORWARD[kind][0], FEED_FORWARD[kind][-1]):
        block = blocks[name]
        tensors = {key: value.detach() for key, value in block_tensors(model, block).items()}
        for mixture in mixtures:
            neurons, rates = MIXTURES[mixture]
            weights = {
                linear: round(rates.get("out" if linear == block.output else "inner", 0) * WEIGHTS)
                for linear in block.linears
            }
            (_, pruned, keeps), _ = prune_block(block, tensors, {"heads": 0, "neurons": neurons, "weights": weights})
            variants[Pair(name, mixture)] = Variant(block, pruned, keeps)
    return variants


@torch.no_grad()
def features_and_outputs(model, data, linear):
    """What goes into a Linear and what comes out, float64 (tokens, …): example by example, so nothing is padded."""
    seen = []
    handle = model.get_submodule(linear).register_forward_hook(
        lambda module, args, output: seen.append((args[0][0], output[0]))
    )
    for i in range(len(data)):
        family_of(model.config).run(model, data.batch([i]))
    handle.remove()
    return [torch.cat(rows).double().numpy() for rows in zip(*seen)]


def regression(block, tensors, keeps, features):
    """The output Linear's problem, its bias a weight on a constant input: (inputs, pruned weights, kept entries)."""
    out = block.output
    start, keep = tensors[f"{out}.weight"].double().numpy(), keeps[out].numpy()
    if not block.has_bias:
        return features, start, keep
    return (
        np.hstack([features, np.ones((len(features), 1))]),
        np.hstack([start, tensors[f"{out}.bias"].double().numpy()[:, None]]),
        np.hstack([keep, np.ones((len(keep), 1), dtype=bool)]),
    )


@pytest.mark.parametrize("mixture, ridge", [("neurons", 1e-3), ("more neurons", 1.0)])
def test_the_output_linear_is_numpys_least_squares_over_the_kept_neurons(setting, mixture, ridge):
    """Row by row, T5's without a bias and DistilBERT's with one. Oracle for the features: a plain forward pass.

    In float64, since float32's sums alone move the objective of a row that fits to 1e-6 of its power by 1e-4.
    """
    model, kind = setting
    model.double()
    data, variants = examples(kind, 40), variants_of(model, kind, [mixture])
    solved = reconstruct(model, variants, data, ridge=ridge, **ALL_TOKENS)
    for pair, (block, tensors, keeps) in variants.items():
        features, outputs = features_and_outputs(model, data, f"{block.name}.{block.output}")
        inputs, start, keep = regression(block, tensors, keeps, features)
        expected, damping = least_squares(inputs, outputs, start, keep, ridge)
        _, found, _ = regression(block, solved[pair], keeps, features)
        assert not found[~keep].any(), pair
        for row in range(len(found)):
            best, reached = (
                objective(inputs, outputs[:, [row]], weights[[row]], start[[row]], damping, keep[[row]])
                for weights in (expected, found)
            )
            assert abs(reached - best) <= 1e-6 * best, (pair, row)
        assert not np.allclose(found, start, rtol=1e-2), pair  # there was something to solve


def test_with_output_weights_removed_too_it_comes_close_to_numpys(setting):
    """Each row has a support of its own then, and the iterations stop early: within a percent of what can be gained."""
    model, kind = setting
    ridge, data, variants = 1e-3, examples(kind, 40), variants_of(model, kind, ["and output weights"])
    solved = reconstruct(model, variants, data, ridge=ridge, **ALL_TOKENS)
    for pair, (block, tensors, keeps) in variants.items():
        features, outputs = features_and_outputs(model, data, f"{block.name}.{block.output}")
        inputs, start, keep = regression(block, tensors, keeps, features)
        expected, damping = least_squares(inputs, outputs, start, keep, ridge)
        _, found, _ = regression(block, solved[pair], keeps, features)
        before, best, reached = (
            objective(inputs, outputs, weights, start, damping, keep) for weights in (start, expected, found)
        )
        assert before - reached >= 0.99 * (before - best) > 0, pair


@pytest.mark.parametrize("mixture", ["neurons", "and output weights"])
def test_the_inner_rows_are_the_teachers_bit_by_bit(setting, mixture):
    model, kind = setting
    variants = variants_of(model, kind, [mixture])
    solved = reconstruct(model, variants, examples(kind, 40), ridge=1e-3, **OPTIONS)
    for pair, (block, _, _) in variants.items():
        own = block_tensors(model, block)
        kept = kept_by_torch(block, own, 24)
        for name in own:
            if name.partition(".")[0] != block.output:
                assert torch.equal(solved[pair][name][kept], own[name][kept]), (pair, name)
                assert not solved[pair][name][~kept].any(), (pair, name)


def test_what_was_removed_stays_zero_biases_of_neurons_too(setting):
    """Oracle: the neurons of ln_structured, and the masks. Everything else is at work."""
    model, kind = setting
    variants = variants_of(model, kind)
    solved = reconstruct(model, variants, examples(kind, 64), ridge=1e-3, **OPTIONS)
    for pair, (block, tensors, keeps) in variants.items():
        kept, out = kept_by_torch(block, block_tensors(model, block), MIXTURES[pair[1]][0]), block.output
        assert solved[pair].keys() == tensors.keys()
        for linear, keep in keeps.items():
            assert only_removed_is_zero(solved[pair][f"{linear}.weight"], keep), (pair, linear)
            assert not (keep if linear != out else keep.T)[~kept].any(), (pair, linear)
        if block.has_bias:
            assert only_removed_is_zero(solved[pair]["lin1.bias"], kept), pair
            assert only_removed_is_zero(solved[pair]["lin2.bias"], torch.ones(32, dtype=torch.bool)), pair


def test_a_variant_solved_alone_equals_it_solved_among_others(setting):
    """Bit by bit, though variants that lost neurons alone share the sums of their features."""
    model, kind = setting
    variants, data = variants_of(model, kind), examples(kind, 48)
    together = reconstruct(model, variants, data, ridge=1e-3, **OPTIONS)
    for pair in variants:
        alone = reconstruct(model, {pair: variants[pair]}, data, ridge=1e-3, **OPTIONS)[pair]
        assert alone.keys() == together[pair].keys()
        assert all(torch.equal(alone[name], together[pair][name]) for name in alone), pair


def test_held_out_error_is_lower_than_that_of_the_merely_pruned(setting):
    model, kind = setting
    variants = variants_of(model, kind)
    solved = reconstruct(model, variants, examples(kind, 128), ridge=1e-3, **OPTIONS)
    candidates = {pair: [tensors, solved[pair]] for pair, (_, tensors, _) in variants.items()}
    errors = held_out_errors(model, find_blocks(model), candidates, examples(kind, 64, seed=9), **OPTIONS)
    assert errors.keys() == variants.keys()
    for pair, (before, after) in errors.items():
        assert 0 < after < before, pair


# --- configurations and schemes ----------------------------------------------------------------------------------


def result_of(script, *arguments):
    """The JSON result of a script that ends well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = load_script(script).main([*map(str, arguments), "--quiet"])
    assert code == 0, f"{script} ended with {code}"
    return json.loads(out.getvalue())


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def make_scheme(folder, model, *rates):
    """conf.json and conf_prune.json in a folder: their contents."""
    result_of("config_generator.py", "-m", model, "-o", folder / "conf.json", *rates)
    run(f"prune_scheme_generator.py -i {folder}/conf.json -o {folder}/conf_prune.json")
    return read_json(folder / "conf.json"), read_json(folder / "conf_prune.json")


def prune_library(folder, model):
    return run(f"prune.py -m {model} -c {folder}/conf_prune.json -o {folder}/pruned")


@pytest.mark.parametrize("kind", LINEARS)
def test_the_flag_lists_feed_forward_modules_and_their_rates(workshop, tmp_path, kind):
    """By hand: 4 feed-forward modules in the T5, 2 in the DistilBERT, of 48 neurons each; without the flag none."""
    model = workshop / "model" / kind
    given = ("--attention", 0.25, 0.5, "--linear", 0.3, 0.1, "-n", 2)
    result_of("config_generator.py", "-m", model, "-o", tmp_path / "plain.json", *given)
    result_of("config_generator.py", "-m", model, "-o", tmp_path / "conf.json", *given, "--feed-forward", 0.5, 0)
    plain, conf = (read_json(tmp_path / name) for name in ("plain.json", "conf.json"))
    added = {name: {"kind": "feed_forward", "neurons": NEURONS} for name in FEED_FORWARD[kind]}
    assert {name: module for name, module in conf["modules"].items() if name not in plain["modules"]} == added
    assert {name: module for name, module in conf["modules"].items() if name not in added} == plain["modules"]
    for with_neurons, without, rate in zip(conf["configs"], plain["configs"], (0.5, 0)):
        assert with_neurons == without | dict.fromkeys(added, rate)
    assert {module["kind"] for module in plain["modules"].values()} == {"attention", "linear"}


@pytest.mark.parametrize("rates", [[0.5], [0.5, 0.5, 0.5]])
def test_a_wrong_number_of_rates_is_refused(call, workshop, tmp_path, rates):
    code, result, err = call(
        "config_generator.py",
        "-m",
        workshop / "model" / "t5",
        "-o",
        tmp_path / "conf.json",
        "--attention",
        0,
        0,
        "--linear",
        0,
        0,
        "--feed-forward",
        *rates,
        "-n",
        2,
    )
    assert (code, result) == (2, None) and is_one_line(err), err
    assert f"--feed-forward has {len(rates)} rates, but -n asks for 2" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate, refused", [(0.99, True), (0.979167, False)])
def test_a_rate_that_removes_all_neurons_is_refused_with_the_largest_usable_one(workshop, tmp_path, rate, refused):
    """By hand: 0.99 of 48 rounds to 48; 47 of 48 are 0.979167. The rate stands in a conf.json edited by hand."""
    make_scheme(tmp_path, workshop / "model" / "t5", "--attention", 0, "--linear", 0, "--feed-forward", 0.5, "-n", 1)
    edited = edited_json(
        tmp_path / "conf.json", tmp_path / "edited.json", lambda content: content["configs"][0].update({T5_FF[2]: rate})
    )
    code, result, err = outcome(f"prune_scheme_generator.py -i {edited} -o {tmp_path}/scheme.json")
    if refused:
        assert (code, result) == (2, None) and is_one_line(err), err
        assert (
            f"{edited}: configuration 0: {T5_FF[2]}: rate 0.99 removes all 48 neurons; the largest usable rate is "
            "0.979167 (47 of 48 neurons), or 1, which leaves the block out"
        ) in err
        assert not (tmp_path / "scheme.json").exists()
    else:
        assert code == 0, err
        assert read_json(tmp_path / "scheme.json")["configs"][0][T5_FF[2]] == "neurons-47"


def test_more_neurons_than_the_model_has_are_refused(workshop, tmp_path):
    """By hand: half of 98 neurons is one more than the 48 that there are."""
    model = workshop / "model" / "t5"
    make_scheme(tmp_path, model, "--attention", 0, "--linear", 0, "--feed-forward", 0.5, "-n", 1)
    edited_json(
        tmp_path / "conf.json",
        tmp_path / "edited.json",
        lambda content: content["modules"][T5_FF[1]].update(neurons=98),
    )
    run(f"prune_scheme_generator.py -i {tmp_path}/edited.json -o {tmp_path}/scheme.json")
    code, result, err = outcome(f"prune.py -m {model} -c {tmp_path}/scheme.json -o {tmp_path}/pruned")
    assert (code, result) == (2, None) and is_one_line(err), err
    assert T5_FF[1] in err and "does not fit the model" in err and not (tmp_path / "pruned").exists()


def test_variants_are_named_by_what_goes_and_equal_counts_are_one(workshop, tmp_path):
    """By hand: 0.5 and 0.505 of 48 neurons are 24, 0.53125 is 25.5, which rounds to 26, and 0.46875 22.5, to 22."""
    _, scheme = make_scheme(
        tmp_path,
        workshop / "model" / "t5",
        "--attention",
        *[0] * 5,
        "--linear",
        *[0] * 4,
        0.3,
        "--feed-forward",
        0.5,
        0.505,
        0.53125,
        0.46875,
        0.5,
        "-n",
        5,
    )
    nothing = {"wi": 0, "wo": 0}
    variants = {f"neurons-{count}": {"heads": 0, "weights": nothing, "neurons": count} for count in (24, 26, 22)}
    variants["neurons-24_wi-461_wo-461"] = {"heads": 0, "weights": {"wi": 461, "wo": 461}, "neurons": 24}  # 0.3 of 1536
    assert {name: scheme["blocks"][name] for name in T5_FF} == dict.fromkeys(T5_FF, variants)
    assert [config[T5_FF[0]] for config in scheme["configs"]] == [
        "neurons-24",
        "neurons-24",
        "neurons-26",
        "neurons-22",
        "neurons-24_wi-461_wo-461",
    ]
    assert [each["feed_forward"] for each in scheme["requested"]] == [0.5, 0.505, 0.53125, 0.46875, 0.5]


def test_schemes_and_libraries_without_neurons_work_as_before(workshop, tmp_path):
    """A scheme names no neurons then, a report neither; a library may lack the count, as older ones do."""
    model = workshop / "model" / "t5"
    _, scheme = make_scheme(tmp_path, model, "--attention", 0.25, "--linear", 0.3, "-n", 1)
    assert all("neurons" not in removed for variants in scheme["blocks"].values() for removed in variants.values())
    assert scheme["requested"] == [{"attention": 0.25, "linear": 0.3}]
    first = prune_library(tmp_path, model)
    assert first["pruned"] == 10 and first["configurations"][0].keys() == {"attention", "linear"}
    path, counts = tmp_path / "pruned" / "record.json", set()
    edited_json(path, path, lambda record: counts.update(e.pop("neurons_removed") for e in record["variants"].values()))
    assert counts == {0}
    again = prune_library(tmp_path, model)
    assert (again["pruned"], again["skipped"], again["configurations"]) == (0, 10, first["configurations"])


def test_rates_that_remove_no_neuron_make_the_variants_that_there_are_without_them(workshop, tmp_path):
    """By hand: 0.01 of 48 neurons rounds to none, so a library that was made without the flag serves both."""
    model, given = workshop / "model" / "t5", ("--attention", 0.25, 0.25, "--linear", 0.3, 0.3, "-n", 2)
    (tmp_path / "with").mkdir()
    _, plain = make_scheme(tmp_path, model, *given)
    _, scheme = make_scheme(tmp_path / "with", model, *given, "--feed-forward", 0, 0.01)
    assert (scheme["blocks"], scheme["configs"]) == (plain["blocks"], plain["configs"])
    assert [each["feed_forward"] for each in scheme["requested"]] == [0, 0.01]
    assert prune_library(tmp_path, model)["pruned"] == 10
    again = run(f"prune.py -m {model} -c {tmp_path}/with/conf_prune.json -o {tmp_path}/pruned")
    assert (again["pruned"], again["skipped"]) == (0, 10)
    assert [each["feed_forward"] for each in again["configurations"]] == [
        {"requested": 0, "measured": 0},
        {"requested": 0.01, "measured": 0},
    ]


@pytest.mark.parametrize(
    "kind, in_all",
    [
        # An out-projection is 24 · 32 = 768 and loses 6 · 32 with a head, a feed-forward module is 3072 and loses half.
        ("t5", (6 * 192 + 4 * 1536) / (6 * 768 + 4 * 3072)),
        ("distilbert", (2 * 256 + 2 * 1536) / (2 * 1024 + 2 * 3072)),
    ],
)
def test_pruning_reports_what_was_asked_for_and_what_went(workshop, tmp_path, kind, in_all):
    """By hand: no weight goes by its own rate, 1 of 4 heads and 24 or 26 (0.53125 · 48 = 25.5) of 48 neurons do."""
    model = workshop / "model" / kind
    make_scheme(tmp_path, model, "--attention", 0.25, 0, "--linear", 0, 0, "--feed-forward", 0.5, 0.53125, "-n", 2)
    result = prune_library(tmp_path, model)
    blocks = {"t5": 6, "distilbert": 2}[kind], len(FEED_FORWARD[kind])
    assert result["pruned"] == blocks[0] + 2 * blocks[1]
    first, second = result["configurations"]
    assert first == {
        "attention": {"requested": 0.25, "measured": 0.25},
        "linear": {"requested": 0, "measured": 0, "measured_in_all": round(in_all, 6)},
        "feed_forward": {"requested": 0.5, "measured": 0.5},
    }
    assert second["feed_forward"] == {"requested": 0.53125, "measured": round(26 / 48, 6)}
    entries = read_json(tmp_path / "pruned" / "record.json")["variants"]
    counts = {name.rpartition(".")[2]: entry["neurons_removed"] for name, entry in entries.items()}
    assert counts == {"heads-1": 0, "neurons-24": 24, "neurons-26": 26}
    for name in FEED_FORWARD[kind]:
        assert entries[f"{name}.neurons-26"]["weights_removed"] == dict.fromkeys(LINEARS[kind], 26 * 32)


# --- the whole chain -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LINEARS)
def line(request, workshop, tmp_path_factory):
    """(kind, model, folder, prune.py's result): every stage run on configurations with half the neurons and more."""
    kind = request.param
    folder, model = tmp_path_factory.mktemp(f"neurons-{kind}"), workshop / "model" / kind
    make_scheme(folder, model, "--attention", 0.25, 0.25, "--linear", 0.3, 0.3, "--feed-forward", 0.5, 0.53125, "-n", 2)
    pruned = prune_library(folder, model)
    run(
        f"block-level_finetuning.py -m {model} -p {folder}/pruned -o {folder}/tuned --stats "
        f"{folder}/blocks.csv --method both --calibration 16 --epochs 1 --batch-size 8"
    )
    for n in range(2):
        run(
            f"compose_model.py -m {model} -p {folder}/tuned -c {folder}/conf.json -n {n} -o "
            f"{folder}/compact-{n} --compact"
        )
    run(
        f"model-level_finetuning.py -m {model} -p {folder}/pruned -c {folder}/conf.json -n 0 -o "
        f"{folder}/baseline.pth --stats {folder}/baseline.csv --epochs 8 --batch-size 8 --lr 0.003"
    )
    return kind, model, folder, pruned


def test_measured_fractions_are_those_of_the_masks_in_the_library(line):
    """Oracle: the masks in the .npy files, read by plain numpy; weights that go both ways count once."""
    kind, _, folder, pruned = line
    for n, config in enumerate(read_json(folder / "conf_prune.json")["configs"]):
        removed = total = 0
        for name, variant in config.items():
            arrays = np.load(folder / "pruned" / f"{name}.{variant}.npy", allow_pickle=False)
            linears = LINEARS[kind] if name in FEED_FORWARD[kind] else ["o" if kind == "t5" else "out_lin"]
            for linear in linears:
                removed += int((~arrays[f"{linear}.keep"]).sum())
                total += arrays[f"{linear}.keep"].size
        found = pruned["configurations"][n]
        assert found["linear"]["measured_in_all"] == round(removed / total, 6)
        assert found["feed_forward"]["measured"] == round((24, 26)[n] / 48, 6)
        # 0.3 of 768 or 1024 and of 1536 weights: 230 or 307, and 461
        assert found["linear"]["measured"] == round(
            {"t5": (6 * 230 + 8 * 461) / 16896, "distilbert": (2 * 307 + 4 * 461) / 8192}[kind], 6
        )


@pytest.mark.parametrize("library", ["pruned", "tuned"])
def test_a_library_holds_the_neurons_that_torch_would_keep(line, library):
    """Oracle: ln_structured on the original's weights; removed ones are zero, biases too, whatever was solved."""
    kind, model, folder, _ = line
    original = load_model(model).model
    blocks, (first, last) = find_blocks(original), LINEARS[kind]
    for config, count in zip(read_json(folder / "conf_prune.json")["configs"], (24, 26)):
        for name in FEED_FORWARD[kind]:
            kept = kept_by_torch(blocks[name], block_tensors(original, blocks[name]), count).numpy()
            arrays = np.load(folder / library / f"{name}.{config[name]}.npy", allow_pickle=False)
            assert np.array_equal(arrays[f"{first}.keep"].any(axis=1), kept)
            assert not arrays[f"{first}.weight"][~kept].any() and not arrays[f"{last}.weight"][:, ~kept].any()
            if kind == "distilbert":
                assert not arrays["lin1.bias"][~kept].any()
                if library == "tuned":  # they start at zero
                    assert arrays["lin1.bias"][kept].all()


@pytest.mark.parametrize("n, kept", [(0, 24), (1, 22)])  # 0.5 · 48 = 24 go; of 0.53125 · 48 = 25.5, rounded to even, 26
def test_a_compact_model_has_the_kept_neurons(line, n, kept):
    kind, _, folder, _ = line
    config = read_json(folder / f"compact-{n}" / "config.json")
    assert config["kept_neurons"] == dict.fromkeys(FEED_FORWARD[kind], kept)
    loaded = load_model(folder / f"compact-{n}").model
    for name in FEED_FORWARD[kind]:
        inner, out = (loaded.get_submodule(f"{name}.{linear}") for linear in LINEARS[kind])
        assert (tuple(inner.weight.shape), tuple(out.weight.shape)) == ((kept, 32), (32, kept))


def test_removed_neurons_stay_zero_through_model_level_training(line):
    """Oracle: ln_structured on the original's weights. Kept biases have moved away from the zero they started at."""
    kind, model, folder, _ = line
    original, content = load_model(model).model, torch.load(folder / "baseline.pth", weights_only=True)
    blocks, (first, last) = find_blocks(original), LINEARS[kind]
    for name in FEED_FORWARD[kind]:
        kept = kept_by_torch(blocks[name], block_tensors(original, blocks[name]), 24)
        state, masks = (
            {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in content[part].items()
                if key.startswith(f"{name}.")
            }
            for part in ("state_dict", "masks")
        )
        assert not state[f"{first}.weight"][~kept].any() and not state[f"{last}.weight"][:, ~kept].any()
        assert not masks[f"{first}.weight"][~kept].any() and not masks[f"{last}.weight"][:, ~kept].any()
        for linear in LINEARS[kind]:  # 0.3 of its weights are zero as well, and nothing else
            assert only_removed_is_zero(state[f"{linear}.weight"], masks[f"{linear}.weight"])
            own = original.get_parameter(f"{name}.{linear}.weight")
            assert bool((state[f"{linear}.weight"] != own)[masks[f"{linear}.weight"]].float().mean() > 0.9)
        if kind == "distilbert":
            assert only_removed_is_zero(state["lin1.bias"], kept) and torch.equal(masks["lin1.bias"], kept)


def test_a_model_with_other_neurons_is_another_model(call, line, tmp_path):
    """The same configuration's is there already; that of 26 neurons less is not taken for that of 24 less."""
    _, model, folder, _ = line
    shutil.copy(folder / "baseline.pth", tmp_path)
    shutil.copy(folder / "baseline.csv", tmp_path)
    given = (
        "-m",
        model,
        "-p",
        folder / "pruned",
        "-c",
        folder / "conf.json",
        "-o",
        tmp_path / "baseline.pth",
        "--stats",
        tmp_path / "baseline.csv",
        "--epochs",
        8,
        "--batch-size",
        8,
        "--lr",
        3e-3,
    )
    code, result, err = call("model-level_finetuning.py", *given, "-n", 0)
    assert code == 0 and result["skipped"] is True, err
    code, result, err = call("model-level_finetuning.py", *given, "-n", 1)
    assert (code, result) == (2, None) and "made from other inputs or settings" in err
