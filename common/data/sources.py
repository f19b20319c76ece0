"""What a model's data are: where they lie, on the hub, in a folder or in files, and how their examples are read."""

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from common.runtime.errors import UserError
from common.runtime.records import RECORD_NAME, read_json
from common.runtime.settings import setting

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"  # what stands for a split where texts have no targets yet


@dataclass(frozen=True)
class DataSource:
    """Which data a model is used on, and how its examples are read; the names are those of the flags.

    A file for one split stands in place of what `data` has for it.
    """

    data: str | None = setting(None, "a hub id (NAME or OWNER/NAME), a folder, or a file to train on")
    data_config: str | None = setting(None, "configuration of a hub data set, such as de-en", metavar="CONFIG")
    train_file: str | None = setting(None, "training examples: csv, tsv, json, jsonl, parquet or text", metavar="FILE")
    validation_file: str | None = setting(None, "validation examples, likewise", metavar="FILE")
    test_file: str | None = setting(None, "test examples, likewise", metavar="FILE")
    unlabelled: str | None = setting(
        None,
        "texts alone, likewise, or a text a line in .txt: what the model answers becomes their targets, once and for "
        "all, and is kept in data/; these are then its training and validation examples",
        metavar="FILE",
    )
    source_lang: str | None = setting(
        None,
        "language of sources: key in 'translation' rows, column, or end of text files, and for tokenizers of "
        "many languages",
        metavar="LANG",
    )
    target_lang: str | None = setting(None, "language of targets, likewise", metavar="LANG")
    source_column: str | None = setting(None, "column of source texts", metavar="NAME")
    target_column: str | None = setting(None, "column of target texts", metavar="NAME")
    text_column: str | None = setting(None, "column of the texts to classify", metavar="NAME")
    text_pair_column: str | None = setting(None, "column of second texts, as for entailment", metavar="NAME")
    label_column: str | None = setting(None, "column of labels: the model's names, or numbers", metavar="NAME")
    prefix: str | None = setting(
        None, "in front of every input, '' for nothing; without it what suits the model", metavar="TEXT"
    )

    def __str__(self):
        """What was given: the data, or the files."""
        config = f" ({self.data_config})" if self.data_config else ""
        files = filter(None, map(self.file, (*SPLITS, UNLABELLED)))
        return self.data + config if self.data else ", ".join(files) or "no data"

    def file(self, split: str) -> str | None:
        """The file that was given for one split."""
        return self.unlabelled if split == UNLABELLED else getattr(self, f"{split}_file")

    def answers_of(self, split: str) -> str | None:
        """The model whose answers are a split's targets, by the record beside the data; None where it says nothing."""
        place = Path(self.file(split) or self.data or self.train_file or ".")
        record = place.with_name(RECORD_NAME) if place.is_file() else place / RECORD_NAME
        with contextlib.suppress(UserError):  # no record, or none of ours
            return read_json(record, "").get("answers_of")

    @property
    def is_located(self) -> bool:
        """Whether it says where any data are."""
        return any((self.data, *map(self.file, (*SPLITS, UNLABELLED))))

    def over(self, other: "DataSource | None") -> "DataSource":
        """This one, and where it says nothing, the other one. New data come without the old ones' files and config."""
        if other is None:
            return self
        fields = asdict(other)
        if self.data or self.unlabelled:
            fields |= dict.fromkeys(("data", "data_config", *(f"{split}_file" for split in SPLITS)))
        if self.source_lang:
            fields |= {"source_column": None, "target_column": None}
        return DataSource(**fields | {name: value for name, value in asdict(self).items() if value is not None})

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
        start = Path(model_path).parent
        content = {name: getattr(self, name) for name in PLAIN if getattr(self, name) is not None}
        files = {split: os.path.relpath(self.file(split), start) for split in SPLITS if self.file(split)}
        if files:
            content["files"] = files
        if self.data:
            is_local = Path(self.data).exists()
            content["folder" if is_local else "hub"] = os.path.relpath(self.data, start) if is_local else self.data
        answers_of = self.answers_of("train")
        return content | ({"answers_of": answers_of} if answers_of else {})

    @classmethod
    def from_json(cls, content: dict, model_path: str | Path) -> "DataSource":
        """What `to_json` wrote."""
        start = Path(model_path).parent
        files = {f"{split}_file": as_typed(start / path) for split, path in content.get("files", {}).items()}
        data = content.get("hub")
        if "folder" in content:
            data = as_typed(start / content["folder"])
            data = data if Path(data).exists() else os.path.abspath(data)  # which is never taken for a hub id
        return cls(data=data, **files, **{name: content[name] for name in PLAIN if name in content})


TEXT_TO_TEXT = ("source_lang", "target_lang", "source_column", "target_column")
LABELLED = ("text_column", "text_pair_column", "label_column")
PLAIN = ("data_config", *TEXT_TO_TEXT, *LABELLED, "prefix")  # the fields that a record holds as they are
FILES = {f"{split}?": str for split in SPLITS}
DATA = ({"files?": FILES, **{f"{name}?": str for name in ("folder", "hub", "answers_of", *PLAIN)}},)


def as_typed(path: str | Path) -> str:
    """A path as one would type it here: without detours; relative to the working folder, if that is shorter."""
    return min(os.path.relpath(path), os.path.abspath(path), key=len)


def column_flags(task) -> list[str]:
    """The flags that say which columns a task reads."""
    return [_flag_of(name) for name in (LABELLED if task.has_labels else TEXT_TO_TEXT)]


def check_source(source: DataSource, task) -> None:
    """Make sure that what was said of the data goes together, and with the task; a `UserError` names the flag."""
    for name in TEXT_TO_TEXT if task.has_labels else LABELLED:
        if getattr(source, name):
            known = ", ".join(column_flags(task))
            raise UserError(f"{_flag_of(name)}: has no part in {task.name}, which has {known}")
    for kind in ("lang", "column"):
        if bool(getattr(source, f"source_{kind}")) != bool(getattr(source, f"target_{kind}")):
            raise UserError(f"--source-{kind} and --target-{kind}: go together; give both")
    columns = source.columns(task)
    if len({*columns}) < len(columns):
        raise UserError(f"{', '.join(column_flags(task))}: {columns} are not different columns; give one for each")
    if source.data_config and (source.data is None or Path(source.data).exists()):
        raise UserError(f"--data-config {source.data_config}: belongs to a data set of the hub, which {source} is not")


def _flag_of(name):
    return f"--{name.replace('_', '-')}"
