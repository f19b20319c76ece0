"""How the cost of the stages grows: seconds over 1, 2, 4 and 8 times the blocks, variants, width and examples.

A T5 with random weights, with its blocks' variants at evenly spaced rates, takes: the closed form of all variants; a
joint training step; the scores of all variants; and a search by given scores (the exact choice for five budgets, with
no pass over data). One of the four quantities grows at a time, the others stay as they are. The exponent is the slope
of log(seconds) over log(times), by least squares over all four points, and of the last doubling alone: constant costs
hide in the first points. Beside it stands what the theory allows, see docs/how-it-works.md, "How costs grow".
"""

import math
import random
import statistics
import sys

import torch
from measure import (
    LoadedModel,
    Path,
    build_parser,
    cli,
    emit,
    every_variant,
    in_turn,
    machine,
    model_class,
    model_recipe,
    random_examples,
    stepper,
    transformers,
)

from common.batching import training_batches
from common.block_level import JointObjective, Supernet
from common.blocks import block_tensors, find_blocks
from common.closed_form import reconstruct
from common.devices import Runtime
from common.search import score_block
from common.search.knapsack import choose

TIMES = (1, 2, 4, 8)
START = {"blocks": 1, "variants": 1, "width": 64, "examples": 32}  # blocks: layers of encoder and decoder each
HELD = {"blocks": 2, "variants": 2, "width": 128, "examples": 64}  # of those that do not grow
HEAD, LENGTH, VOCABULARY, BATCH = 16, 16, 512, 32
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
# The largest exponents that the algorithms have.
THEORY = {
    "closed form": {"blocks": 1, "variants": 1, "width": 3, "examples": 1},
    "joint step": {"blocks": 1, "variants": 0, "width": 2, "examples": 1},
    "scores": {"blocks": 2, "variants": 1, "width": 2, "examples": 1},
    "search": {"blocks": None, "variants": None, "width": 0, "examples": 0},  # branch and bound: exponential at worst
}


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--grow", nargs="+", choices=START, default=list(START), help="what grows")
    flags.add_argument("--ways", nargs="+", choices=THEORY, default=list(THEORY), help="what is timed")
    return flags


def ways_of(setting, seed):
    """{way: a function that does it once} for a setting of the four quantities."""
    torch.manual_seed(seed)
    width, layers = setting["width"], setting["blocks"]
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=HEAD,
        num_heads=width // HEAD,
        d_ff=4 * width,
        num_layers=layers,
        decoder_start_token_id=0,
    )
    loaded = LoadedModel(model_class("t5")(config).eval(), Path("random-t5"))
    model, blocks = loaded.model, find_blocks(loaded.model)
    rates = [round(0.3 + 0.4 * n / setting["variants"], 3) for n in range(setting["variants"])]
    variants = every_variant(model, [0.5], rates)
    runtime = Runtime(torch.device("cpu"), BATCH, cli.Talk(quiet=True))
    examples = random_examples(loaded, setting["examples"], LENGTH, seed)
    recipe = model_recipe(loaded, setting["examples"], seed)  # one batch holds them all
    supernet = Supernet(model, blocks, variants, {})
    learner = supernet.make_learner(recipe, 10**6, 1.0)
    batches = training_batches(examples, setting["examples"], seed, epoch=1)
    joint = stepper(JointObjective(supernet, recipe, {}), learner, examples, batches, runtime.device)

    def score():
        for name in blocks:
            own = {pair.variant: each.tensors for pair, each in variants.items() if pair.block == name}
            score_block(model, model, blocks, name, own, examples, runtime)

    draw = random.Random(seed)
    costs = {name: {"dense": 1.0} for name in blocks}
    scores = {name: {"dense": 0.0} for name in blocks}
    for pair, variant in variants.items():
        left = sum(int(keep.sum()) for keep in variant.keeps.values()) / sum(
            tensor.numel() for tensor in block_tensors(model, blocks[pair.block]).values()
        )
        costs[pair.block][pair.variant] = left
        scores[pair.block][pair.variant] = (1 - left) * draw.uniform(0.5, 1.5)
    total = sum(max(each.values()) for each in costs.values())
    least = sum(min(each.values()) for each in costs.values())
    return {
        "closed form": lambda: reconstruct(model, variants, examples, runtime, ridge=1e-3),
        "joint step": joint,
        "scores": score,
        "search": lambda: [choose(scores, costs, least + budget * (total - least)) for budget in BUDGETS],
    }


def slope(times, seconds):
    """The exponent of growth, by least squares in logarithms."""
    x, y = [math.log(each) for each in times], [math.log(each) for each in seconds]
    middle, level = statistics.mean(x), statistics.mean(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def run(args):
    emit(figure="setting", rounds=args.rounds, held=HELD, start=START, **machine(torch.device("cpu")))
    exponents = {}
    for grown in args.grow:
        seconds = {way: [] for way in args.ways}
        for times in TIMES:
            ways = ways_of(HELD | {grown: START[grown] * times}, args.seed)
            found = in_turn({way: ways[way] for way in args.ways}, args.rounds, torch.device("cpu"))
            for way, each in found.items():
                seconds[way].append(min(each))  # noise only adds
        for way, each in seconds.items():
            exponents.setdefault(way, {})[grown] = {
                "exponent": round(slope(TIMES, each), 2),
                "last_doubling": round(math.log2(each[-1] / each[-2]), 2),
                "theory": THEORY[way][grown],
            }
            emit(figure="growth", of=way, over=grown, seconds=[round(one, 4) for one in each], **exponents[way][grown])
    return {"figure": "exponents", **exponents}


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
