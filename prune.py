#!/usr/bin/env python3
"""Prune every variant of a scheme once, into a library of .npy module files."""

import sys

from common import cli, schemes

SALIENCY = "l1"  # an entry of masking.SALIENCIES; part of every variant's key


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=True,
        example="prune.py -c conf_prune.json -o modules-pruned",
        next_stage="block-level_finetuning.py",
    )
    cli.add_model_flag(parser)
    parser.add_argument("-c", "--scheme", default="conf_prune.json", help="the scheme file")
    parser.add_argument(
        "-o", "--output", default=cli.PRUNED_LIBRARY, metavar="LIBRARY", help="folder of the pruned library"
    )
    return parser


def run(args):
    scheme = schemes.read_scheme(args.scheme)
    from common.blocks import block_tensors, find_blocks
    from common.composition import check_model, check_variant
    from common.inputs import open_model
    from common.library import PRUNED, Library

    opened = open_model(args)
    loaded, talk = opened.loaded, opened.runtime.talk
    check_model(scheme.model, loaded, args.scheme)
    blocks = find_blocks(loaded.model)
    tensors = {name: block_tensors(loaded.model, block) for name, block in blocks.items()}
    made_from = {}
    for pair in scheme.variants():
        removed = scheme.blocks[pair.block][pair.variant]
        check_variant(f"{args.scheme}: {pair.block}", blocks.get(pair.block), tensors.get(pair.block), removed)
        made_from[pair] = {
            "model": loaded.identity["fingerprint"],
            "block": pair.block,
            "removed": removed,
            "saliency": SALIENCY,
        }
    library = Library.open_or_create(args.output, "prune.py", loaded.identity, PRUNED)
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]

    for pair in talk.progress(todo, "pruning"):
        prune_one(library, pair, blocks[pair.block], tensors[pair.block], made_from[pair])
    skipped = len(made_from) - len(todo)
    talk.say(f"{args.output}: pruned {len(todo)} variants, {skipped} were there already")
    sparsity = []
    for i, (config, requested) in enumerate(zip(scheme.configs, scheme.requested)):
        measured = measure(library, config, blocks, tensors)
        sparsity.append({kind: {"requested": requested[kind], "measured": measured[kind]} for kind in requested})
        sparsity[-1]["linear"]["measured_in_all"] = measured["linear in all"]
        talk.say(
            f"configuration {i}: "
            + "; ".join(
                f"{kind}: requested {rate:.4f}, measured {measured[kind]:.4f}" for kind, rate in requested.items()
            )
            + f" ({measured['linear in all']:.4f} with those of removed heads and neurons)"
        )
    return {"output": args.output, "pruned": len(todo), "skipped": skipped, "configurations": sparsity}


def prune_one(library, pair, block, tensors, made_from):
    """Prune a variant, and write it with the counts of what was removed, measured on its masks."""
    from common.masking import SALIENCIES, prune_block

    variant, by_rate = prune_block(block, tensors, made_from["removed"], SALIENCIES[made_from["saliency"]])
    library.write(
        pair.variant,
        variant,
        made_from,
        heads_removed=count_heads_removed(block, variant.keeps),
        neurons_removed=count_neurons_removed(block, variant.keeps),
        weights_removed_by_rate=by_rate,
        weights_removed={linear: int((~keep).sum()) for linear, keep in variant.keeps.items()},
    )


def measure(library, config, blocks, tensors):
    """The fractions that a configuration's variants really remove, counted on their masks when they were made.

    Returns:
        {"attention": of the heads, "feed_forward": of the neurons, "linear": of the Linears' weights by their own
        rates, "linear in all": the same with the out-projections' columns of removed heads and all of removed neurons}.
    """
    removed, total = dict.fromkeys(("attention", "feed_forward", "linear", "linear in all"), 0), {}
    for name, variant in config.items():
        block = blocks[name]
        linears = block.linears[-1:] if block.kind == "attention" else block.linears
        weights = sum(tensors[name][f"{linear}.weight"].numel() for linear in linears)
        for kind, size in (("attention", block.heads), ("feed_forward", block.neurons), ("linear", weights)):
            total[kind] = total.get(kind, 0) + size
        if variant != schemes.DENSE:
            entry = library.entry(schemes.Pair(name, variant))
            removed["attention"] += entry["heads_removed"]
            removed["feed_forward"] += entry.get("neurons_removed", 0)  # absent in libraries of before there were any
            removed["linear"] += sum(entry["weights_removed_by_rate"].values())
            removed["linear in all"] += sum(entry["weights_removed"][linear] for linear in linears)
    return {kind: round(count / max(total[kind.removesuffix(" in all")], 1), 6) for kind, count in removed.items()}


def count_heads_removed(block, keeps):
    """How many heads of a block have lost all their rows of q; these lie one head after the other."""
    return int((~keeps[block.linears[0]].reshape(block.heads, -1)).all(dim=1).sum()) if block.heads else 0


def count_neurons_removed(block, keeps):
    """How many neurons of a block have lost all weights, those that come in and those that go out."""
    if not block.neurons:
        return 0
    *inner, out = block.linears
    kept = keeps[out].any(dim=0)
    for linear in inner:
        kept = kept | keeps[linear].any(dim=1)
    return int((~kept).sum())


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
