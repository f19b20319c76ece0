"""Patterns such as 2:4: masks against torch's own sparsifier, its conversion to sparse tensors and brute force; and all
stages, from the flag to a compact model whose groups of four are those of its own matrices.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import build_model, is_one_line, lively, load_script, read_json
from torch.ao.pruning import WeightNormSparsifier
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from common.blocks import block_tensors, find_blocks, set_block
from common.compact import make_compact
from common.composition import check_variant
from common.errors import UserError
from common.masking import follows, keep_pattern, parameter_masks, prune_block
from common.models import load_model
from common.schemes import Configurations, fraction_removed, make_scheme, pattern_of, read_configurations

FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense"


def torch_takes(weight):
    """Oracle: whether torch's conversion to the format of sparse matrix units and back leaves a weight as it was."""
    weight = weight.half()
    sparse, meta = sparse_semi_structured_from_dense_cutlass(weight)
    return torch.equal(sparse_semi_structured_to_dense_cutlass(sparse, meta), weight)


def in_units(weight):
    """A weight padded with zeros to the size that torch's conversion wants: rows by 32, columns by 64."""
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % 64, 0, -rows % 32))


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept, of", [(2, 4), (1, 4), (4, 8)])
def test_the_mask_is_that_of_torchs_sparsifier(kept, of):
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 12)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, of), zeros_per_block=of - kept)
    keep = keep_pattern(linear.weight.detach().abs(), f"{kept}:{of}")
    sparsifier.prepare(torch.nn.Sequential(linear), [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(keep, linear.parametrizations.weight[0].mask.bool())
    assert follows(keep, f"{kept}:{of}")


def test_groups_are_of_the_inputs_that_stay_by_hand():
    """Inputs 1, 4, 5, 7 go. 0, 2, 3, 6 are one group, of which 3 and 6 are largest; of equal ones the later stay."""
    scores = torch.tensor([[1.0, 9, 2, 3, 9, 9, 4, 9], [5, 0, 5, 5, 0, 0, 5, 0]])
    stay = torch.tensor([True, False, True, True, False, False, True, False])
    keep = keep_pattern(scores, "2:4", stay)
    assert keep[:, stay].tolist() == [[False, False, True, True]] * 2
    assert keep[:, ~stay].tolist() == [[False, False, True, True]] * 2  # what goes anyway counts at the same rate


@pytest.mark.parametrize("removed", [{"heads": 0}, {"heads": 2}], ids=["alone", "without heads"])
def test_of_all_masks_in_the_pattern_l1_takes_that_of_the_largest_sum(removed):
    """Oracle: brute force over the 6 masks of each group of four."""
    model = build_model("distilbert")
    block = find_blocks(model)["distilbert.transformer.layer.0.attention"]
    tensors = block_tensors(model, block)
    variant, by_rate = prune_block(block, tensors, {**removed, "weights": {"out_lin": "2:4"}})
    weight, keep = tensors["out_lin.weight"].detach(), variant.keeps["out_lin"]
    stays = keep.any(dim=0)
    assert int(stays.sum()) == 32 - 8 * removed["heads"] and by_rate == {"out_lin": 512}
    groups = weight[:, stays].abs().reshape(-1, 4)
    best = torch.stack([groups[:, list(pair)].sum(1) for pair in itertools.combinations(range(4), 2)]).amax(0)
    assert torch.equal((groups * keep[:, stays].reshape(-1, 4)).sum(1), best)


# --- configurations and schemes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["4:4", "0:4", "2:", "02:4", "2:4:8", "5:4", "2 : 4", "-1:4", 0.5, None, "²:4"])
def test_what_is_no_pattern(text):
    assert pattern_of(text) is None


def test_a_pattern_and_a_rate_of_the_same_size_are_two_variants():
    modules = {"0.ff.wi": {"kind": "linear", "weights": 2000, "block": "0.ff", "linear": "wi"}}
    scheme = make_scheme(Configurations({}, modules, [{"0.ff.wi": "2:4"}, {"0.ff.wi": 0.5}]))
    weights = {"wi-2of4": {"wi": "2:4"}, "wi-1000": {"wi": 1000}}
    assert scheme.blocks == {"0.ff": {name: {"heads": 0, "weights": each} for name, each in weights.items()}}
    assert scheme.requested == [{"linear": 0.5}] * 2 and fraction_removed("4:8") == 0.5


@pytest.mark.parametrize("module, rate", [("o", "4:4"), ("o", "half"), ("a", "2:4")])
def test_other_strings_and_patterns_of_heads_are_refused_in_one_line(tmp_path, module, rate):
    modules = {
        "a": {"kind": "attention", "heads": 4},
        "o": {"kind": "linear", "weights": 64, "block": "a", "linear": "o"},
    }
    model = {"name": "tiny", "type": "t5", "fingerprint": "f00d"}
    path = tmp_path / "conf.json"
    path.write_text(json.dumps({"version": 1, "model": model, "modules": modules, "configs": [{module: rate}]}))
    with pytest.raises(UserError, match=f"configuration 0: {module}: the rate must be a number .*not '{rate}'"):
        read_configurations(path)


@pytest.mark.parametrize(
    "removed, words",
    [
        ({"heads": 0, "weights": {"wi": "2:5"}}, "pattern 2:5 does not fit wi, whose 32 inputs are no multiple of 5"),
        (
            {"heads": 0, "neurons": 10, "weights": {"wo": "2:4"}},
            "with 10 neurons removed it has 38 of 48 inputs, no multipl",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(removed, words):
    model = build_model("t5")
    block = find_blocks(model)[FEED_FORWARD]
    with pytest.raises(UserError, match=words):
        check_variant("here", block, block_tensors(model, block), removed)


def test_flags_that_do_not_go_together_are_refused_before_anything_is_written(workshop, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    rates = ("-m", workshop / "model" / "t5", "--attention", 0.5, "-n", 1)
    for flags, words in (
        (("--pattern", "2:5"), "does not fit"),
        (("--pattern", "2:4", "--linear", 0.3), "no --linear rate does; give --linear 0.5"),
        (("--pattern", "2:4", "--feed-forward", 0.2), "with 10 neurons removed"),
    ):
        code, result, err = call("config_generator.py", *rates, *flags)
        assert (code, result) == (2, None) and words in err and is_one_line(err)
    code, _, err = call("config_generator.py", *rates, "--pattern", "4:4")
    assert code == 2 and "'4:4' is not a pattern N:M" in err
    assert not list(tmp_path.iterdir())


# --- the stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(workshop, tmp_path_factory):
    """Every stage on the tiny T5: 2:4 alone, with half the heads and a quarter of the neurons gone, and 0.5."""
    folder, model = tmp_path_factory.mktemp("stages"), workshop / "model" / "t5"

    def run(script, *arguments):
        assert load_script(script).main([*map(str, arguments), "--quiet"]) == 0

    conf, scheme, tuned = folder / "conf.json", folder / "conf_prune.json", folder / "tuned"
    rates = ("--attention", 0, 0.5, 0, "--linear", "2:4", "2:4", 0.5, "--feed-forward", 0, 0.25, 0)
    run("config_generator.py", "-m", model, "-o", conf, *rates, "-n", 3)
    run("prune_scheme_generator.py", "-i", conf, "-o", scheme)
    for criterion in ("l1", "reconstruction"):
        run("prune.py", "-m", model, "-c", scheme, "-o", folder / criterion, "--criterion", criterion)
    common = ("-m", model, "--epochs", 1, "--batch-size", 8)
    joint = ("-o", tuned, "--method", "joint", "-c", conf)
    run("block-level_finetuning.py", *common, "-p", folder / "reconstruction", *joint)
    for form, n in (("whole", 0), ("compact", 1)):
        more = ("--compact",) if form == "compact" else ()
        run("compose_model.py", "-m", model, "-p", tuned, "-c", conf, "-n", n, "-o", folder / form, *more)
    run("block-level_finetuning.py", *common, "-p", folder / "l1", "-o", folder / "train", "--method", "train")
    baseline = ("-c", conf, "-n", 1, "-o", folder / "baseline", "--compact")
    run("model-level_finetuning.py", *common, "-p", folder / "l1", *baseline)
    return folder


def linears_with_rates(model):
    """{name: weight} of the Linears that have a rate of their own."""
    return {
        f"{block.name}.{linear}": model.get_submodule(f"{block.root}.{linear}").weight.detach()
        for block in find_blocks(model).values()
        for linear in (block.linears[-1:] if block.kind == "attention" else block.linears)
    }


@pytest.mark.parametrize("output", ["whole", "compact", "baseline"])
def test_models_that_come_out_of_all_stages_are_in_the_pattern(stages, output):
    """Oracle: torch's conversion. A random matrix and an unstructured mask do not survive it."""
    model = load_model(stages / output).model
    weights = linears_with_rates(model)
    assert len(weights) == 2 * (1 + 2) + 2 * (1 + 1 + 2)
    assert all(torch_takes(in_units(weight)) for weight in weights.values())
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in weights.values())
    widths = {weight.shape for name, weight in weights.items() if name.endswith((".o", ".wo"))}
    assert widths == {"whole": {(32, 24), (32, 48)}}.get(output, {(32, 12), (32, 36)})
    assert not torch_takes(in_units(torch.randn(32, 64)))


@pytest.mark.parametrize("library", ["l1", "reconstruction", "tuned", "train"])
def test_a_library_holds_a_pattern_and_a_rate_side_by_side(stages, library):
    found = {path.name for path in (stages / library).glob(f"{FEED_FORWARD}.*.npy")}
    variants = ("wi-2of4_wo-2of4", "neurons-12_wi-2of4_wo-2of4", "wi-768_wo-768")
    assert found == {f"{FEED_FORWARD}.{variant}.npy" for variant in variants}
    for variant, expected in zip(variants, (True, True, False)):
        block = np.load(stages / library / f"{FEED_FORWARD}.{variant}.npy")
        keep, weight = torch.tensor(block["wo.keep"]), torch.tensor(block["wo.weight"])
        used = keep.any(dim=0)
        assert follows(keep[:, used], "2:4") == expected and not weight[~keep].any()
    if library in ("l1", "reconstruction"):
        entry = read_json(stages / library / "record.json")["variants"][f"{FEED_FORWARD}.{variants[1]}"]
        assert entry["weights_removed_by_rate"] == {"wi": 768, "wo": 768} and entry["neurons_removed"] == 12
        assert entry["made_from"]["removed"]["weights"] == {"wi": "2:4", "wo": "2:4"}


def test_a_search_takes_patterns_among_its_candidates(stages, workshop, succeeds):
    output = stages / "found.json"
    succeeds(
        *("config_generator.py", "-m", workshop / "model" / "t5", "-c", stages / "conf.json", "-o", output),
        *("--search", stages / "tuned", "--budget", 0.45, "--score-examples", 8),
    )
    rates = set(read_json(output)["configs"][0].values())
    assert "2:4" in rates
    make_scheme(read_configurations(output))


def test_a_neuron_that_the_pattern_left_without_weights_stays_in_a_compact_model():
    """By hand: the last neurons' output weights are the smallest, so no row keeps them; 4 neurons go as a whole."""
    model = lively("t5")
    block = find_blocks(model)[FEED_FORWARD]
    with torch.no_grad():
        model.get_submodule(FEED_FORWARD).wo.weight[:, 46:] *= 1e-4
        model.get_submodule(FEED_FORWARD).wi.weight[46:] *= 3  # so that they are not among the 4
    removed = {"heads": 0, "neurons": 4, "weights": {"wi": 0, "wo": "2:4"}}
    variant, _ = prune_block(block, block_tensors(model, block), removed)
    set_block(model, block, variant.tensors)
    masks = {f"{FEED_FORWARD}.{name}": mask for name, mask in parameter_masks(block, variant.keeps).items()}
    name = f"{FEED_FORWARD}.wo.weight"
    assert int(variant.keeps["wo"].any(dim=0).sum()) < 44
    compact, own = make_compact(model, masks, {name: "2:4"})
    assert own[name].shape == (32, 44) and follows(own[name], "2:4")
    masks[f"{FEED_FORWARD}.wi.weight"] &= variant.keeps["wo"].any(dim=0)[:, None]  # all that is around it is gone
    with pytest.raises(UserError, match="would break the pattern 2:4"):
        make_compact(model, masks, {name: "2:4"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_by_the_sparse_weight_as_by_the_dense_one():
    weight = torch.randn(128, 256)
    weight = (weight * keep_pattern(weight.abs(), "2:4")).half().cuda()
    inputs = torch.randn(64, 256).half().cuda()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    expected = torch.nn.functional.linear(inputs, weight)
    assert torch.allclose(torch.nn.functional.linear(inputs, sparse), expected, rtol=1e-2, atol=1e-2)
