"""The flags that a model or library was made with, out of its record: a file of flags, which makes it again.

In the folder where the stage ran (the clone; after pip install . any): python -m common.cli.settings
model-finetuned/0 > settings.txt, and then python model-level_finetuning.py @settings.txt, perhaps with further flags,
of which the last one counts.
"""

import shlex
import sys
from pathlib import Path

from common.cli.flags import Parser
from common.cli.launch import launch
from common.runtime.errors import UserError


def run(args):
    if not Path(args.output).exists():
        raise UserError(f"{args.output}: no such file or folder")
    from common.models.saving import record_of

    record = record_of(Path(args.output)) or {}
    if "flags" not in record:
        raise UserError(f"{args.output}: has no record with flags; give what a stage from prune.py on has made")
    return {"script": record["script"], "flags": record["flags"] | {"--output": args.output}}


def as_file(result):
    """The lines of an @FILE."""
    lines = [f"# python {result['script']} @settings.txt"]
    for flag, value in result["flags"].items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        lines.append(shlex.join([flag, *map(str, values)]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = Parser(__doc__, usage="python -m common.cli.settings OUTPUT > settings.txt")
    parser.add_argument("output", metavar="OUTPUT", help="a composed or fine-tuned model, or a library")
    sys.exit(launch(parser, run, text_of=as_file))
