"""What opens the data of a source: files, by the datasets library; Multi30K, by torchtext; data sets of the hub.

Files are CSV, TSV, JSON, JSON lines, Parquet, or two text files, line by line. Multi30K is a folder of `train.en`,
`train.de`, `val.*` and `test2016.*`. No code of a data set is ever run.
"""

import gzip
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.data.sources import DataSource
from common.data.tasks import TASKS
from common.runtime.errors import UserError
from common.runtime.records import RECORD_NAME, check_files, parse_json, read_record
from common.runtime.schema import shown

MULTI30K = {"train": "train", "validation": "val", "test": "test2016"}  # what its files are called
SPLIT_NAMES = {  # what a split may be called, in a folder or on the hub; the last two are MNLI's
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test2016", "test_matched"),
}
# By the end of a file's name: what reads it, and how. A TSV has no quotes: one in GLUE's would swallow many lines.
READERS = {
    "csv": ("csv", {"na_filter": False}),
    "tsv": ("csv", {"na_filter": False, "sep": "\t", "quoting": 3}),
    "jsonl": ("json", {}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
}
HUB_ID = r"[\w.-]+(/[\w.-]+){0,2}"  # NAME, OWNER/NAME, NAME/CONFIG or OWNER/NAME/CONFIG


class Rows(NamedTuple):
    """What a split holds.

    `take(positions)`: these examples, [(input, target)]; `targets()`: those of all; `classes`: the names of the labels'
    numbers, if they are known.
    """

    count: int
    take: Callable[[Sequence[int]], list[tuple]]
    targets: Callable[[], list]
    classes: list[str] | None = None


def finder(source: DataSource, task) -> Callable[[str], Callable[[], Rows] | None]:
    """A function of a split's name: what opens that split, or None where there is no such split.

    Raises:
        UserError: there are no such data, or they are damaged.
    """
    on_hub = None
    if source.data:
        if not Path(source.data).exists():
            on_hub = load_hub(source)
        if (Path(source.data) / RECORD_NAME).is_file():
            check_files(source.data, read_record(Path(source.data) / RECORD_NAME))

    def find(split):
        if source.file(split):
            return partial(_open_file, Path(source.file(split)), source, task)
        if on_hub is not None:
            name = next((name for name in SPLIT_NAMES[split] if name in on_hub), None)
            return name and partial(_table_rows, f"{source}: its {name} split", on_hub[name], source, task)
        if source.data is None:
            return None
        path = Path(source.data)
        if path.is_dir():
            return _find_in_folder(path, split, source, task)
        return partial(_open_file, path, source, task) if split == "train" else None

    return find


def _find_in_folder(folder, split, source, task):
    """What opens the files of a split in a folder; None if there are none."""
    if not task.has_labels and source.languages(task) == ("en", "de") and not source.source_column:
        stem = MULTI30K[split]
        if any((folder / f"{stem}.{language}").is_file() for language in ("en", "de")):
            return partial(_read_multi30k, folder, split)
    plain = folder / f"{split}.jsonl"
    if task.has_labels and plain.is_file() and source.columns(task) == list(task.columns):
        return partial(_read_jsonl, plain)
    languages = [] if task.has_labels else source.languages(task)
    ends = "|".join(map(re.escape, [*READERS, *languages]))
    name = re.compile(rf"({'|'.join(SPLIT_NAMES[split])})(-\d+-of-\d+)?\.({ends})(\.gz)?")
    found = {}
    for path in sorted([*folder.iterdir(), *(folder / "data").glob("*")]):
        match = name.fullmatch(path.name)
        if match and path.is_file():
            kind = "text" if match[3] in languages else match[3]
            found.setdefault((path.parent, match[1], kind, match[4]), []).append(path)
    if len(found) > 1:
        names = " and ".join(paths[0].name for paths in found.values())
        raise UserError(f"{folder}: has several {split} splits, {names}; leave one of them there")
    for (_, _, kind, _), paths in found.items():
        if kind == "text":
            return partial(_read_pair, paths[0], source, task)
        return partial(_open_files, paths, kind, source, task)
    return None


# --- files -------------------------------------------------------------------------------------------------------


def _open_file(path, source, task):
    """The `Rows` of one file, by the end of its name."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("is a folder; give a file" if path.is_dir() else "no such file"))
    end = path.name.removesuffix(".gz").rpartition(".")[2]
    if not task.has_labels and end in source.languages(task):
        return _read_pair(path, source, task)
    if end not in READERS:
        texts = "" if task.has_labels else f", or .{' or .'.join(source.languages(task))} for one of two text files"
        raise UserError(f"{path}: must end with .{', .'.join(READERS)}{texts} (.gz may follow)")
    return _open_files([path], end, source, task)


def _open_files(paths, end, source, task):
    reader, options = READERS[end]
    if reader == "csv":
        options = options | {"converters": dict.fromkeys(source.columns(task), str)}
    table = _load(reader, paths, **options)
    if "__index_level_0__" in table.column_names:  # pandas takes the surplus column for names of the rows
        raise UserError(f"{paths[0]}: its rows have more fields than its first line has names")
    return _table_rows(paths[0], table, source, task, may_be_empty=reader != "csv")


def _load(reader, paths, **options):
    """A table of the datasets library out of files, in memory: what it caches lies in a temporary folder."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it tells of every failure on stderr, at length
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset(
                reader,
                data_files={"train": [str(path.resolve()) for path in paths]},
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:  # those of pandas, pyarrow and gzip, mostly behind one of its own
            reason = " ".join(str(error.__cause__ or error).split()) or "no examples in it"
            raise UserError(f"{paths[0]}: cannot be read as {reader}: {reason}") from None


def _table_rows(where, table, source, task, may_be_empty=True):
    """The `Rows` of a table of the datasets library."""
    names = source.columns(task)
    is_nested = not task.has_labels and not source.source_column and "translation" in table.column_names
    for name, flag in zip(names, _column_flags(source, task)):
        if not is_nested and name not in table.column_names:
            there = ", ".join(map(repr, table.column_names))
            raise UserError(f"{where}: has no column {name!r}, but {there}; say which to download_model.py with {flag}")

    def take(positions):
        chosen = table if len(positions) == table.num_rows else table.select(positions)
        if is_nested:
            rows = chosen["translation"][:]
            columns = [[row.get(name) if isinstance(row, dict) else None for row in rows] for name in names]
        else:
            columns = [chosen[name][:] for name in names]
        texts = columns[:-1] if task.has_labels else columns
        for name, column in zip(names, texts):
            for position, text in zip(positions, column):
                if not isinstance(text, str) or not (text or may_be_empty):
                    what = "nothing" if text in (None, "") else shown(text)
                    raise UserError(f"{where}: row {position + 1}: {name!r}: {what} where text belongs")
        *inputs, targets = columns
        return list(zip(inputs[0] if len(inputs) == 1 else zip(*inputs), targets))

    classes = None if is_nested else getattr(table.features[names[-1]], "names", None)
    return Rows(table.num_rows, take, lambda: table[names[-1]][:], classes)


def _column_flags(source, task):
    if task.has_labels:
        return ["--text-column", *["--text-pair-column"] * bool(source.text_pair_column), "--label-column"]
    return ["--source-column", "--target-column"]


def _read_pair(path, source, task):
    """The `Rows` of two text files, line by line, one of which is `path`; the other ends with the other language."""
    zipped = ".gz" if path.name.endswith(".gz") else ""
    stem, texts = path.name.removesuffix(zipped).rpartition(".")[0], []
    for language in source.languages(task):
        path = path.with_name(f"{stem}.{language}{zipped}")
        if not path.is_file():
            raise UserError(f"{path}: no such file; {path.name} belongs to the other one, line by line")
        texts.append(_lines(path))
        if "" in texts[-1]:
            raise UserError(f"{path}: line {texts[-1].index('') + 1}: is empty; take it out of both files")
        if len(texts[0]) != len(texts[-1]):
            raise UserError(
                f"{path}: has {len(texts[-1])} lines where {stem}.{source.languages(task)[0]}{zipped} has "
                f"{len(texts[0])}; they must be translations line by line"
            )
    return _listed(list(zip(*texts)))


def _lines(path):
    """The lines of a text file, without the white space at their ends."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            return [line.strip() for line in lines]
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None


def _listed(pairs):
    return Rows(len(pairs), lambda positions: [pairs[i] for i in positions], lambda: [target for _, target in pairs])


def _read_multi30k(folder, split):
    """The `Rows` of English and German text files, through torchtext, which would leave out a pair without a word."""
    _read_pair(folder / f"{MULTI30K[split]}.en", DataSource(), TASKS["translation"])
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch
    from torchtext.datasets import Multi30k

    stems = {name: stem if name == split else None for name, stem in MULTI30K.items()}
    (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(folder), **stems)
    return _listed([(example.src, example.trg) for example in dataset])


def _read_jsonl(path):
    """The `Rows` of a file with a JSON object on each line, which has a "text" and a "label".

    Raises:
        UserError: a line is not such an object.
    """
    pairs = []
    for number, line in enumerate(_lines(path), start=1):
        row = parse_json(f"{path}: line {number}", line)
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, int | str) or isinstance(label, bool):
            raise UserError(f"{path}: line {number}: needs a string 'text' and a 'label', a number or string")
        pairs.append((text, label))
    return _listed(pairs)


# --- the hub -----------------------------------------------------------------------------------------------------


def load_hub(source: DataSource):
    """All splits of a hub data set: from the local cache if it is there, else over the network. No code is run.

    `NAME/CONFIG` looks like `OWNER/NAME`, which is tried first.

    Raises:
        UserError: the name cannot be that of a data set, or it is not available.
    """
    import datasets

    parts = source.data.split("/")
    is_path = source.data.startswith(("~", ".", "/")) or parts[-1].rpartition(".")[2] in (*READERS, "gz", "txt", "zip")
    if is_path or not re.fullmatch(HUB_ID, source.data) or parts[-1] in (source.source_lang, source.target_lang):
        raise UserError(f"{source.data}: no such file or folder, and no hub id (such as bentrevett/multi30k) either")
    ways = [(source.data, source.data_config)] if len(parts) < 3 else []
    if len(parts) > 1 and not source.data_config:
        ways.append(("/".join(parts[:-1]), parts[-1]))
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    reasons = []
    for local_only in (True, False):
        for name, config in ways:
            try:
                return datasets.load_dataset(
                    name, config, download_config=datasets.DownloadConfig(local_files_only=local_only)
                )
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                reasons.append(" ".join((str(error).strip() or type(error).__name__).splitlines()[:2]))
    raise UserError(
        f"{source.data}: no such folder, not in the local cache, and not available from the hub "
        f"({reasons[-len(ways)]}); give a local folder with --data"
    )
