"""What a model answers, and how good that is by the metrics of its task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.data import metrics
from common.data.batching import evaluation_batches
from common.data.examples import Examples
from common.runtime import plan
from common.runtime.devices import Runtime, computing
from common.runtime.errors import UserError


def translate(
    model,
    tokenizer,
    examples: Examples,
    runtime: Runtime,
    *,
    beams: int,
    max_new_tokens: int,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[list[str], list[bool], float]:
    """Translate all examples by `model.generate`; each process has its share of the batches.

    Args:
        max_new_tokens: longest translation in tokens, the end token counted in.
    Returns:
        (translations, cut, seconds): detokenized strings in the order of the examples, whether each of them ended at
        the limit of tokens and not by itself, and the time generation took.
    """
    search = {"num_beams": beams, "do_sample": False, "max_new_tokens": max_new_tokens, "use_cache": True}

    def answer(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**inputs, **search, logits_processor=[_checked])
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return zip(texts, _are_cut(tokens, model.generation_config, max_new_tokens))

    answers, seconds = _answers(model, answer, examples, runtime, "translating", after_batch)
    return *map(list, zip(*answers)), seconds


def _are_cut(tokens, generation, most):
    """Whether each row of (rows, start token and answer) ended at the limit alone; an end that is forced is none."""
    ends = [] if generation.eos_token_id is None else generation.eos_token_id
    ends = torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)
    own = tokens[:, 1:most] if generation.forced_eos_token_id is not None else tokens[:, 1:]
    return (~torch.isin(own, ends).any(dim=1) & (tokens.shape[1] > most)).tolist()


def _checked(tokens, scores):
    """A logits processor of `generate` that changes nothing: (rows, length), (rows, vocabulary)."""
    check_outputs(scores.amax(-1))
    return scores


def class_logits(
    model, examples: Examples, runtime: Runtime, after_batch: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, float]:
    """(A classifier's logits, float32 (examples, classes) on the CPU, in the order of the examples; seconds)."""

    def answer(batch):
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        check_outputs(logits)
        return logits.float().cpu()

    rows, seconds = _answers(model, answer, examples, runtime, "classifying", after_batch)
    return torch.stack(rows), seconds


@torch.inference_mode()
def _answers(model, answer, examples, runtime, label, after_batch):
    """(answers to all examples, in their order, in every process; seconds)."""
    model.eval()
    answers = {}  # {position: answer}
    started = runtime.now()
    batches = runtime.processes.share(evaluation_batches(examples, runtime.batch_size))
    for positions in runtime.talk.progress(batches, label, size=examples.tokens_in):
        with computing(runtime.device, runtime.precision):
            answers |= zip(positions, answer(examples.batch(positions, runtime.device)))
        after_batch()
    for share in runtime.processes.gather(answers):
        answers |= share
    answers = plan.filled(answers, range(len(examples)))
    return [answers[position] for position in sorted(answers)], runtime.now() - started


def check_outputs(outputs: torch.Tensor) -> None:
    """Raise a UserError if what a model gives is not finite: any translation or class could be made of that."""
    if not bool(torch.isfinite(outputs).all()):
        raise UserError("the model's outputs are not finite: its weights are damaged, or too large for float32")


@dataclass(frozen=True)
class Quality:
    """A metric on fixed examples, of greedy answers no longer than `max_new_tokens`."""

    metric: str
    examples: Examples
    tokenizer: object
    runtime: Runtime
    max_new_tokens: int

    def of(self, model: torch.nn.Module, after_batch: Callable[[], None] = lambda: None) -> float:
        """That of a model; higher is better."""
        task, examples = self.examples.task, self.examples
        if task.has_labels:
            answers = class_logits(model, examples, self.runtime, after_batch)[0].argmax(-1).tolist()
        else:
            search = {"beams": 1, "max_new_tokens": self.max_new_tokens, "after_batch": after_batch}
            answers, _, _ = translate(model, self.tokenizer, examples, self.runtime, **search)
        return task.scored(answers, examples.texts, examples.targets).scores()[self.metric]

    def to_json(self) -> dict:
        """What determines it."""
        longest = {} if self.examples.task.has_labels else {"max_new_tokens": self.max_new_tokens}
        return {
            "metric_for_best": self.metric,
            "metric_version": metrics.VERSION,
            "metric_examples": self.examples.fingerprint(),
            **longest,
        }
