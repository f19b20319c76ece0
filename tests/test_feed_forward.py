"""Feed-forward neurons as whole parts: which go, what the closed form then solves, and what the scripts say and keep.

The tiny models' feed-forward modules have 48 neurons and d_model 32. Which neurons go is always asked of
torch.nn.utils.prune, on the matrix [wi | woᵀ] whose rows are the neurons.
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fails, read_json, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import least_squares, objective, only_removed_is_zero, reconstruct, torch_mask
from tiny import OPTIONS, build_model, examples
from torch.nn.utils import prune

from common.blocks.families import family_of
from common.blocks.find import Block, find_blocks
from common.blocks.tensors import Variant, block_tensors, parameter_masks
from common.composing.scheme import Pair
from common.models.load import load_model
from common.pruning.closed_form.feed_forward import lost_neurons_alone
from common.pruning.prune_block import prune_block
from common.training.block_level.teacher import held_out_errors

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
@given(
    removed=st.integers(0, NEURONS - 1),
    seed=st.integers(0, 2**16),
    counts=st.tuples(*[st.integers(0, WEIGHTS)] * 3) | st.just((0, 0, 0)),
)
def test_each_linear_is_ranked_as_a_whole_and_the_neurons_go_on_top(kind, removed, seed, counts):
    """Oracle: torch's l1_unstructured on each weight, and ln_structured. Neurons lose rows, biases and columns."""
    block, tensors = block_with_weights(kind, seed)
    counts = dict(zip(block.linears, counts))
    (_, pruned, keeps), by_rate = prune_block(block, tensors, {"heads": 0, "neurons": removed, "weights": counts})
    kept, out = kept_by_torch(block, tensors, removed), block.output
    assert by_rate == counts and int((~kept).sum()) == removed
    masks = parameter_masks(block, keeps)
    for linear, count in counts.items():
        expected = torch_mask(prune.l1_unstructured, tensors[f"{linear}.weight"], amount=count)
        expected &= kept[None, :] if linear == out else kept[:, None]
        assert torch.equal(keeps[linear], expected) and torch.equal(masks[f"{linear}.weight"], expected), linear
        assert torch.equal(pruned[f"{linear}.weight"], torch.where(expected, tensors[f"{linear}.weight"], 0.0)), linear
        assert not pruned[f"{linear}.weight"][~expected].view(torch.int32).any(), linear  # not even -0
    if block.has_bias:
        assert not masks["lin1.bias"][~kept].any() and not pruned["lin1.bias"][~kept].any()
        assert torch.equal(pruned["lin2.bias"], tensors["lin2.bias"])
        if not any(counts.values()):
            assert torch.equal(masks["lin1.bias"], kept)


def test_a_bias_goes_with_all_of_its_neurons_weights_and_not_before():
    """By hand, for 4 neurons: whole; without its row; without its column; without both."""
    block = Block("ff", "ff", "feed_forward", ("lin1",), "lin2", heads=0, neurons=4, side="encoder", has_bias=True)
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
    block = Block("ff", "ff", "feed_forward", inner, "wo", heads=0, neurons=3, side="encoder", has_bias=False)
    keeps = {name: torch.tensor(each).bool() for name, each in zip(inner, rows)}  # (3, 2)
    keeps["wo"] = torch.tensor(columns).bool().T  # (2, 3)
    assert lost_neurons_alone(block, keeps) is expected


# --- the closed form -----------------------------------------------------------------------------------------------


@pytest.fixture
def all_tokens(monkeypatch):
    """The regressions read all tokens."""
    monkeypatch.setattr("common.pruning.closed_form.solve.OVERSAMPLING", 1e9)


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


def test_the_output_linear_is_numpys_least_squares_over_the_kept_neurons(setting, all_tokens):
    """Row by row, T5's without a bias and DistilBERT's with one. Oracle for the features: a plain forward pass.

    In float64, since float32's sums alone move the objective of a row that fits to 1e-6 of its power by 1e-4.
    """
    model, kind = setting
    model.double()
    ridge, data, variants = 1e-3, examples(kind, 40), variants_of(model, kind, ["neurons", "more neurons"])
    solved = reconstruct(model, variants, data, ridge=ridge, **OPTIONS)
    for pair, (block, tensors, keeps) in variants.items():
        features, outputs = features_and_outputs(model, data, f"{block.name}.{block.linears[-1]}")
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


def test_with_output_weights_removed_too_it_comes_close_to_numpys(setting, all_tokens):
    """Each row has a support of its own then, and the iterations stop early: within a percent of what can be gained."""
    model, kind = setting
    ridge, data, variants = 1e-3, examples(kind, 40), variants_of(model, kind, ["and output weights"])
    solved = reconstruct(model, variants, data, ridge=ridge, **OPTIONS)
    for pair, (block, tensors, keeps) in variants.items():
        features, outputs = features_and_outputs(model, data, f"{block.name}.{block.output}")
        inputs, start, keep = regression(block, tensors, keeps, features)
        expected, damping = least_squares(inputs, outputs, start, keep, ridge)
        _, found, _ = regression(block, solved[pair], keeps, features)
        before, best, reached = (
            objective(inputs, outputs, weights, start, damping, keep) for weights in (start, expected, found)
        )
        assert before - reached >= 0.99 * (before - best) > 0, pair


def test_what_was_removed_stays_zero_and_held_out_error_falls(setting):
    """Oracle: the neurons of ln_structured, and the masks. Inner rows are the teacher's, bit by bit."""
    model, kind = setting
    variants = variants_of(model, kind)
    solved = reconstruct(model, variants, examples(kind, 128), ridge=1e-3, **OPTIONS)
    for pair, (block, tensors, keeps) in variants.items():
        neurons, rates = MIXTURES[pair[1]]
        own, out = block_tensors(model, block), block.linears[-1]
        kept = kept_by_torch(block, own, neurons)
        assert solved[pair].keys() == tensors.keys()
        for linear, keep in keeps.items():
            assert only_removed_is_zero(solved[pair][f"{linear}.weight"], keep), (pair, linear)
            assert not (keep if linear != out else keep.T)[~kept].any(), (pair, linear)
        if block.has_bias:
            assert only_removed_is_zero(solved[pair]["lin1.bias"], kept), pair
            assert only_removed_is_zero(solved[pair]["lin2.bias"], torch.ones(32, dtype=torch.bool)), pair
        if "inner" not in rates:
            for name in (name for name in own if name.partition(".")[0] != out):
                assert torch.equal(solved[pair][name][kept], own[name][kept]), (pair, name)
    candidates = {pair: [tensors, solved[pair]] for pair, (_, tensors, _) in variants.items()}
    errors = held_out_errors(model, find_blocks(model), candidates, examples(kind, 64, seed=9), **OPTIONS)
    assert errors.keys() == variants.keys() and all(0 < after < before for before, after in errors.values())


# --- configurations and schemes ----------------------------------------------------------------------------------


def make_scheme(model, rates):
    """conf.json and conf_prune.json in the working folder: their contents."""
    run(f"config_generator.py -m {model} {rates}")
    run("prune_scheme_generator.py")
    return read_json(Path("conf.json")), read_json(Path("conf_prune.json"))


@pytest.mark.parametrize("kind", LINEARS)
def test_the_flag_lists_feed_forward_modules_and_their_rates(workshop, here, kind):
    """By hand: 4 feed-forward modules in the T5, 2 in the DistilBERT, of 48 neurons each; without the flag none."""
    command = f"config_generator.py -m {workshop}/model/{kind} --attention 0.25 0.5 --linear 0.3 0.1 -n 2"
    run(f"{command} -o plain.json")
    run(f"{command} -o conf.json --feed-forward 0.5 0")
    plain, conf = (read_json(here / name) for name in ("plain.json", "conf.json"))
    added = {name: {"kind": "feed_forward", "neurons": NEURONS} for name in FEED_FORWARD[kind]}
    assert conf["modules"] == plain["modules"] | added and not plain["modules"].keys() & added.keys()
    for with_neurons, without, rate in zip(conf["configs"], plain["configs"], (0.5, 0)):
        assert with_neurons == without | dict.fromkeys(added, rate)
    assert {module["kind"] for module in plain["modules"].values()} == {"attention", "linear"}


@pytest.mark.parametrize(
    "kind, in_all",
    [
        # An out-projection is 24 · 32 = 768 and loses 6 · 32 with a head, a feed-forward module is 3072 and loses half.
        ("t5", (6 * 192 + 4 * 1536) / (6 * 768 + 4 * 3072)),
        ("distilbert", (2 * 256 + 2 * 1536) / (2 * 1024 + 2 * 3072)),
    ],
)
def test_pruning_reports_what_was_asked_for_and_what_went(workshop, here, kind, in_all):
    """By hand: no weight goes by its own rate, 1 of 4 heads and 24 or 26 (0.53125 · 48 = 25.5) of 48 neurons do."""
    model = workshop / "model" / kind
    make_scheme(model, "--attention 0.25 0 --linear 0 0 --feed-forward 0.5 0.53125 -n 2")
    result = run(f"prune.py -m {model} -o pruned")
    blocks = {"t5": 6, "distilbert": 2}[kind], len(FEED_FORWARD[kind])
    assert result["pruned"] == blocks[0] + 2 * blocks[1]
    first, second = result["configurations"]
    assert first == {
        "attention": {"requested": 0.25, "measured": 0.25},
        "linear": {"requested": 0, "measured": 0, "measured_in_all": round(in_all, 6)},
        "feed_forward": {"requested": 0.5, "measured": 0.5},
    }
    assert second["feed_forward"] == {"requested": 0.53125, "measured": round(26 / 48, 6)}
    entries = read_json(here / "pruned" / "record.json")["variants"]
    counts = {name.rpartition(".")[2]: entry["neurons_removed"] for name, entry in entries.items()}
    assert counts == {"heads-1": 0, "neurons-24": 24, "neurons-26": 26}
    for name in FEED_FORWARD[kind]:
        assert entries[f"{name}.neurons-26"]["weights_removed"] == dict.fromkeys(LINEARS[kind], 26 * 32)


# --- the whole chain -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LINEARS)
def line(request, workshop, tmp_path_factory):
    """(kind, original, folder): a library and a baseline of configurations with half the neurons and more removed."""
    kind = request.param
    folder, model = tmp_path_factory.mktemp(f"neurons-{kind}"), workshop / "model" / kind
    with contextlib.chdir(folder):
        make_scheme(model, "--attention 0.25 0.25 --linear 0.3 0.3 --feed-forward 0.5 0.53125 -n 2")
        run(f"prune.py -m {model} -o pruned")
        training = "--method both --calibration 16 --epochs 1 --batch-size 8"
        run(f"block-level_finetuning.py -m {model} -p pruned -o tuned {training}")
        command = f"model-level_finetuning.py -m {model} -p pruned --epochs 8 --batch-size 8 --lr 3e-3"
        run(f"{command} -n 0 -o baseline.pth")
        assert "made from other inputs or settings" in fails(f"{command} -n 1 -o baseline.pth")
    return kind, load_model(model).model, folder


def test_a_library_holds_the_neurons_that_torch_would_keep(line):
    """Oracle: ln_structured on the original's weights; removed ones are zero, biases too, whatever was solved."""
    kind, original, folder = line
    blocks, (first, last) = find_blocks(original), LINEARS[kind]
    for config, count in zip(read_json(folder / "conf_prune.json")["configs"], (24, 26)):
        for name in FEED_FORWARD[kind]:
            kept = kept_by_torch(blocks[name], block_tensors(original, blocks[name]), count).numpy()
            arrays = np.load(folder / "tuned" / f"{name}.{config[name]}.npy", allow_pickle=False)
            assert np.array_equal(arrays[f"{first}.keep"].any(axis=1), kept)
            assert not arrays[f"{first}.weight"][~kept].any() and not arrays[f"{last}.weight"][:, ~kept].any()
            if kind == "distilbert":
                assert not arrays["lin1.bias"][~kept].any() and arrays["lin1.bias"][kept].all()  # they start at zero


def test_removed_neurons_stay_zero_through_model_level_training(line):
    """Oracle: ln_structured on the original's weights. Kept biases have moved away from the zero they started at."""
    kind, original, folder = line
    content = torch.load(folder / "baseline.pth", weights_only=True)
    blocks, (first, last) = find_blocks(original), LINEARS[kind]
    for name in FEED_FORWARD[kind]:
        kept = kept_by_torch(blocks[name], block_tensors(original, blocks[name]), 24)
        for part in ("state_dict", "masks"):
            assert not content[part][f"{name}.{first}.weight"][~kept].any()
            assert not content[part][f"{name}.{last}.weight"][:, ~kept].any()
        for linear in LINEARS[kind]:  # 0.3 of its weights are zero as well, and nothing else
            weight, mask = (content[part][f"{name}.{linear}.weight"] for part in ("state_dict", "masks"))
            assert only_removed_is_zero(weight, mask)
            assert (weight != original.get_parameter(f"{name}.{linear}.weight"))[mask].float().mean() > 0.9
        if kind == "distilbert":
            assert only_removed_is_zero(content["state_dict"][f"{name}.lin1.bias"], kept)
            assert torch.equal(content["masks"][f"{name}.lin1.bias"], kept)
