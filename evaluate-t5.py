#!/usr/bin/env python3
"""BLEU of a translation model, its size and its speed."""

import sys

from common import cli
from common.errors import UserError
from common.records import check_writable


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=False)
    parser.add_argument("-m", "--model", required=True, help="the model: folder or .pth")
    cli.add_data_flags(parser, batch_size=64)
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test", help="what to translate")
    parser.add_argument("--beams", type=cli.positive, default=1, help="beams of the search; 1 is greedy")
    cli.add_report_flags(parser)
    parser.add_argument("--max-new-tokens", type=cli.positive, default=60, help="longest translation, in tokens")
    return parser


def run(args):
    if args.report:
        check_writable(args.report, is_file=True)
    from common.data import load_examples
    from common.evaluation import bleu, parameter_counts, translate
    from common.models import data_source, load_model, load_tokenizer, resolve_device
    from common.report import original_of, write_report

    talk = cli.Talk(args.quiet)
    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    if loaded.family.task != "translation":
        raise UserError(f"{args.model}: is a {loaded.family.task} model; evaluate it with evaluate-distilbert.py")
    original = original_of(loaded, args.original, device) if args.report else None
    tokenizer = load_tokenizer(args.tokenizer, loaded)
    examples = load_examples(
        data_source(args.data, loaded),
        args.split,
        tokenizer,
        loaded.family,
        max_length=args.max_length,
        limit=args.limit,
    )
    translations, seconds = translate(
        loaded.model,
        tokenizer,
        examples,
        batch_size=args.batch_size,
        beams=args.beams,
        max_new_tokens=args.max_new_tokens,
        device=device,
        talk=talk,
    )
    score, signature = bleu(translations, [german for _, german in examples.texts])
    talk.say(f"{args.model}: BLEU {score:.2f} on {len(examples)} examples ({signature})")
    result = {
        "model": args.model,
        "split": args.split,
        "examples": len(examples),
        "bleu": score,
        "signature": signature,
        "beams": args.beams,
        **parameter_counts(loaded.model),
        "examples_per_second": round(len(examples) / seconds, 2),
    }
    if args.report:
        write_report(args.report, loaded, original, result, device, talk)
        result["report"] = args.report
    return result


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
