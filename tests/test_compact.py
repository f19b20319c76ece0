"""Compact models against the masked models that they are made of: the same logits, translations and losses.

Sizes are worked by hand. In the tiny T5 a head has 4 · 6 · 32 = 768 weights and a neuron 2 · 32, gated 3 · 32; in the
tiny DistilBERT, with the biases, a head has 4 · 8 · 32 + 3 · 8 = 1048 and a neuron 2 · 32 + 1.
"""

import csv
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ROOT, fails, run
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import same_state
from tiny import DISTILBERT_BLOCKS, ENDS, T5_BLOCKS, is_attention, lively, t5_blocks, t5_config

from common.blocks.find import find_blocks
from common.models.compact import make_compact
from common.models.load import load_model
from common.models.saving import save_model

# Parameters of a head and of a neuron.
PRICES = {"t5": (768, 64), "t5-gated": (768, 96), "t5-deep": (768, 64), "distilbert": (1048, 65)}
HEADS, NEURONS = 4, 48


BLOCKS = {"t5": T5_BLOCKS, "t5-gated": T5_BLOCKS, "t5-deep": t5_blocks(3), "distilbert": DISTILBERT_BLOCKS}
ROW_CLEARED = {"first": slice(0, 1), "last": slice(-1, None), "out": slice(0, 0), "all": slice(None)}


def talkative(kind):
    """A tiny T5 whose translations differ and end at different times.

    With weights twice as large softmax would be so sharp that float32 no longer gives logits to 1e-4.
    """
    torch.manual_seed(0)
    gated = {"feed_forward_proj": "gated-gelu"} if kind == "t5-gated" else {}
    model = transformers.T5ForConditionalGeneration(t5_config(initializer_factor=1.5, **gated)).eval()
    model.lm_head.weight = torch.nn.Parameter(1.5 * torch.randn_like(model.lm_head.weight))  # tied, it would echo
    model.generation_config.eos_token_id = ENDS
    return model


@torch.no_grad()
def silence(model, cut):
    """Zero what `cut` does not keep, in place, as `cut` says: {block: (numbers kept, key of ROW_CLEARED)}.

    With "last" and "out" the rows of the last inner Linear go, or the columns of the output Linear. A feed-forward
    neuron keeps its biases, and has a constant value then; a head does not.

    Returns:
        {parameter: bool mask} of the weights that were touched, True = kept.
    """
    masks, blocks = {}, find_blocks(model)
    for name, (kept, where) in cut.items():
        *inner, out = (model.get_submodule(f"{name}.{linear}") for linear in blocks[name].linears)
        size = blocks[name].heads or blocks[name].neurons
        gone = torch.tensor([number not in kept for number in range(size)])
        gone = gone.repeat_interleave(out.in_features // size)
        for linear in inner[ROW_CLEARED[where]]:
            linear.weight[gone] = 0
            if is_attention(name) and linear.bias is not None:
                linear.bias[gone] = 0
        if where in ("out", "all"):
            out.weight[:, gone] = 0
        for linear in blocks[name].linears:
            masks[f"{name}.{linear}.weight"] = model.get_submodule(f"{name}.{linear}").weight != 0
    return masks


def cuts(kind):
    """A strategy of any heads of every attention module and any neurons of every feed-forward module, none included."""
    heads = st.tuples(st.sets(st.integers(0, HEADS - 1)), st.sampled_from(["last", "out", "all"]))
    bits = st.integers(0, 2**NEURONS - 1)
    neurons = st.tuples(
        bits.map(lambda number: {i for i in range(NEURONS) if number >> i & 1}), st.sampled_from(list(ROW_CLEARED))
    )
    return st.fixed_dictionaries({name: heads if is_attention(name) else neurons for name in BLOCKS[kind]})


def drawn_cut(kind, seed):
    """One such, always the same."""
    draw = random.Random(seed)
    cut = {}
    for name in BLOCKS[kind]:
        if is_attention(name):
            cut[name] = set(draw.sample(range(HEADS), draw.randint(1, 3))), draw.choice(["last", "out", "all"])
        else:
            cut[name] = set(draw.sample(range(NEURONS), draw.randint(8, 40))), draw.choice(list(ROW_CLEARED))
    return cut


def every(kind, heads, neurons, where="all"):
    """The cut that keeps the same heads and neurons everywhere."""
    return {name: (heads if is_attention(name) else neurons, where) for name in BLOCKS[kind]}


def masked_and_compact(kind, cut, make=lively):
    masked = make(kind)
    silence(masked, cut)
    return masked, make_compact(masked, {})[0]


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def padded_batch(kind):
    """Five examples of 9, 7, 4, 2 tokens and one."""
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor([[position < length for position in range(9)] for length in (9, 7, 4, 2, 1)])
    ids = torch.randint(2, 64, (5, 9), generator=generator).masked_fill(~real, 0)
    batch = {"input_ids": ids, "attention_mask": real.long()}
    if kind != "distilbert":
        batch["decoder_input_ids"] = torch.randint(2, 64, (5, 6), generator=generator)
        batch["decoder_attention_mask"] = real.long()[[1, 0, 3, 2, 2], :6]
    return batch


@torch.no_grad()
def logits(model, kind):
    return model(**padded_batch(kind)).logits


def same_logits(masked, compact, kind):
    """To 1e-5 in float32; and in float64 as near as it can tell, or as float32 adds what goes into a bias."""
    for attention in ("eager", "sdpa"):
        masked.set_attn_implementation(attention)
        compact.set_attn_implementation(attention)
        expected = logits(masked, kind)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits(compact, kind), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(compact.double(), kind),
        logits(masked.double(), kind),
        rtol=0,
        atol=1e-6 if kind == "distilbert" else 1e-12,
    )
    masked.float(), compact.float()


# --- the same function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5-deep", "distilbert"])
@settings(max_examples=6, deadline=None, phases=[Phase.reuse, Phase.generate])  # to shrink takes minutes
@given(data=st.data())
def test_any_heads_and_neurons_can_go_and_the_logits_stay(kind, data):
    """Oracle: the masked model. What is left of it, and how much that is, is worked by hand."""
    cut, masked = data.draw(cuts(kind)), lively(kind)
    compact, masks = make_compact(masked, silence(masked, cut))
    same_logits(masked, compact, kind)

    kept_heads = {name: sorted(kept) for name, (kept, _) in cut.items() if is_attention(name)}
    kept_neurons = {name: len(kept) for name, (kept, _) in cut.items() if not is_attention(name)}
    assert (compact.config.kept_heads, compact.config.kept_neurons) == (kept_heads, kept_neurons)
    head, neuron = PRICES[kind]
    assert size_of(compact) == (
        size_of(masked)
        - head * sum(HEADS - len(kept) for kept in kept_heads.values())
        - neuron * sum(NEURONS - kept for kept in kept_neurons.values())
    )
    parameters = dict(compact.named_parameters())
    assert len(masks) == sum(4 if is_attention(name) else 3 if kind == "t5-gated" else 2 for name in BLOCKS[kind])
    for name, mask in masks.items():
        assert mask.shape == parameters[name].shape and torch.equal(parameters[name] != 0, mask), name


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_the_original_is_left_alone(kind):
    """A compact model is a copy: to train it must not move the original, which may be its teacher."""
    masked, compact = masked_and_compact(kind, every(kind, {0}, {0}))
    before = {name: parameter.detach().clone() for name, parameter in masked.named_parameters()}
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.fill_(7.0)
    assert [name for name, parameter in masked.named_parameters() if not torch.equal(parameter, before[name])] == []


# --- what may go ---------------------------------------------------------------------------------------------------


def test_a_constant_neuron_goes_into_the_output_bias():
    """By hand: lin1's row 5 is zero and its bias 0.7, so the neuron is gelu(0.7), whatever the input."""
    masked = lively("distilbert")
    feed_forward = masked.distilbert.transformer.layer[0].ffn
    with torch.no_grad():
        feed_forward.lin1.weight[5] = 0
        feed_forward.lin1.bias[5] = 0.7
    compact = make_compact(masked, {})[0]
    smaller = compact.distilbert.transformer.layer[0].ffn
    assert smaller.lin1.weight.shape == (47, 32) and smaller.lin2.weight.shape == (32, 47)
    gelu = 0.7 * 0.5 * (1 + math.erf(0.7 / math.sqrt(2)))
    torch.testing.assert_close(smaller.lin2.bias, feed_forward.lin2.bias + gelu * feed_forward.lin2.weight[:, 5])
    same_logits(masked, compact, "distilbert")


@pytest.mark.parametrize(
    "activation, where, left", [("sigmoid", "first", 48), ("gated-gelu", "last", 20), ("gated-sigmoid", "first", 48)]
)
def test_a_neuron_that_still_says_something_stays(activation, where, left):
    """By hand: the sigmoid of 0 is 0.5, which T5 has no output bias for; as a gate it lets half of its input pass."""
    torch.manual_seed(0)
    masked = transformers.T5ForConditionalGeneration(t5_config(feed_forward_proj=activation)).eval()
    silence(masked, every("t5", set(range(HEADS)), set(range(20)), where))
    compact = make_compact(masked, {})[0]
    assert {block.neurons for block in find_blocks(compact).values()} == {0, left}
    same_logits(masked, compact, "t5")


def test_a_head_without_queries_stays():
    """It looks everywhere alike, and passes on what it sees."""
    masked = lively("t5")
    with torch.no_grad():
        for name in filter(is_attention, T5_BLOCKS):
            masked.get_submodule(f"{name}.q").weight[:6] = 0
    compact = make_compact(masked, {})[0]
    assert size_of(compact) == 33408
    same_logits(masked, compact, "t5")


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_a_compact_model_can_be_made_smaller(tmp_path, kind):
    """Of heads 0, 2 and 3 the second goes: 2 by the original's count. So it is after a reload too.

    The first model is uneven. The second is even, so a T5 is plain, whose position bias lacks the heads in both stacks.
    """
    cut = every(kind, {0, 2, 3}, set(range(40)))
    cut[BLOCKS[kind][-1]] = set(range(41)), "all"
    masked, compact = masked_and_compact(kind, cut)
    whole = size_of(lively(kind))
    save_model(tmp_path / "m", compact, {})
    for model in (compact, load_model(tmp_path / "m").model):
        silence(model, every(kind, {0, 2}, set(range(10, 40))))
        smaller, _ = make_compact(model, {})
        assert {(block.heads, block.neurons) for block in find_blocks(smaller).values()} == {(2, 0), (0, 30)}
        head, neuron = PRICES[kind]
        assert size_of(smaller) == (
            whole
            - 2 * head * sum(map(is_attention, BLOCKS[kind]))
            - 18 * neuron * sum(not is_attention(name) for name in BLOCKS[kind])
            - (2 * 2 * 32 if kind == "t5" else 0)
        )
        silence(masked, every(kind, {0, 3}, set(range(10, 40))))
        same_logits(masked, smaller, kind)


# --- on disk -------------------------------------------------------------------------------------------------------


AUTO_CLASSES = {"t5": "AutoModelForSeq2SeqLM", "distilbert": "AutoModelForSequenceClassification"}
PROGRAM = """
import json, os, sys, torch, transformers

torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder, root, batches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tensors = {kind: {name: torch.tensor(rows) for name, rows in batch.items()} for kind, batch in batches.items()}

def answers(t5, distilbert):
    ids = t5.generate(input_ids=tensors["t5"]["input_ids"], num_beams=3, max_new_tokens=10, do_sample=False)
    return {"t5": t5(**tensors["t5"]).logits.tolist(), "ids": ids.tolist(),
            "distilbert": distilbert(**tensors["distilbert"]).logits.tolist()}

def auto(**options):
    return [getattr(transformers, name).from_pretrained(f"{folder}/{kind}", **options)
            for kind, name in (("t5", "AutoModelForSeq2SeqLM"), ("distilbert", "AutoModelForSequenceClassification"))]

def say(case, models):
    print(json.dumps({"case": case, "suite": "common" in sys.modules, "answers": answers(*models)}), flush=True)

if os.fork() == 0:  # two new processes for one import of transformers: in this one the suite is there
    sys.path.insert(0, root)
    import common.models.load
    say("import common.models.load", auto())
    os._exit(0)
os.wait()
models = auto(trust_remote_code=True)
say("trust_remote_code", models)
for kind, model in zip(("t5", "distilbert"), models):
    model.save_pretrained(f"{folder}/{kind}-again")
sys.path.insert(0, root)  # from here on the suite is there beside the folders' own code
from common.models.load import load_model
say("both, load_model", [load_model(f"{folder}/{kind}").model for kind in ("t5", "distilbert")])
say("both, an auto class", auto())
"""
CASES = [
    ("import common.models.load", True),
    ("trust_remote_code", False),
    ("both, load_model", True),
    ("both, an auto class", True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a compact model of each kind, and what they answer to the padded batches."""
    folder, found = tmp_path_factory.mktemp("compact"), {}
    for kind in AUTO_CLASSES:
        _, model = masked_and_compact(kind, drawn_cut(kind, 1), talkative if kind == "t5" else lively)
        save_model(folder / kind, model, {})
        found[kind] = logits(model, kind).tolist()
        if kind == "t5":
            found["ids"] = model.generate(
                input_ids=padded_batch(kind)["input_ids"], num_beams=3, max_new_tokens=10, do_sample=False
            ).tolist()
    assert len({token for row in found["ids"] for token in row}) > 5
    return folder, found


def test_auto_classes_load_it_in_a_new_process(folders, tmp_path):
    """Oracle: what the model said before it was saved. Without the suite the folder itself holds the code."""
    folder, expected = folders
    batches = {kind: {name: tensor.tolist() for name, tensor in padded_batch(kind).items()} for kind in AUTO_CLASSES}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, ROOT, json.dumps(batches)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["case"], line["suite"]) for line in lines] == CASES, done.stderr
    for line in lines:
        assert [name for name in expected if line["answers"][name] != expected[name]] == [], line["case"]
    for kind in AUTO_CLASSES:  # saved again by the process that had only the folder's own code
        assert same_state(load_model(folder / f"{kind}-again").model, load_model(folder / kind).model)
        assert (folder / f"{kind}-again" / "modeling_compact.py").is_file()


# --- the scripts ---------------------------------------------------------------------------------------------------


def test_fine_tuning_runs_the_same_course_and_no_form_is_taken_for_the_other(t5, chain, here):
    """Oracle: the run without --compact; T5 trains without dropout, and what is zero gets no gradient."""
    tuning = f"model-level_finetuning.py -m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0 --epochs 3 --batch-size 8"
    courses, results = {}, {}
    for name, flags in (("masked", ""), ("compact", "--compact")):
        results[name] = run(f"{tuning} -o {name}.pth {flags}")
        with open(f"{name}.csv", encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))[1:]  # epoch 0 trains nothing
        courses[name] = [float(row[column]) for row in rows for column in ("train_loss", "val_loss")]
    assert results["compact"]["parameters"] == results["masked"]["parameters"] - 6 * 768  # a head of each
    assert len(set(courses["masked"])) == 6 and courses["compact"] == pytest.approx(courses["masked"], rel=1e-4)
    tuned = load_model("compact.pth")
    parameters = dict(tuned.model.named_parameters())
    for name, mask in tuned.masks.items():
        assert mask.shape == parameters[name].shape and not parameters[name][~mask].any(), name
    assert "pass --overwrite" in fails(f"{tuning} -o compact.pth")
    assert "pass --overwrite" in fails(f"{tuning} -o masked.pth --compact")
