#!/usr/bin/env python3
"""Write conf.json: a pruning rate for every module, for every wanted configuration.

The rates are given (one of each kind for each configuration), crossed (--grid), drawn for each block (--random), or
found: --search LIBRARY takes the variants that a library holds and picks, for each budget, those that lose least.
"""

import sys

from common import cli, schemes
from common.errors import UserError
from common.files import check_apart, check_writable
from common.records import check_report, keeps_existing, write_json

NAME = "config_generator.py"  # in reports


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=True,
        example="config_generator.py -m model/t5 --attention 0.25 0.5 0.25 --linear 0.3 0.3 0.5 -n 3",
        next_stage="prune_scheme_generator.py",
        shared=True,
    )
    cli.add_model_flag(parser)
    parser.add_argument("-o", "--output", default="conf.json", help="the configurations file")
    for flag, rate, parts in (
        ("--attention", cli.rate, "heads; 1 leaves the attention blocks out"),
        ("--linear", cli.rate_below_1, "weights of every Linear, less than 1"),
        (
            "--feed-forward",
            cli.rate,
            "neurons of every feed-forward module; 1 leaves these blocks out; without the flag none, and no such "
            "modules in the file",
        ),
    ):
        help_text = (
            f"one rate for each configuration, or those to cross or draw from: the fraction to remove of the {parts}"
        )
        parser.add_argument(flag, type=rate, nargs="+", metavar="RATE", help=help_text)
    parser.add_argument("-n", "--number", type=cli.many, help="how many configurations")
    parser.add_argument(
        "--grid", action="store_true", help="as few configurations as give every block every combination of the rates"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="-n different configurations, in which every block has rates of its own, drawn from those given (--seed)",
    )
    cli.add_search_flags(parser)
    return parser


def run(args):
    if args.search and args.shard:
        return score_share(args)
    check_writable(args.output, is_file=True)
    configurations, result = (search if args.search else generate)(args)
    content = configurations.to_json()
    if not keeps_existing(args.output, content, args.overwrite, is_ours=schemes.looks_like_configurations):
        write_json(args.output, content)
    number = len(configurations.configs)
    cli.Talk(args.quiet).say(f"{args.output}: {number} configurations of {len(configurations.modules)} modules")
    return {"output": args.output, "configurations": number, "modules": len(configurations.modules), **result}


def generate(args):
    """Configurations at the given rates."""
    kinds = {"attention": args.attention, "linear": args.linear, "feed_forward": args.feed_forward}
    given = {kind: rates for kind, rates in kinds.items() if rates}
    cli.refuse_unused(args, args.search_flags, "goes with --search")
    if args.grid:
        cli.refuse_unused(args, ["number"], "the number of a --grid's configurations follows from its rates")
        cli.refuse_unused(args, ["random"], "the rates of a --grid are crossed, not drawn")
    if not (args.attention and args.linear and (args.number or args.grid)):
        raise UserError("give --attention, --linear and -n; or --attention, --linear and --grid; or --search")
    one_each = not (args.grid or args.random)
    for kind, rates in given.items():
        if one_each and len(rates) != args.number:
            raise UserError(
                f"--{kind.replace('_', '-')} has {len(rates)} rates, but -n asks for {args.number} "
                "configurations; give one rate for each, or --random"
            )
    from common.blocks import prunable_modules
    from common.inputs import open_model

    loaded = open_model(args).loaded
    modules = prunable_modules(loaded.model, neurons=args.feed_forward is not None)
    if not modules:
        raise UserError(f"{loaded.path}: has nothing to prune; all of its blocks are left out already")
    if args.random:
        configurations = schemes.random_configurations(loaded.identity, modules, given, args.number, args.seed)
    else:
        if args.grid:
            rates = schemes.grid_rates(args.attention, args.linear, args.feed_forward)
        else:
            rates = [{kind: each[n] for kind, each in given.items()} for n in range(args.number)]
        configurations = schemes.uniform_configurations(loaded.identity, modules, rates)
    return configurations, {}


def score_share(args):
    """Score one share of a library's variants, which a search finds in its record then; returns the result."""
    searching = ["budget", "budget_of", "measure", "rounds", "report", "output"]
    cli.refuse_unused(args, searching, "goes with the search that follows, without --shard")
    opened, _, candidates = open_candidates(args)
    number, count = args.shard
    scores = candidates.scores(args.shard)
    opened.runtime.talk.say(f"share {number} of {count}: {candidates.scored} variants scored")
    blocks = [name for name, variants in scores.items() if len(variants) > 1]
    return {
        "shard": f"{number}/{count}",
        "blocks": len(blocks),
        "scored": candidates.scored,
        "seconds": round(candidates.seconds["scores"], 3),
    }


def search(args):
    """For each budget, the configuration of the library's variants that loses least."""
    outputs = {"-o": args.output, "--report": args.report}
    check_apart(outputs, {"-m": args.model, "-c": args.configurations, "--search": args.search})
    check_report(args.report, NAME)
    from common.search import check_feasible, count, find, limits, rates_of, report

    opened, grid, candidates = open_candidates(args)
    talk = opened.runtime.talk
    processes = opened.runtime.processes
    cost = processes.agree(count(args.measure, opened.loaded, candidates.keeps(), opened.runtime.device))
    if cost.excess:
        talk.say(
            f"latency: the blocks took {cost.excess * 1e3:.2f} ms longer than the whole model, whose rest counts as 0; "
            "the machine does other work, so measure again when it is quiet"
        )
    uniform = {n: candidates.configuration(n, args.configurations) for n in args.budget_of or ()}
    allowed = limits(cost, args.budget or ()) + [cost.of(choice) for choice in uniform.values()]
    if not allowed:
        raise UserError("--search: give one budget or more, with --budget or --budget-of")
    check_feasible(cost, allowed)
    if not candidates.held_back:
        talk.say(
            f"all {len(candidates.validation)} validation examples are scored on and none are left to hold back, so "
            "what is found is checked on the scoring examples alone; a smaller --score-examples leaves some"
        )
    scores = candidates.scores()
    talk.say(
        f"{args.search}: {candidates.scored} variants scored, "
        f"{len(candidates.keys) - candidates.scored} had been scored before"
    )
    found = find(candidates, cost, allowed, scores, rounds=args.rounds)
    if args.report and processes.is_first:
        write_json(args.report, {"script": NAME, **report(candidates, cost, scores, found, uniform)})
    configurations = schemes.Configurations(
        grid.model, grid.modules, [rates_of(each.choice, candidates, grid.modules) for each in found]
    )
    return configurations, {
        "measure": args.measure,
        "examples": candidates.counts(),
        "dense": candidates.dense(),
        "found": [each.figures for each in found],
        "scored": candidates.scored,
        "seconds": {name: round(spent, 3) for name, spent in candidates.seconds.items()},
    }


def open_candidates(args):
    """What a search reads: (the opened model, the configurations of -c, the candidates)."""
    rates = ["attention", "linear", "feed_forward", "number", "grid", "random"]
    cli.refuse_unused(args, rates, "has no part in a --search")
    grid = schemes.read_configurations(args.configurations)
    from common.composition import check_model
    from common.inputs import open_study
    from common.library import Library
    from common.search import Candidates

    opened = open_study(args)
    check_model(grid.model, opened.loaded, args.configurations)
    library = Library.open(args.search, opened.loaded.identity["fingerprint"])
    validation, number = opened.split(args, "validation"), args.score_examples
    candidates = Candidates(
        opened.loaded, grid, library, validation, opened.runtime, number=number, objective=args.objective
    )
    return opened, grid, candidates


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
