"""Tiny models, tokenizers and data, and what names their blocks."""

import json
import random

import numpy as np
import torch
import transformers

from common.blocks.defaults import usual_task
from common.blocks.find import find_blocks
from common.data.examples import Batch, Examples
from common.data.tasks import TASKS
from common.runtime.devices import Runtime
from common.runtime.progress import Talk
from common.runtime.settings import TrainingSettings

CPU = torch.device("cpu")
QUIET = Talk(quiet=True)
RUNTIME = Runtime(CPU, 8, QUIET)
OPTIONS = {"runtime": RUNTIME}
KINDS = {"t5": "t5", "t5-gated": "t5", "distilbert": "distilbert"}  # a tiny model's family
NOUNS = {"dog": "Hund", "cat": "Katze", "child": "Kind", "man": "Mann", "bird": "Vogel", "tree": "Baum"}
VERBS = {"sees": "sieht", "likes": "mag", "finds": "findet", "hears": "hört"}


def caption(rng):
    subject, verb, other = rng.choice(list(NOUNS)), rng.choice(list(VERBS)), rng.choice(list(NOUNS))
    return f"the {subject} {verb} a {other}", f"das {NOUNS[subject]} {VERBS[verb]} ein {NOUNS[other]}"


def t5_settings(**changes):
    settings = dict(
        vocab_size=64,
        d_model=32,
        d_kv=6,
        num_heads=4,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return settings | changes  # 4 heads of 6: the inner width is not d_model, nor divides it


def t5_config(**changes):
    return transformers.T5Config(**t5_settings(**changes))


def distilbert_config(**changes):
    settings = dict(vocab_size=64, dim=32, n_heads=4, n_layers=2, hidden_dim=48, max_position_embeddings=64)
    return transformers.DistilBertConfig(**settings | changes)


def bert_settings(**changes):
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return settings | changes


def bart_settings(**changes):
    """Of a tiny BART or Marian whose special tokens are those of the tiny T5's tokenizer."""
    return (
        dict(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
            init_std=0.3,
        )
        | changes
    )


# The special values are those of the checkpoints that people use: roberta-base, xlm-roberta-base, electra-small,
# deberta-v3-base (and -v2-xlarge), ModernBERT-base, mbart-large-50, m2m100_418M, pegasus-large, mt5-small, umt5-small,
# flan-t5-small.
ROBERTA = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, layer_norm_eps=1e-5)
DEBERTA = dict(
    relative_attention=True,
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    max_relative_positions=-1,
    position_biased_input=False,
    type_vocab_size=0,
    layer_norm_eps=1e-7,
)
UNSHARED = DEBERTA | dict(share_att_key=False, position_biased_input=True, conv_kernel_size=3, conv_act="gelu")
MODERN = dict(
    local_attention=4,  # two tokens to either side
    global_attn_every_n_layers=2,
    global_rope_theta=160000.0,
    local_rope_theta=10000.0,
    classifier_pooling="mean",
    position_embedding_type="absolute",
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=3,
    cls_token_id=2,
    sep_token_id=3,
)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def untied(model):
    """A T5-like model with a head of its own, as from T5 1.1 on."""
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model


def seq2seq(name, generation=None, **changes):
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    model = model_class(model_class.config_class(**bart_settings(**changes)))
    model.generation_config.update(**generation or {})
    return model


def classifier(name, **changes):
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    return model_class(model_class.config_class(**bert_settings(**changes)))


def t5_like(name):
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    return untied(model_class(model_class.config_class(**t5_settings(**GATED))))


MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(t5_config()),
    "t5-gated": lambda: transformers.T5ForConditionalGeneration(t5_config(feed_forward_proj="gated-gelu")),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(distilbert_config()),
    "bert": lambda: classifier("Bert"),
    "roberta": lambda: classifier("Roberta", **ROBERTA, max_position_embeddings=66),
    "xlm-roberta": lambda: classifier("XLMRoberta", **ROBERTA, max_position_embeddings=66),
    "electra": lambda: classifier("Electra", embedding_size=24),
    "deberta-v2": lambda: classifier("DebertaV2", **DEBERTA),
    "deberta-v2-unshared": lambda: classifier("DebertaV2", **UNSHARED),
    "modernbert": lambda: classifier("ModernBert", **MODERN),
    "bart": lambda: seq2seq("Bart"),
    "mbart": lambda: seq2seq(
        "MBart", {"forced_bos_token_id": 7}, scale_embedding=True, decoder_start_token_id=1
    ),  # generation begins with the language's token, 7
    "m2m_100": lambda: seq2seq("M2M100", {"forced_bos_token_id": 7}, scale_embedding=True),
    "pegasus": lambda: seq2seq("Pegasus", scale_embedding=True, activation_function="relu"),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**bart_settings())),
    "mt5": lambda: t5_like("MT5"),
    "umt5": lambda: t5_like("UMT5"),
    "t5-flan": lambda: t5_like("T5"),
}
CLASSIFIERS = (
    "distilbert",
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "deberta-v2",
    "deberta-v2-unshared",
    "modernbert",
    "toy",
)


def build_model(kind):
    """A tiny model with seeded random weights: a key of MODELS."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def build_tokenizer(kind):
    words = sorted(
        {
            *NOUNS,
            *VERBS,
            *NOUNS.values(),
            *VERBS.values(),
            "the",
            "a",
            "das",
            "ein",
            "translate",
            "English",
            "to",
            "German:",
            "good",
            "bad",
            "film",
        }
    )
    if kind in CLASSIFIERS:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if "roberta" in kind:
            special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
        vocab = [*special, *(word.lower() for word in words)]
        return transformers.DistilBertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(vocab))})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -3.0) for word in words)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def make_workshop(folder):
    """Write model/KIND, tokenizer/KIND and data/KIND of "t5" and "distilbert" into a folder; returns it."""
    rng = random.Random(0)
    for kind in ("t5", "distilbert"):
        build_model(kind).save_pretrained(folder / "model" / kind)
        build_tokenizer(kind).save_pretrained(folder / "tokenizer" / kind)
        data = folder / "data" / kind
        data.mkdir(parents=True)
        record = {"tokenizer": {"folder": f"../tokenizer/{kind}"}, "data": {"folder": f"../data/{kind}"}}
        (folder / "model" / kind / "record.json").write_text(json.dumps(record))
        for stem, split, size in (("train", "train", 48), ("val", "validation", 16), ("test2016", "test", 16)):
            pairs = [caption(rng) for _ in range(size)]
            if kind == "t5":
                (data / f"{stem}.en").write_text("".join(f"{en}\n" for en, _ in pairs), encoding="utf-8")
                (data / f"{stem}.de").write_text("".join(f"{de}\n" for _, de in pairs), encoding="utf-8")
            else:
                rows = [
                    {"text": f"{'good' if i % 2 else 'bad'} film {en}", "label": i % 2}
                    for i, (en, _) in enumerate(pairs)
                ]
                (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PREFIX = "translate English to German: "


def pairs_of(workshop, stem):
    return list(
        zip(
            *(
                (workshop / "data" / "t5" / f"{stem}.{language}").read_text(encoding="utf-8").splitlines()
                for language in ("en", "de")
            )
        )
    )


def t5_blocks(layers):
    """The names of the blocks of a T5 with so many layers on each side."""
    return [
        *(f"encoder.block.{i}.layer.{name}" for i in range(layers) for name in ("0.SelfAttention", "1.DenseReluDense")),
        *(
            f"decoder.block.{i}.layer.{name}"
            for i in range(layers)
            for name in ("0.SelfAttention", "1.EncDecAttention", "2.DenseReluDense")
        ),
    ]


T5_BLOCKS = t5_blocks(2)
DISTILBERT_BLOCKS = [f"distilbert.transformer.layer.{i}.{name}" for i in range(2) for name in ("attention", "ffn")]


def is_attention(name):
    return name.lower().endswith("attention")


def lively(kind):
    """A tiny model in which every head and neuron counts: DistilBERT's initial weights are small, its biases zero.

    "t5-deep" has a third layer: a second one that shares the position bias, and hands it on.
    """
    if kind == "t5-deep":
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(t5_config(num_layers=3, num_decoder_layers=3)).eval()
    model = build_model(kind)
    for name, parameter in model.named_parameters():
        if kind == "distilbert" and "layer_norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


ENDS = [1, *range(20, 24), *range(45, 53)]  # so many end tokens make random models end some rows early, others never


def recipe(**changes):
    """A short one with much of everything."""
    return TrainingSettings(
        **dict(
            epochs=3,
            batch_size=4,
            lr=1e-2,
            warmup=0.2,
            weight_decay=0.1,
            clip=0.5,
            early_stop=0,
            precision="fp32",
            seed=0,
            dropout=True,
        )
        | changes
    )


def examples(kind, count, seed=0):
    """Random token ids of random lengths, so that batches hold padding."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 60, size=rng.integers(4, 12)).tolist() for _ in range(count)]
    task = TASKS[usual_task(kind)]
    targets = rows[::-1] if task.name == "translation" else [0] * count
    return Examples(task, rows, targets, [None] * count, 0)


def padded_batch(kind):
    """Two examples of random tokens, the second shorter than the first in source and target."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 64, (2, 7), generator=generator), torch.ones(2, 7, dtype=torch.int64)
    ids[1, 4:], mask[1, 4:] = 0, 0
    labels = torch.tensor([1, 0])
    if kind not in CLASSIFIERS:
        labels = torch.randint(2, 64, (2, 6), generator=generator)
        labels[1, 3:] = -100
    return Batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, CPU)


@torch.no_grad()
def cut(model, kind, way):
    """Zero the output columns of some heads and neurons, in place: half of them, any of them, or all of some blocks."""
    draw = random.Random(kind)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    for number, block in enumerate(find_blocks(model).values()):
        size, out = block.heads or block.neurons, model.get_submodule(f"{block.root}.{block.output}")
        kept = range(size // 2) if way == "even" else draw.sample(range(size), draw.randint(1, size - 1))
        kept = [] if way == "left out" and number in (1, 2, 5, 7) else kept
        gone = torch.tensor([part not in kept for part in range(size)]).repeat_interleave(out.in_features // size)
        out.weight[:, gone] = 0
