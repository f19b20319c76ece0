"""What the benchmarks share: ways timed in turn, figures as JSON lines, and models of true size with random weights."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

import torch
import transformers

from common.cli.flags import Parser, add_compute, add_seed
from common.cli.values import int_between
from common.data.examples import Examples
from common.models.load import LoadedModel, model_class
from common.runtime.devices import now
from common.runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"t5": (32, 20), "distilbert": (8, 128)}  # examples a training batch, and the mean length of random ones


def build_parser(description):
    """The flags of every benchmark."""
    parser = Parser(description)
    add_compute(parser, omit=("precision", "accumulate"))
    add_seed(parser, "figures")
    parser.add_argument("--rounds", type=int_between(1), default=5, help="how often the ways are timed, in turn")
    return parser


def machine(device):
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def emit(**figures):
    """One JSON line on stdout."""
    print(json.dumps(figures), flush=True)


def in_turn(ways, rounds, device, clock=now):
    """Time several ways of doing one thing: a warm-up of each, then A B A B ….

    Args:
        ways: {name: callable}.
        clock: gives seconds for a device.
    Returns:
        {name: [seconds of every round]}.
    """
    for way in ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock(device)
            way()
            seconds[name].append(clock(device) - started)
    return seconds


def ratio(numerator, denominator):
    """Median, smallest and largest of the ratios round by round; each round's two ran next to each other."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)}


# --- the suite's own programs -------------------------------------------------------------------------------------


def stage(script, *arguments):
    """Run one of the suite's programs; returns its result."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}; what it said is above")
    return json.loads(done.stdout)


def given(args, *names):
    """Parsed flags as they stand on a command line, without those that have no value."""
    parts = []
    for name in names:
        value = vars(args)[name]
        if value:
            parts += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return parts


# --- models of true size -----------------------------------------------------------------------------------------


def random_model(family, seed, device):
    """A model of the study's size (T5-small or DistilBERT-base) with random weights, for speed alone."""
    torch.manual_seed(seed)
    config = {
        "t5": partial(transformers.T5Config, vocab_size=32128, decoder_start_token_id=0),  # its defaults are T5-small's
        "distilbert": transformers.DistilBertConfig,
    }[family]()
    return LoadedModel(model_class(family)(config).to(device).eval(), Path(f"random-{family}"))


def random_t5(shape, seed):
    """A T5 with random weights and T5's vocabulary; `shape`: (width, neurons, layers of each stack, heads)."""
    width, neurons, layers, heads = shape
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=32128, d_model=width, d_ff=neurons, num_layers=layers, num_heads=heads, decoder_start_token_id=0
    )
    return LoadedModel(model_class("t5")(config).eval(), Path("random-t5"))


def random_examples(loaded, count, length, seed):
    """Random token sequences of `length` / 2 to `length` * 3 / 2, with as long a translation or a class each."""
    draw = random.Random(seed)

    def sequence():
        return [
            draw.randrange(5, loaded.model.config.vocab_size)
            for _ in range(draw.randint(max(1, length // 2), length * 3 // 2))
        ]

    inputs = [sequence() for _ in range(count)]
    translates = loaded.task.name == "translation"
    targets = [sequence() if translates else draw.randrange(2) for _ in inputs]
    return Examples(loaded.task, inputs, targets, [("", "")] * count, pad=0)
