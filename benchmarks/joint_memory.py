"""The memory that joint fine-tuning takes: the peak of some steps, beside what the formula says.

A T5 with random weights, by default of T5-base's size, gets all variants of a grid; what goes are the first of
everything. It is trained as block-level_finetuning.py does it: the best weights are kept from the start, then come as
many steps as bring up every variant once and one more, and the weights are kept again. The closed form is left out. The
peak is that of the process, of which the part that the formula does not know (code, activations) is given as well: it
is the same for any number of variants.
"""

import resource
import sys
import time

import torch
from measure import (
    SIZES,
    build_parser,
    cli,
    emit,
    every_variant,
    machine,
    model_recipe,
    random_examples,
    random_t5,
    stepper,
)

from common.batching import training_batches
from common.block_level import JointObjective, Supernet
from common.blocks import find_blocks

GIB = 2**30
SHAPES = {  # (width, neurons, layers, heads) of T5
    "small": (512, 2048, 6, 8),
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
}


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--size", choices=SHAPES, default="base", help="of the T5")
    flags.add_argument("--attention", type=cli.rate, nargs="+", default=[0.5], metavar="RATE")
    flags.add_argument("--linear", type=cli.rate_below_1, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], metavar="RATE")
    flags.add_argument("--batch-size", type=cli.positive, default=SIZES["t5"][0], help="examples a batch")
    return flags


def peak():
    """The most bytes of memory that this process has ever held (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def formula(of_variants, of_model, of_rest):
    """Bytes of joint fine-tuning in float32, but for code and activations.

    Args:
        of_variants, of_model, of_rest: numbers of parameters: of all variants, of the model, of what of it is in no
            block. As many as the model has get a gradient in a step.
    """
    return {
        "weights": 4 * of_variants,
        "moments": 8 * (of_variants + of_rest),
        "best_weights": 4 * (of_variants + of_rest),
        "masks": of_variants,
        "original": 4 * of_model,
        "rest_of_its_own": 4 * of_rest,
        "gradients": 4 * of_model,
    }


def run(args):
    loaded = random_t5(SHAPES[args.size], args.seed)
    model, blocks = loaded.model, find_blocks(loaded.model)
    variants = every_variant(model, args.attention, args.linear)
    of_variants = sum(tensor.numel() for variant in variants.values() for tensor in variant.tensors.values())
    turn = max(sum(pair.block == name for pair in variants) for name in blocks)
    emit(figure="setting", variants=len(variants), steps=turn + 1, **machine(torch.device("cpu")))

    examples = random_examples(loaded, (turn + 1) * args.batch_size, SIZES["t5"][1], args.seed)
    batches = training_batches(examples, args.batch_size, args.seed, epoch=1)
    recipe = model_recipe(loaded, args.batch_size, args.seed)
    supernet = Supernet(model, blocks, variants, {})
    learner = supernet.make_learner(recipe, turn + 1, loaded.study.joint_rest_rate)
    step = stepper(JointObjective(supernet, recipe, {}), learner, examples, batches, torch.device("cpu"))
    learner.observe(0, float("nan"), 2.0, 0.0)
    seconds = []
    for _ in range(turn + 1):
        started = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - started, 2))
    learner.observe(1, 1.0, 1.0, 0.0)
    if not learner.held.intact() or learner.best_epoch != 1:
        raise RuntimeError("the steps went wrong")

    of_model = sum(parameter.numel() for parameter in model.parameters())
    parts = formula(of_variants, of_model, sum(tensor.numel() for tensor in supernet.rest.values()))
    known = sum(parts.values())
    return {
        "figure": "memory",
        "model": f"{loaded.path}-{args.size}",
        "batch_size": args.batch_size,
        "variants": len(variants),
        "parameters": of_model,
        "parameters_of_variants": of_variants,
        "seconds_of_steps": seconds,
        "gib": {name: round(size / GIB, 3) for name, size in parts.items()},
        "formula_gib": round(known / GIB, 3),
        "peak_gib": round(peak() / GIB, 3),
        "beyond_formula_gib": round((peak() - known) / GIB, 3),
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
