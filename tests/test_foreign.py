"""What people have, or another stage made, is never lost: not to any output, and not to --overwrite either."""

import os
import shutil
import stat

import pytest
from helpers import command_of, fails, files_in, good_flags, run


@pytest.fixture
def place(chain, workshop, tmp_path):
    """A folder with copies of the workshop's models and of what the chain made, and `mine`, a user's own file."""
    shutil.copytree(workshop, tmp_path / "workshop")
    shutil.copytree(chain, tmp_path / "chain")
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text('{"of": "the user"}')
    return tmp_path


@pytest.fixture
def command(place):
    """command(script, changes): good work in the folder, with some flags changed."""
    return lambda script, changes: command_of(
        script, good_flags(script, place / "workshop", place / "chain", place / "out") | changes
    )


@pytest.fixture
def loses_nothing(command, place):
    """loses_nothing(script, changes): the script refuses in one line, and all files are as they were; the line."""

    def refuses(script, changes, more=""):
        before = files_in(place)
        err = fails(f"{command(script, changes)} {more}")
        assert files_in(place) == before
        return err

    return refuses


@pytest.mark.parametrize(
    "script, flag, name",
    [
        ("compose_model.py", "-m", "workshop/model/t5"),
        ("compose_model.py", "-p", "chain/tuned"),
        ("model-level_finetuning.py", "--data", "workshop/data/t5"),
        ("prune_scheme_generator.py", "-i", "chain/conf.json"),
        ("plot_loss.py", "CSV", "chain/tuned-0.csv"),
    ],
)
def test_an_output_that_is_an_input_is_refused(loses_nothing, place, script, flag, name):
    err = loses_nothing(script, {flag: [place / name] if flag == "CSV" else place / name, "-o": place / name})
    assert name in err and flag in err


@pytest.mark.parametrize(
    "script, changes",
    [
        ("prune.py", {"-c": "chain/conf_prune.json", "-o": "workshop/model/t5"}),
        ("config_generator.py", {"-o": "workshop/model/t5/config.json"}),
        ("prune_scheme_generator.py", {"-o": "chain/conf.json"}),
        ("compose_model.py", {"-o": "chain/pruned"}),
        ("compose_model.py", {"-o": "chain/tuned-0.pth"}),  # which model-level_finetuning.py made
        ("model-level_finetuning.py", {"-o": "chain/composed-0"}),  # which compose_model.py made
        ("block-level_finetuning.py", {"--stats": "mine"}),
        ("model-level_finetuning.py", {"--stats": "chain/pruned"}),
    ],
)
def test_what_another_script_or_person_made_is_not_even_replaced_when_asked(loses_nothing, place, script, changes):
    changes = {flag: place / path for flag, path in changes.items()}
    more = "" if script == "prune_scheme_generator.py" else "--overwrite"  # it replaces what nobody edits alone
    assert str([*changes.values()][-1]) in loses_nothing(script, changes, more)


@pytest.mark.parametrize("name", ["mine", "workshop/model/t5/config.json"])
def test_a_report_replaces_no_other_file(loses_nothing, place, name):
    assert str(place / name) in loses_nothing("evaluate-t5.py", {"--report": place / name})


@pytest.mark.parametrize(
    "script, flag",
    [
        ("model-level_finetuning.py", "--stats"),
        ("evaluate-t5.py", "--report"),
        ("config_generator.py", "-o"),
        ("plot_loss.py", "-o"),
    ],
)
def test_a_device_is_no_place_for_an_output(loses_nothing, place, script, flag):
    """A pipe stands for /dev/null here, which a failing test would take away from root."""
    device = place / ("pipe.png" if script == "plot_loss.py" else "pipe")
    os.mkfifo(device)
    more = "" if script.startswith(("evaluate", "plot_loss")) else "--overwrite"
    assert "neither a file nor a folder" in loses_nothing(script, {flag: device}, more)
    assert stat.S_ISFIFO(device.stat().st_mode)


def test_files_that_only_have_such_names_stay(command, place):
    out = place / "out"
    names = ["model.pth.checkpoint", ".model.pth.old", ".model.pth.part", "model.pth.0123456789ab.checkpoint"]
    for name in names:
        (out / name).write_text("mine")
    run(command("model-level_finetuning.py", {}))
    assert {name: (out / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    assert {path.name for path in out.iterdir()} == {*names, "model.pth", "stats.csv"}


@pytest.mark.parametrize("part", ["data", "tokenizer", "model"])
def test_a_demo_replaces_no_folder_of_the_users(here, part):
    """Before any of its work: the test would take minutes otherwise."""
    (here / part / "mine").mkdir(parents=True)
    (here / part / "mine" / "train.en").write_text("a sentence\n")
    before = files_in(here)
    assert f"{part}/mine" in fails("download_model.py t5-demo --name mine --overwrite")
    assert files_in(here) == before
