#!/usr/bin/env python3
"""BLEU and chrF of translation models, ROUGE of summarization models, their size and their speed.

The models may be encoder-decoders of every family that the suite knows, not of T5 alone. The task is the one in the
model's record.
"""

import sys

from common.cli import flags as cli

NAME = "evaluate-t5.py"  # in reports and predictions


def build_parser():
    parser = cli.build_parser(
        __doc__,
        overwrite=False,
        example="evaluate-t5.py -m model/t5-demo model-finetuned/0 --report '{name}.json'",
        next_stage="plot_loss.py",
        shared=True,
    )
    cli.add_evaluation_flags(parser)
    cli.add_translation_flags(parser)
    return parser


def run(args):
    from common.cli.open import Answered, evaluate, longest_answer
    from common.evaluation.answers import translate

    def answer(opened, examples):
        most = longest_answer(opened.loaded, args.max_new_tokens)
        texts, seconds = translate(
            opened.loaded.model, opened.tokenizer, examples, opened.runtime, beams=args.beams, max_new_tokens=most
        )
        shown = [
            {"input": source, "reference": reference, "prediction": text}
            for (source, reference), text in zip(examples.texts, texts)
        ]
        return Answered(texts, shown, seconds, {"beams": args.beams, "max_new_tokens": most})

    return evaluate(args, NAME, answer)


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
