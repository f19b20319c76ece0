"""A Marian model with two vocabularies, trained from scratch on translations (`download_model.py seq2seq`)."""

from collections.abc import Iterable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.data.examples import Examples, load_examples
from common.data.sources import DataSource
from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.models.tokenizer import PairedTokenizer
from common.runtime.devices import Runtime
from common.runtime.records import digest
from common.runtime.settings import TrainingSettings
from common.training.checkpoints import Checkpoint
from common.training.loop import fit_model

SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")  # in the order of their ids, which the model's config names
LEAST = 2  # how often two pieces must stand side by side to be made one
HEADS = 8
BETA2 = 0.98  # of AdamW: from scratch gradients change fast
POSITIONS = 512
# What is trained unless flags say otherwise: the model of the study on some ten thousands of pairs or more, a small one
# on the demo's captions.
USUAL = dict(d_model=512, layers=3, feed_forward_size=512, vocabulary=4000, epochs=10, batch_size=64, lr=5e-4)
ON_CAPTIONS = dict(d_model=96, layers=2, feed_forward_size=192, vocabulary=400, epochs=10, batch_size=32, lr=2e-3)


def train(
    source: DataSource, settings: dict, *, precision: str, seed: int, device: torch.device, talk, checkpoint: Checkpoint
) -> tuple:
    """Train a Marian model on a data source's training split.

    `settings`: those of `USUAL`; `vocabulary`: tokens of either language, at most. Returns (model in `eval()`,
    tokenizer, what `fit` measured).
    """
    task = TASKS["translation"]
    columns = zip(*read_texts(source, "train", task))
    tokenizer = PairedTokenizer(*(bpe(texts, settings["vocabulary"], task.longest) for texts in columns))
    torch.manual_seed(seed)
    model = transformers.MarianMTModel(marian_config(tokenizer, settings))
    splits = [load_examples(source, split, tokenizer, task) for split in ("train", "validation")]
    talk.say(f"vocabularies of {len(tokenizer.source)} and {len(tokenizer.target)} tokens")
    schedule = {name: settings[name] for name in ("epochs", "batch_size", "lr")}
    return model, tokenizer, fit(model, *splits, schedule, precision, seed, device, talk, checkpoint)


def fit(
    model, train: Examples, validation: Examples, schedule: dict, precision, seed, device, talk, checkpoint
) -> dict:
    """Train a new model by a schedule of "epochs", "batch_size" and "lr"; returns {"val_loss", "epochs", "seconds"}."""
    recipe = TrainingSettings(**schedule, precision=precision, seed=seed, beta2=BETA2, dropout=True)
    millions = model.num_parameters() / 1e6
    talk.say(f"training {millions:.1f} million parameters on {len(train)} examples for {recipe.epochs} epochs")
    runtime = Runtime(device, recipe.batch_size, talk)
    learner, rows = fit_model(model.to(device), train, validation, recipe, runtime, checkpoint)
    seconds = sum(row.train + row.validation for row in rows)
    return {"val_loss": learner.best_loss, "epochs": recipe.epochs, "seconds": round(seconds, 1)}


def marian_config(tokenizer: PairedTokenizer, settings: dict) -> transformers.MarianConfig:
    """An encoder-decoder of `torch.nn.Transformer`'s shape, with sinusoidal positions and embeddings of either side."""
    unknown, padding, start, end = range(len(SPECIAL))
    layers, neurons = settings["layers"], settings["feed_forward_size"]
    return transformers.MarianConfig(
        vocab_size=len(tokenizer.source),
        decoder_vocab_size=len(tokenizer.target),
        share_encoder_decoder_embeddings=False,
        d_model=settings["d_model"],
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=neurons,
        decoder_ffn_dim=neurons,
        max_position_embeddings=POSITIONS,
        activation_function="relu",
        scale_embedding=True,
        init_std=settings["d_model"] ** -0.5,
        unk_token_id=unknown,
        pad_token_id=padding,
        bos_token_id=start,
        eos_token_id=end,
        decoder_start_token_id=start,
        forced_eos_token_id=None,
    )


def texts_digest(source: DataSource) -> str:
    """SHA-256 (hex) of the texts that a model is trained on and chosen by."""
    return digest([read_texts(source, split, TASKS["translation"]) for split in ("train", "validation")])


def bpe(texts: Iterable[str], size: int, longest: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair encoding of words, made from texts, whose decoding gives a text back as it was.

    Of ties in the counts the trainer takes the first, so the same texts make the same vocabulary.

    `size`: tokens, at most; `longest`: tokens of an input, at most, unless a caller says otherwise.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, min_frequency=LEAST, special_tokens=list(SPECIAL), show_progress=False),
    )
    end = SPECIAL[3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)
