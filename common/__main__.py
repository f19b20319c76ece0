"""The stages as one command: `composable-pruning STAGE …`, or `python -m common STAGE …` in a clone."""

import ast
import runpy
import sys
from pathlib import Path

from . import __version__

FOLDER = Path(__file__).resolve().parent.parent  # the scripts' and this package's, in a clone and installed
SCRIPTS = (
    "download_model.py", "config_generator.py", "prune_scheme_generator.py", "prune.py", "compose_model.py",
    "block-level_finetuning.py", "model-level_finetuning.py", "evaluate-t5.py", "evaluate-distilbert.py",
    "plot_loss.py",
)  # fmt: skip
STAGES = {name.removesuffix(".py").replace("_", "-"): FOLDER / name for name in SCRIPTS}


def usage():
    """The stages, each with the first line of its script."""
    lines = ["usage: composable-pruning STAGE [--help | flags of the stage]", "", "stages, in order:"]
    for stage, path in STAGES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {stage:25} {text.partition(chr(10))[0]}")
    return "\n".join(lines)


def main():
    """Run a stage's script as if it had been started itself; the exit code is the script's."""
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in ("-h", "--help"):
        print(usage())
    elif stage == "--version":
        print(f"composable-pruning {__version__}")
    elif stage in STAGES:
        sys.argv = [str(STAGES[stage]), *sys.argv[2:]]
        sys.path.insert(0, str(FOLDER))  # so that scripts find `common`, which is no package of its own once installed
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        print(f"composable-pruning: error: no stage {stage!r}; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
