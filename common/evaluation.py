"""How good a model is, and how large: BLEU, accuracy, parameters."""

import torch

from common.data import evaluation_batches
from common.models import now


@torch.inference_mode()
def translate(model, tokenizer, examples, *, batch_size, beams, max_new_tokens, device, talk):
    """Translate all examples, batched by length.

    Returns:
        (translations, seconds): detokenized strings in the order of the examples, and the time generation took.
    """
    model.eval()
    translations = [None] * len(examples)
    started = now(device)
    for positions in talk.progress(evaluation_batches(examples, batch_size), "translating"):
        batch = examples.batch(positions, device)
        tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens)
        for position, text in zip(positions, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            translations[position] = text
    return translations, now(device) - started


def bleu(translations, references):
    """Corpus BLEU (0-100) by sacrebleu, on detokenized text.

    Args:
        translations, references: lists of strings of equal, non-zero length.
    Returns:
        (score, signature).
    Raises:
        ValueError: the lengths differ or are zero, which sacrebleu would score silently or trip over.
    """
    from sacrebleu.metrics import BLEU

    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations for {len(references)} references")
    metric = BLEU()
    score = metric.corpus_score(translations, [references])
    return score.score, str(metric.get_signature())


@torch.inference_mode()
def classify(model, examples, *, batch_size, device, talk):
    """The predicted class of every example, batched by length.

    Returns:
        (predictions, seconds): ints in the order of the examples, and the time it took.
    """
    model.eval()
    predictions = [None] * len(examples)
    started = now(device)
    for positions in talk.progress(evaluation_batches(examples, batch_size), "classifying"):
        batch = examples.batch(positions, device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for position, prediction in zip(positions, logits.argmax(-1).tolist()):
            predictions[position] = prediction
    return predictions, now(device) - started


def accuracy(predictions, labels):
    """The fraction (0-1) of predictions that equal their label.

    Raises:
        ValueError: the lengths differ or are zero.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return sum(p == t for p, t in zip(predictions, labels)) / len(labels)


@torch.no_grad()
def parameter_counts(model):
    """{"parameters", "nonzero_parameters", "sparsity"} of a model; tied parameters count once."""
    total = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    return {"parameters": total, "nonzero_parameters": nonzero, "sparsity": 1 - nonzero / total}
