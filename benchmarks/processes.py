"""Seconds of each stage that processes can share, in one process and in several, and how far apart the results are.

The suite's own programs run on a model and its data, one stage after the other, first with one process, then with
several; each process computes with one thread. Seconds are those that the stages report for the work itself, and those
of the whole command, which loads libraries, model and data in every process. The difference is the largest relative one
between the figures of a stage's results.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ROOT, build_parser, cli, emit, machine, stage

from common.errors import UserError

FIGURES = ("nmse_after", "val_loss", "bleu", "accuracy", "found")  # of a stage's result, what is compared


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", required=True, help="the model")
    flags.add_argument("--data", required=True, help="its data")
    flags.add_argument("--processes", type=cli.positive, nargs="+", default=[1, 2], help="how many, in this order")
    flags.add_argument("--limit", type=cli.positive, default=2000, help="examples of each split, at most")
    flags.add_argument("--calibration", type=cli.positive, default=1000)
    return flags


def stages(args):
    """{stage: command line}; {} stands for the folder of the number of processes."""
    data = ["--data", args.data, "--limit", args.limit]
    blocks = ["block-level_finetuning.py", "-m", args.model, *data, "--calibration", args.calibration]
    evaluation = "evaluate-t5.py" if is_translator(args.model) else "evaluate-distilbert.py"
    return {
        "closed form": [*blocks, "--method", "reconstruct", "-o", "{}/solved"],
        "gradients": [*blocks, "--method", "train", "-o", "{}/trained"],
        "joint": [*blocks, "--method", "joint", "--epochs", 1, "-o", "{}/joint"],
        "model level": ["model-level_finetuning.py", "-m", args.model, *data, "--no-dropout"]
        + ["-p", "{}/solved", "-n", 0, "--epochs", 1, "-o", "{}/tuned"],
        "evaluation": [evaluation, "-m", "{}/tuned", *data, "--bootstrap", 0],
        "search": ["config_generator.py", "-m", args.model, *data, "--search", "{}/solved"]
        + ["-c", "conf.json", "--budget", 0.7, "-o", "{}/found.json"],
    }


def is_translator(model):
    return json.loads((Path(model) / "config.json").read_text())["model_type"] != "distilbert"


def launch(command, count, folder):
    """Run a stage in some processes; returns (its result, seconds of the whole command)."""
    start = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [] if count == 1 else ["--nproc-per-node", str(count)]
    arguments = [str(part).replace("{}", str(count)) for part in command[1:]]
    began = time.perf_counter()
    done = subprocess.run(
        [*start, str(ROOT / command[0]), *arguments, "--quiet"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise UserError(f"{command[0]} ended with exit code {done.returncode}; what it said is above")
    return json.loads(done.stdout), time.perf_counter() - began


def seconds_of(result):
    """What a stage says that its work took."""
    seconds = result.get("seconds")
    if isinstance(seconds, dict):
        return sum(value for value in seconds.values() if value)
    return seconds if seconds is not None else result["examples"] / result["examples_per_second"]


def figures_of(result):
    """{name: number} of the figures that are compared."""
    found = {name: result[name] for name in FIGURES if isinstance(result.get(name), float)}
    for number, each in enumerate(result.get("found", ())):
        found |= {f"loss {number}": each["loss"], f"kl {number}": each["kl"]}
    return found | {f"composition {name}": loss for name, loss in result.get("compositions", {}).items()}


def run(args):
    args.model, args.data = str(Path(args.model).resolve()), str(Path(args.data).resolve())
    emit(figure="setting", processes=args.processes, **machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rates = ["--attention", 0.25, 0.5, 0.25, "--linear", 0.3, 0.3, 0.5, "-n", 3]
        stage("config_generator.py", "-m", args.model, *rates, "-o", folder / "conf.json", "--quiet")
        stage("prune_scheme_generator.py", "-i", folder / "conf.json", "-o", folder / "conf_prune.json", "--quiet")
        pruned = ["-c", folder / "conf_prune.json", "-o", folder / "modules-pruned", "--quiet"]
        stage("prune.py", "-m", args.model, *pruned)
        for name, command in stages(args).items():
            work, whole, figures = {}, {}, {}
            for count in args.processes:
                result, whole[count] = launch(command, count, folder)
                work[count], figures[count] = seconds_of(result), figures_of(result)
            first = args.processes[0]
            apart = [
                abs(each[key] - value) / abs(value)
                for each in figures.values()
                for key, value in figures[first].items()
            ]
            emit(
                figure="stage",
                stage=name,
                seconds={count: round(value, 2) for count, value in work.items()},
                seconds_of_the_command={count: round(value, 2) for count, value in whole.items()},
                times_faster=round(work[first] / work[args.processes[-1]], 2),
                figures=len(figures[first]),
                largest_difference=float(f"{max(apart):.2g}"),
            )
    return {"figure": "done", "stages": len(stages(args))}


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
