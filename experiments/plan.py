#!/usr/bin/env python3
"""Plan the suite's stages that stand on stdin, one a line, and add up what they take: --plan of the experiments.

It runs in a folder that is thrown away. A stage that takes long is planned, and then run on eight examples without
training, so that what it leaves has the shapes that the plans of the next ones need. Models to evaluate are planned as
the original, since what untrained ones answer is longer. The other stages are run as they are. FILE keeps the plans;
at the end of stdin they are told, with their sum.
"""

import contextlib
import io
import json
import shlex
import sys
import time
from pathlib import Path

from stages import REPOSITORY, run

sys.path.insert(0, str(REPOSITORY))  # where the stages find `common`

from common.pruning.criteria import CRITERIA  # noqa: E402
from common.runtime.progress import duration  # noqa: E402

FEW = ["--limit", "8", "--quiet", "--overwrite"]
STAND_INS = {  # flags with which a stage is soon done
    "prune.py": ["--calibration", "8", *FEW],
    "block-level_finetuning.py": ["--calibration", "8", "--epochs", "0", *FEW],
    "model-level_finetuning.py": ["--epochs", "0", *FEW],
}


def values_of(arguments, flag):
    """Where the values of a flag are."""
    first = arguments.index(flag) + 1
    return slice(first, next((n for n in range(first, len(arguments)) if arguments[n].startswith("-")), len(arguments)))


def is_short(script, arguments):
    """Whether a stage is run as it is."""
    if script == "prune.py":
        return (
            "--criterion" not in arguments or not CRITERIA[arguments[values_of(arguments, "--criterion")][0]].needs_data
        )
    return script not in STAND_INS and not script.startswith("evaluate")


def planned(script, arguments, original):
    """{"seconds", "peak_memory", "disk", "steps"} of a stage, and a stand-in for its output; exits if a stage fails."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        started = time.monotonic()
        if is_short(script, arguments):
            check(run(shlex.join([script, *arguments])))
            return {"seconds": time.monotonic() - started}
        models = 1
        if script not in STAND_INS:
            places = values_of(arguments, "-m")
            models, arguments[places] = len(arguments[places]), [original]
        check(run(shlex.join([script, *arguments, "--plan", "--quiet"])))
        found = json.loads(out.getvalue())["plan"]
        if script in STAND_INS and set(found["outputs"]) != {"there"}:
            check(run(shlex.join([script, *arguments, *STAND_INS[script]])))
    return found | {"seconds": models * found["seconds"]}


def check(code):
    if code:
        sys.exit(code)


def tell(rows):
    """The table of the plans, {"stage", "seconds", …} each, with their sum; on stderr."""
    for row in rows:
        outputs = "; ".join(f"{len(names)} {state}" for state, names in row.get("outputs", {}).items())
        row = {"steps": 0, "peak_memory": 0, "disk": 0} | row
        memory, disk = row["peak_memory"] >> 20, row["disk"] >> 20
        line = f"{row['stage']:28.28} {row['steps']:>8,} steps {duration(row['seconds']):>12} {memory:>7,} MiB "
        print(f"{line}{disk:>7,} MiB on disk  {outputs}", file=sys.stderr)
    seconds, disk = (sum(row.get(name, 0) for row in rows) for name in ("seconds", "disk"))
    memory = max(row.get("peak_memory", 0) for row in rows)
    print(f"in all {duration(seconds)}, {memory >> 20:,} MiB of memory, {disk >> 20:,} MiB on disk", file=sys.stderr)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [shlex.split(line) for line in sys.stdin if line.strip()]
    for script, *arguments in lines:
        original = next((row["original"] for row in rows if row["original"]), None)
        if script in STAND_INS and not original:
            original = arguments[values_of(arguments, "-m")][0]
        if script == "experiments/explore.py":
            print(f"{script}, and what follows: depends on how good the models are, not planned", file=sys.stderr)
            break
        rows.append({"stage": script, "original": original} | planned(script, arguments, original))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not lines:
        tell(rows)
