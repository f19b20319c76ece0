"""What a model costs: parameters, bytes, multiply-adds and seconds, each beside the original's."""

import statistics
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.evaluation import parameter_counts
from common.models import DENSE_NAME, SPARSE_NAME, load_model, now, resolve
from common.records import write_json

# The input that multiply-adds are counted for (one example) and seconds measured with (a batch).
INPUTS = {
    "translation": {"batch_size": 8, "input_tokens": 32, "output_tokens": 32},
    "classification": {"batch_size": 8, "input_tokens": 128},
}
ROUNDS, WARM_UP = 9, 2


def original_of(loaded, given, device):
    """The original that a model was pruned from, as a `LoadedModel`: the flag's, else the one its record names.

    Returns:
        None if there is neither.
    Raises:
        UserError: it is not the one that the model was made from, or of another task.
    """
    made_from = loaded.record.get("original") or {}
    path = given or resolve(made_from.get("model"), loaded.path)
    if path is None or (given is None and not Path(path).exists()):
        return None
    original = load_model(path, device)
    if made_from and original.identity["fingerprint"] != made_from["fingerprint"]:
        raise UserError(
            f"{path}: is not the original of {loaded.path}, which is {made_from['name']}; name it with --original"
        )
    if original.family is not loaded.family:
        raise UserError(
            f"{path}: is a {original.family.task} model, {loaded.path} a {loaded.family.task} one; "
            "name the model's own original with --original"
        )
    return original


def write_report(path, loaded, original, evaluation, device, talk):
    """Measure a model beside its original and write a report: "figures" is {name: {"model", "original", "ratio"}}.

    Args:
        original: another `LoadedModel`, or None: the figures stand alone then.
        evaluation: what the evaluation found, {name: value}.
    """
    if original is None:
        talk.say(f"{path}: the original is not known, and not reported beside the model; name it with --original")
    models = {"model": loaded} | ({"original": original} if original else {})
    stated = stated_input(loaded)
    measured = {name: sizes(each) | {"multiply_adds": multiply_adds(each)} for name, each in models.items()}
    for name, seconds in speeds(models, device).items():
        measured[name] |= seconds
    figures = {
        figure: beside(value, measured["original"][figure] if original else None)
        for figure, value in measured["model"].items()
    }
    write_json(
        path,
        {
            "model": str(loaded.path),
            "original": str(original.path) if original else None,
            "evaluation": evaluation,
            "input": stated,
            "rounds": ROUNDS,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "figures": figures,
        },
    )


def beside(value, original):
    return {"model": value, "original": original, "ratio": round(value / original, 4) if original else None}


def sizes(loaded):
    """Counts of a model's parameters; its bytes, of the weights on disk, of parameters and buffers in memory."""
    path = loaded.path
    files = [path] if path.is_file() else weight_files(path)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers())
    }  # tied ones count once
    counts = parameter_counts(loaded.model)
    return {
        "parameters": counts["parameters"],
        "nonzero_parameters": counts["nonzero_parameters"],
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_in_memory": sum(storages.values()),
    }


def weight_files(folder):
    """The files that `load_model` reads a folder's weights from."""
    for name in (SPARSE_NAME, DENSE_NAME):
        if (folder / name).is_file():
            return [folder / name]
    return sorted(folder.glob("model-*.safetensors"))  # a large model's shards


def stated_input(loaded):
    """The entry of INPUTS for a model; no longer than it has positions for."""
    stated = INPUTS[loaded.family.task]
    positions = getattr(loaded.model.config, "max_position_embeddings", stated["input_tokens"])
    return stated | {"input_tokens": min(stated["input_tokens"], positions)}


def example_batch(loaded, count):
    """A batch of `count` made-up examples of the stated lengths; what a model costs does not hang on the tokens."""
    stated, device = stated_input(loaded), loaded.model.device
    tokens = torch.arange(stated["input_tokens"], device=device).repeat(count, 1) % (loaded.model.config.vocab_size - 3)
    batch = {"input_ids": tokens + 3, "attention_mask": torch.ones_like(tokens)}  # 3: past padding and end
    if "output_tokens" in stated:
        batch["decoder_input_ids"] = batch["input_ids"][:, :1].repeat(1, stated["output_tokens"])  # no loss: no labels
    return batch


@torch.inference_mode()
def multiply_adds(loaded):
    """Multiply-adds of the matrix products in one forward pass over one example of the stated lengths."""
    return count_products(lambda: loaded.model(**example_batch(loaded, 1)))


def count_products(run):
    """Multiply-adds of the matrix products in whatever a function does."""
    # The counter does not know the fused attention of CPUs; the one that it knows multiplies as much.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() // 2  # an addition and a multiplication are two


def ways_to_run(loaded):
    """What is timed: {figure: (function without arguments, parts that it is divided by)}.

    "seconds_per_batch", of a forward pass; of a translation model also "seconds_per_generated_token", of a greedy
    search for one example.
    """
    model, batch = loaded.model, example_batch(loaded, INPUTS[loaded.family.task]["batch_size"])
    ways = {"seconds_per_batch": (torch.inference_mode()(lambda: model(**batch)), 1)}
    if "decoder_input_ids" in batch:
        length = batch["decoder_input_ids"].shape[1]
        one = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
        ways["seconds_per_generated_token"] = (
            lambda: model.generate(**one, do_sample=False, num_beams=1, min_new_tokens=length, max_new_tokens=length),
            length,
        )
    return ways


def speeds(models, device):
    """Median seconds of several models, taken in turn, after a warm-up: {name: {figure: seconds}}."""
    ways = {name: ways_to_run(loaded) for name, loaded in models.items()}
    seconds = {name: {figure: [] for figure in each} for name, each in ways.items()}
    for turn in range(WARM_UP + ROUNDS):
        for name, each in ways.items():
            for figure, (run, parts) in each.items():
                started = now(device)
                run()
                if turn >= WARM_UP:
                    seconds[name][figure].append((now(device) - started) / parts)
    return {
        name: {figure: round(statistics.median(times), 7) for figure, times in each.items()}
        for name, each in seconds.items()
    }
