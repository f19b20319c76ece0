"""Plans: nothing is written, the steps are those of the run, what is there is known. Settings out of records."""

import contextlib
import io
import os
import runpy
import signal
import sys
import time

import pytest
from helpers import files_in, outcome, run, touched

from common.runtime import plan
from common.training import stats

TRAIN, BATCH = 48, 4  # examples of the tiny data, and of a batch: 12 steps an epoch, of which a plan takes few
LONG = {
    "prune": "prune.py {model} -c {chain}/conf_prune.json -o pruned --criterion reconstruction --plain-heads",
    "joint": "block-level_finetuning.py {model} -p {chain}/pruned -o tuned --method joint --epochs 3",
    "apart": "block-level_finetuning.py {model} -p {chain}/pruned -o tuned --method both --epochs 3 --early-stop 0",
    "closed": "block-level_finetuning.py {model} -p {chain}/pruned -o tuned --method reconstruct --rounds 1",
    "model": "model-level_finetuning.py {model} -p {chain}/pruned -c {chain}/conf.json -n 0 1 -o tuned-{{n}} "
    "--epochs 3 --dtype float16",
    "evaluate": "evaluate-t5.py {model} --report report.json --save-predictions said.jsonl --bootstrap 10",
}
STEPS = {"joint": 3, "apart": 3, "model": 2 * 3}  # epochs of 12 steps


def test_the_clock_goes_on_as_if_all_items_had_been_run(monkeypatch):
    """Oracle: the sum of what all items take, by a clock that they move; the first one takes longer."""
    clock, run_items = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    items = [1, 2, 5] * 40
    with plan.opened(True) as planned:
        for item in planned.few(items, "outer", float):
            for _ in planned.few(range(20), "inner", lambda _: 1):
                clock[0] += item * 0.01
            clock[0] += 0 if run_items else 7.0  # what is done at the first time alone
            run_items.append(item)
        assert plan.skipped() + clock[0] == pytest.approx(sum(items) * 20 * 0.01)
    assert len(run_items) < 20 and set(run_items) == {1, 2, 5} and run_items[0] == 5
    assert planned.parts["outer"] == [120, pytest.approx(sum(items) * 0.2)] and plan.skipped() == 0


@pytest.mark.parametrize("stage", LONG)
def test_a_plan_writes_nothing_and_knows_the_steps(chain, t5, here, stage, monkeypatch):
    """Oracles: the files before and after; epochs times batches; the run itself, which the next plan knows of."""
    command = LONG[stage].format(model=f"-m {t5}", chain=chain) + f" --batch-size {BATCH}"
    monkeypatch.setattr(plan, "WHOLE", 1)  # else next to all loops of a tiny model are run whole
    before = touched(chain)
    code, result, err = outcome(f"{command} --plan")
    planned = result["plan"]
    assert code == 0 and "nothing was written" in err
    assert list(here.iterdir()) == [] and touched(chain) == before
    assert planned["steps"] == STEPS.get(stage, 0) * TRAIN // BATCH
    assert planned["peak_memory"] > 0 and planned["seconds"] > 0 and planned["parts"]
    if stage == "evaluate":
        return
    done = run(command)
    assert done["took"].keys() == {"seconds", "peak_memory"} and set(planned["outputs"]) == {plan.MISSING}
    size = sum(path.stat().st_size for path in files_in(here) if path.suffix in (".npy", ".safetensors"))
    if stage == "prune":  # elsewhere the state of the unfinished run comes on top
        assert planned["disk"] == pytest.approx(size, rel=0.3)  # of these files a good part is names and headers
    assert planned["disk"] > 0.7 * size
    after = touched(here)
    again = run(f"{command} --plan")["plan"]
    assert again["outputs"] == {plan.THERE: planned["outputs"][plan.MISSING]} and touched(here) == after
    assert (again["steps"], again["parts"], again["disk"]) == (0, [], 0)


def test_a_plan_says_which_part_of_the_key_changed_and_where_an_unfinished_run_is(chain, t5, here, monkeypatch):
    command = f"model-level_finetuning.py -m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0 --batch-size {BATCH}"
    run(f"{command} -o done --epochs 0")
    (state,) = run(f"{command} -o done --epochs 1 --overwrite --plan")["plan"]["outputs"]
    assert "epochs: 0 there, 1 asked for" in state

    calls = iter([None, None, signal.SIGINT])  # at the end of the second epoch, whose state is saved then
    with monkeypatch.context() as patched:
        patched.setattr(stats, "write_stats", lambda *_: (number := next(calls)) and os.kill(os.getpid(), number))
        assert outcome(f"{command} -o tuned --epochs 4")[0] == 130
    planned = run(f"{command} -o tuned --epochs 4 --plan")["plan"]
    assert planned["outputs"] == {"missing": ["tuned"], "unfinished, after epoch 2": ["tuned.unfinished.checkpoint"]}
    assert planned["steps"] == 2 * TRAIN // BATCH


SETTINGS = {
    "1": "model-level_finetuning.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 2 1 -o 'a b/{{n}}' --epochs 1",
    "1.pth": "compose_model.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 1 -o 'a b/1.pth'",
    "library": "block-level_finetuning.py -m {t5} -p {chain}/pruned -o 'a b/library' --method both --epochs 1 "
    "--lr 1e-3 --ridge 0.001 0.01",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_record_makes_its_output_again(chain, t5, here, name, monkeypatch):
    """Oracles: the files' times, and their bytes where they are made a second time."""
    command = SETTINGS[name].format(t5=t5, chain=chain)
    run(command)
    monkeypatch.setattr(sys, "argv", ["settings", f"a b/{name}"])
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        runpy.run_module("common.cli.settings", run_name="__main__")
    (here / "settings.txt").write_text(out.getvalue())
    script, before = command.split()[0], touched(here)
    assert script in out.getvalue().splitlines()[0]
    again = run(f"{script} @settings.txt")
    assert touched(here) == before and again.get("skipped", True)
    run(f"{script} @settings.txt -o b/{name}")
    first, second = ({path.name: path for path in files_in(here / folder)} for folder in ("a b", "b"))
    outputs = [file for file in second if not file.endswith(".csv")]
    assert outputs and all(first[file].read_bytes() == second[file].read_bytes() for file in outputs)
