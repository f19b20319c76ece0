#!/usr/bin/env python3
"""BLEU of translation models, their size and their speed."""

import sys

from common import cli


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
    from common.evaluation import bleu, translate
    from common.inputs import evaluate

    def measure(opened, examples):
        translations, seconds = translate(
            opened.loaded.model,
            opened.tokenizer,
            examples,
            opened.runtime,
            beams=args.beams,
            max_new_tokens=args.max_new_tokens,
        )
        score, signature = bleu(translations, [german for _, german in examples.texts])
        opened.runtime.talk.say(f"{opened.loaded.path}: BLEU {score:.2f} on {len(examples)} examples ({signature})")
        return {"bleu": score, "signature": signature, "beams": args.beams}, seconds

    return evaluate(args, "translation", measure)


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
