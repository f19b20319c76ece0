#!/usr/bin/env python3
"""Save a model to ./model/ and its tokenizer to ./tokenizer/.

t5 and distilbert come from the Hugging Face hub. t5-demo and distilbert-demo need no network: their data are
generated from the seed (to ./data/) and a small model is trained on them on the spot, in about a minute.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.records import check_writable, digest, is_done, make_record

HUB_TYPES, DEMO_TYPES = ("t5", "distilbert"), ("t5-demo", "distilbert-demo")


def build_parser():
    parser = cli.build_parser(__doc__, overwrite=True)
    parser.add_argument(
        "model_type", metavar="MODEL_TYPE", choices=HUB_TYPES + DEMO_TYPES, help=", ".join(HUB_TYPES + DEMO_TYPES)
    )
    parser.add_argument(
        "--checkpoint",
        help="hub id of another checkpoint of the same family; "
        "without it google-t5/t5-small or lvwerra/distilbert-imdb",
    )
    parser.add_argument("--name", help="name of the folders; without it the model type")
    parser.add_argument("-o", "--output", default=".", help="where the folders model/, tokenizer/ and data/ lie")
    return parser


def run(args):
    if args.checkpoint and args.model_type in DEMO_TYPES:
        raise UserError(f"--checkpoint: {args.model_type} is built here, not downloaded; leave the flag out")
    name = args.name or args.model_type
    model_path, tokenizer_path, data_path = (Path(args.output) / part / name for part in ("model", "tokenizer", "data"))
    for path in (model_path, tokenizer_path):
        check_writable(path)
    from common import demo
    from common.architectures import FAMILIES
    from common.evaluation import parameter_counts
    from common.models import download, load_model, read_record, reference, resolve_device, save_model, save_tokenizer

    talk = cli.Talk(args.quiet)
    device = resolve_device(args.device)
    is_demo = args.model_type in DEMO_TYPES
    family = FAMILIES[args.model_type.removesuffix("-demo")]
    checkpoint = args.checkpoint or family.checkpoint
    key = digest([args.model_type, args.seed, demo.VERSION] if is_demo else [args.model_type, checkpoint])
    if is_done(model_path, read_record(model_path), key, args.overwrite) and tokenizer_path.exists():
        talk.say(f"{model_path}: is there already")
        return {
            "model": str(model_path),
            "tokenizer": str(tokenizer_path),
            "skipped": True,
            **parameter_counts(load_model(model_path).model),
        }
    if is_demo:
        check_writable(data_path)
        model, tokenizer, measured = demo.build(
            args.model_type,
            seed=args.seed,
            data_path=data_path,
            device=device,
            talk=talk,
            checkpoint_path=f"{model_path}.checkpoint",
        )
    else:
        model, tokenizer = download(checkpoint, family, talk)
        data_path, measured = family.data, {}
    save_tokenizer(tokenizer_path, tokenizer)
    record = make_record(
        "download_model.py",
        key,
        model_type=args.model_type,
        measured=measured,
        seed=args.seed if is_demo else None,
        checkpoint=None if is_demo else checkpoint,
        data=reference(data_path, model_path),
        tokenizer=reference(tokenizer_path, model_path),
    )
    save_model(model_path, model, record)
    Path(f"{model_path}.checkpoint").unlink(missing_ok=True)
    talk.say(f"{model_path}: saved, its tokenizer in {tokenizer_path}")
    return {
        "model": str(model_path),
        "tokenizer": str(tokenizer_path),
        "skipped": False,
        **measured,
        **parameter_counts(model),
    }


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
