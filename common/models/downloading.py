"""Models of others: out of a local folder, the hub's local cache, or the hub."""

from pathlib import Path

import torch
import transformers

from common.blocks.families import COMPACT
from common.models.checks import check_adapter, check_loading, computed_weights, skeleton_of, stored_dtype
from common.models.load import LoadedModel, class_and_config, read_model_record, resolve
from common.models.publishing import license_of
from common.models.tokenizer import read_tokenizer, tokenizer_in, vocabularies
from common.runtime.errors import UserError, as_user_error, lacks_memory
from common.runtime.records import check_files

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "source.spm")


def download(
    checkpoint: str, model_type: str | None, talk, *, task: str | None = None, tokenizer: str | None = None
) -> tuple[LoadedModel, object]:
    """A model (float32) and its tokenizer: from a local folder, or from the hub's local cache, else the network.

    Args:
        model_type: what it must be; None for any that is known.
        task: what it is for; None for what a folder's record says, or else for its type's usual one.
        tokenizer: folder or hub id of the tokenizer; None for the checkpoint's own.
    Raises:
        UserError: no such checkpoint, one of another family or task, a damaged one, or no network and nothing cached.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        record = read_model_record(folder)
        check_files(folder, record)
        if tokenizer is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = resolve(record.get("tokenizer"), folder)
            if tokenizer is None:
                raise UserError(f"{checkpoint}: has no tokenizer; give its folder or hub id with -t")
        record = record | ({"task": task} if task else {})
        with as_user_error(checkpoint, "cannot be loaded as a model with a tokenizer"):
            model, tokenizer, dtype = _pretrained(checkpoint, model_type, True, record.get("task"), tokenizer)
        return LoadedModel(model, folder, record, dtype=dtype), tokenizer
    if folder.is_file():
        raise UserError(f"{checkpoint}: is a file; a checkpoint is a folder as transformers saves it, or a hub id")
    if checkpoint.startswith((".", "/", "~")) or checkpoint.endswith("/") or checkpoint.count("/") > 1:
        raise UserError(f"{checkpoint}: no such folder, and no hub id (such as google-t5/t5-small) either")
    for local_only in (True, False):
        if not local_only:
            talk.say(f"{checkpoint}: is not in the local cache; asking the hub")
        try:
            model, loaded_tokenizer, dtype = _pretrained(checkpoint, model_type, local_only, task, tokenizer)
            return LoadedModel(model, folder, {"task": task} if task else {}, dtype=dtype), loaded_tokenizer
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        except Exception as error:  # no network, nothing cached, damaged files: many classes
            if lacks_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
    raise UserError(
        f"{checkpoint}: is not in the local cache and not available from the hub ({reason}); "
        "give a folder that save_pretrained wrote, or try t5-demo or distilbert-demo, which need no network"
    )


def _pretrained(checkpoint, model_type, local_only, task, tokenizer_path):
    """(model, tokenizer, type of the weights in the file), as transformers finds them."""
    check_adapter(checkpoint, local_only)
    settings, _ = transformers.PreTrainedConfig.get_config_dict(checkpoint, local_files_only=local_only)
    of_class, config = class_and_config(settings, task)
    if model_type not in (None, settings["model_type"].removeprefix(COMPACT)):
        raise UserError(f"is a {settings['model_type']} model, not a {model_type} one")
    dtype, computed = stored_dtype(config), computed_weights(skeleton_of(of_class, config))
    model, report = of_class.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        local_files_only=local_only,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else its error only names a report; ours comes next
    )
    check_loading(report, of_class, computed, may_hold_more=True)  # such as the head of another task
    folder = Path(tokenizer_path or checkpoint)
    if (folder / "tokenizer_config.json").is_file():
        return model, tokenizer_in(folder, config), dtype
    return model, read_tokenizer(str(folder), min(vocabularies(config)), local_only), dtype


def origin_of(checkpoint: str) -> dict[str, str]:
    """What a record says of a checkpoint that `download` has got: {"base_model"} and, if it is known, {"license"}."""
    path = Path(transformers.utils.cached_file(checkpoint, "config.json", local_files_only=True))
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    return {"base_model": name, **license_of(path.parent)}
