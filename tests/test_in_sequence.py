"""Solving one configuration's blocks in sequence: the solutions against numpy, and what the script makes of them."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import OPTIONS, edited_json, examples, is_one_line, least_squares, lively, read_json, touched

from common.blocks import block_tensors, find_blocks, set_block
from common.closed_form import reconstruct, reconstruct_in_sequence
from common.families import family_of
from common.masking import prune_block
from common.models import load_model
from common.schemes import Pair
from common.teacher import held_out_errors

ALL_TOKENS = OPTIONS | {"oversampling": 1e9}
FAMILY = {"t5": "t5", "t5-gated": "t5", "distilbert": "distilbert", "bert": "bert", "bart": "bart"}
ENCODER = "encoder.block.0.layer.{}".format
LAYER = "distilbert.transformer.layer.{}".format


@torch.no_grad()
def pruned_variants(model, names=None, rate=0.0):
    """{pair: variant} of some blocks, or of all: half their heads or neurons gone, and `rate` of the output weights."""
    variants = {}
    for name, block in find_blocks(model).items():
        if names is None or name in names:
            tensors, out = block_tensors(model, block), block.linears[-1]
            weights = {out: round(rate * tensors[f"{out}.weight"].numel())}
            removed = {"heads": block.heads // 2, "neurons": block.neurons // 2, "weights": weights}
            variants[Pair(name, "half")], _ = prune_block(block, tensors, removed)
    return variants


def with_solutions(model, solved):
    model, blocks = copy.deepcopy(model), find_blocks(model)
    for pair, tensors in solved.items():
        set_block(model, blocks[pair.block], tensors)
    return model


@torch.no_grad()
def seen(model, data, **places):
    """What modules read and wrote, example by example, so that nothing is padded: {key: rows (tokens, width)}.

    `places`: {key: (module's name, "in" or "out")}.
    """
    rows, handles = {key: [] for key in places}, []
    for key, (name, end) in places.items():

        def note(module, args, output, key=key, end=end):
            rows[key].append((args[0] if end == "in" else output)[0])

        handles.append(model.get_submodule(name).register_forward_hook(note))
    for i in range(len(data)):
        family_of(model.config).run(model, data.batch([i]))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(each).numpy() for key, each in rows.items()}


def matrix(tensors, linear):
    """A Linear's weight, its bias as a last column if it has one."""
    parts = [tensors[f"{linear}.weight"], *(tensors[name][:, None] for name in [f"{linear}.bias"] if name in tensors)]
    return torch.cat(parts, dim=1).numpy()


def with_bias(tensors, linear, rows):
    return np.hstack([rows, np.ones((len(rows), 1))]) if f"{linear}.bias" in tensors else rows


# --- the solutions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["whole parts", "and weights"])
@pytest.mark.parametrize("kind", FAMILY)
def test_behind_dense_blocks_the_solution_is_the_ordinary_one(kind, rate):
    """Each block in turn is the only one that is pruned, so the student's inputs are the teacher's.

    Value projections are solved by iterations that end early and blow up rounding errors: there the errors are alike.
    """
    model, data = lively(kind).double(), examples(FAMILY[kind], 24)
    for pair, variant in pruned_variants(model, rate=rate).items():
        (exact, found), moved = (
            [
                solve(model, {pair: variant}, data, ridge=1e-3, value_rounds=rounds, **OPTIONS)[pair]
                for solve in (reconstruct, reconstruct_in_sequence)
            ]
            for rounds in (0, 1)
        )
        assert exact.keys() == found.keys()
        for name, tensor in exact.items():
            assert torch.allclose(found[name], tensor, atol=1e-5), (pair, name)
        ordinary, in_sequence = held_out_errors(model, find_blocks(model), {pair: moved}, data, **OPTIONS)[pair]
        assert in_sequence == pytest.approx(ordinary, rel=1e-2), pair


@pytest.mark.parametrize(
    "kind, first, second, stream",
    [
        ("t5", ENCODER("0.SelfAttention"), ENCODER("1.DenseReluDense"), ENCODER("1")),
        ("t5-gated", ENCODER("0.SelfAttention"), ENCODER("1.DenseReluDense"), ENCODER("1")),
        ("t5", ENCODER("1.DenseReluDense"), "decoder.block.0.layer.1.EncDecAttention", "decoder.block.0.layer.1"),
        ("distilbert", LAYER("0.attention"), LAYER("0.ffn"), LAYER("0.ffn.lin1")),
        ("distilbert", LAYER("0.ffn"), LAYER("1.attention"), LAYER("1.attention.q_lin")),
    ],
)
def test_the_second_block_is_the_least_squares_fit_of_what_the_stream_lacks(kind, first, second, stream):
    """Oracle: numpy's lstsq on what plain hooks see in a student that holds the solutions; target y + (x − x̃)."""
    model, data, ridge = lively(kind).double(), examples(FAMILY[kind], 40), 1e-4
    variants = pruned_variants(model, {first, second})
    solved = reconstruct_in_sequence(model, variants, data, ridge=ridge, value_rounds=0, **ALL_TOKENS)
    assert [pair.block for pair in solved] == [first, second]
    block, start, keeps = variants[Pair(second, "half")]
    found, own = solved[Pair(second, "half")], {name: t.detach() for name, t in block_tensors(model, block).items()}
    *inner, out = block.linears
    places = {
        "stream": (stream, "in"),
        "inputs": (f"{second}.{inner[-1]}", "in"),
        "features": (f"{second}.{out}", "in"),
        "output": (f"{second}.{out}", "out"),
    }
    teacher, student = seen(model, data, **places), seen(with_solutions(model, solved), data, **places)
    assert not np.allclose(teacher["inputs"], student["inputs"], atol=1e-2)

    def expected(linear, inputs, wanted):
        keep = keeps[linear].numpy()
        if f"{linear}.bias" in start:
            kept_bias = np.ones(len(keep), bool) if linear == out else keep.any(axis=1)  # a neuron's goes with it
            keep = np.hstack([keep, kept_bias[:, None]])
        inputs, before = with_bias(start, linear, inputs), matrix(start, linear)
        return least_squares(inputs, wanted, before, keep, ridge)[0]

    target = teacher["output"] + teacher["stream"] - student["stream"]
    assert np.allclose(matrix(found, out), expected(out, student["features"], target), atol=1e-6)
    if block.kind == "feed_forward":
        for linear in inner:
            wanted = with_bias(own, linear, teacher["inputs"]) @ matrix(own, linear).T
            assert np.allclose(matrix(found, linear), expected(linear, student["inputs"], wanted), atol=1e-6)
    else:
        assert all(torch.equal(found[f"{linear}.weight"], start[f"{linear}.weight"]) for linear in inner)


@pytest.mark.parametrize("kind", FAMILY)
def test_the_stream_ends_no_further_from_the_teachers_than_with_independent_solutions(kind):
    """Of all blocks together, on the calibration examples: what enters the last norm, or what leaves it."""
    model, data = lively(kind).double(), examples(FAMILY[kind], 120)
    end = {
        "t5": ("decoder.final_layer_norm", "in"),
        "t5-gated": ("decoder.final_layer_norm", "in"),
        "distilbert": (LAYER("1.output_layer_norm"), "in"),
        "bert": ("bert.encoder.layer.1.output.LayerNorm", "in"),
        "bart": ("model.decoder.layers.1.final_layer_norm", "in"),
    }[kind]
    variants, wanted = pruned_variants(model), seen(model, data, end=end)["end"]
    ordinary, found = (
        np.sum((seen(with_solutions(model, solved), data, end=end)["end"] - wanted) ** 2)
        for solved in (
            solve(model, variants, data, ridge=1e-6, **ALL_TOKENS) for solve in (reconstruct, reconstruct_in_sequence)
        )
    )
    assert found < ordinary


def test_removed_weights_stay_zero_and_the_teacher_stays_as_it_was(setting):
    model, kind = setting
    before = copy.deepcopy(model.state_dict())
    variants = pruned_variants(model, rate=0.3)
    solved = reconstruct_in_sequence(model, variants, examples(kind, 24), ridge=1e-3, **OPTIONS)
    assert solved.keys() == variants.keys()
    for pair, (_, tensors, keeps) in variants.items():
        assert solved[pair].keys() == tensors.keys()
        for linear, keep in keeps.items():
            assert not solved[pair][f"{linear}.weight"][~keep].any(), (pair, linear)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_overflows_keeps_its_pruned_blocks(setting):
    model, kind = setting
    first, *_ = find_blocks(model).values()
    variants = pruned_variants(model)
    with torch.no_grad():
        block_tensors(model, first)[f"{first.linears[0]}.weight"][0, 0] = float("nan")
    solved = reconstruct_in_sequence(model, variants, examples(kind, 24), ridge=1e-3, **OPTIONS)
    for pair, tensors in solved.items():
        assert all(bool(torch.isfinite(each).all()) for each in tensors.values()), pair


# --- the script ------------------------------------------------------------------------------------------------


@pytest.fixture
def solve_in_sequence(workshop, chain, tmp_path, call):
    """solve_in_sequence(*flags, nth=0): runs the script on the chain's pruned library, writing to "sequence"."""

    def run(*flags, nth=0, conf=chain / "conf.json", output="sequence"):
        model = workshop / "model" / "t5"
        files = ("-m", model, "-p", chain / "pruned", "-o", tmp_path / output)
        return call("block-level_finetuning.py", *files, "--in-sequence", conf, nth, "--batch-size", 8, *flags)

    return run


@pytest.fixture
def measured(monkeypatch):
    """measured(independent, in_sequence): the divergences that the script will find."""

    def become(*figures):
        scores = itertools.chain([0.0], figures, itertools.repeat(0.0))  # first that of the pruned model
        monkeypatch.setattr(
            "common.block_level.solutions.score_composed", lambda *_: dict.fromkeys(("loss", "kl"), next(scores))
        )

    return become


def arrays(folder, pair):
    packed = np.load(folder / f"{pair}.npy")
    return {name: packed[name] for name in packed.dtype.names}


def same_arrays(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("figures, taken", [((0.2, 0.1), "in_sequence"), ((0.1, 0.2), "independent")])
def test_the_library_holds_what_diverges_less(
    solve_in_sequence, measured, succeeds, workshop, chain, tmp_path, figures, taken
):
    measured(*figures)
    code, result, err = solve_in_sequence()
    assert code == 0, err
    assert f"{figures[0]:.4f} solved independently, {figures[1]:.4f} in sequence" in err
    compared = {"kl": dict(zip(("independent", "in_sequence"), figures)), "taken": taken}
    assert {name: result[name] for name in compared} == compared

    chosen = read_json(chain / "conf_prune.json")["configs"][0]
    record, pruned = read_json(tmp_path / "sequence" / "record.json"), read_json(chain / "pruned" / "record.json")
    assert record["stage"] == "solved-in-sequence"
    assert list(record["variants"]) == [f"{block}.{variant}" for block, variant in chosen.items()]
    keys = {block: pruned["variants"][f"{block}.{variant}"]["key"] for block, variant in chosen.items()}
    for entry in record["variants"].values():
        assert entry["made_from"]["in_sequence"] == keys and entry["made_from"]["method"] == "reconstruct"
        assert {name: entry[name] for name in compared} == compared

    model = workshop / "model" / "t5"
    succeeds(
        "block-level_finetuning.py",
        *("-m", model, "-p", chain / "pruned", "-o", tmp_path / "ordinary", "--batch-size", 8),
        *("--method", "reconstruct"),
    )
    ordinary = [
        same_arrays(arrays(tmp_path / "sequence", pair), arrays(tmp_path / "ordinary", pair))
        for pair in map(Pair._make, chosen.items())
    ]
    assert all(ordinary) if taken == "independent" else not any(ordinary[1:])


def test_the_script_solves_as_the_function_does(solve_in_sequence, measured, chain, workshop, tmp_path):
    from common.cli import Talk
    from common.data import load_examples
    from common.devices import Runtime
    from common.library import Library
    from common.models import load_tokenizer

    measured(1.0, 0.0)
    assert solve_in_sequence()[0] == 0
    loaded = load_model(workshop / "model" / "t5")
    train = load_examples(
        workshop / "data" / "t5", "train", load_tokenizer(None, loaded), loaded.task, prefix=loaded.study.prefix
    )
    blocks, pruned = find_blocks(loaded.model), Library.open(chain / "pruned", loaded.identity["fingerprint"])
    pairs = [Pair(*item) for item in read_json(chain / "conf_prune.json")["configs"][0].items()]
    variants = {pair: pruned.read(blocks[pair.block], pair.variant) for pair in pairs}
    runtime = Runtime(torch.device("cpu"), 8, Talk(quiet=True))
    solved = reconstruct_in_sequence(loaded.model, variants, train, runtime, ridge=1e-3)
    for pair in pairs:
        found = arrays(tmp_path / "sequence", pair)
        assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in solved[pair].items()), pair


def test_the_divergence_that_is_measured_is_the_composed_models(solve_in_sequence, succeeds, workshop, chain, tmp_path):
    """Oracle: log-probabilities of the model that compose_model.py writes, one pair of sentences at a time."""
    import transformers
    from helpers import PREFIX, pairs_of

    code, result, err = solve_in_sequence("--quiet")
    assert code == 0, err
    model, tokenizer = workshop / "model" / "t5", workshop / "tokenizer" / "t5"
    composing = ("-m", model, "-t", tokenizer, "-p", tmp_path / "sequence", "-c", chain / "conf.json", "-n", 0)
    succeeds("compose_model.py", *composing, "-o", tmp_path / "composed")
    models = [transformers.T5ForConditionalGeneration.from_pretrained(path) for path in (model, tmp_path / "composed")]
    tokenizer, total, tokens = transformers.AutoTokenizer.from_pretrained(tokenizer), 0.0, 0
    for english, german in pairs_of(workshop, "val"):
        source, labels = tokenizer(PREFIX + english, return_tensors="pt"), tokenizer(german, return_tensors="pt")
        with torch.no_grad():
            teacher, composed = (
                each.eval()(input_ids=source["input_ids"], labels=labels["input_ids"])
                .logits[0]
                .double()
                .log_softmax(-1)
                for each in models
            )
        total += float((teacher.exp() * (teacher - composed)).sum())
        tokens += len(teacher)
    assert result["kl"][result["taken"]] == pytest.approx(total / tokens, rel=1e-4)
    assert result["kl"][result["taken"]] == min(result["kl"].values())


def test_a_rerun_skips_and_a_missing_variant_has_all_solved_again(solve_in_sequence, tmp_path):
    code, first, err = solve_in_sequence()
    assert code == 0, err
    before = touched(tmp_path / "sequence")
    _, again, _ = solve_in_sequence()
    assert (again["fine_tuned"], again["skipped"]) == (0, first["fine_tuned"])
    assert touched(tmp_path / "sequence") == before
    next((tmp_path / "sequence").glob("*.npy")).unlink()
    _, repaired, _ = solve_in_sequence()
    assert (repaired["fine_tuned"], repaired["skipped"]) == (first["fine_tuned"], 0)
    assert {path: digest for path, (_, digest) in touched(tmp_path / "sequence").items()} == {
        path: digest for path, (_, digest) in before.items()
    }


def refused(outcome, *words):
    code, result, err = outcome
    assert (code, result) == (2, None) and is_one_line(err), err
    assert all(str(word) in err for word in words), err


def test_such_a_library_serves_its_own_configuration_alone(solve_in_sequence, call, workshop, chain, tmp_path):
    assert solve_in_sequence("--quiet")[0] == 0
    model, conf, library = ("-m", workshop / "model" / "t5"), ("-c", chain / "conf.json"), tmp_path / "sequence"
    tokenizer, output = ("-t", workshop / "tokenizer" / "t5"), ("-o", tmp_path / "composed")
    outcome = call("compose_model.py", *model, *tokenizer, *conf, *output, "-n", 2, "-p", library)
    refused(outcome, library, "was solved in sequence for one configuration")
    searching = (
        "--search",
        library,
        "--budget",
        0.9,
        "-o",
        tmp_path / "found.json",
        "--data",
        workshop / "data" / "t5",
    )
    refused(call("config_generator.py", *model, *tokenizer, *conf, *searching), library, "was solved in sequence")
    as_input = ("-p", library, "-o", tmp_path / "other", "--method", "reconstruct")
    refused(call("block-level_finetuning.py", *model, *as_input), library, "where a pruned one belongs")
    refused(solve_in_sequence(nth=2), library, "was solved in sequence for another configuration")


def test_variants_of_two_runs_do_not_go_together(solve_in_sequence, call, workshop, chain, tmp_path):
    """As an interrupted run with --overwrite leaves them."""
    assert solve_in_sequence("--quiet")[0] == 0
    record = tmp_path / "sequence" / "record.json"
    edited_json(record, record, lambda content: next(iter(content["variants"].values())).update(key="07e1"))
    composing = ("-m", workshop / "model" / "t5", "-p", tmp_path / "sequence", "-c", chain / "conf.json", "-n", 0)
    refused(call("compose_model.py", *composing, "-o", tmp_path / "composed"), "holds variants of several runs")


@pytest.mark.parametrize("method", ["train", "both"])
def test_gradients_are_refused(solve_in_sequence, tmp_path, method):
    refused(solve_in_sequence("--method", method), f"--method {method}", "--in-sequence")
    assert not (tmp_path / "sequence").exists()


@pytest.mark.parametrize("nth, words", [(3, ["no configuration 3", "0 to 2"]), ("x", ["'x'"]), (-1, ["-1"])])
def test_a_configuration_that_is_not_there_is_refused(solve_in_sequence, tmp_path, nth, words):
    refused(solve_in_sequence(nth=nth), *words)
    assert not (tmp_path / "sequence").exists()


def test_a_configuration_of_another_model_is_refused(solve_in_sequence, chain, tmp_path):
    conf = edited_json(
        chain / "conf.json", tmp_path / "other.json", lambda content: content["model"].update(fingerprint="07e1")
    )
    refused(solve_in_sequence(conf=conf), conf, "was made for another model")
    refused(solve_in_sequence(conf=tmp_path / "absent.json"), "absent.json")


def test_a_fine_tuned_library_is_no_place_for_it(solve_in_sequence, chain, tmp_path):
    shutil.copytree(chain / "tuned", tmp_path / "tuned")
    refused(solve_in_sequence(output="tuned"), "is a fine-tuned library where a solved-in-sequence one belongs")


def test_a_configuration_that_removes_nothing_leaves_nothing_to_solve(solve_in_sequence, chain, tmp_path):
    conf = edited_json(chain / "conf.json", tmp_path / "dense.json", lambda content: content.update(configs=[{}]))
    code, result, err = solve_in_sequence(conf=conf)
    assert (code, json.dumps(result["fine_tuned"])) == (0, "0"), err
