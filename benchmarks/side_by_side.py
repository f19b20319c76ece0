"""A batch of block-level training by gradients: variants of a block one after another, and side by side.

For each number of variants a block both ways take the same batch in turn. An operation is one that PyTorch dispatches
and that computes something: views and empty tensors do not count. On a GPU each is about one launch, and a small
block's time is that of its launches; on a CPU it is the arithmetic, which is the same either way, unless the model is
narrow (--width). What side by side costs beside: the variants' tensors are stacked, and their gradients laid out anew.
These copies are timed apart.
"""

import sys
from statistics import median

import torch
from measure import SIZES, build_parser, cli, emit, in_turn, machine, random_examples, random_model, ratio
from torch.utils._python_dispatch import TorchDispatchMode

from common.blocks import block_tensors, find_blocks
from common.devices import Runtime, resolve_device
from common.masking import parameter_masks, prune_block
from common.models import load_model
from common.schemes import Pair, by_block
from common.side_by_side import SideBySide
from common.teacher import BlockObjective
from common.training import Learner, Recipe, Tally, run_pass

WAYS = ("one after another", "side by side")
# Beside what returns a view: what computes nothing.
NO_WORK = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::promote_types",
    "profiler::",
)


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", help="folder or .pth; without it one with random weights")
    flags.add_argument("--model-type", choices=sorted(SIZES), default="t5", help="of the random model")
    flags.add_argument("--width", type=cli.positive, help="of the random model; without it the study's size")
    flags.add_argument("--blocks", type=cli.positive, help="the model's first blocks alone, so many; without it all")
    flags.add_argument("--variants", type=cli.positive, nargs="+", default=[1, 2, 4, 8], help="of each block")
    flags.add_argument("--batch-size", type=cli.positive, help="examples a batch; without it the study's")
    flags.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    return flags


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is open, views and empty tensors left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [each.alias_info for each in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count += not is_view and not func._schema.name.startswith(NO_WORK)
        return func(*args, **(kwargs or {}))


def learners_of(model, blocks, count, recipe, device):
    """Learners of `count` variants of each block, that keep from half of their weights up."""
    learners = {}
    for block in blocks.values():
        own = block_tensors(model, block)
        for number in range(count):
            weights = {name: own[f"{name}.weight"].numel() * (number + 1) // (2 * count) for name in block.linears}
            variant = prune_block(block, own, {"heads": 0, "weights": weights})[0].to(device)
            parameters = {name: tensor.clone().requires_grad_() for name, tensor in variant.tensors.items()}
            masks = parameter_masks(block, variant.keeps)
            learners[Pair(block.name, str(number))] = Learner(parameters, masks, recipe, 10**6)
    return learners


def measured(args, model, blocks, count, examples, device):
    """Seconds and operations of a batch with `count` variants of each block, both ways."""
    size = len(examples)
    recipe = Recipe(1, size, 1e-4, 0.0, 0.01, 1.0, 0, args.precision, args.seed)
    learners, batch = learners_of(model, blocks, count, recipe, device), [list(range(size))]
    steps, teacher = {}, Operations()
    for way, most in zip(WAYS, (1, count)):
        runtime = Runtime(device, size, cli.Talk(args.quiet), side_by_side=SideBySide(most))
        objective = BlockObjective(model, blocks, recipe, runtime.side_by_side)

        def step(objective=objective, runtime=runtime):
            run_pass(learners, objective, examples, batch, runtime, "", Tally(learners))

        steps[way] = step

    def copies():
        for pairs in by_block(learners).values():
            for name in learners[pairs[0]].parameters:
                stacked = torch.stack([learners[pair].parameters[name].detach() for pair in pairs])
                stacked.mT.contiguous() if stacked.dim() > 2 else stacked.clone()

    seconds = in_turn(steps | {"copies": copies}, args.rounds, device)
    of_copies, operations = seconds.pop("copies"), {}
    for way, step in steps.items():
        with Operations() as counted:
            step()
        operations[way] = counted.count
    with teacher:
        objective.begin(examples.batch(batch[0], device), learners)
    return {
        "variants_of_a_block": count,
        "seconds": {way: round(median(each), 5) for way, each in seconds.items()},
        "seconds_ratio": ratio(*seconds.values()),
        "seconds_of_copies": round(median(of_copies), 5),
        "operations": operations,
        "operations_of_the_original": teacher.count,
        "operations_ratio": round(operations[WAYS[0]] / operations[WAYS[1]], 3),
    }


def run(args):
    device = resolve_device(args.device)
    if args.model:
        loaded = load_model(args.model, device)
    else:
        loaded = random_model(args.model_type, args.seed, device, args.width)
    model = loaded.model
    size, length = SIZES[model.config.model_type]
    examples = random_examples(loaded, args.batch_size or size, length, args.seed)
    blocks = dict(list(find_blocks(model).items())[: args.blocks])
    emit(
        figure="setting",
        model=str(loaded.path),
        width=next(iter(blocks.values())).shapes[0][1][1],
        blocks=len(blocks),
        batch_size=len(examples),
        length=length,
        precision=args.precision,
        rounds=args.rounds,
        **machine(device),
    )
    *first, last = (measured(args, model, blocks, count, examples, device) for count in args.variants)
    for each in first:
        emit(**each)
    return last


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
