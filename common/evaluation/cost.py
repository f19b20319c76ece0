"""What a model costs: parameters, bytes, multiply-adds and seconds, each beside the original's."""

import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.models.load import LoadedModel, load_model, resolve
from common.models.tokenizer import vocabularies
from common.runtime.devices import Runtime
from common.runtime.errors import UserError
from common.runtime.files import real
from common.runtime.records import write_json

ROUNDS, WARM_UP = 9, 2
MANY = 32  # texts whose answers are generated at once


def original_of(
    loaded: LoadedModel, given: str | None, device: torch.device, known: dict[Path, LoadedModel]
) -> LoadedModel | None:
    """The original that a model was pruned from: the flag's, else the one its record names, or None.

    Args:
        known: models that are loaded already, by resolved path; a new one is added.
    Raises:
        UserError: it is not the one that the model was made from, or of another task.
    """
    made_from = loaded.record.get("original") or {}
    path = given or resolve(made_from.get("model"), loaded.path)
    if path is None or (given is None and not Path(path).exists()):
        return None
    key = real(path)
    if key not in known:
        known[key] = load_model(path, device)
    original = known[key]
    if made_from and original.identity["fingerprint"] != made_from["fingerprint"]:
        raise UserError(
            f"{path}: is not the original of {loaded.path}, which is {made_from['name']}; name it with --original"
        )
    if original.family is not loaded.family:
        raise UserError(
            f"{path}: is a {original.model.config.model_type} model, {loaded.path} a {loaded.model.config.model_type} "
            "one; name the model's own original with --original"
        )
    return original


class Reported(NamedTuple):
    """A model to report: where to, the model, its original (None: figures stand alone), and what was found of it."""

    file: str | Path
    loaded: LoadedModel
    original: LoadedModel | None
    evaluation: dict


def write_reports(reported: list[Reported], runtime: Runtime) -> dict[str, dict]:
    """Measure models beside their originals, in turn, and write reports.

    Returns:
        {model, as its evaluation calls it: figures}; these are {name: {"model", "original", "ratio"}}.
    """
    models = {id(model): model for report in reported for model in (report.loaded, report.original) if model}
    seconds = speeds(models, runtime)
    products = {key: {"multiply_adds": multiply_adds(model)} for key, model in models.items() if model.is_module}
    measured = {key: sizes(model) | products.get(key, {}) | seconds[key] for key, model in models.items()}
    found = {}
    for file, loaded, original, evaluation in reported:
        if original is None and all(other.original is not loaded for other in reported):
            runtime.talk.say(f"{file}: the original is not known, so the figures stand alone; name it with --original")
        figures = {figure: {"model": value} for figure, value in measured[id(loaded)].items()}
        for figure, values in figures.items():
            of_original = measured[id(original)][figure] if original else None
            values["original"] = of_original
            values["ratio"] = round(values["model"] / of_original, 4) if of_original else None
        write_json(
            file,
            {
                "script": loaded.task.evaluated_by,
                "model": str(loaded.path),
                "original": str(original.path) if original else None,
                "evaluation": evaluation,
                "input": stated_input(loaded),
                "rounds": ROUNDS,
                "device": str(runtime.device),
                "threads": torch.get_num_threads(),
                "figures": figures,
            },
        )
        found[evaluation["model"]] = figures
    return found


def sizes(loaded):
    """Counts of a model's parameters; its bytes, of the weights on disk, of parameters and buffers in memory."""
    figures = {name: loaded.counts[name] for name in ("parameters", "nonzero_parameters")}
    figures["bytes_on_disk"] = loaded.bytes_on_disk
    if loaded.is_module:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*loaded.model.parameters(), *loaded.model.buffers())
        }  # tied ones count once
        figures["bytes_in_memory"] = sum(storages.values())
    return figures


def stated_input(loaded: LoadedModel) -> dict[str, int]:
    """The task's example, no longer than the model has positions for."""
    stated = loaded.task.example
    most = loaded.positions or max(stated.values())
    return {name: min(size, most) if name.endswith("tokens") else size for name, size in stated.items()}


def example_batch(loaded: LoadedModel, count: int) -> dict[str, torch.Tensor]:
    """A batch of `count` made-up examples of the stated lengths; what a model costs does not depend on the tokens."""
    stated = stated_input(loaded)
    length, vocabulary = stated["input_tokens"], min(vocabularies(loaded.model.config))
    tokens = torch.arange(length, device=loaded.model.device).repeat(count, 1) % (vocabulary - 3)
    batch = {"input_ids": tokens + 3, "attention_mask": torch.ones_like(tokens)}  # 3: past padding and end
    return loaded.task.example_batch(batch, stated)


@torch.inference_mode()
def multiply_adds(loaded):
    """Multiply-adds of the matrix products in one forward pass over one example of the stated lengths."""
    # The counter cannot watch a module that is given a trainable parameter, as a norm of DeBERTa is.
    fixed = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    return count_products(lambda: functional_call(loaded.model, fixed, (), example_batch(loaded, 1)))


def count_products(run):
    """Multiply-adds of the matrix products in whatever a function does."""
    # The counter does not know the fused attention of CPUs; the one that it knows multiplies as much.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() // 2  # an addition and a multiplication are two


def ways_to_run(loaded):
    """What is timed: {figure: (function without arguments, parts that it is divided by)}; engines only generate.

    A token of one text, and of each of many at once, whose texts are equal.
    """
    model, batch = loaded.model, example_batch(loaded, loaded.task.example["batch_size"])
    generates, ways = "decoder_input_ids" in batch, {}
    if loaded.is_module or not generates:
        ways["seconds_per_batch"] = torch.inference_mode()(lambda: model(**batch)), 1
    if generates:
        length = batch["decoder_input_ids"].shape[1]
        for count, name in ((1, "seconds_per_generated_token"), (MANY, f"seconds_per_generated_token_of_{MANY}")):
            inputs = {name: batch[name][:1].repeat(count, 1) for name in ("input_ids", "attention_mask")}
            ways[name] = (partial(generate, model, inputs, length), count * length)
    return ways


def generate(model, inputs: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    """Answers of exactly so many tokens."""
    return model.generate(**inputs, do_sample=False, num_beams=1, min_new_tokens=length, max_new_tokens=length)


def speeds(models: dict[str, LoadedModel], runtime: Runtime) -> dict[str, dict[str, float]]:
    """Median seconds of several models, taken in turn, after a warm-up: {name: {figure: seconds}}."""
    ways = {name: ways_to_run(loaded) for name, loaded in models.items()}
    seconds = {name: {figure: [] for figure in of_model} for name, of_model in ways.items()}
    for _ in runtime.talk.progress(range(WARM_UP + ROUNDS), "timing"):
        for name, of_model in ways.items():
            for figure, (run, parts) in of_model.items():
                started = runtime.now()
                run()
                seconds[name][figure].append((runtime.now() - started) / parts)
    return {
        name: {figure: round(statistics.median(times[WARM_UP:]), 7) for figure, times in of_model.items()}
        for name, of_model in seconds.items()
    }
