"""Models and tokenizers on disk: Hugging Face folders and `.pth` files, each with its record.

A model's record says which tokenizer and which data belong to it, as paths relative to the model, or as hub ids.
Models are always loaded in float32, whatever their file holds: masks, statistics and fingerprints then mean the
same everywhere. Half precision is a matter of files alone.
"""

import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.blocks import find_blocks, sharing_copy
from common.cards import CARD_NAME, license_of, model_card
from common.errors import UserError
from common.families import COMPACT, FAMILIES, Family, family_name, family_of
from common.files import atomic_file, atomic_folder
from common.model_files import (
    check_archive,
    check_config,
    check_finite,
    check_generation,
    check_pth,
    check_shapes,
    check_single_label,
    check_token_ids,
    check_tokenizer,
    check_tokenizer_settings,
    class_named,
    computed_weights,
    is_finite,
    read_config,
    skeleton_of,
    stored_dtype,
    stored_shapes,
    told_in_one_line,
    weight_files,
)
from common.paired_tokenizer import TARGET, PairedTokenizer
from common.records import (
    FORMAT_VERSION,
    RECORD_NAME,
    check_files,
    check_seal,
    content_digest,
    is_done,
    read_json,
    read_record,
    sealed,
    write_record,
)
from common.schema import PATH, SHA256, Anything, MapOf, Maybe, Object, Text, check
from common.sources import DATA, DataSource
from common.studies import Study, study_of, usual_task
from common.tasks import TASKS, Classification, Translation

PTH_FORMAT = f"composable-pruning {FORMAT_VERSION}"  # what a .pth says first
GENERATION_NAME = "generation_config.json"
LARGEST_SHARD = "50GB"  # of a weights file, as transformers has it
REFERENCE = Maybe(Object({}, {"folder": PATH, "hub": PATH}))
MODEL_RECORD = Object(
    {},
    {
        "script": Text(),
        "key": Maybe(Text()),
        "task": Text(tuple(TASKS)),
        "tokenizer": REFERENCE,
        "data": DATA,
        "base_model": Text(),
        "license": Text(),
        "original": Object({"fingerprint": SHA256, "name": Text()}, {"type": Text(), "model": REFERENCE}, others=True),
        "variants": MapOf(Text()),
        "measured": MapOf(Anything()),
    },
    others=True,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass
class LoadedModel:
    """A model as `load_model` finds it."""

    model: torch.nn.Module
    path: Path
    record: dict = field(default_factory=dict)  # {} for a folder that this suite did not write
    masks: dict = field(default_factory=dict)  # {parameter name: bool}, from a .pth
    dtype: str = "float32"  # of its weights on disk, one of `model_files.DTYPES`

    @property
    def family(self) -> Family:
        """Where its blocks are."""
        return family_of(self.model.config)

    @property
    def task(self) -> Translation | Classification:
        """What it is used for: as its record says, or as is usual for its type."""
        return TASKS[self.record.get("task") or usual_task(self.model.config.model_type)]

    @property
    def study(self) -> Study:
        """What suits it."""
        return study_of(self.model.config.model_type, self.task.name)

    @property
    def positions(self) -> int | None:
        """How many tokens it has positions for; None where they are relative, as T5's are."""
        return self.family.positions(self.model.config)

    @property
    def label2id(self) -> dict[str, int]:
        """The numbers of a classifier's labels by their names."""
        config = self.model.config
        names = {name: number for number, name in config.id2label.items()} | (config.label2id or {})
        return {name: number for name, number in names.items() if number in config.id2label}

    def prefix(self, source: DataSource) -> str:
        """What stands in front of every input text: as the source says, or as the model was trained.

        Raises:
            UserError: the source says nothing, and has other languages than the model's study.
        """
        usual = self.study.prefix
        if source.prefix is None and usual and source.columns(self.task) != list(self.task.columns):
            raise UserError(
                f"--prefix: is {usual!r} for a {self.model.config.model_type} model, unless you say what stands in "
                f"front of the inputs of {source} ('' for nothing)"
            )
        return usual if source.prefix is None else source.prefix

    @property
    def license(self) -> dict[str, str]:
        """{"license": what the card in its folder says}, for records; {} where it says nothing."""
        name = license_of(self.path)
        return {"license": name} if name else {}

    def learning_rate(self, level: str) -> float:
        """The peak rate that suits it in "model", "block" or "joint" fine-tuning."""
        return self.study.learning_rate(level, self.model.config.hidden_size)

    @cached_property
    def identity(self) -> dict[str, str]:
        """{name, type, fingerprint}, as configurations, schemes and libraries hold it; computed once, on first use."""
        return {
            "name": self.path.resolve().stem if self.path.is_file() else self.path.resolve().name,
            "type": self.model.config.model_type,
            "fingerprint": fingerprint(self.model),
        }


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hex) over a model's blocks and the names, shapes and values of its parameters; tied ones count once.

    What else its files hold counts too, unless it is zero throughout: BART and Marian add a bias to the logits that is
    no parameter.
    """
    sha = hashlib.sha256(repr([(block.name, block.heads) for block in find_blocks(model).values()]).encode())
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved and bool(buffer.any()))
    for name, parameter in itertools.chain(model.named_parameters(), buffers):
        sha.update(f"{name} {tuple(parameter.shape)} ".encode())
        sha.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def model_class(model_type: str, task: str | None = None) -> type:
    """The class of a known model type's models, compact or not, for a task or for its usual one.

    Raises:
        UserError: the suite does not know the model type.
    """
    classes, task = FAMILIES[family_name(model_type)].model_classes, task or usual_task(model_type)
    if task not in classes:
        raise UserError(f"a {model_type} model is for {' or '.join(classes)}, not for {task}")
    name = classes[task]
    return class_named(f"Compact{name}" if model_type.startswith(COMPACT) else name)


# --- loading ---------------------------------------------------------------------------------------------------


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Load a model folder or `.pth` in float32, in `eval()`.

    Raises:
        UserError: nothing there, not a model, a `.pth` that holds code, a model type that is not supported, weights
            that are not those of the model's class, or some that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        loaded = _load_folder(path)
    elif path.is_file():
        loaded = _load_pth(path)
    else:
        raise UserError(f"{path}: no such model; download_model.py saves one to ./model/")
    check_finite(path, loaded.model.state_dict().items())
    loaded.model.to(device).eval()
    return loaded


def _load_folder(path):
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: is not a model folder (it has no config.json)")
    settings = read_config(path)
    record = _read_model_record(path / RECORD_NAME) if (path / RECORD_NAME).exists() else {}
    check_files(path, record)
    generation = None
    if (path / GENERATION_NAME).is_file():
        generation = read_json(path / GENERATION_NAME, "download_model.py")
    with _named(path), told_in_one_line(path, "model"):
        of_class, config = _class_and_config(settings, record)
        files = weight_files(path)
        skeleton = skeleton_of(of_class, config)
        check_shapes(skeleton, of_class, stored_shapes(files))
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if generation is None and of_class.can_generate():  # older checkpoints say in config.json how to generate
            generation = transformers.GenerationConfig.from_model_config(dict(settings)).to_dict()
        model = _from_state(of_class, config, state, computed_weights(skeleton), generation)
        dtype = stored_dtype(settings, files)
    return LoadedModel(model, path, record, dtype=dtype)


def _read_model_record(path):
    record = read_record(path)
    check(path, record, MODEL_RECORD, "make the model again")
    return record


@contextmanager
def _named(path):
    """Name the model in a `UserError` that does not."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _class_and_config(settings, record):
    """The class and the config of a model, out of our own tables, whatever classes its files name."""
    of_class = model_class(settings["model_type"], record.get("task"))
    config = of_class.config_class.from_dict(settings)
    check_single_label(config)
    return of_class, config


def _from_state(of_class, config, state, computed, generation=None):
    """A model out of a config and {parameter name: tensor}, in float32; weights that the config ties are tied.

    Args:
        computed: see `computed_weights`.
        generation: what its generation config holds; None for what follows from the config.
    Raises:
        UserError: the names or shapes are not the model's; or a generation config that is not supported.
    """
    model, report = of_class.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    _check_loading(report, of_class, computed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in computed)  # loading makes all of them trainable
    family_of(config).positions(config)
    if model.can_generate():
        if generation is not None:
            check_generation("its generation config", generation, vocabularies(config)[1])
            model.generation_config = transformers.GenerationConfig.from_dict(generation)
        check_generation("its generation config", model.generation_config.to_dict(), vocabularies(config)[1])
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, name, None) is None:
                raise UserError(f"config.json: {name!r}: nothing where a token of the model belongs")
    check_token_ids("config.json", config.to_dict(), vocabularies(config)[1])
    return model


def _check_loading(report, of_class, computed, may_hold_more=False):
    """Make sure that a file's weights are those of a class: all of them, in their shapes, and unless it may, no more.

    Those that are `computed` from the config, as Pegasus' positions, need not be there.

    Raises:
        UserError: naming the first that is not.
    """
    foreign = [name for name in report["unexpected_keys"] if not name.endswith(".position_ids")]  # once saved, unused
    for what, names in (
        ("lacks", set(report["missing_keys"]) - computed),
        ("has a foreign", [] if may_hold_more else foreign),
        ("has another shape for", report["mismatched_keys"]),
    ):
        if names:
            raise UserError(f"its weights are not those of a {of_class.__name__}: it {what} {min(map(str, names))}")


def _without_digest(content):
    return {name: value for name, value in content.items() if name != "digest"}


def _load_pth(path):
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, a pickle that holds code, not a torch file: many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds more than plain tensors, which is never run"
        raise UserError(f"{path}: cannot be loaded as a model: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != PTH_FORMAT:
        raise UserError(f"{path}: is not a model file that model-level_finetuning.py wrote")
    with _named(path), told_in_one_line(path, "model"):
        record, settings, generation = check_pth(content)  # first: it bounds the tensors
        if "digest" in content and content["digest"] != content_digest(_without_digest(content)):
            raise UserError("is not what was written (corrupt or changed); make it again")
        check_seal("its record", record)
        check("its record", record, MODEL_RECORD, "make the model again")
        check_config("its config", settings)
        of_class, config = _class_and_config(settings, record)
        skeleton = skeleton_of(of_class, config)
        check_shapes(skeleton, of_class, {name: tuple(each.shape) for name, each in content["state_dict"].items()})
        model = _from_state(of_class, config, content["state_dict"], computed_weights(skeleton), generation)
    return LoadedModel(model, path, record, content["masks"], stored_dtype(settings, []))


def load_tokenizer(path: str | Path | None, loaded: LoadedModel):
    """The tokenizer in `path`, or without one that of the model's record, or the one in the model's own folder.

    Raises:
        UserError: none of them is there.
    """
    if path is None:
        path = resolve(loaded.record.get("tokenizer"), loaded.path) or loaded.path
        hint = "; give its folder with -t"
    else:
        hint = "; download_model.py saves one to ./tokenizer/"
    path = Path(path)
    if not (path / "tokenizer_config.json").is_file():
        raise UserError(f"{path}: is not a tokenizer folder (it has no tokenizer_config.json){hint}")
    if (path / RECORD_NAME).is_file():  # weights are checked where they are loaded
        check_files(path, read_record(path / RECORD_NAME), lambda name: not name.endswith(".safetensors"))
    return _tokenizer_in(path, loaded.model.config)


def vocabularies(config) -> tuple[int, int]:
    """How many tokens the source has, and the target: one vocabulary, unless it is a Marian with two."""
    return config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size


def _tokenizer_in(path, config):
    """The tokenizer of a folder, or the pair of a source's and, in a folder within it, a target's.

    Raises:
        UserError: one of them is damaged, or not for a model of that config.
    """
    folders = [path, path / TARGET] if (path / TARGET / "tokenizer_config.json").is_file() else [path]
    sizes = vocabularies(config) if len(folders) > 1 else [min(vocabularies(config))]
    found = []
    for folder, vocabulary in zip(folders, sizes):
        check_tokenizer_settings(folder)
        with told_in_one_line(folder, "tokenizer", Exception):  # the tokenizers library raises it bare
            found.append(
                transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            )
        check_tokenizer(folder, found[-1], vocabulary)
    return PairedTokenizer(*found) if len(found) > 1 else found[0]


def data_source(given: DataSource | str | None, loaded: LoadedModel) -> DataSource | None:
    """Which data a model is used on: as given, and for the rest as in its record, else its study's; None for none."""
    given = given if isinstance(given, DataSource) else DataSource(data=given)
    recorded = loaded.record.get("data")
    source = given.over(recorded and DataSource.from_json(recorded, loaded.path))
    source = source if source.is_located else replace(source, data=loaded.study.data)
    return source if source.is_located else None


def download(
    checkpoint: str, model_type: str | None, talk, *, task: str | None = None, tokenizer: str | None = None
) -> tuple[LoadedModel, object]:
    """A model (float32) and its tokenizer: from a local folder, or from the hub's local cache, else the network.

    Args:
        model_type: what it must be; None for any that is known.
        task: what it is for; None for what a folder's record says, or else for its type's usual one.
        tokenizer: folder or hub id of the tokenizer; None for the checkpoint's own.
    Raises:
        UserError: no such checkpoint, one of another family, one without the weights of the task's head, a damaged
            one, or no network and nothing cached.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        record = _read_model_record(folder / RECORD_NAME) if (folder / RECORD_NAME).exists() else {}
        check_files(folder, record)
        read_config(folder)
        if tokenizer is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = resolve(record.get("tokenizer"), folder)
            if tokenizer is None:
                raise UserError(f"{checkpoint}: has no tokenizer; give its folder or hub id with -t")
        record = record | ({"task": task} if task else {})
        with _named(checkpoint), told_in_one_line(checkpoint, "model with a tokenizer", Exception):
            model, tokenizer = _pretrained(checkpoint, model_type, True, record.get("task"), tokenizer)
        return LoadedModel(model, folder, record), tokenizer
    if folder.is_file():
        raise UserError(f"{checkpoint}: is a file; a checkpoint is a folder as transformers saves it, or a hub id")
    if checkpoint.startswith((".", "/", "~")) or checkpoint.endswith("/") or checkpoint.count("/") > 1:
        raise UserError(f"{checkpoint}: no such folder, and no hub id (such as google-t5/t5-small) either")
    for local_only in (True, False):
        if not local_only:
            talk.say(f"{checkpoint}: is not in the local cache; asking the hub")
        try:
            with _named(checkpoint):
                model, own = _pretrained(checkpoint, model_type, local_only, task, tokenizer)
            return LoadedModel(model, folder, {"task": task} if task else {}), own
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
    raise UserError(
        f"{checkpoint}: is not in the local cache and not available from the hub ({reason}); "
        "give a folder that save_pretrained wrote, or try t5-demo or distilbert-demo, which need no network"
    )


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "source.spm")


def _pretrained(checkpoint, model_type, local_only, task, tokenizer_path):
    """A model and its tokenizer, as transformers finds them."""
    options = {"local_files_only": local_only, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(checkpoint, **options)
    if model_type not in (None, config.model_type.removeprefix(COMPACT)):
        raise UserError(f"is a {config.model_type} model, not a {model_type} one")
    of_class = model_class(config.model_type, task)
    check_single_label(config)
    model, report = of_class.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=local_only, output_loading_info=True
    )
    computed = computed_weights(skeleton_of(of_class, config))
    _check_loading(report, of_class, computed, may_hold_more=True)  # such as the head of another task
    folder = Path(tokenizer_path or checkpoint)
    if (folder / "tokenizer_config.json").is_file():
        return model, _tokenizer_in(folder, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    check_tokenizer(folder, tokenizer, min(vocabularies(config)))
    return model, tokenizer


def folder_of(checkpoint: str) -> Path:
    """Where a checkpoint's files are: the local folder, or what `download` left in the local cache."""
    return Path(transformers.utils.cached_file(checkpoint, "config.json", local_files_only=True)).parent


def original_dtype(checkpoint: str) -> str:
    """The type of a checkpoint's weights, once `download` has got it."""
    folder = folder_of(checkpoint)
    settings = read_config(folder)
    try:
        files = weight_files(folder)
    except UserError:  # weights in a format of torch's own
        files = []
    return stored_dtype(settings, files)


def origin_of(checkpoint: str) -> dict[str, str]:
    """What a record says of a checkpoint that `download` has got: {"base_model"} and, if it is known, {"license"}."""
    folder, is_local = folder_of(checkpoint), Path(checkpoint).is_dir()
    license_name = license_of(folder)
    return {"base_model": Path(checkpoint).resolve().name if is_local else checkpoint} | (
        {"license": license_name} if license_name else {}
    )


# --- references: a record's {"folder": relative path} or {"hub": id} ---------------------------------------------


def reference(target: str | Path | None, model_path: str | Path) -> dict[str, str] | None:
    """How the record of the model at `model_path` names a folder or hub id."""
    if target is None:
        return None
    if Path(target).exists():
        return {"folder": os.path.relpath(target, Path(model_path).parent)}
    return {"hub": str(target)}


def resolve(named: dict | None, model_path: str | Path) -> str | None:
    """The folder or hub id that `reference` named."""
    if not isinstance(named, dict):
        return None
    return str(Path(model_path).parent / named["folder"]) if "folder" in named else named.get("hub")


# --- saving ----------------------------------------------------------------------------------------------------


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


def save_model(
    path: str | Path,
    model,
    record: dict,
    *,
    masks=None,
    tokenizer=None,
    dtype: str = "float32",
    shard_size: str | None = None,
) -> None:
    """Save a model, atomically: a `.pth` if the path ends so, else a Hugging Face folder (safetensors).

    Args:
        record: from `records.make_record`.
        masks: {parameter name: bool tensor}, kept in a `.pth` where they remove something.
        tokenizer: saved beside the model in a folder.
        dtype: of the weights in the file, one of `DTYPES`.
        shard_size: largest weights file of a folder, such as "200MB", beyond which there are several; None for
            transformers' own.
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
        model = sharing_copy(model).to(getattr(torch, dtype))
        model.config.dtype = dtype
    if path.suffix == ".pth":
        generation = getattr(model, "generation_config", None)  # a classifier has none
        content = {
            "format": PTH_FORMAT,
            "config": json.dumps(model.config.to_dict(), sort_keys=True),
            "generation_config": json.dumps(generation.to_dict() if generation else None),
            "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
            "masks": {name: mask.cpu() for name, mask in (masks or {}).items() if not bool(mask.all())},
            "record": json.dumps(sealed(record)),
        }
        with atomic_file(path) as handle:
            torch.save({**content, "digest": content_digest(content)}, handle)
        return
    with atomic_folder(path) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.save_pretrained(folder, max_shard_size=shard_size or LARGEST_SHARD)
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

    If a record cannot be trusted, its key is None; a `.pth` of ours that cannot be read counts as one of `script`.
    """
    try:
        if path.is_dir():
            record = read_json(path / RECORD_NAME, "this suite")
        else:
            record = json.loads(torch.load(path, map_location="cpu", weights_only=True)["record"])
        try:
            check_seal(path, record)
        except UserError:
            record["key"] = None
        return record
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
            _load_pth(path)
    except UserError as error:
        return str(error)
    return None
