#!/usr/bin/env python3
"""Prune every variant of a scheme once, into a library of .npy module files."""

import sys

from common import cli, schemes

BY_MAGNITUDE, BY_RECONSTRUCTION = CRITERIA = ("l1", "reconstruction")


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=True,
        example="prune.py -c conf_prune.json -o modules-pruned --criterion reconstruction",
        next_stage="block-level_finetuning.py",
    )
    cli.add_model_flag(parser)
    parser.add_argument("-c", "--scheme", default="conf_prune.json", help="the scheme file")
    parser.add_argument(
        "-o", "--output", default=cli.PRUNED_LIBRARY, metavar="LIBRARY", help="folder of the pruned library"
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default=BY_MAGNITUDE,
        help="what goes: l1: what is smallest; reconstruction: what the block's output on training examples loses "
        "least by, once the closed form has solved what is left",
    )
    for kind, parts in (("attention", "heads"), ("feed-forward", "neurons"), ("linear", "single weights")):
        parser.add_argument(f"--{kind}-criterion", choices=CRITERIA, help=f"the same for {parts} alone")
    cli.add_calibration_flags(parser)
    return parser


def run(args):
    scheme = schemes.read_scheme(args.scheme)
    criteria = {
        "attention": args.attention_criterion or args.criterion,
        "feed_forward": args.feed_forward_criterion or args.criterion,
        "linear": args.linear_criterion or args.criterion,
    }
    reads_data = set(criteria.values()) != {BY_MAGNITUDE}
    if not reads_data:
        cli.refuse_unused(args, args.calibration_flags, "l1 reads no data; it goes with another criterion")
    from common.blocks import block_tensors, find_blocks
    from common.composition import check_model, check_variant
    from common.inputs import open_model, open_study
    from common.library import PRUNED, Library

    opened = open_study(args) if reads_data else open_model(args)
    loaded, talk = opened.loaded, opened.runtime.talk
    check_model(scheme.model, loaded, args.scheme)
    blocks = find_blocks(loaded.model)
    tensors = {name: block_tensors(loaded.model, block) for name, block in blocks.items()}
    calibration = examples = None
    if reads_data:
        calibration = opened.split(args, "train").sample(args.calibration or loaded.study.calibration)
        examples = calibration.fingerprint()
    made_from = {}
    for pair in scheme.variants():
        removed = scheme.blocks[pair.block][pair.variant]
        check_variant(f"{args.scheme}: {pair.block}", blocks.get(pair.block), tensors.get(pair.block), removed)
        made_from[pair] = {
            "model": loaded.identity["fingerprint"],
            "block": pair.block,
            "removed": removed,
            **chosen_by(removed, criteria, examples),
        }
    library = Library.open_or_create(args.output, "prune.py", loaded.identity, PRUNED)
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]

    started = opened.runtime.now()
    reading = {pair.block for pair in todo if "calibration_examples" in made_from[pair]}
    for pair in talk.progress([pair for pair in todo if pair.block not in reading], "pruning"):
        prune_one(library, pair, blocks[pair.block], tensors[pair.block], made_from[pair])
    if reading:
        pairs = [pair for pair in todo if pair.block in reading]
        prune_by_data(library, pairs, made_from, criteria, opened, calibration)
    skipped, seconds = len(made_from) - len(todo), round(opened.runtime.now() - started, 3)
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
    return {
        "output": args.output,
        "pruned": len(todo),
        "skipped": skipped,
        "seconds": seconds,
        "configurations": sparsity,
    }


def chosen_by(removed, criteria, examples):
    """How a variant's parts are chosen, for its key: only what has a part in it.

    Args:
        removed: the counts, see `schemes.Scheme`.
        criteria: {kind of parts: criterion's name}.
        examples: the calibration examples' fingerprint.
    """
    parts = {
        "attention": removed["heads"],
        "feed_forward": removed.get("neurons", 0),
        "linear": any(removed["weights"].values()),
    }
    names = {kind: criteria[kind] for kind, count in parts.items() if count}
    if set(names.values()) <= {BY_MAGNITUDE}:
        return {"saliency": BY_MAGNITUDE}  # as it is called in the keys of libraries that are older than the choice
    return {"criteria": names, "calibration_examples": examples}


def prune_by_data(library, pairs, made_from, criteria, opened, calibration):
    """Prune variants by what is found out about their blocks in a pass of the model over the data."""
    from common.blocks import block_tensors, find_blocks
    from common.closed_form import Reconstruction, statistics
    from common.masking import L1

    model, of_block = opened.loaded.model, schemes.by_block(pairs)
    blocks = [block for name, block in find_blocks(model).items() if name in of_block]
    for block, found in statistics(model, blocks, calibration, opened.runtime, values=False):
        own = block_tensors(model, block)
        ways = {BY_MAGNITUDE: L1(block, own), BY_RECONSTRUCTION: Reconstruction(model, block, own, found)}
        for pair in of_block[block.name]:
            prune_one(library, pair, block, own, made_from[pair], {kind: ways[name] for kind, name in criteria.items()})


def prune_one(library, pair, block, tensors, made_from, criteria=None):
    """Prune a variant, and write it with the counts of what was removed, measured on its masks."""
    from common.masking import prune_block

    variant, by_rate = prune_block(block, tensors, made_from["removed"], criteria)
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
