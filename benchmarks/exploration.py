"""Exploration: the smallest of many configurations that keeps a wanted quality, found in two ways.

This is the task of Wootz (Guan, Shen and Lim, PLDI 2019). Each block's rates are drawn from lists. Wanted is the
smallest model whose quality, BLEU or accuracy on the validation split, is at most alpha below the original's.

- Baseline: the configurations are fine-tuned from the smallest up, each from the weights pruned by l1, and evaluated,
  until one is good enough.
- Library: all blocks are pruned once and tuned once, together. experiments/explore.py then goes through the composed
  models. Only where none of them is good enough, the best is fine-tuned.

Seconds are those of pruning, training and evaluating. Starting programs, loading and saving count on neither side. The
test split is for the models that were found, and its evaluation counts nowhere.

The suite's own scripts do the work and keep what is there: after an interruption, run it again.
"""

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from measure import emit, given, machine, stage

from common.blocks.tensors import parameter_counts
from common.cli.flags import DATA, Parser, add_compute, add_seed, add_settings
from common.cli.launch import launch
from common.cli.values import int_between, number, rate, rate_below_1
from common.composing.configurations import read_configurations
from common.composing.library import Library
from common.composing.search import sizes
from common.evaluation.cost import multiply_adds
from common.models.load import data_source, load_model
from common.pruning.criteria import CRITERIA
from common.runtime.devices import Runtime, resolve_device
from common.runtime.progress import Talk
from common.runtime.records import RECORD_NAME, read_json, write_json
from common.runtime.settings import DataSettings
from common.training.stats import last_run, read_seconds


def parser():
    flags = Parser(__doc__.partition("\n\n")[0])
    add_compute(flags, omit=("precision", "accumulate"))
    add_seed(flags)
    flags.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    flags.add_argument("-n", "--number", type=int_between(1), default=500, help="how many configurations")
    flags.add_argument("--attention", type=rate, nargs="+", default=[0.25, 0.5, 0.75], metavar="RATE")
    flags.add_argument("--linear", type=rate_below_1, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE")
    flags.add_argument("--feed-forward", type=rate, nargs="+", metavar="RATE")
    drop = "by how much the quality may be lower than the original's: in BLEU (0 to 100) or accuracy (0 to 1)"
    flags.add_argument("--drop", type=number(float, least=0), nargs="+", default=[0.2, 0.5, 1.0], help=drop)
    flags.add_argument("--criterion", choices=list(CRITERIA), default="reconstruction", help="of the library's blocks")
    flags.add_argument("--epochs", type=int_between(1), default=1, help="epochs of a configuration of the baseline")
    flags.add_argument("--epoch-size", type=int_between(1), default=15000, help="examples in such an epoch")
    flags.add_argument("--block-args", default="", help="further flags for block-level_finetuning.py")
    flags.add_argument("--model-args", default="", help="further flags for model-level_finetuning.py, for the baseline")
    finish = "those of a composed model that is not good enough"
    flags.add_argument("--finish-args", default="--epochs 1 --epoch-size 2500", help=finish)
    flags.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the work folder")
    add_settings(flags, DataSettings, DATA, batch_size=32)
    return flags


class Run(NamedTuple):
    """A configuration of the baseline that was fine-tuned: its quality on the validation split, and what it took."""

    quality: float
    seconds: float


def first_good(runs, wanted):
    """Where going through runs, from the smallest model up, ends, and what that takes.

    Returns:
        {"position" of the first whose quality is `wanted` or more (None if none is), "quality" there, "tried",
        "seconds"}.
    """
    position = next((place for place, run in enumerate(runs) if run.quality >= wanted), None)
    tried = len(runs) if position is None else position + 1
    return {
        "position": position,
        "quality": None if position is None else round(runs[position].quality, 4),
        "tried": tried,
        "seconds": round(sum(run.seconds for run in runs[:tried]), 3),
    }


# --- the two ways -------------------------------------------------------------------------------------------------


class Exploration:
    """The two ways of finding the smallest configuration, in a work folder."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.original = load_model(args.model, resolve_device(args.device))
        self.common = ["--device", args.device, *["--quiet"] * args.quiet]
        self.data = given(args, "tokenizer", "data", "max_length", "limit")
        self.training = ["--batch-size", args.batch_size, "--seed", args.seed]
        self.costs = self.costs_of(self.original)

    def of_model(self, script, *arguments):
        """Run a stage that reads the original model."""
        return stage(script, "-m", self.args.model, *arguments, *self.common)

    def draw(self):
        """Draw the configurations; returns how many blocks there are to tune, with reuse and without."""
        rates = given(self.args, "attention", "linear", "feed_forward")
        conf, drawn = self.folder / "conf.json", ["--random", "-n", self.args.number, "--seed", self.args.seed]
        self.of_model("config_generator.py", "-o", conf, *drawn, *rates)
        scheme = stage("prune_scheme_generator.py", "-i", conf, "-o", self.folder / "conf_prune.json", *self.common)
        return {name: scheme[name] for name in ("blocks_with_reuse", "blocks_without_reuse")}

    def prune(self, criterion):
        """Prune all blocks, into the folder pruned-CRITERION; returns the seconds, those of earlier runs included."""
        library, data = f"pruned-{criterion}", self.data if CRITERIA[criterion].needs_data else []
        flags = ["-c", self.folder / "conf_prune.json", "-o", self.folder / library, "--criterion", criterion, *data]
        # Quiet: it has a line for every configuration.
        result, file = self.of_model("prune.py", *flags, "--quiet"), self.folder / f"{library}-seconds.json"
        before = read_json(file, "this program")["seconds"] if file.exists() else 0.0
        seconds = before + result["seconds"] if result["pruned"] else before
        write_json(file, {"seconds": seconds})
        return seconds

    def tune_library(self):
        """Tune the library; returns the seconds of pruning and of tuning it."""
        pruning, stats = self.prune(self.args.criterion), self.folder / "library.csv"
        pruned = self.folder / f"pruned-{self.args.criterion}"
        flags = ["-p", pruned, "-o", self.folder / "library", "--stats", stats, *self.data, *self.training]
        self.of_model("block-level_finetuning.py", *flags, *shlex.split(self.args.block_args))
        return {"pruning": pruning, **read_seconds(stats)}

    def explore(self):
        """Look for the smallest compositions that are good enough; returns the report."""
        report = self.folder / "explored.json"
        files = ["-c", self.folder / "conf.json", "-o", self.folder / "smallest.json", "--report", report]
        flags = ["-p", self.folder / "library", *files, "--overwrite", "--drop", *self.args.drop, *self.data]
        self.of_model("experiments/explore.py", *flags)
        return read_json(report, "experiments/explore.py")

    def finish(self, nth, found):
        """Make the model of what was found for the nth drop, fine-tuned if that is needed; returns its figures."""
        from_library = ["-p", self.folder / "library", "-c", self.folder / "smallest.json", "-n", nth, "--compact"]
        seconds, validation = 0.0, found["quality"]
        if found["good_enough"]:
            name = f"composed-{found['configuration']}"
            tokenizer = ["-t", self.args.tokenizer] if self.args.tokenizer else []
            self.of_model("compose_model.py", *from_library, "-o", self.folder / name, *tokenizer)
        else:
            name = f"finished-{found['configuration']}"
            flags = [*self.data, *self.training, *shlex.split(self.args.finish_args)]
            seconds = self.tune_model(name, *from_library, *flags)
            validation, evaluating = self.evaluate(name, "validation")
            seconds += evaluating
        return {
            "configuration": found["configuration"],
            "kept": found["kept"],
            "good_enough": validation >= found["wanted"],
            "finished": not found["good_enough"],
            "validation": validation,
            "test": self.evaluate(name, "test")[0],
            **self.sizes_of(name),
        }, seconds

    def tune_model(self, name, *flags):
        """Fine-tune a configuration's model, into the folder `name`; returns the seconds."""
        stats = self.folder / f"{name}.csv"
        self.of_model("model-level_finetuning.py", "-o", self.folder / name, "--stats", stats, *flags)
        return sum(read_seconds(stats, {last_run(stats)}).values())

    def evaluate(self, name, split):
        """(quality, seconds) of a model on a split."""
        model, file = self.folder / name, self.folder / f"{name}-{split}.json"
        task = self.original.task
        if not file.exists() or file.stat().st_mtime_ns < (model / RECORD_NAME).stat().st_mtime_ns:
            write_json(file, stage(task.evaluated_by, "-m", model, "--split", split, *self.data, *self.common))
        result = read_json(file, task.evaluated_by)
        return result[task.metric], result["examples"] / result["examples_per_second"]

    def sizes_of(self, name):
        """What a model in the work folder costs, relative to the original."""
        costs = self.costs_of(load_model(self.folder / name, self.original.model.device))
        return {figure: round(cost / self.costs[figure], 4) for figure, cost in costs.items()}

    def costs_of(self, loaded):
        nonzero = parameter_counts(loaded.model)["nonzero_parameters"]
        return {"nonzero_parameters": nonzero, "multiply_adds": multiply_adds(loaded)}

    def baseline(self, wanted):
        """Fine-tune configurations from the smallest up, until one has the quality `wanted`.

        Returns:
            (their numbers from the smallest up, the size of each, [Run, …], seconds of pruning)
        """
        pruning, pruned = self.prune("l1"), self.folder / "pruned-l1"
        library = Library.open(pruned, self.original.identity["fingerprint"])
        configurations = read_configurations(self.folder / "conf.json")
        kept = sizes(
            self.original, configurations, library, "parameters", Runtime(self.original.model.device, 1, Talk())
        )
        order = sorted(range(len(kept)), key=kept.__getitem__)
        runs = []
        for n in order:
            runs.append(self.run_baseline(n, pruned, kept[n]))
            if runs[-1].quality >= wanted:
                break
        return order, [kept[n] for n in order], runs, pruning

    def run_baseline(self, n, pruned, kept):
        flags = ["-p", pruned, "-c", self.folder / "conf.json", "-n", n, "--compact", *self.data, *self.training]
        recipe = ["--epochs", self.args.epochs, "--epoch-size", self.args.epoch_size]
        training = self.tune_model(f"baseline-{n}", *flags, *recipe, *shlex.split(self.args.model_args))
        quality, evaluating = self.evaluate(f"baseline-{n}", "validation")
        emit(
            figure="baseline",
            configuration=n,
            kept=round(kept, 4),
            validation=quality,
            test=self.evaluate(f"baseline-{n}", "test")[0],
            seconds={"training": round(training, 3), "evaluating": round(evaluating, 3)},
            **self.sizes_of(f"baseline-{n}"),
        )
        return Run(quality, training + evaluating)


def run(args):
    exploration = Exploration(args)
    blocks = exploration.draw()
    library = exploration.tune_library()
    explored = exploration.explore()
    emit(
        figure="setting",
        model=args.model,
        data=str(data_source(args.data, exploration.original)),
        configurations=args.number,
        attention=args.attention,
        linear=args.linear,
        feed_forward=args.feed_forward,
        **blocks,
        metric=explored["metric"],
        dense=explored["dense"],
        examples=explored["examples"],
        criterion=args.criterion,
        baseline=f"{args.epochs} epochs of {args.epoch_size} examples, pruned by l1",
        seconds="of pruning, training and evaluating",
        seed=args.seed,
        **machine(exploration.original.model.device),
    )
    order, kept, runs, pruning = exploration.baseline(max(found["wanted"] for found in explored["found"]))
    figures = []
    for nth, found in enumerate(explored["found"]):
        ours, finishing = exploration.finish(nth, found)
        seconds = {**library, **found["seconds"], "finishing": round(finishing, 3)}
        theirs = first_good(runs, found["wanted"])
        position = theirs.pop("position")
        total, baseline_total = sum(seconds.values()), pruning + theirs["seconds"]
        figures.append(
            {
                "figure": "exploration",
                "drop": found["drop"],
                "wanted": found["wanted"],
                "library": {
                    **ours,
                    "looked_at": found["looked_at"],
                    "measured": found["measured"],
                    "seconds": seconds,
                    "total_seconds": round(total, 3),
                },
                "baseline": {
                    "configuration": None if position is None else order[position],
                    "kept": None if position is None else round(kept[position], 4),
                    "good_enough": position is not None,
                    **theirs,
                    "total_seconds": round(baseline_total, 3),
                },
                "ratio": round(baseline_total / total, 2),
            }
        )
    for figure in figures[:-1]:
        emit(**figure)
    return figures[-1]


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
