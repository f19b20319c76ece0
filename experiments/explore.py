#!/usr/bin/env python3
"""The smallest configuration whose composed model is good enough: of those in -c, out of a library that holds them all.

Good enough is a model whose quality (BLEU, ROUGE-L, accuracy) on the validation split is at most --drop below the
original's. The configurations are gone through from the smallest up. One whose loss on a sample is no lower than that
of a smaller one that was not good enough is passed over. For every --drop, the output has the configuration that was
found; where none is good enough, the best of those measured, which may become so by fine-tuning.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.cli.flags import DATA, FINE_TUNED_LIBRARY, Parser, add_compute, add_model, add_settings
from common.cli.launch import launch
from common.cli.values import int_between, number
from common.composing.configurations import looks_like_configurations, read_configurations
from common.data import metrics
from common.runtime.files import check_apart, check_writable, damage_in
from common.runtime.progress import Talk
from common.runtime.records import check_report, keeps_existing, read_json, write_json
from common.runtime.schema import check
from common.runtime.settings import DataSettings, GenerationSettings

MEASURED = ("loss", "loss_seconds", "quality", "quality_seconds")
ROW = {"key?": str, **{f"{name}?": float for name in MEASURED}, str: object}
REPORT = {"configurations": [ROW], str: object}  # what is read of it here
NAME = "experiments/explore.py"  # in reports


def build_parser():
    parser = Parser(
        __doc__,
        overwrite=True,
        example="explore.py -m model/t5-demo -p library -c conf.json --drop 1 -o smallest.json",
        next_stage="compose_model.py, or model-level_finetuning.py",
    )
    add_model(parser)
    parser.add_argument("-p", "--library", default=FINE_TUNED_LIBRARY, help="the fine-tuned library")
    parser.add_argument("-c", "--configurations", default="conf.json", help="the configurations to choose from")
    parser.add_argument(
        "--drop",
        type=number(float, least=0),
        nargs="+",
        required=True,
        metavar="ALPHA",
        help="by how much the quality may be below the original's: in BLEU or ROUGE-L (0 to 100) or accuracy (0 to 1)",
    )
    parser.add_argument(
        "-o", "--output", default="smallest.json", help="configurations file for what is found, one for each --drop"
    )
    parser.add_argument(
        "--measure",
        choices=["parameters", "multiply-adds", "bytes", "latency"],
        default="parameters",
        help="what size is counted in; latency is measured on this device",
    )
    parser.add_argument(
        "--score-examples", type=int_between(1), default=256, help="validation examples that losses are measured on"
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="JSON file for all sizes, losses and qualities; what is in it already is not measured again",
    )
    add_settings(parser, DataSettings, DATA, batch_size=64)
    add_compute(parser, omit=("precision", "accumulate"))
    add_settings(parser, GenerationSettings, "generation")
    return parser


def run(args):
    check_apart({"-o": args.output, "--report": args.report}, {"-c": args.configurations})
    check_writable(args.output, is_file=True)
    check_report(args.report, NAME)
    configurations = read_configurations(args.configurations)
    from common.cli.open import longest_answer, open_study
    from common.composing.compose import check_model
    from common.composing.library import Library
    from common.composing.search import Candidates, sizes
    from common.evaluation.answers import Quality
    from experiments.smallest import Compositions

    opened = open_study(args)
    loaded, talk, metric = opened.loaded, opened.runtime.talk, opened.loaded.task.metric
    check_model(configurations.model, loaded, args.configurations)
    library = Library.open(args.library, loaded.identity["fingerprint"])
    validation = opened.split("validation")
    candidates = Candidates(
        loaded, configurations, library, validation, opened.runtime, number=args.score_examples, objective="loss"
    )
    most = longest_answer(loaded, args.max_new_tokens)
    quiet = dataclasses.replace(opened.runtime, talk=Talk(quiet=True))  # there is a line for each model instead

    def score(model):
        return Quality(metric, validation, opened.tokenizer, quiet, most).of(model)

    kept = sizes(loaded, configurations, library, args.measure, quiet)
    scored_on = [validation.fingerprint(), most, metrics.VERSION]
    models = Compositions(candidates, kept, score, scored_on, read_rows(args.report))
    report = {
        "script": NAME,
        "metric": metric,
        "measure": args.measure,
        "examples": {"loss": len(candidates.examples), "quality": len(validation)},
        "dense": score(loaded.model),
        "found": [],
    }

    def tell(n):
        talk.say(
            f"configuration {n}: {kept[n]:.4f} of the blocks' {args.measure}, loss {models.loss(n):.4f}, "
            f"{metric} {models.quality(n):.4f}"
        )
        write_report(args.report, report, models)  # now, so that an interrupted run loses little

    for drop in args.drop:
        found = {"drop": drop, **models.find(report["dense"] - drop, tell)}
        report["found"].append(found)
        talk.say(
            f"{metric} of at least {found['wanted']:.4f}: "
            + ("" if found["good_enough"] else "none is good enough; the best measured is ")
            + f"configuration {found['configuration']}, {found['kept']:.4f} of the blocks' {args.measure}, "
            f"{metric} {found['quality']:.4f}; {found['looked_at']} of {len(kept)} looked at, "
            f"{found['measured']} measured"
        )
    write_report(args.report, report, models)
    configs = [configurations.configs[found["configuration"]] for found in report["found"]]
    content = dataclasses.replace(configurations, configs=configs).to_json()
    if not keeps_existing(args.output, content, args.overwrite, is_ours=looks_like_configurations):
        write_json(args.output, content)
    return {"output": args.output, "configurations": len(kept), **report}


def read_rows(path):
    """What an earlier report says of models that were measured; [] where there is none."""
    if path is None or not Path(path).exists() or damage_in(path):
        return []
    report = read_json(path, "this program")
    check(path, report, REPORT, "delete it, or give --report another file")
    return [row for row in report["configurations"] if "key" in row]


def write_report(path, report, models):
    if path:
        write_json(path, report | {"configurations": models.rows()})


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
