"""The stages on a GPU, where there is one."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind, evaluate", [("t5", "evaluate-t5.py"), ("distilbert", "evaluate-distilbert.py")])
def test_every_stage_runs_on_the_gpu_and_agrees_with_the_cpu(workshop, tmp_path, monkeypatch, succeeds, kind, evaluate):
    """Oracle: the same stages on the CPU, to the rounding of float32."""
    monkeypatch.chdir(tmp_path)
    model, errors = workshop / "model" / kind, {}
    succeeds("config_generator.py", "-m", model, "--attention", 0.25, "--linear", 0.3, "-n", 1)
    succeeds("prune_scheme_generator.py")
    succeeds("prune.py", "-m", model)
    for device in ("cpu", "cuda"):
        common = ("-m", model, "--device", device, "--batch-size", 8)
        library = ("-o", f"tuned-{device}", "--stats", f"{device}.csv")
        errors[device] = succeeds("block-level_finetuning.py", *common, *library)["nmse_after"]
        succeeds("model-level_finetuning.py", *common, "-p", f"tuned-{device}", "-n", 0, "-o", device, "--epochs", 1)
        succeeds(evaluate, "-m", device, "--device", device, "--limit", 4)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=1e-2)
