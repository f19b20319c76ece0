"""Flags: the parser of a script, the flags of a settings class, and those that several scripts share."""

import argparse
import dataclasses
import shlex
import textwrap
import types
import typing
from pathlib import Path

from common import __version__
from common.cli.values import int_between, number, vocabulary
from common.models.engines import ENGINES, TRANSFORMERS
from common.runtime.errors import UserError, as_user_error
from common.runtime.settings import ComputeSettings

# Folders where the stages leave models and libraries, unless told otherwise.
MODELS, COMPOSED, FINE_TUNED = "model", "model-composed", "model-finetuned"
PRUNED_LIBRARY, FINE_TUNED_LIBRARY = "modules-pruned", "modules-finetuned"
DTYPES = ("float32", "bfloat16", "float16")
AT_FILE = "@FILE stands for the flags in a file, written as on the command line, on as many lines as you like."
NOT_RECORDED = {"output", "stats", "track", "push_to_hub", "overwrite", "quiet", "plan"}  # as flags of an output
LARGEST_SEED = 2**32 - 1  # that all random numbers take; what is made of it fits into 64 bits
# Titles of the groups that a help comes in.
OUTPUT, DATA, TRAINING, SPEED, TRACKING = "model and output", "data", "training", "memory and speed", "tracking"


class _Help(argparse.HelpFormatter):
    """Shows the defaults that say something, and keeps the paragraphs of a text."""

    def _get_help_string(self, action):
        if action.default in (None, False, (), [], argparse.SUPPRESS):
            return action.help
        default = action.default if isinstance(action.default, tuple | list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, default))})"

    def _fill_text(self, text, width, indent):
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in paragraphs)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with a single line, knows what was given, and reads flags from @FILE.

    The parsed arguments have one more attribute, `given`: the destinations of the flags that stood on the command line.
    """

    def __init__(
        self,
        description: str,
        *,
        example: str = "",
        usage: str = "%(prog)s [flags]",
        next_stage: str | None = None,
        overwrite: bool = False,
        shared: bool = False,
        planned: bool = False,
    ):
        """
        Args:
            example: a command line, which the help begins with.
            next_stage: the script that usually comes next.
            overwrite: whether the script writes an output that may be there already.
            shared: whether several processes can share the work, see `runtime.processes`.
            planned: whether the script can plan its work, see `runtime.plan`.
        """
        super().__init__(
            description=f"example: {example}\n\n{description}" if example else description,
            epilog="\n\n".join([AT_FILE, *([f"next stage: {next_stage}"] if next_stage else [])]),
            usage=usage,
            formatter_class=_Help,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
        )
        self.set_defaults(is_shared=shared)
        self.groups = {}
        self.add_argument("--version", action="version", version=f"composable-pruning {__version__}")
        self.add_argument("--quiet", action="store_true", help="no progress and no log lines on stderr")
        if planned:
            self.add_argument(
                "--plan",
                action="store_true",
                help="write nothing; tell what would be made and why, and, from a few timed steps, the seconds, memory "
                "and disk space that it would take",
            )
        if overwrite:
            self.add_argument(
                "--overwrite",
                action="store_true",
                help="replace an output that was made from other inputs or settings (one made from the same ones is "
                "kept)",
            )

    def group(self, title: str):
        """The group of flags of that title."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title]

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def convert_arg_line_to_args(self, arg_line):
        """The arguments in a line of an @FILE, as a shell would read them."""
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        # Parsed into a namespace that holds a mark in every place; where it still stands, nothing was given.
        defaults = {action.dest: action.default for action in self._actions if action.default != argparse.SUPPRESS}
        absent = object()
        marked = argparse.Namespace(**dict.fromkeys(defaults, absent))
        try:
            namespace, unknown = super().parse_known_args(args, marked)
        except ValueError as error:  # a quote that is not closed, or bytes that are no text, in an @FILE
            self.error(f"a file of flags: {error}")
        namespace.given = {name for name in defaults if getattr(namespace, name) is not absent}
        for name in defaults.keys() - namespace.given:
            setattr(namespace, name, defaults[name])
        return namespace, unknown


def add_settings(parser: Parser, settings_class: type, title: str, *, omit: tuple[str, ...] = (), **defaults) -> None:
    """Add the flags of a settings class to a group of the help.

    Args:
        omit: fields that this script has no flag for.
        defaults: of fields, in place of the class's own.
    """
    group, hints = parser.group(title), typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if not field.metadata or field.name in omit:
            continue
        kind, several = _kind_of(hints[field.name])
        options = {name: field.metadata[name] for name in ("choices", "metavar")}
        if kind in (int, float):
            options["type"] = number(kind, **field.metadata["bounds"])
            options["metavar"] = options["metavar"] or ("N" if kind is int else "X")
        if several:
            options["nargs"] = "+"
        if kind is bool:
            options = {"action": "store_true"}
        names = field.metadata["flag"].split() or [flag_of(field.name)]
        default = defaults.get(field.name, field.default)
        group.add_argument(*names, help=field.metadata["help"].replace("%", "%%"), default=default, **options)


def _kind_of(hint):
    """(type of one value, whether there may be several) of a field's annotation: int, float | None, tuple[str, ...]."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    return (typing.get_args(hint)[0], True) if typing.get_origin(hint) is tuple else (hint, False)


def settings_from(args: argparse.Namespace, settings_class: type, **known):
    """The settings that flags say; `known`: those of fields without a flag, or in place of a flag's."""
    names = {field.name for field in dataclasses.fields(settings_class)} & vars(args).keys()
    values = {name: getattr(args, name) for name in names}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return settings_class(**values | known)


def flags_of(settings_class: type) -> list[str]:
    """The fields of a settings class that have a flag."""
    return [field.name for field in dataclasses.fields(settings_class) if field.metadata]


def flag_of(name: str) -> str:
    """The flag of a destination."""
    return f"--{name.replace('_', '-')}"


def flags_given(args: argparse.Namespace, **known) -> dict[str, object]:
    """The flags that were given, {flag: JSON value}, for a record; but for those of where results go and what is told.

    `known`: values in the place of the given ones.
    """
    names = {name: getattr(args, name) for name in sorted(args.given - NOT_RECORDED)}
    return {flag_of(name): value for name, value in (names | known).items()}


def refuse_unused(args: argparse.Namespace, names, reason: str) -> None:
    """Make sure that flags which would have no effect were not given.

    Args:
        names: the flags' destinations.
    Raises:
        UserError: one was given; `reason` says what it goes with.
    """
    for name in names:
        if name in args.given:
            raise UserError(f"{flag_of(name)}: {reason}")


# --- flags that several scripts share ------------------------------------------------------------------------------


def add_model(parser: Parser, help: str = "the original model: folder or .pth") -> None:
    """-m, which may be left out where there is one model alone."""
    parser.group(OUTPUT).add_argument("-m", "--model", help=f"{help}; without it the only one in {MODELS}")


def add_models(parser: Parser) -> None:
    """-m of the evaluation scripts, which takes several."""
    parser.group(OUTPUT).add_argument(
        "-m",
        "--model",
        nargs="+",
        help=f"the models: folders or .pth; without it those in {FINE_TUNED}, else the only one in {MODELS}",
    )


def add_compute(parser: Parser, *, omit: tuple[str, ...] = ()) -> None:
    """--device and its kin."""
    add_settings(parser, ComputeSettings, SPEED, omit=omit)


def add_seed(parser: Parser, title: str = TRAINING) -> None:
    """--seed, of scripts that draw random numbers."""
    parser.group(title).add_argument(
        "--seed", type=int_between(0, LARGEST_SEED), default=0, help="seed of everything random"
    )


def add_configurations(parser: Parser, *, library_help: str, output: str, without_nth: str = "") -> None:
    """The flags of the two scripts that put configurations' models together, and write them to `output`.

    `without_nth`: how the help of -n ends where it may be left out.
    """
    add_model(parser)
    group = parser.group(OUTPUT)
    group.add_argument("-p", "--library", default=FINE_TUNED_LIBRARY, help=library_help)
    group.add_argument("-c", "--configurations", default="conf.json", help="the configurations (conf.json)")
    options = {"type": int_between(0), "nargs": "+", "required": not without_nth}
    group.add_argument("-n", "--nth", help=f"which configurations, counted from 0{without_nth}", **options)
    group.add_argument(
        "-o",
        "--output",
        default=output,
        help="folder, or .pth, of the model; {n} stands for the configuration's number, for which several need it",
    )
    group.add_argument(
        "--compact",
        action="store_true",
        help="take removed heads and neurons out of the model, so that it really is smaller and faster",
    )
    add_dtype(parser)
    group.add_argument(
        "--format",
        choices=(TRANSFORMERS, *ENGINES),
        default=TRANSFORMERS,
        help="what loads the folder: transformers; the engine CTranslate2, which runs encoder-decoders much faster; or "
        "ONNX Runtime. The engines always get a --compact model",
    )
    group.add_argument(
        "--quantization",
        choices=ENGINES["ctranslate2"].quantizations,
        help="type of the weights of another --format; int8 is smallest and fastest. Without it they are float32",
    )
    group.add_argument(
        "--vocabulary",
        type=vocabulary,
        metavar="N|data",
        help="leave out the tokens that the training data do not need (data), or keep the N most frequent there; "
        "special tokens and what any text is spelt with stay. The folder's own tokenizer knows what is left",
    )
    group.add_argument(
        "--push-to-hub",
        metavar="ID",
        help="upload the finished folder to this repository of the hub, as the user of the last login or of HF_TOKEN; "
        "{n} as in -o",
    )


def add_dtype(parser: Parser) -> None:
    """--dtype of the scripts that write models."""
    parser.group(OUTPUT).add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights in the file; without it the original's own. Computed is in float32",
    )


def check_form(args: argparse.Namespace) -> None:
    """Make sure that an output of `add_configurations` is a folder, if it is to be pushed or to hold a tokenizer; and
    that what else is said of its form goes together.

    Raises:
        UserError: it does not, or an engine is to be used and not installed.
    """
    if args.format == TRANSFORMERS:
        refuse_unused(args, ["quantization"], f"goes with --format {' or '.join(ENGINES)}")
    else:
        engine, form = ENGINES[args.format], f"--format {args.format}"
        refuse_unused(args, ["dtype"], f"goes with folders for transformers; {form} has --quantization")
        if args.quantization not in (None, *engine.quantizations):
            raise UserError(f"--quantization {args.quantization}: of {form} it is {' or '.join(engine.quantizations)}")
        if args.output.endswith(".pth"):
            raise UserError(f"{form}: {args.output} is a .pth, and it is a folder; give -o another name")
        with as_user_error(form, "cannot be had"):
            engine.check_installed()
    if args.push_to_hub and args.output.endswith(".pth"):
        raise UserError(f"--push-to-hub: {args.output} is a .pth, and folders are uploaded; give -o a folder")
    if args.vocabulary and args.output.endswith(".pth"):
        raise UserError(f"--vocabulary: {args.output} is a .pth, which holds no tokenizer; give -o a folder")


def numbered(template: str, flag: str, numbers: list[int | None]) -> dict[int | None, str]:
    """A path for each configuration: `{n}` in the template stands for its number, which is None of a model of none.

    Raises:
        UserError: there are several numbers, and no `{n}`; or none, and one.
    """
    if None in numbers and "{n}" in template:
        raise UserError(f"{flag} {template}: {{n}} is a configuration's number; without -n give a name without it")
    if len(numbers) > 1 and "{n}" not in template:
        raise UserError(
            f"{flag} {template}: needs {{n}} in it, which stands for the number, for several configurations"
        )
    return {n: str(Path(template.replace("{n}", str(n)))) for n in numbers}  # a shell may end a folder with a slash
