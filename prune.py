#!/usr/bin/env python3
"""Prune every variant of a scheme once, into a library of .npy module files."""

import sys

from common.cli.flags import (
    DATA,
    OUTPUT,
    PRUNED_LIBRARY,
    Parser,
    add_compute,
    add_model,
    add_settings,
    flags_given,
    flags_of,
    refuse_unused,
)
from common.cli.launch import launch
from common.cli.paths import the_model
from common.composing.configurations import SIZES
from common.composing.scheme import DENSE, Pair, by_block, check_current, read_scheme
from common.pruning import criteria
from common.pruning.criteria import CRITERIA, criterion_class
from common.runtime.settings import CalibrationSettings, DataSettings

DATA_FLAGS = ["calibration", *flags_of(DataSettings)]


def build_parser():
    parser = Parser(
        __doc__,
        example="prune.py -c conf_prune.json -o modules-pruned --criterion reconstruction",
        next_stage="block-level_finetuning.py",
        overwrite=True,
        planned=True,
    )
    add_model(parser)
    group = parser.group(OUTPUT)
    group.add_argument("-c", "--scheme", default="conf_prune.json", help="the scheme (conf_prune.json)")
    group.add_argument("-o", "--output", default=PRUNED_LIBRARY, metavar="LIBRARY", help="folder of the pruned library")
    group = parser.group("criterion")
    group.add_argument(
        "--criterion",
        choices=CRITERIA,
        default=criteria.DEFAULT,
        help="what is removed: " + "; ".join(f"{name}: {entry.help}" for name, entry in CRITERIA.items()),
    )
    for kind, parts in (("attention", "heads"), ("feed-forward", "neurons"), ("linear", "single weights")):
        group.add_argument(f"--{kind}-criterion", choices=CRITERIA, help=f"the same for {parts} alone")
    group.add_argument(
        "--plain-heads",
        action="store_true",
        help="let the self-attentions of a T5's stack lose the same heads: with as many gone everywhere, and as many "
        "neurons, --compact then gives a model of an ordinary class, see docs/how-it-works.md",
    )
    add_settings(parser, CalibrationSettings, DATA, omit=("held_out", "ridge", "rounds"))
    add_settings(parser, DataSettings, DATA)
    add_compute(parser, omit=("precision", "accumulate"))
    return parser


def run(args):
    scheme = read_scheme(args.scheme)
    check_current(scheme, args.scheme)
    names = {kind: getattr(args, f"{kind}_criterion") or args.criterion for kind in SIZES}
    needs_data = any(CRITERIA[name].needs_data for name in names.values())
    if not needs_data:
        refuse_unused(args, DATA_FLAGS, f"{args.criterion} reads no data; it goes with another criterion")
    the_model(args.model)
    from common.blocks.find import find_blocks
    from common.blocks.tensors import block_tensors
    from common.cli.open import open_model, open_study
    from common.composing.compose import check_counts, check_model
    from common.composing.library import PRUNED, Library
    from common.pruning.closed_form import statistics
    from common.pruning.stacks import rank, stacks_of

    opened = open_study(args) if needs_data else open_model(args)
    loaded, talk = opened.loaded, opened.runtime.talk
    check_model(scheme.model, loaded, args.scheme)
    blocks = find_blocks(loaded.model)
    check_counts(scheme, blocks, args.scheme)
    tensors = {name: block_tensors(loaded.model, block) for name, block in blocks.items()}
    calibration = examples = None
    if needs_data:
        calibration = opened.split("train").sample(args.calibration or loaded.study.calibration)
        examples = calibration.fingerprint()
    stacks = stacks_of(loaded.model) if args.plain_heads else []
    ranked_together = {name for stack in stacks for name in stack}
    made_from = {}
    for pair in scheme.variants():
        removed = scheme.blocks[pair.block][pair.variant]
        made_from[pair] = {
            "model": loaded.identity["fingerprint"],
            "block": pair.block,
            "removed": removed,
            **chosen_by(removed, names, examples),
            **({"heads_ranked_over": "stack"} if removed["heads"] and pair.block in ranked_together else {}),
        }
    library = Library.open_or_create(args.output, "prune.py", loaded.identity, PRUNED, args.overwrite)
    library.flags = flags_given(args)
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, args.overwrite)]

    library.expect(blocks, todo)
    started = opened.runtime.now()
    pairs_of, ranked = by_block(todo), {}
    if any("heads_ranked_over" in made_from[pair] for pair in todo):
        together = [blocks[name] for stack in stacks for name in stack]
        sums = ((block, None) for block in together)
        if CRITERIA[names["attention"]].needs_data:
            settings = {"values": False, "label": "ranking heads", "are_all_needed": True}
            sums = statistics(loaded.model, together, calibration, opened.runtime, **settings)
        ranked = rank(stacks, names["attention"], tensors, sums)
    need_data = {pair.block for pair in todo if "calibration_examples" in made_from[pair]}
    for name in talk.progress([name for name in pairs_of if name not in need_data], "pruning"):
        prune_variants(library, pairs_of[name], blocks[name], tensors[name], made_from, ranked, talk)
    if need_data:
        reading = [block for name, block in blocks.items() if name in need_data]
        for block, sums in statistics(
            loaded.model, reading, calibration, opened.runtime, values=False, label="pruning"
        ):
            prune_variants(library, pairs_of[block.name], block, tensors[block.name], made_from, ranked, talk, sums)
    if args.plan:
        return {}
    seconds = opened.runtime.now() - started if todo else 0.0
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
    return {
        "output": args.output,
        "pruned": len(todo),
        "skipped": skipped,
        "configurations": sparsity,
        "seconds": round(seconds, 3),
    }


def chosen_by(removed, names, examples):
    """How a variant's parts are chosen, for its key: only what has a part in it.

    Args:
        removed: the counts, see `scheme.Scheme`.
        names: {kind of parts: criterion}.
        examples: the calibration examples' fingerprint.
    """
    parts = {
        "attention": removed["heads"],
        "feed_forward": removed.get("neurons", 0),
        "linear": any(removed["weights"].values()),
    }
    names = {kind: names[kind] for kind, count in parts.items() if count}
    settings = {"criteria": names} | {f"{name}_version": criterion_class(name).version for name in names.values()}
    if any(CRITERIA[name].needs_data for name in names.values()):
        settings["calibration_examples"] = examples
    return settings


def prune_variants(library, pairs, block, tensors, made_from, ranked, talk, sums=None):
    """Prune variants of a block, and write them with the counts of what was removed, measured on their masks.

    `made_from`: of each variant; `ranked`: see `stacks.rank`; `sums`: of the block, see `closed_form.statistics`, for
    criteria that need data.
    """
    from common.pruning.prune_block import count_removed, prune_block

    names = {name for pair in pairs for name in made_from[pair]["criteria"].values()}
    criteria_of = {name: criterion_class(name)(block, tensors, sums) for name in sorted(names)}
    variants, measured = {}, {}
    for pair in talk.progress(pairs, block.name):
        chosen = {kind: criteria_of[name] for kind, name in made_from[pair]["criteria"].items()}
        chosen |= {"attention": ranked[block.name]} if block.name in ranked else {}
        variants[pair], by_rate = prune_block(block, tensors, made_from[pair]["removed"], chosen)
        measured[pair] = {"weights_removed_by_rate": by_rate, **count_removed(block, variants[pair].keeps)}
    library.write(variants, made_from, measured)


def measure(library, config, blocks, tensors):
    """The fractions that a configuration's variants really remove, counted on their masks when they were made.

    Returns:
        {"attention": of the heads, "feed_forward": of the neurons, "linear": of the Linears' weights by their own
        rates, "linear in all": the same with the out-projections' columns of removed heads and all of removed neurons}.
    """
    removed, total = dict.fromkeys(("attention", "feed_forward", "linear", "linear in all"), 0), {}
    for name, variant in config.items():
        block = blocks[name]
        linears = (block.output,) if block.kind == "attention" else block.linears
        weights = sum(tensors[name][f"{linear}.weight"].numel() for linear in linears)
        for kind, size in (("attention", block.heads), ("feed_forward", block.neurons), ("linear", weights)):
            total[kind] = total.get(kind, 0) + size
        if variant != DENSE:
            entry = library.entry(Pair(name, variant))
            removed["attention"] += entry["heads_removed"]
            removed["feed_forward"] += entry["neurons_removed"]
            removed["linear"] += sum(entry["weights_removed_by_rate"].values())
            removed["linear in all"] += sum(entry["weights_removed"][linear] for linear in linears)
    return {kind: round(count / max(total[kind.removesuffix(" in all")], 1), 6) for kind, count in removed.items()}


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
