#!/usr/bin/env python3
"""Run the suite's stages that stand on stdin, one a line, in this one process; stop at the first that fails.

The lines are commands without "python": "prune.py -m model -o pruned". Importing torch and transformers takes longer
than many a stage, and this way it is done once. Results go to stdout, one line of JSON each, and behind each of them
{"command", "experiment": the command that runs all this (the variable EXPERIMENT), "seconds"}. The conversation goes to
stderr, as ever. The exit code is that of the stage that failed, else 0.
"""

import json
import os
import runpy
import shlex
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run(line):
    """Run a stage; returns its exit code."""
    script, *arguments = shlex.split(line)
    sys.argv = [str(REPOSITORY / script), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def wait_for_others():
    """Of several processes that share the work, the others may read what the first has yet to write."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.barrier()


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # where the stages find `common`
    for stage in filter(str.strip, sys.stdin.readlines()):
        started = time.monotonic()
        if code := run(stage):
            sys.exit(code)
        if os.environ.get("RANK", "0") == "0":
            seconds = round(time.monotonic() - started, 3)
            ran = {
                "command": shlex.join(shlex.split(stage)),
                "experiment": os.environ.get("EXPERIMENT"),
                "seconds": seconds,
            }
            print(json.dumps(ran), flush=True)
        wait_for_others()
