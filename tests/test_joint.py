"""Joint fine-tuning: the supernet, what is drawn, and the libraries that it leaves.

The oracles are plain copies of models: composed by `composition.compose`, trained by the whole model's own objective.
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import FEED_FORWARD, edited_json, fails, outcome, rate, read_csv, read_json, run, touched
from oracles import loss_per_token
from tiny import QUIET, RUNTIME, build_model, examples, padded_batch, pairs_of, recipe

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_masks, set_block
from common.composing.scheme import DENSE, Pair
from common.pruning.prune_block import prune_block
from common.runtime import progress
from common.training import loop as training
from common.training.block_level import jointly
from common.training.block_level.sampling import COMPOSITIONS, NEW_SHARE, make_sampling, sample_compositions
from common.training.block_level.supernet import JointObjective, Supernet
from common.training.checkpoints import Checkpoint
from common.training.learner import Learner
from common.training.loop import fit, steps_of
from common.training.losses import ModelObjective

RECIPE = recipe(epochs=1)
JOINT = (
    "block-level_finetuning.py --method joint --stats joint.csv --epochs 2 --batch-size 8 --lr 0.01 --shared-rate 1 "
    "--calibration 24"
)


def variants_of(model, names=("a",)):
    """{pair: variant}: of every block of a model one of each name, "b" with more removed than "a"."""
    found = {}
    for name, block in find_blocks(model).items():
        for variant in names:
            share = {"a": 0.25, "b": 0.5}[variant]
            own = block_tensors(model, block)
            counts = {
                linear: int(share * own[f"{linear}.weight"].numel())
                for linear in ((block.output,) if block.heads else block.linears)
            }
            removed = {"heads": int(share * block.heads), "weights": counts}
            found[Pair(name, variant)], _ = prune_block(block, own, removed)
    return found


def plain(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def supernet_of(kind, names=("a", "b"), old=(), **options):
    """A supernet of a tiny model; returns it and the model."""
    model = build_model(kind)
    every = variants_of(model, names)
    new = {pair: variant for pair, variant in every.items() if pair.variant not in old}
    return Supernet(model, find_blocks(model), new, {p: v for p, v in every.items() if p not in new}, **options), model


def even(supernet):
    return make_sampling("even", supernet.new, supernet.pairs(), RECIPE.seed)


# --- the supernet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_a_supernet_computes_what_a_model_of_copied_tensors_does(kind):
    supernet, model = supernet_of(kind)
    batch, names = padded_batch(kind), list(find_blocks(model))
    for choice in (
        dict.fromkeys(names, "a"),
        {name: "ab"[i % 2] for i, name in enumerate(names)},
        {name: ["b", DENSE][i % 2] for i, name in enumerate(names)},
        dict.fromkeys(names, DENSE),
    ):
        copied, variants = build_model(kind).eval(), variants_of(model, ("a", "b"))
        for name, variant in choice.items():
            if variant != DENSE:
                set_block(copied, find_blocks(copied)[name], variants[Pair(name, variant)].tensors)
        supernet.compose(choice)
        supernet.train(False)
        with torch.no_grad():
            assert torch.equal(supernet(**batch).logits, copied(**batch).logits), choice


@pytest.mark.parametrize("shared_factor", [0.0, 1.0])
def test_a_supernet_takes_no_memory_for_the_originals_blocks_and_leaves_it_alone(shared_factor):
    supernet, model = supernet_of("t5")
    before = plain(model.state_dict())
    learner = supernet.make_learner(RECIPE, 4, shared_factor)
    own = {each.data_ptr() for each in model.parameters()}
    theirs = {each.data_ptr() for each in supernet.model.parameters()}
    assert len(theirs - own) == (len(supernet.shared) if shared_factor else 0)
    supernet.compose(dict.fromkeys(find_blocks(model), "a"))
    for _ in range(2):
        learner.step(supernet(**padded_batch("t5")).loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = [not torch.equal(tensor, before[name]) for name, tensor in supernet.shared.items()]
    assert all(moved) if shared_factor else not any(moved)


def test_the_rest_is_all_that_lies_in_no_block():
    """Oracle: the names of T5's parameters, by hand."""
    supernet, model = supernet_of("t5")
    expected = {
        name
        for name, _ in model.named_parameters()
        if name == "shared.weight" or "layer_norm" in name or "relative_attention_bias" in name
    }
    assert set(supernet.shared) == expected and len(expected) == 1 + 2 * 2 + 2 * 3 + 2 + 2


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_a_step_changes_what_the_variants_drawn_keep_for_all_of_their_block(kind):
    supernet, model = supernet_of(kind)
    learner = supernet.make_learner(RECIPE, 10, 0.3)
    objective = JointObjective(supernet, RECIPE, even(supernet), {})
    kept = {}  # {block: {parameter: by any of the variants drawn so far}}
    for step in range(3):
        chosen, before = objective.sampling.draw(step), plain(learner.parameters)
        ((name, loss, _, part),) = objective.losses(padded_batch(kind), {"library": learner}, training=True)
        assert (name, part) == ("library", None)
        learner.step(loss)
        assert all(not torch.equal(tensor, before[name]) for name, tensor in learner.parameters.items())
        for block, variant in chosen.items():
            for path, mask in supernet.masks[Pair(block, variant)].items():
                masks = kept.setdefault(block, {})
                masks[path] = masks.get(path, torch.zeros_like(mask)) | mask
    for pair, (_, solution, _) in supernet.new.items():
        masks, tensors = supernet.masks[pair], supernet.tensors(pair)
        for path, update in supernet.updates[pair.block].items():
            if path in masks:
                assert not update[~kept[pair.block][path]].any() and update[kept[pair.block][path]].any()
            mask = masks.get(path, torch.ones_like(update, dtype=torch.bool))
            assert torch.equal(tensors[path], (solution[path] + update) * mask)
    assert all(torch.equal(own, given) for own, given in zip(model.parameters(), build_model(kind).parameters()))


@pytest.mark.parametrize("kind, distill", [("t5", 0.0), ("t5", 0.5), ("distilbert", 0.0)])
def test_with_one_variant_of_each_block_it_is_the_training_of_the_composed_model(tmp_path, kind, distill):
    """Oracle: the whole model's own objective on a composed copy, with the same rate everywhere, and no decay, which
    draws weights to zero there, and here to what they began with."""
    plan = recipe(epochs=2, distill=distill, weight_decay=0.0)
    supernet, model = supernet_of(kind, ("a",))
    data, validation = examples(kind, 12), examples(kind, 6, seed=1)
    choice = dict.fromkeys(find_blocks(model), "a")
    joint = supernet.make_learner(plan, steps_of(data, plan), 1.0)
    objective = JointObjective(supernet, plan, even(supernet), {"only": choice}, model)
    fit({"x": joint}, objective, data, validation, plan, RUNTIME, Checkpoint(tmp_path / "a", {"x": ""}, QUIET))

    copied, masks = build_model(kind), {}
    for block, tensors, keeps in variants_of(copied).values():
        set_block(copied, block, tensors)
        masks |= {f"{block.root}.{name}": mask for name, mask in parameter_masks(block, keeps).items()}
    whole = Learner(dict(copied.named_parameters()), masks, plan, steps_of(data, plan))
    objective = ModelObjective(copied, plan, build_model(kind))
    fit({"x": whole}, objective, data, validation, plan, RUNTIME, Checkpoint(tmp_path / "b", {"x": ""}, QUIET))

    assert [row[1:3] for row in joint.history[1:]] == [pytest.approx(row[1:3], rel=1e-5) for row in whole.history[1:]]
    assert all(row.parts == {"only": row.val_loss} for row in joint.history)
    own = dict(copied.named_parameters())
    for name, block in find_blocks(copied).items():
        for path, tensor in supernet.tensors(Pair(name, "a")).items():
            torch.testing.assert_close(tensor, own[f"{block.root}.{path}"], rtol=1e-4, atol=1e-5)
    for name, tensor in supernet.shared.items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-4, atol=1e-5)


def test_variants_that_were_there_and_their_rest_stay_as_they_are():
    shared = {name: tensor.detach() + 1 for name, tensor in supernet_of("t5")[0].shared.items()}
    supernet, _ = supernet_of("t5", old=("a",), shared=shared)
    learner = supernet.make_learner(RECIPE, 20, 0.0)
    objective = JointObjective(supernet, RECIPE, even(supernet), {})
    before = {pair: plain(supernet.tensors(pair)) for pair in supernet.pairs()}
    for _ in range(8):
        ((_, loss, *_),) = objective.losses(padded_batch("t5"), {"library": learner}, training=True)
        learner.step(loss)
    for pair in supernet.pairs():
        same = all(torch.equal(tensor, before[pair][name]) for name, tensor in supernet.tensors(pair).items())
        assert same == (pair.variant == "a"), pair
    assert all(torch.equal(tensor, shared[name]) for name, tensor in supernet.shared.items())


def test_new_variants_begin_with_the_update_of_those_that_are_there():
    updates = {
        name: {path: torch.full_like(tensor, 0.1) for path, tensor in block_tensors(build_model("t5"), block).items()}
        for name, block in list(find_blocks(build_model("t5")).items())[:3]
    }
    supernet, model = supernet_of("t5", old=("a",), updates=updates)
    for pair, variant in variants_of(model, ("a", "b")).items():
        added = 0.1 if pair.variant == "b" and pair.block in updates else 0.0
        masks = parameter_masks(variant.block, variant.keeps)
        for path, tensor in supernet.tensors(pair).items():
            expected = (variant.tensors[path] + added) * masks.get(path, torch.ones_like(tensor))
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_every_variant_is_drawn_once_before_any_is_drawn_again():
    pairs = [Pair("x", name) for name in "abc"] + [Pair("y", name) for name in "de"]
    draws = make_sampling("even", pairs, pairs, 0)
    chosen = [draws.draw(step) for step in range(60)]
    for block, size in (("x", 3), ("y", 2)):
        own = [choice[block] for choice in chosen]
        assert all(len(set(own[i : i + size])) == size for i in range(0, 60, size))
    assert len({tuple(choice.items()) for choice in chosen}) == 6  # all compositions come up
    assert chosen == [make_sampling("even", pairs, pairs, 0).draw(step) for step in range(60)]
    assert chosen != [make_sampling("even", pairs, pairs, 1).draw(step) for step in range(60)]


def test_new_variants_among_many_old_ones_are_drawn_half_of_the_time_at_least():
    old, new, other = [Pair("x", str(n)) for n in range(9)], Pair("x", "new"), Pair("y", "new")

    def share(those_new, all_of_them):
        draws = make_sampling("even", those_new, all_of_them, 0)
        return sum(draws.draw(step)["x"] == "new" for step in range(2000)) / 2000

    assert share([new], [*old, new]) == 1  # a step without any new variant would train nothing
    assert share([new, other], [*old, new, other]) == pytest.approx(NEW_SHARE, abs=0.05)
    assert share([*old, other], [*old, other, new]) == pytest.approx(0.1, abs=0.05)  # nine new variants and an old one


PAIRS = [*(Pair("x", name) for name in "abc"), *(Pair("y", name) for name in "def")]


def test_quality_is_measured_on_the_configurations_first():
    few = [{"x": "a", "y": "d"}, {"x": "b", "y": DENSE}]
    found = sample_compositions(few, PAIRS, PAIRS, seed=0)
    assert list(found.values())[:2] == few and list(found)[:3] == ["configuration 0", "configuration 1", "drawn 0"]
    assert len(found) == COMPOSITIONS and len({tuple(choice.items()) for choice in found.values()}) == COMPOSITIONS
    strange = sample_compositions([{"x": "a", "y": "z"}, few[0]], PAIRS, PAIRS, seed=0)
    assert list(strange)[:2] == ["configuration 1", "drawn 0"]
    many = sample_compositions([*few] * 6, PAIRS, PAIRS, seed=0)
    assert list(many) == [f"configuration {n}" for n in range(COMPOSITIONS)]
    only = [Pair("x", "a"), Pair("y", "d")]
    assert list(sample_compositions([], only, only, seed=0).values()) == [{"x": "a", "y": "d"}]


def test_quality_is_measured_with_what_is_new():
    """Compositions without a new variant stay as they are, whatever is trained."""
    configurations = [{"x": "a", "y": "d"}] * 9 + [{"x": "a", "y": "e"}]
    found = sample_compositions(configurations, [Pair("y", "e")], PAIRS, seed=0)
    assert list(found) == ["configuration 9", "drawn 0", "drawn 1"]  # with y as e, x is a, b or c
    assert all(choice["y"] == "e" for choice in found.values())


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(t5, chain, tmp_path_factory):
    """The folder of a joint library of the chain's variants, and its stats."""
    folder = tmp_path_factory.mktemp("joint")
    with contextlib.chdir(folder):
        run(tuning(t5, chain))
    return folder


def tuning(t5, folder, conf="-c {}/conf.json"):
    """The command that tunes the pruned library of a folder, for the configurations there; writes where it runs."""
    return f"{JOINT} -m {t5} -p {folder}/pruned -o library {conf.format(folder)}"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_the_library_and_its_stats(joint, chain):
    record = read_json(joint / "library" / "record.json")
    assert record["stage"] == "tuned-together" and record["shared"]["file"] == "shared.npy"
    assert record["variants"].keys() == read_json(chain / "pruned" / "record.json")["variants"].keys()
    shared = np.load(joint / "library" / "shared.npy")
    original = dict(build_model("t5").named_parameters())
    assert all(shared[name].shape == original[name].shape for name in shared.dtype.names)
    assert not np.array_equal(shared["shared.weight"], original["shared.weight"].detach().numpy())

    rows = read_csv(joint / "joint.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]  # pruned, closed form, and two of training
    compositions = read_csv(joint / "joint-compositions.csv")
    for row in rows:
        own = [float(each["val_loss"]) for each in compositions if each["epoch"] == row["epoch"]]
        assert len(own) == COMPOSITIONS
        assert float(row["val_loss"]) == pytest.approx(sum(own) / len(own), rel=1e-6)
    assert float(rows[-1]["val_loss"]) < float(rows[1]["val_loss"]) < float(rows[0]["val_loss"])
    assert {row["epoch"] for row in read_csv(joint / "joint-blocks.csv")} == {"0", "1"}  # of the closed form


def best_loss(joint, nth):
    """Of a configuration, in the epoch whose weights are kept."""
    best = min(read_csv(joint / "joint.csv"), key=lambda row: float(row["val_loss"]))["epoch"]
    (loss,) = (
        float(row["val_loss"])
        for row in read_csv(joint / "joint-compositions.csv")
        if (row["composition"], row["epoch"]) == (f"configuration {nth}", best)
    )
    return loss


def test_a_composed_model_has_the_loss_that_the_stats_say(t5, joint, chain, workshop, here, tokenizer):
    """Oracle: transformers' own loss, one pair of sentences at a time, of the model that compose_model.py writes."""
    run(f"compose_model.py -m {t5} -p {joint}/library -c {chain}/conf.json -n 1 -o composed")
    model = transformers.T5ForConditionalGeneration.from_pretrained(Path("composed")).eval()
    assert loss_per_token(model, tokenizer, pairs_of(workshop, "val")) == pytest.approx(best_loss(joint, 1), rel=1e-4)
    shared, record = np.load(joint / "library" / "shared.npy"), read_json(here / "composed" / "record.json")
    own = dict(model.named_parameters())
    assert all(np.array_equal(own[name].detach().numpy(), shared[name]) for name in shared.dtype.names)
    assert record["library_stage"] == "tuned-together"
    assert record["made_from"]["variants"]["shared"] == read_json(joint / "library" / "record.json")["shared"]["key"]


def test_a_rerun_makes_nothing_and_a_damaged_rest_has_all_made_again(t5, joint, chain, here):
    shutil.copytree(joint, here, dirs_exist_ok=True)
    before = touched(here)
    assert run(tuning(t5, chain))["fine_tuned"] == 0 and touched(here) == before
    shared = here / "library" / "shared.npy"
    shared.write_bytes(shared.read_bytes()[:-1])
    err = fails(f"compose_model.py -m {t5} -p library -c {chain}/conf.json -n 0 -o composed")
    assert "shared.npy: is not the file that was written" in err and not (here / "composed").exists()
    result = run(tuning(t5, chain))
    assert (result["fine_tuned"], result["shared"]) == (26, "trained")
    assert bytes_of(here / "library") == bytes_of(joint / "library")


@pytest.fixture
def grown(t5, chain, joint, here):
    """A copy of the joint library, the working folder, and a pruned one with a further variant of a block."""
    shutil.copytree(joint, here, dirs_exist_ok=True)
    shutil.copytree(chain / "pruned", "pruned")
    edited_json(chain / "conf.json", here / "conf.json", rate(0.6))
    run("prune_scheme_generator.py")
    assert run(f"prune.py -m {t5} -o pruned")["pruned"] == 1
    return here


def test_only_new_variants_are_trained_among_those_that_are_there(t5, joint, grown):
    result = run(tuning(t5, grown))
    assert (result["fine_tuned"], result["skipped"], result["shared"]) == (1, 26, "kept")
    old, new = bytes_of(joint / "library"), bytes_of(grown / "library")
    (added,) = new.keys() - old.keys()
    assert added.startswith(FEED_FORWARD)
    update = f"{FEED_FORWARD}.update.npy"  # it goes on from what it was
    assert {name for name in old if new[name] != old[name]} == {update}
    trained, pruned = np.load(grown / "library" / added), np.load(grown / "pruned" / added)
    assert not np.array_equal(trained["wi.weight"], pruned["wi.weight"])
    assert not trained["wi.weight"][~trained["wi.keep"]].any()
    again = run(tuning(t5, grown))
    assert (again["fine_tuned"], again["skipped"]) == (0, 27)


def test_a_rest_that_is_left_alone_is_in_no_library(t5, chain, here, monkeypatch):
    """And without configurations, quality is measured on drawn ones. The closed form is no epoch of training."""
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", -1.0)
    code, result, err = outcome(f"{tuning(t5, chain, conf='')} --shared-rate 0")
    assert code == 0 and "epoch 2: validation loss" in err and "epoch 3" not in err
    assert result["shared"] == "kept" and result["val_loss"] < result["val_loss_before"]
    assert (
        "shared" not in read_json(here / "library" / "record.json") and not (here / "library" / "shared.npy").exists()
    )
    assert list(result["compositions"]) == [f"drawn {n}" for n in range(COMPOSITIONS)]


def test_a_start_that_is_worse_leaves_the_pruned_weights(t5, chain, here, monkeypatch):
    """No epochs, and a closed form that makes composed models worse, as their validation says here."""
    losses, validate = iter([1.0, 2.0]), training.validate

    def validated(*args, **options):
        return validate(*args, **options)._replace(losses={"library": next(losses)})

    monkeypatch.setattr(jointly, "validate", validated)
    result = run(f"{tuning(t5, chain)} --epochs 0")
    assert (result["best_epoch"], result["val_loss"]) == (0, 1.0)
    paths = list((here / "library").glob("*_*.npy"))
    assert paths
    for path in paths:
        tuned, pruned = np.load(path), np.load(chain / "pruned" / path.name)
        assert all(np.array_equal(tuned[name], pruned[name]) for name in tuned.dtype.names), path.name


def test_a_model_is_fine_tuned_from_there(t5, chain, joint, here):
    result = run(
        f"model-level_finetuning.py -m {t5} -p {joint}/library -c {chain}/conf.json -n 0 -o tuned --compact "
        "--epochs 1 --batch-size 8"
    )
    assert result["val_loss_before"] == pytest.approx(best_loss(joint, 0), rel=1e-5)


def test_model_level_takes_a_rate_of_the_rest_too(t5, chain, here):
    """At 0 it stays as it is. Oracle: the files of the original and of the composed model."""
    common = f"-m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0"
    run(f"model-level_finetuning.py {common} -o tuned --epochs 1 --batch-size 8 --lr 0.01 --shared-rate 0")
    run(f"compose_model.py {common} -o composed")
    tuned, composed = (safetensors.torch.load_file(f"{name}/model.safetensors") for name in ("tuned", "composed"))
    shared = {name for name in composed if "shared" in name or "layer_norm" in name or "relative_attention" in name}
    assert {name for name in composed if torch.equal(tuned[name], composed[name])} == shared


def test_a_search_scores_and_composes_with_the_rest(workshop, t5, chain, joint, here, teacher, tokenizer):
    """Oracle: the losses of the original and of the model that compose_model.py makes of what was found."""
    shutil.copytree(joint / "library", "library")
    searching = f"--search library -c {chain}/conf.json --budget 0.7 --score-examples 99 --rounds 0"
    result = run(f"config_generator.py -m {t5} {searching} -o found.json --report report.json")
    run(f"compose_model.py -m {t5} -p library -c found.json -n 0 -o composed")
    model = transformers.T5ForConditionalGeneration.from_pretrained(Path("composed")).eval()
    pairs = pairs_of(workshop, "val")
    assert result["found"][0]["loss"] == pytest.approx(loss_per_token(model, tokenizer, pairs), rel=1e-4)
    assert result["dense"]["loss"] == pytest.approx(loss_per_token(teacher, tokenizer, pairs), rel=1e-4)
