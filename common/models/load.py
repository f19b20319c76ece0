"""Models and tokenizers on disk, read: Hugging Face folders and `.pth` files, each with its record.

A model's record says which tokenizer and which data belong to it, as paths relative to the model, or as hub ids.
Models are always loaded in float32: masks, statistics and fingerprints then mean the same everywhere.
"""

import hashlib
import itertools
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from common.blocks.defaults import Study, study_of, usual_task
from common.blocks.families import COMPACT, FAMILIES, Family, family_name, family_of
from common.blocks.find import find_blocks
from common.blocks.tensors import parameter_counts
from common.data.sources import DATA, DataSource, as_typed
from common.data.tasks import TASKS, Classification, Translation
from common.models.checks import (
    WEIGHTS_NAME,
    check_adapter,
    check_config,
    check_generation,
    check_head,
    check_loading,
    check_shapes,
    check_single_label,
    check_token_ids,
    class_named,
    computed_weights,
    is_finite,
    skeleton_of,
    stored_dtype,
    stored_shapes,
)
from common.models.engines import ENGINES
from common.models.tokenizer import tokenizer_in, vocabularies
from common.runtime.errors import UserError, as_user_error, lacks_memory
from common.runtime.files import A_MODEL, no_such
from common.runtime.records import FORMAT_VERSION, RECORD_NAME, check_files, content_digest, read_json, read_record
from common.runtime.schema import check

PTH_FORMAT = f"composable-pruning {FORMAT_VERSION}"  # what a .pth says first
GENERATION_NAME = "generation_config.json"
REFERENCE = ({"folder?": str, "hub?": str},)
MODEL_RECORD = {
    "task?": set(TASKS),
    "tokenizer?": REFERENCE,
    "data?": DATA,
    "engine?": {
        "format": set(ENGINES),
        "quantization": str,
        "config": {str: object},
        "generation?": {str: object},
        "counts": {str: float},
    },
    "original?": {"fingerprint": str, "name": str, "model?": REFERENCE, str: object},
    str: object,
}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass
class LoadedModel:
    """A model as `load_model` finds it."""

    model: torch.nn.Module
    path: Path
    record: dict = field(default_factory=dict)  # {} for a folder that this suite did not write
    masks: dict = field(default_factory=dict)  # {parameter name: bool}, from a .pth
    dtype: str = "float32"  # of its weights on disk, one of `checks.DTYPES`

    @property
    def is_module(self) -> bool:
        """Whether torch has it, and not an engine."""
        return "engine" not in self.record

    @property
    def counts(self) -> dict[str, float]:
        """See `parameter_counts`; those of the model that was written for an engine."""
        return parameter_counts(self.model) if self.is_module else self.record["engine"]["counts"]

    @property
    def bytes_on_disk(self) -> int:
        """Of the files that hold its weights."""
        pattern = WEIGHTS_NAME if self.is_module else ENGINES[self.record["engine"]["format"]].weights
        files = [self.path] if self.path.is_file() else self.path.glob(pattern)
        return sum(file.stat().st_size for file in files)

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
    def token_types(self) -> int:
        """How many types of tokens it tells apart: two where pairs of texts have two; 0 where it knows none."""
        return getattr(self.model.config, "type_vocab_size", 0)

    @property
    def label2id(self) -> dict[str, int]:
        """The numbers of a classifier's labels by their names."""
        config = self.model.config
        names = {name: number for number, name in config.id2label.items()} | (config.label2id or {})
        return {name: number for name, number in names.items() if number in config.id2label}

    def prefix(self, source: DataSource) -> str:
        """What stands in front of every input text: as the source says, or as the model was trained.

        A `UserError` if the source says nothing, and is unlike the data of the model's study.
        """
        usual = self.study.prefix
        is_known = self.study.data and source.columns(self.task) == list(self.task.columns)
        if source.prefix is None and usual and not is_known:
            raise UserError(
                f"--prefix: is {usual!r} as a {self.model.config.model_type} model was first trained; say to "
                f"download_model.py what stands in front of the inputs of {source} ('' for nothing)"
            )
        return usual if source.prefix is None else source.prefix

    def rates(self, start: str, steps: int) -> tuple[float, float]:
        """The learning rates that suit it, see `Study.rates`."""
        return self.study.rates(start, self.model.config.hidden_size, steps)

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

    Saved buffers that are not zero throughout count too: BART and Marian add one to the logits.
    """
    sha = hashlib.sha256(repr([(block.name, block.heads) for block in find_blocks(model).values()]).encode())
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved and bool(buffer.any()))
    for name, parameter in itertools.chain(model.named_parameters(), buffers):
        sha.update(f"{name} {tuple(parameter.shape)} ".encode())
        sha.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def model_class(model_type: str, task: str | None = None) -> type:
    """The class of a known model type's models, compact or not, for a task or for its usual one."""
    classes, task = FAMILIES[family_name(model_type)].model_classes, task or usual_task(model_type)
    if task not in classes:
        raise UserError(f"a {model_type} model is for {' or '.join(classes)}, not for {task}")
    name = classes[task]
    return class_named(f"Compact{name}" if model_type.startswith(COMPACT) else name)


def class_and_config(settings: dict, task: str | None) -> tuple:
    """The class and the config of a model out of its `config.json`; a `UserError` if that asks for too much."""
    check_config(settings)
    of_class = model_class(settings["model_type"], task)
    config = of_class.config_class.from_dict(settings)
    check_head(config, of_class)
    check_single_label(config)
    family_of(config).positions(config)  # refuses what cannot be
    return of_class, config


# --- loading ---------------------------------------------------------------------------------------------------


def load_model(path: str | Path, device: torch.device | str = "cpu", to_run: bool = False) -> LoadedModel:
    """Load a model folder or `.pth` in float32, in `eval()`.

    Args:
        to_run: whether what can only be run will do: a folder for one of `ENGINES`.
    Raises:
        UserError: nothing there, not a model that is supported, or a damaged one.
    """
    path = Path(path)
    if path.name in ("", ".."):  # ".": what its record names lies beside it, in the folder above
        path = path / ".." / os.path.basename(os.path.abspath(path))
    if not (path.is_dir() or path.is_file()):
        raise no_such(path, "model", "download_model.py saves one to ./model/", *A_MODEL)
    with as_user_error(path, "cannot be loaded as a model"):
        loaded = load_folder(path, device if to_run else None) if path.is_dir() else load_pth(path)
    if not loaded.is_module:
        return loaded
    for name, tensor in loaded.model.state_dict().items():
        if not is_finite(tensor):
            raise UserError(f"{path}: {name} holds values that are not finite: the model is damaged")
    loaded.model.to(device).eval()
    return loaded


def load_folder(path: Path, device: torch.device | str | None = None) -> LoadedModel:
    """The model in a folder; see `load_model`. `device`: where an engine is to run one of its own, if it is to."""
    if not (path / "config.json").is_file():
        raise UserError("is not a model folder (it has no config.json)")
    check_adapter(path)
    record = read_model_record(path)
    check_files(path, record)
    if "engine" in record:
        return _for_engine(path, record, device)
    settings = read_json(path / "config.json", "download_model.py")
    check_config(settings)  # before its weights are looked for
    if (path / GENERATION_NAME).is_file():
        generation = read_json(path / GENERATION_NAME, "download_model.py")
    else:  # older checkpoints say in config.json how to generate
        generation = transformers.GenerationConfig.from_model_config(dict(settings)).to_dict()
    weights = path / WEIGHTS_NAME
    return _from_parts(path, record, settings, generation, stored_shapes(weights), partial(load_file, weights))


def _for_engine(path, record, device):
    """What is in a folder that `save_for_engine` wrote."""
    own, engine = record["engine"], ENGINES[record["engine"]["format"]]
    if device is None:
        raise UserError(
            f"is for {engine.title}; it can be evaluated, and no more. Give the folder for transformers that it was "
            "made of"
        )
    of_class, config = class_and_config(own["config"], record.get("task"))
    generation = None
    if of_class.can_generate():
        check_generation("its generation config", own["generation"], vocabularies(config)[1])
        generation = transformers.GenerationConfig.from_dict(own["generation"])
    model = engine.code.opened(path, config, generation, own["quantization"], torch.device(device))
    return LoadedModel(model, path, record, dtype=own["quantization"])


def load_pth(path: Path) -> LoadedModel:
    """The model in a `.pth`; see `load_folder`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # many classes; and torch's own message says how to run the code in it nevertheless
        if lacks_memory(error):
            raise
        raise UserError(
            "cannot be loaded as a model: it is none, damaged, or holds more than plain tensors, which is never run"
        ) from None
    if not isinstance(content, dict) or content.get("format") != PTH_FORMAT:
        raise UserError("is not a model file that model-level_finetuning.py wrote; of others give the folder")
    state = content["state_dict"]
    tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in state.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > os.path.getsize(path):
        raise UserError("its weights are larger than the file")  # as expanded ones are
    if content.pop("digest", None) != content_digest(content):
        raise UserError("is not what was written (corrupt or changed); make it again")
    record, settings, generation = (json.loads(content[key]) for key in ("record", "config", "generation_config"))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _from_parts(path, record, settings, generation, shapes, lambda: state, content["masks"])


def read_model_record(folder: Path) -> dict:
    """The record in a model's folder, checked; {} where there is none."""
    path = folder / RECORD_NAME
    record = read_record(path) if path.is_file() else {}
    check(path, record, MODEL_RECORD, "make the model again")
    return record


def _from_parts(path, record, settings, generation, shapes, read_state, masks=None):
    """A model in float32, by classes out of our own tables, whatever classes its files name.

    Args:
        settings, generation: what its config and its generation config hold.
        shapes: {parameter name: shape}; checked before `read_state` returns {parameter name: tensor}.
    """
    of_class, config = class_and_config(settings, record.get("task"))
    dtype, tokens = stored_dtype(config), vocabularies(config)[1]
    skeleton = skeleton_of(of_class, config)
    check_shapes(skeleton, shapes)
    computed = computed_weights(skeleton)
    model, report = of_class.from_pretrained(
        None, config=config, state_dict=read_state(), dtype=torch.float32, output_loading_info=True
    )
    check_loading(report, of_class, computed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in computed)  # loading makes all of them trainable
    if model.can_generate():
        check_generation("its generation config", generation, tokens)
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, name, None) is None:
                raise UserError(f"config.json: {name!r}: nothing where a token of the model belongs")
    check_token_ids("config.json", config.to_dict(), tokens)
    return LoadedModel(model, path, record, masks or {}, dtype)


# --- tokenizers and data -----------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path | None, loaded: LoadedModel):
    """The tokenizer in `path`, or without one that in the model's own folder, or the one of the model's record."""
    if path is None:
        is_inside = (loaded.path / "tokenizer_config.json").is_file()
        path = None if is_inside else resolve(loaded.record.get("tokenizer"), loaded.path)
        path = path or loaded.path
        hint = "; give its folder with -t"
    else:
        hint = "; download_model.py saves one to ./tokenizer/"
    path = Path(path)
    if not (path / "tokenizer_config.json").is_file():
        raise UserError(f"{path}: is not a tokenizer folder (it has no tokenizer_config.json){hint}")
    if (path / RECORD_NAME).is_file():  # weights are checked where they are loaded
        check_files(path, read_record(path / RECORD_NAME), lambda name: not name.endswith(".safetensors"))
    return tokenizer_in(path, loaded.model.config)


def data_source(given: DataSource | str | None, loaded: LoadedModel) -> DataSource | None:
    """Which data a model is used on: as given, and for the rest as in its record, else its study's; None for none."""
    given = given if isinstance(given, DataSource) else DataSource(data=given)
    recorded = loaded.record.get("data")
    source = given.over(DataSource.from_json(recorded, loaded.path) if recorded else None)
    source = source if source.is_located else replace(source, data=loaded.study.data)
    return source if source.is_located else None


# --- references: a record's {"folder": relative path} or {"hub": id} ---------------------------------------------


def reference(target: str | Path | None, model_path: str | Path) -> dict[str, str] | None:
    """How the record of the model at `model_path` names a folder or hub id."""
    if target is None:
        return None
    if Path(target).exists():
        return {"folder": os.path.relpath(target, Path(model_path).parent)}
    return {"hub": str(target)}


def moved(named: dict | None, model_path: str | Path, output: str | Path) -> dict | None:
    """What `reference` named for the model at `model_path`, as the record of the one at `output` names it."""
    if "folder" not in (named or {}):
        return named
    return {"folder": os.path.relpath(Path(model_path).parent / named["folder"], Path(output).parent)}


def resolve(named: dict | None, model_path: str | Path) -> str | None:
    """The folder or hub id that `reference` named."""
    if not isinstance(named, dict):
        return None
    return as_typed(Path(model_path).parent / named["folder"]) if "folder" in named else named.get("hub")
