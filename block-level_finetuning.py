#!/usr/bin/env python3
"""Fine-tune every variant of a pruned library against the original's blocks, all variants in one teacher pass a batch."""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.records import check_writable, digest


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    parser.add_argument("-p", "--library", required=True, help="the pruned library")
    parser.add_argument("-o", "--output", required=True, metavar="LIBRARY", help="folder of the fine-tuned library")
    parser.add_argument("--method", choices=["train"], default="train",
                        help="train: gradient descent on the error of the block's output")
    cli.add_data_flags(parser, batch_size=32)
    cli.add_training_flags(parser, epochs=3, early_stop=2)
    return parser


def run(args):
    talk = cli.Talk(args.quiet)
    if Path(args.library).resolve() == Path(args.output).resolve():
        raise UserError("-o: is the pruned library itself, which the baseline needs; choose another folder")
    check_writable(args.stats)
    from common import training
    from common.architectures import find_blocks
    from common.data import load_examples
    from common.library import FINE_TUNED, PRUNED, Library
    from common.masking import parameter_masks
    from common.models import data_source, load_model, load_tokenizer, resolve_device

    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    pruned = Library.open(args.library, loaded.identity["fingerprint"], PRUNED)
    blocks = find_blocks(loaded.model)
    library = Library.open_or_create(args.output, "block-level_finetuning.py", loaded.identity, FINE_TUNED)
    tokenizer, source = load_tokenizer(args.tokenizer, loaded), data_source(args.data, loaded)
    train, validation = (load_examples(source, split, tokenizer, loaded.family, max_length=args.max_length,
                                       limit=args.limit) for split in ("train", "validation"))
    recipe = training.recipe_from(args, loaded.family.block_lr)
    made_from = [args.method, recipe.to_json(), train.fingerprint(), validation.fingerprint()]
    keys = {pair: digest([pruned.entry(*pair)["key"], *made_from]) for pair in pruned.variants()}
    todo = [pair for pair, key in keys.items() if not library.has(*pair, key, args.overwrite)]
    skipped = len(keys) - len(todo)
    talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    if not todo:
        return {"output": args.output, "fine_tuned": 0, "skipped": skipped, "seconds": 0.0}

    learners, keeps = {}, {}
    for name, variant in todo:
        tensors, keeps[name, variant] = pruned.read(blocks[name], variant)
        parameters = {key: tensor.to(device).requires_grad_() for key, tensor in tensors.items()}
        masks = parameter_masks(blocks[name], keeps[name, variant])
        learners[name, variant] = training.Learner(parameters, masks, recipe, training.steps_of(train, recipe))
    checkpoint = training.Checkpoint(Path(args.output) / "unfinished.checkpoint", {pair: keys[pair] for pair in todo})

    def write_stats(progress):
        training.write_stats(args.stats, learners, progress)
        training.write_variant_stats(per_variant_path(args.stats), learners)

    def write_variant(pair, learner):
        name, variant = pair
        library.write(blocks[name], variant, learner.parameters, keeps[pair], keys[pair], method=args.method,
                      nmse_before=learner.history[0][2], nmse_after=learner.best_loss, best_epoch=learner.best_epoch)

    progress = training.fit(learners, training.block_batch(loaded.model, loaded.family, blocks), train, validation,
                            recipe, device=device, talk=talk, checkpoint=checkpoint, on_epoch=write_stats,
                            on_finished=write_variant)
    checkpoint.remove()
    before, after = (sum(values) / len(learners) for values in zip(
        *((learner.history[0][2], learner.best_loss) for learner in learners.values())))
    talk.say(f"{args.output}: mean held-out error {before:.4f} -> {after:.4f}")
    return {"output": args.output, "fine_tuned": len(todo), "skipped": skipped, "nmse_before": before,
            "nmse_after": after, "seconds": round(progress.seconds, 3), "stats": args.stats}


def per_variant_path(stats):
    """stats.csv -> stats-blocks.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-blocks{path.suffix}")


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
