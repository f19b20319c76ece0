"""CTranslate2's folders: encoder-decoders in the format of that engine (MIT; optional), written and run.

The engine has one number of heads in a stack, and those of T5's kin share a stack's position bias. So a block that
keeps fewer heads than others gets some of zeros, which change nothing: as many as the union of the stack's heads for a
shared bias, else as many as the largest block has, two at least. Neurons may differ from block to block.

The engine searches as `generate` does with `early_stopping`. It does not count the token that a decoder starts with as
a repetition, and in a beam search it takes shares of what is allowed. An empty text has an empty answer.

Conversion is the engine's own, but for what its converters do not take from the model: the vocabulary by its numbers,
whether T5 scales its outputs, the token that a decoder starts with, and what a generation config says.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import transformers as converters

from common.blocks.families import family_of
from common.blocks.tensors import aliasing_copy
from common.data.tasks import padded
from common.models import modeling_compact
from common.models.compact import layouts_of
from common.models.plain import BIAS, PARTS, Whole, ordinary_class
from common.models.tokenizer import PairedTokenizer
from common.runtime.errors import UserError

VERSION = 1  # part of the key of every folder; raise it when results change
LEAST_HEADS = 2  # of a stack: with one the engine (4.8) fails to reshape


SNIPPET = """from ctranslate2 import Translator
from transformers import AutoTokenizer

folder = {{ folder }}  # this folder
translator = Translator(folder, device="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
source = tokenizer.convert_ids_to_tokens(tokenizer({{ text }})["input_ids"])
(answer,) = translator.translate_batch([source], beam_size=1, max_decoding_length=60{{ search }})
{% if has_target -%}
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/target")
{% endif -%}
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(answer.hypotheses[0]), skip_special_tokens=True))"""


# --- writing -----------------------------------------------------------------------------------------------------


def check_convertible(model) -> None:
    """Make sure that the engine takes a model, and what its generation config asks for.

    Raises:
        UserError: it does not.
    """
    if not model.can_generate():
        raise UserError(
            "--format ctranslate2: CTranslate2 runs encoders, but no head for classification; take --format onnx"
        )
    _loader(model)
    search_options(model.generation_config, range(_sizes(model)[1]))


def write(folder: Path, model, tokenizer, quantization: str) -> dict:
    """Write an encoder-decoder; see `engines.Engine`. It is used up: the converter quantizes weights where they are."""
    spec = _specification(model, tokenizer)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    options = search_options(model.generation_config, tokens_of(_pair(tokenizer)[1], _sizes(model)[1]))
    return {"search": _as_code(options), "has_target": isinstance(tokenizer, PairedTokenizer)}


def _pair(tokenizer):
    """The source's tokenizer and the target's."""
    is_pair = isinstance(tokenizer, PairedTokenizer)
    return (tokenizer.source, tokenizer.target) if is_pair else (tokenizer, tokenizer)


def _sizes(model):
    """How many tokens the encoder has, and the decoder."""
    return model.get_encoder().get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features


def _as_code(options):
    """Options of a search that are not the engine's own defaults, as further arguments of a call."""
    usual = {"length_penalty": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_decoding_length": 1}
    changed = {name: value for name, value in options.items() if value and value != usual.get(name)}
    changed |= {"min_decoding_length": 0} if options["min_decoding_length"] == 0 else {}
    if options["target_prefix"]:
        changed["target_prefix"] = [options["target_prefix"]]
    if len(options["end_token"]) == 1:  # it is in the folder's config
        del changed["end_token"]
    return "".join(f", {name}={value!r}" for name, value in changed.items())


def tokens_of(tokenizer, size: int) -> list[str]:
    """The tokens by their numbers; those that the tokenizer does not know have names that no text has."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    return [known.get(number, f"\ue000{number}") for number in range(size)]


def search_options(generation, tokens: Sequence) -> dict:
    """What a generation config says of a search, as options of the engine's `translate_batch`; and "target_prefix".

    Raises:
        UserError: the engine cannot do it.
    """
    if generation.encoder_no_repeat_ngram_size:
        raise UserError("its generation config: 'encoder_no_repeat_ngram_size': CTranslate2 has none; remove it")
    if generation.eos_token_id is None:
        raise UserError("its generation config: 'eos_token_id': nothing where CTranslate2 needs the token of an end")
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    first = generation.forced_bos_token_id
    return {
        "length_penalty": 1.0 if generation.length_penalty is None else generation.length_penalty,
        "repetition_penalty": generation.repetition_penalty or 1.0,
        "no_repeat_ngram_size": generation.no_repeat_ngram_size or 0,
        "min_decoding_length": max(generation.min_new_tokens or 0, (generation.min_length or 0) - 1),  # less the start
        "end_token": [tokens[number] for number in ends],
        "suppress_sequences": [[tokens[number] for number in row] for row in generation.bad_words_ids or []],
        "target_prefix": [] if first is None else [tokens[first]],
    }


def _loader(model):
    """The engine's converter of a model's class, see its `converters.transformers`."""
    version = ctranslate2.__version__
    kind = ordinary_class(model).config_class.__name__
    loader = converters._MODEL_LOADERS.get(kind)
    if kind == "MarianConfig":  # its own expects padding to be the last token, and a decoder that starts with zeros
        loader = converters.BartLoader()
    activation = getattr(model.config, "dense_act_fn", None) or model.config.activation_function
    if not isinstance(loader, converters.BartLoader | converters.T5Loader):
        raise UserError(f"--format ctranslate2: CTranslate2 {version} takes no {model.config.model_type}")
    if activation not in converters._SUPPORTED_ACTIVATIONS:
        raise UserError(f"--format ctranslate2: CTranslate2 {version} has no activation function {activation!r}")
    return loader


def _specification(model, tokenizer):
    """The engine's form of a model."""
    loader = _loader(model)
    is_t5 = hasattr(loader, "set_stack")
    model, heads = with_equal_heads(model)
    config = model.config
    config.normalize_before = family_of(config).norm_first
    config.normalize_embedding = hasattr(model.get_encoder(), "layernorm_embedding")
    with torch.no_grad():
        spec = loader.get_model_spec(model)
    for side, (number, width) in heads.items():
        stack, scale = getattr(spec, side), 1.0 if is_t5 else width**-0.5
        stack.num_heads = np.int16(number)
        for layer in stack.layer:
            layer.self_attention.queries_scale = scale  # else by d_model over the number of heads
            if side == "decoder":
                layer.attention.queries_scale = scale
    if config.model_type.endswith(
        "m2m_100"
    ):  # counts positions from the one after padding's, which a decoder may start with
        weights, padding = model.get_encoder().embed_positions.weights, config.pad_token_id
        spec.encoder.position_encodings.encodings = weights[padding + 1 :]
        first = padding if config.decoder_start_token_id == padding else padding + 1
        spec.decoder.position_encodings.encodings = torch.cat([weights[first : first + 1], weights[padding + 2 :]])
    if is_t5:
        scales = getattr(config, "scale_decoder_outputs", False)
        spec.decoder.scale_outputs = np.float32(config.d_model**-0.5 if scales else 1)
    source, target = _pair(tokenizer)
    tokens = tokens_of(target, _sizes(model)[1])
    spec.register_source_vocabulary(tokens_of(source, _sizes(model)[0]))
    spec.register_target_vocabulary(tokens)
    spec.config.unk_token = source.unk_token or source.pad_token
    spec.config.eos_token = search_options(model.generation_config, tokens)["end_token"][0]
    spec.config.bos_token = spec.config.decoder_start_token = tokens[config.decoder_start_token_id]
    return spec


@torch.no_grad()
def with_equal_heads(model) -> tuple[torch.nn.Module, dict[str, int]]:
    """A model that computes the same, whose attentions have as many heads in all layers of a stack.

    What is not changed it shares with `model`. Where no neuron is left there is one of zeros.

    Returns:
        (the model, {"encoder" or "decoder": (how many heads, their width)}).
    """
    model, whole, layouts = aliasing_copy(model), Whole(model), layouts_of(model.config)
    kept = whole.kept(*(getattr(model.config, name, None) or {} for name in PARTS))
    places = {root: list(range(len(parts))) for root, parts in kept.items()}
    tables = {}  # {root of an attention with a table: the heads that it needs}
    for owner, readers in whole.biases.items():
        tables[owner] = sorted({head for reader in readers for head in kept[reader]})
        places |= {reader: [tables[owner].index(head) for head in kept[reader]] for reader in readers}
    heads = {}
    for block in filter(lambda block: block.heads, whole.blocks):
        width = dict(block.shapes)[f"{block.output}.weight"][1] // block.heads
        needed = max(places[block.root], default=0) + 1
        heads[block.side] = max(heads.get(block.side, (LEAST_HEADS, width)), (needed, width))
    for block in whole.blocks:
        root, part = model.get_submodule(block.root), places[block.root]
        size, width = heads[block.side] if block.heads else (max(1, len(part)), 1)
        inner = [root.get_submodule(name) for name in modeling_compact.inner_linears(root, layouts)]
        spread(inner, root.get_submodule(block.output), part, size, width)
        if block.root in tables:
            own, table = tables[block.root], getattr(root, BIAS)
            columns = table.weight.new_zeros(table.num_embeddings, size)
            columns[:, : len(own)] = table.weight[:, own]
            table.weight = torch.nn.Parameter(columns)
    return model, heads


def spread(inner, out, places: list[int], size: int, width: int) -> None:
    """Give Linears rows, and the one that they feed columns, for `size` parts of some width: those at `places` are what
    they have, the others zeros."""
    if places == list(range(size)):
        return
    index = torch.tensor([place * width + offset for place in places for offset in range(width)], dtype=torch.long)
    index = index.to(out.weight.device)
    for linear in inner:
        for name in ("weight", "bias"):
            tensor = getattr(linear, name)
            if tensor is not None:
                larger = tensor.new_zeros(size * width, *tensor.shape[1:]).index_copy(0, index, tensor)
                setattr(linear, name, torch.nn.Parameter(larger))
    larger = out.weight.new_zeros(out.weight.shape[0], size * width).index_copy(1, index, out.weight)
    out.weight = torch.nn.Parameter(larger)


# --- running -----------------------------------------------------------------------------------------------------


class Translator:
    """A folder of `write`, which generates as a model of transformers does.

    `config`, `generation_config`: the model's, as transformers has them; `precision`: what the engine computes in.
    """

    def __init__(self, folder: Path, config, generation_config, quantization: str, device: torch.device):
        self.config, self.generation_config, self.device = config, generation_config, device
        names = ("source", "target") if (folder / "source_vocabulary.json").is_file() else ("shared", "shared")
        files = (folder / f"{name}_vocabulary.json" for name in names)
        self.source, self.target = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        self.numbers = {token: number for number, token in enumerate(self.target)}
        self.options = search_options(generation_config, self.target)
        self.prefix = self.options.pop("target_prefix")
        on = "cuda" if device.type == "cuda" else "cpu"
        self.engine = ctranslate2.Translator(str(folder), device=on, intra_threads=torch.get_num_threads())
        self.precision = self.engine.compute_type

    def eval(self) -> "Translator":
        """It is never trained."""
        return self

    def can_generate(self) -> bool:
        return True

    def generate(self, input_ids, attention_mask, *, num_beams: int, max_new_tokens: int, min_new_tokens=0, **_):
        """The tokens of the best answers, as `generate` of transformers returns them: int64 (batch, length).

        Raises:
            UserError: the scores are not finite.
        """
        rows = zip(input_ids.tolist(), attention_mask.tolist())
        end = self.generation_config.forced_eos_token_id  # of what would be longer
        results = self.engine.translate_batch(
            [[self.source[number] for number, is_real in zip(*row) if is_real] for row in rows],
            [self.prefix] * len(input_ids) if self.prefix else None,
            beam_size=num_beams,
            max_decoding_length=max_new_tokens - (end is not None),
            max_input_length=0,
            return_scores=True,
            return_end_token=True,
            **self.options | ({"min_decoding_length": min_new_tokens} if min_new_tokens else {}),
        )
        if not np.isfinite([result.scores[0] for result in results]).all():
            raise UserError("CTranslate2's scores are not finite: choose another --quantization")
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        answers = [[start, *(self.numbers[token] for token in result.hypotheses[0])] for result in results]
        for answer in answers:
            if end is not None and len(answer) == max_new_tokens:
                answer.append(end)
        return padded(answers, padding).to(input_ids.device)


opened = Translator
