"""ONNX: a model's graphs for ONNX Runtime, and running them as transformers runs the model.

A classifier is one graph, `model.onnx`. An encoder-decoder is two. `encoder.onnx` makes the keys and values of the
decoder's cross-attentions out of a text, once. `decoder.onnx` makes the logits of new tokens out of these and of the
keys and values of all tokens before, none at first, which it returns with the new ones'. Layers may have different
heads; one without any has a number a token in their place, see `modeling_compact`. The search is `generate`'s.

Tensors go by names. The encoder's "cross.LAYER.key" is given to the decoder, as is, with the next tokens, its
"present.LAYER.key" under the name of "past.LAYER.key".
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from common.models.plain import ordinary_class, ordinary_settings
from common.models.tokenizer import PairedTokenizer
from common.models.trial import trial_batch
from common.runtime.errors import UserError

VERSION = 1  # part of the key of every folder; raise it when results change
LARGEST = 2**31 - 2**24  # bytes of weights: what is larger lies in a file beside the graph
PARTS = ("encoder", "decoder")
CLOSE = 1e-3  # of the largest logit: how far those of a graph may be
BATCH, SOURCE, LENGTH, PAST = map(Dim, ("batch", "source", "length", "past"))  # sizes that stay open
SIZES = {"decoder_input_ids": {0: BATCH, 1: LENGTH}, "past": {0: BATCH, 2: PAST}, "cross": {0: BATCH, 2: SOURCE}}
SNIPPET = """{% if start -%}
import numpy as np
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

folder = {{ folder }}  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder, decoder = (InferenceSession(f"{folder}/{name}.onnx") for name in ("encoder", "decoder"))
source = tokenizer([{{ text }}], return_tensors="np")
mask = source["attention_mask"]
cross = encoder.run(None, {"input_ids": source["input_ids"], "attention_mask": mask})
inputs = {"attention_mask": mask} | dict(zip([each.name for each in encoder.get_outputs()], cross))
past = [each for each in decoder.get_inputs() if each.name.startswith("past")]
inputs |= {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in past}
tokens, new = [], {{ start }}
for _ in range(60):  # greedy; generation_config.json may ask for more
    logits, *present = decoder.run(None, inputs | {"decoder_input_ids": np.array([new])})
    inputs |= zip([each.name for each in past], present)
{%- if banned %}
    logits[..., {{ banned }}] = -np.inf
{%- endif %}
    new = [int(logits[0, -1].argmax())]
    tokens += new
    if new[0] in {{ ends }}:
        break
{% if has_target -%}
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/target")
{% endif -%}
print(tokenizer.decode(tokens, skip_special_tokens=True))
{%- else -%}
import numpy as np
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

folder = {{ folder }}  # this folder
model = InferenceSession(f"{folder}/model.onnx")
batch = AutoTokenizer.from_pretrained(folder)([{{ text }}], return_tensors="np")
zeros = np.zeros_like(batch["input_ids"])  # types of tokens, where the tokenizer tells none
(logits,) = model.run(None, {each.name: batch.get(each.name, zeros) for each in model.get_inputs()})
print({{ labels }}[logits.argmax()])
{%- endif %}"""


# --- writing -----------------------------------------------------------------------------------------------------


def check_convertible(model) -> None:
    """What cannot be exported is known when it is tried."""


@torch.no_grad()
def write(folder: Path, model, tokenizer, quantization: str) -> dict:
    """Write a model, compact or not; see `engines.Engine`.

    Raises:
        UserError: torch cannot export it, or its graphs compute something else.
    """
    of_class = ordinary_class(model)
    config = of_class.config_class(**ordinary_settings(model.config), architectures=[of_class.__name__])
    generation = model.generation_config if model.can_generate() else None
    config.to_json_file(folder / "config.json")
    exact = folder / "float32" if quantization == "int8" else folder
    exact.mkdir(exist_ok=True)
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > LARGEST
    with quiet():
        for name, (function, inputs) in graphs_of(model).items():
            export(exact / f"{name}.onnx", Part(model, function), inputs, is_large)
        check(model, opened(exact, config, generation, "float32", model.device))
        for file in exact.glob("*.onnx") if exact != folder else ():
            # Processors without VNNI add pairs of products in 16 bit, which 8 times 8 would overflow: 8 times 7.
            settings = {"per_channel": True, "reduce_range": True, "use_external_data_format": is_large}
            quantize_dynamic(file, folder / file.name, **settings)
    if exact != folder:
        shutil.rmtree(exact)
    if generation is None:
        return {"labels": config.id2label}
    generation.to_json_file(folder / "generation_config.json")
    ends, first = generation.eos_token_id, generation.forced_bos_token_id
    return {
        "start": [config.decoder_start_token_id, *([] if first is None else [first])],
        "ends": ends if isinstance(ends, list) else [ends],
        "banned": [words[0] for words in generation.bad_words_ids or [] if len(words) == 1],
        "has_target": isinstance(tokenizer, PairedTokenizer),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the exporter and the quantizer, which are about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def graphs_of(model) -> dict[str, tuple]:
    """{name of the file: (what it computes, inputs to export it with)}."""
    batch = trial_batch(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not model.can_generate():
        has_types = getattr(model.config, "type_vocab_size", 0) > 1  # of tokens, as of pairs of texts
        return {"model": (classes, inputs | ({"token_type_ids": inputs["input_ids"] % 2} if has_types else {}))}
    tokens = batch["labels"]
    cache = model(**inputs, decoder_input_ids=tokens[:, :5], use_cache=True).cache
    past, cross = named("past", cache.self_attention_cache), named("cross", cache.cross_attention_cache)
    if not cross:
        raise UserError("--format onnx: no cross-attention has heads left, so that the text is not seen")
    step = {"decoder_input_ids": tokens[:, 5:], "attention_mask": inputs["attention_mask"], **past, **cross}
    return {"encoder": (cross_keys, inputs), "decoder": (next_logits, step)}


def named(prefix: str, cache) -> dict[str, torch.Tensor]:
    """{"PREFIX.LAYER.key" or "value": tensor}, of the layers that have some."""
    tensors = {}
    for number, layer in enumerate(cache.layers):
        if layer.keys is not None:
            tensors |= {f"{prefix}.{number}.key": layer.keys, f"{prefix}.{number}.value": layer.values}
    return tensors


def classes(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits": model(**inputs).logits}


def cross_keys(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model on any one token of the decoder; export leaves out what the keys and values do not need."""
    token = torch.zeros_like(inputs["input_ids"][:, :1])
    return named("cross", model(**inputs, decoder_input_ids=token, use_cache=True).cache.cross_attention_cache)


def next_logits(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    caches, mask = {"past": DynamicCache(), "cross": DynamicCache()}, inputs["attention_mask"]
    for name, key in inputs.items():
        if name.endswith("key"):
            prefix, number, _ = name.split(".")
            caches[prefix].update(key, inputs[f"{prefix}.{number}.value"], int(number))
    cache = EncoderDecoderCache(*caches.values())
    cache.is_updated = dict.fromkeys(range(len(caches["cross"])), True)
    text = torch.zeros(*mask.shape, model.config.hidden_size, device=mask.device)  # not used: its keys are there
    given = {"encoder_outputs": (text,), "attention_mask": mask, "cache": cache, "use_cache": True}
    found = model(decoder_input_ids=inputs["decoder_input_ids"], **given)
    return {"logits": found.logits, **named("present", caches["past"])}


class Part(torch.nn.Module):
    """What a graph computes of a model, as the exporter takes it."""

    def __init__(self, model, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs):
        return self.function(self.model, inputs)


def export(path: Path, part: Part, inputs: dict[str, torch.Tensor], is_large: bool) -> None:
    """Write the graph of a part of a model."""
    text = {0: BATCH, 1: SOURCE}
    try:
        torch.onnx.export(
            part,
            f=path,
            kwargs={"inputs": inputs},
            input_names=list(inputs),
            output_names=list(part(inputs)),
            dynamic_shapes={"inputs": {name: SIZES.get(name.partition(".")[0], text) for name in inputs}},
            external_data=is_large,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--format onnx: torch cannot export it: {error.__cause__ or error}") from None


def check(model, running) -> None:
    """Make sure that graphs compute what a model does, for other sizes than they were exported with.

    Raises:
        UserError: they do not.
    """
    batch = trial_batch(model)
    inputs = {name: batch[name][:3, :7].clone() for name in ("input_ids", "attention_mask")}
    inputs["attention_mask"][0, 4:] = 0
    if model.can_generate():
        tokens, cache = batch["labels"][:3, :6], EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"encoder_outputs": running.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
        steps = (running(decoder_input_ids=piece, cache=cache, **given) for piece in tokens.split([1, 1, 4], dim=1))
        found, expected = torch.cat([step.logits for step in steps], dim=1), model(**inputs, decoder_input_ids=tokens)
    else:
        found, expected = running(**inputs).logits, model(**inputs)
    is_finite = expected.logits.isfinite()  # of Marian's padding they may not be
    expected = expected.logits[is_finite]
    off, largest = (found[is_finite] - expected).abs().max(), expected.abs().max()
    if not off <= CLOSE * largest:
        raise UserError(f"--format onnx: exported, its logits are {off:.3g} off, the largest being {largest:.3g}")


# --- running -----------------------------------------------------------------------------------------------------


class Graph:
    """A graph as a function of tensors by their names; those that it does not take are ignored."""

    def __init__(self, path: Path, device: torch.device):
        self.device, options = device, onnxruntime.SessionOptions()
        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise UserError(f"--device {device}: the ONNX Runtime here has no {provider}; choose --device cpu")
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        self.sizes = {each.name: each.shape for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def forward(self, **kwargs) -> ModelOutput:
        found = self.session.run(None, {name: kwargs[name].numpy(force=True) for name in self.sizes})
        return ModelOutput(zip(self.outputs, (torch.from_numpy(array).to(self.device) for array in found)))

    __call__ = forward


class Classifier(Graph):
    """A folder's classifier, which is called as one of transformers."""

    def eval(self) -> "Classifier":
        """It is never trained."""
        return self

    def can_generate(self) -> bool:
        return False

    def __call__(self, input_ids, **inputs) -> ModelOutput:
        return self.forward(**{"token_type_ids": torch.zeros_like(input_ids), "input_ids": input_ids} | inputs)


class Translator(PreTrainedModel, GenerationMixin):
    """A folder's encoder-decoder, with the `generate` of transformers."""

    device = None  # elsewhere that of the parameters
    _supports_sdpa = True  # as the config of the model may say

    def __init__(self, folder: Path, config, device: torch.device):
        super().__init__(config)
        self.device, self.graphs = device, {name: Graph(folder / f"{name}.onnx", device) for name in PARTS}

    def get_encoder(self) -> Graph:
        return self.graphs["encoder"]

    def forward(self, decoder_input_ids, attention_mask, encoder_outputs, cache, **_) -> Seq2SeqLMOutput:
        own, step = cache.self_attention_cache, self.graphs["decoder"]
        if not own.get_seq_length():
            for name, (_, heads, _, width) in ((name, size) for name, size in step.sizes.items() if "past" in size):
                if name.endswith("key"):
                    nothing = torch.zeros(len(decoder_input_ids), heads, 0, width, device=self.device)
                    own.update(nothing, nothing, int(name.split(".")[1]))
        given = {"decoder_input_ids": decoder_input_ids, "attention_mask": attention_mask, **encoder_outputs}
        found = step(**given, **named("past", own))
        for number, layer in enumerate(own.layers):
            layer.keys, layer.values = found[f"present.{number}.key"], found[f"present.{number}.value"]
        return Seq2SeqLMOutput(logits=found["logits"], cache=cache)


def opened(folder: Path, config, generation, quantization: str, device: torch.device):
    """What answers: a `Translator` or, without a generation config, a `Classifier`."""
    model = Translator(folder, config, device) if generation else Classifier(folder / "model.onnx", device)
    model.config, model.generation_config, model.precision = config, generation, quantization
    return model
