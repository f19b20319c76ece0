"""How a script runs and ends: a line of JSON on stdout, a line on stderr for what the user can mend, an exit code."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable

from common.cli.flags import Parser
from common.runtime import plan, signals
from common.runtime.errors import UserError, lacks_memory
from common.runtime.progress import Talk, duration
from common.runtime.records import json_text
from common.runtime.schema import shown

os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else the hub's client tells of every retry on stderr
# In the environment of each of several copies that mpirun or srun started; torchrun sets WORLD_SIZE.
COPIES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
NAMED = 3  # outputs of a state, in the table of a plan


def launch(
    parser: Parser, run: Callable[..., dict], argv: list[str] | None = None, text_of: Callable[[dict], str] = json_text
) -> int:
    """Parse, run, report: the result as one JSON line on stdout, or as `text_of` gives it.

    Returns:
        the exit code. 0: done. 1, with a traceback: a bug. 2, with one line on stderr: something that the user can
        mend. 128 + n: interrupted by signal n; one line on stderr has the command to go on with.
    """
    args = parser.parse_args(argv)
    is_planned, talk = vars(args).get("plan"), Talk(args.quiet)
    args.quiet |= bool(is_planned)  # a few steps say nothing of losses
    try:
        with signals.heeded(), plan.opened(is_planned) as planned:
            check_launch(f"{parser.prog}{' --plan' * bool(is_planned)}", args.is_shared and not is_planned)
            took = plan.Took()
            result = run(args)
            if planned:
                result = {"plan": planned.to_json() | took.to_json()}
                tell_plan(result["plan"], talk)
            elif is_planned is not None:  # there is such a flag
                result["took"] = took.to_json()
            if os.environ.get("RANK", "0") == "0":
                print(text_of(result), flush=True)
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        Talk().say(f"{parser.prog}: interrupted by {signal.Signals(number).name}; to go on: {command(argv)}")
        return 128 + number
    except BrokenPipeError:  # the reader of our stdout has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full, read-only, forbidden or mistaken path
        message = f"{error.filename or 'writing'}: {error.strerror or error}"
    except UnicodeEncodeError as error:  # half of a surrogate pair stands for a byte of a file's name
        message = f"{shown(error.object)}: is not UTF-8 text, which some libraries need; choose another name"
    except Exception as error:
        if not lacks_memory(error):
            traceback.print_exc()
            return 1
        reason = (str(error).splitlines() or ["MemoryError"])[0].split("allocate memory: ")[-1]
        message = f"there is not enough memory ({reason}); take a smaller --batch-size, or a machine with more"
    Talk().say(f"{parser.prog}: error: {' '.join(message.split())}")
    return 2


def check_launch(script: str, is_shared: bool) -> None:
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


def tell_plan(planned: dict, talk: Talk) -> None:
    """Tell a plan, as `Plan.to_json` has it, as a table."""
    for state, names in planned["outputs"].items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        talk.say(f"{state}: {', '.join(names[:NAMED])}{more}")
    counts = {f"{split} examples": count for split, count in planned["examples"].items()}
    for name, count in (counts | {"steps of training": planned["steps"]}).items():
        talk.say(f"{name:32} {count:>9,}")
    for part in planned["parts"]:
        talk.say(f"{part['part']:32} {part['items']:>9,} {duration(part['seconds']):>14}")
    memory, disk = (f"{planned[name] / 2**20:,.0f} MiB" for name in ("peak_memory", "disk"))
    talk.say(f"in all {duration(planned['seconds'])}, {memory} of memory, {disk} on disk; nothing was written")


def command(argv: list[str] | None = None) -> str:
    """This very command, for a shell."""
    arguments = sys.argv if argv is None else [sys.argv[0], *argv]
    is_own = sys.orig_argv[-len(arguments) :] == arguments  # not where one process runs several stages
    return shlex.join(sys.orig_argv if is_own else ["python", *arguments])
