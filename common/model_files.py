"""What lies in a model's or a tokenizer's folder, checked before transformers sees it.

Nothing in such a folder is run, and nothing in it decides what is imported: the classes come out of our own tables.
How much memory a model takes is decided by its weights file, whose parts are compared with the config first.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from common import modeling_compact
from common.errors import UserError
from common.families import COMPACT, family_named, family_of
from common.records import parse_json, read_json
from common.schema import (
    FILE_NAME,
    Anything,
    Fault,
    Flag,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Object,
    Text,
    Where,
    check,
    shown,
)

WEIGHTS_NAME = "model.safetensors"  # of a folder's weights
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"  # of a large model's shards
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # that models are written in, as safetensors has them
FLOATS = ("F64", *DTYPES.values())  # types of weights
MODEL_BY, TOKENIZER_BY = "download_model.py", "download_model.py"
# What transformers raises over a config, a tokenizer or weights that it cannot make anything of.
CANNOT_BE_BUILT = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    StrictDataclassError,
)


@contextmanager
def told_in_one_line(path: str | Path, what: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what transformers raises over damaged files into a `UserError`, the first line of it."""
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path}: its safetensors file is damaged: {_first_line(error)}") from None
    except (*CANNOT_BE_BUILT, *others) as error:
        raise UserError(f"{path}: cannot be loaded as a {what}: {_first_line(error)}") from None


def _first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


# --- config.json and generation_config.json ----------------------------------------------------------------------

SIZE = Number(1, 10**7, whole=True)
LAYERS = Number(1, 1000, whole=True)
# By the end of a setting's name. What is not named here has no say in how large a model is, or is checked by its class.
SIZES = {
    **dict.fromkeys(("relative_positions", "position_buckets"), Number(-1, 2**15, whole=True)),  # DeBERTa's; -1: none
    **dict.fromkeys(("type_vocab_size", "kernel_size"), Number(0, 10**7, whole=True)),  # 0: none
    "layers": LAYERS,
    "heads": SIZE,
    "dim": SIZE,
    "_size": SIZE,
    "_ff": SIZE,
    "_kv": SIZE,
    "d_model": SIZE,
    "buckets": SIZE,
    "positions": Number(1, 2**15, whole=True),
    "max_position_embeddings": Number(1, 2**15, whole=True),  # Marian's are computed one by one, in Python
    "num_labels": Number(1, 10**5, whole=True),
}
NUMBER = Number(-(10**12), 10**12)
TOKEN = Number(0, 10**7, whole=True)


def _size_fault(settings):
    for name, value in settings.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            fault = next((schema for end, schema in SIZES.items() if name.endswith(end)), NUMBER).find(value)
            if fault:
                return fault.within(repr(name))
    return None


def _heads_fault(settings):
    most = max(
        (value for name, value in settings.items() if name.endswith("heads") and isinstance(value, int)), default=0
    )
    for module, heads in (settings.get("kept_heads") or {}).items():
        if heads != sorted(set(heads)) or (heads and heads[-1] >= most):
            return Fault(("'kept_heads'", repr(module)), shown(heads), f"rising numbers below {most}")
    return None


CONFIG = Where(
    Where(
        Object(
            {"model_type": Text()},
            {
                "kept_heads": Maybe(MapOf(ListOf(Number(0, 10**5, whole=True)))),
                "kept_neurons": Maybe(MapOf(Number(0, 10**7, whole=True))),
                "id2label": Maybe(MapOf(Text(), Text(pattern=r"\d{1,6}", expected="a number"), smallest=1)),
            },
            others=True,
        ),
        _size_fault,
    ),
    _heads_fault,
)
# Settings with which transformers would fetch or run other code than that of the class.
CODE = ("quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation")

GENERATION = Object(
    {},
    {
        **dict.fromkeys(
            ("max_length", "min_length", "max_new_tokens", "min_new_tokens"), Maybe(Number(0, 10**7, whole=True))
        ),
        **dict.fromkeys(("num_beams", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "top_k"), Maybe(TOKEN)),
        **dict.fromkeys(
            ("length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p", "diversity_penalty"),
            Maybe(Number(-1000, 1000)),
        ),
        **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "return_dict"), Maybe(Flag())),
        **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), Maybe(Flag())),
        "early_stopping": Anything(),
        "bad_words_ids": Maybe(ListOf(ListOf(TOKEN, shortest=1), shortest=1)),
        "transformers_version": Maybe(Text()),
        "_from_model_config": Flag(),
    },
    others=True,
)


def check_config(where: object, settings: dict) -> str:
    """Make sure that a config is of a model type that is known, asks for no code of its own, and for no absurd sizes.

    Args:
        where: what names it in a message.
        settings: what `config.json` holds.
    Returns:
        the model type.
    Raises:
        UserError: naming the setting.
    """
    check(where, settings, CONFIG)
    model_type = settings["model_type"]
    family_named(model_type)
    if "auto_map" in settings and not model_type.startswith(COMPACT):  # of our own we have the code ourselves
        raise UserError(f"{where}: 'auto_map' names code of the model's own, which is never run")
    for name in CODE:
        if settings.get(name) not in (None, "eager", "sdpa"):
            raise UserError(f"{where}: {name!r}: {shown(settings[name])} is not supported; remove it")
    return model_type


def class_named(name: str) -> type:
    """A model class by its name: one of ours, or of transformers."""
    return getattr(modeling_compact if hasattr(modeling_compact, name) else transformers, name)


def read_config(folder: Path) -> dict:
    """The settings in a model folder's `config.json`.

    Raises:
        UserError: see `check_config`.
    """
    path = folder / "config.json"
    settings = read_json(path, MODEL_BY)
    try:
        check_config(path, settings)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return settings


def check_single_label(config) -> None:
    """Make sure that a classifier gives each text one label of several, and no number and no set of labels.

    Raises:
        UserError: it does not.
    """
    if family_of(config).decoder:  # what generates has these settings too, and never reads them
        return
    remedy = "give a model for single_label_classification"
    kind = config.problem_type
    if kind == "multi_label_classification":
        raise UserError(f"config.json: 'problem_type': {kind}: several labels for one text are not supported; {remedy}")
    if kind == "regression" or config.num_labels == 1:
        what = f"'problem_type': {kind}" if kind == "regression" else "'num_labels': 1"
        raise UserError(f"config.json: {what}: regression, a number for a text, is not supported; {remedy}")


def check_token_ids(where: object, settings: dict, vocabulary: int) -> None:
    """Make sure that the ids of special tokens in a config are tokens of the model.

    Raises:
        UserError: naming the setting.
    """
    for name, value in settings.items():
        if not name.endswith("token_id") or value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < vocabulary for each in ids):
            raise UserError(f"{where}: {name!r}: {shown(value)} where a token from 0 to {vocabulary - 1} belongs")


def check_generation(where: object, settings: dict, vocabulary: int) -> None:
    """Make sure that a generation config holds what translation knows, in sane numbers.

    Raises:
        UserError: naming the setting.
    """
    check(where, settings, GENERATION)
    check_token_ids(where, settings, vocabulary)
    usual = transformers.GenerationConfig().to_dict()
    for name, value in settings.items():
        is_known = name in GENERATION.optional or name.endswith("token_id")
        if not is_known and value not in (None, False, usual.get(name)):  # some modes run code from the hub
            raise UserError(f"{where}: {name!r}: {shown(value)} is not supported; remove it")


# --- weights -----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are in.

    Raises:
        UserError: there are none.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise UserError(f"{folder}: has no weights ({WEIGHTS_NAME}); make or download the model again")
    index = read_json(folder / INDEX_NAME, MODEL_BY)
    check(folder / INDEX_NAME, index, Object({"weight_map": MapOf(FILE_NAME, smallest=1)}, others=True))
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, though {INDEX_NAME} lists it; make or download the model again")
    return files


def stored_shapes(files: list[Path]) -> dict[str, tuple]:
    """{name: shape} of what safetensors files hold, by their headers alone.

    Raises:
        ValueError: something in them is no weight.
    """
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS and not name.endswith(".position_ids"):  # once saved, and unused
                    raise ValueError(f"{name} is of {kind}, not one of {', '.join(FLOATS)}")
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def stored_dtype(settings: dict, files: list[Path]) -> str:
    """The type of a folder's weights: what its config says, else that of all its tensors; else float32.

    Args:
        settings: what its `config.json` holds.
        files: those of its weights, safetensors files.
    """
    named = settings.get("dtype") or settings.get("torch_dtype")  # the latter before transformers 4.56
    if named is None:
        kinds = set()
        for path in files:
            with safe_open(path, framework="pt") as file:
                kinds |= {file.get_slice(name).get_dtype() for name in file.keys()} & set(FLOATS)  # noqa: SIM118
        named = next((name for name, kind in DTYPES.items() if kinds == {kind}), None)
    return named if isinstance(named, str) and named in DTYPES else "float32"


def skeleton_of(of_class: type, config) -> torch.nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return of_class(config)


def computed_weights(skeleton: torch.nn.Module) -> set[str]:
    """The names of weights that follow from the config, as sinusoids do: they stay, and no file need hold them."""
    return {name for name, parameter in skeleton.named_parameters() if not parameter.requires_grad}


def check_shapes(skeleton: torch.nn.Module, of_class: type, shapes: dict[str, tuple]) -> None:
    """Make sure, before any memory is taken, that weights are those of a model.

    Where names are missing and others are foreign, as many entries in all, transformers may know how to rename them.

    Args:
        skeleton: see `skeleton_of`.
        shapes: {name: shape} of the weights.
    Raises:
        UserError: naming the first that is not, and how many there are.
    """
    own = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    wrong = [name for name in own if name in shapes and shapes[name] != own[name]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"its weights are not those of a {of_class.__name__}: it has another shape for {name} "
            f"({_by(shapes[name])} where {_by(own[name])} belongs; {len(wrong)} such in all)"
        )
    unneeded = [
        *(getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()),
        *map(re.escape, computed_weights(skeleton)),
    ]
    tied = {}  # a parameter under several names is there once
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    missing = [
        names[0]
        for names in tied.values()
        if not any(name in shapes for name in names) and not any(re.search(each, names[0]) for each in unneeded)
    ]
    foreign = [name for name in shapes if name not in own]
    if sum(math.prod(own[name]) for name in missing) > sum(math.prod(shapes[name]) for name in foreign):
        raise UserError(
            f"its weights are not those of a {of_class.__name__}: it lacks {missing[0]} ({len(missing)} such in all)"
        )


def _by(shape):
    return "x".join(map(str, shape)) or "one number"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite; no memory of its size is taken where the answer is yes.

    A sum is finite only if all its terms are. That of finite ones may still overflow.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_finite(where: object, tensors) -> None:
    """Make sure that tensors hold finite numbers alone.

    Args:
        tensors: pairs (name, tensor).
    Raises:
        UserError: naming the first that does not.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(f"{where}: {name} holds values that are not finite: the model is damaged")


# --- .pth --------------------------------------------------------------------------------------------------------

TEXT = Text()


def check_archive(path: Path) -> None:
    """Make sure that a file is an archive as `torch.save` makes it, and no larger inside than outside.

    Raises:
        UserError: it is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError) as error:
        raise UserError(f"{path}: cannot be loaded as a model: it is no file of torch.save ({error})") from None
    if any(part.filename.endswith("constants.pkl") for part in parts):
        raise UserError(f"{path}: cannot be loaded as a model: it is a TorchScript file, which holds code")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(f"{path}: cannot be loaded as a model: it is compressed, which torch.save never does")


def check_pth(content: dict) -> tuple[dict, dict, dict | None]:
    """Make sure that what a `.pth` holds is what `models.save_model` puts there.

    Returns:
        (record, config, generation config or None), out of their JSON.
    Raises:
        UserError: naming the key.
    """
    kinds = {"config": str, "generation_config": str, "record": str, "state_dict": dict, "masks": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(
                f"{key!r}: {shown(content.get(key))} where {'text' if kind is str else 'an object'} belongs"
            )
    for key in ("state_dict", "masks"):
        for name, tensor in content[key].items():
            wanted = torch.bool if key == "masks" else torch.float32
            fits = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
            if not (isinstance(name, str) and fits and tensor.device.type == "cpu"):
                raise UserError(f"{key!r}: {shown(name)}: is no plain tensor")
            if key == "masks" and tensor.dtype != wanted or not (tensor.is_floating_point() or key == "masks"):
                raise UserError(f"{key!r}: {shown(name)}: {tensor.dtype} where {wanted} belongs")
    for name, mask in content["masks"].items():
        weight = content["state_dict"].get(name)
        if weight is None or weight.shape != mask.shape:
            raise UserError(f"'masks': {name!r}: is of no parameter of that shape")
        if bool(weight[~mask].any()):
            raise UserError(f"'masks': {name!r}: removes weights that are not zero")
    record, settings, generation = (
        parse_json(f"{key!r}", content[key]) for key in ("record", "config", "generation_config")
    )
    for key, value in (("record", record), ("config", settings)):
        if not isinstance(value, dict):
            raise UserError(f"{key!r}: {shown(value)} where an object belongs")
    if not isinstance(generation, dict | None):
        raise UserError(f"'generation_config': {shown(generation)} where an object belongs")
    return record, settings, generation


# --- tokenizers --------------------------------------------------------------------------------------------------


TOKENIZER = Object(
    {},
    {
        "tokenizer_class": Maybe(Text(pattern=r"\w+", expected="a class's name")),
        "model_max_length": Maybe(Number(1)),
        "padding_side": Text(("left", "right")),
        "truncation_side": Text(("left", "right")),
        "extra_ids": Maybe(Number(0, 10**5, whole=True)),  # each becomes a token
    },
    others=True,
)


def check_tokenizer_settings(folder: Path) -> None:
    """Make sure that a tokenizer's folder asks for no code of its own, and for a class that transformers has.

    Raises:
        UserError: naming the file and the key.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path, TOKENIZER_BY)
    check(path, settings, TOKENIZER)
    if settings.get("auto_map"):
        raise UserError(f"{path}: 'auto_map' names code of the tokenizer's own, which is never run")
    name = settings.get("tokenizer_class")
    if name is None and (folder / "config.json").is_file():  # transformers then goes by the model's type
        read_config(folder)
    if name is not None:
        found = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"), None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)):
            raise UserError(f"{path}: 'tokenizer_class': {name!r} where the name of a tokenizer class belongs")


def check_tokenizer(path: str | Path, tokenizer, vocabulary: int) -> None:
    """Make sure that a tokenizer fits a model of so many tokens.

    Raises:
        UserError: it does not, or it has no padding token.
    """
    with told_in_one_line(path, "tokenizer", Exception):  # the tokenizers library raises it bare
        trial, known = tokenizer("a test")["input_ids"], tokenizer.get_vocab()
    largest = max([-1, *known.values(), *trial, *tokenizer.all_special_ids])
    if largest < 0:
        raise UserError(f"{path}: knows no tokens; give the tokenizer that belongs to the model")
    if max(largest + 1, len(tokenizer)) > vocabulary:
        raise UserError(
            f"{path}: knows {max(largest + 1, len(tokenizer))} tokens where the model has {vocabulary}; "
            "give the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: has no padding token; name one as 'pad_token' in its tokenizer_config.json")
