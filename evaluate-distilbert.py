#!/usr/bin/env python3
"""Accuracy, macro F1 and Matthews' correlation of classification models, their size and their speed.

The models may be classifiers of every family that the suite knows, not of DistilBERT alone.
"""

import sys

from common.cli.flags import DATA, OUTPUT, Parser, add_compute, add_models, add_settings
from common.cli.launch import launch
from common.cli.paths import models_to_evaluate
from common.runtime.settings import DataSettings, EvaluationSettings

NAME = "evaluate-distilbert.py"  # in reports and predictions
MOST_NAMED = 8  # of the classes that no example has


def build_parser():
    parser = Parser(
        __doc__,
        example="evaluate-distilbert.py -m model/distilbert-demo model-finetuned/0 --report '{name}.json'",
        next_stage="plot_loss.py",
        shared=True,
        planned=True,
    )
    add_models(parser)
    add_settings(parser, EvaluationSettings, OUTPUT)
    add_settings(parser, DataSettings, DATA, batch_size=64)
    add_compute(parser, omit=("accumulate",))
    return parser


def run(args):
    models_to_evaluate(args.model)  # refuses missing ones before torch is imported
    from common.cli.evaluate import Answered, evaluate
    from common.evaluation.answers import class_logits

    def answer(opened, examples):
        logits, seconds = class_logits(opened.loaded.model, examples, opened.runtime)
        answers = logits.argmax(-1).tolist()
        names = opened.loaded.model.config.id2label
        shown = [
            {
                "input": text,
                "reference": names[label],
                "prediction": names[found],
                "probabilities": {names[each]: round(value, 6) for each, value in enumerate(row)},
            }
            for (text, _), label, found, row in zip(
                examples.texts, examples.targets, answers, logits.double().softmax(-1).tolist()
            )
        ]
        counted = set(examples.targets)
        left_out = [names[number] for number in sorted(names) if number not in counted]
        named = ", ".join(left_out[:MOST_NAMED]) + ", …" * (len(left_out) > MOST_NAMED)
        note = f"F1 is over {len(counted)} of {len(names)} classes; no example is {named}"
        settings = {"f1_classes": len(counted), "f1_left_out": left_out}
        return Answered(answers, shown, seconds, settings, note if left_out else None)

    return evaluate(args, NAME, answer)


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
