"""A sweep: from how many configurations on composability is faster, and by how much.

For growing numbers N of configurations, each layer's rates drawn from a grid, every configuration's pruned model is
fine-tuned as a whole: the baseline. Beside it every N has a library of its own, made from scratch. What goes is chosen
by --criterion; the closed form and the joint run over --joint-examples follow. A composed model is measured as it is.
Only where it is not yet as good as its baseline's best is it fine-tuned, too, by the baseline's recipe.

The ratio for N is

    seconds of the baselines to their targets / (block-level seconds + the composed models' seconds to the same)

A target is the baseline's best validation loss. Where it is reached before any fine-tuning of the whole, that costs no
seconds; where never, it costs the whole run's: the ratio is then only an upper bound. Seconds are those of training, to
which choosing, closed form and gradient steps add up at block level. Validation and loading count on neither side. The
same ratio in examples trained on is disturbed by no other work on the machine; the passes over calibration examples, of
choosing and of the closed form, are not in it.

For numbers that are too large to run, the ratio is projected from the largest N that was measured (--project).

The suite's own scripts do the work and keep what is there: after an interruption, run it again. The work folder keeps
all models.
"""

import itertools
import random
import re
import shlex
import shutil
import sys
from math import ceil, inf
from pathlib import Path

from measure import emit, given, machine, stage

from common.cli.flags import DATA, Parser, add_compute, add_seed, add_settings
from common.cli.launch import launch
from common.cli.open import open_study
from common.cli.values import int_between, rate
from common.composing.configurations import grid_rates, uniform_configurations
from common.composing.scheme import SCHEME_BY, make_scheme, read_scheme
from common.pruning.criteria import CRITERIA, DEFAULT
from common.runtime.errors import UserError
from common.runtime.records import read_json, write_json
from common.runtime.settings import DataSettings
from common.training.stats import read_seconds, read_stats

JOINT_EPOCHS = 2  # of the training split, where --joint-examples is not given; as in block-level_finetuning.py


def parser():
    flags = Parser(__doc__.partition("\n\n")[0])
    add_compute(flags, omit=("precision", "accumulate"))
    add_seed(flags)
    flags.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    for name, kind, default, text in (
        ("counts", int_between(1), [1, 2, 4, 8, 16], "numbers of configurations"),
        ("project", int_between(1), [50, 500], "larger numbers, that the ratio is projected for"),
        ("attention", rate, [0.25, 0.5], "the attention rates that a layer's is drawn from"),
        ("linear", rate, [0.3, 0.5, 0.7], "the rates of Linears that a layer's is drawn from"),
        ("joint-examples", int_between(1), None, "length of the joint run: one, or one for each of --counts"),
    ):
        flags.add_argument(f"--{name}", type=kind, nargs="*" if name == "project" else "+", default=default, help=text)
    flags.add_argument("--epochs", type=int_between(1), default=6, help="model-level epochs")
    flags.add_argument("--epoch-size", type=int_between(1), default=2500, help="examples in a model-level epoch")
    flags.add_argument(
        "--criterion",
        choices=list(CRITERIA),
        default="reconstruction",
        help="what goes, in the library's variants; the baselines' are pruned by l1",
    )
    flags.add_argument("--joint-args", default="", help="further flags for joint fine-tuning; {n} stands for N")
    flags.add_argument("--model-args", default="", help="further flags for model-level_finetuning.py, on both sides")
    flags.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the work folder")
    add_settings(flags, DataSettings, DATA, batch_size=32)
    return flags


def check_flags(args):
    """Make sure that the flags go together; --joint-examples becomes {N: examples, None where not given}."""
    lengths = args.joint_examples or [None]
    if len(lengths) == 1:
        lengths = lengths * len(args.counts)
    if len(lengths) != len(args.counts):
        raise UserError(f"--joint-examples: got {len(lengths)}, and {len(args.counts)} --counts; give one, or as many")
    args.joint_examples = dict(zip(args.counts, lengths))
    args.counts = sorted(set(args.counts))
    for name, instead in (("joint_args", "--joint-examples"), ("model_args", "--epochs and --epoch-size")):
        if {"--epochs", "--epoch-size"} & {word.partition("=")[0] for word in shlex.split(vars(args)[name])}:
            raise UserError(f"--{name.replace('_', '-')}: the length of a run is for {instead} to say")


# --- from curves to ratios: a curve is [(validation loss, seconds of training so far)], epoch 0 first --------------


def read_curve(rows):
    """The curve of a stats CSV's rows."""
    seconds = itertools.accumulate(float(row["train_seconds"]) for row in rows)
    return [(float(row["val_loss"] or inf), spent) for row, spent in zip(rows, seconds)]


def first_at_most(curve, target):
    """The first epoch whose loss is no higher than `target`, and whether there is one; if not, the last epoch."""
    return next(((epoch, True) for epoch, (loss, _) in enumerate(curve) if loss <= target), (len(curve) - 1, False))


def compare(baseline, composed):
    """What a configuration's two runs took to the baseline's lowest loss."""
    loss = min(loss for loss, _ in baseline)
    (its, _), (ours, reached) = first_at_most(baseline, loss), first_at_most(composed, loss)
    return {
        "loss": loss,
        "baseline_epochs": its,
        "baseline_seconds": round(baseline[its][1], 3),
        "composed_epochs": ours,
        "composed_seconds": round(composed[ours][1], 3),
        "reached": reached,
    }


def gain(comparisons, block_seconds):
    """Sums over the configurations compared, their ratio, and the configurations that never got there."""
    names = ("baseline_epochs", "baseline_seconds", "composed_epochs", "composed_seconds")
    sums = {name: round(sum(comparison[name] for comparison in comparisons), 3) for name in names}
    return {
        "ratio": ratio(sums["baseline_seconds"], block_seconds + sums["composed_seconds"]),
        **sums,
        "not_reached": [n for n, comparison in enumerate(comparisons) if not comparison["reached"]],
    }


def in_examples(gain, epoch_size, joint_examples):
    """The sums and their ratio in examples trained on, instead of seconds."""
    baseline, composed = (gain[f"{side}_epochs"] * epoch_size for side in ("baseline", "composed"))
    return {
        "ratio": ratio(baseline, joint_examples + composed),
        "baseline": baseline,
        "joint": joint_examples,
        "composed": composed,
    }


def ratio(baseline, ours):
    return round(baseline / ours, 4) if ours else None


def project(configurations, measured, baseline, library, composed, growth):
    """The sums and their ratio for more configurations than were measured.

    Args:
        measured: how many were.
        baseline, composed: sums over these.
        library: what their library cost; `growth`: what the larger one will, in units of it.
    """
    baseline, composed = (each / measured * configurations for each in (baseline, composed))
    library *= growth
    sums = {"baseline": round(baseline, 1), "library": round(library, 1), "composed": round(composed, 1)}
    return {"ratio": ratio(baseline, library + composed), **sums}


def joint_epochs(examples, available):
    """(epochs, examples in each) of a joint run over so many examples, rounded up to whole epochs of equal size."""
    epochs = ceil(examples / available)
    return epochs, ceil(examples / epochs)


def draw(modules, count, attention, linear, seed):
    """`count` configurations: for each layer one attention rate and one rate of its Linears, from the two grids."""
    rng, configs = random.Random(seed), []
    layers = {name: re.match(r".*?\.\d+(?=\.)", name)[0] for name in modules}  # "encoder.block.0" of T5, for instance
    for _ in range(count):
        rates = {
            layer: {"attention": rng.choice(attention), "linear": rng.choice(linear)}
            for layer in dict.fromkeys(layers.values())
        }
        configs.append({name: rates[layers[name]][module["kind"]] for name, module in modules.items()})
    return configs


def variants_in_grid(modules, attention, linear):
    """How many variants there are, over all blocks, that `draw` could ever ask for."""
    return len(make_scheme(uniform_configurations({}, modules, grid_rates(attention, linear))).variants())


# --- the sweep ---------------------------------------------------------------------------------------------------


def read_rows(path):
    """The rows of the last run in a stats CSV; [] if it is not there."""
    return read_stats(path) if path.is_file() else []


class Sweep:
    def __init__(self, args, train_examples):
        self.args, self.folder, self.train_examples = args, Path(args.output), train_examples
        self.epoch_size = min(args.epoch_size, train_examples)  # of model level
        self.baselines = []  # the curves, by configuration
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = ["--device", args.device, *["--quiet"] * args.quiet]
        self.data = given(args, "tokenizer", "data", "max_length", "limit", "batch_size")

    def stage(self, script, *arguments):
        """Run a stage that reads the original model; returns its result."""
        return stage(script, "-m", self.args.model, *arguments, *self.common)

    def configure(self):
        """Write conf-N.json for every N, the first N of all configurations; returns the modules."""
        path = self.folder / "modules.json"
        rates = ["--attention", self.args.attention[0], "--linear", self.args.linear[0], "-n", 1]
        self.stage("config_generator.py", "-o", path, *rates, "--overwrite")
        content = read_json(path, "config_generator.py")
        configs = draw(content["modules"], max(self.args.counts), self.args.attention, self.args.linear, self.args.seed)
        for n in self.args.counts:
            write_json(self.folder / f"conf-{n}.json", content | {"configs": configs[:n]})
        return content["modules"]

    def prune(self, n, library, *more):
        """Prune the variants that N configurations need; returns what prune.py says."""
        files = ["-c", self.folder / f"scheme-{n}.json", "-o", self.folder / library]
        return self.stage("prune.py", *files, *more)

    def fine_tune_blocks(self, pruned, library, stats, *more):
        """Fine-tune a pruned library's variants; returns the rows of the stats CSV."""
        files = ["-p", self.folder / pruned, "-o", self.folder / library, "--stats", stats]
        self.stage("block-level_finetuning.py", *files, *self.data, "--seed", self.args.seed, *more)
        return read_rows(stats)

    def fine_tune_model(self, name, library, n, nth, *more):
        """Fine-tune the nth configuration out of a library: its curve."""
        stats = self.folder / f"{name}-{nth}.csv"
        files = ["-p", self.folder / library, "-n", nth, "-c", self.folder / f"conf-{n}.json", "--stats", stats]
        files += ["-o", self.folder / f"{name}-{nth}.pth"]
        length = ["--epochs", self.args.epochs, "--epoch-size", self.args.epoch_size, "--seed", self.args.seed]
        self.stage("model-level_finetuning.py", *files, *length, *self.data, *shlex.split(self.args.model_args), *more)
        return read_curve(read_rows(stats))

    def run_baselines(self, n):
        """Fine-tune the pruned models of those of N configurations that are not there yet; returns the scheme.

        N has a pruned library of its own, else a rerun would fine-tune a later N's blocks for an earlier one.
        """
        path = self.folder / f"scheme-{n}.json"
        stage(SCHEME_BY, "-i", self.folder / f"conf-{n}.json", "-o", path, "--quiet")
        self.prune(n, f"pruned-{n}")
        scheme = read_scheme(path)
        for nth in range(len(self.baselines), n):
            curve = self.fine_tune_model("baseline", f"pruned-{n}", n, nth)
            self.baselines.append(curve)
            emit(figure="baseline", configuration=nth, mean_rates=scheme.requested[nth], **figures_of(curve))
        return scheme

    def compare(self, library, n, nth):
        """Fine-tune the nth configuration's composed model, until it is as good as the baseline's best."""
        baseline = self.baselines[nth]
        composed = self.fine_tune_model(
            library, library, n, nth, "--target-loss", min(loss for loss, _ in baseline), "--overwrite"
        )
        comparison = compare(baseline, composed)
        emit(figure="composed", library=library, configuration=nth, **figures_of(composed), **comparison)
        return comparison

    def joint(self, n, scheme):
        """The figure of N configurations whose blocks are trained together, in a library for them alone."""
        library = f"joint-{n}"
        stats = self.folder / f"{library}.csv"
        pruned, choosing = self.choose(n)
        wanted = self.args.joint_examples[n] or JOINT_EPOCHS * self.train_examples
        epochs, size = joint_epochs(wanted, self.train_examples)
        rows = self.fine_tune_blocks(
            pruned,
            library,
            stats,
            "--method",
            "joint",
            "-c",
            self.folder / f"conf-{n}.json",
            "--epochs",
            epochs,
            "--epoch-size",
            size,
            *shlex.split(self.args.joint_args.replace("{n}", str(n))),
        )
        if len(rows) < 2:  # epoch 0, and the closed form as epoch 1
            raise UserError(f"{stats}: does not hold the seconds of {library}; delete that folder, and run again")
        spent = read_seconds(stats)
        seconds = {"choosing": choosing, "closed_form": spent["closed form"], "joint": spent["training"]}
        # The composed models follow from the library: where it is another one than before, so are they.
        comparisons = [self.compare(library, n, nth) for nth in range(n)]
        gains, examples = gain(comparisons, sum(seconds.values())), (len(rows) - 2) * size
        return {
            "figure": "sweep",
            "configurations": n,
            "variants": len(scheme.variants()),
            "blocks_without_reuse": scheme.count_without_reuse(),
            "block_seconds": round(sum(seconds.values()), 3),
            "block_seconds_of": {name: round(each, 3) for name, each in seconds.items()},
            "reached_as_composed": sum(
                comparison["reached"] and not comparison["composed_epochs"] for comparison in comparisons
            ),
            "in_seconds": gains,
            "in_examples": in_examples(gains, self.epoch_size, examples),
            "not_in_examples": "the calibration passes of choosing and of the closed form",
        }

    def choose(self, n):
        """The pruned library that N's joint run starts from, by the criterion, and the seconds of choosing."""
        if self.args.criterion == DEFAULT:
            return f"pruned-{n}", 0.0
        library, path = f"chosen-{n}", self.folder / f"chosen-{n}.json"
        if not path.is_file():  # interrupted, or never begun: what is there was made in seconds that nobody knows
            shutil.rmtree(self.folder / library, ignore_errors=True)
        data = self.data if CRITERIA[self.args.criterion].needs_data else []
        made = self.prune(n, library, "--criterion", self.args.criterion, *data)
        if not made["skipped"]:
            write_json(path, {"seconds": made["seconds"]})
        return library, read_json(path, "benchmarks/composability.py")["seconds"]


def figures_of(curve):
    return {
        "val_loss": [None if loss == inf else loss for loss, _ in curve],
        "train_seconds": [round(spent, 3) for _, spent in curve],
    }


def projections(measured, wanted, grid):
    """The projected figures, out of that of the largest number that was measured.

    A further configuration is taken to cost the mean of those measured. The library has all variants of the grid, and
    costs as much more than the measured one as it has more variants.

    Args:
        wanted: numbers of configurations; those that are not larger are left out.
        grid: variants that there are in all.
    """
    n, best, growth = measured["configurations"], measured["in_seconds"], grid / measured["variants"]
    for configurations in sorted(set(wanted)):
        if configurations <= n:
            continue
        figure = {
            "figure": "sweep",
            "projected": True,
            "configurations": configurations,
            "variants": grid,
            "measured_configurations": n,
            "not_reached": best["not_reached"],
            "in_seconds": project(
                configurations, n, best["baseline_seconds"], measured["block_seconds"], best["composed_seconds"], growth
            ),
        }
        sums = measured["in_examples"]
        figure["in_examples"] = project(configurations, n, sums["baseline"], sums["joint"], sums["composed"], growth)
        yield figure


def run(args):
    check_flags(args)
    opened = open_study(args)
    train_examples = len(opened.split("train"))
    emit(
        figure="setting",
        model=args.model,
        parameters=sum(p.numel() for p in opened.loaded.model.parameters()),
        data=str(opened.source),
        train_examples=train_examples,
        seed=args.seed,
        attention=args.attention,
        linear=args.linear,
        epochs=args.epochs,
        epoch_size=args.epoch_size,
        criterion=args.criterion,
        joint_args=args.joint_args,
        model_args=args.model_args,
        seconds="of training; validation is counted nowhere",
        **machine(opened.runtime.device),
    )
    del opened
    sweep, figures = Sweep(args, train_examples), []
    modules = sweep.configure()
    for n in args.counts:
        scheme = sweep.run_baselines(n)
        figures.append(sweep.joint(n, scheme))
        emit(**figures[-1])
    grid = variants_in_grid(modules, args.attention, args.linear)
    for figure in projections(figures[-1], args.project, grid):
        emit(**figure)
    return {"figure": "done", "configurations": args.counts}


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
