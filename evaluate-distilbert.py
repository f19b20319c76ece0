#!/usr/bin/env python3
"""Accuracy of classification models, their size and their speed."""

import sys

from common import cli
from common.errors import UserError


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=False,
        example="evaluate-distilbert.py -m model/distilbert-demo model-finetuned/0 --report '{name}.json'",
        next_stage="plot_loss.py",
        shared=True,
    )
    cli.add_evaluation_flags(parser)
    return parser


def run(args):
    if args.beams > 1:
        raise UserError(f"--beams {args.beams}: a classifier searches nothing; leave the flag out")
    from common.evaluation import accuracy, classify
    from common.inputs import evaluate

    def measure(opened, examples):
        predictions, seconds = classify(opened.loaded.model, examples, opened.runtime)
        score = accuracy(predictions, examples.targets)
        opened.runtime.talk.say(f"{opened.loaded.path}: accuracy {score:.4f} on {len(examples)} examples")
        return {"accuracy": score}, seconds

    return evaluate(args, "classification", measure)


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
