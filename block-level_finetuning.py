#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library, once for all configurations.

Jointly (the default): the variants are trained all at once, within models that are composed of them at random, and the
rest of the model with them. Or apart: each against the original's block; one pass of the original serves all of them.
"""

import sys
from pathlib import Path

from common.cli import flags as cli
from common.runtime.errors import UserError
from common.runtime.files import real

NAME = "block-level_finetuning.py"  # in records
HELD_OUT, HELD_OUT_TOKENS = 256, 8192  # examples at most, and what they hold, about
JOINT_EPOCHS = 2  # by default; one for the other methods


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=True,
        example="block-level_finetuning.py --method reconstruct --calibration 2000",
        next_stage="compose_model.py, or model-level_finetuning.py",
        shared=True,
    )
    cli.add_model_flag(parser)
    parser.add_argument("-p", "--library", default=cli.PRUNED_LIBRARY, help="the pruned library")
    parser.add_argument(
        "-o", "--output", default=cli.FINE_TUNED_LIBRARY, metavar="LIBRARY", help="folder of the fine-tuned library"
    )
    parser.add_argument(
        "--method",
        choices=["joint", "reconstruct", "train", "both"],
        help="joint: gradient descent on the model's loss, from the closed form's solutions, all variants together; "
        "reconstruct: the closed form alone, which solves the kept weights; train: gradient descent on the error of "
        "the block's output; both: the same from the closed form's solution. Without it what suits the model: joint "
        "for translation, reconstruct for classification",
    )
    parser.add_argument(
        "--calibration",
        type=cli.positive,
        help="training examples that the closed form is solved on; without it the model family's own",
    )
    parser.add_argument(
        "--held-out",
        type=cli.positive,
        help="validation examples that the error of every variant is measured on; without it as many as have "
        f"{HELD_OUT_TOKENS} tokens, {HELD_OUT} at most",
    )
    parser.add_argument(
        "--ridge",
        type=cli.non_negative_number,
        nargs="+",
        default=[1e-3],
        help="the closed form's pull towards the pruned weights, relative to the mean of diag H; of several, the one "
        "that each variant's held-out error is least with",
    )
    cli.add_data_flags(parser, batch_size=32)
    cli.add_training_flags(parser, epochs=None, early_stop=2, stats="the library's name and .csv")
    joint = parser.add_argument_group("joint fine-tuning", "flags of --method joint")
    joint.add_argument(
        "-c",
        "--configurations",
        metavar="CONF",
        help="conf.json: its configurations are those that quality is measured on; without it ./conf.json, if there is "
        "one",
    )
    cli.add_whole_model_flags(joint)
    parser.set_defaults(joint_flags=[action.dest for action in joint._group_actions])
    return parser


def run(args):
    if real(args.library) == real(args.output):
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    stats_file = args.stats or f"{Path(args.output)}.csv"
    from common.blocks.find import find_blocks
    from common.cli.open import open_study, open_tracking, recipe_from, tracking_folder
    from common.composing.compose import warn_of_missing
    from common.composing.library import FINE_TUNED, PRUNED, TOGETHER, Library
    from common.training import block_level

    tracking_folder(args, args.output)
    block_level.check_stats_files(stats_file)
    opened = open_study(args)
    loaded, runtime, study = opened.loaded, opened.runtime, opened.loaded.study
    is_joint = (args.method or study.method) == "joint"
    if is_joint:
        block_level.check_stats_files(stats_file, is_joint)
    else:
        cli.refuse_unused(args, args.joint_flags, "goes with --method joint")
    args.epochs = args.epochs or (JOINT_EPOCHS if is_joint else 1)
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    library_stage = TOGETHER if is_joint else FINE_TUNED
    train, validation = opened.split(args, "train"), opened.split(args, "validation")
    held_out = validation.sample(args.held_out or min(HELD_OUT, validation.count_of(HELD_OUT_TOKENS)))
    configurations = block_level.read_configurations_of(loaded, args.configurations) if is_joint else []
    of_joint = {"distill": args.distill, "dropout": study.dropout if args.dropout is None else args.dropout}
    recipe = recipe_from(args, loaded.learning_rate("joint" if is_joint else "block"), **(of_joint if is_joint else {}))
    warn_of_missing(pruned, loaded, args.configurations or "conf.json", runtime.talk)
    stage = block_level.BlockStage(
        method=args.method or study.method,
        original=loaded.model,
        blocks=find_blocks(loaded.model),
        pruned=pruned,
        library=Library.open_shared(args.output, NAME, loaded.identity, library_stage, runtime.processes),
        train=train,
        calibration=train.sample(args.calibration or study.calibration),
        held_out=held_out,
        ridges=args.ridge,
        recipe=recipe,
        runtime=runtime,
        overwrite=args.overwrite,
        stats_file=stats_file,
        unfinished=Path(args.output) / "unfinished",
        open_tracking=lambda run: open_tracking(args, args.output, stats_file, run, recipe, train, runtime),
    )
    if is_joint:
        shared_rate = study.joint_shared_rate if args.shared_rate is None else args.shared_rate
        result = block_level.tune_jointly(stage, configurations, shared_rate=shared_rate)
    else:
        result = block_level.tune_apart(stage)
    return {"output": args.output, **result}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
