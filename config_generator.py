#!/usr/bin/env python3
"""Write conf.json: a pruning rate for every module, for every wanted configuration."""

import sys

from common import cli, schemes
from common.errors import UserError
from common.records import check_writable, keeps_existing, write_json


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    parser.add_argument("-o", "--output", default="conf.json", help="the configurations file")
    parser.add_argument("--attention", type=cli.rate, nargs="+", required=True, metavar="RATE",
                        help="fraction of the heads to remove, one rate for each configuration")
    parser.add_argument("--linear", type=cli.rate, nargs="+", required=True, metavar="RATE",
                        help="fraction of the weights of every Linear to remove, one rate for each configuration")
    parser.add_argument("-n", "--number", type=cli.positive, required=True, help="how many configurations")
    return parser


def run(args):
    for flag, rates in (("--attention", args.attention), ("--linear", args.linear)):
        if len(rates) != args.number:
            raise UserError(f"{flag} has {len(rates)} rates, but -n asks for {args.number} configurations; "
                            "give one rate for each")
    check_writable(args.output, is_file=True)
    from common.architectures import prunable_modules
    from common.models import load_model, resolve_device

    loaded = load_model(args.model, resolve_device(args.device))
    configurations = schemes.uniform_configurations(loaded.identity, prunable_modules(loaded.model),
                                                    args.attention, args.linear)
    content = configurations.to_json()
    if not keeps_existing(args.output, content, args.overwrite):
        write_json(args.output, content)
    cli.Talk(args.quiet).say(f"{args.output}: {args.number} configurations of {len(configurations.modules)} modules")
    return {"output": args.output, "configurations": args.number, "modules": len(configurations.modules)}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
