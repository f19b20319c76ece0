"""The block-level stage: what its closed form costs, and what sharing passes is worth.

Figures, each over all variants of the given configurations, validation counted nowhere:

- teacher-passes: seconds of the closed form, solutions included, in plain passes of the original over the same data,
  without the output layer and the loss, and with them;
- reuse: all variants in one pass against a pass for each variant, for the closed form and for gradients;
- equal-error: seconds of gradients until their held-out error is as low as the closed form's (needs -m).

Without -m: a model of the study's size with random weights, and random tokens. That is for speed alone.
"""

import itertools
import sys
from statistics import fmean, median
from types import SimpleNamespace

import torch
from measure import SIZES, build_parser, emit, in_turn, machine, random_examples, random_model, ratio

from common.blocks.find import find_blocks, prunable_modules
from common.blocks.tensors import block_tensors, parameter_masks
from common.cli.flags import DATA, add_settings
from common.cli.launch import launch
from common.cli.open import open_study
from common.cli.values import int_between, rate
from common.composing.configurations import uniform_configurations
from common.composing.scheme import make_scheme
from common.data.batching import evaluation_batches, training_batches
from common.models.load import load_model
from common.pruning.closed_form.solve import reconstruct
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime, now, resolve_device
from common.runtime.errors import UserError
from common.runtime.progress import Talk
from common.runtime.settings import DataSettings, TrainingSettings
from common.training import loop as training
from common.training.block_level.teacher import BlockObjective, held_out_errors

RANDOM_LENGTHS = {"t5": 20, "distilbert": 128}  # mean tokens of a random example
RIDGE = 1e-3  # the script's default; so are the numbers in `Bench.recipe`
UNSAVED = SimpleNamespace(
    resume=lambda learners: ([], None), save=lambda learners, rows, within=None: None, is_due=lambda: False
)


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", help="folder or .pth; without it one of the study's size, with random weights")
    flags.add_argument("--model-type", choices=sorted(SIZES), default="t5", help="of the random model")
    for name, default in (("attention", [0.25, 0.5, 0.25]), ("linear", [0.3, 0.3, 0.5])):
        flags.add_argument(f"--{name}", type=rate, nargs="+", default=default, help="one for each configuration")
    flags.add_argument("--calibration", type=int_between(1), help="examples of the closed form (default: the family's)")
    flags.add_argument("--held-out", type=int_between(1), default=256, help="validation examples of the blocks' errors")
    flags.add_argument("--gradient-epochs", type=int_between(1), default=8, help="equal-error: epochs at most")
    flags.add_argument("--epoch-size", type=int_between(1), help="equal-error: examples an epoch (else calibration)")
    flags.add_argument("--reuse-examples", type=int_between(1), default=256, help="reuse: gradient epoch's examples")
    flags.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="the figures wanted")
    add_settings(flags, DataSettings, DATA, batch_size=32)
    return flags


class Bench:
    """A model, the variants of its blocks as {pair: Variant}, and the examples."""

    def __init__(self, args):
        self.args, self.device = args, resolve_device(args.device)
        loaded = (
            load_model(args.model, self.device) if args.model else random_model(args.model_type, args.seed, self.device)
        )
        self.loaded, self.model, self.blocks = loaded, loaded.model, find_blocks(loaded.model)
        rates = [{"attention": attention, "linear": linear} for attention, linear in zip(args.attention, args.linear)]
        scheme = make_scheme(uniform_configurations({}, prunable_modules(self.model), rates))
        self.variants = {}
        for pair in scheme.variants():
            block = self.blocks[pair.block]
            removed = scheme.blocks[pair.block][pair.variant]
            self.variants[pair], _ = prune_block(block, block_tensors(self.model, block), removed)
        count = args.calibration or loaded.study.calibration
        if args.model:
            opened = open_study(args)
            source = opened.source
            self.train, self.validation = opened.split("train"), opened.split("validation")
            self.held_out = self.validation.sample(args.held_out)
        else:
            source, length = "random tokens", RANDOM_LENGTHS[args.model_type]
            self.train = random_examples(loaded, max(count, args.reuse_examples), length, args.seed)
        self.calibration = self.train.sample(count)
        self.runtime = Runtime(self.device, args.batch_size, Talk(args.quiet))
        emit(
            figure="setting",
            model=str(loaded.path),
            parameters=sum(p.numel() for p in self.model.parameters()),
            data=str(source),
            calibration=len(self.calibration),
            variants=len(self.variants),
            rounds=args.rounds,
            attention=args.attention,
            linear=args.linear,
            batch_size=args.batch_size,
            **machine(self.device),
        )

    @torch.no_grad()
    def teacher_pass(self, run):
        for positions in evaluation_batches(self.calibration, self.args.batch_size):
            run(self.model, self.calibration.batch(positions, self.device))

    def closed_form(self, pairs):
        """{pair: tensors}, and the seconds that took."""
        started, variants = now(self.device), {pair: self.variants[pair] for pair in pairs}
        solved = reconstruct(self.model, variants, self.calibration, self.runtime, ridges=[RIDGE])
        return {pair: tensors for pair, (tensors,) in solved.items()}, now(self.device) - started

    def errors(self, solved):
        """{pair: (NMSE of the pruned weights, of what the script keeps: the better of these and of the solution)}."""
        both = {pair: [variant.tensors, solved[pair]] for pair, variant in self.variants.items()}
        errors = held_out_errors(self.model, self.blocks, both, self.held_out, self.runtime)
        return {pair: (before, min(before, after)) for pair, (before, after) in errors.items()}

    def recipe(self, epochs, epoch_size=None):
        return TrainingSettings(
            epochs=epochs,
            epoch_size=epoch_size,
            batch_size=self.args.batch_size,
            lr=self.loaded.rates("block", steps=0)[0],
            early_stop=2,
            seed=self.args.seed,
        )

    def learners(self, recipe, steps):
        return {
            pair: training.Learner(
                {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()},
                parameter_masks(block, keeps),
                recipe,
                steps,
            )
            for pair, (block, tensors, keeps) in self.variants.items()
        }

    def gradients(self, examples, recipe, target=0.0):
        """Train all variants, from the pruned weights until their mean held-out error is no higher than `target`.

        Returns:
            for every epoch, from the one before training on, {pair: NMSE of the best weights so far} and the seconds of
            training up to there.
        """
        learners, errors = self.learners(recipe, training.steps_of(examples, recipe)), []

        def on_epoch(rows):
            errors.append({pair: learner.best_loss for pair, learner in learners.items()})
            for learner in learners.values():
                learner.finished |= fmean(errors[-1].values()) <= target

        objective = BlockObjective(self.model, self.blocks, recipe)
        rows = training.fit(
            learners, objective, examples, self.held_out, recipe, self.runtime, UNSAVED, on_epoch=on_epoch
        )
        return errors, list(itertools.accumulate(row.train for row in rows))


# --- the figures -------------------------------------------------------------------------------------------------


def compared(bench, figure, ways, **more):
    """Two ways timed in turn, and the ratio of the first to the second."""
    seconds = in_turn(ways, bench.args.rounds, bench.device)
    return {"figure": figure, "seconds": medians(seconds), "ratio": ratio(*seconds.values()), **more}


def medians(seconds):
    return {way: round(median(each), 4) for way, each in seconds.items()}


def teacher_passes(bench):
    seconds = in_turn(
        {
            "closed form": lambda: bench.closed_form(bench.variants),
            "teacher pass": lambda: bench.teacher_pass(bench.loaded.family.run),
            "with its head and loss": lambda: bench.teacher_pass(lambda model, batch: model(**batch)),
        },
        bench.args.rounds,
        bench.device,
    )
    closed, blocks, model = seconds.values()
    return [
        {
            "figure": "closed form in teacher passes",
            "seconds": medians(seconds),
            "ratio": ratio(closed, blocks),
            "ratio_to_a_pass_with_head_and_loss": ratio(closed, model),
        }
    ]


def reuse(bench):
    examples = bench.train.sample(bench.args.reuse_examples)
    batches = training_batches(examples, bench.args.batch_size, bench.args.seed, epoch=1)
    learners = bench.learners(bench.recipe(1), 2 * len(batches) * (bench.args.rounds + 1))

    def epoch(active):
        objective = BlockObjective(bench.model, bench.blocks, bench.recipe(1))
        for positions in batches:
            batch = examples.batch(positions, bench.device)
            for pair, loss, *_ in objective.losses(batch, active, training=True):
                active[pair].step(loss)

    return [
        compared(
            bench,
            "reuse: closed form",
            {
                "a pass a variant": lambda: [bench.closed_form([pair]) for pair in bench.variants],
                "one pass": lambda: bench.closed_form(bench.variants),
            },
        ),
        compared(
            bench,
            "reuse: an epoch of gradients",
            {
                "a run a variant": lambda: [epoch({pair: learner}) for pair, learner in learners.items()],
                "one run": lambda: epoch(learners),
            },
            examples=len(examples),
        ),
    ]


def equal_error(bench):
    """On either side the error is that of the weights that the script would keep: the best on the held-out examples."""
    solved, first = bench.closed_form(bench.variants)
    pruned, closed = ({pair: pairs[n] for pair, pairs in bench.errors(solved).items()} for n in (0, 1))
    recipe = bench.recipe(bench.args.gradient_epochs, bench.args.epoch_size or len(bench.calibration))
    by_epoch, seconds = bench.gradients(bench.train, recipe, target=fmean(closed.values()))
    _, second = bench.closed_form(bench.variants)  # once more, should the machine have become slower or faster

    errors = {}
    for kinds in (("attention", "feed_forward"), ("attention",), ("feed_forward",)):
        pairs = [pair for pair, variant in bench.variants.items() if variant.block.kind in kinds]
        if pairs:
            curve = [fmean(epoch[pair] for pair in pairs) for epoch in by_epoch]
            goal = fmean(closed[pair] for pair in pairs)
            errors["all" if len(kinds) == 2 else kinds[0]] = {
                "variants": len(pairs),
                "pruned": fmean(pruned[pair] for pair in pairs),
                "closed_form": goal,
                "gradients_by_epoch": curve,
                "reached_in_epoch": first_at_most(curve, goal),
            }
    reached = errors["all"]["reached_in_epoch"]
    spent = seconds[-1 if reached is None else reached]
    return [
        {
            "figure": "gradients by closed form, seconds to equal held-out error",
            "held_out_nmse": errors,
            "seconds": {
                "closed form": [round(first, 3), round(second, 3)],
                "gradients_by_epoch": [round(each, 3) for each in seconds],
            },
            "examples_an_epoch": min(recipe.epoch_size, len(bench.train)),
            "epochs_at_most": recipe.epochs,
            "lr": recipe.lr,
            "ratio": round(spent / fmean([first, second]), 4),
            "reached": reached is not None,
            "ratio_is": "a lower bound: never reached" if reached is None else "measured",
        }
    ]


def first_at_most(curve, target):
    """The first position whose value is no higher than `target`, or None."""
    return next((position for position, value in enumerate(curve) if value <= target), None)


FIGURES = {"teacher-passes": teacher_passes, "reuse": reuse, "equal-error": equal_error}


def run(args):
    wanted = [name for name in FIGURES if name in args.only and (args.model or name in ("teacher-passes", "reuse"))]
    if not wanted:
        raise UserError(f"--only {' '.join(args.only)}: needs a trained model; give one with -m")
    bench = Bench(args)
    for name in wanted:
        *figures, last = FIGURES[name](bench)
        for each in figures if name == wanted[-1] else [*figures, last]:
            emit(**each)
    return last


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
