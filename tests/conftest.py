"""Tiny models, tokenizers and data, built from configs: offline, in well under a second each."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test that reached out would fail, not hang
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are far too small for more

NOUNS = {"dog": "Hund", "cat": "Katze", "child": "Kind", "man": "Mann", "bird": "Vogel", "tree": "Baum"}
VERBS = {"sees": "sieht", "likes": "mag", "finds": "findet", "hears": "hört"}


def caption(rng):
    subject, verb, other = rng.choice(list(NOUNS)), rng.choice(list(VERBS)), rng.choice(list(NOUNS))
    return f"the {subject} {verb} a {other}", f"das {NOUNS[subject]} {VERBS[verb]} ein {NOUNS[other]}"


def t5_config(**changes):
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
    return transformers.T5Config(**settings | changes)  # 4 heads of 6: the inner width is not d_model, nor divides it


def distilbert_config(**changes):
    settings = dict(vocab_size=64, dim=32, n_heads=4, n_layers=2, hidden_dim=48, max_position_embeddings=64)
    return transformers.DistilBertConfig(**settings | changes)


def build_model(kind):
    """A tiny model with seeded random weights: "t5", "t5-gated" or "distilbert"."""
    torch.manual_seed(0)
    if kind == "distilbert":
        return transformers.DistilBertForSequenceClassification(distilbert_config()).eval()
    gated = {"feed_forward_proj": "gated-gelu"} if kind == "t5-gated" else {}
    return transformers.T5ForConditionalGeneration(t5_config(**gated)).eval()


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
    if kind == "distilbert":
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in words)]
        return transformers.DistilBertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(vocab))})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -3.0) for word in words)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with, for "t5" and "distilbert", model/KIND, tokenizer/KIND and data/KIND."""
    folder = tmp_path_factory.mktemp("workshop")
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


@pytest.fixture
def call(capsys):
    """Run a script in this process: call(script, *arguments) -> (exit code, JSON result or None, stderr)."""

    def run(script, *arguments):
        capsys.readouterr()
        try:
            code = load_script(script).main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, json.loads(out) if out.strip() else None, err

    return run


@pytest.fixture
def succeeds(call):
    """succeeds(script, *arguments): its result, once it is sure that it has one."""

    def run(script, *arguments):
        code, result, err = call(script, *arguments)
        assert code == 0, err
        return result

    return run


def call_apart(script, *arguments, cwd, **environment):
    """Run a script in a process of its own, from a foreign folder."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | environment,
        timeout=120,
    )


@pytest.fixture(scope="session")
def chain(workshop, tmp_path_factory):
    """Every stage run once on the tiny T5, for three configurations: the folder that holds the outputs."""
    folder = tmp_path_factory.mktemp("chain")
    model, stats = workshop / "model" / "t5", folder / "blocks.csv"

    def run(script, *arguments):
        code = load_script(script).main([*map(str, arguments), "--quiet"])
        assert code == 0, f"{script} ended with {code}"

    run(
        "config_generator.py",
        "-m",
        model,
        "-o",
        folder / "conf.json",
        "--attention",
        0.25,
        0.5,
        0.25,
        "--linear",
        0.3,
        0.3,
        0.5,
        "-n",
        3,
    )
    run("prune_scheme_generator.py", "-i", folder / "conf.json", "-o", folder / "conf_prune.json")
    run("prune.py", "-m", model, "-c", folder / "conf_prune.json", "-o", folder / "pruned")
    run(
        "block-level_finetuning.py",
        "-m",
        model,
        "-p",
        folder / "pruned",
        "-o",
        folder / "tuned",
        "--stats",
        stats,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--method",
        "train",
    )
    for n in range(3):
        run(
            "compose_model.py",
            "-m",
            model,
            "-p",
            folder / "tuned",
            "-c",
            folder / "conf.json",
            "-n",
            n,
            "-o",
            folder / f"composed-{n}",
        )
    for library in ("pruned", "tuned"):
        run(
            "model-level_finetuning.py",
            "-m",
            model,
            "-p",
            folder / library,
            "-c",
            folder / "conf.json",
            "-n",
            0,
            "-o",
            folder / f"{library}-0.pth",
            "--stats",
            folder / f"{library}-0.csv",
            "--epochs",
            2,
            "--batch-size",
            8,
        )
    return folder
