#!/usr/bin/env python3
"""Accuracy of a classification model, its size and its speed."""

import sys

from common import cli
from common.errors import UserError
from common.records import check_writable


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=False)
    parser.add_argument("-m", "--model", required=True, help="the model: folder or .pth")
    cli.add_data_flags(parser, batch_size=64)
    cli.add_report_flags(parser)
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test", help="what to classify")
    parser.add_argument(
        "--beams",
        type=cli.positive,
        default=1,
        help="of no effect here; taken so that both evaluations can be called alike",
    )
    return parser


def run(args):
    if args.report:
        check_writable(args.report, is_file=True)
    from common.data import load_examples
    from common.evaluation import accuracy, classify, parameter_counts
    from common.models import data_source, load_model, load_tokenizer, resolve_device
    from common.report import original_of, write_report

    talk = cli.Talk(args.quiet)
    device = resolve_device(args.device)
    loaded = load_model(args.model, device)
    if loaded.family.task != "classification":
        raise UserError(f"{args.model}: is a {loaded.family.task} model; evaluate it with evaluate-t5.py")
    original = original_of(loaded, args.original, device) if args.report else None
    tokenizer = load_tokenizer(args.tokenizer, loaded)
    examples = load_examples(
        data_source(args.data, loaded),
        args.split,
        tokenizer,
        loaded.family,
        classes=loaded.model.config.num_labels,
        max_length=args.max_length,
        limit=args.limit,
    )
    predictions, seconds = classify(loaded.model, examples, batch_size=args.batch_size, device=device, talk=talk)
    score = accuracy(predictions, examples.targets)
    talk.say(f"{args.model}: accuracy {score:.4f} on {len(examples)} examples")
    result = {
        "model": args.model,
        "split": args.split,
        "examples": len(examples),
        "accuracy": score,
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
