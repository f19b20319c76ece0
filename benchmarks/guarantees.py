"""What the guarantees cost: a library written and read with locks and digests, and the digest of a large model.

With --against, another checkout of the suite (say, one of before) does the same, in turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, build_parser, cli, emit, in_turn, machine, ratio

from common.devices import resolve_device
from common.errors import UserError

# Writes as many variants of a feed-forward block as are asked for, one by one, as the stages do, and reads them all.
PROGRAM = """
import json, sys, tempfile, time
import torch, transformers
from common.blocks import Variant, block_tensors, find_blocks
from common.library import PRUNED, Library

count, width = map(int, sys.argv[1:])
config = transformers.T5Config(d_model=width, d_ff=4 * width, num_layers=1, num_heads=2, d_kv=8, vocab_size=64)
model = transformers.T5ForConditionalGeneration(config)
block = [block for name, block in find_blocks(model).items() if "DenseReluDense" in name][0]
tensors = block_tensors(model, block)
keeps = {linear: torch.ones_like(tensors[linear + ".weight"], dtype=torch.bool) for linear in block.linears}
variant, identity = Variant(block, tensors, keeps), {"name": "m", "type": "t5", "fingerprint": "f"}
with tempfile.TemporaryDirectory(dir=".") as folder:
    started = time.perf_counter()
    library = Library.open_or_create(folder + "/library", "prune.py", identity, PRUNED)
    for i in range(count):
        library.write(f"variant-{i}", variant, {"i": i})
    written = time.perf_counter()
    library = Library.open(folder + "/library", "f")
    for i in range(count):
        library.read(block, f"variant-{i}")
    print(json.dumps({"write": written - started, "read": time.perf_counter() - written}))
"""


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--variants", type=cli.positive, default=400, help="in the library")
    flags.add_argument("--width", type=cli.positive, default=128, help="of the model whose feed-forward block it holds")
    flags.add_argument("--megabytes", type=cli.positive, default=1000, help="size of the weights to take a digest of")
    flags.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this suite")
    return flags


def run(args):
    emit(**machine(resolve_device(args.device)))
    if args.against and not (args.against / "common").is_dir():
        raise UserError(f"--against {args.against}: is no checkout of this suite")
    checkouts = {"here": ROOT, **({"against": args.against} if args.against else {})}
    seconds = {name: {"write": [], "read": []} for name in checkouts}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            for part, took in library_seconds(checkout, args.variants, args.width).items():
                seconds[name][part].append(took)
    figures = {
        f"{part}_seconds": {name: round(statistics.median(each[part]), 3) for name, each in seconds.items()}
        for part in ("write", "read")
    }
    if args.against:
        figures |= {
            f"{part}_ratio": ratio(seconds["here"][part], seconds["against"][part]) for part in ("write", "read")
        }
    return {"variants": args.variants, "width": args.width, "rounds": args.rounds, **figures, **digest_seconds(args)}


def library_seconds(checkout, variants, width):
    """Seconds of writing and of reading a library with the code of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(variants), str(width)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise UserError(f"{checkout}: the library was not written; what it said is above")
    return json.loads(done.stdout)


def digest_seconds(args):
    """What checking a model's weights adds to loading them: both from memory, the file having just been written."""
    import torch
    from safetensors.torch import load_file, save_file

    from common.records import file_digest

    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "model.safetensors", args.megabytes * 10**6 // 4 // 1000
        save_file({f"w{i}": torch.rand(max(1, rows // 10), 1000) for i in range(10)}, path)
        ways = {
            "digest": lambda: file_digest(path),
            "load": lambda: [tensor.clone() for tensor in load_file(path).values()],
        }
        seconds = in_turn(ways, args.rounds, torch.device("cpu"))
        size = path.stat().st_size
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "weights_megabytes": round(size / 1e6),
        "digest_seconds": round(medians["digest"], 3),
        "digest_megabytes_per_second": round(size / 1e6 / medians["digest"]),
        "load_seconds": round(medians["load"], 3),
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
