#!/usr/bin/env python3
"""Write conf_prune.json: the distinct variants of every block over all configurations of a conf.json."""

import sys

from common.cli.flags import OUTPUT, Parser
from common.cli.launch import launch
from common.composing.configurations import read_configurations
from common.composing.scheme import looks_like_scheme, make_scheme, source_of
from common.runtime.files import check_apart, check_writable
from common.runtime.progress import Talk
from common.runtime.records import keeps_existing, write_json


def build_parser():
    parser = Parser(__doc__, example="prune_scheme_generator.py -i conf.json -o conf_prune.json", next_stage="prune.py")
    group = parser.group(OUTPUT)
    group.add_argument("-i", "--input", default="conf.json", help="the configurations (conf.json)")
    group.add_argument("-o", "--output", default="conf_prune.json", help="the scheme")
    return parser


def run(args):
    configurations = read_configurations(args.input)
    scheme = make_scheme(configurations, source_of(configurations, args.input, args.output))
    check_apart({"-o": args.output}, {"-i": args.input})
    check_writable(args.output, is_file=True)
    content = scheme.to_json()
    if not keeps_existing(args.output, content, overwrite=True, is_ours=looks_like_scheme):  # nobody edits it
        write_json(args.output, content)
    without, distinct = scheme.count_without_reuse(), len(scheme.variants())
    Talk(args.quiet).say(
        f"{args.output}: {len(scheme.configs)} configurations; "
        f"{without} blocks to fine-tune without reuse, {distinct} with reuse"
    )
    return {
        "output": args.output,
        "configurations": len(scheme.configs),
        "blocks_without_reuse": without,
        "blocks_with_reuse": distinct,
    }


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
