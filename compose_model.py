#!/usr/bin/env python3
"""Compose the model of one configuration out of the original and a library, loadable with from_pretrained."""

import sys

from common import cli
from common.records import check_writable, digest, is_done, make_record


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    cli.add_library_flags(parser, library_help="the pruned or the fine-tuned library")
    parser.add_argument("-t", "--tokenizer", help="tokenizer folder; without it the one in the model's record")
    parser.add_argument("-o", "--output", required=True, help="the composed model: folder (or .pth)")
    cli.add_output_flags(parser)
    return parser


def run(args):
    check_writable(args.output)
    form = cli.output_form(args)
    from common.compact import make_compact
    from common.composition import compose, select_variants, variant_keys
    from common.evaluation import parameter_counts
    from common.library import Library
    from common.models import (
        data_source,
        load_model,
        load_tokenizer,
        read_record,
        reference,
        resolve_device,
        save_model,
    )

    loaded = load_model(args.model, resolve_device(args.device))
    chosen = select_variants(loaded, args.configurations, args.nth)
    library = Library.open(args.library, loaded.identity["fingerprint"])
    tokenizer = load_tokenizer(args.tokenizer, loaded)
    identity, keys = loaded.identity, variant_keys(library, chosen)
    key = digest([identity["fingerprint"], keys, *form])
    if not is_done(args.output, read_record(args.output), key, args.overwrite):
        model, masks = loaded.model, compose(loaded.model, chosen, library)
        if args.compact:
            model, masks = make_compact(model, masks)
        original = identity | {"model": reference(args.model, args.output)}
        record = make_record(
            "compose_model.py",
            key,
            original=original,
            variants=chosen,
            data=reference(data_source(None, loaded), args.output),
            tokenizer=reference(tokenizer.name_or_path, args.output),
        )
        save_model(args.output, model, record, masks=masks, tokenizer=tokenizer, sparse=args.sparse)
        result = parameter_counts(model)
    else:
        result = parameter_counts(load_model(args.output).model)
    cli.Talk(args.quiet).say(
        f"{args.output}: configuration {args.nth} out of {args.library}, sparsity {result['sparsity']:.4f}"
    )
    return {"output": args.output, "configuration": args.nth, "blocks_replaced": len(chosen), **result}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
