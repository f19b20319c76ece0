"""Pushing to the hub: what its client is asked to do, and what is refused before any work."""

import huggingface_hub
import pytest
from helpers import is_one_line
from huggingface_hub import RepoUrl


@pytest.fixture
def composing(workshop, chain, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    where = ["-m", workshop / "model" / "t5", "-t", workshop / "tokenizer" / "t5", "-p", chain / "tuned"]
    return [*where, "-c", chain / "conf.json", "-n", 0, "-o", tmp_path / "m", "--push-to-hub", "me/small"]


def test_a_folder_is_pushed_and_a_failure_is_one_line(call, succeeds, composing, tmp_path, monkeypatch):
    pushed = []

    def fail(**asked):
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, exist_ok: RepoUrl(f"https://huggingface.co/{name}")
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    code, _, err = call("compose_model.py", *composing, "--quiet")
    assert code == 2 and is_one_line(err) and (tmp_path / "m" / "config.json").is_file()
    assert "could not be pushed to me/small (the same command tries again): nobody there" in err
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **asked: pushed.append(asked))
    assert succeeds("compose_model.py", *composing)["pushed_to"] == "https://huggingface.co/me/small"
    assert [(asked["repo_id"], str(asked["folder_path"])) for asked in pushed] == [("me/small", str(tmp_path / "m"))]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-n", 0, 1, "-o", "{n}", "--push-to-hub", "me/small"], "--push-to-hub me/small: needs {n} in it"),
        (["-n", 0, "-o", "m.pth", "--push-to-hub", "me/small"], "--push-to-hub: m.pth is a .pth, and folders are"),
        (["-n", 0, "-o", "m", "--push-to-hub", "so bad"], "--push-to-hub so bad: is no id of a repository"),
        (["-n", 0, "-o", "m", "--push-to-hub", "me/small"], "--push-to-hub: there is no token; log in with"),
    ],
)
@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_pushes_that_cannot_be_are_refused_before_any_work(call, tmp_path, monkeypatch, script, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = call(script, *flags)
    assert code == 2 and is_one_line(err) and said in err and list(tmp_path.iterdir()) == []
