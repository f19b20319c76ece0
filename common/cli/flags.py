"""What all the scripts share on the command line: flags, argument types, progress, exit codes.

Torch is not imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import errno
import os
import shlex
import signal
import sys
import textwrap
import traceback

from common import __version__
from common.runtime import signals
from common.runtime.errors import UserError
from common.runtime.progress import Talk
from common.runtime.records import json_text
from common.runtime.schema import shown

os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else the hub's client tells of every retry on stderr
# Folders where the stages leave models and libraries, unless told otherwise.
MODELS, COMPOSED, FINE_TUNED = "model", "model-composed", "model-finetuned"
PRUNED_LIBRARY, FINE_TUNED_LIBRARY = "modules-pruned", "modules-finetuned"
# In the environment of each of several copies that mpirun or srun started; torchrun sets WORLD_SIZE.
COPIES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
SPLITS = ("train", "validation", "test")
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
# What a full, read-only, forbidden or mistaken path raises; any other OSError is a bug.
FIXABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.EIO,
    errno.ESTALE,  # a network file system's
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, and not a switch's False."""

    def _get_help_string(self, action):
        if action.default == []:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        silent = action.default is None or action.default is False or action.required
        return action.help if silent else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        """Paragraph by paragraph, and a file's name stays in one piece."""
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(
            textwrap.fill(each, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            for each in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows defaults in its help, answers a mistake with a single line, and knows what was given.

    The parsed arguments have one more attribute, `given`: the destinations of the flags that stood on the command line.
    """

    def __init__(self, description, epilog=None):
        super().__init__(description=description, epilog=epilog, formatter_class=_Help, allow_abbrev=False)
        self.set_defaults(is_shared=False)  # see `check_launch`
        self.add_argument("--version", action="version", version=f"composable-pruning {__version__}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        # Parsed into a namespace that holds a mark in every place; where it still stands, nothing was given.
        suppressed = argparse.SUPPRESS  # the default of a second flag for what another has a default for
        defaults = {action.dest: action.default for action in self._actions if action.default != suppressed}
        absent = object()
        namespace, rest = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(defaults, absent)))
        namespace.given = {name for name in defaults if getattr(namespace, name) is not absent}
        for name in defaults.keys() - namespace.given:
            setattr(namespace, name, defaults[name])
        return namespace, rest


def build_parser(description, *, overwrite, example=None, next_stage=None, shared=False):
    """A parser with the flags that every script takes.

    Args:
        overwrite: whether the script writes an output that may be there already.
        example: a command line for the end of the help.
        next_stage: the script that usually comes next.
        shared: whether several processes can share the work (see `processes`).
    """
    ends = [f"example: {example}" if example else "", f"next stage: {next_stage}" if next_stage else ""]
    parser = Parser(description, "\n\n".join(end for end in ends if end) or None)
    parser.set_defaults(is_shared=shared)
    parser.add_argument(
        "--device",
        default="auto",
        help="where to compute: auto (cuda if there is one, else cpu) or any torch device string",
    )
    parser.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    parser.add_argument("--quiet", action="store_true", help="no progress and no log lines on stderr")
    if overwrite:
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="replace an output that was made from other inputs or settings (one made from the same ones is kept)",
        )
    return parser


def refuse_unused(args, names, reason):
    """Make sure that flags which would have no effect were not given.

    Args:
        names: the flags' destinations.
    Raises:
        UserError: one was given; `reason` says what it goes with.
    """
    for name in names:
        if name in args.given:
            raise UserError(f"--{name.replace('_', '-')}: {reason}")


def add_model_flag(parser, help="the original model: folder or .pth"):
    """-m, which may be left out where there is one model alone."""
    parser.add_argument("-m", "--model", help=f"{help}; without it the only one in {MODELS}")


def add_configuration_flags(parser, *, library_help, output):
    """The flags of the two scripts that put configurations' models together, and write them to `output`."""
    add_model_flag(parser)
    parser.add_argument("-p", "--library", default=FINE_TUNED_LIBRARY, help=library_help)
    parser.add_argument("-c", "--configurations", default="conf.json", help="the configurations")
    parser.add_argument(
        "-n", "--nth", type=natural, nargs="+", required=True, help="which configurations, counted from 0"
    )
    parser.add_argument(
        "-o",
        "--output",
        default=output,
        help="folder, or .pth, of the model; {n} stands for the configuration's number, for which several need it",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="take removed heads and neurons out of the model, so that it really is smaller and faster",
    )
    add_dtype_flag(parser)
    parser.add_argument(
        "--push-to-hub",
        metavar="ID",
        help="upload the finished folder to this repository of the hub, as the user of the last login or of HF_TOKEN; "
        "{n} as in -o",
    )


def add_dtype_flag(parser):
    """--dtype of the scripts that write models."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights in the file; without it the original's own. Computed is in float32",
    )


def check_form(args):
    """Make sure that a folder is written where one is to be uploaded.

    Raises:
        UserError: it is a .pth.
    """
    if args.push_to_hub and args.output.endswith(".pth"):
        raise UserError(f"--push-to-hub: {args.output} is a .pth, and folders are uploaded; give -o a folder")


def numbered(template, flag, numbers):
    """A path for each configuration: `{n}` in the template stands for its number.

    Raises:
        UserError: there are several numbers, and no `{n}`.
    """
    if len(numbers) > 1 and "{n}" not in template:
        raise UserError(
            f"{flag} {template}: needs {{n}} in it, which stands for the number, for several configurations"
        )
    return {n: template.replace("{n}", str(n)) for n in numbers}


def add_shard_flag(parser, what):
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help=f"{what} of the I-th of N shares of the blocks alone, I from 0, for a job of its own; all jobs may work "
        "at once on one folder",
    )


def add_search_flags(parser):
    """The flags of config_generator.py's search. `args.search_flags` lists those that nothing else reads."""
    others = {action.dest for action in parser._actions}
    group = parser.add_argument_group("search", "configurations of variants that a library holds")
    group.add_argument("--search", metavar="LIBRARY", help="a library that holds the variants of -c")
    group.add_argument("-c", "--configurations", default="grid.json", help="what the library was made for, see --grid")
    group.add_argument(
        "--budget",
        type=positive_number,
        nargs="+",
        metavar="X",
        help="what each wanted model may cost: up to 1 a fraction of the original's blocks, above it "
        "the whole model's parameters, multiply-adds, bytes or milliseconds a batch",
    )
    group.add_argument(
        "--budget-of", type=natural, nargs="+", metavar="N", help="as much as the N-th configuration in -c costs"
    )
    group.add_argument(
        "--measure",
        choices=["parameters", "multiply-adds", "bytes", "latency"],
        default="parameters",
        help="what a budget is counted in; latency is measured on this device",
    )
    group.add_argument(
        "--objective",
        choices=["loss", "kl"],
        default="kl",
        help="what must rise least: the divergence from the original's predictions, or the task's loss, "
        "which takes many more examples to tell two variants apart",
    )
    group.add_argument(
        "--score-examples",
        type=positive,
        default=128,
        help="validation examples that variants and models are scored on; as many others are held back, to check what "
        "is found",
    )
    group.add_argument(
        "--rounds",
        type=natural,
        default=1,
        help="how often, at most, a choice is improved by scoring variants within the chosen model",
    )
    group.add_argument("--report", metavar="FILE", help="JSON file for scores, costs and what was found")
    add_precision_flag(group)
    add_data_flags(parser, batch_size=32)
    own = [action.dest for action in parser._actions if action.dest not in {*others, "search"}]
    parser.set_defaults(search_flags=own)


def add_calibration_flags(parser):
    """The flags of the data that what goes is chosen by. `args.calibration_flags` lists them."""
    others = {action.dest for action in parser._actions}
    group = parser.add_argument_group("data", "what a criterion that needs data reads")
    group.add_argument(
        "--calibration", type=positive, help="training examples to choose by; without it the model family's own"
    )
    add_data_flags(group, batch_size=32)
    parser.set_defaults(calibration_flags=[action.dest for action in parser._actions if action.dest not in others])


def add_evaluation_flags(parser):
    """The flags of the two evaluation scripts."""
    parser.add_argument(
        "-m",
        "--model",
        nargs="+",
        help=f"the models: folders or .pth; without it those in {FINE_TUNED}, else the only one in {MODELS}",
    )
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test", help="of the data set")
    parser.add_argument("--beams", type=few, default=1, help="beams of a translation's search; 1 is greedy")
    add_precision_flag(parser)
    parser.add_argument(
        "--bootstrap",
        type=some,
        default=1000,
        metavar="N",
        help="how many resamples of the examples the 95 %% confidence intervals are from; 0: no intervals",
    )
    parser.add_argument(
        "--save-predictions",
        metavar="FILE",
        help="JSON lines of every example's input, reference and prediction; {name} as in --report",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="JSON file for size, multiply-adds and seconds, measured beside the original's; {name} stands for the "
        "model's name, for which several models need it",
    )
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="the model to report beside; without it the one that the model's record names",
    )
    add_data_flags(parser, batch_size=64)


def add_translation_flags(parser):
    """The flags of what evaluates translation models."""
    parser.add_argument(
        "--max-new-tokens",
        type=many,
        help="longest answer, in tokens; without it 60 of a translation, 128 of a summary, or as many as the model "
        "has positions for",
    )


def add_data_flags(parser, *, batch_size):
    """The flags of every script that reads a data set."""
    parser.add_argument("-t", "--tokenizer", help="tokenizer folder; without it the one in the model's record")
    parser.add_argument(
        "--data", help="other data, read as those in the model's record are: a hub id, a folder, or a file to train on"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        help="longest input in tokens; without it the smaller of the tokenizer's limit and 128 "
        "(translation) or 256 (classification)",
    )
    parser.add_argument("--limit", type=positive, help="use only N examples of each split, the same ones in every run")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="examples a batch")


def add_source_flags(parser):
    """The flags of `sources.DataSource`, by the names of its fields. `args.source_flags` lists them.

    They are said once, to download_model.py; the model's record carries them to the other stages.
    """
    others = {action.dest for action in parser._actions}
    parser.add_argument(
        "--data",
        help="a hub id (NAME, OWNER/NAME, and perhaps /CONFIG), a folder, or a file to train on; without it those of "
        "the study",
    )
    parser.add_argument("--data-config", metavar="CONFIG", help="configuration of a hub data set, such as de-en")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}-file", metavar="FILE", help=f"{split} examples: csv, tsv, json, jsonl, parquet or text"
        )
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-lang", metavar="LANG", help=f"key of {side}s in 'translation' rows, column, or end of text files"
        )
    for side in ("source", "target"):
        parser.add_argument(f"--{side}-column", metavar="NAME", help=f"column of {side} texts")
    parser.add_argument("--text-column", metavar="NAME", help="column of the texts to classify")
    parser.add_argument("--text-pair-column", metavar="NAME", help="column of second texts, as for entailment")
    parser.add_argument("--label-column", metavar="NAME", help="column of labels: the model's names, or numbers")
    parser.add_argument("--prefix", metavar="TEXT", help="in front of every input, '' for nothing; kept in the record")
    parser.set_defaults(source_flags=[action.dest for action in parser._actions if action.dest not in others])


def add_training_flags(parser, *, epochs, early_stop, stats):
    """The flags of the two fine-tuning scripts."""
    parser.add_argument("--epochs", type=some, default=epochs, help="epochs, at most")
    parser.add_argument(
        "--epoch-size",
        type=positive,
        help="examples an epoch, with a validation after each; without it the whole training split",
    )
    parser.add_argument("--lr", type=positive_number, help="peak learning rate; without it what suits the model")
    parser.add_argument(
        "--warmup",
        type=fraction,
        default=0.1,
        help="fraction of the steps in which the learning rate rises; it falls linearly afterwards",
    )
    parser.add_argument("--weight-decay", type=non_negative_number, default=0.01, help="AdamW's decoupled decay")
    parser.add_argument("--clip", type=positive_number, default=1.0, help="largest gradient norm")
    parser.add_argument(
        "--early-stop",
        type=natural,
        default=early_stop,
        help="stop after this many epochs without a better validation loss; 0 never stops early",
    )
    add_precision_flag(parser)
    parser.add_argument("--stats", help=f"CSV for the losses of every epoch; without it {stats}")
    parser.add_argument(
        "--track",
        nargs="+",
        choices=TRACKERS,
        metavar="NAME",
        default=[],
        help=f"services that are told of every epoch's figures, through accelerate: {', '.join(TRACKERS)}",
    )


def add_precision_flag(parser):
    parser.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="bf16 runs the forward pass under autocast; tf32 rounds the factors of its products, on GPUs that can; "
        "weights, losses and what is solved stay fp32",
    )


def add_from_scratch_flags(parser):
    """The flags of a model that is trained from scratch; what is not given is as usual for its data."""
    group = parser.add_argument_group("training", "of a seq2seq model; what is left out is as suits the data")
    group.add_argument("--d-model", type=many, help="width of the model")
    group.add_argument("--layers", type=few, help="layers of the encoder, and as many of the decoder")
    group.add_argument("--feed-forward-size", type=many, metavar="NEURONS", help="of each feed-forward block")
    group.add_argument("--vocabulary", type=many, metavar="TOKENS", help="of either language, at most")
    group.add_argument("--epochs", type=some, help="epochs")
    group.add_argument("--batch-size", type=positive, help="examples a batch")
    group.add_argument("--lr", type=positive_number, help="peak learning rate")
    add_precision_flag(group)
    parser.set_defaults(from_scratch_flags=[action.dest for action in group._group_actions])


def add_whole_model_flags(parser):
    """The flags of training whole models, one or all compositions at once."""
    parser.add_argument(
        "--shared-rate",
        type=non_negative_number,
        metavar="FACTOR",
        help="learning rate of the rest of the model (embeddings, norms, head), as a multiple of that of the blocks; 0 "
        "leaves it as it is; without it what suits the model",
    )
    parser.add_argument(
        "--distill",
        type=fraction,
        default=0.0,
        metavar="ALPHA",
        help="share of the original's predictions in the training loss (0: the labels alone)",
    )
    parser.add_argument(
        "--dropout",
        action=argparse.BooleanOptionalAction,
        help="train with the model's own dropout or without; by default as it suits the model family",
    )
    parser.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="PIECES",
        help="take each batch in so many pieces, one after another, for less memory; the step is that of the whole",
    )


def add_metric_flags(parser):
    """The flags of a metric that the best epoch is chosen by."""
    parser.add_argument(
        "--metric-for-best",
        default="loss",
        metavar="METRIC",
        help="what the best epoch, and early stopping, are chosen by: the validation loss, or a metric of the task, "
        "measured after every epoch (bleu, chrf; rouge_1, rouge_2, rouge_l; accuracy, f1, matthews)",
    )


def _number(kind, accept, wanted):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {wanted}")
        return value

    return convert


LARGEST = 2**53  # nothing here is counted so far, and nothing overflows before it
natural = _number(int, lambda n: 0 <= n <= LARGEST, "a whole number from 0 up")
positive = _number(int, lambda n: 1 <= n <= LARGEST, "a whole number from 1 up")
some = _number(int, lambda n: 0 <= n <= 10**6, "a whole number from 0 to 1000000")
few = _number(int, lambda n: 1 <= n <= 1000, "a whole number from 1 to 1000")
many = _number(int, lambda n: 1 <= n <= 10**6, "a whole number from 1 to 1000000")
positive_number = _number(float, lambda x: 0 < x <= LARGEST, "a number above 0")
non_negative_number = _number(float, lambda x: 0 <= x <= LARGEST, "a number from 0 up")
fraction = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
rate = _number(float, lambda x: 0 <= x <= 1, "a pruning rate: the fraction removed, from 0 to 1")
rate_below_1 = _number(
    float, lambda x: 0 <= x < 1, "a pruning rate of weights: the fraction removed, from 0 to below 1"
)


def shard(text):
    """An argparse type: (I, N) of "I/N"."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count) <= LARGEST):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no share such as 0/4, the first of four")
    return int(number), int(count)


def launch(parser, run, argv=None):
    """Parse, run, report: the result as one JSON line on stdout, and the exit code.

    0: done. 1 with a traceback: a bug. 2 with one line on stderr: something the user can fix.
    128 + n with one line on stderr: interrupted by signal n; the line has the command to go on with.
    """
    open_streams()
    args = parser.parse_args(argv)
    try:
        with signals.heeded():
            check_launch(parser.prog, args.is_shared)
            result = run(args)
            if os.environ.get("RANK", "0") == "0":
                print(json_text(result), flush=True)
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        told = f"interrupted by {signal.Signals(number).name}; to go on: {command(argv)}"
        Talk().say(f"{parser.prog}: {told}")
        return 128 + number
    except BrokenPipeError:  # the reader of our stdout has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in FIXABLE:
            traceback.print_exc()
            return 1
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except UnicodeEncodeError as error:  # half of a surrogate pair stands for a byte of a file's name
        message = f"{shown(error.object)}: is not UTF-8 text, which some libraries need; choose another name"
    except Exception:
        traceback.print_exc()
        return 1
    Talk().say(f"{parser.prog}: error: {' '.join(message.split())}")
    return 2


def check_launch(script, is_shared):
    """Make sure that this process is not one of several copies that would write the same outputs.

    Raises:
        UserError: it is.
    """
    for name in COPIES:
        if os.environ.get(name, "1") != "1" and "WORLD_SIZE" not in os.environ:
            raise UserError(
                f"{os.environ[name]} copies were started ({name}), which would not share the work; use torchrun"
            )
    if os.environ.get("WORLD_SIZE", "1") != "1" and not is_shared:
        raise UserError(f"{script} runs in one process; start it without torchrun or accelerate launch")


def command(argv=None):
    """This very command, for a shell. With --overwrite too: what was made from the same things is kept with it."""
    arguments = sys.argv if argv is None else [sys.argv[0], *argv]
    is_own = sys.orig_argv[-len(arguments) :] == arguments  # not where one process runs several stages
    return shlex.join(sys.orig_argv if is_own else ["python", *arguments])


def open_streams():
    """Give stdin, stdout and stderr a place where they were closed, before a file of ours gets their number."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
