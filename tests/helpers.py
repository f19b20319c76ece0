"""What several test files share: tiny models and data, running scripts, oracles."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test that reached out would fail, not hang
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.blocks.defaults import usual_task  # noqa: E402
from common.blocks.find import find_blocks  # noqa: E402
from common.blocks.tensors import Variant, block_tensors  # noqa: E402
from common.composing.scheme import Pair  # noqa: E402
from common.data.examples import Batch, Examples  # noqa: E402
from common.data.tasks import TASKS  # noqa: E402
from common.evaluation import answers as evaluation  # noqa: E402
from common.models.load import load_model  # noqa: E402
from common.pruning import closed_form  # noqa: E402
from common.pruning.prune_block import prune_block  # noqa: E402
from common.runtime.devices import Runtime  # noqa: E402
from common.runtime.progress import Talk  # noqa: E402
from common.runtime.records import content_digest, file_digest, sealed, write_record  # noqa: E402
from common.runtime.settings import TrainingSettings  # noqa: E402

CPU = torch.device("cpu")
QUIET = Talk(quiet=True)
RUNTIME = Runtime(CPU, 8, QUIET)
OPTIONS = {"runtime": RUNTIME}
KINDS = {"t5": "t5", "t5-gated": "t5", "distilbert": "distilbert"}  # a tiny model's family
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


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
# deberta-v3-base (and -v2-xlarge), mbart-large-50, pegasus-large, mt5-small, umt5-small, flan-t5-small.
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
    "bart": lambda: seq2seq("Bart"),
    "mbart": lambda: seq2seq(
        "MBart", {"forced_bos_token_id": 7}, scale_embedding=True, decoder_start_token_id=1
    ),  # generation begins with the language's token, 7
    "pegasus": lambda: seq2seq("Pegasus", scale_embedding=True, activation_function="relu"),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**bart_settings())),
    "mt5": lambda: t5_like("MT5"),
    "umt5": lambda: t5_like("UMT5"),
    "t5-flan": lambda: t5_like("T5"),
}
CLASSIFIERS = ("distilbert", "bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "deberta-v2-unshared", "toy")


def build_model(kind):
    """A tiny model with seeded random weights: a key of MODELS."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def only_removed_is_zero(weight, keep):
    """Whether all removed entries are zero, and no more of the kept ones than may come out as zero by chance: one."""
    weight, keep = torch.as_tensor(weight), torch.as_tensor(keep)
    return not bool(weight[~keep].any()) and int((weight[keep] == 0).sum()) <= 1


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


def load_script(name):
    """A top-level script as a module, whatever its name looks like."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(command, *more):
    """Run a command, as it would stand in a shell, in this process: (exit code, JSON result or None, stderr).

    `more`: further arguments, one by one.
    """
    script, *arguments = [*shlex.split(str(command)), *map(str, more)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = load_script(script).main(arguments)
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, json.loads(out.getvalue()) if out.getvalue().strip() else None, err.getvalue()


def run(command, *more):
    """run("prune.py -m model -o pruned"): the result of a command that has to succeed."""
    code, result, err = outcome(command, *more)
    assert code == 0, err
    return result


def fails(command, *more):
    """The one line on stderr of a command that a mistake of the user ends."""
    code, result, err = outcome(command, *more)
    assert (code, result) == (2, None) and is_one_line(err), err
    return err


def call_apart(script, *arguments, cwd, input=None, **environment):
    """Run a script in a process of its own, from a foreign folder; `input` is what it may read from stdin."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        input=input,
        text=True,
        capture_output=True,
        env=os.environ | environment,
        timeout=120,
    )


def good_flags(script, workshop, chain, out):
    """Flags with which a script does its work on the tiny models, writing to the folder `out`: {flag: value}."""
    model, data, tokenizer = (workshop / part / "t5" for part in ("model", "data", "tokenizer"))
    conf, training = chain / "conf.json", {"--stats": out / "stats.csv", "--epochs": 1, "--batch-size": 8}
    composing = {"-m": model, "-t": tokenizer, "-p": chain / "tuned", "-c": conf, "-n": 1}
    return {
        "download_model.py": {"MODEL_TYPE": "t5", "--checkpoint": chain / "composed-0", "-o": out},  # a local one
        "config_generator.py": {
            "-m": model,
            "-o": out / "conf.json",
            "--attention": [0.25, 0.5],
            "--linear": [0.3, 0.5],
            "-n": 2,
        },
        "prune_scheme_generator.py": {"-i": conf, "-o": out / "conf_prune.json"},
        "prune.py": {"-m": model, "-c": chain / "conf_prune.json", "-o": out / "library"},
        "block-level_finetuning.py": {
            "-m": model,
            "-p": chain / "pruned",
            "-o": out / "library",
            "-t": tokenizer,
            "--data": data,
            "--method": "train",
            **training,
        },
        "compose_model.py": {**composing, "-o": out / "composed"},
        "model-level_finetuning.py": {**composing, "-o": out / "model.pth", "--data": data, **training},
        "evaluate-t5.py": {"-m": model, "-t": tokenizer, "--data": data, "--limit": 4},
        "evaluate-distilbert.py": {
            "-m": workshop / "model" / "distilbert",
            "-t": workshop / "tokenizer" / "distilbert",
            "--data": workshop / "data" / "distilbert",
            "--limit": 4,
        },
        "plot_loss.py": {"CSV": [chain / "pruned-0.csv", chain / "tuned-0.csv"], "-o": out / "loss.png"},
    }[script]


def as_arguments(flags):
    """{flag: value or list} as an argument list; positional arguments have a name without a dash."""
    arguments = []
    for flag, value in flags.items():
        arguments += ([flag] if flag.startswith("-") else []) + (value if isinstance(value, list) else [value])
    return arguments


def command_of(script, flags):
    """A command out of {flag: value or list}; positional arguments have a name without a dash."""
    return shlex.join(map(str, [script, *as_arguments(flags)]))


def is_one_line(text):
    return text.endswith("\n") and text.count("\n") == 1


PREFIX = "translate English to German: "


def read_csv(path):
    """The rows of a CSV."""
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def touched(folder):
    return {path: (path.stat().st_mtime_ns, digest) for path, digest in files_in(folder).items()}


def pairs_of(workshop, stem):
    return list(
        zip(
            *(
                (workshop / "data" / "t5" / f"{stem}.{language}").read_text(encoding="utf-8").splitlines()
                for language in ("en", "de")
            )
        )
    )


@torch.no_grad()
def loss_per_token(model, tokenizer, pairs):
    """Cross-entropy summed over the target tokens of one pair at a time, over their number: nothing is ever padded."""
    total = tokens = 0
    for english, german in pairs:
        source = torch.tensor([tokenizer(PREFIX + english)["input_ids"]])
        target = torch.tensor([tokenizer(text_target=german)["input_ids"]])
        logits = model(input_ids=source, decoder_input_ids=torch.cat([torch.tensor([[0]]), target[:, :-1]], 1)).logits
        total += torch.nn.functional.cross_entropy(logits[0].double(), target[0], reduction="sum").item()
        tokens += target.numel()
    return total / tokens


FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense"


def files_in(*folders):
    """{path: digest} of every file under some folders."""
    return {path: file_digest(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def edited_json(source, target, edit):
    """A copy of a JSON file, changed by `edit`, which gets its content. A record's own digest fits again."""
    content = json.loads(source.read_text())
    edit(content)
    target.write_text(json.dumps(sealed(content) if source.name == "record.json" else content))
    return target


def save_forged(content, path):
    """Write what a `.pth` holds, with a digest that fits."""
    content = {name: value for name, value in content.items() if name != "digest"}
    torch.save({**content, "digest": content_digest(content)}, path)


def make_digests_fit(folder):
    """Let a model's record fit its files as they are now, and itself."""
    write_record(folder, without_digests(read_json(folder / "record.json")))


def without_digests(record):
    """A record as it was given to be written."""
    return {name: value for name, value in record.items() if name not in ("digest", "files")}


def rate(value, module=f"{FEED_FORWARD}.wi"):
    def edit(content):
        content["configs"][1][module] = value

    return edit


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


LIMIT = 20  # new tokens at most


class Ids:
    """A tokenizer whose text is all the token ids."""

    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row) for row in rows]


def translated(model, examples, *, batch_size=8, beams=1, tokenizer=Ids):
    runtime = Runtime(CPU, batch_size, QUIET)
    return evaluation.translate(model, tokenizer, examples, runtime, beams=beams, max_new_tokens=LIMIT)[0]


def token_rows(model, examples, **settings):
    return [[int(token) for token in text.split()] for text in translated(model, examples, **settings)]


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def torch_mask(method, weight, **options):
    """The bool mask that a function of torch.nn.utils.prune makes for a weight."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.clone())
    return method(module, "weight", **options).weight_mask.bool()


def pruned_variants(model, heads, rate):
    """{pair: variant} of every block, so many heads and a share of the weights removed."""
    variants = {}
    for name, block in find_blocks(model).items():
        tensors = {key: value.detach() for key, value in block_tensors(model, block).items()}
        linears = (block.output,) if block.kind == "attention" else block.linears
        removed = {
            "heads": heads if block.heads else 0,
            "weights": {linear: round(rate * tensors[f"{linear}.weight"].numel()) for linear in linears},
        }
        (_, pruned, keeps), _ = prune_block(block, tensors, removed)
        variants[Pair(name, "variant")] = Variant(block, pruned, keeps)
    return variants


def reconstruct(teacher, variants, examples, runtime, *, ridge):
    """The closed form with one ridge: {pair: all tensors of the block}."""
    solved = closed_form.reconstruct(teacher, variants, examples, runtime, ridges=[ridge])
    return {pair: tensors for pair, (tensors,) in solved.items()}


def least_squares(inputs, outputs, start, keep, ridge):
    """Oracle: numpy.linalg.lstsq on the kept columns of each row, the ridge as further equations."""
    damping = ridge * np.mean(np.sum(inputs**2, axis=0)[keep.any(axis=0)])
    solution = np.zeros_like(start)
    for row, kept in enumerate(keep):
        equations = np.vstack([inputs[:, kept], np.sqrt(damping) * np.eye(kept.sum())])
        values = np.concatenate([outputs[:, row], np.sqrt(damping) * start[row, kept]])
        solution[row, kept] = np.linalg.lstsq(equations, values, rcond=None)[0]
    return solution, damping


def objective(inputs, outputs, weights, start, damping, keep):
    return np.sum((inputs @ weights.T - outputs) ** 2) + damping * np.sum(((weights - start) * keep) ** 2)


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
def logits(path, kind):
    """What the model at `path` makes of the padded batch."""
    return load_model(path).model(**padded_batch(kind)).logits


def section(document, title):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
