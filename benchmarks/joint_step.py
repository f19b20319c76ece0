"""A step of joint fine-tuning in units of a model-level step.

Both take the same batches in turn, step by step. One way composes a model anew for each step, out of all variants of a
grid, and updates those variants and the rest. The other steps one pruned model of the same shape, its masks held, as
model-level fine-tuning does; a second copy of it shows the noise. Ratios are taken round by round, after as many steps
as bring up every variant once.
"""

import copy
import statistics
import sys

from measure import (
    SIZES,
    build_parser,
    cli,
    emit,
    every_variant,
    in_turn,
    machine,
    model_recipe,
    prune,
    random_examples,
    random_model,
    ratio,
    stepper,
)

from common.batching import training_batches
from common.block_level import JointObjective, Supernet
from common.blocks import find_blocks
from common.devices import resolve_device
from common.inputs import open_study
from common.training import Learner, ModelObjective


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", help="folder or .pth; without it one of the study's size, with random weights")
    flags.add_argument("--model-type", choices=sorted(SIZES), default="t5", help="of the random model")
    flags.add_argument("--attention", type=cli.rate, nargs="+", default=[0.25, 0.5], metavar="RATE")
    flags.add_argument("--linear", type=cli.rate_below_1, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE")
    cli.add_data_flags(flags, batch_size=None)
    flags.set_defaults(rounds=20)
    return flags


def run(args):
    device = resolve_device(args.device)
    if args.model:
        opened = open_study(args)
        loaded, examples = opened.loaded, opened.split(args, "train")
    else:
        loaded = random_model(args.model_type, args.seed, device)
    model = loaded.model
    default_size, length = SIZES[model.config.model_type]
    batch_size = args.batch_size or default_size
    variants, blocks = every_variant(model, args.attention, args.linear), find_blocks(model)
    turn = max(sum(pair.block == name for pair in variants) for name in blocks)  # steps that bring up every variant
    count = turn + 1 + args.rounds
    if not args.model:
        examples = random_examples(loaded, count * batch_size, length, args.seed)
    batches = training_batches(examples, batch_size, args.seed, epoch=1)
    recipe = model_recipe(loaded, batch_size, args.seed)
    emit(**machine(device))

    steps = {}
    for way in ("model level", "model level again"):
        own = copy.deepcopy(model)
        masks = prune(own, {"attention": args.attention[0], "linear": args.linear[0]})
        learner = Learner(dict(own.named_parameters()), masks, recipe, count)
        steps[way] = stepper(ModelObjective(own, recipe), learner, examples, batches, device)
    supernet = Supernet(model, blocks, variants, {})
    learner = supernet.make_learner(recipe, count, loaded.study.joint_rest_rate)
    steps["joint"] = stepper(JointObjective(supernet, recipe, {}), learner, examples, batches, device)
    for _ in range(turn):  # the first step of a weight makes room for its moments
        for step in steps.values():
            step()
    seconds = in_turn(steps, args.rounds, device)
    if not learner.held.intact():
        raise RuntimeError("a removed weight is not zero")
    return {
        "model": str(loaded.path),
        "batch_size": batch_size,
        "rounds": args.rounds,
        "variants": len(variants),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_of_variants": sum(t.numel() for variant in variants.values() for t in variant.tensors.values()),
        "model_level_seconds": round(statistics.median(seconds["model level"]), 4),
        "joint_over_model_level": ratio(seconds["joint"], seconds["model level"]),
        "noise": ratio(seconds["model level again"], seconds["model level"]),
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
