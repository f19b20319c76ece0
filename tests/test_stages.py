"""What the stages do, on tiny models: each figure and file against an independent computation."""

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import safetensors.torch
import torch
import transformers
from helpers import FEED_FORWARD, ROOT, edited_json, fails, rate, read_csv, read_json, run, touched
from oracles import loss_per_token, only_removed_is_zero, torch_mask
from tiny import PREFIX, pairs_of
from torch.nn.utils import prune

TRAINING = "--epochs 2 --batch-size 8"  # what the `chain` fixture trains with
BLOCK_LEVEL = f"block-level_finetuning.py --stats blocks.csv --method train {TRAINING}"
SECONDS = {"train_seconds", "val_seconds", "seconds", "took", "examples_per_second"}


def snapshot(folder):
    """{relative path: bytes} of a folder's files; the seconds in CSVs and results left out, for they differ."""
    content = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.suffix == ".csv":
            value = [{name: cell for name, cell in row.items() if name not in SECONDS} for row in read_csv(path)]
        content[str(path.relative_to(folder))] = value
    return content


def without_seconds(result):
    return {name: value for name, value in result.items() if name not in SECONDS}


def pth_model(path):
    """The model in a .pth, by torch and transformers alone."""
    content = torch.load(path, weights_only=True)
    config = json.loads(content["config"])
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    model.load_state_dict(content["state_dict"])
    return model, content


# --- reuse -----------------------------------------------------------------------------------------------------


def test_shared_variants_are_one_file_and_bit_identical(chain):
    """By hand: attention 0.25 0.5 0.25 and linear 0.3 0.3 0.5 let the first two share their 4 feed-forward blocks."""
    scheme = read_json(chain / "conf_prune.json")
    first, second = (safetensors.torch.load_file(chain / f"composed-{n}" / "model.safetensors") for n in (0, 1))
    shared = dict(scheme["configs"][0].items() & scheme["configs"][1].items())
    assert len(shared) == 4 and all("DenseReluDense" in block for block in shared)
    assert sum(len(variants) for variants in scheme["blocks"].values()) == 3 * 10 - 4
    for library in ("pruned", "tuned"):
        assert Counter(path.suffix for path in (chain / library).iterdir()) == {".npy": 26, ".json": 1, "": 1}  # .lock
    for block, variant in shared.items():
        arrays = np.load(chain / "tuned" / f"{block}.{variant}.npy", allow_pickle=False)
        for linear in ("wi", "wo"):
            weights = [model[f"{block}.{linear}.weight"].numpy() for model in (first, second)]
            assert weights[0].tobytes() == weights[1].tobytes() == arrays[f"{linear}.weight"].tobytes()
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "command, library", [("prune.py -c {0}/conf_prune.json", "pruned"), (BLOCK_LEVEL + " -p {0}/pruned", "tuned")]
)
def test_rerun_skips_everything(t5, chain, here, command, library):
    """Oracle: the files themselves, their times of change included."""
    shutil.copytree(chain / library, library)
    before = touched(here)
    result = run(f"{command.format(chain)} -m {t5} -o {library}")
    assert result["skipped"] == 26 and result.get("pruned", result.get("fine_tuned")) == 0
    assert touched(here) == before


def test_one_changed_rate_makes_one_new_variant(t5, chain, here):
    for name in ("pruned", "tuned"):
        shutil.copytree(chain / name, name)
    shutil.copy(chain / "blocks-blocks.csv", here)
    edited_json(chain / "conf.json", here / "conf.json", rate(0.6))
    run("prune_scheme_generator.py")
    before = {name: touched(here / name) for name in ("pruned", "tuned")}
    pruned, tuned = run(f"prune.py -m {t5} -o pruned"), run(f"{BLOCK_LEVEL} -m {t5} -p pruned -o tuned")
    assert (pruned["pruned"], pruned["skipped"]) == (tuned["fine_tuned"], tuned["skipped"]) == (1, 26)
    new = f"{FEED_FORWARD}.wi-922_wo-461"  # 0.6 and 0.3 of 48 * 32, in the second configuration
    for name in ("pruned", "tuned"):
        after = touched(here / name)
        assert {path.name for path in after if after[path] != before[name].get(path)} == {f"{new}.npy", "record.json"}
    rows, old = (read_csv(where / "blocks-blocks.csv") for where in (here, chain))
    assert rows[: len(old)] == old and {row["variant"] for row in rows[len(old) :]} == {"wi-922_wo-461"}


def test_variant_tuned_alone_equals_variant_tuned_among_others(t5, chain, here):
    """What reuse rests on: a variant's training sees no other variant. Oracle: the file made in the company of 25."""
    file = f"{FEED_FORWARD}.wi-461_wo-461.npy"
    shutil.copytree(chain / "tuned", "tuned")
    (here / "tuned" / file).unlink()
    result = run(f"{BLOCK_LEVEL} -m {t5} -p {chain}/pruned -o tuned")
    assert (result["fine_tuned"], result["skipped"]) == (1, 25)
    assert (here / "tuned" / file).read_bytes() == (chain / "tuned" / file).read_bytes()


# --- what is in the models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1])
def test_composed_model_has_exactly_the_schemes_zeros(chain, teacher, n):
    """Loaded by transformers alone; the oracles are the scheme's counts and torch.nn.utils.prune's masks for `o`."""
    scheme = read_json(chain / "conf_prune.json")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(chain / f"composed-{n}")
    expected = {}
    for block, variant in scheme["configs"][n].items():
        removed = scheme["blocks"][block][variant]
        for linear, count in removed["weights"].items():
            expected[f"{block}.{linear}.weight"] = count
        if removed["heads"]:  # 4 heads of 6 rows, d_model 32
            expected |= {f"{block}.{linear}.weight": removed["heads"] * 6 * 32 for linear in "qkv"}
            keep = torch_mask(
                prune.l1_unstructured, teacher.get_submodule(block).o.weight.detach(), amount=removed["weights"]["o"]
            )
            columns = (model.get_submodule(block).q.weight == 0).all(1)  # a removed head's rows in q
            assert int(columns.sum()) == removed["heads"] * 6
            expected[f"{block}.o.weight"] = int((~keep | columns).sum())
    zeros = {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters()}
    assert {name: count for name, count in zeros.items() if count} == expected


@pytest.mark.parametrize("library", ["pruned", "tuned"])
def test_removed_weights_are_zero_after_model_level_fine_tuning(chain, teacher, library):
    """Oracle: the masks in the library's .npy files, read by plain numpy. Everything else has been trained."""
    model, content = pth_model(chain / f"{library}-0.pth")
    weights = dict(model.named_parameters())
    for block, variant in read_json(chain / "conf_prune.json")["configs"][0].items():
        arrays = np.load(chain / library / f"{block}.{variant}.npy", allow_pickle=False)
        for field in (name for name in arrays.dtype.names if name.endswith(".keep")):
            weight, keep = weights[f"{block}.{field.removesuffix('.keep')}.weight"].detach().numpy(), arrays[field]
            assert only_removed_is_zero(weight, keep)
            assert np.array_equal(content["masks"][f"{block}.{field.removesuffix('.keep')}.weight"].numpy(), keep)
    assert all(not torch.equal(weights[name], parameter) for name, parameter in teacher.named_parameters())


# --- figures ---------------------------------------------------------------------------------------------------


def test_bleu_is_sacrebleus(workshop, t5, chain, here, tokenizer):
    """Oracle: sacrebleu.corpus_bleu on translations that are generated one by one, without any padding.

    The model is trained until it says something: on nonsense every BLEU is much the same.
    """
    training = "--epochs 12 --batch-size 8 --lr 0.01"
    run(f"model-level_finetuning.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 0 -o model.pth {training}")
    model, _ = pth_model("model.pth")
    pairs = pairs_of(workshop, "test2016")
    scores = []
    for beams in (1, 3):
        result = run(f"evaluate-t5.py -m model.pth --beams {beams} --batch-size 5")
        hypotheses = []
        for english, _ in pairs:
            tokens = model.generate(
                torch.tensor([tokenizer(PREFIX + english)["input_ids"]]),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=60,
            )
            hypotheses.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
        expected = sacrebleu.corpus_bleu(hypotheses, [[german for _, german in pairs]])
        assert result["bleu"] == pytest.approx(expected.score, abs=1e-9)
        assert result["examples"] == 16 and "tok:13a" in result["signature"]
        scores.append(result["bleu"])
    assert 5 < scores[0] < 100


def test_accuracy_counts_right_predictions(workshop, tmp_path):
    """Oracle: a plain loop over single reviews. The labels are drawn, so that some are right and some are wrong."""
    folder, rng = tmp_path / "data", random.Random(0)
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in (workshop / "data" / "distilbert" / "train.jsonl").open()]
    rows = [{"text": " ".join([text] * rng.randint(1, 4)), "label": rng.randint(0, 1)} for text in texts]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(workshop / "model" / "distilbert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(workshop / "tokenizer" / "distilbert")
    with torch.no_grad():
        right = [
            model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() == row["label"] for row in rows
        ]
    result = run(f"evaluate-distilbert.py -m {workshop}/model/distilbert --data {folder} --batch-size 7")
    assert result["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)
    assert 0 < result["accuracy"] < 1


@pytest.mark.parametrize("library", ["pruned", "tuned"])
def test_model_level_validation_loss(chain, workshop, tokenizer, library):
    """Epoch 0 is the original with the library's arrays in it, put there by plain numpy; the best is the .pth's."""
    stats, pairs = read_csv(chain / f"{library}-0.csv"), pairs_of(workshop, "val")
    composed = transformers.T5ForConditionalGeneration.from_pretrained(workshop / "model" / "t5").eval()
    for block, variant in read_json(chain / "conf_prune.json")["configs"][0].items():
        arrays = np.load(chain / library / f"{block}.{variant}.npy", allow_pickle=False)
        for linear in (name for name in arrays.dtype.names if name.endswith(".weight")):
            composed.get_parameter(f"{block}.{linear}").data = torch.tensor(arrays[linear])
    assert [row["epoch"] for row in stats] == ["0", "1", "2"] and stats[0]["train_loss"] == ""
    assert float(stats[0]["val_loss"]) == pytest.approx(loss_per_token(composed, tokenizer, pairs), rel=1e-5)
    tuned, content = pth_model(chain / f"{library}-0.pth")
    best = min(float(row["val_loss"]) for row in stats)
    assert best == pytest.approx(loss_per_token(tuned, tokenizer, pairs), rel=1e-5)
    assert best == json.loads(content["record"])["measured"]["val_loss"] < float(stats[0]["val_loss"])


@pytest.mark.parametrize(
    "block, variant",
    [
        (FEED_FORWARD, "wi-461_wo-461"),
        (FEED_FORWARD.replace("encoder", "decoder").replace("layer.1", "layer.2"), "wi-768_wo-768"),
    ],
)
def test_block_level_validation_error(chain, workshop, teacher, tokenizer, block, variant):
    """Squared error over squared output, summed over single examples; the block's formula is written out in numpy."""
    passed = []
    handle = teacher.get_submodule(block).register_forward_hook(
        lambda module, args, output: passed.append((args[0][0].numpy(), output[0].numpy()))
    )
    with torch.no_grad():
        for english, german in pairs_of(workshop, "val"):
            teacher(
                input_ids=torch.tensor([tokenizer(PREFIX + english)["input_ids"]]),
                labels=torch.tensor([tokenizer(text_target=german)["input_ids"]]),
            )
    handle.remove()
    rows = [row for row in read_csv(chain / "blocks-blocks.csv") if (row["block"], row["variant"]) == (block, variant)]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    entry = read_json(chain / "tuned" / "record.json")["variants"][f"{block}.{variant}"]
    for library, noted in (("pruned", rows[0]["val_loss"]), ("tuned", min(row["val_loss"] for row in rows))):
        arrays = np.load(chain / library / f"{block}.{variant}.npy", allow_pickle=False)
        error = sum(
            np.square(np.maximum(x @ arrays["wi.weight"].T, 0) @ arrays["wo.weight"].T - y).sum() for x, y in passed
        )
        expected = error / sum(np.square(y).sum() for _, y in passed)
        assert float(noted) == pytest.approx(expected, rel=1e-4)
        assert entry[{"pruned": "nmse_before", "tuned": "nmse_after"}[library]] == float(noted)
    assert entry["nmse_after"] < entry["nmse_before"]


# --- whole chains ----------------------------------------------------------------------------------------------


def run_chain(kind):
    """All stages for two configurations, in the working folder, where `workshop` is: {script: result}."""
    commands = (
        "config_generator.py --attention 0.25 0.5 --linear 0.3 0.3 -n 2",
        "prune_scheme_generator.py",
        "prune.py -o pruned",
        f"{BLOCK_LEVEL} -p pruned -o tuned",
        "compose_model.py -p tuned -n 1 -o composed",
        f"model-level_finetuning.py -p pruned -n 1 -o baseline --stats baseline.csv {TRAINING}",
        f"model-level_finetuning.py -p tuned -n 1 -o model.pth --stats model.csv --lr 1e-3 {TRAINING}",
    )
    results = {}
    for command in commands:
        model = "" if command.startswith("prune_scheme") else f"-m workshop/model/{kind}"
        results[command.split()[0]] = run(f"{command} {model}")
    results["evaluate"] = run(f"evaluate-{kind}.py -m model.pth")
    run("plot_loss.py model.csv baseline.csv")
    return results


@pytest.fixture(scope="module")
def chain_of(workshop, tmp_path_factory):
    """chain_of(kind): (folder, results) of a chain that is run from scratch in this process, in a folder of its own."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("here")
        shutil.copytree(workshop, folder / "workshop")
        with contextlib.chdir(folder):
            return folder, run_chain(kind)

    return make


def test_two_runs_of_every_stage_give_identical_files(chain_of, workshop, tmp_path):
    """Once more in a process with another hash seed. Oracle: the bytes of all files, but for seconds, and the results.

    Both have one thread: on some processors, sums of two threads are rounded otherwise.
    """
    folder, results = chain_of("t5")
    again = tmp_path / "over" / "there"
    shutil.copytree(workshop, again / "workshop")
    apart = subprocess.run(
        [sys.executable, "-c", "import json, test_stages; print(json.dumps(test_stages.run_chain('t5')))"],
        cwd=again,
        text=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert (apart.returncode, apart.stderr) == (0, "")
    first, second = snapshot(folder), snapshot(again)
    assert first.keys() == second.keys()
    files = ("composed/model.safetensors", "model.pth", "loss.png", "tuned/record.json", "blocks.csv")
    assert first.keys() >= set(files)
    assert [name for name in first if first[name] != second[name]] == []
    results, others = (
        {script: without_seconds(result) for script, result in made.items()}
        for made in (results, json.loads(apart.stdout))
    )
    assert results == others


def test_distilbert_chain(chain_of):
    """By hand: 2 layers of one attention and one feed-forward block; the feed-forward variants are shared."""
    folder, results = chain_of("distilbert")
    scheme, tuned = results["prune_scheme_generator.py"], results["block-level_finetuning.py"]
    assert (scheme["blocks_without_reuse"], scheme["blocks_with_reuse"], tuned["fine_tuned"]) == (8, 6, 6)
    assert tuned["nmse_after"] < tuned["nmse_before"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "composed")
    for layer in model.distilbert.transformer.layer:
        attention, feed_forward = layer.attention, layer.ffn
        gone = (attention.q_lin.weight == 0).all(1)
        assert gone.sum() == 16 and torch.equal(gone.view(4, 8).all(1), gone.view(4, 8).any(1))  # 2 heads of 8 rows
        for linear in (attention.q_lin, attention.k_lin, attention.v_lin):  # biases go with the head
            assert (linear.weight[gone] == 0).all() and (linear.bias[gone] == 0).all()
        assert (attention.out_lin.weight[:, gone] == 0).all()
        assert [int((linear.weight == 0).sum()) for linear in (feed_forward.lin1, feed_forward.lin2)] == [461, 461]
    evaluated = results["evaluate"]
    assert 0.5 <= evaluated["accuracy"] <= 1
    assert evaluated["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert evaluated["sparsity"] == pytest.approx(1 - evaluated["nonzero_parameters"] / evaluated["parameters"])


@pytest.mark.parametrize("model", ["composed-0", "tuned-0.pth", "model/t5"])
def test_record_knows_tokenizer_and_data(workshop, chain, here, model):
    """Paths in a record are relative to the model, not to whoever reads it. Oracle: the same with both flags given."""
    path = os.path.relpath((workshop if model == "model/t5" else chain) / model)
    given = run(f"evaluate-t5.py -m {path} -t {workshop}/tokenizer/t5 --data {workshop}/data/t5")
    found = run(f"evaluate-t5.py -m {path}")
    assert Path(found["data"]).samefile(given["data"]) and found["examples"] == 16
    assert without_seconds(found) == without_seconds(given) | {"data": found["data"]}


# --- paths as people write them --------------------------------------------------------------------------------------


def test_a_folder_may_end_with_a_slash_and_be_the_working_one(t5, chain, here, monkeypatch):
    """As a shell completes it. The stats lie beside the model, and {name} is the folder's name."""
    result = run(f"model-level_finetuning.py -m {t5}/ -p {chain}/pruned/ -c {chain}/conf.json -n 0 -o out/ {TRAINING}")
    assert (result["output"], result["stats"]) == ("out", "out.csv")
    assert sorted(path.name for path in here.iterdir()) == ["out", "out.csv"]
    monkeypatch.chdir("out")
    assert run("evaluate-t5.py -m . --limit 4 --save-predictions ../{name}.jsonl")["predictions"] == "../out.jsonl"


def test_the_largest_seed_is_one_that_random_numbers_take(t5, chain, here):
    common = f"-m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0 {TRAINING}"
    run(f"model-level_finetuning.py {common} --seed {2**32 - 1}")
    assert "--seed" in fails(f"model-level_finetuning.py {common} --seed {2**32}")
