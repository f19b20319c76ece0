"""Two processes that share the work come to what one comes to."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, fails, run
from tiny import build_model, examples

from common.runtime import processes
from common.runtime.devices import Runtime, computing, in_full_precision
from common.runtime.progress import Talk
from common.runtime.settings import TrainingSettings
from common.training.learner import Learner
from common.training.loop import pieces_of, run_pass
from common.training.losses import ModelObjective, RunningLosses


def start(lines, folder, count=2, program=ROOT / "experiments" / "stages.py"):
    """Run stages, one a line, in `count` processes that know each other; returns [(exit code, stdout, stderr)]."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as torchrun does: the store is here
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, program],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for process in running:
        process.stdin.write("".join(f"{line}\n" for line in lines))
        process.stdin.close()
    found = []
    for process in running:
        out, err = process.stdout.read(), process.stderr.read()
        found.append((process.wait(), out, err))
    return found


STAGES = {
    "reconstruct": "block-level_finetuning.py --method reconstruct -o {}/reconstruct --batch-size 8 --ridge 0.1 0.3",
    "rounds": "block-level_finetuning.py --method reconstruct --rounds 1 -o {}/rounds --batch-size 8 --ridge 0.1",
    "joint": "block-level_finetuning.py --method joint -o {}/joint --batch-size 8 --lr 0.0003 --ridge 0.1",
    "model": "model-level_finetuning.py -p modules-pruned -n 0 -o {}/model.pth --batch-size 7 --epochs 2 --lr 0.001",
    "evaluated": "evaluate-t5.py -m {}/model.pth -t tokenizer/t5 --data data/t5 --batch-size 1",
    "searched": "config_generator.py --search {}/reconstruct -c conf.json --budget 0.8 -o {}/found.json --batch-size 5",
}


@pytest.fixture(scope="module")
def runs(workshop, chain, tmp_path_factory):
    """What one process and what two print and leave: {"one" or "two": {stage: result}}, the folder."""
    folder = tmp_path_factory.mktemp("processes")
    for name, place in {
        "model": workshop / "model",
        "tokenizer": workshop / "tokenizer",
        "data": workshop / "data",
        "modules-pruned": chain / "pruned",
        "conf.json": chain / "conf.json",
    }.items():
        (folder / name).symlink_to(place)
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        (folder / name).mkdir()
        lines = [line.replace("{}", name) for line in STAGES.values()]
        lines = [line if "evaluate" in line else f"{line} -m model/t5" for line in lines]
        ends = start(lines, folder, count)
        assert [code for code, _, _ in ends] == [0] * count, "\n".join(err for _, _, err in ends)
        first, *others = ends
        assert all(out == "" for _, out, _ in others)  # the first alone speaks
        found[name] = dict(zip(STAGES, map(json.loads, first[1].splitlines()[::2]), strict=True))
    return found, folder


def tensors_of(library):
    return {path.name: np.load(path, allow_pickle=False) for path in sorted(library.glob("*.npy"))}


@pytest.mark.parametrize("method, tolerance", [("reconstruct", 2e-2), ("rounds", 2e-2), ("joint", 1e-2)])
def test_the_libraries_are_the_same_to_rounding(runs, method, tolerance):
    found, folder = runs
    one, two = tensors_of(folder / "one" / method), tensors_of(folder / "two" / method)
    assert one.keys() == two.keys() and len(one) >= 26
    for name, own in one.items():
        for field in own.dtype.names:
            other = two[name][field]
            if own[field].dtype == bool:
                assert (own[field] == other).all(), (name, field)
            else:
                np.testing.assert_allclose(other, own[field], rtol=tolerance, atol=tolerance, err_msg=f"{name} {field}")


def test_the_figures_are_the_same_to_rounding(runs):
    found, folder = runs
    one, two = found["one"], found["two"]
    assert two["reconstruct"]["nmse_after"] == pytest.approx(one["reconstruct"]["nmse_after"], rel=1e-3)
    assert two["reconstruct"]["fine_tuned"] == one["reconstruct"]["fine_tuned"] == 26
    assert two["joint"]["compositions"] == pytest.approx(one["joint"]["compositions"], rel=1e-3)
    assert two["model"]["val_loss"] == pytest.approx(one["model"]["val_loss"], rel=1e-4)
    assert two["evaluated"]["bleu"] == pytest.approx(one["evaluated"]["bleu"], abs=0.5)
    assert two["evaluated"]["examples"] == one["evaluated"]["examples"]
    assert two["searched"]["found"][0]["kl"] == pytest.approx(one["searched"]["found"][0]["kl"], rel=1e-2)
    scores = [
        json.loads((folder / name / "reconstruct" / "record.json").read_text())["variants"] for name in ("one", "two")
    ]
    for pair, entry in scores[0].items():
        assert scores[1][pair]["score"]["kl"] == pytest.approx(entry["score"]["kl"], rel=2e-2, abs=1e-4), pair


def test_the_loss_curves_are_the_same_to_rounding(runs):
    _, folder = runs
    for stats in ("joint.csv", "model.csv", "joint-compositions.csv"):
        rows = []
        for name in ("one", "two"):
            with open(folder / name / stats, newline="") as handle:
                rows.append(list(csv.DictReader(handle)))
        assert len(rows[0]) == len(rows[1]) > 1
        for own, other in zip(*rows):
            for column in {"train_loss", "val_loss"} & own.keys():
                if own[column]:
                    assert float(other[column]) == pytest.approx(float(own[column]), rel=2e-3), (stats, column)


def test_nothing_is_left_over(runs):
    _, folder = runs
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".checkpoint", ".pruning-part"))]
    assert left == []


@pytest.mark.parametrize("script", ["prune.py", "compose_model.py -n 0", "download_model.py t5-demo"])
def test_stages_that_do_not_share_work_refuse_several_processes(monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "2")
    err = fails(*shlex.split(script))
    assert "runs in one process; start it without torchrun" in err


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_copies_that_would_not_share_the_work_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    err = fails("model-level_finetuning.py -n 0")
    assert f"4 copies were started ({name})" in err


# --- a batch in pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_a_batch_in_pieces_makes_the_same_step(pieces):
    """Oracle: the whole batch, in float64."""
    data, found = examples("t5", 7), []
    for count in (1, pieces):
        model = build_model("t5").double().eval()
        recipe = TrainingSettings(epochs=1, batch_size=7, lr=1e-2, warmup=0.0, precision="fp32")
        learner = Learner(dict(model.named_parameters()), {}, recipe, 1)
        runtime = Runtime(torch.device("cpu"), 7, Talk(quiet=True), pieces=count)
        tally = RunningLosses(["x"])
        run_pass({"x": learner}, ModelObjective(model, recipe), data, [list(range(7))], runtime, "", tally)
        found.append((learner.parameters, tally.result().losses["x"], learner.steps))
    (one, loss, steps), (other, loss_in_pieces, steps_in_pieces) = found
    assert steps == steps_in_pieces == 1
    assert loss_in_pieces == pytest.approx(loss, rel=1e-6)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count, sizes", [(2, [4, 3]), (9, [1] * 7 + [1, 1])])
def test_the_shares_of_a_batch_add_up(count, sizes):
    data, own = examples("t5", 7), []
    for number in range(count):
        runtime = Runtime(torch.device("cpu"), 7, Talk(quiet=True), processes.Processes(number, count))
        own.append(pieces_of(list(range(7)), data, runtime))
    assert [sum(len(piece) for piece, _ in each) for each in own] == sizes
    assert sum(share for each in own for _, share in each) == pytest.approx(1)
    assert all(share == 0 for each in own[7:] for _, share in each)


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_forward_pass_computes_as_asked_and_what_is_solved_in_float32(precision, dtype):
    layer, device = torch.nn.Linear(4, 4), torch.device("cpu")
    solve = in_full_precision(lambda rows: (rows @ rows.T, torch.get_float32_matmul_precision()))
    with computing(device, precision):
        assert layer(torch.ones(2, 4)).dtype == dtype
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        product, inside = solve(torch.ones(2, 4))
        assert (product.dtype, inside) == (torch.float32, "highest")
    assert torch.get_float32_matmul_precision() == "highest" and layer.weight.dtype == torch.float32


def test_evaluation_and_scoring_in_bf16_say_so_and_come_near(workshop, chain, tmp_path):
    """Oracle: float32. Scores found in another precision are other scores."""
    found = {}
    for precision in ("fp32", "bf16"):
        how = ("--precision", precision)
        result = run(f"evaluate-distilbert.py -m {workshop}/model/distilbert", *how)
        assert result["precision"] == precision
        search = ("-m", workshop / "model" / "t5", "-c", chain / "conf.json", "--search", tmp_path / "tuned")
        shutil.copytree(chain / "tuned", tmp_path / "tuned", dirs_exist_ok=True)
        searched = run("config_generator.py", *search, "--budget", 0.7, "-o", tmp_path / precision, *how)
        found[precision] = searched["dense"]["loss"]
        again = run("config_generator.py", *search, "--budget", 0.7, "-o", tmp_path / f"{precision}-2", *how)
        assert (searched["scored"], again["scored"]) == (26, 0)
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
