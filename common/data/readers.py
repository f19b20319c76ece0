"""What opens a split of a source: files; Multi30K, by torchtext; data sets of the hub, by the datasets library.

Files are CSV, TSV, JSON, JSON lines, Parquet, or two text files, line by line. Multi30K is a folder of `train.en`,
`train.de`, `val.*` and `test2016.*`. No code of a data set is ever run. A `UserError` says
what is missing or damaged.
"""

import csv
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common.data.sources import DataSource
from common.runtime.errors import UserError, as_user_error
from common.runtime.records import RECORD_NAME, check_files, read_record

MULTI30K = {"train": "train", "validation": "val", "test": "test2016"}  # what its files are called
SPLIT_NAMES = {  # what a split may be called, in a folder or on the hub; the last two are MNLI's
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test2016", "test_matched"),
}
TABLES = ("csv", "tsv", "jsonl", "json", "parquet")  # by the end of a file's name

Rows = Sequence[dict]  # a list, or a table of the datasets library


def finder(source: DataSource, task) -> Callable[[str], Callable[[], Rows] | None]:
    """A function of a split's name: what opens that split, or None where there is no such split."""
    folder = Path(source.data or "")
    on_hub = load_hub(source) if source.data and not folder.exists() else {}
    if source.data and (folder / RECORD_NAME).is_file():
        check_files(folder, read_record(folder / RECORD_NAME))

    def find(split):
        if source.file(split):
            return lambda: read_files([Path(source.file(split))], source, task)
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


def read_files(paths: list[Path], source: DataSource, task) -> Rows:
    """The rows of a file, or of several parts of one; of a text file its lines, beside those of the other language."""
    path = paths[0]
    if not path.is_file():
        raise UserError(f"{path}: " + ("is a folder; give a file" if path.is_dir() else "no such file"))
    end = path.name.removesuffix(".gz").rpartition(".")[2]
    languages = () if task.has_labels else source.languages(task)
    if end in languages:
        return _read_pair(path, source, task)
    if end not in TABLES:
        raise UserError(f"{path}: must end with .{', .'.join([*TABLES, *languages])} (.gz may follow)")
    with as_user_error(path, f"cannot be read as {end}"):
        return _read_parquet(paths) if end == "parquet" else [row for path in paths for row in _read_table(path, end)]


def _opened(path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="")


def _read_table(path, end):
    """The rows of a CSV, a TSV (which has no quotes: one in GLUE's would swallow many lines), or JSON."""
    with _opened(path) as handle:
        if end in ("csv", "tsv"):
            csv.field_size_limit(2**31 - 1)
            layout = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if end == "tsv" else {"strict": True}
            rows = list(csv.DictReader(handle, **layout))
            if any(None in row for row in rows):
                raise ValueError("a row has more fields than the first line has names")
            return rows
        text = handle.read()
    if text.startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(filter(str.strip, text.split("\n")), start=1):
            with as_user_error(f"{path}: line {number}", "malformed JSON"):
                rows.append(json.loads(line))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object")
    return rows


def _read_parquet(paths):
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        return datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=cache, keep_in_memory=True)


def _read_pair(path, source, task):
    """The rows of two text files, line by line, one of which is `path`; the other ends with the other language."""
    zipped = ".gz" if path.name.endswith(".gz") else ""
    stem, texts = path.name.removesuffix(zipped).rpartition(".")[0], []
    for language in source.languages(task):
        path = path.with_name(f"{stem}.{language}{zipped}")
        if not path.is_file():
            raise UserError(f"{path}: no such file; {path.name} belongs to the other one, line by line")
        with as_user_error(path, "cannot be read as text"), _opened(path) as handle:
            texts.append([line.strip() for line in handle])
        if "" in texts[-1]:
            raise UserError(f"{path}: line {texts[-1].index('') + 1}: is empty; take it out of both files")
    if len(texts[0]) != len(texts[1]):
        raise UserError(f"{path}: has {len(texts[1])} lines where the other language has {len(texts[0])}")
    return [dict(zip(source.columns(task), pair)) for pair in zip(*texts)]


def _read_multi30k(folder, split, source, task):
    """The rows of English and German text files, through torchtext, which would leave out a pair without a word."""
    _read_pair(folder / f"{MULTI30K[split]}.en", source, task)
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch
    from torchtext.datasets import Multi30k

    stems = {name: stem if name == split else None for name, stem in MULTI30K.items()}
    (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(folder), **stems)
    return [dict(zip(source.columns(task), (example.src, example.trg))) for example in dataset]


# --- the hub -----------------------------------------------------------------------------------------------------


def load_hub(source: DataSource) -> dict[str, Rows]:
    """All splits of a hub data set: from the local cache if it is there, else over the network. No code is run."""
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
