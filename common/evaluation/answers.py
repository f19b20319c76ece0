"""What a model answers, how good that is, and how large it is. The scores themselves are in `metrics`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from common.data import metrics
from common.data.batching import evaluation_batches, in_batches
from common.data.examples import Examples
from common.runtime.devices import Runtime, computing
from common.runtime.errors import UserError

# How many batches greedy search takes through the decoder at once. A step of it holds one token of each example, where
# the encoder holds all of them, and costs much the same for few rows as for many. Memory: the cache of so many batches.
DECODED_TOGETHER = 8
DROPPED = 0.25  # once this fraction of the rows has ended they are dropped; to copy the others' cache has its price too


@torch.inference_mode()
def translate(
    model,
    tokenizer,
    examples: Examples,
    runtime: Runtime,
    *,
    beams: int,
    max_new_tokens: int,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[list[str], float]:
    """Translate all examples, batched by length, by `model.generate`: greedily with 1 beam, in `greedy`'s way then.

    Each process has its share of the batches.

    Args:
        runtime: its batch size is how many examples the encoder takes at once; the decoder takes as many, times the
            beams if there are several, or times DECODED_TOGETHER.
        max_new_tokens: longest translation in tokens, the end token counted in.
    Returns:
        (translations, seconds): detokenized strings in the order of the examples, and the time generation took.
    """
    model.eval()
    search = {"num_beams": beams, "do_sample": False, "max_new_tokens": max_new_tokens, "use_cache": True}
    together = runtime.batch_size
    if beams == 1:
        search["custom_generate"] = greedy
        together = together * DECODED_TOGETHER
    translations = {}  # {position: text}
    started = runtime.now()
    order = runtime.processes.share(evaluation_batches(examples, together))
    for positions in runtime.talk.progress(order, "translating"):
        with computing(runtime.device, runtime.precision):
            states, mask = _encode(model, examples, positions, runtime)
            tokens = model.generate(encoder_outputs=BaseModelOutput(states), attention_mask=mask, **search)
        translations |= zip(positions, tokenizer.batch_decode(tokens, skip_special_tokens=True))
        after_batch()
    return in_order(translations, runtime), runtime.now() - started


def in_order(answers: dict, runtime: Runtime) -> list:
    """The answers of all processes, {position of an example: answer} in each, in the order of the examples."""
    found = {}
    for own in runtime.processes.gather(answers):
        found |= own
    return [found[position] for position in sorted(found)]


def _encode(model, examples, positions, runtime):
    """The encoder's states (examples, source length, d_model) and mask (examples, source length), batch by batch."""
    states, masks = [], []
    for some in in_batches(positions, runtime.batch_size):
        batch = examples.batch(some, runtime.device)
        mask = batch["attention_mask"]
        states += model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        check_outputs(states[-1])
        masks += mask
    return pad_sequence(states, batch_first=True), pad_sequence(masks, batch_first=True)


def check_outputs(outputs: torch.Tensor) -> None:
    """Make sure that what a model gives is finite: of what is not, any translation or class could be made.

    Raises:
        UserError: it is not.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise UserError("the model's outputs are not finite: its weights are damaged, or too large for float32")


def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """`generate`'s greedy search, which does not go on computing the rows that have ended. Its `custom_generate`.

    `generate` hands over what it has made of its arguments and the model's generation config. Not for logits
    processors that look at the source (such as encoder_repetition_penalty): they do not know that rows are dropped.

    Args:
        input_ids: (examples, 1), the start token of each.
        inputs: with "encoder_outputs", "attention_mask" (examples, source length) and a dynamic cache.
    Returns:
        The token ids of each example, a list of lists: the start token, the translation, its end token if it has one.
    """
    cache_name = "cache" if "cache" in inputs else "past_key_values"  # transformers 5.24 renamed it
    states, cache = inputs["encoder_outputs"].last_hidden_state, inputs[cache_name]
    # Added to the attention's scores. The model would make its like out of the plain mask again in every step.
    mask = (1 - inputs["attention_mask"][:, None, None].to(states.dtype)) * torch.finfo(states.dtype).min
    rows = torch.arange(len(input_ids), device=input_ids.device)  # the examples that are still in the batch
    going = torch.ones_like(rows, dtype=torch.bool)
    found = [None] * len(input_ids)
    while True:
        logits = model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=input_ids[:, -1:],
            **{cache_name: cache},
            use_cache=True,
        ).logits[:, -1]  # (rows, vocabulary)
        scores = logits_processor(input_ids, logits)
        largest, best = scores.max(dim=-1)  # twice as fast as argmax on a CPU
        check_outputs(largest)
        input_ids = torch.cat([input_ids, best[:, None]], dim=-1)
        ended = going & stopping_criteria(input_ids, scores)
        if not ended.any():
            continue
        for row, tokens in zip(rows[ended].tolist(), input_ids[ended].tolist()):
            found[row] = tokens
        going &= ~ended
        left = int(going.sum())
        if left == 0:
            return found
        if left <= (1 - DROPPED) * len(going):
            cache.batch_select_indices(going)
            states, mask, rows, input_ids = states[going], mask[going], rows[going], input_ids[going]
            going = going[going]


@torch.inference_mode()
def class_logits(
    model, examples: Examples, runtime: Runtime, after_batch: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, float]:
    """A classifier's logits, batched by length. Each process has its share of the batches.

    Returns:
        (logits, seconds): float32 (examples, classes) on the CPU, in the order of the examples, and the time it took.
    """
    model.eval()
    found = {}  # {position: logits}
    started = runtime.now()
    order = runtime.processes.share(evaluation_batches(examples, runtime.batch_size))
    for positions in runtime.talk.progress(order, "classifying"):
        batch = examples.batch(positions, runtime.device)
        with computing(runtime.device, runtime.precision):
            logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        check_outputs(logits)
        found |= zip(positions, logits.float().cpu())
        after_batch()
    return torch.stack(in_order(found, runtime)), runtime.now() - started


def quality(
    model,
    tokenizer,
    examples: Examples,
    runtime: Runtime,
    *,
    max_new_tokens: int,
    metric: str | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> float:
    """A metric of the task, the main one without `metric`; of greedy answers, no longer than `max_new_tokens`."""
    task = examples.task
    if task.has_labels:
        answers = class_logits(model, examples, runtime, after_batch)[0].argmax(-1).tolist()
    else:
        search = {"beams": 1, "max_new_tokens": max_new_tokens, "after_batch": after_batch}
        answers, _ = translate(model, tokenizer, examples, runtime, **search)
    return task.scored(answers, examples.texts, examples.targets).scores()[metric or task.metric]


@dataclass(frozen=True)
class Quality:
    """A metric on fixed examples, by which training chooses its best epoch."""

    metric: str
    examples: Examples
    tokenizer: object
    runtime: Runtime
    max_new_tokens: int

    def of(self, model: torch.nn.Module, after_batch: Callable[[], None] = lambda: None) -> float:
        """That of a model; higher is better."""
        return quality(
            model,
            self.tokenizer,
            self.examples,
            self.runtime,
            max_new_tokens=self.max_new_tokens,
            metric=self.metric,
            after_batch=after_batch,
        )

    def to_json(self) -> dict:
        """What determines it."""
        longest = {} if self.examples.task.has_labels else {"max_new_tokens": self.max_new_tokens}
        return {
            "metric_for_best": self.metric,
            "metric_version": metrics.VERSION,
            "metric_examples": self.examples.fingerprint(),
            **longest,
        }
