"""`python -m common.cli.check`: every output of the chain is whole, and one changed bit of any file is found."""

import shutil

import pytest
from helpers import ROOT, call_apart, is_one_line, read_json

from common.cli import check
from common.runtime.errors import UserError

OUTPUTS = ["pruned", "tuned", "composed-0", "tuned-0.pth", "conf_prune.json"]


@pytest.fixture
def outputs(chain, tmp_path):
    return shutil.copytree(chain, tmp_path / "chain")


def test_what_the_stages_made_is_whole(outputs):
    """By hand: a library has a file for each variant, and its record."""
    found = check.check_all([outputs / name for name in OUTPUTS])["checked"]
    assert found[outputs / "tuned"] == len(read_json(outputs / "tuned" / "record.json")["variants"]) + 1
    assert found[outputs / "composed-0"] == len(list((outputs / "composed-0").iterdir()))
    assert (found[outputs / "tuned-0.pth"], found[outputs / "conf_prune.json"]) == (1, 1)


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_flipped_bit_is_found_in_every_file(outputs, name):
    path = outputs / name
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.name != ".lock"]
    for file in files:
        content = file.read_bytes()
        for place in (len(content) // 3, len(content) // 2):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            try:
                with pytest.raises(UserError, match=str(outputs)):
                    check.check(path)
            finally:
                file.write_bytes(content)
        if file != path:
            file.unlink()
            with pytest.raises(UserError, match=file.name if file.name != "record.json" else name):
                check.check(path)
            file.write_bytes(content)
    assert check.check(path)


def test_the_command_answers_as_the_scripts_do(outputs, tmp_path):
    def run(*arguments):
        return call_apart("common/cli/check.py", *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))

    good = run(outputs / "tuned")
    assert (good.returncode, good.stderr) == (0, "") and '"checked"' in good.stdout
    (outputs / "tuned" / "record.json").write_text("{}")
    bad = run(outputs / "tuned")
    assert (
        (bad.returncode, bad.stdout) == (2, "")
        and is_one_line(bad.stderr)
        and "common.cli.check: error: " in bad.stderr
    )
