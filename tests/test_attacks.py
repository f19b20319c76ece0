"""Attacks in small: a few kills, full disks and damaged files for every stage; benchmarks/ has all of them."""

import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import attack
import faults
import fuzz

STAGES = ("scheme", "prune", "reconstruct", "train", "compose", "compose-over", "finetune-pth", "plot")
FORMATS = {
    "conf.json": ("scheme", fuzz.change_json),
    "conf_prune.json": ("prune", fuzz.change_json),
    "model/t5/config.json": ("prune", fuzz.change_json),
    "model/t5/record.json": ("prune", fuzz.change_json),
    "model/t5/model.safetensors": ("prune", fuzz.change_safetensors),
    "tokenizer/t5/tokenizer.json": ("reconstruct", fuzz.change_json),
    "pruned/record.json": ("reconstruct", fuzz.change_json),
    "baseline-0.csv": ("plot", fuzz.change_text),
}


@pytest.fixture(scope="module")
def shop():
    with attack.scratch() as folder:
        yield attack.Workshop(folder / "shop").build(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_leaves_what_an_undisturbed_one_leaves(shop, tmp_path, name):
    """Killed before its first, its last but one and two other operations; oracle: the same stage, undisturbed."""
    stage = attack.STAGES[name]
    wanted, operations, _ = faults.undisturbed(shop, tmp_path, stage)
    last = len(operations) - 1
    for at in sorted({0, last // 3, 2 * last // 3, last - 1}):
        assert faults.killed(shop, tmp_path, stage, wanted, at) == [], operations[at]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_whose_disk_is_full_says_so_in_one_line_and_loses_nothing(shop, tmp_path, name):
    stage = attack.STAGES[name]
    wanted, operations, _ = faults.undisturbed(shop, tmp_path, stage)
    for at in [len(operations) // 2]:
        assert faults.full(shop, tmp_path, stage, wanted, at, "ENOSPC") == [], operations[at]


@pytest.mark.parametrize("path", FORMATS)
def test_a_damaged_file_is_refused_in_one_line_or_changes_nothing_else(shop, tmp_path, path):
    name, change = FORMATS[path]
    stage = attack.STAGES[name]
    for seed in range(3):
        draw = fuzz.random.Random(seed)
        folder = shop.lay_out(stage, attack.fresh(tmp_path))
        damage = (change, fuzz.change_bytes)[seed % 2](folder / path, draw)
        before = attack.contents(folder)
        done = shop.run(stage, folder)
        assert done.verdict is None, (seed, damage, done.err)
        after = attack.contents(folder)
        assert [each for each in before if after.get(each) != before[each]] == [], (seed, damage)


def test_operations_are_counted_and_killed_one_by_one(shop, tmp_path):
    """By hand: a JSON file is made under another name, written, given its mode, synced and renamed, in this order."""
    stage = attack.STAGES["scheme"]
    _, operations, _ = faults.undisturbed(shop, tmp_path, stage)
    kinds = [operation.split()[0] for operation in operations]
    order = [kinds.index(kind) for kind in ("tempfile.mkstemp", "write", "os.fsync", "os.rename")]
    assert order == sorted(order)
    folder = shop.lay_out(stage, attack.fresh(tmp_path))
    watch = attack.Watch(folder, kinds.index("os.rename"))
    assert shop.run(stage, folder, before=watch.install).code == -9
    assert not (folder / "conf_prune.json").exists()
