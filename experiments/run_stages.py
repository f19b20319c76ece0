#!/usr/bin/env python3
"""Run the suite's scripts one after another in this one process: what they import takes longer than many of them do.

A command on stdin is a number, a script's name and so many arguments, each ended by a NUL. The answer on stdout is one
line: the script's exit code, a space, and the line that it printed. Logs and errors go to stderr as ever.
"""

import contextlib
import io
import runpy
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def fields(stream):
    """Yield the NUL-ended fields of a binary stream."""
    field = bytearray()
    while byte := stream.read(1):
        if byte == b"\0":
            yield field.decode()
            field.clear()
        else:
            field += byte


def run(script, arguments):
    """A script's exit code and what it printed."""
    printed = io.StringIO()
    sys.argv = [str(REPOSITORY / script), *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code, printed.getvalue()
    return 0, printed.getvalue()


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # bash has what it starts in the background ignore it
    sys.path.insert(0, str(REPOSITORY))
    given, code = fields(sys.stdin.buffer), 0
    with contextlib.suppress(KeyboardInterrupt):
        while code != 130 and (count := next(given, None)) is not None:
            code, printed = run(next(given), [next(given) for _ in range(int(count))])
            print(code, printed.rstrip("\n"), flush=True)


if __name__ == "__main__":
    main()
