"""What --checkpointing, --accumulate and --compile save of memory and time, or cost, side by side.

A T5 with random weights, by default of T5-small's size, is trained for some steps as model-level_finetuning.py does it.
Each way runs in a process of its own, in turn, several rounds; its peak is that of the process, or on a GPU of what was
allocated there. On a CPU the seconds are the processor's own, so that other work on it counts for less. Weights,
gradients and the optimizer's moments are the same in all ways and are given apart; what is beyond them is code and
activations.
"""

import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from joint_memory import GIB, SHAPES, peak
from measure import build_parser, cli, emit, machine, model_recipe, random_t5, ratio

from common.data import Examples
from common.devices import Runtime, resolve_device
from common.training import Learner, ModelObjective, Tally, run_pass

WAYS = {  # what the flags are in `Runtime`
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "accumulate 4": {"pieces": 4},
    "both": {"checkpointing": True, "pieces": 4},
    "compile": {"compiling": True},
    "compile, checkpointing": {"compiling": True, "checkpointing": True},
}


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--size", choices=SHAPES, default="small", help="of the T5")
    flags.add_argument("--batch-size", type=cli.positive, default=16, help="examples a batch")
    flags.add_argument("--length", type=cli.positive, default=128, help="tokens of every source and target")
    flags.add_argument("--steps", type=cli.positive, default=4, help="timed steps of each way a round, after one")
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=[way for way in WAYS if "compile" not in way])
    cli.add_precision_flag(flags)
    flags.set_defaults(rounds=3)
    return flags


def train(args, way):
    """Take the steps of one way; returns its figures. In a process of its own."""
    device = resolve_device(args.device)
    loaded = random_t5(SHAPES[args.size], args.seed)
    loaded.model.to(device)
    draw, count = random.Random(args.seed), args.batch_size * (args.steps + 1)
    sources, targets = ([[draw.randrange(5, 32128) for _ in range(args.length)] for _ in range(count)] for _ in "st")
    examples = Examples(loaded.task, sources, targets, [("", "")] * count, pad=0)
    recipe = model_recipe(loaded, args.batch_size, args.seed)
    learners = {"model": Learner(dict(loaded.model.named_parameters()), {}, recipe, args.steps + 1)}
    runtime = Runtime(device, args.batch_size, cli.Talk(quiet=True), precision=args.precision, **WAYS[way])
    objective = ModelObjective(loaded.model, recipe, **runtime.layers())
    tally, seconds = Tally(learners), []
    now = time.process_time if device.type == "cpu" else runtime.now
    for number in range(args.steps + 1):
        started = now()
        positions = list(range(number * args.batch_size, (number + 1) * args.batch_size))
        run_pass(learners, objective, examples, [positions], runtime, "", tally)
        tally.done = 0
        seconds.append(now() - started)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {
        "parameters": parameters,
        "state_gib": 4 * 4 * parameters / GIB,  # weights, gradients, two moments
        "peak_gib": (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak()) / GIB,
        "first": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "loss": tally.result().losses["model"],
    }


def run(args):
    emit(figure="setting", precision=args.precision, **machine(resolve_device(args.device)))
    found = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way, rounds in found.items():
            # In a process of its own: a peak never falls.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rounds.append(pool.submit(train, args, way).result())
    usual = found.get("plain") or found[args.ways[0]]
    for way, rounds in found.items():
        peak_gib = statistics.median(each["peak_gib"] for each in rounds)
        emit(
            figure="saving",
            way=way,
            peak_gib=round(peak_gib, 3),
            beyond_state_gib=round(peak_gib - rounds[0]["state_gib"], 3),
            seconds_of_the_first_step=round(statistics.median(each["first"] for each in rounds), 3),
            seconds_of_a_step=round(statistics.median(each["seconds"] for each in rounds), 3),
            seconds_over_usual=ratio([each["seconds"] for each in rounds], [each["seconds"] for each in usual]),
            loss=rounds[0]["loss"],
        )
    return {
        "figure": "done",
        "size": args.size,
        "parameters": usual[0]["parameters"],
        "state_gib": round(usual[0]["state_gib"], 3),
        "batch_size": args.batch_size,
        "length": args.length,
        "rounds": args.rounds,
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
