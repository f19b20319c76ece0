#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library against the original's blocks.

One pass of the original a batch serves all variants.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.records import digest


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=True,
        example="block-level_finetuning.py --method reconstruct --calibration 2000",
        next_stage="compose_model.py, or model-level_finetuning.py",
    )
    cli.add_model_flag(parser)
    parser.add_argument("-p", "--library", default=cli.PRUNED_LIBRARY, help="the pruned library")
    parser.add_argument(
        "-o", "--output", default=cli.FINE_TUNED_LIBRARY, metavar="LIBRARY", help="folder of the fine-tuned library"
    )
    parser.add_argument(
        "--method",
        choices=["reconstruct", "train", "both"],
        default="both",
        help="reconstruct: solve the kept weights in closed form; train: gradient descent on the error "
        "of the block's output; both: gradient descent from the closed form's solution",
    )
    parser.add_argument(
        "--calibration",
        type=cli.positive,
        help="training examples that the closed form is solved on; without it the model family's own",
    )
    parser.add_argument(
        "--held-out",
        type=cli.positive,
        default=256,
        help="validation examples that the error of every variant is measured on",
    )
    parser.add_argument(
        "--ridge",
        type=cli.non_negative_number,
        default=1e-3,
        help="the closed form's pull towards the pruned weights, relative to the mean of diag H",
    )
    cli.add_data_flags(parser, batch_size=32)
    cli.add_training_flags(parser, epochs=1, early_stop=2, stats="the library's name and .csv")
    return parser


def run(args):
    if Path(args.library).resolve() == Path(args.output).resolve():
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    stats_file = args.stats or f"{Path(args.output)}.csv"
    from common import training
    from common.blocks import find_blocks
    from common.checkpoints import Checkpoint
    from common.inputs import open_study, recipe_from
    from common.library import FINE_TUNED, PRUNED, Library
    from common.stats import check_stats, write_stats, write_variant_stats
    from common.teacher import BlockObjective

    check_stats(stats_file)
    opened = open_study(args)
    loaded, runtime = opened.loaded, opened.runtime
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    library = Library.open_or_create(args.output, "block-level_finetuning.py", loaded.identity, FINE_TUNED)
    blocks = find_blocks(loaded.model)
    train, validation = opened.split(args, "train"), opened.split(args, "validation").sample(args.held_out)
    calibration = train.sample(args.calibration or loaded.study.calibration)
    recipe = recipe_from(args, loaded.study.block_lr * 128 / loaded.model.config.hidden_size)

    closed_form, gradients = args.method in ("reconstruct", "both"), args.method in ("train", "both")
    settings = {"method": args.method, "held_out_examples": validation.fingerprint()}
    if closed_form:
        settings |= {"calibration_examples": calibration.fingerprint(), "ridge": args.ridge}
    if gradients:
        settings |= {"training_examples": train.fingerprint(), **recipe.to_json()}
    made_from = {pair: {"pruned": pruned.entry(pair)["key"], **settings} for pair in pruned.variants()}
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    if not todo:
        return {"output": args.output, "fine_tuned": 0, "skipped": skipped, "seconds": 0.0}

    variants = {pair: pruned.read(blocks[pair.block], pair.variant) for pair in todo}
    learners = {pair: make_learner(variant, recipe, train, runtime.device) for pair, variant in variants.items()}
    checkpoint = Checkpoint(
        Path(args.output) / "unfinished.checkpoint", {pair: digest(made_from[pair]) for pair in todo}
    )

    def write_losses(progress):
        write_stats(stats_file, learners, progress)
        write_variant_stats(per_variant_path(stats_file), learners)

    def write_variant(pair, learner):
        library.write(
            pair.variant,
            variants[pair]._replace(tensors=learner.parameters),
            made_from[pair],
            nmse_before=learner.history[0].val_loss,
            nmse_after=learner.best_loss,
            best_epoch=learner.best_epoch,
        )

    progress = training.Progress()
    if closed_form and checkpoint.read() is None:
        progress.rows = solve(learners, variants, loaded.model, blocks, calibration, validation, args.ridge, runtime)
        write_losses(progress)
    if gradients:
        objective = BlockObjective(loaded.model, blocks, recipe)
        progress = training.fit(
            learners,
            objective,
            train,
            validation,
            recipe,
            runtime,
            checkpoint,
            rows=progress.rows,
            on_epoch=write_losses,
            on_finished=write_variant,
        )
    else:
        for pair, learner in learners.items():
            learner.restore_best()
            write_variant(pair, learner)
    checkpoint.remove()
    before = sum(learner.history[0].val_loss for learner in learners.values()) / len(learners)
    after = sum(learner.best_loss for learner in learners.values()) / len(learners)
    runtime.talk.say(f"{args.output}: mean held-out error {before:.4f} -> {after:.4f}")
    return {
        "output": args.output,
        "fine_tuned": len(todo),
        "skipped": skipped,
        "nmse_before": before,
        "nmse_after": after,
        "seconds": round(progress.seconds, 3),
        "stats": stats_file,
    }


def make_learner(variant, recipe, train, device):
    """A learner of a variant's tensors, its removed weights held at zero."""
    from common.masking import parameter_masks
    from common.training import Learner, steps_of

    parameters = {name: tensor.to(device).requires_grad_() for name, tensor in variant.tensors.items()}
    return Learner(parameters, parameter_masks(variant.block, variant.keeps), recipe, steps_of(train, recipe))


def solve(learners, variants, teacher, blocks, calibration, validation, ridge, runtime):
    """Give every learner its closed-form solution, unless its held-out error is worse; returns the seconds so far."""
    from common.blocks import Variant
    from common.closed_form import reconstruct
    from common.teacher import held_out_errors
    from common.training import EpochSeconds

    own = {
        pair: Variant(
            variant.block,
            {name: parameter.detach() for name, parameter in learners[pair].parameters.items()},
            {name: keep.to(runtime.device) for name, keep in variant.keeps.items()},
        )
        for pair, variant in variants.items()
    }
    started = runtime.now()
    solved = reconstruct(teacher, own, calibration, runtime, ridge=ridge)
    finished = runtime.now()
    candidates = {pair: [variant.tensors, solved[pair]] for pair, variant in own.items()}
    errors = held_out_errors(teacher, blocks, candidates, validation, runtime)
    for pair, (before, after) in errors.items():
        learners[pair].restart_from(solved[pair], before, after, (finished - started) / len(learners))
        if after >= before:
            runtime.talk.say(f"{pair}: the closed form is no better on held-out data; the pruned weights stay")
    before, after = (sum(values) / len(errors) for values in zip(*errors.values()))
    runtime.talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
    return [EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, finished - started, runtime.now() - finished)]


def per_variant_path(stats):
    """stats.csv -> stats-blocks.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-blocks{path.suffix}")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
