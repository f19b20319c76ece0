"""The peak memory of every stage for T5 models of true size with random weights, beside what the formula says.

A model, a tokenizer of made-up words and a few sentences of them are written to a folder; then the suite's own programs
run there one after another, each in a process of its own, whose peak is what the system says of it. The part that does
not depend on the model (code, libraries) is measured with a model of next to no size, stage by stage.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import ROOT, build_parser, emit, machine, random_t5, transformers

from common.cli.launch import launch
from common.cli.values import int_between
from common.pruning.closed_form.attention import VALUE_WIDTH
from common.pruning.closed_form.solve import STATISTICS_BYTES
from common.runtime.errors import UserError

GIB = 2**30
SHAPES = {  # (width, neurons, layers, heads) of T5
    "small": (512, 2048, 6, 8),
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
}
TINY = (64, 128, 1, 4)  # (width, neurons, layers, heads)
WORDS, VOCABULARY = 400, 32128  # of the tokenizer, and of the model
SORTING = 10  # sizes of the largest block that pruning it takes: measured with T5-small
HELD = 0.3  # of a model's variants, the freed pieces that the C library holds once they are read: with T5-base as well
HELD_IN_JOINT = 2.0  # the same in joint training, with the weights of the variants drawn
RATES = ["--attention", "0.5", "--linear", "0.5", "--feed-forward", "0.5", "-n", "1"]


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--sizes", nargs="+", choices=SHAPES, default=["small", "base"], help="of the T5")
    flags.add_argument("--sentences", type=int_between(1), default=256, help="for calibration and training")
    flags.add_argument("--length", type=int_between(1), default=20, help="words of a sentence")
    flags.add_argument("--stages", nargs="+", metavar="STAGE", help="some of the stages alone, in their order")
    flags.add_argument("--work", help="folder for models and libraries; without it a temporary one")
    return flags


def stages(args):
    """{stage: command line}, in order."""
    few = ["--limit", args.sentences, "--batch-size", 8, "--max-length", args.length + 2]
    tuned = ["block-level_finetuning.py", *few, "--calibration", args.sentences]
    return {
        "configurations": ["config_generator.py", *RATES],
        "scheme": ["prune_scheme_generator.py"],
        "prune": ["prune.py"],
        "closed form": [*tuned, "--method", "reconstruct", "-o", "solved"],
        "joint": [*tuned, "--method", "joint", "-o", "joint", "--epochs", 1, "--epoch-size", 16],
        "compose": ["compose_model.py", "-p", "solved", "-n", 0, "-o", "composed"],
        "compact": ["compose_model.py", "-p", "solved", "-n", 0, "-o", "compact", "--compact"],
        "model level": ["model-level_finetuning.py", "-p", "solved", "-n", 0, "-o", "tuned", *few]
        + ["--epochs", 1, "--epoch-size", 16],
        "evaluate": ["evaluate-t5.py", "-m", "compact", "--split", "validation", "--max-new-tokens", 8, *few],
    }


def formula(stage, shape, model, library, examples):
    """Bytes that a stage takes beside its code: see docs/how-it-works.md, "Memory of the stages".

    Args:
        shape: (width, neurons, layers, heads).
        model, library: bytes of the model, and of one variant of each of its blocks, in float32.
        examples: tokens of calibration.
    """
    width, neurons, layers, _ = shape
    block = 4 * 2 * width * neurons  # the largest
    compact = model - library / 2  # half the heads and neurons
    attention, feed_forward = 3 * layers, 2 * layers
    sums = 4 * (width + VALUE_WIDTH + 1) ** 2
    statistics = attention * sums + feed_forward * 4 * examples * width
    solving = 3 * 4 * max(width + VALUE_WIDTH, neurons) ** 2
    masks = library / 4
    held = HELD * library
    return {
        "configurations": model,
        "prune": model + SORTING * block,
        "closed form": model + min(2 * library + statistics, STATISTICS_BYTES) + solving,
        "joint": 6 * model + masks + (1 + HELD_IN_JOINT) * library,
        "compose": model + masks + held,
        "compact": model + masks + held + compact,
        "model level": 5 * model + masks + held,
        "evaluate": compact,
    }.get(stage)


def write_study(folder, shape, sentences, length, seed):
    """A model with its tokenizer and data in a folder, as download_model.py leaves them; returns its parameters."""
    model = random_t5(shape, seed).model
    model.save_pretrained(folder / "model" / "t5")
    words = [f"w{number}" for number in range(WORDS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -5.0) for word in words), ("▁", -9.0)]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer" / "t5")
    record = {"tokenizer": {"folder": "../tokenizer/t5"}, "data": {"folder": "../data"}}
    (folder / "model" / "t5" / "record.json").write_text(json.dumps(record))
    (folder / "data").mkdir()
    draw = random.Random(seed)
    for stem, count in (("train", sentences), ("val", 32), ("test2016", 8)):
        for language in ("en", "de"):
            lines = (" ".join(draw.choices(words, k=length)) + "\n" for _ in range(count))
            (folder / "data" / f"{stem}.{language}").write_text("".join(lines))
    return sum(parameter.numel() for parameter in model.parameters())


def peak_of(command, folder):
    """Run one of the suite's programs in a folder.

    Returns:
        (its peak in bytes, seconds).
    """
    started = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / command[0], *map(str, command[1:])], cwd=folder, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{command[0]} ended with exit code {process.returncode}; see {folder}/log.txt")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - started


def measure(size, shape, args, code):
    """Run all stages for one size; returns their peaks.

    Args:
        code: {stage: bytes} that do not depend on the model; None to find them.
    """
    peaks = {}
    if args.work:
        Path(args.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix=f"memory-{size}-") as folder:
        # In a process of its own: a child's peak is at least what its parent holds when it starts it.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            parameters = pool.submit(write_study, Path(folder), shape, args.sentences, args.length, args.seed).result()
        model = 4 * parameters
        library = 4 * (parameters - VOCABULARY * shape[0])
        for stage, command in stages(args).items():
            if args.stages and stage not in args.stages:
                continue
            peaks[stage], seconds = peak_of(command, Path(folder))
            known = formula(stage, shape, model, library, args.sentences * args.length)
            if code is None or known is None:
                continue
            emit(
                figure="memory",
                size=size,
                parameters=parameters,
                stage=stage,
                peak_gib=round(peaks[stage] / GIB, 3),
                code_gib=round(code[stage] / GIB, 3),
                formula_gib=round((known + code[stage]) / GIB, 3),
                models=round((peaks[stage] - code[stage]) / model, 2),
                ratio=round(peaks[stage] / (known + code[stage]), 3),
                seconds=round(seconds, 1),
            )
    return peaks


def run(args):
    emit(figure="setting", **machine(torch.device("cpu")))
    code = measure("tiny", TINY, args, None)
    for size in args.sizes:
        measure(size, SHAPES[size], args, code)
    return {"figure": "done", "sizes": args.sizes}


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
