"""Models and tokenizers on disk, written: atomically, in the type that was asked for; and whether they are there."""

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.blocks.tensors import aliasing_copy, parameter_counts
from common.models.checks import computed_weights, is_finite
from common.models.engines import ENGINES
from common.models.load import PTH_FORMAT, load_model
from common.models.plain import ordinary_class, ordinary_settings
from common.models.publishing import model_card
from common.runtime.errors import UserError, as_user_error
from common.runtime.files import atomic_file, atomic_folder
from common.runtime.records import (
    CARD_NAME,
    RECORD_NAME,
    check_files,
    content_digest,
    is_done,
    read_json,
    read_record,
    write_record,
)


def check_range(path: str | Path, model, dtype: str) -> None:
    """Make sure that a model's weights are finite, and that a type, one of `DTYPES`, can hold them."""
    narrow = getattr(torch, dtype)
    for name, tensor in model.state_dict().items():
        if is_finite(tensor.to(narrow)):
            continue
        if not is_finite(tensor):
            raise UserError(f"{path}: {name} would hold values that are not finite; not written")
        raise UserError(
            f"{path}: {name} holds {float(tensor.abs().max()):g}, and {dtype} ends at "
            f"{torch.finfo(narrow).max:g}; not written; choose another --dtype, such as float32"
        )


@torch.no_grad()
def round_to(path: str | Path, model, dtype: str) -> None:
    """Round a model's weights, in place, to what `save_model` writes in a type; they stay float32."""
    check_range(path, model, dtype)
    computed = computed_weights(model)
    for name, tensor in model.state_dict().items():
        if name not in computed:
            tensor.copy_(tensor.to(getattr(torch, dtype)))


def save_model(
    path: str | Path,
    model,
    record: dict,
    *,
    masks=None,
    tokenizer=None,
    dtype: str = "float32",
    check: Callable[[Path], None] | None = None,
) -> None:
    """Save a model, atomically: a `.pth` if the path ends so, else a Hugging Face folder (safetensors).

    Args:
        record: from `records.make_record`.
        masks: {parameter name: bool tensor}, kept in a `.pth` where they remove something.
        tokenizer: saved beside the model in a folder.
        dtype: of the weights in the file, one of `DTYPES`.
        check: looks at a finished folder before it takes its place, and may raise.
    Raises:
        UserError: a weight is not finite, or too large for the type; nothing is written then.
    """
    path = Path(path)
    check_range(path, model, dtype)
    if not model.can_generate() and model.config.problem_type is None:
        model.config.problem_type = "single_label_classification"  # a forward pass with labels would, if there was one
    if dtype != "float32":
        model = aliasing_copy(model).to(getattr(torch, dtype))
        model.config.dtype = dtype
    if path.suffix == ".pth":
        generation = getattr(model, "generation_config", None)  # a classifier has none
        content = {
            "format": PTH_FORMAT,
            "config": json.dumps(model.config.to_dict(), sort_keys=True),
            "generation_config": json.dumps(generation.to_dict() if generation else None),
            "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
            "masks": {name: mask.cpu() for name, mask in (masks or {}).items() if not bool(mask.all())},
            "record": json.dumps(record),
        }
        with atomic_file(path) as handle:
            torch.save({**content, "digest": content_digest(content)}, handle)
        return
    if model.can_generate():
        # One with settings that have no effect, as some published ones are, is saved if it was not changed since then.
        model.generation_config._original_object_hash = hash(model.generation_config)
    with atomic_folder(path) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.save_pretrained(folder, max_shard_size="1TB")
            except SafetensorError as error:  # it tells of a full disk in its own way
                number = re.search(r"\(os error (\d+)\)", str(error))
                if not number:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        card = model_card(path.absolute().name, model, record, dtype, has_tokenizer=tokenizer is not None)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        write_record(folder, record)
        if check:
            check(folder)


def save_for_engine(
    name: str,
    path: str | Path,
    model,
    record: dict,
    tokenizer,
    quantization: str,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Save a model, compact or not, for an engine with its tokenizer, card and record, atomically; it is used up.

    Args:
        name: the engine's in `ENGINES`; `quantization` is one of its own.
        check: see `save_model`.
    Raises:
        UserError: the engine cannot hold the model, or do what its generation config asks for.
    """
    engine, path = ENGINES[name], Path(path)
    own = {
        "format": name,
        "quantization": quantization,
        "config": ordinary_class(model).config_class(**ordinary_settings(model.config)).to_dict(),
        "counts": parameter_counts(model),
    }
    if model.can_generate():
        own["generation"] = model.generation_config.to_dict()
    record = record | {"engine": own}
    with atomic_folder(path) as folder:
        with as_user_error(path, f"cannot be written for {engine.title}"):
            snippet = engine.code.write(folder, model, tokenizer, quantization)
        tokenizer.save_pretrained(folder)
        card = model_card(path.absolute().name, model, record, quantization, has_tokenizer=True, snippet=snippet)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        write_record(folder, record)
        if check:
            check(folder)


def is_made(path: str | Path, made_from: dict, overwrite: bool, script: str) -> bool:
    """Whether a folder, or a `.pth`, is there already, intact and made from the same things; see `records.is_done`."""
    return is_done(path, record_of(Path(path)), made_from, overwrite, script, lambda: damage(path))


def record_of(path: Path) -> dict | None:
    """The record of the output at `path`; None if nothing of ours is there."""
    try:
        if path.is_dir():
            return read_json(path / RECORD_NAME, "this suite")
        return json.loads(torch.load(path, map_location="cpu", weights_only=True)["record"])
    except Exception:  # no file, not a torch file, a pickle that holds code, a record that is none: many classes
        return None


def read_measured(path: str | Path) -> dict:
    """What a model's record says was measured of it."""
    return record_of(Path(path))["measured"]


def damage(path: str | Path) -> str | None:
    """What is wrong with the files of a folder that has a record, or with a `.pth`; None if they are as written."""
    path = Path(path)
    try:
        if path.is_dir():
            check_files(path, read_record(path / RECORD_NAME))
        else:
            load_model(path)
    except UserError as error:
        return str(error)
    return None
