#!/usr/bin/env python3
"""Write conf.json: a pruning rate for every module, for every wanted configuration.

The rates are given (one of each kind for each configuration), crossed (--grid), drawn for each block (--random), or
found: --search LIBRARY takes the variants that a library holds and picks, for each budget, those that lose least.
"""

import sys

from common.cli.flags import (
    DATA,
    OUTPUT,
    Parser,
    add_compute,
    add_model,
    add_seed,
    add_settings,
    flags_of,
    refuse_unused,
    settings_from,
)
from common.cli.launch import launch
from common.cli.paths import the_library, the_model
from common.cli.values import int_between, rate, rate_below_1
from common.composing.configurations import (
    Configurations,
    grid_rates,
    looks_like_configurations,
    nth_configuration,
    random_configurations,
    read_configurations,
    uniform_configurations,
)
from common.runtime.errors import UserError
from common.runtime.files import check_apart, check_writable
from common.runtime.progress import Talk
from common.runtime.records import check_report, keeps_existing, write_json
from common.runtime.settings import MOST, DataSettings, SearchSettings

NAME = "config_generator.py"  # in reports
SEARCH_FLAGS = ["configurations", "precision", *flags_of(SearchSettings), *flags_of(DataSettings)]


def build_parser():
    parser = Parser(
        __doc__,
        example="config_generator.py -m model/t5 --attention 0.25 0.5 0.25 --linear 0.3 0.3 0.5 -n 3",
        next_stage="prune_scheme_generator.py",
        overwrite=True,
        shared=True,
    )
    add_model(parser)
    parser.group(OUTPUT).add_argument("-o", "--output", default="conf.json", help="the configurations (conf.json)")
    group = parser.group("rates")
    for flag, kind, parts in (
        ("--attention", rate, "heads; 1 leaves the attention blocks out"),
        ("--linear", rate_below_1, "weights of every Linear, less than 1"),
        (
            "--feed-forward",
            rate,
            "neurons of every feed-forward module; 1 leaves these blocks out; without the flag none, and no such "
            "modules in the file",
        ),
    ):
        text = f"one rate for each configuration, or those to cross or draw from: the fraction to remove of the {parts}"
        group.add_argument(flag, type=kind, nargs="+", metavar="RATE", help=text)
    group.add_argument(
        "-n",
        "--number",
        type=int_between(1, MOST),
        metavar="TOTAL",
        help="how many configurations; without it one for each rate",
    )
    group.add_argument(
        "--grid", action="store_true", help="as few configurations as give every block every combination of the rates"
    )
    group.add_argument(
        "--random",
        action="store_true",
        help="-n different configurations, in which every block has rates of its own, drawn from those given (--seed)",
    )
    add_seed(parser, "rates")
    group = parser.group("search")
    group.add_argument("--search", metavar="LIBRARY", help="a library that holds the variants of -c")
    group.add_argument(
        "-c", "--configurations", default="grid.json", help="the configurations that it was made for, see --grid"
    )
    add_settings(parser, SearchSettings, "search")
    add_settings(parser, DataSettings, DATA)
    add_compute(parser, omit=("accumulate",))
    return parser


def run(args):
    check_writable(args.output, is_file=True)
    configurations, result = (search if args.search else generate)(args)
    content = configurations.to_json()
    if not keeps_existing(args.output, content, args.overwrite, is_ours=looks_like_configurations):
        write_json(args.output, content)
    number = len(configurations.configs)
    Talk(args.quiet).say(f"{args.output}: {number} configurations of {len(configurations.modules)} modules")
    return {"output": args.output, "configurations": number, "modules": len(configurations.modules), **result}


def generate(args):
    """Configurations at the given rates."""
    kinds = {"attention": args.attention, "linear": args.linear, "feed_forward": args.feed_forward}
    given = {kind: rates for kind, rates in kinds.items() if rates}
    refuse_unused(args, SEARCH_FLAGS, "goes with --search")
    if args.grid:
        refuse_unused(args, ["number"], "the number of a --grid's configurations follows from its rates")
        refuse_unused(args, ["random"], "the rates of a --grid are crossed, not drawn")
    if not (args.attention and args.linear):
        raise UserError("give --attention and --linear, the rates to prune at; or --search")
    if args.random and not args.number:
        raise UserError("--random: give -n, how many configurations to draw")
    number = args.number or len(args.attention)
    if not (args.grid or args.random):
        check_counts(given, number)
    the_model(args.model)
    from common.blocks.find import prunable_modules
    from common.cli.open import open_model

    loaded = open_model(args).loaded
    modules = prunable_modules(loaded.model, neurons=args.feed_forward is not None)
    if not modules:
        raise UserError(f"{loaded.path}: has nothing to prune; all of its blocks are left out already")
    if args.random:
        return random_configurations(loaded.identity, modules, given, args.number, args.seed), {}
    if args.grid:
        rates = grid_rates(args.attention, args.linear, args.feed_forward)
    else:
        rates = [{kind: rates[n] for kind, rates in given.items()} for n in range(number)]
    return uniform_configurations(loaded.identity, modules, rates), {}


def check_counts(given, number):
    """Make sure that there is one rate of each kind, {kind: rates}, for every configuration."""
    for kind, rates in given.items():
        if len(rates) != number:
            raise UserError(
                f"--{kind.replace('_', '-')} has {len(rates)} rates, but there are to be {number} configurations; "
                "give one rate of each kind for each, or --random or --grid"
            )


def search(args):
    """For each budget, the configuration of the library's variants that loses least."""
    outputs = {"-o": args.output, "--report": args.report}
    check_apart(outputs, {"-m": args.model, "-c": args.configurations, "--search": args.search})
    check_report(args.report, NAME)
    settings = settings_from(args, SearchSettings)
    if not (settings.budget or settings.budget_of):
        raise UserError("--search: give one budget or more, with --budget or --budget-of")
    from common.composing.search import rates_of, report, search_budgets

    opened, grid, candidates = open_candidates(args)
    choices = candidates.configurations()
    uniform = {n: nth_configuration(choices, n, args.configurations) for n in settings.budget_of}
    searched = search_budgets(
        candidates,
        measure=settings.measure,
        budgets=settings.budget,
        uniform=uniform,
        rounds=settings.rounds,
        plain=settings.plain,
    )
    if args.report:  # measures models, in all processes
        content = {"script": NAME, "plain": settings.plain, **report(candidates, searched, uniform)}
        if opened.runtime.processes.is_first:
            write_json(args.report, content)
    configs = [rates_of(choice, candidates, grid.modules) for choice, _ in searched.found]
    return Configurations(grid.model, grid.modules, configs), {
        "measure": args.measure,
        "plain": args.plain,
        "examples": candidates.counts(),
        "dense": candidates.dense(),
        "found": [figures for _, figures in searched.found],
        "scored": candidates.scored,
        "seconds": {name: round(spent, 3) for name, spent in candidates.seconds.items()},
    }


def open_candidates(args):
    """What a search reads: (the opened model, the configurations of -c, the candidates)."""
    rates = ["attention", "linear", "feed_forward", "number", "grid", "random"]
    refuse_unused(args, rates, "has no part in a --search")
    grid = read_configurations(args.configurations)
    the_model(args.model)
    the_library(args.search)
    from common.cli.open import open_study
    from common.composing.compose import check_model
    from common.composing.library import Library
    from common.composing.search import Candidates

    opened = open_study(args)
    check_model(grid.model, opened.loaded, args.configurations)
    library = Library.open(args.search, opened.loaded.identity["fingerprint"])
    validation, number = opened.split("validation"), args.score_examples
    candidates = Candidates(
        opened.loaded, grid, library, validation, opened.runtime, number=number, objective=args.objective
    )
    return opened, grid, candidates


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
