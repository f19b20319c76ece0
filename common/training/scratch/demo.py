"""The embedded studies: made-up data of `data/demo`, and a small model trained on them on the spot.

The data are copied to a folder such as Multi30K and IMDb come in. Sizes and rates were chosen so that the
model is trained to its end in two to three minutes on two cores, pruning visibly hurts, and fine-tuning visibly helps.
"""

import collections
import math
import re
import shutil
from pathlib import Path

import torch
import transformers

from common.blocks.defaults import study_of, usual_task
from common.data.examples import load_examples
from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.runtime.files import atomic_folder
from common.runtime.records import write_record
from common.training.scratch.train import fit

VERSION = 6  # part of the demo models' key: count it up when anything here or in the data changes
TEXTS = Path(__file__).parents[2] / "data" / "demo"
DATA = {"t5": TEXTS / "captions", "distilbert": TEXTS / "reviews"}
LONGEST = 128  # tokens
SCHEDULES = {
    "t5-demo": dict(epochs=14, batch_size=16, lr=5e-3),
    "distilbert-demo": dict(epochs=20, batch_size=32, lr=3e-3),
}


def build(model_type: str, *, seed: int, data_path: Path, data_record: dict, device: torch.device, talk, checkpoint):
    """Write the data of a demo, and train its model.

    `model_type`: "t5-demo" or "distilbert-demo"; `data_path`, `data_record`: the data folder to write, and its record.
    Returns (model, tokenizer, what `fit` measured).
    """
    family = model_type.removesuffix("-demo")
    task, prefix = TASKS[usual_task(family)], study_of(family).prefix
    write_data(family, data_path, data_record)
    torch.manual_seed(seed)
    make = {"t5": _translator, "distilbert": _classifier}[family]
    model, tokenizer = make(read_texts(data_path, "train", task), prefix)
    splits = [load_examples(data_path, split, tokenizer, task, prefix=prefix) for split in ("train", "validation")]
    return model, tokenizer, fit(model, *splits, SCHEDULES[model_type], "fp32", seed, device, talk, checkpoint)


def write_data(family: str, data_path: Path, data_record: dict) -> None:
    """Copy the captions ("t5") or the film reviews ("distilbert") to a folder, with their record."""
    with atomic_folder(data_path) as folder:
        for path in sorted(DATA[family].iterdir()):
            shutil.copyfile(path, folder / path.name)
        write_record(folder, data_record)


# --- English-German captions -----------------------------------------------------------------------------------


def _translator(pairs, prefix):
    sentences = [text for english, german in pairs for text in (prefix + english, german)]
    tokenizer = transformers.T5Tokenizer(vocab=unigram_vocabulary(sentences), extra_ids=0, model_max_length=LONGEST)
    # Logits are scaled by d_model**-0.5: from scratch, T5 learns fast with small initial weights and a high rate.
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=16,
            num_heads=8,
            d_ff=192,
            num_layers=2,
            num_decoder_layers=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            initializer_factor=0.5,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    return model, tokenizer


def unigram_vocabulary(sentences):
    """Pieces and log frequencies for a Unigram tokenizer, the same in every process: words, and single characters.

    (The `tokenizers` trainers are not used because they may differ from run to run.) Returns [(piece, log p)].
    """
    words = collections.Counter(word for text in sentences for word in re.findall(r"\w+|[^\w\s]", text))
    pieces = collections.Counter({"▁": 1})
    for word, count in words.items():
        pieces["▁" + word if word[0].isalnum() else word] += count
        for character in word:
            pieces[character] += 0.01 * count
    total = math.fsum(pieces.values())
    ranked = sorted(pieces.items(), key=lambda pair: (-pair[1], pair[0]))
    special = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    return special + [(piece, math.log(count / total)) for piece, count in ranked]


# --- film reviews ----------------------------------------------------------------------------------------------


def _classifier(pairs, prefix):
    tokenizer = transformers.DistilBertTokenizer(
        vocab=wordpiece_vocabulary(text for text, _ in pairs), model_max_length=LONGEST
    )
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST,
        n_layers=3,
        n_heads=8,
        dim=32,
        hidden_dim=64,
        dropout=0.05,
        attention_dropout=0.05,
        seq_classif_dropout=0.05,
        initializer_range=0.12,
        pad_token_id=0,
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )
    model = transformers.DistilBertForSequenceClassification(config)
    with torch.no_grad():  # positions start as sinusoids and stay trainable: without, the first epochs learn nothing
        positions = model.distilbert.embeddings.position_embeddings.weight  # (LONGEST, dim)
        waves = 1000 ** (torch.arange(0, config.dim, 2) / config.dim)
        angles = torch.arange(LONGEST)[:, None] / waves  # (LONGEST, dim / 2)
        positions.copy_(config.initializer_range * torch.stack((angles.sin(), angles.cos()), -1).flatten(1))
    return model, tokenizer


def wordpiece_vocabulary(texts):
    """{piece: id} for a WordPiece tokenizer: every word of the texts whole, and single characters as a fallback."""
    words = {word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]", text.lower())}
    characters = {chr(code) for code in range(33, 127)} - {chr(code) for code in range(ord("A"), ord("Z") + 1)}
    pieces = [*sorted(words | characters), *(f"##{character}" for character in sorted(characters))]
    return {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])}
