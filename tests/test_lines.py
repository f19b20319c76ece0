"""What is a line, and what is not, in every kind of file. Oracle: the texts that were written."""

import csv
import io
import json
import re

import pytest

from common.data.sources import DataSource
from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.runtime.errors import UserError

TRANSLATION = TASKS["translation"]
PAIRS = [
    ("a carriage\rreturn", "ein\rRücklauf\rhier"),
    ("no break", "kein Umbruch"),
    ("a separator\u2028here", "zwei\u2028hier\u2029da"),
    ("old\x0bfeeds\x0cand\x1cmore", "next\x85line"),
    ("a nul\x00byte", "links \u05d0\u05d1\u05d2 rechts \u202e?"),
    ("the last", "x"),
]


def text_of(kind, end):
    """The pairs as a file of some kind, whose lines end so, with a byte order mark and an empty line."""
    if kind in ("en", "de"):
        lines = [pair[kind == "de"] for pair in PAIRS]
    elif kind == "jsonl":
        lines = [json.dumps(dict(zip(("en", "de"), pair)), ensure_ascii=False) for pair in PAIRS]
    elif kind == "tsv":
        lines = ["\t".join(pair) for pair in [("en", "de"), *PAIRS]]
    elif kind == "csv":
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("en", "de"), *PAIRS])
        lines = out.getvalue().split("\n")[:-1]
    else:
        lines = json.dumps([dict(zip(("en", "de"), pair)) for pair in PAIRS], indent=1).split("\n")
    return "\ufeff" + "".join(line + end for line in [*lines[:2], "", *lines[2:], ""])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["text", "csv", "tsv", "jsonl", "json"])
def test_a_line_feed_alone_ends_a_line(here, kind, end):
    """Beside each other, in a folder and as files; text files in a folder are torchtext's Multi30K."""
    for name in ("en", "de") if kind == "text" else (kind,):
        (here / f"train.{name}").write_bytes(text_of(name, end).encode())
    file = "train.en" if kind == "text" else f"train.{kind}"
    for source in (DataSource(data="."), DataSource(train_file=file)):
        train, held_out = (read_texts(source, split, TRANSLATION) for split in ("train", "validation"))
        assert sorted(train + held_out) == sorted(PAIRS), source


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.en", "a\n\nc\n", "a.en: line 2 is empty in one language alone; of lines with a text are 2 in a.en"),
        ("a.en", "a\nb\n", "a.en: line 3 is empty in one language alone"),
        ("a.fr", "a\nb\nc\n", "a.en: no such file, for the other language line by line; there are a.de, a.fr"),
        ("a.csv", "en,de\na,b\rc\n", "cannot be read as csv: line 2: a carriage return outside quotes, which ends no"),
        ("a.csv", "en,de,en\na,b,c\n", "a.csv: cannot be read as csv: its first line has the name 'en' twice"),
        ("a.jsonl", '{"en": "a", "de": "b"}\n\n{', "a.jsonl: line 3: malformed JSON"),
        (
            "a.jsonl",
            '{"en": "a", "de": "b", "en": "c"}\n',
            "a.jsonl: line 1: malformed JSON: the key 'en' stands twice",
        ),
        ("a.json", '[{"en": "a", "de": "b", "en": "c"}]', "the key 'en' stands twice"),
        ("a.jsonl", '{"en": "a", "de": "b \\ud83d"}\n', "row 1: ['en', 'de'] are not all text"),
    ],
)
def test_lines_that_have_no_partner_or_no_end_are_named(here, name, content, words):
    (here / "a.de").write_text("x\ny\nz\n")
    (here / name).write_bytes(content.encode())
    file = "a.de" if name.endswith(("en", "fr")) else name
    with pytest.raises(UserError, match=re.escape(words)):
        read_texts(DataSource(train_file=file), "train", TRANSLATION)
