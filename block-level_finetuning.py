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
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    parser.add_argument("-p", "--library", required=True, help="the pruned library")
    parser.add_argument("-o", "--output", required=True, metavar="LIBRARY", help="folder of the fine-tuned library")
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
    cli.add_training_flags(parser, epochs=1, early_stop=2)
    return parser


def run(args):
    talk = cli.Talk(args.quiet)
    if Path(args.library).resolve() == Path(args.output).resolve():
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    from common import stats, training
    from common.architectures import block_learning_rate, find_blocks
    from common.checkpoints import Checkpoint
    from common.data import load_examples
    from common.library import FINE_TUNED, PRUNED, Library
    from common.masking import parameter_masks
    from common.models import data_source, load_model, load_tokenizer, resolve_device

    stats.check_stats(args.stats)
    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    blocks = find_blocks(loaded.model)
    library = Library.open_or_create(args.output, "block-level_finetuning.py", loaded.identity, FINE_TUNED)
    tokenizer, source = load_tokenizer(args.tokenizer, loaded), data_source(args.data, loaded)
    train, validation = (
        load_examples(
            source,
            split,
            tokenizer,
            loaded.family,
            classes=loaded.model.config.num_labels,
            max_length=args.max_length,
            limit=args.limit,
        )
        for split in ("train", "validation")
    )
    validation = validation.sample(args.held_out)
    calibration = train.sample(args.calibration or loaded.family.calibration)
    recipe = training.recipe_from(args, block_learning_rate(loaded.model))
    closed_form, gradients = args.method in ("reconstruct", "both"), args.method in ("train", "both")
    made_from = [
        args.method,
        closed_form and [calibration.fingerprint(), args.ridge],
        gradients and [train.fingerprint(), recipe.to_json()],
        validation.fingerprint(),
    ]
    keys = {pair: digest([pruned.entry(*pair)["key"], *made_from]) for pair in pruned.variants()}
    todo = [pair for pair, key in keys.items() if not library.has(*pair, key, args.overwrite)]
    skipped = len(keys) - len(todo)
    talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    if not todo:
        return {"output": args.output, "fine_tuned": 0, "skipped": skipped, "seconds": 0.0}

    variants = {pair: (blocks[pair[0]], *pruned.read(blocks[pair[0]], pair[1])) for pair in todo}
    learners = {}
    for pair, (block, tensors, keeps) in variants.items():
        parameters = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        learners[pair] = training.Learner(
            parameters, parameter_masks(block, keeps), recipe, training.steps_of(train, recipe)
        )
    checkpoint = Checkpoint(Path(args.output) / "unfinished.checkpoint", {pair: keys[pair] for pair in todo})

    def write_stats(progress):
        stats.write_stats(args.stats, learners, progress)
        stats.write_variant_stats(per_variant_path(args.stats), learners)

    def write_variant(pair, learner):
        name, variant = pair
        library.write(
            blocks[name],
            variant,
            learner.parameters,
            variants[pair][2],
            keys[pair],
            method=args.method,
            nmse_before=learner.history[0][2],
            nmse_after=learner.best_loss,
            best_epoch=learner.best_epoch,
        )

    rows = []
    if closed_form and checkpoint.read() is None:
        rows = solve(learners, variants, loaded, calibration, validation, args, device, talk)
        write_stats(training.Progress(rows))
    if gradients:
        progress = training.fit(
            learners,
            training.block_batch(loaded.model, loaded.family, blocks),
            train,
            validation,
            recipe,
            device=device,
            talk=talk,
            checkpoint=checkpoint,
            rows=rows,
            on_epoch=write_stats,
            on_finished=write_variant,
        )
    else:
        progress = training.Progress(rows)
        for pair, learner in learners.items():
            write_variant(pair, learner)
    checkpoint.remove()
    before, after = (
        sum(values) / len(learners)
        for values in zip(*((learner.history[0][2], learner.best_loss) for learner in learners.values()))
    )
    talk.say(f"{args.output}: mean held-out error {before:.4f} -> {after:.4f}")
    return {
        "output": args.output,
        "fine_tuned": len(todo),
        "skipped": skipped,
        "nmse_before": before,
        "nmse_after": after,
        "seconds": round(progress.seconds, 3),
        "stats": args.stats,
    }


def solve(learners, variants, loaded, calibration, validation, args, device, talk):
    """Give every learner its closed-form solution, unless its held-out error is worse; returns the stats rows."""
    from common.models import now
    from common.reconstruction import held_out_errors, reconstruct

    options = dict(batch_size=args.batch_size, device=device, talk=talk)
    variants = {
        pair: (
            block,
            {name: parameter.detach() for name, parameter in learners[pair].parameters.items()},
            {name: keep.to(device) for name, keep in keeps.items()},
        )
        for pair, (block, _, keeps) in variants.items()
    }
    started = now(device)
    solved = reconstruct(loaded.model, loaded.family, variants, calibration, ridge=args.ridge, **options)
    finished = now(device)
    candidates = {pair: [tensors, solved[pair]] for pair, (_, tensors, _) in variants.items()}
    errors = held_out_errors(loaded.model, loaded.family, variants, candidates, validation, **options)
    for pair, (before, after) in errors.items():
        learners[pair].restart_from(solved[pair], before, after, (finished - started) / len(learners))
        if after >= before:
            talk.say(f"{'.'.join(pair)}: the closed form is no better on held-out data; the pruned weights stay")
    before, after = (sum(values) / len(errors) for values in zip(*errors.values()))
    talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
    return [(0, 0.0, 0.0), (1, finished - started, now(device) - finished)]


def per_variant_path(stats):
    """stats.csv -> stats-blocks.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-blocks{path.suffix}")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
