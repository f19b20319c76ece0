"""Where the texts of a split are, and how they are read.

Texts are those of a hub data set, of a folder, or of single files: CSV, TSV, JSON, JSON lines, Parquet, or two text
files, line by line. They are read by the datasets library; Multi30K, as folders of `train.en`, `train.de`, `val.*` and
`test2016.*`, by torchtext. No code of a data set is ever run. A validation split that is not there is held out of
train, stratified by label. The test split is for evaluation alone, and never made.
"""

import os
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.records import RECORD_NAME, check_files, parse_json, read_record
from common.schema import PATH, Maybe, Object, Text, shown

SPLITS = ("train", "validation", "test")
MULTI30K = {"train": "train", "validation": "val", "test": "test2016"}  # what its files are called
SPLIT_NAMES = {  # what a split may be called, in a folder or on the hub; the last two are MNLI's
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test2016", "test_matched"),
}
HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed
# By the end of a file's name: what reads it, and how. A TSV has no quotes: one in GLUE's would swallow many lines.
READERS = {
    "csv": ("csv", {"na_filter": False}),
    "tsv": ("csv", {"na_filter": False, "sep": "\t", "quoting": 3}),
    "jsonl": ("json", {}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
}
HUB_ID = r"[\w.-]+(/[\w.-]+){0,2}"  # NAME, OWNER/NAME, NAME/CONFIG or OWNER/NAME/CONFIG


# --- what is read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """Which data a model is used on, and how its examples are read; the names are those of the flags.

    `data`: a hub id, a folder, or the file of a train split; `data_config`: of a hub data set.
    `train_file`, …: a file for one split, in place of what `data` has for it.
    `source_lang`, `target_lang`: the keys of a row's "translation", or names of columns, or the ends of text files.
    `prefix`: in front of every input text; None for what suits the model.
    """

    data: str | None = None
    data_config: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    prefix: str | None = None

    def __str__(self):
        """What was given: the data, or the files."""
        config = f" ({self.data_config})" if self.data_config else ""
        files = [each for each in (self.file(split) for split in SPLITS) if each]
        return self.data + config if self.data else ", ".join(files) or "no data"

    def file(self, split: str) -> str | None:
        """The file that was given for one split."""
        return getattr(self, f"{split}_file")

    @property
    def is_located(self) -> bool:
        """Whether it says where any data are."""
        return any((self.data, self.train_file, self.validation_file, self.test_file))

    def over(self, other: "DataSource | None") -> "DataSource":
        """This one, and where it says nothing, the other one. New data come without the old ones' files and config."""
        if other is None:
            return self
        kept = asdict(other)
        if self.data:
            kept |= dict.fromkeys(("data", "data_config", *(f"{split}_file" for split in SPLITS)))
        if self.source_lang:
            kept |= {"source_column": None, "target_column": None}
        return DataSource(**kept | {name: value for name, value in asdict(self).items() if value is not None})

    def languages(self, task) -> tuple[str, str]:
        """Those of a task from text to text; without any, the names that are usual for it."""
        return (self.source_lang, self.target_lang) if self.source_lang else task.columns

    def columns(self, task) -> list[str]:
        """The columns that are read: of the input, perhaps of a second text in it, and of the target."""
        if task.has_labels:
            text, label = task.columns
            return [self.text_column or text, *filter(None, [self.text_pair_column]), self.label_column or label]
        return [self.source_column, self.target_column] if self.source_column else list(self.languages(task))

    def to_json(self, model_path: str | Path) -> dict:
        """How the record of the model at `model_path` holds it: paths relative to the folder that the model lies in."""

        def relative(path):
            return os.path.relpath(path, Path(model_path).parent)

        content = {name: value for name, value in asdict(self).items() if name in PLAIN and value is not None}
        files = {split: relative(self.file(split)) for split in SPLITS if self.file(split)}
        if files:
            content["files"] = files
        if self.data:
            is_local = Path(self.data).exists()
            content["folder" if is_local else "hub"] = relative(self.data) if is_local else self.data
        return content

    @classmethod
    def from_json(cls, content: dict, model_path: str | Path) -> "DataSource":
        """What `to_json` wrote."""

        def found(path):
            return str(Path(model_path).parent / path)

        files = {f"{split}_file": found(path) for split, path in content.get("files", {}).items()}
        data = found(content["folder"]) if "folder" in content else content.get("hub")
        return cls(data=data, **files, **{name: value for name, value in content.items() if name in PLAIN})


# The fields that a record holds as they are.
PLAIN = [each.name for each in fields(DataSource) if each.name != "data" and not each.name.endswith("_file")]
DATA = Maybe(
    Object(
        {},
        {"folder": PATH, "hub": PATH, "files": Object({}, dict.fromkeys(SPLITS, PATH)), **dict.fromkeys(PLAIN, Text())},
    )
)


def check_source(source: DataSource, task) -> None:
    """Make sure that what was said of the data goes together, and with the task.

    Raises:
        UserError: naming the flag.
    """
    text_to_text = ("source_lang", "target_lang", "source_column", "target_column")
    labelled = ("text_column", "text_pair_column", "label_column")
    for name in text_to_text if task.has_labels else labelled:
        if getattr(source, name):
            known = ", ".join(map(flag_of, labelled if task.has_labels else text_to_text))
            raise UserError(f"{flag_of(name)}: has no part in {task.name}, which has {known}")
    for one, other in (("source_lang", "target_lang"), ("source_column", "target_column")):
        if bool(getattr(source, one)) != bool(getattr(source, other)):
            raise UserError(f"{flag_of(one)} and {flag_of(other)}: go together; give both")
    if source.data_config and (source.data is None or Path(source.data).exists()):
        raise UserError(f"--data-config {source.data_config}: belongs to a data set of the hub, which {source} is not")


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


# --- the examples of a split -------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What a split holds.

    `take(positions)`: these examples, [(input, target)]; `targets()`: those of all; `classes`: the names of the labels'
    numbers, if they are known.
    """

    count: int
    take: Callable[[Sequence[int]], list[tuple]]
    targets: Callable[[], list]
    classes: list[str] | None = None


def read_texts(
    source: DataSource | str | Path, split: str, task, *, limit: int | None = None, label2id: dict | None = None
) -> list[tuple]:
    """The examples of a split as they are: [(input, target)].

    An input is a text, or (text, second text). A target is a text, or a label as it stands there.

    Args:
        source: a path or a hub id for one of which nothing else need be said.
        split: "train", "validation" or "test".
        task: whose inputs and targets these are, see `tasks`.
        limit: so many examples only: a sample, always the same.
        label2id: the model's labels by their names. With it, labels become the model's numbers.
    Raises:
        UserError: nothing usable there, and why; a label that is none of the model's.
    """
    source = source if isinstance(source, DataSource) else DataSource(data=str(source))
    if split not in SPLITS:
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    check_source(source, task)
    find = _finder(source, task)
    opened = find(split)
    is_made = opened is None and split == "validation"  # of train
    opened = find("train") if is_made else opened
    if opened is None:
        raise UserError(f"{source}: has no {split} split; {_remedy(source, split, task)}")
    rows = opened()
    if not rows.count:
        raise UserError(f"{source}: its {split} split is empty")
    positions = range(rows.count)
    if is_made or (split == "train" and find("validation") is None):
        held_out = stratified_holdout(rows.targets() if task.has_labels else [0] * rows.count)
        positions = [i for i in positions if (i in held_out) == is_made]
        if not positions:
            raise UserError(f"{source}: too few examples to hold some out of train; give --validation-file")
    if limit and limit < len(positions):
        positions = fixed_sample(positions, limit)
    pairs = rows.take(positions)
    if label2id and task.has_labels:
        where = source.file("train" if is_made else split) or source
        return _numbered(f"{where}: {split}", pairs, positions, label2id, rows.classes)
    return pairs


def has_split(source: DataSource, split: str, task) -> bool:
    """Whether a split is there, so that it need not be made."""
    return _finder(source, task)(split) is not None


def _remedy(source, split, task):
    flag = flag_of(f"{split}_file")
    if source.data and Path(source.data).is_dir():
        one, other = source.languages(task) if not task.has_labels else ("", "")
        text = f", or {split}.{one} and {split}.{other}," if one else ""
        return f"a file {split}.csv, .tsv, .jsonl, .json or .parquet{text} belongs into the folder; or give {flag}"
    return f"give one with {flag}" + (", or evaluate with --split validation" if split == "test" else "")


def _finder(source, task):
    """A function of a split's name: what opens that split, a function that gives its `Rows`, or None."""
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
        raise UserError(f"{folder}: has several {split} splits, {names}; say which with {flag_of(f'{split}_file')}")
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

    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty")
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
            cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        raise UserError(f"{paths[0]}: is not UTF-8 text")
    if "corresponds to no data" in str(cause) or isinstance(cause, StopIteration):
        raise UserError(f"{paths[0]}: holds no examples")
    if isinstance(cause, OSError) and cause.errno is not None:
        raise cause
    raise UserError(f"{paths[0]}: cannot be read as {reader}: {' '.join(str(cause).split()) or type(cause).__name__}")


def _table_rows(where, table, source, task, may_be_empty=True):
    """The `Rows` of a table of the datasets library."""
    names = source.columns(task)
    is_nested = not task.has_labels and not source.source_column and "translation" in table.column_names
    for name, flag in zip(names, _column_flags(source, task)):
        if not is_nested and name not in table.column_names:
            there = ", ".join(map(repr, table.column_names))
            raise UserError(f"{where}: has no column {name!r}, but {there}; say which with {flag}")

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
    stem = path.name.removesuffix(zipped).rpartition(".")[0]
    texts = []
    for language in source.languages(task):
        path = path.with_name(f"{stem}.{language}{zipped}")
        if not path.is_file():
            raise UserError(f"{path}: no such file; {path.name} belongs to the other one, line by line")
        texts.append([line.strip() for line in _load("text", [path])["text"][:]])
        if "" in texts[-1]:
            raise UserError(f"{path}: line {texts[-1].index('') + 1}: is empty; take it out of both files")
        if len(texts[0]) != len(texts[-1]):
            raise UserError(
                f"{path}: has {len(texts[-1])} lines where {stem}.{source.languages(task)[0]}{zipped} has "
                f"{len(texts[0])}; they must be translations line by line"
            )
    return _listed(list(zip(*texts)))


def _listed(pairs):
    return Rows(len(pairs), lambda positions: [pairs[i] for i in positions], lambda: [target for _, target in pairs])


def _read_multi30k(folder, split):
    """The `Rows` of English and German text files, through torchtext."""
    stem, lengths = MULTI30K[split], {}
    for language in ("en", "de"):
        path = folder / f"{stem}.{language}"
        if not path.is_file():
            raise UserError(f"{path}: no such file; a translation folder holds {stem}.en and {stem}.de")
        try:
            lengths[language] = 0
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():  # torchtext would leave out the pair without a word
                        raise UserError(f"{path}: line {number}: is empty; take it out of both languages' files")
                    lengths[language] = number
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
    if lengths["en"] != lengths["de"]:
        raise UserError(
            f"{folder}: {stem}.en has {lengths['en']} lines and {stem}.de {lengths['de']}; "
            "they must be translations line by line"
        )
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch
    from torchtext.datasets import Multi30k

    wanted = {name: stem if name == split else None for name in SPLITS}
    (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(folder), **wanted)
    return _listed([(example.src, example.trg) for example in dataset])


def _read_jsonl(path):
    """The `Rows` of a file with a JSON object on each line, which has a "text" and a "label".

    Raises:
        UserError: a line is not such an object.
    """
    pairs = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = parse_json(f"{path}: line {number}", line)
                text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
                if not isinstance(text, str) or not isinstance(label, int | str) or isinstance(label, bool):
                    raise UserError(f"{path}: line {number}: needs a string 'text' and a 'label', a number or string")
                pairs.append((text, label))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
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


# --- labels ------------------------------------------------------------------------------------------------------


def _number(label, label2id, classes):
    """The model's number of a label: of a name, in upper or lower case, else the number itself; None for no such one.

    Args:
        classes: the names of the data set's own numbers, where it knows them; {} where they are not the model's.
    """
    label = classes.get(label, label)
    if isinstance(label, bool | str):
        names = {name.casefold(): number for name, number in label2id.items()}
        found = label2id.get(str(label), names.get(str(label).casefold()))
        if found is not None or not re.fullmatch(r"[0-9]{1,9}", str(label)):
            return found
        label = int(label)
    return label if isinstance(label, int) and 0 <= label <= max(label2id.values()) else None


def _numbered(where, pairs, positions, label2id, classes):
    """Pairs whose labels are the model's numbers.

    Raises:
        UserError: naming the first example whose label is none of the model's.
    """
    known = {name.casefold() for name in label2id}
    own = dict(enumerate(classes)) if classes and {name.casefold() for name in classes} <= known else {}
    numbers = [_number(label, label2id, own) for _, label in pairs]
    if None in numbers:
        first = numbers.index(None)
        names = ", ".join(sorted(label2id, key=label2id.get)[:10])
        raise UserError(
            f"{where} example {positions[first]} has label {shown(pairs[first][1])}, but the model knows only 0 to "
            f"{max(label2id.values())} ({names}); its config.json names them, or choose --label-column"
        )
    return [(text, number) for (text, _), number in zip(pairs, numbers)]


# --- samples that are the same in every run ---------------------------------------------------------------------


def fixed_sample(items: Sequence, size: int) -> list:
    """`size` of the items, in their order: the same ones in every run."""
    return [items[i] for i in sorted(random.Random(FIXED_SEED).sample(range(len(items)), size))]


def stratified_holdout(labels: list[int | str]) -> set[int]:
    """Positions of the held-out examples: the fraction HOLDOUT of each label, always the same ones."""
    by_label = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label if isinstance(label, int | str) else repr(label), []).append(position)
    shuffler = random.Random(FIXED_SEED)
    return {
        position
        for label in sorted(by_label, key=lambda label: (isinstance(label, str), label))  # no number above a string
        for position in shuffler.sample(by_label[label], round(HOLDOUT * len(by_label[label])))
    }
