"""What a script's flags name, opened once: the model, its tokenizer, its data, and how to run it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.blocks.tensors import parameter_counts
from common.cli.flags import settings_from
from common.cli.paths import the_model, the_one
from common.data.examples import Examples, load_examples
from common.data.labels import WithoutLabels
from common.data.readers import finder
from common.data.sources import SPLITS, UNLABELLED, DataSource, check_source
from common.evaluation.answers import Quality
from common.models import compact
from common.models.compact import make_compact
from common.models.engines import ENGINES
from common.models.languages import set_languages
from common.models.load import LoadedModel, data_source, load_model, load_tokenizer
from common.models.plain import form_of
from common.models.saving import save_for_engine, save_model
from common.models.trial import EXACT, QUANTIZED, afresh_check
from common.models.vocabulary import DATA, Vocabulary, check_same, choose_vocabulary, growth
from common.runtime import plan
from common.runtime.devices import Runtime, resolve_device
from common.runtime.errors import UserError
from common.runtime.processes import join, own_number
from common.runtime.progress import Talk
from common.runtime.settings import ComputeSettings, TrainingDataSettings, TrainingSettings
from common.training.loop import steps_of
from common.training.tracking import Tracking

TRIED = 100  # examples of each split that are read when a model is adopted
UNKNOWN = 0.03  # of the tokens: what is more than rare words and emoji is told
METRIC_EXAMPLES = 256  # of what is generated: enough to tell epochs apart, and takes seconds


@dataclass(frozen=True)
class Opened:
    """A model that a script was given, and what belongs to it."""

    loaded: LoadedModel
    runtime: Runtime
    tokenizer: object = None
    source: DataSource | None = None
    data: TrainingDataSettings = TrainingDataSettings()
    vocabulary: Vocabulary | None = None  # of --vocabulary; `tokenizer` is then its own, and `loaded` as it was

    def split(self, name: str, whole: bool = False) -> Examples:
        """A split of its data: "train", "validation" or "test"; `whole`: without truncation."""
        limit = self.data.validation_limit if name == "validation" else None
        with self.runtime.talk.waiting(f"reading {self.source} ({name} split), and tokenizing it"):
            examples = load_examples(
                self.source,
                name,
                self.tokenizer,
                self.loaded.task,
                prefix=self.loaded.prefix(self.source),
                label2id=self.loaded.label2id,
                positions=self.loaded.positions,
                token_types=self.loaded.token_types,
                max_length=self.data.max_length,
                limit=limit or self.data.limit,
                whole=whole,
            )
        if planned := plan.current():
            planned.examples[name] = len(examples)
        if examples.unknown > UNKNOWN:
            self.runtime.talk.say(
                f"{self.source}: {examples.unknown:.0%} of the tokens of its {name} split are unknown to the tokenizer "
                f"({self.tokenizer.name_or_path}); is it the one that the model was trained with?"
            )
        if not whole and (count := examples.at_longest()):
            self.runtime.talk.say(
                f"{self.source}: {count} of the {len(examples)} examples of its {name} split fill {examples.longest} "
                "tokens, and are cut there if they are longer; see --max-length of prune.py, fine-tuning and evaluation"
            )
        return examples


def open_model(args, path: str | Path | None = None, to_run: bool = False, talk: Talk | None = None) -> Opened:
    """The model at `path`, or that of the flags -m and --device; `to_run`: see `load_model`.

    `talk`: the conversation, if there is one already.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    compute, data = settings_from(args, ComputeSettings), settings_from(args, TrainingDataSettings)
    device, path = resolve_device(compute.device), path or the_model(args.model)
    talk = talk or Talk(args.quiet or own_number() > 0)
    with talk.waiting(f"loading {path}"):
        loaded = load_model(path, device, to_run)
    processes = join(device)
    runtime = Runtime(device, data.batch_size, talk, processes, pieces=compute.accumulate, precision=compute.precision)
    return Opened(loaded, runtime, data=data)


def open_study(args, path: str | Path | None = None, script: str | None = None, talk: Talk | None = None) -> Opened:
    """The same with its tokenizer and where its data are.

    Args:
        script: the evaluation script that the model's task must be one of.
    Raises:
        UserError: something of it is not there, or the model is for another task, or has too few positions for the
            flags.
    """
    opened = open_model(args, path, to_run=script is not None, talk=talk)
    loaded, task = opened.loaded, opened.loaded.task
    for flag, length in (
        ("--max-length", vars(args).get("max_length")),
        ("--max-new-tokens", vars(args).get("max_new_tokens")),
    ):
        if length and loaded.positions and length > loaded.positions:
            raise UserError(f"{flag} {length}: {loaded.path} has positions for {loaded.positions} tokens")
    if script not in (None, task.evaluated_by):
        raise UserError(f"{loaded.path}: is a {task.name} model; evaluate it with {task.evaluated_by}")
    source = data_source(DataSource(data=args.data, test_file=vars(args).get("test_file")), loaded)
    if source is None:
        raise UserError(f"{loaded.path}: its record names no data; give a folder or a hub id with --data")
    check_source(source, task)
    loaded.prefix(source)  # refuses what cannot be known
    opened = replace(opened, tokenizer=open_tokenizer(args, loaded), source=source)
    set_languages(opened.tokenizer, loaded.model, source, task)
    return opened


def open_tokenizer(args, loaded: LoadedModel):
    """The tokenizer of a flag -t: a tokenizer, or a folder that holds one alone; without the flag the model's own.

    Raises:
        UserError: there is none.
    """
    path = None if args.tokenizer is None else the_one(args.tokenizer, "tokenizer_config.json", "tokenizer", "-t")
    return load_tokenizer(path, loaded)


def open_vocabulary(args, opened: Opened) -> Opened:
    """The same with the vocabulary of the flag --vocabulary, if it was given.

    Raises:
        UserError: it cannot be made smaller so; with "data", a text of the training data would be tokenized otherwise.
    """
    if args.vocabulary is None:
        return opened
    train, validation = opened.split("train", whole=True), opened.split("validation", whole=True)
    vocabulary = choose_vocabulary(args.vocabulary, opened.loaded.model, opened.tokenizer, train)
    smaller = replace(opened, tokenizer=vocabulary.tokenizer, vocabulary=vocabulary)
    if args.vocabulary == DATA:
        check_same(train, smaller.split("train", whole=True), vocabulary)
    figures = growth(validation, smaller.split("validation", whole=True), opened.tokenizer, smaller.tokenizer)
    longer = 100 * (figures["tokens_after"] / figures["tokens_before"] - 1)
    opened.runtime.talk.say(
        f"vocabulary: {figures['vocabulary_after']:,} of {figures['vocabulary_before']:,} tokens stay; "
        f"{figures['examples']:,} validation examples take {longer:.2f} % more tokens, of which "
        f"{figures['unknown_after']:,} are unknown ({figures['unknown_before']:,} before)"
    )
    return replace(smaller, vocabulary=replace(vocabulary, figures=figures))


def check_data(opened: Opened) -> dict[str, Examples]:
    """Make sure, with a few examples of each split, that a model can be used on its data.

    Returns:
        the examples by split; left out are splits that are made, and test examples without labels, which is said.
    Raises:
        UserError: see `splits.read_texts` and `examples.load_examples`.
    """
    few, find = replace(opened, data=TrainingDataSettings(limit=TRIED)), finder(opened.source, opened.loaded.task)
    present, made, read = [split for split in SPLITS if find(split)], ["train", "validation"], {}
    if opened.source.unlabelled:
        present, made = [UNLABELLED, *present], []
    for split in dict.fromkeys([*made, *present]):
        try:
            read[split] = few.split(split)
        except WithoutLabels as error:
            if split != "test":
                raise
            opened.runtime.talk.say(str(error))
    return {split: read[split] for split in present if split in read}


def some_examples(opened: Opened, tokenizer) -> Examples | None:
    """A few validation examples of a model; None if they cannot be read."""
    few = replace(opened.data, limit=TRIED)
    source = opened.source or data_source(None, opened.loaded)
    opened = replace(opened, source=source, tokenizer=tokenizer, data=few)
    try:
        return source and opened.split("validation")
    except UserError:
        return None


def longest_answer(loaded: LoadedModel, max_new_tokens: int | None = None) -> int:
    """How many tokens a model may generate: as the flag says, or, if they fit, its generation config or its task."""
    if loaded.task.has_labels:
        return 0
    own = loaded.model.generation_config
    usual = own.max_new_tokens or (own.max_length or 1) - 1 or loaded.task.longest_answer  # one is the start's
    return max_new_tokens or min(usual, loaded.positions or usual)


def search_of(loaded: LoadedModel, beams: int | None = None, max_new_tokens: int | None = None) -> dict[str, int]:
    """How a model answers, for `answers.translate`: as the flags say, or its generation config, or else greedily."""
    beams = beams or loaded.model.generation_config.num_beams or 1
    return {"beams": beams, "max_new_tokens": longest_answer(loaded, max_new_tokens)}


def open_quality(metric: str, opened: Opened, validation: Examples) -> Quality | None:
    """The metric of --metric-for-best, to be measured on validation examples; None for the loss.

    Raises:
        UserError: it is no metric of the task.
    """
    task = opened.loaded.task
    if metric == "loss":
        return None
    if metric not in task.metrics:
        raise UserError(f"--metric-for-best {metric}: of {task.name} it is one of loss, {', '.join(task.metrics)}")
    examples = validation if task.has_labels else validation.sample(METRIC_EXAMPLES)
    most = min(task.longest_answer, longest_answer(opened.loaded))
    return Quality(metric, examples, opened.tokenizer, opened.runtime, most)


@dataclass(frozen=True)
class Form:
    """How a model is written: in which format, whether compact, and as which type."""

    format: str
    compact: bool
    dtype: str
    vocabulary: Vocabulary | None = None

    def to_json(self) -> dict:
        """Its part of what a model is made from."""
        engine = ENGINES.get(self.format)
        version = {"format": self.format, "format_version": engine.code.VERSION} if engine else {}
        return {**self.structure(), "dtype": self.dtype, **version}

    def structure(self) -> dict:
        """The part of it that training depends on."""
        vocabulary = self.vocabulary.to_json() if self.vocabulary else {}
        return {"compact": self.compact} | ({"compact_version": compact.VERSION} if self.compact else {}) | vocabulary

    def made(self, model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> tuple:
        """A model, and the masks of what is removed from it, in this form, but for the type; `model` is used up."""
        model = self.teacher(model)
        return make_compact(model, masks) if self.compact else (model, masks)

    def teacher(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model that knows the tokens of this form, and is otherwise as it was."""
        return self.vocabulary.trim(model) if self.vocabulary else model

    @property
    def rounded(self) -> str:
        """The type that weights are rounded to before they are written; an engine does so itself."""
        return "float32" if self.format in ENGINES else self.dtype

    @property
    def is_half(self) -> bool:
        """Whether activations will be float16 too, where a GPU runs it."""
        return self.dtype in ("float16", "int8_float16")

    def save(self, path: str, model: torch.nn.Module, record: dict, masks: dict, tokenizer) -> None:
        """Write a model of `made` to a path; a folder that is compact, or of another format, once it works afresh."""
        if planned := plan.current():
            name = self.dtype.split("_")[0]
            size = 1 if name == "int8" else getattr(torch, name).itemsize
            planned.disk[path] = size * sum(parameter.numel() for parameter in model.parameters())
            return
        check, engine = None, self.format if self.format in ENGINES else None
        if self.compact and not path.endswith(".pth"):
            tolerance = QUANTIZED if engine and self.dtype != "float32" else EXACT
            check = afresh_check(path, model, tokenizer, engine, tolerance)
        if engine:
            save_for_engine(engine, path, model, record, tokenizer, self.dtype, check)
        else:
            save_model(path, model, record, masks=masks, tokenizer=tokenizer, dtype=self.dtype, check=check)

    def measured(self, model: torch.nn.Module) -> dict:
        """What to report of a model of `made`: counts of its parameters, and how it is written."""
        is_engines = self.format in ENGINES
        form = {"format": self.format, "quantization": self.dtype} if is_engines else form_of(model)
        return parameter_counts(model) | form

    def figures(self) -> dict:
        """What to report of the form alone."""
        return {"vocabulary": self.vocabulary.figures} if self.vocabulary else {}


def form_from(args, opened: Opened) -> Form:
    """The form of a script's flags; the type is the original's if they say none.

    Raises:
        UserError: the model cannot be had in the format.
    """
    if args.format in ENGINES:
        ENGINES[args.format].code.check_convertible(opened.loaded.model)
        return Form(args.format, True, args.quantization or "float32", opened.vocabulary)
    return Form(args.format, args.compact, args.dtype or opened.loaded.dtype, opened.vocabulary)


def training_settings(args, loaded: LoadedModel, start: str, train: Examples, distill: float = 0.0) -> TrainingSettings:
    """The settings of a script's training flags, with what suits the model in the place of None.

    Args:
        start: what the training begins with: "pruned" or "tuned" blocks of a whole model, or a "block" apart.
        distill: the usual share of the original's predictions.
    """
    settings, study = settings_from(args, TrainingSettings), loaded.study
    lr, shared_rate = loaded.rates(start, steps_of(train, settings))
    return replace(
        settings,
        lr=settings.lr or lr,
        shared_rate=shared_rate if settings.shared_rate is None else settings.shared_rate,
        distill=distill if settings.distill is None else settings.distill,
        dropout=start != "block" and study.dropout,
    )


def open_tracking(
    args, output, stats_file, run: str, recipe: TrainingSettings, train: Examples, runtime: Runtime
) -> Tracking:
    """The trackers of --track for one run of training; of several processes the first alone has them."""
    names = args.track if runtime.processes.is_first else []
    return Tracking(names, output, run, stats_file, recipe, steps_of(train, recipe), runtime.talk)
