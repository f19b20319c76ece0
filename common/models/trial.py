"""Models tried on a few examples, as they will be loaded: what fails is told before a folder is kept."""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from common.blocks.families import family_of
from common.data.examples import Batch, Examples
from common.data.tasks import IGNORED
from common.models import afresh
from common.models.load import load_model, load_tokenizer
from common.models.publishing import AUTO_CLASSES
from common.models.saving import save_model
from common.models.tokenizer import PairedTokenizer, vocabularies
from common.runtime.errors import UserError, as_user_error
from common.runtime.files import atomic_folder
from common.runtime.records import write_record

EXAMPLES, TOKENS = 4, 8  # of a trial; the tokens of each that is made up, and of what is generated
TEXT = "A text."
EXACT, QUANTIZED = 0.01, 0.25  # of the range of logits: how far off a folder's may be
FURTHEST = 0.1  # that probabilities in float16 may be from those in float32; usual is a hundredth at most


def trial_batch(model: torch.nn.Module, examples: Examples | None = None) -> dict:
    """A batch of a few examples with labels, on the model's device; without any, of tokens drawn at random."""
    if examples is not None:
        examples = examples.sample(EXAMPLES)
        return examples.batch(range(len(examples)), model.device)
    source, target = vocabularies(model.config)
    shape = EXAMPLES, min(TOKENS, family_of(model.config).positions(model.config) or TOKENS)
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
    labels = draw(target, shape) if model.can_generate() else draw(model.config.num_labels, shape[:1])
    batch = {"input_ids": draw(source, shape), "attention_mask": torch.ones(shape, dtype=torch.int64), "labels": labels}
    return Batch(batch, model.device)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """What a model in `eval()` gives for a batch, float32: (labels, vocabulary), or (examples, classes)."""
    logits = model(**batch).logits.float()
    return logits[batch["labels"] != IGNORED] if logits.dim() > 2 else logits


def check_half(path: str | Path, model: torch.nn.Module, batch: dict) -> None:
    """Make sure, before a model is written in float16, that it gives about the same there as in float32.

    Activations beyond 65,504 overflow there, however small the weights; T5 even cuts them off, and goes on with others.
    """
    was_training = model.training
    exact = logits_of(model.eval(), batch)
    model.train(was_training)
    half = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=model.state_dict(), dtype=torch.float16
    )
    off = logits_of(half.to(model.device), batch).softmax(-1) - exact.softmax(-1)
    distance = float(off.abs().sum(-1).mean() / 2)  # total variation
    if not distance <= FURTHEST:
        what = "NaN" if math.isnan(distance) else f"{distance:.0%} off"
        raise UserError(
            f"{path}: not written: loaded in float16, its predictions would be {what}, as activations beyond 65,504 "
            "overflow; choose --dtype bfloat16"
        )


def afresh_check(path: str | Path, model, tokenizer, engine: str | None, tolerance: float) -> Callable[[Path], None]:
    """What makes sure, before a folder takes its place, that it works without this suite, and gives what `model` gives.

    It is loaded in a process of its own, by transformers or by an engine. All folders of a run go
    through the same process, so that a run waits but once for it to import these.

    Returns:
        a `check` for `save_model`; it raises a UserError.
    """
    tokens = (tokenizer.source if isinstance(tokenizer, PairedTokenizer) else tokenizer)(TEXT)["input_ids"]
    ids = torch.tensor([tokens], device=model.device)
    wanted = afresh.first_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).cpu()
    auto_class, has_code = model._auto_class or AUTO_CLASSES[model.can_generate()], model._auto_class is not None

    def check(folder):
        told = ask_afresh(
            folder=str(folder.absolute()), text=TEXT, engine=engine, auto_class=auto_class, has_code=has_code
        )
        reason = told.get("error") or (
            f"its tokenizer reads {TEXT!r} as {told['tokens']}, where {tokens} is right"
            if told["tokens"] != tokens
            else difference(torch.tensor(told["logits"]), wanted, tolerance)
        )
        if reason:
            raise UserError(f"{path}: not written: loaded in a process of its own, without this suite: {reason}")

    return check


def difference(given: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> str | None:
    """In how far a folder's logits, up to a constant, are not those that are wanted, or None."""
    if len(given) != len(wanted):
        return f"it has {len(given)} outputs, and not {len(wanted)}"
    given, wanted = given[wanted.isfinite()], wanted[wanted.isfinite()]  # Marian's padding is not
    off = (given - given.mean() - wanted + wanted.mean()).abs().max() / (wanted.max() - wanted.min()).clamp(min=1e-3)
    return None if off <= tolerance else f"its logits are {float(off):.0%} of their range off"


def ask_afresh(**question) -> dict:
    """What `afresh.answer` says; {"error"} if it fails."""
    process = fresh_process()
    try:
        # All that is imported here it would import anew for each folder.
        modules = sorted(name for name in sys.modules if name.startswith("transformers.models."))
        process.stdin.write(json.dumps([modules, question]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):  # it is gone
        fresh_process.cache_clear()
        return {"error": f"the process ended with code {process.wait()}"}


@cache
def fresh_process() -> subprocess.Popen:
    """A process that runs `afresh`, on the CPU and without a network, and ends with this one; Ctrl-C is not for it."""
    modules = tempfile.TemporaryDirectory()  # where transformers copies folders' code to
    own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": modules.name}
    process = subprocess.Popen(
        [sys.executable, "-P", afresh.__file__],  # -P: what lies beside the file is no package for it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | own,
    )
    process.modules = modules  # removed with it
    return process


def save_tried(
    model_path: str | Path,
    tokenizer_path: str | Path,
    model: torch.nn.Module,
    tokenizer,
    record: dict,
    tokenizer_record: dict,
    *,
    where: object,
    dtype: str = "float32",
    examples: Examples | None = None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Save a model and its tokenizer, once both work as every later stage will load and use them.

    Args:
        where: what messages name, such as the checkpoint.
        examples: some of the model's data, if they are known.
        then: what else is to be done before they take their places; it may take long.
    Raises:
        UserError: they do not work; neither folder is there then.
    """

    def try_out(folder):
        with as_user_error(where, "cannot be used"):
            try:
                loaded = load_model(folder)
                load_tokenizer(beside, loaded)
            except UserError as error:
                raise UserError(
                    str(error).replace(f"{folder}: ", "").replace(str(beside), str(tokenizer_path))
                ) from None
            batch = trial_batch(loaded.model, examples)
            if not bool(logits_of(loaded.model, batch).isfinite().all()):
                raise UserError("its outputs are not finite")
            if loaded.model.can_generate():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=TOKENS)
        then()

    if dtype == "float16":
        check_half(model_path, model, trial_batch(model, examples))
    with atomic_folder(tokenizer_path) as beside:
        tokenizer.save_pretrained(beside)
        write_record(beside, tokenizer_record)
        save_model(model_path, model, record, dtype=dtype, check=try_out)
