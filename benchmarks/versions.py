"""Do compact folders load with other versions of transformers, and compute the same there?

    python benchmarks/versions.py PYTHON…

Each PYTHON is the interpreter of an environment with torch and another transformers. A tiny compact model of every
family is written here, once with some heads and neurons and once with blocks left out. Each environment loads all of
them as a user would and compares its logits and greedy tokens with those of here. A folder that needs a later version
must be refused. Ends with 1 if one of them was neither equal nor refused.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tiny models are those of the tests

import torch  # noqa: E402
from helpers import CLASSIFIERS, MODELS, build_model, padded_batch  # noqa: E402

from common.blocks import find_blocks  # noqa: E402
from common.compact import make_compact  # noqa: E402
from common.models import save_model  # noqa: E402

TOLERANCE = 1e-4  # of logits of about 1 to 10, in float32
LOADER = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
found = {}
for name, auto in json.loads(sys.argv[2]).items():
    folder = f"{sys.argv[1]}/{name}"
    expected = torch.load(f"{folder}.pt", weights_only=True)
    try:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    except ImportError as error:
        found[name] = "refused" if "is required" in str(error) else str(error)
        continue
    with torch.no_grad():
        far = (model(**expected["batch"]).logits - expected["logits"]).abs().max().item()
    inputs = {each: expected["batch"][each] for each in ("input_ids", "attention_mask")}
    if "tokens" in expected:
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=10)
        far = far if torch.equal(tokens, expected["tokens"]) else float("inf")
    found[name] = far
print(json.dumps({"transformers": transformers.__version__, "found": found}))
"""


@torch.no_grad()
def write(folder):
    """Write the models, and beside each what it gives; returns {name: auto class}."""
    autos = {}
    for kind in MODELS:
        for part in ("some", "none"):
            model, name = build_model(kind), f"{kind}-{part}"
            for number, block in enumerate(find_blocks(model).values()):
                out = model.get_submodule(f"{block.root}.{block.linears[-1]}")
                width, size = out.in_features, block.heads or block.neurons
                left = size // 2 if part == "some" else size * (number % 2)
                out.weight[:, torch.arange(width) >= left * (width // size)] = 0
            compact = make_compact(model, {})[0].eval()
            save_model(folder / name, compact, {})
            batch = padded_batch(kind)
            expected = {"batch": batch, "logits": compact(**batch).logits}
            if compact.can_generate():
                inputs = {each: batch[each] for each in ("input_ids", "attention_mask")}
                expected["tokens"] = compact.generate(**inputs, do_sample=False, max_new_tokens=10)
            torch.save(expected, folder / f"{name}.pt")
            is_classifier = kind in CLASSIFIERS
            autos[name] = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForSeq2SeqLM"
    return autos


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", nargs="+", help="interpreter of an environment with another transformers")
    failed = False
    with tempfile.TemporaryDirectory() as place:
        autos = write(Path(place))
        for number, python in enumerate(parser.parse_args().python):
            modules = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules-{number}"}
            command = [python, "-c", LOADER, place, json.dumps(autos)]
            done = subprocess.run(command, text=True, capture_output=True, env=os.environ | modules)
            if done.returncode:
                print(done.stderr)
                failed = True
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            found = result["found"]
            refused = sorted(name for name, far in found.items() if far == "refused")
            wrong = {name: far for name, far in found.items() if far != "refused" and not far <= TOLERANCE}
            failed |= bool(wrong)
            print(
                f"transformers {result['transformers']}: {len(found) - len(refused) - len(wrong)} of {len(found)} equal"
                + (f"; refused: {', '.join(refused)}" if refused else "")
                + (f"; NOT EQUAL: {wrong}" if wrong else "")
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
