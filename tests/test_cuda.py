"""The stages on a GPU, where there is one."""

import pytest
import torch
from helpers import run
from tiny import QUIET, build_model, examples

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_masks
from common.composing.scheme import Pair
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime
from common.runtime.settings import TrainingSettings
from common.training.block_level.teacher import BlockObjective
from common.training.learner import Learner
from common.training.loop import run_pass
from common.training.losses import RunningLosses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_every_stage_runs_on_the_gpu_and_agrees_with_the_cpu(workshop, here, kind):
    """Oracle: the same stages on the CPU, to the rounding of float32."""
    model, errors = f"-m {workshop}/model/{kind}", {}
    run(f"config_generator.py {model} --attention 0.25 --linear 0.3 -n 1")
    run("prune_scheme_generator.py")
    run(f"prune.py {model}")
    for device in ("cpu", "cuda"):
        common, library = f"{model} --device {device} --batch-size 8", f"tuned-{device}"
        tuned = run(f"block-level_finetuning.py {common} -o {library} --stats {device}.csv")
        errors[device] = tuned["nmse_after"]
        run(f"model-level_finetuning.py {common} -p {library} -n 0 -o {device} --epochs 1")
        run(f"evaluate-{kind}.py -m {device} --device {device} --limit 4")
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=1e-2)


def block_learners(device, plan, steps=4):
    """A tiny T5, and learners of three variants of each of its blocks, on a device."""
    model, learners = build_model("t5"), {}
    for block in find_blocks(model).values():
        own = block_tensors(model, block)
        for number in range(1, 4):
            weights = {linear: own[f"{linear}.weight"].numel() * number // 8 for linear in block.linears}
            variant = prune_block(block, own, {"heads": 0, "weights": weights})[0].to(device)
            parameters = {name: tensor.clone().requires_grad_() for name, tensor in variant.tensors.items()}
            masks = parameter_masks(block, variant.keeps)
            learners[Pair(block.name, str(number))] = Learner(parameters, masks, plan, steps)
    return model.to(device), learners


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_block_variants_do_not_wait_for_the_gpu_and_agree_with_the_cpu(precision):
    """Oracle: the same on the CPU, in float32."""
    order, losses = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        plan = TrainingSettings(
            epochs=1, batch_size=4, lr=1e-3, warmup=0.0, precision=precision if name == "cuda" else "fp32"
        )
        model, learners = block_learners(device, plan)
        runtime = Runtime(device, 4, QUIET)
        objective = BlockObjective(model, find_blocks(model), plan)
        data, before = examples("t5", 16), torch.cuda.get_sync_debug_mode()
        run_pass(learners, objective, data, order[:1], runtime, "", RunningLosses(learners))
        tally = RunningLosses(learners)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_pass(learners, objective, data, order, runtime, "", tally)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        losses[name] = tally.result().losses
        assert all(learner.steps == 4 for learner in learners.values())
    for pair, loss in losses["cpu"].items():
        assert losses["cuda"][pair] == pytest.approx(loss, rel=0.1 if precision == "bf16" else 1e-2)
