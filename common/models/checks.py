"""What lies in a model's folder or file, checked where transformers does not check it; `UserError`s name the fault.

Nothing in it is run or decides what is imported. Shapes in the weights file are compared with the config first.
"""

import math
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from common.blocks.families import COMPACT, FAMILIES, family_named, family_of
from common.models import modeling_compact
from common.runtime.errors import UserError
from common.runtime.schema import shown

WEIGHTS_NAME = "model.safetensors"  # of a folder's weights
DTYPES = ("float32", "bfloat16", "float16")  # that models are written in
TOKEN_IDS = ("token_id", "bad_words_ids")  # how settings end that name tokens by their numbers

# --- config.json and generation_config.json ----------------------------------------------------------------------

# Largest numbers in a config, by the end of a setting's name: what takes memory or hours before weights are compared.
LIMITS = {"layers": 1000, "positions": 2**15, "position_embeddings": 2**15, "num_labels": 10**5}
# Settings with which transformers would fetch or run other code than that of the class.
CODE = ("quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation")
# How the names of classes end whose heads are not for what a family's classes are.
HEADS = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("ForNextSentencePrediction", "ForCausalLM", "EncoderModel"),
)
# Numbers and switches of a generation config that have their effect here too; those of sampling have none without it.
# Some others stand for modes that run code from the hub, for random answers, or hide values that are not finite.
GENERATION = (
    "max_length min_length max_new_tokens min_new_tokens num_beams no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "length_penalty repetition_penalty renormalize_logits temperature top_k top_p typical_p use_cache "
    "output_attentions output_hidden_states output_scores return_dict _from_model_config"
)


def check_config(settings: dict) -> None:
    """Make sure that a config is of a known model type, asks for no code of its own, and for no absurd sizes."""
    model_type = settings.get("model_type")
    if model_type is None:
        raise UserError(f"config.json: has no 'model_type'; add one of {', '.join(FAMILIES)}")
    family_named(str(model_type))
    if settings.get("pruned_heads"):
        raise UserError(
            "config.json: 'pruned_heads': an earlier transformers took heads out of this model (prune_heads), which "
            "this one cannot load; give the model as it was before, and remove them here"
        )
    if "auto_map" in settings and not model_type.startswith(COMPACT):  # of our own we have the code ourselves
        raise UserError("'auto_map' names code of the model's own, which is never run")
    for name in ("dtype", "torch_dtype"):
        if settings.get(name) and not isinstance(getattr(torch, str(settings[name]), None), torch.dtype):
            raise UserError(f"config.json: {name!r}: {shown(settings[name])} where a type such as 'float16' belongs")
    for name in CODE:
        if settings.get(name) not in (None, "eager", "sdpa"):
            raise UserError(f"{name!r}: {shown(settings[name])} is not supported; remove it")
    for name, value in settings.items():
        limit = next((limit for end, limit in LIMITS.items() if name.endswith(end)), math.inf)
        if isinstance(value, int | float) and value > limit:
            raise UserError(f"{name!r}: {shown(value)} where a number up to {limit} belongs")


def class_named(name: str) -> type:
    """A model class by its name: one of ours, or of transformers."""
    return getattr(modeling_compact if hasattr(modeling_compact, name) else transformers, name)


def check_single_label(config) -> None:
    """Make sure that a classifier gives each text one label of several that have names of their own, in lower case too.

    What gives a number or a set of labels is refused.
    """
    if family_of(config).decoder:  # what generates has these settings too, and never reads them
        return
    problem = "regression" if config.num_labels == 1 else config.problem_type
    if problem not in (None, "single_label_classification"):
        raise UserError(f"config.json: {problem} is not supported; give a model for single_label_classification")
    numbers = {}
    names = [(name, number) for number, name in config.id2label.items()] + [*(config.label2id or {}).items()]
    for name, number in names:
        other = numbers.setdefault(str(name).casefold(), number)
        if number in config.id2label and number != other:
            both = f"classes {other} and {number} are both called {shown(name)}"
            raise UserError(f"config.json: {both} (id2label, label2id); rename one")


def check_head(config, of_class: type) -> None:
    """Make sure that a config names no class with another head, whose weights may have the same names and shapes."""
    for name in config.architectures or []:
        if name.endswith(tuple(end for end in HEADS if not of_class.__name__.endswith(end))):
            raise UserError(
                f"config.json: 'architectures': {name} has another head than {of_class.__name__}, which is the class "
                f"of {config.model_type} models here"
            )


def check_token_ids(where: object, settings: dict, vocabulary: int) -> None:
    """Make sure that the ids of tokens in a config are tokens of the model."""
    for name, value in settings.items():
        if value is None or not name.endswith(TOKEN_IDS):
            continue
        rows = value if isinstance(value, list) else [value]
        ids = [token for row in rows for token in (row if isinstance(row, list) else [row])]
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
            raise UserError(f"{where}: {name!r}: {shown(value)} where a token from 0 to {vocabulary - 1} belongs")


def check_generation(where: object, settings: dict, vocabulary: int) -> None:
    """Make sure that a generation config holds what translation knows."""
    check_token_ids(where, settings, vocabulary)
    usual = transformers.GenerationConfig._get_default_generation_params()
    for name, value in settings.items():
        is_plain = name in GENERATION.split() and isinstance(value, int | float)
        is_other = name.endswith((*TOKEN_IDS, "early_stopping", "transformers_version"))
        if not (is_plain or is_other or value is None or value is False or value == usual.get(name)):
            raise UserError(f"{where}: {name!r}: {shown(value)} is not supported; remove it")


def check_adapter(path: str | Path, local_only: bool = True) -> None:
    """Make sure that no adapter belongs to a model in a folder or of a hub id: its weights alone are another model."""
    found = transformers.utils.find_adapter_config_file(path, local_files_only=local_only)
    if found:
        raise UserError(
            f"has an adapter ({Path(found).name}), without which its weights are another model; merge it first: load "
            "both with peft, and save what merge_and_unload() returns"
        )


# --- weights -----------------------------------------------------------------------------------------------------


def stored_shapes(path: Path) -> dict[str, tuple]:
    """{name: shape} of what a safetensors file holds, by its header alone; a `UserError` if there is no file."""
    if not path.is_file():
        raise UserError(f"has no weights ({path.name}); adopt the model with download_model.py --checkpoint")
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def stored_dtype(config) -> str:
    """The type of a model's weights in its files, as its config says; float32 if it is none of `DTYPES`."""
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def skeleton_of(of_class: type, config) -> torch.nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return of_class(config)


def computed_weights(skeleton: torch.nn.Module) -> set[str]:
    """The names of weights that follow from the config, as sinusoids do: they stay, and no file need hold them."""
    return {name for name, parameter in skeleton.named_parameters() if not parameter.requires_grad}


def check_shapes(skeleton: torch.nn.Module, shapes: dict[str, tuple]) -> None:
    """Make sure, before any memory is taken, that weights have the model's shapes, and are about as many.

    `skeleton`: see `skeleton_of`; `shapes`: {name: shape} of the weights.
    """
    foreign = f"its weights are not those of a {type(skeleton).__name__}"
    for name, tensor in skeleton.state_dict().items():
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise UserError(f"{foreign}: it has another shape for {name} ({shapes[name]}, not {tuple(tensor.shape)})")
    needed = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)  # what is not is computed
    stored = sum(map(math.prod, shapes.values()))
    if needed > 2 * stored:  # single ones that are missing are named once transformers has looked for them
        raise UserError(f"{foreign}: it holds {stored:,} numbers where {needed:,} belong")


def check_loading(report: dict, of_class: type, computed: set[str], may_hold_more: bool = False) -> None:
    """Make sure, by `from_pretrained`'s report, that a file's weights are those of a class but for computed ones."""
    for name, stored, needed in sorted(report["mismatched_keys"]):
        shapes = f"{tuple(stored)} in the file, {tuple(needed)} by config.json"
        raise UserError(f"its weights are not those of a {of_class.__name__}: {name} has another shape: {shapes}")
    foreign = [name for name in report["unexpected_keys"] if not name.endswith(".position_ids")]  # once saved, unused
    missing = set(report["missing_keys"]) - computed
    if missing and not any(name.startswith(f"{of_class.base_model_prefix}.") for name in missing):
        raise UserError(
            f"its weights are not those of a {of_class.__name__}: it lacks {min(missing)}, its head; start and train "
            f"one with transformers ({of_class.__name__}.from_pretrained), and adopt what that saves"
        )
    for what, names in (("lacks", missing), ("has a foreign", [] if may_hold_more else foreign)):
        if names:
            raise UserError(f"its weights are not those of a {of_class.__name__}: it {what} {min(names)}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite. A sum is so only if all its terms are, and takes no memory."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
