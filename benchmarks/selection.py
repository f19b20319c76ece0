"""What goes: quality and seconds of the criteria, each followed by the closed form, without a gradient step.

Two tables, both uniform over all blocks: heads and neurons at the i-th rates of --attention and --feed-forward, and
single weights of all Linears at each rate of --linear. Each row is one criterion at one rate: the model's loss and its
divergence from the original on all examples of --split; seconds of the pass that gathers what the criterion reads, of
choosing, and of the closed form.
"""

import sys

from measure import build_parser, emit, machine

from common.blocks.find import find_blocks, prunable_modules
from common.blocks.tensors import aliasing_copy, block_tensors, set_block
from common.cli.flags import DATA, add_settings
from common.cli.launch import launch
from common.cli.open import open_study
from common.cli.values import int_between, rate, rate_below_1
from common.composing.configurations import SIZES, uniform_configurations
from common.composing.scheme import make_scheme
from common.evaluation.scoring import score_block
from common.pruning.closed_form import reconstruct, statistics
from common.pruning.criteria import CRITERIA, criterion_class
from common.pruning.prune_block import prune_block
from common.runtime.errors import UserError
from common.runtime.settings import DataSettings

RIDGE = 1e-3  # block-level_finetuning.py's default


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", required=True, help="folder or .pth")
    for kind in ("attention", "feed-forward"):
        flags.add_argument(f"--{kind}", type=rate, nargs="+", default=[0.25, 0.5, 0.75], metavar="RATE")
    flags.add_argument("--linear", type=rate_below_1, nargs="+", default=[0.7, 0.8, 0.9], metavar="RATE")
    flags.add_argument("--calibration", type=int_between(1), help="training examples (default: the family's)")
    flags.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="what quality is measured on"
    )
    add_settings(flags, DataSettings, DATA, batch_size=32)
    return flags


class Bench:
    """A model, its examples, and what a criterion knows of its blocks."""

    def __init__(self, args):
        opened = open_study(args)
        self.model, self.runtime = opened.loaded.model, opened.runtime
        self.blocks = find_blocks(self.model)
        self.own = {name: block_tensors(self.model, block) for name, block in self.blocks.items()}
        self.calibration = opened.split("train").sample(args.calibration or opened.loaded.study.calibration)
        self.split = opened.split(args.split)

    def criteria(self, name):
        """{block: criterion}, in a pass over the calibration examples if the criterion reads them."""
        criterion = criterion_class(name)
        if not CRITERIA[name].needs_data:
            return {block: criterion(self.blocks[block], own) for block, own in self.own.items()}
        gathered = statistics(self.model, list(self.blocks.values()), self.calibration, self.runtime, values=False)
        return {block.name: criterion(block, self.own[block.name], sums) for block, sums in gathered}

    def prune(self, criteria, rates):
        """{pair: variant} of the uniform configuration of {kind: rate}."""
        modules = prunable_modules(self.model, neurons=True)
        scheme = make_scheme(uniform_configurations({}, modules, [dict.fromkeys(SIZES, 0) | rates]))
        return {
            pair: prune_block(
                self.blocks[pair.block],
                self.own[pair.block],
                scheme.blocks[pair.block][pair.variant],
                dict.fromkeys(SIZES, criteria[pair.block]),
            )[0]
            for pair in scheme.variants()
        }

    def solve(self, variants):
        solved = reconstruct(self.model, variants, self.calibration, self.runtime, ridges=[RIDGE])
        return {pair: tensors for pair, (tensors,) in solved.items()}

    def quality(self, solved):
        """{"loss", "kl"} of the model with these blocks."""
        composed = aliasing_copy(self.model)
        for pair, tensors in solved.items():
            set_block(composed, self.blocks[pair.block], tensors)
        scores = score_block(composed, self.model, self.blocks, None, {}, self.split, self.runtime)[None]
        return {name: round(value, 4) for name, value in scores.items()}


def run(args):
    if len(args.attention) != len(args.feed_forward):
        raise UserError("--attention and --feed-forward: give as many rates to one as to the other")
    bench = Bench(args)
    now = bench.runtime.now
    emit(
        figure="setting",
        model=str(args.model),
        split=args.split,
        examples=len(bench.split),
        calibration=len(bench.calibration),
        dense=bench.quality({}),
        **machine(bench.runtime.device),
    )
    tables = {
        "heads and neurons": [
            {"attention": heads, "feed_forward": neurons} for heads, neurons in zip(args.attention, args.feed_forward)
        ],
        "weights": [{"linear": rate} for rate in args.linear],
    }
    for name in CRITERIA:
        for table, all_rates in tables.items():
            started = now()
            criteria = bench.criteria(name)
            gathered = now()
            for rates in all_rates:
                before = now()
                variants = bench.prune(criteria, rates)
                chosen = now()
                solved = bench.solve(variants)
                emit(
                    figure=table,
                    criterion=name,
                    rates=rates,
                    **bench.quality(solved),
                    seconds={
                        "statistics": round(gathered - started, 2),
                        "choice": round(chosen - before, 2),
                        "closed form": round(now() - chosen, 2),
                    },
                )
    return {"model": str(args.model)}


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
