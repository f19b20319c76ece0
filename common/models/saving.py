"""Models and tokenizers on disk, written: atomically, in the type that was asked for; and whether they are there."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.blocks.tensors import aliasing_copy
from common.models.cards import CARD_NAME, model_card
from common.models.checks import computed_weights, is_finite
from common.models.load import PTH_FORMAT, load_model
from common.runtime.errors import UserError
from common.runtime.files import atomic_file, atomic_folder
from common.runtime.records import (
    RECORD_NAME,
    check_files,
    content_digest,
    is_done,
    read_json,
    read_record,
    write_record,
)


def rounded(path: str | Path, model, dtype: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of a model that is saved in a type, and the same rounded to it.

    Args:
        path: what names the model in a message.
        dtype: one of `DTYPES`; nothing is rounded to float32.
    Raises:
        UserError: a number is too large for the type.
    """
    unsaved = computed_weights(model)
    for name, tensor in model.state_dict().items():
        if dtype == "float32" or name in unsaved or not tensor.is_floating_point():
            continue
        other = tensor.to(getattr(torch, dtype))
        if not is_finite(other) and is_finite(tensor):
            raise UserError(
                f"{path}: {name} holds {float(tensor.abs().max()):g}, and {dtype} ends at "
                f"{torch.finfo(other.dtype).max:g}; not written; choose another --dtype, such as float32"
            )
        yield tensor, other


@torch.no_grad()
def round_to(path: str | Path, model, dtype: str) -> None:
    """Round a model's weights, in place, to what `save_model` writes in a type; they stay float32. See `rounded`."""
    for tensor, other in rounded(path, model, dtype):
        tensor.copy_(other)


def check_range(path: str | Path, model, dtype: str) -> None:
    """Make sure that a type can hold a model's weights. See `rounded`."""
    for _ in rounded(path, model, dtype):
        pass


def save_model(path: str | Path, model, record: dict, *, masks=None, tokenizer=None, dtype: str = "float32") -> None:
    """Save a model, atomically: a `.pth` if the path ends so, else a Hugging Face folder (safetensors).

    Args:
        record: from `records.make_record`.
        masks: {parameter name: bool tensor}, kept in a `.pth` where they remove something.
        tokenizer: saved beside the model in a folder.
        dtype: of the weights in the file, one of `DTYPES`.
    Raises:
        UserError: a weight is not finite, or too large for the type; nothing is written then.
    """
    path = Path(path)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise UserError(f"{path}: {name} would hold values that are not finite; not written")
    if not model.can_generate() and model.config.problem_type is None:
        model.config.problem_type = "single_label_classification"  # a forward pass with labels would, if there was one
    if dtype != "float32":
        check_range(path, model, dtype)
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


def save_tokenizer(path: str | Path, tokenizer, record: dict) -> None:
    """Save a tokenizer's folder with its record, atomically."""
    with atomic_folder(path) as folder:
        tokenizer.save_pretrained(folder)
        write_record(folder, record)


def is_made(path: str | Path, made_from: dict, overwrite: bool, script: str) -> bool:
    """Whether a folder of files, or a `.pth`, is there already, whole and made from the same things.

    See `records.is_done`.
    """
    return is_done(path, _found_record(Path(path), script), made_from, overwrite, script, lambda: damage(path))


def _found_record(path, script):
    """The record of the output at `path`, or None: nothing is there, or nothing of ours.

    A `.pth` of ours that cannot be read counts as one of `script`.
    """
    try:
        if path.is_dir():
            return read_json(path / RECORD_NAME, "this suite")
        return json.loads(torch.load(path, map_location="cpu", weights_only=True)["record"])
    except Exception:  # no file, not a torch file, a pickle that holds code, a record that is none: many classes
        return {"script": script, "key": None} if path.is_file() and _begins_like_ours(path) else None


def _begins_like_ours(path):
    """Whether a file that may be truncated begins as our `.pth` do: a zip, and the format's name first."""
    with open(path, "rb") as handle:
        start = handle.read(4096)
    return start.startswith(b"PK") and PTH_FORMAT.encode() in start


def read_measured(path: str | Path) -> dict:
    """What a model's record says was measured of it."""
    return _found_record(Path(path), None)["measured"]


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
