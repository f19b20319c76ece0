"""What flags name and what may be left out: the only model, default outputs, and flags that would have no effect."""

import shutil

import pytest
import torch
from helpers import edited_json, fails, run
from tiny import build_model, build_tokenizer

from common.cli.open import Opened
from common.cli.paths import models_to_evaluate, the_model
from common.data.sources import DataSource
from common.models.load import load_model
from common.runtime.devices import Runtime
from common.runtime.progress import Talk
from common.runtime.settings import TrainingDataSettings

T5 = ("--attention", 0.25, 0.5, 0.25, "--linear", 0.3, 0.3, 0.5, "-n", 3)


@pytest.fixture
def in_folder(workshop, tmp_path, monkeypatch):
    """An own folder as the current one, with the workshop's T5, its tokenizer and data in place."""
    for part in ("model", "tokenizer", "data"):
        shutil.copytree(workshop / part / "t5", tmp_path / part / "t5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what may be left out ----------------------------------------------------------------------------------------


def test_the_stages_work_one_after_another_as_the_readme_has_them(in_folder):
    """The seed's flow, every flag that may be left out left out. Oracle: the files that are there afterwards."""
    run("config_generator.py -m ./model/t5", *T5)
    run("prune_scheme_generator.py")
    run("prune.py")
    run("block-level_finetuning.py --batch-size 8")
    run("compose_model.py -n 0")
    tuned = run("model-level_finetuning.py -n 0 --epochs 1 --batch-size 8")
    evaluated = run("evaluate-t5.py --limit 4")
    plotted = run("plot_loss.py")
    assert {path.name for path in in_folder.iterdir()} == {
        *("model", "tokenizer", "data", "conf.json", "conf_prune.json", "modules-pruned", "modules-finetuned"),
        *(f"modules-finetuned{what}.csv" for what in ("", "-blocks", "-compositions")),
        *("model-composed", "model-finetuned", "loss.png"),
    }
    assert sorted(path.name for path in (in_folder / "model-finetuned").iterdir()) == ["0", "0.csv"]
    assert (tuned["output"], tuned["stats"]) == ("model-finetuned/0", "model-finetuned/0.csv")
    assert evaluated["model"] == "model-finetuned/0"  # not the original
    assert set(plotted["best_val_loss"]) == {"modules-finetuned", "model-finetuned/0"}


def test_a_changed_configuration_goes_through_without_overwrite_but_for_what_people_edit(in_folder):
    run("config_generator.py", *T5)
    run("prune_scheme_generator.py")
    before = (in_folder / "conf_prune.json").read_bytes()
    assert "--overwrite" in fails("config_generator.py", *T5[:5], 0.4, 0.3, 0.5, "-n", 3)
    run("config_generator.py", *T5[:5], 0.4, 0.3, 0.5, "-n", 3, "--overwrite")
    run("prune_scheme_generator.py")
    assert (in_folder / "conf_prune.json").read_bytes() != before


def test_flags_may_stand_in_a_file_and_a_configuration_for_each_rate(workshop, tmp_path, monkeypatch):
    """A file is read as a shell would: quotes, comments, several lines. Oracle: the same flags on the command line."""
    monkeypatch.chdir(workshop)
    (tmp_path / "flags.txt").write_text(
        f"# rates\n--attention 0.25 0.5  # two\n--linear 0.3 0.5\n\n-o '{tmp_path}/a b.json'\n", encoding="utf-8"
    )
    run("config_generator.py", "-m", "model/t5", f"@{tmp_path}/flags.txt")
    run("config_generator.py", "-m", "model/t5", "-o", tmp_path / "c.json", *T5[:3], "--linear", 0.3, 0.5, "-n", 2)
    assert (tmp_path / "a b.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    (tmp_path / "flags.txt").write_text("-o 'a", encoding="utf-8")
    assert "No closing quotation" in fails("config_generator.py", f"@{tmp_path}/flags.txt")


def test_the_only_model_and_the_only_tokenizer_are_found(in_folder):
    for model in ("model", "./model", "model/t5"):
        assert str(the_model(model)) == "model/t5"
    assert str(the_model(None)) == "model/t5"
    run("evaluate-t5.py -m ./model -t ./tokenizer --limit 2")
    for part in ("model", "tokenizer"):
        shutil.copytree(in_folder / part / "t5", in_folder / part / "other")
    err = fails("prune.py")  # its scheme comes first
    assert "conf_prune.json" in err
    err = fails("config_generator.py", *T5)
    assert "-m (model/other, model/t5)" in err
    assert "-t (tokenizer/other, tokenizer/t5)" in fails("evaluate-t5.py", "-m", "model/t5", "-t", "tokenizer")


def test_without_a_model_the_script_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "download_model.py" in fails("config_generator.py", *T5)
    (tmp_path / "model").mkdir()
    assert "model: is not a model folder" in fails("config_generator.py", *T5)


def test_without_models_to_evaluate_the_fine_tuned_ones_are_taken_by_number(in_folder):
    assert [str(path) for path in models_to_evaluate(None)] == ["model/t5"]
    for name in ("10", "2", "10.csv"):
        if name.isdigit():
            shutil.copytree(in_folder / "model" / "t5", in_folder / "model-finetuned" / name)
        else:
            (in_folder / "model-finetuned" / name).write_text("")
    assert [str(path) for path in models_to_evaluate(None)] == ["model-finetuned/2", "model-finetuned/10"]


def test_several_numbers_are_the_same_files_as_one_at_a_time(in_folder):
    """Oracle: a run for each number."""
    run("config_generator.py", *T5)
    run("prune_scheme_generator.py")
    run("prune.py")
    common = ("-p", "modules-pruned", "--epochs", 1, "--batch-size", 8)
    both = run("model-level_finetuning.py -n 0 2 -o 'both/{n}.pth'", *common)["models"]
    for n, result in zip((0, 2), both, strict=True):
        alone = run(f"model-level_finetuning.py -n {n} -o alone-{n}.pth", *common)
        assert {**alone, "output": 0, "stats": 0, "seconds": 0, "took": 0} == {
            **result,
            **{"output": 0, "stats": 0, "seconds": 0, "took": 0},
        }
        one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (f"alone-{n}.pth", f"both/{n}.pth"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert "{n}" in fails("compose_model.py", "-n", 0, 1, "-o", "same")
    assert "{n}" in fails("model-level_finetuning.py", "-n", 0, 1, "--stats", "same.csv", *common)


@pytest.mark.parametrize(
    "settings, sizes", [({}, (48, 16)), ({"validation_limit": 3}, (48, 3)), ({"limit": 5}, (5, 5))]
)
def test_validation_alone_may_be_limited(workshop, settings, sizes):
    """The workshop has 48 and 16 pairs."""
    data, model = workshop / "data" / "t5", load_model(workshop / "model" / "t5")
    runtime = Runtime(torch.device("cpu"), 8, Talk(quiet=True))
    opened = Opened(model, runtime, build_tokenizer("t5"), DataSource(data=str(data)), TrainingDataSettings(**settings))
    assert tuple(len(opened.split(name)) for name in ("train", "validation")) == sizes


# --- flags that would have no effect -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, named",
    [
        ("config_generator.py", [*T5, "--budget", 0.5], "--budget: goes with --search"),
        ("config_generator.py", [*T5, "--batch-size", 8], "--batch-size: goes with --search"),
        ("config_generator.py", [*T5, "--grid"], "--number: "),
        ("config_generator.py", [*T5[:8], "--grid", "--random"], "--random: "),
        ("config_generator.py", ["--search", "lib", "--budget", 0.5, "--linear", 0.5], "--linear: has no part in a"),
        ("config_generator.py", ["--search", "lib", "--budget", 0.5, "--random"], "--random: has no part in a"),
        ("evaluate-t5.py", ["--original", "model/t5"], "--original: goes with --report"),
    ],
)
def test_a_flag_without_effect_is_refused(in_folder, script, flags, named):
    assert named in fails(script, *flags)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_family_or_without_the_head_is_refused(workshop, tmp_path):
    """A plain BERT encoder has no classifier, which transformers would make up at random."""
    err = fails("download_model.py", "t5", "--checkpoint", workshop / "model" / "distilbert", "-o", tmp_path / "out")
    assert "is a distilbert model, not a t5 one" in err
    encoder = tmp_path / "encoder"
    build_model("bert").bert.save_pretrained(encoder)
    build_tokenizer("bert").save_pretrained(encoder)
    err = fails("download_model.py", "bert", "--checkpoint", encoder, "-o", tmp_path / "out")
    assert "its weights are not those of a BertForSequenceClassification: it lacks classifier" in err
    assert "its head; start and train" in err
    other = tmp_path / "other"
    build_model("bert").save_pretrained(other)
    build_tokenizer("bert").save_pretrained(other)
    edited_json(other / "config.json", other / "config.json", lambda config: config.update(intermediate_size=8))
    err = fails("download_model.py", "bert", "--checkpoint", other, "-o", tmp_path / "out")
    assert "intermediate.dense.bias has another shape: (48,) in the file, (8,) by config.json" in err
    assert "say which one" in fails("download_model.py", "bert", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage ------------------------------------------------------------------------------------------------------


def test_activations_that_overflow_end_in_one_line_and_no_json(in_folder):
    """Every weight is finite, but no output is."""
    model = build_model("t5")
    with torch.no_grad():
        model.encoder.block[0].layer[0].layer_norm.weight.fill_(3e38)
        model.encoder.block[0].layer[0].SelfAttention.v.weight.fill_(10.0)
    record = (in_folder / "model" / "t5" / "record.json").read_text()
    model.save_pretrained(in_folder / "model" / "t5")
    (in_folder / "model" / "t5" / "record.json").write_text(record)
    run("config_generator.py", *T5)
    run("prune_scheme_generator.py")
    run("prune.py")
    err = fails("block-level_finetuning.py", "--method", "reconstruct", "--quiet")
    assert "not" in err and "damaged" in err
