"""What opens a split of a source: files; Multi30K, by torchtext; data sets of the hub, by the datasets library.

Files are CSV, TSV, JSON, JSON lines, Parquet, or two text files, line by line (one, if there are no targets). A line
ends with a line feed, which a carriage return may precede, and with nothing else; an empty one holds no row. Multi30K
is a folder of `train.en`, `train.de`, `val.*` and `test2016.*`. No code of a data set is ever run. A `UserError` says
what is missing or damaged.
"""

import csv
import glob
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common.data.sources import UNLABELLED, DataSource
from common.runtime.errors import UserError, as_user_error, not_fetched
from common.runtime.files import temporary_folder
from common.runtime.records import RECORD_NAME, check_files, read_record, without_twins

MULTI30K = {"train": "train", "validation": "val", "test": "test2016"}  # what its files are called
SPLIT_NAMES = {  # what a split may be called, in a folder or on the hub; the last two are MNLI's
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test2016", "test_matched"),
}
TABLES = ("csv", "tsv", "jsonl", "json", "parquet")  # by the end of a file's name
STAND_IN = "\uffff"  # no character of any text: for carriage returns within a line, at which torchtext begins another

Rows = Sequence[dict]  # a list, or a table of the datasets library


def finder(source: DataSource, task) -> Callable[[str], Callable[[], Rows] | None]:
    """A function of a split's name: what opens that split, or None where there is no such split."""
    folder = Path(source.data or "")
    on_hub = load_hub(source) if source.data and not folder.exists() else {}
    if source.data and (folder / RECORD_NAME).is_file():
        check_files(folder, read_record(folder / RECORD_NAME))

    def find(split):
        if source.file(split):
            if not Path(source.file(split)).exists():
                flag = "--test-file" if split == "test" else f"download_model.py --{split}-file"
                raise UserError(f"{source.file(split)}: no such file; name other data with --data, or with {flag}")
            return lambda: read_files([Path(source.file(split))], source, task, is_unlabelled=split == UNLABELLED)
        for name in SPLIT_NAMES[split]:
            if name in on_hub:
                return lambda: on_hub[name]
        if source.data and folder.is_dir():
            return _find_in_folder(folder, split, source, task)
        return (lambda: read_files([folder], source, task)) if folder.is_file() and split == "train" else None

    return find


def _find_in_folder(folder, split, source, task):
    is_pair = not task.has_labels and not source.source_column
    if is_pair and source.languages(task) == ("en", "de") and (folder / f"{MULTI30K[split]}.en").is_file():
        return lambda: _read_multi30k(folder, split, source, task)
    ends = "|".join(map(re.escape, [*TABLES, *(() if task.has_labels else source.languages(task))]))
    name = re.compile(rf"({'|'.join(SPLIT_NAMES[split])})(-\d+-of-\d+)?\.(({ends})(\.gz)?)")
    files = {}  # {(folder, name, end): parts}
    for path in sorted([*folder.iterdir(), *(folder / "data").glob("*")]):
        match = name.fullmatch(path.name)
        if match and path.is_file():
            kind = "" if match[4] in source.languages(task) else match[3]
            files.setdefault((path.parent, match[1], kind), []).append(path)
    if len(files) > 1:
        names = " and ".join(paths[0].name for paths in files.values())
        raise UserError(f"{folder}: has several {split} splits, {names}; leave one of them there")
    for (_, _, kind), paths in files.items():
        return lambda: read_files(paths if kind else paths[:1], source, task)
    return None


# --- files -------------------------------------------------------------------------------------------------------


def read_files(paths: list[Path], source: DataSource, task, is_unlabelled: bool = False) -> Rows:
    """The rows of a file, or of several parts of one; of a text file its lines, beside those of the other language.

    `is_unlabelled`: whether there are inputs alone, and a text file stands alone.
    """
    path = paths[0]
    if not path.is_file():
        raise UserError(f"{path}: " + ("is a folder; give a file" if path.is_dir() else "no such file"))
    end = path.name.removesuffix(".gz").rpartition(".")[2]
    ends = () if task.has_labels else source.languages(task)
    ends = ("txt", *ends[:1]) if is_unlabelled else ends
    if end in ends and is_unlabelled:
        return [{source.columns(task)[0]: line} for line in _read_lines(path).values()]
    if end in ends:
        return _read_pair(path, source, task)
    if end not in TABLES:
        raise UserError(f"{path}: must end with .{', .'.join([*TABLES, *ends])} (.gz may follow)")
    if end == "parquet":
        with as_user_error(path, "cannot be read as parquet"):
            return _read_parquet(paths)
    rows = []
    for path in paths:
        with as_user_error(path, f"cannot be read as {end}"):
            rows += _read_table(path, end)
    return rows


def _opened(path):
    if pointer := not_fetched(path):
        raise ValueError(pointer)
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n")


def _lines(text):
    """[(number, line)] of a text."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_table(path, end):
    """The rows of a CSV, a TSV (which has no quotes: one in GLUE's would swallow many lines), or JSON."""
    with _opened(path) as handle:
        if end == "csv":
            return _read_csv(handle)
        text = handle.read()
    if end == "tsv":
        return _rows(line.split("\t") for _, line in _lines(text))
    if text.lstrip().startswith("["):
        rows = json.loads(text, object_pairs_hook=without_twins)
    else:
        rows = []
        for number, line in _lines(text):
            with as_user_error(f"{path}: line {number}", "malformed JSON"):
                rows.append(json.loads(line, object_pairs_hook=without_twins))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object")
    return rows


def _read_csv(handle):
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(handle, strict=True)
    try:
        return _rows(filter(None, reader))
    except csv.Error as error:
        is_return = "new-line character" in str(error)  # and then advice on how to call the library
        reason = "a carriage return outside quotes, which ends no line" if is_return else error
        raise ValueError(f"line {reader.line_num}: {reason}") from None


def _rows(table: Iterable[list[str]]) -> list[dict]:
    """The rows of a table of fields, the first line of which has their names; what a row lacks at its end is None."""
    table = iter(table)
    names = next(table, [])
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise ValueError(f"its first line has the name {min(twice)!r} twice")
    rows = [dict(itertools.zip_longest(names, fields)) for fields in table]
    if any(None in row for row in rows):
        raise ValueError("a row has more fields than the first line has names")
    return rows


def _read_parquet(paths):
    import datasets
    import pyarrow
    from pyarrow import parquet

    tables = [parquet.read_table(path) for path in paths]
    return datasets.Dataset(pyarrow.concat_tables(tables, promote_options="permissive"))


def _read_lines(path):
    """{number of a line: text} of a text file."""
    with as_user_error(path, "cannot be read as text"), _opened(path) as handle:
        return {number: line.strip() for number, line in _lines(handle.read())}


def _read_pair(path, source, task):
    """The rows of two text files, line by line, one of which is `path`; the other ends with the other language."""
    zipped = ".gz" if path.name.endswith(".gz") else ""
    stem = path.name.removesuffix(zipped).rpartition(".")[0]
    paths = [path.with_name(f"{stem}.{language}{zipped}") for language in source.languages(task)]
    texts = []  # {number of a line: text} of both
    for path in paths:
        if not path.is_file():
            there = ", ".join(sorted(other.name for other in path.parent.glob(f"{glob.escape(stem)}.*")))
            raise UserError(f"{path}: no such file, for the other language line by line; there are {there}")
        texts.append(_read_lines(path))
    alone = texts[0].keys() ^ texts[1].keys()
    if alone:
        counts = " and ".join(f"{len(lines):,} in {path.name}" for path, lines in zip(paths, texts))
        raise UserError(
            f"{paths[0]}: line {min(alone)} is empty in one language alone; of lines with a text are {counts}"
        )
    return [dict(zip(source.columns(task), pair)) for pair in zip(*(lines.values() for lines in texts))]


def _read_multi30k(folder, split, source, task):
    """The rows of English and German text files, through torchtext, which is given their lines as `_lines` has them."""
    columns, rows = source.columns(task), _read_pair(folder / f"{MULTI30K[split]}.en", source, task)
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch
    from torchtext.datasets import Multi30k

    with temporary_folder() as plain:
        for column, end in zip(columns, ("en", "de")):
            lines = "".join(row[column].replace("\r", STAND_IN) + "\n" for row in rows)
            (plain / f"lines.{end}").write_text(lines, encoding="utf-8")
        stems = {"train": "lines", "validation": None, "test": None}
        (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(plain), **stems)
    pairs = [[text.replace(STAND_IN, "\r") for text in (example.src, example.trg)] for example in dataset]
    return [dict(zip(columns, pair)) for pair in pairs]


# --- the hub -----------------------------------------------------------------------------------------------------


def load_hub(source: DataSource) -> dict[str, Rows]:
    """All splits of a hub data set: from the local cache if it is there, else over the network. No code is run."""
    if source.data.startswith((".", "/", "~")):
        raise UserError(f"{source.data}: no such file or folder; name other data with --data")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for download in (datasets.DownloadConfig(local_files_only=True), None):
        try:
            return datasets.load_dataset(source.data, source.data_config, download_config=download)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
    raise UserError(
        f"{source.data}: no such file or folder, not in the local cache, and not available from the hub ({reason}); "
        "give a local folder with --data"
    )
