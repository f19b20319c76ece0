#!/usr/bin/env python3
"""Write conf.json: a pruning rate for every module, for every wanted configuration.

The rates are given (one of each kind for each configuration), crossed (--grid), or found: --search LIBRARY takes the
variants that a library holds and picks, for each budget, those that lose least.
"""

import sys
from pathlib import Path

from common import cli, schemes
from common.errors import UserError
from common.records import check_writable, keeps_existing, write_json


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    parser.add_argument("-o", "--output", default="conf.json", help="the configurations file")
    parser.add_argument(
        "--attention",
        type=cli.rate,
        nargs="+",
        metavar="RATE",
        help="fraction of the heads to remove, one rate for each configuration",
    )
    parser.add_argument(
        "--linear",
        type=cli.rate,
        nargs="+",
        metavar="RATE",
        help="fraction of the weights of every Linear to remove, one rate for each configuration",
    )
    parser.add_argument(
        "--feed-forward",
        type=cli.rate,
        nargs="+",
        metavar="RATE",
        help="fraction of the neurons of every feed-forward module to remove, one rate for each "
        "configuration; without it none, and no such modules in the file",
    )
    parser.add_argument("-n", "--number", type=cli.positive, help="how many configurations")
    parser.add_argument(
        "--grid", action="store_true", help="as few configurations as give every block every combination of the rates"
    )
    cli.add_search_flags(parser)
    return parser


def run(args):
    check_writable(args.output, is_file=True)
    configurations, result = (search if args.search else generate)(args)
    content = configurations.to_json()
    if not keeps_existing(args.output, content, args.overwrite):
        write_json(args.output, content)
    number = len(configurations.configs)
    cli.Talk(args.quiet).say(f"{args.output}: {number} configurations of {len(configurations.modules)} modules")
    return {"output": args.output, "configurations": number, "modules": len(configurations.modules), **result}


def generate(args):
    """Configurations at the given rates."""
    given = {"attention": args.attention, "linear": args.linear, "feed_forward": args.feed_forward}
    if not (args.attention and args.linear and (args.number or args.grid)):
        raise UserError("give --attention, --linear and -n; or --attention, --linear and --grid; or --search")
    for kind, rates in given.items():
        if not args.grid and rates is not None and len(rates) != args.number:
            raise UserError(
                f"--{kind.replace('_', '-')} has {len(rates)} rates, but -n asks for {args.number} "
                "configurations; give one rate for each"
            )
    from common.architectures import prunable_modules
    from common.models import load_model, resolve_device

    loaded = load_model(args.model, resolve_device(args.device))
    modules = prunable_modules(loaded.model, neurons=args.feed_forward is not None)
    if args.grid:
        rates = schemes.grid_rates(args.attention, args.linear, args.feed_forward)
    else:
        rates = [{kind: each[n] for kind, each in given.items() if each} for n in range(args.number)]
    return schemes.uniform_configurations(loaded.identity, modules, rates), {}


def search(args):
    """For each budget, the configuration of a library's variants that loses least."""
    talk = cli.Talk(args.quiet)
    files = {"-c": args.configurations, "-o": args.output, "--report": args.report}
    paths = [Path(path).resolve() for path in files.values() if path]
    if len(set(paths)) < len(paths):
        raise UserError(
            "-c, -o and --report must be three files: -c has the configurations that the library was made "
            "for, -o gets those that are found"
        )
    if args.report:
        check_writable(args.report, is_file=True)
    grid = schemes.read_configurations(args.configurations)
    from common import budgets, costs
    from common.composition import check_model
    from common.data import load_examples
    from common.library import Library
    from common.models import data_source, load_model, load_tokenizer, resolve_device

    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    check_model(grid.model, loaded, args.configurations)
    library = Library.open(args.search, loaded.identity["fingerprint"])
    validation = load_examples(
        data_source(args.data, loaded),
        "validation",
        load_tokenizer(args.tokenizer, loaded),
        loaded.family,
        classes=loaded.model.config.num_labels,
        max_length=args.max_length,
        limit=args.limit,
    )
    candidates = budgets.Candidates(
        loaded,
        grid,
        library,
        validation,
        number=args.score_examples,
        objective=args.objective,
        batch_size=args.batch_size,
        device=device,
        talk=talk,
    )
    cost = costs.count(args.measure, loaded, candidates.keeps(), device)
    uniform = {n: candidates.configuration(n, args.configurations) for n in args.budget_of or ()}
    limits = budgets.limits(cost, args.budget or ()) + [cost.of(choice) for choice in uniform.values()]
    if not limits:
        raise UserError("--search: give one budget or more, with --budget or --budget-of")
    budgets.check_feasible(cost, limits)
    scores = candidates.scores()
    talk.say(
        f"{args.search}: {candidates.scored} variants scored, "
        f"{len(candidates.keys) - candidates.scored} had been scored before"
    )
    found = budgets.find(candidates, cost, limits, scores, rounds=args.rounds)
    if args.report:
        write_json(args.report, budgets.report(candidates, cost, scores, found, uniform))
    configurations = schemes.Configurations(
        grid.model, grid.modules, [budgets.rates_of(choice, candidates, grid.modules) for choice, _ in found]
    )
    return configurations, {
        "measure": args.measure,
        "dense": candidates.dense(),
        "found": [figures for _, figures in found],
        "scored": candidates.scored,
        "seconds": {name: round(spent, 3) for name, spent in candidates.seconds.items()},
    }


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
