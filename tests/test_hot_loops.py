"""Nothing waits for the device in the loops over batches.

A fake tensor has a shape and no values. Whatever needs a value (a boolean index, `item`, a copy into a list) raises
where it meets one; with a tensor on a GPU it would wait for all that is queued there.
"""

from copy import deepcopy

import pytest
import torch
from tiny import QUIET, build_model, examples
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors
from common.composing.scheme import Pair
from common.data import examples as data
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime
from common.runtime.settings import TrainingSettings
from common.training.block_level import teacher
from common.training.block_level.sampling import make_sampling
from common.training.block_level.supernet import JointObjective, Supernet
from common.training.block_level.teacher import BlockObjective
from common.training.learner import Learner
from common.training.loop import run_pass
from common.training.losses import ModelObjective, RunningLosses

RECIPE = TrainingSettings(epochs=1, batch_size=4, lr=1e-3, warmup=0.0, precision="fp32", distill=0.5)
RUNTIME = Runtime(torch.device("cpu"), 4, QUIET, pieces=2)


@pytest.fixture
def fakes(monkeypatch):
    """The mode in which batches on the device are fake, while what is in the CPU's memory is not."""
    mode = FakeTensorMode()
    for owner, name in ((data.Examples, "batch"), (data.Batch, "labelled"), (teacher, "real_rows")):
        monkeypatch.setattr(owner, name, outside(getattr(owner, name)))
    monkeypatch.setattr(data, "to_device", lambda tensor, device: mode.from_tensor(tensor))
    return mode


def outside(function):
    """A function that runs with real tensors, as what lies in the CPU's memory is."""

    def run(*args):
        with unset_fake_temporarily():
            return function(*args)

    return run


def fake(mode, model):
    with FakeCopyMode(mode):
        return deepcopy(model)


def train(mode, learners, objective, kind):
    order, tally = [[0, 1, 2, 3], [4, 5, 6, 7]], RunningLosses(learners)
    with mode:
        run_pass(learners, objective, examples(kind, 8), order, RUNTIME, "", tally)
    assert all(learner.steps == 2 for learner in learners.values())
    assert all(len(found[None]) == 2 * RUNTIME.pieces for found in tally.losses.values())


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_training_a_whole_model(fakes, kind):
    model, original = (fake(fakes, build_model(kind)) for _ in range(2))
    learner = Learner(dict(model.named_parameters()), {}, RECIPE, 2)
    train(fakes, {"x": learner}, ModelObjective(model, RECIPE, original), kind)


def variants_of(model):
    variants = {}
    for block in find_blocks(model).values():
        own = block_tensors(model, block)
        weights = {linear: own[f"{linear}.weight"].numel() // 2 for linear in block.linears}
        for name in ("a", "b"):
            variants[Pair(block.name, name)] = prune_block(block, own, {"heads": 0, "weights": weights})[0]
    return variants


def test_training_blocks(fakes):
    model = build_model("t5")
    blocks, variants, original = find_blocks(model), variants_of(model), fake(fakes, model)
    learners = {}
    for pair, variant in variants.items():
        tensors = {name: fakes.from_tensor(tensor.detach()) for name, tensor in variant.tensors.items()}
        parameters = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        learners[pair] = Learner(parameters, {}, RECIPE, 2)
    train(fakes, learners, BlockObjective(original, blocks, RECIPE), "t5")


def test_training_all_variants_together(fakes, monkeypatch):
    model = build_model("t5")
    real = variants_of(model)
    new = {
        pair: each._replace(tensors={name: fakes.from_tensor(tensor.detach()) for name, tensor in each.tensors.items()})
        for pair, each in real.items()
    }
    original = fake(fakes, model)
    with monkeypatch.context() as patched:
        patched.setattr(
            "common.training.block_level.supernet.aliasing_copy", lambda each: fake(fakes, each).requires_grad_(False)
        )
        supernet = Supernet(model, find_blocks(model), new, {})
    supernet.masks = {
        pair: {name: fakes.from_tensor(mask) for name, mask in masks.items()} for pair, masks in supernet.masks.items()
    }
    learner = supernet.make_learner(RECIPE, 2, 1.0)
    train(
        fakes,
        {"library": learner},
        JointObjective(supernet, RECIPE, make_sampling("even", new, new, 0), {}, original),
        "t5",
    )


def test_a_wait_is_noticed(fakes):
    """The very thing that these tests look for: a boolean index."""
    tensor = fakes.from_tensor(torch.ones(3))
    with fakes, pytest.raises(Exception, match="data-dependent|dynamic shape|nonzero"):
        tensor[tensor > 0]
