#!/usr/bin/env python3
"""BLEU and chrF of translation models, ROUGE of summarization models, their size and their speed.

The models may be encoder-decoders of every family that the suite knows, not of T5 alone. The task is the one in the
model's record.
"""

import sys

from common.cli.flags import DATA, OUTPUT, Parser, add_compute, add_models, add_settings, settings_from
from common.cli.launch import launch
from common.cli.paths import models_to_evaluate
from common.runtime.settings import DataSettings, EvaluationSettings, GenerationSettings

NAME = "evaluate-t5.py"  # in reports and predictions
MANY = 0.01  # the share of answers that were cut short which is told


def build_parser():
    parser = Parser(
        __doc__,
        example="evaluate-t5.py -m model/t5-demo model-finetuned/0 --report '{name}.json'",
        next_stage="plot_loss.py",
        shared=True,
        planned=True,
    )
    add_models(parser)
    add_settings(parser, EvaluationSettings, OUTPUT)
    add_settings(parser, GenerationSettings, "generation")
    add_settings(parser, DataSettings, DATA, batch_size=64)
    add_compute(parser, omit=("accumulate",))
    return parser


def run(args):
    models_to_evaluate(args.model)  # refuses missing ones before torch is imported
    from common.cli.evaluate import Answered, evaluate
    from common.cli.open import search_of
    from common.evaluation.answers import translate

    generation = settings_from(args, GenerationSettings)

    def answer(opened, examples):
        search = search_of(opened.loaded, generation.beams, generation.max_new_tokens)
        texts, cut, seconds = translate(opened.loaded.model, opened.tokenizer, examples, opened.runtime, **search)
        note = (
            f"more than {MANY:.0%} of the answers were cut short at {search['max_new_tokens']} tokens; allow more with "
            "--max-new-tokens"
        )
        shown = [
            {"input": source, "reference": reference, "prediction": text}
            for (source, reference), text in zip(examples.texts, texts)
        ]
        settings = search | {"cut_short": sum(cut)}
        return Answered(texts, shown, seconds, settings, note if sum(cut) > MANY * len(texts) else None)

    return evaluate(args, NAME, answer)


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
