"""Write the tables of docs/results.md: what stands between `<!-- table NAME -->` and `<!-- end -->` is made of
benchmarks/results/NAME.json.

Such a file holds "command", "commit" (null where it is not known), "machine", "seed", "conditions" (a sentence or two),
"columns" ({name: format of its numbers, "" for text}) and "rows". A number that was not measured is null.
"""

import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
DOCUMENT = FOLDER.parent.parent / "docs" / "results.md"
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def cell(value, form):
    return "–" if value is None else str(value) if isinstance(value, str) else format(value, form)


def table(result):
    """The lines of a Markdown table."""
    names, forms = list(result["columns"]), list(result["columns"].values())
    rows = [[cell(value, form) for value, form in zip(row, forms, strict=True)] for row in result["rows"]]
    return ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]


def section(name):
    """A table below its conditions; its command is in the file that is linked."""
    result = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    where = [result["machine"], "no seed" if result["seed"] is None else f"seed {result['seed']}"]
    where += [f"commit {result['commit']}"] * bool(result["commit"])
    command = f"[command](../benchmarks/results/{name}.json)"
    return "\n".join([f"{result['conditions']} {'; '.join([*where, command])}.", "", *table(result)])


def rendered(text):
    """A document with its tables made anew."""
    return TABLE.sub(lambda match: f"{match[1]}{section(match[2])}\n{match[3]}", text)


def main():
    DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
