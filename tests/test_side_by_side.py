"""Variants of a block side by side against the same variants one after another, in float64 wherever that can be."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import CPU, MODELS, build_model, examples, good_flags, is_one_line, padded_batch, recipe

from common.blocks import block_tensors, find_blocks
from common.checkpoints import Checkpoint
from common.cli import Talk
from common.devices import Runtime
from common.masking import parameter_masks, prune_block
from common.schemes import Pair, by_block
from common.side_by_side import SideBySide
from common.teacher import BlockObjective, held_out_errors
from common.training import Learner, Loss, Tally, fit, run_pass, step_together, steps_of

RUN, QUIET = "0123456789abcdef", Talk(quiet=True)
DENSE = "dense"  # it can only become worse, so that it stops first


def runtime(most=1, talk=QUIET):
    return Runtime(CPU, 4, talk, side_by_side=SideBySide(most, talk))


def exact(kind):
    """A tiny model in float64."""
    return build_model(kind).double()


def variants_of(model, count=3, dense=False):
    """{pair: variant}: of every block, with less and less left, in the model's own precision."""
    found = {}
    for block in find_blocks(model).values():
        own = block_tensors(model, block)
        for number in range(1, count + 1):
            weights = {linear: own[f"{linear}.weight"].numel() * number // 8 for linear in block.linears}
            removed = {"heads": min(number, block.heads - 1) if block.heads else 0, "weights": weights}
            found[Pair(block.name, str(number))] = prune_block(block, own, removed)[0]
        if dense:
            found[Pair(block.name, DENSE)] = prune_block(block, own, {"heads": 0, "weights": {}})[0]
    return found


def learners_of(variants, plan, steps=10):
    return {
        pair: Learner(
            {name: tensor.clone().requires_grad_() for name, tensor in variant.tensors.items()},
            parameter_masks(variant.block, variant.keeps),
            plan,
            steps,
        )
        for pair, variant in variants.items()
    }


def gradients(model, learners, batch, most, plan, talk=QUIET):
    """What one batch gives: {pair: (loss, {name: gradient})}, and how many variants came at once."""
    objective = BlockObjective(model, find_blocks(model), plan, SideBySide(most, talk))
    found, sizes = {}, []
    for each in objective.losses(objective.begin(batch, learners), learners, training=True):
        losses = each if isinstance(each, list) else [each]
        sizes.append(len(losses))
        torch.stack([loss.value for loss in losses]).sum().backward()
        for loss in losses:
            own = learners[loss.learner].parameters
            found[loss.learner] = (loss.value.item(), {name: tensor.grad for name, tensor in own.items()})
            for tensor in own.values():
                tensor.grad = None
    return found, sizes


def distance(found, expected):
    """Of one variant's gradients from others, relative to these."""
    apart = sum((found[name] - each).double().pow(2).sum() for name, each in expected.items())
    return (apart / sum(each.double().pow(2).sum() for each in expected.values())).sqrt().item()


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # vmap warns where it goes through the variants one by one
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_one_variant_after_another(kind):
    """Every block of every family. Of three variants two run side by side, and then the third."""
    model, batch, plan = exact(kind), padded_batch(kind), recipe()
    learners = learners_of(variants_of(model), plan)
    expected, alone = gradients(model, learners, batch, 1, plan)
    found, sizes = gradients(model, learners, batch, 2, plan)
    blocks = len(find_blocks(model))
    assert alone == [1] * 3 * blocks and sizes == [2, 1] * blocks
    for pair, (loss, own) in expected.items():
        assert loss > 1e-3 and found[pair][0] == pytest.approx(loss, rel=1e-9)
        assert distance(found[pair][1], own) < 1e-9, pair


@pytest.mark.parametrize("kind", ["t5", "bert", "bart", "deberta-v2"])
def test_in_bf16_they_are_as_good_as_one_after_another(kind):
    """Oracle: the gradients in float64. Either way errs by the rounding of bfloat16."""
    batch, plan = padded_batch(kind), recipe(precision="bf16")
    model = build_model(kind)
    learners = learners_of(variants_of(model), plan)
    precise = exact(kind)
    expected, _ = gradients(precise, learners_of(variants_of(precise), plan), batch, 1, recipe())
    alone, _ = gradients(model, learners, batch, 1, plan)
    found, sizes = gradients(model, learners, batch, 3, plan)
    assert set(sizes) == {3}
    for pair, (_, own) in expected.items():
        assert all(each.dtype == torch.float32 for each in found[pair][1].values())
        assert distance(found[pair][1], own) < 0.02 + 3 * distance(alone[pair][1], own) < 0.5


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_held_out_errors_do_not_depend_on_how_many_run_at_once(kind):
    """Several candidates of several variants; the groups cut across them."""
    model, data = exact(kind), examples(kind, 10)
    variants = variants_of(model, 2)
    candidates = {
        pair: [variant.tensors, {name: 0.9 * tensor for name, tensor in variant.tensors.items()}][: 2 - number % 2]
        for number, (pair, variant) in enumerate(variants.items())
    }
    expected, found = (held_out_errors(model, find_blocks(model), candidates, data, runtime(most)) for most in (1, 2))
    for pair, errors in expected.items():
        assert len(errors) == len(candidates[pair]) and found[pair] == pytest.approx(errors, rel=1e-6)
    assert len({error for errors in expected.values() for error in errors}) == sum(map(len, candidates.values()))


# --- steps ---------------------------------------------------------------------------------------------------------


def test_steps_together_are_each_learners_own():
    """With masks, and with gradients that are clipped and others that are not. Oracle: `Learner.step`."""
    torch.manual_seed(0)
    plan = recipe(lr=0.05, clip=1.0)
    start = [{"w": torch.randn(6, 5).double(), "b": torch.randn(6).double()} for _ in range(3)]
    masks = [torch.rand(6, 5) > 0.5, torch.rand(6, 5) > 0.2, torch.ones(6, 5, dtype=torch.bool)]
    inputs, target = torch.randn(8, 5).double(), torch.randn(8, 6).double()

    def learners():
        for own, mask in zip(start, masks):
            tensors = {"w": (own["w"] * mask).requires_grad_(), "b": own["b"].clone().requires_grad_()}
            yield Learner(tensors, {"w": mask}, plan, 5)

    def loss_of(learner, scale):
        own = learner.parameters
        return scale * (inputs @ own["w"].T + own["b"] - target).pow(2).mean()

    together, apart, scales = list(learners()), list(learners()), (100.0, 1e-3, 1.0)
    for _ in range(5):
        step_together(together, [loss_of(learner, scale) for learner, scale in zip(together, scales)])
        for learner, scale in zip(apart, scales):
            learner.step(loss_of(learner, scale))
    for one, other, mask, own in zip(together, apart, masks, start):
        assert one.steps == 5 and torch.equal(one.parameters["w"] == 0, ~mask)
        assert not torch.allclose(one.parameters["b"], own["b"], atol=1e-3)
        for name, tensor in one.parameters.items():
            torch.testing.assert_close(tensor, other.parameters[name], rtol=1e-9, atol=1e-12)
        state, expected = one.state()["optimizer"], other.state()["optimizer"]
        assert state["param_groups"] == expected["param_groups"]
        for number, moments in state["state"].items():
            for name, tensor in moments.items():
                torch.testing.assert_close(tensor, expected["state"][number][name], rtol=1e-9, atol=1e-15)


def test_the_seconds_of_what_ran_side_by_side_are_shared_out_equally():
    """By hand: two seconds that all share, three of a and b, and one of b alone."""
    tally = Tally(["a", "b"])
    tally.time((), 0.0, 2.0)
    tally.time(["a", "b"], 2.0, 5.0)
    tally.time(["b"], 5.0, 6.0)
    tally.add(Loss("a", torch.tensor(1.0), torch.tensor(2.0)), Loss("b", torch.tensor(3.0), torch.tensor(2.0)))
    tally.add(Loss("b", torch.tensor(7.0), torch.tensor(6.0)))
    found = tally.result()
    assert found.seconds == 6.0 and found.own_seconds == {"a": 1.5, "b": 2.5}
    assert found.losses == {"a": 1.0, "b": 6.0}


# --- whole runs ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for whatever ends a run."""


def fitted(kind, most, path, plan, pairs=None, talk=QUIET, **options):
    """Train variants of every block of a tiny model in float64: (learners, {pair: when it stopped})."""
    model, data, stopped = exact(kind), examples(kind, 10), {}
    variants = variants_of(model, dense=True)
    learners = learners_of({pair: variants[pair] for pair in pairs or variants}, plan, steps_of(data, plan))
    how = runtime(most, talk)
    fit(
        learners,
        BlockObjective(model, find_blocks(model), plan, how.side_by_side),
        data,
        examples(kind, 6, seed=1),
        plan,
        how,
        Checkpoint(path, RUN, dict.fromkeys(learners, "k")),
        on_finished=lambda pair, learner: stopped.setdefault(pair, learner.history[-1].epoch),
        **options,
    )
    return learners, stopped


def has_a_gradient(name):
    """The same bias in all keys changes no probability: its gradient is rounding, of which AdamW makes full steps."""
    return name not in ("k_lin.bias", "self.key.bias")


@pytest.mark.parametrize("most", [2, 8])
@pytest.mark.parametrize("kind", ["t5", "distilbert", "bert"])
def test_a_run_side_by_side_ends_as_one_after_another(tmp_path, kind, most):
    """The dense variants stop early, and the others go on without them."""
    plan = recipe(early_stop=1, lr=3e-3)
    expected, ends = fitted(kind, 1, tmp_path / "one", plan)
    found, own_ends = fitted(kind, most, tmp_path / "many", plan)
    assert own_ends == ends and {ends[pair] for pair in ends if pair.variant == DENSE} == {1}
    assert any(end > 1 for end in ends.values())
    for pair, learner in expected.items():
        assert found[pair].best_epoch == learner.best_epoch and found[pair].steps == learner.steps
        if pair.variant == DENSE:  # what it is trained on is rounding
            continue
        for one, other in zip(found[pair].history, learner.history, strict=True):
            assert one[1:3] == pytest.approx(other[1:3], rel=1e-4, abs=1e-9, nan_ok=True)
            assert one.seconds > 0
        for name, tensor in learner.parameters.items():
            if has_a_gradient(name):
                torch.testing.assert_close(found[pair].parameters[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """Interrupted once the first variants have stopped, and gone on with for those alone that have not."""

    def kill(progress):
        if progress.epoch == 2:
            raise Killed

    plan = recipe(early_stop=1, lr=3e-3)
    whole, ends = fitted("t5", 8, tmp_path / "whole", plan)
    with pytest.raises(Killed):
        fitted("t5", 8, tmp_path / "c", plan, on_epoch=kill)
    going = [pair for pair, epoch in ends.items() if epoch > 1]
    assert 0 < len(going) < len(ends)
    resumed, _ = fitted("t5", 8, tmp_path / "c", plan, [pair for pair in whole if pair in going])
    for pair in going:
        assert [row[:3] for row in resumed[pair].history[1:]] == [row[:3] for row in whole[pair].history[1:]]
        for name, tensor in whole[pair].parameters.items():
            assert torch.equal(resumed[pair].parameters[name], tensor)


def test_a_block_that_vmap_cannot_take_goes_one_after_another_and_says_so_once(capsys):
    """Its activation depends on a value. Oracle: the other blocks run side by side, and all train alike."""
    model, data, plan = exact("t5"), examples("t5", 8), recipe()
    blocks, found = find_blocks(model), {}

    def by_value(module, hidden):
        return module.act(hidden) * (1.0 if float(hidden.detach().abs().max()) > 0 else 2.0)

    refused = [block.name for block in blocks.values() if block.kind == "feed_forward"]
    blocks |= {name: replace(blocks[name], between=by_value) for name in refused}
    for most in (1, 4):
        learners = learners_of(variants_of(model), plan)
        how = runtime(most, Talk())
        objective = BlockObjective(copy.deepcopy(model), blocks, plan, how.side_by_side)
        run_pass(learners, objective, data, [[0, 1, 2, 3], [4, 5, 6, 7]], how, "", Tally(learners))
        found[most] = learners
        assert how.side_by_side.can == ({name: name not in refused for name in by_block(learners)} if most > 1 else {})
    said = [line for line in capsys.readouterr().err.splitlines() if "side by side" in line]
    assert len(said) == 1 and said[0].startswith(f"{refused[0]}: ") and "vmap" in said[0]
    for pair, learner in found[1].items():
        assert learner.steps == found[4][pair].steps == 2
        for name, tensor in learner.parameters.items():
            torch.testing.assert_close(found[4][pair].parameters[name], tensor, rtol=1e-6, atol=1e-8)


# --- the flag ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["train", "both"])
def test_the_stage_takes_the_flag_and_its_key_does_not(workshop, chain, tmp_path, succeeds, monkeypatch, method):
    """Oracle: the same stage without the flag. What is there is not made again because of the flag."""
    flags = good_flags("block-level_finetuning.py", workshop, chain, tmp_path) | {"--method": method, "--epochs": 2}
    flags |= {"--calibration": 16} if method == "both" else {}
    flags = [part for item in flags.items() for part in item]
    expected = succeeds("block-level_finetuning.py", *flags, "-o", tmp_path / "one")
    sizes = []
    original = SideBySide.groups

    def groups(self, *args):
        found = original(self, *args)
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(SideBySide, "groups", groups)
    found = succeeds("block-level_finetuning.py", *flags, "--side-by-side", 3)
    assert max(sizes) == 3
    assert found["fine_tuned"] == expected["fine_tuned"] > 0
    assert found["nmse_after"] == pytest.approx(expected["nmse_after"], rel=1e-2)
    again = succeeds("block-level_finetuning.py", *flags, "--side-by-side", 2)
    assert (again["fine_tuned"], again["skipped"]) == (0, found["fine_tuned"])
    keys = [
        {name: each["key"] for name, each in json.loads((folder / "record.json").read_text())["variants"].items()}
        for folder in (tmp_path / "one", tmp_path / "library")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("method", ["joint", "reconstruct"])
def test_the_flag_is_refused_where_variants_are_not_trained_apart(workshop, chain, tmp_path, call, method):
    flags = good_flags("block-level_finetuning.py", workshop, chain, tmp_path) | {"--method": method}
    flags = [part for item in flags.items() for part in item]
    code, result, err = call("block-level_finetuning.py", *flags, "--side-by-side", 2)
    assert (
        (code, result) == (2, None) and is_one_line(err) and "--side-by-side: goes with --method train or both" in err
    )
    assert not (tmp_path / "library").exists()
