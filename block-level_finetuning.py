#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library, once for all configurations.

Jointly (the default for text to text): the variants are trained all at once, within models that are composed of them at
random, and the shared parameters with them. Or apart: each against the original's block; one pass of the original
serves all of them.
"""

import sys
from pathlib import Path

from common.cli.flags import (
    DATA,
    FINE_TUNED_LIBRARY,
    OUTPUT,
    PRUNED_LIBRARY,
    TRACKING,
    TRAINING,
    Parser,
    add_compute,
    add_model,
    add_seed,
    add_settings,
    flags_given,
    refuse_unused,
    settings_from,
)
from common.cli.launch import launch
from common.cli.paths import check_inputs
from common.runtime.errors import UserError
from common.runtime.files import real
from common.runtime.settings import CalibrationSettings, TrackingSettings, TrainingDataSettings, TrainingSettings

NAME = "block-level_finetuning.py"  # in records
HELD_OUT, HELD_OUT_TOKENS = 256, 8192  # examples at most, and what they hold, about
JOINT_FLAGS = ["configurations", "shared_rate", "distill", "accumulate"]
JOINT_EPOCHS = 2  # by default; one for the other methods
APART_EARLY_STOP = 2  # by default; a joint loss may rise half way, and be the better for it at the end
JOINT_DISTILL = 0.5  # by default: at equal seconds as good as labels alone in short runs, and better in long ones


def build_parser():
    parser = Parser(
        __doc__,
        example="block-level_finetuning.py --method reconstruct --calibration 2000",
        next_stage="compose_model.py, or model-level_finetuning.py",
        overwrite=True,
        shared=True,
        planned=True,
    )
    add_model(parser)
    group = parser.group(OUTPUT)
    group.add_argument("-p", "--library", default=PRUNED_LIBRARY, help="the pruned library")
    group.add_argument(
        "-o", "--output", default=FINE_TUNED_LIBRARY, metavar="LIBRARY", help="folder of the fine-tuned library"
    )
    group.add_argument(
        "--method",
        choices=["joint", "reconstruct", "train", "both"],
        help="joint: gradient descent on the model's loss, from the closed form's solutions, all variants together; "
        "reconstruct: the closed form alone, which solves the kept weights; train: gradient descent on the error of "
        "the block's output; both: the same from the closed form's solution. Without it what suits the model: joint "
        "for translation and summarization, reconstruct for classification",
    )
    group.add_argument(
        "-c",
        "--configurations",
        metavar="CONF",
        help="the configurations (conf.json) that joint fine-tuning is validated on; without it ./conf.json, if there "
        "is one",
    )
    add_settings(parser, CalibrationSettings, "closed form")
    add_settings(parser, TrainingDataSettings, DATA)
    add_settings(parser, TrainingSettings, TRAINING, early_stop=None)
    add_seed(parser)
    add_compute(parser)
    add_settings(parser, TrackingSettings, TRACKING)
    return parser


def run(args):
    if real(args.library) == real(args.output):
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    check_inputs(args)
    stats_file = args.stats or f"{Path(args.output)}.csv"
    from common.blocks.find import find_blocks
    from common.cli.open import open_study, open_tracking, training_settings
    from common.composing.compose import warn_of_missing
    from common.composing.library import FINE_TUNED, PRUNED, TOGETHER, Library
    from common.training.block_level.apart import tune_apart
    from common.training.block_level.jointly import read_configurations_of, tune_jointly
    from common.training.block_level.stage import BlockStage, check_stats_files
    from common.training.tracking import check_trackers

    check_trackers(args.track, args.output)
    check_stats_files(stats_file)
    opened = open_study(args)
    loaded, runtime, study = opened.loaded, opened.runtime, opened.loaded.study
    method = args.method or study.method
    is_joint = method == "joint"
    if args.epochs is None:
        args.epochs = JOINT_EPOCHS if is_joint else 1
    if args.early_stop is None:
        args.early_stop = 0 if is_joint else APART_EARLY_STOP
    if is_joint:
        configurations = read_configurations_of(loaded, args.configurations)
    else:
        refuse_unused(args, JOINT_FLAGS, "goes with --method joint")
    if method != "reconstruct":
        refuse_unused(args, ["rounds"], "goes with --method reconstruct")
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    warn_of_missing(pruned, loaded, args.configurations or "conf.json", runtime.talk)
    train, validation = opened.split("train"), opened.split("validation")
    start, distill = ("tuned", JOINT_DISTILL) if is_joint else ("block", 0.0)
    recipe = training_settings(args, loaded, start, train, distill)
    calibration = settings_from(args, CalibrationSettings)
    held_out = calibration.held_out or min(HELD_OUT, validation.count_of(HELD_OUT_TOKENS))
    library = Library.open_shared(
        args.output, NAME, loaded.identity, TOGETHER if is_joint else FINE_TUNED, runtime.processes, args.overwrite
    )
    library.flags = flags_given(args)
    stage = BlockStage(
        method=method,
        original=loaded.model,
        blocks=find_blocks(loaded.model),
        pruned=pruned,
        library=library,
        train=train,
        calibration=train.sample(calibration.calibration or study.calibration),
        held_out=validation.sample(held_out),
        ridges=calibration.ridge,
        rounds=calibration.rounds,
        recipe=recipe,
        runtime=runtime,
        overwrite=args.overwrite,
        stats_file=stats_file,
        open_tracking=lambda run: open_tracking(args, args.output, stats_file, run, recipe, train, runtime),
    )
    if is_joint:
        result = tune_jointly(stage, configurations)
    else:
        result = tune_apart(stage)
    return {"output": args.output, **result}


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
