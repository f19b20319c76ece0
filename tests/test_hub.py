"""Pushing to the hub, against a stand-in of it on this machine: what lies there afterwards, byte for byte."""

import huggingface_hub
import pytest
from helpers import call_apart, is_one_line
from stand_in import Hub

from common import hub as pushing
from common.cli import Talk
from common.errors import UserError

FLAGS = ["--quiet", "--compact", "--dtype", "float16"]


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which this process takes for the hub."""
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stand_in.address)  # it was made on import
    monkeypatch.setenv("HF_TOKEN", stand_in.token)
    yield stand_in
    stand_in.close()


@pytest.fixture
def composing(workshop, chain, tmp_path):
    where = ["-m", workshop / "model" / "t5", "-t", workshop / "tokenizer" / "t5", "-p", chain / "tuned"]
    return [*where, "-c", chain / "conf.json", *FLAGS]


def in_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_user_pushes_a_model(composing, tmp_path):
    """In a process of its own, with the address and the token that a user sets."""
    stand_in = Hub()
    done = call_apart(
        "compose_model.py",
        *composing,
        *("-n", 0, "-o", tmp_path / "m", "--push-to-hub", "me/small", "--private"),
        cwd=tmp_path,
        HF_ENDPOINT=stand_in.address,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_TOKEN=stand_in.token,
    )
    stand_in.close()
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert f'"pushed_to": "{stand_in.address}/me/small"' in done.stdout
    assert stand_in.files == {"me/small": in_folder(tmp_path / "m")}
    assert {"README.md", "config.json", "model.safetensors", "modeling_compact.py"} <= stand_in.files["me/small"].keys()
    assert stand_in.private == {"me/small": True}


def test_several_models_and_a_second_push(succeeds, composing, hub, tmp_path):
    """What is there already is pushed too; weights of an earlier push go, files of the user's own stay."""
    many = [*composing, "-n", 0, 1, "-o", tmp_path / "{n}", "--push-to-hub", "me/small-{n}"]
    results = succeeds("compose_model.py", *many)["models"]
    assert [each["pushed_to"] for each in results] == [f"{hub.address}/me/small-{n}" for n in (0, 1)]
    assert hub.private == {"me/small-0": False, "me/small-1": False}
    first = dict(hub.files["me/small-0"])
    hub.files["me/small-0"] |= {"LICENSE": b"mine", "model-00001-of-00002.safetensors": b"old"}
    succeeds("compose_model.py", *many)
    assert hub.files["me/small-0"] == first | {"LICENSE": b"mine"}
    assert first == in_folder(tmp_path / "0") and hub.files["me/small-1"] == in_folder(tmp_path / "1")


@pytest.mark.parametrize("broken, told", [("repos/create", "403"), ("commit", "403"), ("token", "401")])
def test_a_push_that_fails_is_one_line_and_the_folder_stays(call, composing, hub, tmp_path, monkeypatch, broken, told):
    hub.broken = (broken,)
    if broken == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    where = ["-n", 0, "-o", tmp_path / "m", "--push-to-hub", "me/small"]
    code, _, err = call("compose_model.py", *composing, *where)
    assert code == 2 and is_one_line(err) and told in err and "the same command tries again" in err
    assert f"{tmp_path / 'm'}: is there, but could not be pushed to me/small" in err
    there = in_folder(tmp_path / "m")
    assert "config.json" in there and not hub.files.get("me/small")
    hub.broken = ()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    code, result, _ = call("compose_model.py", *composing, *where)
    assert code == 0 and result["pushed_to"] and hub.files["me/small"] == there == in_folder(tmp_path / "m")


def test_nobody_there_is_one_line(hub, tmp_path):
    (tmp_path / "m").mkdir()
    hub.close()
    with pytest.raises(UserError, match="could not be pushed to me/small"):
        pushing.push(tmp_path / "m", "me/small", False, Talk(quiet=True))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-n", 0, 1, "-o", "{n}", "--push-to-hub", "me/small"], "--push-to-hub me/small: needs {n} in it"),
        (["-n", 0, "-o", "m.pth", "--push-to-hub", "me/small"], "--push-to-hub: m.pth is a .pth, and folders are"),
        (["-n", 0, "-o", "m", "--private"], "--private: goes with --push-to-hub"),
        (["-n", 0, "-o", "m", "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: "),
        (["-n", 0, "-o", "m", "--push-to-hub", "so bad"], "--push-to-hub so bad: "),
    ],
)
@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_pushes_that_cannot_be_are_refused_before_any_work(call, hub, tmp_path, monkeypatch, script, flags, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(script, *flags)
    assert code == 2 and is_one_line(err) and said in err
    assert hub.asked == [] and list(tmp_path.iterdir()) == []


def test_without_a_token_nothing_is_done(call, composing, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = call("compose_model.py", *composing, "-n", 0, "-o", tmp_path / "m", "--push-to-hub", "me/small")
    assert code == 2 and is_one_line(err) and "there is no token; log in with `hf auth login`, or set HF_TOKEN" in err
    assert hub.asked == [] and not (tmp_path / "m").exists()
