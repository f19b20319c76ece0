#!/usr/bin/env python3
"""Fine-tune the composed model of one configuration, its removed weights held at zero (or taken out, --compact).

With the pruned library this is the baseline, with the fine-tuned library the composed run; nothing else differs.
"""

import argparse
import copy
import sys
from pathlib import Path

from common import cli
from common.records import check_writable, digest, is_done, make_record


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    cli.add_library_flags(parser, library_help="the pruned library (baseline) or the fine-tuned one (composed)")
    parser.add_argument("-o", "--output", required=True, help="the fine-tuned model: .pth, or a folder")
    cli.add_output_flags(parser)
    cli.add_data_flags(parser, batch_size=32)
    cli.add_training_flags(parser, epochs=3, early_stop=0)
    parser.add_argument(
        "--distill",
        type=cli.fraction,
        default=0.0,
        metavar="ALPHA",
        help="share of the original's predictions in the training loss (0: the labels alone)",
    )
    parser.add_argument(
        "--dropout",
        action=argparse.BooleanOptionalAction,
        help="train with the model's own dropout or without; by default as it suits the model family",
    )
    parser.add_argument(
        "--target-loss", type=cli.positive_number, help="stop as soon as the validation loss is no higher than this"
    )
    return parser


def run(args):
    talk = cli.Talk(args.quiet)
    check_writable(args.output, is_file=args.output.endswith(".pth"))
    form = cli.output_form(args)
    from common import stats, training
    from common.checkpoints import Checkpoint
    from common.compact import make_compact
    from common.composition import compose, select_variants, variant_keys
    from common.data import load_examples
    from common.evaluation import parameter_counts
    from common.library import Library
    from common.models import (
        data_source,
        load_model,
        load_tokenizer,
        read_record,
        reference,
        resolve_device,
        save_model,
    )

    stats.check_stats(args.stats)
    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    chosen = select_variants(loaded, args.configurations, args.nth)
    library = Library.open(args.library, loaded.identity["fingerprint"])
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
    recipe = training.recipe_from(
        args,
        loaded.family.model_lr,
        target_loss=args.target_loss,
        distill=args.distill,
        dropout=loaded.family.dropout if args.dropout is None else args.dropout,
    )
    identity = loaded.identity
    key = digest(
        [
            identity["fingerprint"],
            variant_keys(library, chosen),
            recipe.to_json(),
            train.fingerprint(),
            validation.fingerprint(),
            *form,
        ]
    )
    record = read_record(args.output)
    if is_done(args.output, record, key, args.overwrite) and Path(args.stats).exists():
        talk.say(f"{args.output}: is there already, made from the same inputs and settings")
        return {"output": args.output, "configuration": args.nth, "skipped": True, **record["measured"]}

    model = loaded.model
    teacher = copy.deepcopy(model).requires_grad_(False) if recipe.distill else None
    masks = compose(model, chosen, library)
    if args.compact:
        model, masks = make_compact(model, masks)
    learner = training.Learner(dict(model.named_parameters()), masks, recipe, training.steps_of(train, recipe))
    learners = {"model": learner}
    checkpoint = Checkpoint(f"{args.output}.checkpoint", {"model": key})
    progress = training.fit(
        learners,
        training.model_batch(model, teacher, recipe.distill, recipe.dropout),
        train,
        validation,
        recipe,
        device=device,
        talk=talk,
        checkpoint=checkpoint,
        on_epoch=lambda progress: stats.write_stats(args.stats, learners, progress),
    )
    measured = {
        "val_loss_before": learner.history[0][2],
        "val_loss": learner.best_loss,
        "best_epoch": learner.best_epoch,
        "epochs": progress.epoch,
        **parameter_counts(model),
    }
    original = identity | {"model": reference(args.model, args.output)}
    record = make_record(
        "model-level_finetuning.py",
        key,
        original=original,
        variants=chosen,
        recipe=recipe.to_json(),
        library_stage=library.record["stage"],
        measured=measured,
        data=reference(source, args.output),
        tokenizer=reference(tokenizer.name_or_path, args.output),
    )
    save_model(args.output, model.eval(), record, masks=masks, tokenizer=tokenizer, sparse=args.sparse)
    checkpoint.remove()
    talk.say(
        f"{args.output}: validation loss {measured['val_loss_before']:.4f} -> {measured['val_loss']:.4f} "
        f"(epoch {measured['best_epoch']})"
    )
    return {
        "output": args.output,
        "configuration": args.nth,
        "skipped": False,
        **measured,
        "seconds": round(progress.seconds, 3),
        "stats": args.stats,
    }


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
