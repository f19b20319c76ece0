"""What keeps the closed form from doing harm: the ridge of each variant, warnings of few examples, the model's loss."""

import pytest
import torch
from helpers import outcome, read_json
from oracles import pruned_variants
from tiny import OPTIONS, build_model, examples

from common.blocks.find import find_blocks
from common.data.examples import Examples
from common.data.tasks import TASKS
from common.pruning.closed_form import reconstruct, too_few
from common.pruning.closed_form.solve import OVERSAMPLING


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_several_ridges_give_what_each_gives_alone(kind):
    model = build_model(kind).eval()
    variants, ridges = pruned_variants(model, 2, 0.5), [1e-3, 1.0]
    together = reconstruct(model, variants, examples(kind, 30), ridges=ridges, **OPTIONS)
    for number, ridge in enumerate(ridges):
        alone = reconstruct(model, variants, examples(kind, 30), ridges=[ridge], **OPTIONS)
        for pair in variants:
            for name, tensor in alone[pair][0].items():
                assert torch.equal(together[pair][number][name], tensor), (pair, name)


def fine_tune(t5, chain, output, flags):
    return outcome(f"block-level_finetuning.py -m {t5} -p {chain}/pruned -o {output} --method reconstruct {flags}")


def test_each_variant_takes_the_ridge_that_its_held_out_error_is_least_with(t5, chain, tmp_path):
    for name, ridges in (("best", "1e-4 0.3"), ("0.0001", "1e-4"), ("0.3", "0.3")):
        assert fine_tune(t5, chain, tmp_path / name, f"--ridge {ridges} --calibration 12")[0] == 0
    best, low, high = (read_json(tmp_path / name / "record.json")["variants"] for name in ("best", "0.0001", "0.3"))
    for name, entry in best.items():
        errors = {1e-4: low[name]["nmse_after"], 0.3: high[name]["nmse_after"]}
        assert entry["ridge"] == min(errors, key=errors.get)
        assert entry["nmse_after"] == pytest.approx(min(errors.values()), rel=1e-4)
        assert "ridge" not in low[name] and entry["made_from"]["ridge"] == [1e-4, 0.3]
    assert {entry["ridge"] for entry in best.values()} == {1e-4, 0.3}  # else the choice would not be seen here


def test_few_examples_are_told_of():
    """By hand: a tiny T5's attention has 4 heads of 6 and 32 directions each, so a row has 24 + 4 * 32 unknowns."""
    model = build_model("t5").eval()
    block = next(block for block in find_blocks(model).values() if block.heads)
    wanted = OVERSAMPLING * (24 + 4 * 32)
    row = [5] * 10
    for count, enough in ((wanted // 10 - 1, False), (wanted // 10 + 1, True)):
        data = Examples(TASKS["translation"], [row] * count, [row] * count, [None] * count, 0)
        assert (too_few(model, [block], data) is None) == enough
    assert f"should have {wanted}" in too_few(model, [block], data.sample(3))


def test_a_classifier_needs_as_many_texts_as_its_vectors_have_entries():
    model = build_model("distilbert").eval()
    width = model.config.hidden_size
    for count, enough in ((width - 1, False), (width, True)):
        data = Examples(TASKS["classification"], [[5] * 1000] * count, [0] * count, [None] * count, 0)
        found = too_few(model, find_blocks(model).values(), data)
        assert (found is None) == enough and (enough or f"{count} calibration texts" in found)


def test_the_script_warns_of_few_examples(t5, chain, tmp_path):
    assert "few examples to solve on" in fine_tune(t5, chain, tmp_path / "out", "--calibration 4")[2]
