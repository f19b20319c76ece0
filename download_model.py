#!/usr/bin/env python3
"""Save a model to ./model/ and its tokenizer to ./tokenizer/.

With --checkpoint, a model of your own is adopted: a folder that save_pretrained wrote, or a hub id. What is said of its
data, here, belongs to the model from then on: no later stage need be told. Texts alone (--unlabelled) will do. See
docs/data.md.

t5 and distilbert come from the Hugging Face hub. t5-demo and distilbert-demo need no network: their data are part of
the suite (copied to ./data/), and a small model is trained on them on the spot, to its end, in two to three minutes.
seq2seq is a Marian with two vocabularies, trained from scratch on the data given with --data, or a small one on the
captions of t5-demo.
"""

import os
import sys
from pathlib import Path

from common.blocks.families import FAMILIES, family_name
from common.cli.flags import (
    DATA,
    OUTPUT,
    Parser,
    add_compute,
    add_dtype,
    add_seed,
    add_settings,
    flags_of,
    refuse_unused,
)
from common.cli.launch import launch
from common.cli.values import int_between
from common.data.sources import SPLITS, UNLABELLED, DataSource, check_source
from common.runtime.errors import UserError
from common.runtime.files import check_apart, check_writable
from common.runtime.progress import Talk
from common.runtime.records import digest, file_digest, folder_digest, make_record
from common.runtime.settings import ScratchSettings, TrainingDataSettings

NAME = "download_model.py"  # in records
DEMO_TYPES = ("t5-demo", "distilbert-demo")
MANY_ZEROS = 0.01  # the share of the blocks' weights that is told: others than pruned ones are hardly ever zero
FROM_SCRATCH = "seq2seq"  # a Marian model with two vocabularies
SOURCE_FLAGS, SCRATCH_FLAGS = flags_of(DataSource), [*flags_of(ScratchSettings), "precision"]


def build_parser():
    parser = Parser(
        __doc__,
        usage="%(prog)s [MODEL_TYPE] [flags]",
        example="download_model.py t5-demo",
        next_stage="config_generator.py",
        overwrite=True,
    )
    group, types = parser.group(OUTPUT), (*FAMILIES, *DEMO_TYPES, FROM_SCRATCH)
    group.add_argument(
        "model_type",
        metavar="MODEL_TYPE",
        nargs="?",
        choices=types,
        help=f"{', '.join(types)}; may be left out with --checkpoint",
    )
    group.add_argument(
        "--checkpoint",
        help="folder or hub id of the model to adopt; without it the study's, which t5 and distilbert have",
    )
    group.add_argument("-t", "--tokenizer", help="folder or hub id of its tokenizer, if not in the checkpoint")
    tasks = sorted({task for family in FAMILIES.values() for task in family.model_classes})
    group.add_argument("--task", choices=tasks, help="what it is for; without it what is usual for its type")
    add_dtype(parser)
    group.add_argument("--name", help="name of the folders; without it the model type, or the checkpoint's")
    group.add_argument("-o", "--output", default=".", help="where the folders model/, tokenizer/ and data/ lie")
    add_settings(parser, DataSource, DATA)
    parser.group(DATA).add_argument(
        "--limit", type=int_between(1), metavar="N", help="of --unlabelled, answer only N texts, always the same ones"
    )
    add_settings(parser, ScratchSettings, "training of a seq2seq model; what is left out is as suits the data")
    add_seed(parser, "demos and seq2seq")
    add_compute(parser, omit=("accumulate",))
    return parser


def run(args):
    is_demo, from_scratch = args.model_type in DEMO_TYPES, args.model_type == FROM_SCRATCH
    if args.checkpoint and (is_demo or from_scratch):
        raise UserError(f"--checkpoint: {args.model_type} is built here, not downloaded; leave the flag out")
    if not from_scratch:
        refuse_unused(args, SCRATCH_FLAGS, "is for a seq2seq model that is trained here")
    makes_data = is_demo or (from_scratch and not (args.data or args.train_file))
    if args.dtype and (is_demo or from_scratch):
        raise UserError(f"--dtype: {args.model_type} is trained here, and written in float32; leave the flag out")
    if args.model_type is None and args.checkpoint is None:
        raise UserError(
            f"MODEL_TYPE: say which ({', '.join((*FAMILIES, *DEMO_TYPES, FROM_SCRATCH))}), or adopt a --checkpoint"
        )
    if is_demo or from_scratch:
        names = [*(SOURCE_FLAGS if makes_data else ["prefix"]), "tokenizer", "task"]
        refuse_unused(args, names, f"{args.model_type} is built here, with all that it needs")
    raw = {}  # what the key has of texts without targets
    if args.unlabelled is None:
        refuse_unused(args, ["limit"], "goes with --unlabelled")
    else:
        refuse_unused(args, ["data", "data_config", "train_file"], "the training data are those of --unlabelled")
        raw = {"unlabelled": file_digest(args.unlabelled), "limit": args.limit}
    name = args.name or args.model_type or Path(args.checkpoint).resolve().name
    if Path(name).name != name or name == "..":
        raise UserError(f"--name {name}: must be the plain name of a folder")
    model_path, tokenizer_path, data_path = (Path(args.output) / part / name for part in ("model", "tokenizer", "data"))
    outputs = [model_path, tokenizer_path, *[data_path] * bool(makes_data or raw)]
    files = {f"--{split}-file": getattr(args, f"{split}_file") for split in SPLITS} | {"--unlabelled": args.unlabelled}
    check_apart({"-o": outputs}, {"--checkpoint": args.checkpoint, "-t": args.tokenizer, "--data": args.data, **files})
    for path in outputs:
        check_writable(path)
    from common.blocks.defaults import study_of, usual_task
    from common.blocks.tensors import parameter_counts, share_of_zeros
    from common.cli import unlabelled
    from common.cli.open import Opened, check_data
    from common.models.downloading import download, origin_of
    from common.models.languages import set_languages
    from common.models.load import data_source, load_model
    from common.models.saving import is_made, round_to
    from common.models.trial import save_tried
    from common.runtime.devices import Runtime, resolve_device
    from common.training.checkpoints import Checkpoint
    from common.training.scratch import demo
    from common.training.scratch.train import ON_CAPTIONS, USUAL, texts_digest, train

    talk = Talk(args.quiet)
    device = resolve_device(args.device)
    family = "marian" if from_scratch else args.model_type and args.model_type.removesuffix("-demo")
    checkpoint = None if is_demo else args.checkpoint or study_of(family).checkpoint
    if checkpoint is None and not is_demo and not from_scratch:
        raise UserError(f"--checkpoint: {family} has no checkpoint of its own here; say which one")
    given = DataSource(**{name: getattr(args, name) for name in SOURCE_FLAGS})
    made_from = {"type": args.model_type}
    if from_scratch:
        usual = ON_CAPTIONS if makes_data else USUAL
        settings = {name: value if vars(args).get(name) is None else vars(args)[name] for name, value in usual.items()}
        made_from |= settings | {"seed": args.seed, "precision": args.precision}
    if makes_data:
        made_from |= {"seed": args.seed, "demo_version": demo.VERSION}
    elif from_scratch:
        made_from |= {"data": texts_digest(given)}
    else:
        made_from |= {"checkpoint": checkpoint}
        made_from |= {"data": given.to_json(model_path)} if given != DataSource() else {}
        made_from |= {"files": folder_digest(checkpoint)} if Path(checkpoint).is_dir() else {}
        made_from |= raw | {"answers_version": unlabelled.VERSION} if raw else {}
    made_from |= {name: getattr(args, name) for name in ("dtype", "tokenizer", "task") if getattr(args, name)}
    key = digest(made_from)
    unfinished = Checkpoint(model_path, {"model": key}, talk)
    are_made = [is_made(path, made_from, args.overwrite, NAME) for path in outputs]  # all, before any work
    if all(are_made):
        talk.say(f"{model_path}: is there already")
        unfinished.remove()
        return {
            "model": str(model_path),
            "tokenizer": str(tokenizer_path),
            "skipped": True,
            **parameter_counts(load_model(model_path).model),
        }
    dtype, origin, examples, answered = "float32", {}, {}, {}  # of what is trained here
    if is_demo:
        model, tokenizer, measured = demo.build(
            args.model_type,
            seed=args.seed,
            data_path=data_path,
            data_record=make_record(NAME, made_from),
            device=device,
            talk=talk,
            checkpoint=unfinished,
        )
        source, task = DataSource(data=str(data_path)), usual_task(family)
    elif from_scratch:
        if makes_data:
            demo.write_data("t5", data_path, make_record(NAME, made_from))
        source, task = DataSource(data=str(data_path)) if makes_data else given, usual_task(family)
        model, tokenizer, measured = train(
            source, settings, precision=args.precision, seed=args.seed, device=device, talk=talk, checkpoint=unfinished
        )
    else:
        loaded, tokenizer = download(checkpoint, family, talk, task=args.task, tokenizer=args.tokenizer)
        model, task, measured = loaded.model, loaded.task.name, {}
        zeros = share_of_zeros(model)
        if zeros > MANY_ZEROS:
            talk.say(
                f"{checkpoint}: {zeros:.0%} of its blocks' weights are zero; fine-tuning keeps those that a "
                "configuration removes, and of queries, keys and values whole heads alone"
            )
        source = data_source(given, loaded)
        if source:
            check_source(source, loaded.task)
            languages = set_languages(tokenizer, model, source, loaded.task)
            if languages:
                talk.say(f"{checkpoint}: its tokenizer takes inputs as {languages[0]}, targets as {languages[1]}")
        if given != DataSource():
            if source is None:
                raise UserError("--data: say which data these are; or give --train-file")
            runtime, limited = Runtime(device, unlabelled.BATCH_SIZE, talk), TrainingDataSettings(limit=args.limit)
            opened = Opened(loaded, runtime, tokenizer, source, limited)
            examples = check_data(opened)
            talk.say(f"{source}: can be read; splits that are there: {', '.join(examples)}")
        elif args.checkpoint and source:
            talk.say(f"{checkpoint}: no data were named, so its record names {source}; give others with --data")
        dtype = args.dtype or loaded.dtype
        round_to(model_path, model, dtype)
        origin = origin_of(checkpoint)
    data = source and source.to_json(model_path)
    if raw:
        answers_of = {"answers_of": origin["base_model"]}
        data |= {"folder": os.path.relpath(data_path, model_path.parent), **answers_of}

    def answer():
        if raw and not are_made[-1]:
            data_record = make_record(NAME, made_from, **answers_of)
            answered.update(unlabelled.write_answers(opened, data_path, data_record))

    record = make_record(
        NAME,
        made_from,
        model_type=args.model_type or family_name(model.config.model_type),
        task=task,
        **origin,
        measured=measured,
        data=data,
        tokenizer={"folder": os.path.relpath(tokenizer_path, model_path.parent)},
    )
    save_tried(
        model_path,
        tokenizer_path,
        model,
        tokenizer,
        record,
        make_record(NAME, made_from),
        where=checkpoint or model_path,
        dtype=dtype,
        examples=examples.get(UNLABELLED if raw else "train"),
        then=answer,
    )
    unfinished.remove()
    talk.say(f"{model_path}: saved, its tokenizer in {tokenizer_path}")
    return {
        "model": str(model_path),
        "tokenizer": str(tokenizer_path),
        "skipped": False,
        **measured,
        **answered,
        **parameter_counts(model),
    }


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
