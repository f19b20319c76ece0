#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library against the original's blocks.

One pass of the original a batch serves all variants.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.records import digest

HELD_OUT, HELD_OUT_TOKENS = 256, 8192  # examples at most, and what they hold, about


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
        "--in-sequence",
        nargs=2,
        metavar=("CONF", "N"),
        help="solve the N-th configuration's variants alone (--method reconstruct), each on what the blocks before it "
        "really produce; taken only if the composed model then diverges less from the original on held-out data. The "
        "library fits no other configuration",
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
    cli.add_training_flags(parser, epochs=1, early_stop=2, stats="the library's name and .csv")
    return parser


def run(args):
    if Path(args.library).resolve() == Path(args.output).resolve():
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    if args.in_sequence:
        if "method" in args.given and args.method != "reconstruct":
            raise UserError(f"--method {args.method}: --in-sequence is for --method reconstruct, which it implies")
        args.method = "reconstruct"
        if len(args.ridge) > 1:
            raise UserError("--ridge: several go without --in-sequence, which takes one")
        if not args.in_sequence[1].isdecimal():
            raise UserError(f"--in-sequence: {args.in_sequence[1]!r} is not a whole number from 0 up")
    stats_file = args.stats or f"{Path(args.output)}.csv"
    from common import training
    from common.blocks import find_blocks
    from common.checkpoints import Checkpoint
    from common.composition import choose
    from common.inputs import open_study, recipe_from
    from common.library import FINE_TUNED, IN_SEQUENCE, PRUNED, Library
    from common.schemes import Pair
    from common.stats import check_stats, write_stats, write_variant_stats
    from common.teacher import BlockObjective

    check_stats(stats_file)
    opened = open_study(args)
    loaded, runtime = opened.loaded, opened.runtime
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    pairs = pruned.variants()
    if args.in_sequence:
        conf, number = args.in_sequence
        (choice,) = choose(loaded, [args.library], conf, [int(number)])
        pairs = [Pair(*item) for item in choice.variants.items()]
    stage = IN_SEQUENCE if args.in_sequence else FINE_TUNED
    library = Library.open_or_create(args.output, "block-level_finetuning.py", loaded.identity, stage)
    if args.in_sequence and not set(library.variants()) <= set(pairs):
        raise UserError(f"{args.output}: was solved in sequence for another configuration; choose another folder")
    blocks = find_blocks(loaded.model)
    train, validation = opened.split(args, "train"), opened.split(args, "validation")
    validation = validation.sample(args.held_out or min(HELD_OUT, validation.count_of(HELD_OUT_TOKENS)))
    calibration = train.sample(args.calibration or loaded.study.calibration)
    recipe = recipe_from(args, loaded.study.block_lr * 128 / loaded.model.config.hidden_size)

    closed_form, gradients = args.method in ("reconstruct", "both"), args.method in ("train", "both")
    settings = {"method": args.method, "held_out_examples": validation.fingerprint()}
    if closed_form:
        ridge = args.ridge if len(args.ridge) > 1 else args.ridge[0]  # the key of one is that of a number
        settings |= {"calibration_examples": calibration.fingerprint(), "ridge": ridge}
    if gradients:
        settings |= {"training_examples": train.fingerprint(), **recipe.to_json()}
    if args.in_sequence:  # each variant's tensors depend on all the others
        made_from = dict.fromkeys(pairs, {"in_sequence": choice.keys(), **settings})
    else:
        made_from = {pair: {"pruned": pruned.entry(pair)["key"], **settings} for pair in pairs}
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]
    if todo and args.in_sequence:
        todo = pairs
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
            **notes.get(pair, {}),
        )

    notes = {}  # for the record, {pair: {…}}: how a variant was solved, where there was a choice
    found, seconds = {}, 0.0  # what was found out about composed models, and the seconds of solving in sequence
    progress = training.Progress()
    if closed_form and checkpoint.read() is None:
        progress.rows, ridges, found["most_pruned"] = solve(
            learners, variants, loaded.model, blocks, calibration, validation, args.ridge, runtime
        )
        if len(args.ridge) > 1:
            notes = {pair: {"ridge": ridge} for pair, ridge in ridges.items()}
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
        for learner in learners.values():
            learner.restore_best()
        if args.in_sequence:
            started = runtime.now()
            compared = solve_in_sequence(
                learners,
                pruned,
                loaded.model,
                blocks,
                calibration,
                validation,
                args.ridge[0],
                runtime,
                independent=found["most_pruned"]["solved"]["kl"],  # the configuration has one variant of each block
            )
            notes, found = dict.fromkeys(pairs, compared), found | compared
            seconds = runtime.now() - started
        for pair, learner in learners.items():
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
        **found,
        "seconds": round(progress.seconds + seconds, 3),
        "stats": stats_file,
    }


def make_learner(variant, recipe, train, device):
    """A learner of a variant's tensors, its removed weights held at zero."""
    from common.masking import parameter_masks
    from common.training import Learner, steps_of

    parameters = {name: tensor.to(device).requires_grad_() for name, tensor in variant.tensors.items()}
    return Learner(parameters, parameter_masks(variant.block, variant.keeps), recipe, steps_of(train, recipe))


def solve(learners, variants, teacher, blocks, calibration, validation, ridges, runtime):
    """Give every learner its closed-form solution, unless its held-out error is worse.

    Returns:
        the seconds so far; {pair: the ridge that its error is least with}; and of the model of each block's most pruned
        variant {"pruned", "solved": {"loss", "kl"}}.
    """
    from common.blocks import Variant
    from common.closed_form import reconstruct_with_each, too_few
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
    shortage = too_few(teacher, [variant.block for variant in own.values()], calibration)
    if shortage:
        runtime.talk.say(f"few examples to solve on: {shortage}; give more with --calibration")
    started = runtime.now()
    solved = reconstruct_with_each(teacher, own, calibration, runtime, ridges=ridges)
    finished = runtime.now()
    candidates = {pair: [variant.tensors, *solved[pair]] for pair, variant in own.items()}
    errors = held_out_errors(teacher, blocks, candidates, validation, runtime)
    best = {pair: min(range(len(each)), key=each.__getitem__) for pair, each in errors.items()}
    model = measure_most_pruned(own, candidates, best, teacher, blocks, validation, runtime)
    chosen = {}
    for pair, (before, *after) in errors.items():
        least = min(range(len(after)), key=after.__getitem__)
        chosen[pair] = ridges[least]
        learners[pair].restart_from(solved[pair][least], before, after[least], (finished - started) / len(learners))
        is_left_out = not any(bool(keep.any()) for keep in own[pair].keeps.values())  # nothing was there to solve
        if after[least] >= before and not is_left_out:
            runtime.talk.say(f"{pair}: the closed form is no better on held-out data; the pruned weights stay")
    before, after = (sum(each) / len(errors) for each in zip(*((each[0], min(each[1:])) for each in errors.values())))
    runtime.talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
    rows = [EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, finished - started, runtime.now() - finished)]
    return rows, chosen, model


def measure_most_pruned(own, candidates, best, teacher, blocks, examples, runtime):
    """Whether solving blocks one by one helps a model composed of them: measured for each block's most pruned variant.

    Args:
        candidates: {pair: [pruned tensors, solutions …]}; `best`: {pair: which of them has the least error}.
    Returns:
        {"pruned", "solved": {"loss", "kl"}} of the two models on the held-out examples.
    """
    from common.search import score_composed

    most = {}
    for pair in sorted(own, key=lambda pair: sum(int(keep.sum()) for keep in own[pair].keeps.values()), reverse=True):
        most[pair.block] = pair  # the last of a block keeps least
    before = {pair.block: candidates[pair][0] for pair in most.values()}
    after = {pair.block: candidates[pair][best[pair]] for pair in most.values()}
    found = {
        name: score_composed(teacher, blocks, tensors, examples, runtime)
        for name, tensors in (("pruned", before), ("solved", after))
    }
    losses = {name: scores["loss"] for name, scores in found.items()}
    if losses["solved"] > losses["pruned"]:
        runtime.talk.say(
            f"the model of the most pruned variants has a higher loss with the solutions ({losses['solved']:.4f}) than "
            f"without them ({losses['pruned']:.4f}), though its blocks' errors fell: give more examples with "
            "--calibration, or a larger --ridge"
        )
    return found


def solve_in_sequence(learners, pruned, teacher, blocks, calibration, validation, ridge, runtime, independent):
    """Give the learners the solutions in sequence, if the model of these diverges less from the teacher.

    Args:
        independent: KL(teacher || model) of the model of their solutions so far, on the held-out examples.
    Returns:
        {"kl": {"independent", "in_sequence": KL(teacher || model) on the held-out examples}, "taken": one of the two}.
    """
    from common.blocks import Variant
    from common.closed_form import reconstruct_in_sequence
    from common.search import score_composed
    from common.teacher import held_out_errors

    def on_device(tensors):
        return {name: tensor.to(runtime.device) for name, tensor in tensors.items()}

    variants = {}  # read again: the learners' tensors, which were solved in place, may be those read before
    for pair in learners:
        block, tensors, keeps = pruned.read(blocks[pair.block], pair.variant)
        variants[pair] = Variant(block, on_device(tensors), on_device(keeps))
    solved = reconstruct_in_sequence(teacher, variants, calibration, runtime, ridge=ridge)
    by_block = {pair.block: tensors for pair, tensors in solved.items()}
    in_sequence = score_composed(teacher, blocks, by_block, validation, runtime)["kl"]
    kl = {"independent": independent, "in_sequence": in_sequence}
    taken = "in_sequence" if kl["in_sequence"] < kl["independent"] else "independent"
    runtime.talk.say(
        f"held-out divergence of the model: {kl['independent']:.4f} solved independently, "
        f"{kl['in_sequence']:.4f} in sequence; taken: {taken.replace('_', ' ')}"
    )
    if taken == "in_sequence":
        errors = held_out_errors(teacher, blocks, {pair: [solved[pair]] for pair in learners}, validation, runtime)
        for pair, learner in learners.items():
            learner.parameters, learner.best_epoch, (learner.best_loss,) = solved[pair], 1, errors[pair]
    return {"kl": kl, "taken": taken}


def per_variant_path(stats):
    """stats.csv -> stats-blocks.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-blocks{path.suffix}")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
