#!/usr/bin/env python3
"""Compose the models of some configurations out of the original and a library, loadable with from_pretrained.

Without -n a finished model, -m, is written in another form: --compact, --dtype, --format and --vocabulary say which.
"""

import copy
import sys

from common.cli.flags import (
    COMPOSED,
    DATA,
    Parser,
    add_compute,
    add_configurations,
    add_settings,
    check_form,
    flags_given,
    numbered,
    refuse_unused,
)
from common.cli.launch import launch
from common.cli.paths import check_inputs
from common.runtime.errors import UserError
from common.runtime.files import check_apart, check_writable
from common.runtime.settings import DataSettings

NAME = "compose_model.py"  # in records
FORM = ("compact", "dtype", "format", "vocabulary")  # flags without which there is no other form


def build_parser():
    parser = Parser(
        __doc__,
        example="compose_model.py -n 0 1 2 -o 'composed-{n}'",
        next_stage="model-level_finetuning.py, or an evaluation",
        overwrite=True,
    )
    add_configurations(
        parser,
        library_help="the pruned or the fine-tuned library",
        output=f"{COMPOSED}/{{n}}",
        without_nth="; without it the model of -m itself is written to -o in another form",
    )
    add_settings(parser, DataSettings, DATA, omit=("max_length", "limit", "batch_size"))
    add_compute(parser, omit=("precision", "accumulate"))
    return parser


def run(args):
    if args.nth is None:
        if args.given.isdisjoint(FORM):
            raise UserError(f"-n: which configurations (-n 0 1), or what other form of -m: --{', --'.join(FORM)}?")
        refuse_unused(args, ["library", "configurations"], "goes with -n; without it the model of -m itself is written")
        args.library = args.configurations = None
    numbers = args.nth or [None]
    outputs = numbered(args.output, "-o", numbers)
    inputs = {"-m": args.model, "-p": args.library, "-c": args.configurations, "-t": args.tokenizer}
    repositories = numbered(args.push_to_hub, "--push-to-hub", numbers) if args.push_to_hub else {}
    check_apart({"-o": list(outputs.values())}, inputs)
    for output in outputs.values():
        check_writable(output, is_file=output.endswith(".pth"))
    check_form(args)
    if args.vocabulary is None:
        refuse_unused(args, ["data"], "is read for --vocabulary alone")
    check_inputs(args)
    from common.cli.open import open_model, open_study, open_tokenizer, open_vocabulary
    from common.composing.compose import choose
    from common.models.publishing import check_push, push

    check_push(repositories.values())
    opened = open_vocabulary(args, open_study(args)) if args.vocabulary else open_model(args)
    choices = choose(opened.loaded, args.library, args.configurations, args.nth) if args.nth else [None]
    tokenizer = opened.tokenizer or open_tokenizer(args, opened.loaded)
    results = []
    for nth, choice in zip(numbers, choices):
        counts = compose_one(args, opened, choice, tokenizer, outputs[nth], is_last=choice is choices[-1])
        made = {"configuration": nth, "blocks_replaced": len(choice.variants)} if choice else {}
        results.append({"output": outputs[nth], **made, **counts})
        what = f"configuration {nth} out of {choice.library.folder}" if choice else f"out of {opened.loaded.path}"
        opened.runtime.talk.say(f"{outputs[nth]}: {what}, sparsity {counts['sparsity']:.4f}")
    for nth, result in zip(numbers, results) if repositories else []:
        result["pushed_to"] = push(result["output"], repositories[nth], opened.runtime.talk)
    return results[0] if len(results) == 1 else {"models": results}


def compose_one(args, opened, choice, tokenizer, output, is_last):
    """Compose and save a configuration's model, unless it is there; returns its counts of parameters and its form.

    The last one is made of the original itself, so that there is no second model in memory. Without a choice, the model
    stays as it is but for its form.
    """
    from common.cli.open import form_from, some_examples
    from common.composing.compose import compose, composed_record, removed_parts
    from common.models.load import data_source
    from common.models.saving import is_made, read_measured, round_to
    from common.models.trial import check_half, trial_batch

    loaded = opened.loaded
    form = form_from(args, opened)
    variants = {"variants": choice.keys()} if choice else {}
    made_from = {"model": loaded.identity["fingerprint"], **variants, **form.to_json()}
    if is_made(output, made_from, args.overwrite, NAME):
        return read_measured(output) | form.figures()
    model = loaded.model if is_last else copy.deepcopy(loaded.model)
    masks = compose(model, choice) if choice else loaded.masks
    removed = choice and removed_parts(model, masks)
    model, masks = form.made(model, masks)
    round_to(output, model, form.rounded)
    if form.is_half:
        check_half(output, model, trial_batch(model, some_examples(opened, tokenizer)))
    source = opened.source or data_source(None, loaded)
    flags = flags_given(args, nth=[choice.nth]) if choice else flags_given(args)
    found = {"measured": form.measured(model), **form.figures(), "flags": flags}
    record = composed_record(NAME, made_from, choice, loaded, output, tokenizer, source, removed, **found)
    form.save(output, model, record, masks, tokenizer)
    return found["measured"] | form.figures()


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
