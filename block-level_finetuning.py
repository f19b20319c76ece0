#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library, once for all configurations.

Jointly (the default): the variants are trained all at once, within models that are composed of them at random, and the
rest of the model with them. Or apart: each against the original's block; one pass of the original serves all of them.
"""

import math
import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files import real
from common.records import digest

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
    cli.add_shard_flag(parser, "fine-tune the variants")
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
    joint.add_argument(
        "--together",
        action="store_true",
        help="train the variants that are there again, together with the new ones; without it they stay as they are, "
        "and the new ones are trained among them",
    )
    cli.add_whole_model_flags(joint)
    joint.add_argument(
        "--offload",
        action="store_true",
        help="keep on the device only those variants that a step trains, the others in the memory of the CPU",
    )
    parser.set_defaults(joint_flags=[action.dest for action in joint._group_actions])
    return parser


def run(args):
    check_flags(args)
    stats_file = args.stats or f"{Path(args.output)}{of_shard(args)}.csv"
    from common.blocks import find_blocks
    from common.composition import warn_of_missing
    from common.inputs import open_study, tracking_folder
    from common.library import PRUNED, Library
    from common.stats import BLOCK_COLUMNS, COMPOSITION_COLUMNS, check_stats

    tracking_folder(args, args.output)
    check_stats(stats_file)
    check_stats(beside(stats_file, "blocks"), BLOCK_COLUMNS)
    opened = open_study(args)
    loaded = opened.loaded
    args.method = args.method or loaded.study.method
    if args.method == "joint":
        cli.refuse_unused(args, ["shard"], "the variants of --method joint are tuned together; leave it out")
        check_stats(beside(stats_file, "compositions"), COMPOSITION_COLUMNS)
    else:
        cli.refuse_unused(args, args.joint_flags, "goes with --method joint")
    if args.epochs is None:
        args.epochs = JOINT_EPOCHS if args.method == "joint" else 1
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    warn_of_missing(pruned, loaded, args.configurations or "conf.json", opened.runtime.talk)
    train, validation = opened.split(args, "train"), opened.split(args, "validation")
    held_out = validation.sample(args.held_out or min(HELD_OUT, validation.count_of(HELD_OUT_TOKENS)))
    calibration = train.sample(args.calibration or loaded.study.calibration)
    tune = tune_jointly if args.method == "joint" else tune_apart
    result = tune(args, opened, find_blocks(loaded.model), pruned, train, held_out, calibration, stats_file)
    return {"output": args.output, **result}


def check_flags(args):
    """Make sure that the flags go together."""
    if real(args.library) == real(args.output):
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")


def settings_of(args, held_out, calibration, train, recipe):
    """What determines a variant's tensors, beside its pruned weights."""
    from common import closed_form
    from common.block_level import apart, joint

    settings = {"method": args.method, "held_out_examples": held_out.fingerprint()}
    if args.method != "train":
        settings["closed_form_version"] = closed_form.VERSION
        ridge = args.ridge if len(args.ridge) > 1 else args.ridge[0]  # the key of one is that of a number
        settings |= {"calibration_examples": calibration.fingerprint(), "ridge": ridge}
    if args.method != "reconstruct":
        settings |= {"joint_version": joint.VERSION} if args.method == "joint" else {"apart_version": apart.VERSION}
        settings |= {"training_examples": train.fingerprint(), **recipe.to_json()}
    return settings


def variants_of(library, blocks, pairs):
    """{pair: the library's variant of it}"""
    return {pair: library.read(blocks[pair.block], pair.variant) for pair in pairs}


# --- jointly -----------------------------------------------------------------------------------------------------


def tune_jointly(args, opened, blocks, pruned, train, held_out, calibration, stats_file):
    """Train all variants within composed models, and the rest of the model with them; returns the result."""
    from common.block_level import JointObjective, Supernet, sample_compositions, solve
    from common.checkpoints import RUN_DIGITS
    from common.devices import give_back_memory
    from common.inputs import open_tracking, quality_from, recipe_from
    from common.library import TOGETHER
    from common.stats import seconds_of, write_composition_stats, write_stats, write_variant_stats
    from common.training import NEVER_A_NUMBER, Measure, Progress, fit, steps_of, validate

    loaded, runtime = opened.loaded, opened.runtime
    configurations = choices_of(args, loaded)
    library = open_library(args, opened, TOGETHER)
    study = loaded.study
    recipe = recipe_from(
        args,
        loaded.learning_rate("joint"),
        distill=args.distill,
        dropout=study.dropout if args.dropout is None else args.dropout,
    )
    rest_rate = study.joint_rest_rate if args.rest_rate is None else args.rest_rate
    quality = quality_from(args, opened, held_out)
    settings = settings_of(args, held_out, calibration, train, recipe) | {"rest_rate": rest_rate}
    settings |= quality.to_json() if quality else {}
    made_from = {pair: {"pruned": pruned.entry(pair)["key"], **settings} for pair in pruned.variants()}
    todo = runtime.processes.agree(missing(args, library, made_from))
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune together, {skipped} are there already")
    if not todo:
        runs = {library.run(pair)[:RUN_DIGITS] for pair in made_from}
        return nothing_to_do(args, skipped, stats_file, runs)

    there = [pair for pair in library.variants() if pair not in todo]
    run = run_of(library, todo, there)
    new, old = variants_of(pruned, blocks, todo), variants_of(library, blocks, there)
    rest = library.read_rest() if there else None  # what they were trained with
    trains_rest = not there and rest_rate > 0
    supernet = Supernet(loaded.model, blocks, new, old, rest, offload_from=runtime.device if args.offload else None)
    if trains_rest:
        library.check_rest(supernet.rest)
    learner = supernet.make_learner(recipe, steps_of(train, recipe), rest_rate if trains_rest else 0.0)
    compositions = sample_compositions(configurations, todo, supernet.tensors, recipe.seed)
    objective = JointObjective(supernet, recipe, compositions, loaded.model, **runtime.layers())
    learners, progress = {"library": learner}, Progress()
    checkpoint = open_checkpoint(args, run, {"library": run}, runtime.talk, runtime.processes)
    of_run = run[:RUN_DIGITS]
    tracking = open_tracking(args, args.output, stats_file, of_run, recipe, train, runtime)

    def mean_quality(after_batch=lambda: None):
        found = []
        for choice in compositions.values():
            supernet.compose(choice)
            found.append(quality.of(supernet.model, after_batch))
        return sum(found) / len(found)

    def write_losses(progress):
        if not runtime.processes.is_first:
            return
        write_stats(stats_file, {"library": learner.history}, progress, of_run, quality and quality.metric)
        write_composition_stats(beside(stats_file, "compositions"), learner.history, of_run)
        tracking.tell()

    if not checkpoint.holds_training():
        before = validate(learners, objective, held_out, recipe, runtime)
        if not math.isfinite(before.losses["library"]):
            raise UserError(NEVER_A_NUMBER)
        metric = mean_quality() if quality else None
        learner.count_as_epoch(0, before.losses["library"], 0.0, before.parts["library"], metric)
        on_device = {pair: variant.to(runtime.device) for pair, variant in new.items()}
        solved = solve(on_device, loaded.model, blocks, calibration, held_out, args.ridge, runtime, checkpoint)
        supernet.start_from(solved.better())
        after = validate(learners, objective, held_out, recipe, runtime)
        metric = mean_quality() if quality else None
        learner.count_as_epoch(1, after.losses["library"], solved.rows[-1].train, after.parts["library"], metric)
        progress.rows, checkpoint.notes["most_pruned"] = solved.rows, solved.most_pruned
        if runtime.processes.is_first:
            write_variant_stats(beside(stats_file, "blocks"), solved.histories(), of_run)
        write_losses(progress)
        del solved, on_device
        give_back_memory()  # of all the solutions, before the optimizer needs as much and more
    progress = fit(
        learners,
        objective,
        train,
        held_out,
        recipe,
        runtime,
        checkpoint,
        rows=progress.rows,
        measure=Measure(quality.metric, mean_quality) if quality else None,
        on_epoch=write_losses,
    )
    tracking.close()
    if runtime.processes.is_first:
        library.write_together(
            {pair: new[pair]._replace(tensors=supernet.tensors[pair]) for pair in todo},
            {pair: own | {"run": run} for pair, own in todo.items()},
            supernet.rest if trains_rest else {},
            settings | {"run": run},
        )
    checkpoint.remove()
    before, after = learner.history[0].val_loss, learner.best_loss
    runtime.talk.say(
        f"{args.output}: mean loss of {len(compositions)} composed models {before:.4f} -> {after:.4f} "
        f"(epoch {learner.best_epoch})"
    )
    return {
        "fine_tuned": len(todo),
        "skipped": skipped,
        "rest": "trained" if trains_rest else "kept",
        "val_loss_before": before,
        "val_loss": after,
        "best_epoch": learner.best_epoch,
        **({f"val_{quality.metric}": learner.best_metric} if quality else {}),
        "compositions": next(row.parts for row in learner.history if row.epoch == learner.best_epoch),
        **checkpoint.notes,
        "seconds": seconds_of(stats_file, {of_run}),
        "stats": stats_file,
    }


def missing(args, library, made_from):
    """The variants to train, {pair: what each is made from}.

    A variant that is there stays, whatever it was trained together with; with --together, only if that was the same.
    """
    together = run_of(library, made_from, [pair for pair in library.variants() if pair not in made_from])
    todo = {}
    for pair, own in made_from.items():
        run = library.run(pair)
        is_there = library.has(pair, own | {"run": run}, args.overwrite)
        if not is_there or (args.together and run != together):
            todo[pair] = own
    return todo if library.rest_is_intact() else made_from


def run_of(library, todo, there):
    """What identifies a joint run: all that is trained in it, and what that is trained among, as a digest."""
    trained = {str(pair): own for pair, own in todo.items()}
    among = {str(pair): library.entry(pair)["key"] for pair in there}
    return digest([trained, among])


def choices_of(args, loaded):
    """The configurations to measure quality on, {block: variant} each; [] where there is no conf.json."""
    from common.composition import check_model
    from common.configurations import read_configurations
    from common.scheme import make_scheme

    path = args.configurations or "conf.json"
    if args.configurations is None and not Path(path).exists():
        return []
    configurations = read_configurations(path)
    if args.configurations is not None:
        check_model(configurations.model, loaded, path)
    elif configurations.model != loaded.identity:
        return []
    return make_scheme(configurations).configs


# --- apart -------------------------------------------------------------------------------------------------------


def tune_apart(args, opened, blocks, pruned, train, held_out, calibration, stats_file):
    """Solve or train every variant against the original's block; returns the result."""
    from common.block_level import Apart, Course, portions_of
    from common.checkpoints import RUN_DIGITS
    from common.inputs import open_tracking, recipe_from
    from common.library import FINE_TUNED
    from common.scheme import by_block
    from common.stats import seconds_of, write_stats, write_variant_stats

    loaded, runtime, processes = opened.loaded, opened.runtime, opened.runtime.processes
    pairs = pruned.variants()
    if args.shard:
        number, count = args.shard
        pairs = [pair for each in list(by_block(pairs).values())[number::count] for pair in each]
    library = open_library(args, opened, FINE_TUNED)
    recipe = recipe_from(args, loaded.learning_rate("block"))
    settings = settings_of(args, held_out, calibration, train, recipe)
    made_from = {pair: {"pruned": pruned.entry(pair)["key"], **settings} for pair in pairs}
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]
    todo = processes.agree(todo)
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    key = digest({str(pair): settings for pair, settings in made_from.items()})
    run = key[:RUN_DIGITS]
    if not todo:
        return nothing_to_do(args, skipped, stats_file, {run})

    keys = {pair: digest(made_from[pair]) for pair in todo}
    checkpoint = open_checkpoint(args, key, keys, runtime.talk, processes)
    portions = portions_of(pairs, blocks)
    course = Course(pairs, portions, todo, checkpoint)
    tracking = open_tracking(args, args.output, stats_file, run, recipe, train, runtime)

    def write_losses(histories, progress):
        write_stats(stats_file, histories, progress, run)
        write_variant_stats(beside(stats_file, "blocks"), histories, run)

    tuning = Apart(
        method=args.method,
        teacher=loaded.model,
        blocks=blocks,
        pruned=pruned,
        library=library,
        made_from=made_from,
        train=train,
        calibration=calibration,
        held_out=held_out,
        ridges=args.ridge,
        recipe=recipe,
        runtime=runtime,
        checkpoint=checkpoint,
        course=course,
        write_stats=write_losses,
        # Of several portions the figures of an epoch are known when all are done.
        after_epoch=tracking.tell if len(course) == 1 else lambda: None,
    )
    for portion in course:
        if len(course) > 1 and portion.todo:
            runtime.talk.say(f"portion {portion.number} of {len(course)}: {len(portion.todo)} variants")
        tuning.tune(portion)
    tracking.close()  # of a closed form alone, the trackers are told now: its seconds are known
    checkpoint.remove()
    histories = course.histories({})
    at_first = [rows[0].val_loss for rows in histories.values()]
    least = {pair: min(row.val_loss for row in rows) for pair, rows in histories.items()} | tuning.errors
    nmse_before, nmse_after = sum(at_first) / len(at_first), sum(least.values()) / len(least)
    runtime.talk.say(f"{args.output}: mean held-out error {nmse_before:.4f} -> {nmse_after:.4f}")
    return {
        "fine_tuned": len(todo),
        "skipped": skipped,
        "nmse_before": nmse_before,
        "nmse_after": nmse_after,
        **({"most_pruned": checkpoint.notes["most_pruned"]} if args.method != "train" else {}),
        "seconds": seconds_of(stats_file, {run}),
        "stats": stats_file,
    }


def of_shard(args):
    """What tells a shard's own files from those of the others; "" without one."""
    return "-shard-{}-of-{}".format(*args.shard) if args.shard else ""


def open_library(args, opened, stage):
    """The library to write to. The first process starts it, the others wait for that."""
    from common.library import Library

    loaded, processes = opened.loaded, opened.runtime.processes
    if processes.is_first:
        library = Library.open_or_create(args.output, NAME, loaded.identity, stage)
    processes.agree(None)
    return library if processes.is_first else Library.open(args.output, loaded.identity["fingerprint"], stage)


def open_checkpoint(args, key, keys, talk, processes):
    """The state of an unfinished run for the library; see `checkpoints.Checkpoint`."""
    from common.checkpoints import Checkpoint

    return Checkpoint(
        Path(args.output) / f"unfinished{of_shard(args)}", key, keys, 60 * args.save_every, talk, processes
    )


def nothing_to_do(args, skipped, stats_file, runs):
    """The result where all variants are there; `runs`: those that made them, as the stats know them."""
    from common.checkpoints import remove_checkpoints
    from common.stats import seconds_of

    remove_checkpoints(Path(args.output) / f"unfinished{of_shard(args)}")
    return {"fine_tuned": 0, "skipped": skipped, "seconds": seconds_of(stats_file, {*runs, ""})}


def beside(stats, what):
    """stats.csv -> stats-WHAT.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
