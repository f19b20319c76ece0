"""Attack the stages: kill them, let them race, damage what they read; nothing may be lost, and no damage accepted.

--kills N: SIGKILL before N operations on files, evenly spread over those of all stages; a rerun must then leave what an
undisturbed run leaves. --races N: rounds of two and eight writers of one library, which must end up as if one had come
after the other. --damages N: N damaged files. One half are mutations of any file that a stage reads (bytes, JSON
values, arrays, links, code in place of data), the other half single flipped bits in files that have digests. A stage
must refuse in one line or do its work; a flipped bit must be refused or have no effect.

Tiny models are made first, and every stage runs on them once. This process has then imported everything, and forks a
child for every case, which takes a fraction of a second where a fresh Python takes five. The result is one JSON line of
counts; the program ends with 1 if a case failed, and --case repeats a single one.
"""

import collections
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "tests")  # `common` and the tests' tiny models lie there

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import load_script  # noqa: E402
from tiny import make_workshop  # noqa: E402

from common.cli.flags import Parser, add_seed  # noqa: E402
from common.cli.launch import launch  # noqa: E402
from common.cli.values import int_between  # noqa: E402
from common.runtime.records import digest, file_digest  # noqa: E402

PATIENCE = 30  # seconds that a case may take
MEMORY = Path("/dev/shm")  # where files cost nothing to write
MARKER = "code-was-run"


def parser():
    flags = Parser(__doc__, example="attack.py --kills 30 --damages 160")
    add_seed(flags, "attacks")
    flags.add_argument("--kills", type=int_between(0), default=0, metavar="N", help="kills at operations on files")
    flags.add_argument("--races", type=int_between(0), default=0, metavar="N", help="rounds of several writers at once")
    flags.add_argument("--damages", type=int_between(0), default=0, metavar="N", help="damaged files")
    flags.add_argument("--case", metavar="ID", help="repeat one case, for instance kill/prune/7")
    return flags


# --- the stages --------------------------------------------------------------------------------------------------


# Name: command | what it reads | what it makes | old outputs that lie where the new ones go. T5 and BERT stand for
# model, tokenizer and data; NAME* for a library with its two CSVs.
TABLE = """
configure: config_generator.py -m model/t5 RATES --feed-forward 0 0.5 -n 2 | T5 | conf.json
grid: config_generator.py -m model/t5 --attention 0 0.5 --linear 0 0.3 --grid -o grid.json | T5 | grid.json
bert-configure: config_generator.py -m model/distilbert RATES -n 2 -o bert.json | BERT | bert.json
scheme: prune_scheme_generator.py | conf.json | conf_prune.json
grid-scheme: prune_scheme_generator.py -i grid.json -o grid_prune.json | grid.json | grid_prune.json
bert-scheme: prune_scheme_generator.py -i bert.json -o bert_prune.json | bert.json | bert_prune.json
prune: prune.py -m model/t5 -o pruned | T5 conf_prune.json | pruned
prune-grid: prune.py -m model/t5 -c grid_prune.json -o grid-pruned | T5 grid_prune.json | grid-pruned
choose: prune.py -m model/t5 -o chosen --criterion reconstruction --calibration 16 | T5 conf_prune.json | chosen
prune-over: prune.py -m model/t5 -o over --overwrite | T5 conf_prune.json | over | chosen
bert-prune: prune.py -m model/distilbert -c bert_prune.json -o bert-pruned | BERT bert_prune.json | bert-pruned
reconstruct: TUNE/t5 -p pruned -o solved --method reconstruct | T5 pruned | solved*
train: TUNE/t5 -p pruned -o trained --method train --epochs 2 | T5 pruned | trained*
train-over: TUNE/t5 -p pruned -o again --method train --epochs 2 --lr 1e-3 --overwrite | T5 pruned | again* | trained*
joint: TUNE/t5 -p pruned -o joint --method joint --epochs 2 | T5 conf.json pruned | joint* joint-compositions.csv
grid-reconstruct: TUNE/t5 -p grid-pruned -o grid-solved --method reconstruct | T5 grid-pruned | grid-solved*
bert-reconstruct: TUNE/distilbert -p bert-pruned -o bert-solved | BERT bert-pruned | bert-solved*
search: SEARCH -o found.json --report r.json | T5 grid.json grid-solved | found.json r.json grid-solved/record.json
compose: COMPOSE -p solved -n 0 1 -o composed/{n} | T5 conf.json solved | composed
compose-over: COMPOSE -p pruned -n 1 -o new --overwrite | T5 conf.json pruned | new | composed/0
compose-pth: COMPOSE -p joint -n 0 -o composed.pth | T5 conf.json joint | composed.pth
compose-compact: COMPOSE -p solved -n 1 -o compact --compact | T5 conf.json solved | compact
bert-compose: BERTS -p bert-solved -n 1 -o bert-composed --compact | BERT bert.json bert-solved | bert-composed
finetune: FIT -p solved -n 0 -o finetuned/0 --epochs 2 | T5 conf.json solved | finetuned
finetune-pth: FIT -p pruned -n 0 1 -o b-{n}.pth --epochs 2 | T5 conf.json pruned | b-0.pth b-1.pth b-0.csv b-1.csv
finetune-over: FIT -p solved -n 1 -o f --overwrite | T5 conf.json solved | f f.csv | finetuned/0 finetuned/0.csv
evaluate-t5: evaluate-t5.py -m composed/0 LIMIT --report report.json | T5 composed | report.json
evaluate-pth: evaluate-t5.py -m b-0.pth LIMIT | T5 b-0.pth |
evaluate-compact: evaluate-t5.py -m compact LIMIT | T5 compact |
evaluate-distilbert: evaluate-distilbert.py -m bert-composed --limit 4 --report b.json | BERT bert-composed | b.json
download: download_model.py t5 --checkpoint ./finetuned/0 --name local | T5 finetuned | model/local tokenizer/local
plot: plot_loss.py b-0.csv b-1.csv joint-compositions.csv -o l.png | b-0.csv b-1.csv joint-compositions.csv | l.png
"""
SHORT = {
    "RATES": "--attention 0.25 0.5 --linear 0.3 0.5",
    "LIMIT": "--limit 4 --max-new-tokens 8",
    "TUNE": "block-level_finetuning.py --batch-size 8 --held-out 8 --calibration 16 -m model",
    "FIT": "model-level_finetuning.py -m model/t5 -c conf.json --batch-size 8",
    "COMPOSE": "compose_model.py -m model/t5 -c conf.json",
    "BERTS": "compose_model.py -m model/distilbert -c bert.json",
    "SEARCH": "config_generator.py -m model/t5 --search grid-solved -c grid.json --budget-of 1 2 --score-examples 4 "
    "--batch-size 8 --overwrite",
}


class Stage(NamedTuple):
    """A command line that reads files of the workshop and makes others there."""

    words: list[str]  # script and arguments
    reads: list[str]
    makes: list[str]
    over: list[str]  # old outputs, in the order of `makes`


def read_table():
    stages = {}
    for line in TABLE.strip().split("\n"):
        name, _, rest = line.partition(": ")
        command, *files = rest.split("|")
        for word, kind in (("T5", "t5"), ("BERT", "distilbert")):
            folders = f"model/{kind} tokenizer/{kind} data/{kind}"
            files = [re.sub(rf"\b{word}\b", folders, text) for text in files]
        files = [re.sub(r"(\S+)\*", r"\1 \1.csv \1-blocks.csv", text).split() for text in files]
        for word, full in SHORT.items():
            command = re.sub(rf"\b{word}\b", full, command)
        stages[name] = Stage(command.split(), *files, *[[]] * (3 - len(files)))
    return stages


STAGES = read_table()
# Outputs with digests: a stage that reads them. People edit conf.json, and no stage builds on stats and reports.
READERS = {
    "conf_prune.json": "prune", "pruned": "reconstruct", "solved": "compose", "joint": "compose-pth",
    "composed": "evaluate-t5", "b-0.pth": "evaluate-pth", "compact": "evaluate-compact",
    "bert-composed": "evaluate-distilbert", "grid-solved": "search", "finetuned": "download",
}  # fmt: skip


# --- running a stage in a child ----------------------------------------------------------------------------------


class Done(NamedTuple):
    """How a child ended."""

    code: int  # negative for a signal
    out: str
    err: str

    @property
    def verdict(self) -> str | None:
        """What is wrong with it, whatever its input was: None if nothing is."""
        if self.code == -signal.SIGALRM:
            return "hangs"
        if "Traceback" in self.err or self.code not in (0, 2):
            return "tracebacks"
        if self.code == 2 and (self.err.count("\n") != 1 or not self.err.endswith("\n")):
            return "not_one_line"
        if self.code == 0 and re.search(r"\b(NaN|-?Infinity)\b", self.out):
            return "not_finite"
        return None


class Child:
    """A fork of this process that calls `work()`, which returns an exit code, in a folder."""

    def __init__(self, work, folder):
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, folder)

    def _run(self, work, folder):
        code = 1
        try:
            signal.alarm(PATIENCE)  # which ends what hangs
            os.chdir(folder)
            os.umask(0o022)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))  # noqa: SIM115
            code = work()
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code or 0)

    def wait(self) -> Done:
        _, status = os.waitpid(self.pid, 0)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Done(os.waitstatus_to_exitcode(status), *texts)


def start(words, folder, before=None, modules=None) -> Child:
    """Start a command in a folder; `before()` is called in the child, first.

    Args:
        modules: a file for the names of all modules that it imported.
    """
    program = load_script(words[0])

    def work():
        sys.argv = [*words, "--quiet"]  # then an error's line is the only one
        if before:
            before()
        code = program.main(sys.argv[1:])
        if modules:
            modules.write_text("\n".join(sys.modules))
        return code

    return Child(work, folder)


def run(name, folder, **more) -> Done:
    return start(STAGES[name].words, folder, **more).wait()


def build(shop):
    """Make the tiny models, then run every stage in turn.

    Returns:
        {stage: (contents of its folder afterwards, its result, the number of its operations on files)}
    Raises:
        RuntimeError: a stage did not do its work, undisturbed.
    """
    for path in sorted((ROOT / "common").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    torch.set_num_threads(1)
    make_workshop(shop)
    return {name: undisturbed(shop, name) for name in STAGES}


def undisturbed(shop, name):
    with scratch() as base:
        folder, modules = lay_out(shop, name, base), base / "modules.txt"
        watch = Watch(folder)
        done = run(name, folder, before=watch.install, modules=modules)
        if done.code != 0:
            raise RuntimeError(f"{name} ended with {done.code}: {done.err}")
        for module in modules.read_text().split():  # so that the next child need not import them
            if module.partition(".")[0] not in ("__main__", "common") and module not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
        for path in STAGES[name].makes:
            if not (shop / path).exists():
                copy(folder / path, shop / path)
        return contents(folder), result_of(done), watch.number


# --- folders of cases, and comparing them ------------------------------------------------------------------------


@contextlib.contextmanager
def scratch():
    """An empty folder, in memory where there is such a thing, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="attack-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def copy(source, target):
    """Copy a file or a folder; links stay links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def lay_old(name, source, folder):
    for old, new in zip(STAGES[name].over, STAGES[name].makes):
        copy(source / old, folder / new)


def lay_out(shop, name, base):
    """A folder with what a stage reads, and old outputs where it has some."""
    folder = base / "case"
    for path in STAGES[name].reads:
        copy(shop / path, folder / path)
    lay_old(name, shop, folder)
    return folder


def contents(folder):
    """{path: (kind, mode, digest)} of all in a folder; seconds in JSON and CSV files don't count."""
    listing = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        kind, data = stat.S_IFMT(status.st_mode), b""
        if kind == stat.S_IFLNK:
            data = os.fsencode(os.readlink(path))
        elif kind == stat.S_IFREG:
            data = _without_seconds(path)
        listing[str(path.relative_to(folder))] = kind, stat.S_IMODE(status.st_mode), hashlib.sha256(data).hexdigest()
    return listing


def _without_seconds(path):
    data = path.read_bytes() if os.access(path, os.R_OK) else b""
    with contextlib.suppress(ValueError, RecursionError):  # damaged: it counts as it is
        if path.suffix == ".csv":
            rows = [line.split(",") for line in data.decode().split("\n")]
            timed = [n for n, name in enumerate(rows[0]) if "second" in name]
            return repr([[cell for n, cell in enumerate(row) if n not in timed] for row in rows]).encode()
        if path.suffix == ".json" and b"second" in data:
            return repr(_untimed(json.loads(data))).encode()
    return data


def _untimed(value):
    if isinstance(value, dict):
        return {name: None if "second" in name else _untimed(item) for name, item in value.items()}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def is_made(name, path):
    return any(path == made or path.startswith(f"{made}/") for made in STAGES[name].makes)


# --- kills -------------------------------------------------------------------------------------------------------

EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate",
    "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.rmtree", "fcntl.flock",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Counts the operations on files that a child makes in a folder, and kills it before the one of a number.

    Python tells of most by its audit events; fsync, writing and safetensors' writing are wrapped. A write
    is torn: its first half is done. Torch writes a file in thousands of pieces: of the writes that follow one another,
    the 1st, 2nd, 4th, 8th … count.
    """

    def __init__(self, folder, at=None):
        self.folder, self.at, self.writes = os.fspath(folder), at, 0
        self.count = mmap.mmap(-1, 8)  # shared with the child

    @property
    def number(self):
        return struct.unpack("q", self.count[:8])[0]

    def install(self):
        """Begin to watch this process; to be called in the child."""
        import safetensors.torch

        from common.runtime import files

        def half_a_write(original, handle, data):
            data = memoryview(data).cast("B")
            original(handle, data[: len(data) // 2])
            handle.file.flush()

        def half_a_file(original, tensors, filename, **named):
            original(tensors, filename, **named)
            os.truncate(filename, os.path.getsize(filename) // 2)

        self._wrap(os, "fsync")
        self._wrap(files._Handle, "write", half_a_write)
        self._wrap(safetensors.torch, "serialize_file", half_a_file)
        sys.addaudithook(self._heard)

    def _heard(self, event, arguments):
        if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and not os.path.abspath(os.fsdecode(path)).startswith(
            self.folder
        ):
            return
        self._step(event)

    def _wrap(self, owner, name, tear=None):
        original = getattr(owner, name)

        def wrapped(*arguments, **named):
            self._step(name, tear and functools.partial(tear, original, *arguments, **named))
            return original(*arguments, **named)

        setattr(owner, name, wrapped)

    def _step(self, event, tear=None):
        self.writes = self.writes + 1 if event == "write" else 0
        if self.writes & (self.writes - 1):
            return
        number = self.number
        self.count[:8] = struct.pack("q", number + 1)
        if number == self.at:
            self.at = None  # what tearing does is not counted
            if tear:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)


def result_of(done):
    with contextlib.suppress(ValueError):
        return repr(_untimed(json.loads(done.out)))
    return done.out


def kill(shop, base, known, name, at):
    """Kill a stage before an operation and run it again: (kind, detail) of what went wrong, or None."""
    folder = lay_out(shop, name, base)
    before = contents(folder)
    done = run(name, folder, before=Watch(folder, int(at)).install)
    if done.code != -signal.SIGKILL:
        return "not_killed", f"exit {done.code}: {done.err}"
    after = contents(folder)
    lost = [path for path in before if path not in after and not is_made(name, path)]
    if lost:
        return "lost", lost
    done = run(name, folder)
    if done.code != 0:
        return "refused", f"exit {done.code}: {done.err}"
    wanted, found = known[name][0], contents(folder)
    lost = [path for path in wanted if path not in found]
    if lost:
        return "lost", lost
    different = [path for path in found if found[path] != wanted.get(path)]
    return ("different", different) if different else None


# --- races -------------------------------------------------------------------------------------------------------


def race(shop, base, known, writers, number):
    """Several writers of one library, with overlapping parts of one scheme, at once and one after the other."""
    libraries = []
    for at_once in (False, True):
        folder = lay_out(shop, "prune", base / ("at-once" if at_once else "in-turn"))
        draw, content = random.Random(f"{writers}/{number}"), json.loads((folder / "conf_prune.json").read_text())
        commands = []
        for writer in range(int(writers)):
            names = set(draw.sample(sorted(content["blocks"]), max(1, len(content["blocks"]) * 2 // 3)))
            part = content | {"blocks": {name: content["blocks"][name] for name in content["blocks"] if name in names}}
            part["configs"] = [
                {name: x for name, x in config.items() if name in names} for config in content["configs"]
            ]
            write_with_digest(folder / f"{writer}.json", part)
            commands.append(f"prune.py -m model/t5 -o library -c {writer}.json --overwrite".split())
        if at_once:
            ends = [child.wait() for child in [start(words, folder) for words in commands]]
        else:
            ends = [start(words, folder).wait() for words in commands]
        refused = [f"exit {done.code}: {done.err}" for done in ends if done.code != 0]
        if refused:
            return "refused", refused
        variants = json.loads((folder / "library" / "record.json").read_text())["variants"]
        files = {path.name: path.read_bytes() for path in (folder / "library").glob("*.npy")}
        libraries.append(files | {name: json.dumps(entry, sort_keys=True) for name, entry in variants.items()})
    wanted, found = libraries
    if wanted.keys() - found.keys():
        return "lost", sorted(wanted.keys() - found.keys())
    return None if found == wanted else ("different", sorted(k for k in found if found[k] != wanted.get(k)))


def _only(names, content):
    return {name: value for name, value in content.items() if name in names}


# --- damages -----------------------------------------------------------------------------------------------------

VALUES = (None, True, "", "../up", "/etc/passwd", "\ud800", "a\0b", "ä" * 300, [], {}, [[]], {"": 0}, [1], 0, -1, 0.5,
          1e308, 10**30, 10**400, 1e-320, float("nan"), float("inf"), 2**31, 2**63)  # fmt: skip
OTHER = (b"", b"\x80\x04.", b"PK\x03\x04", b"{}", b"\xff\xfe", b"[" * 100_000, b"the " * 3000, b"0,nan,inf,1,1\n")
LINES = (b"", b"\xff\xfe", b"the " * 3000, b"\r", b'{"text": "\\ud800", "label": 1}', b'{"text": 1, "label": "x"}',
         b'{"text": "x", "label": 1e400}', b"0,nan,inf,1,1", b"0,,,,", b"1e999,-1,x,\0,")  # fmt: skip
CODE = "import pathlib\npathlib.Path({path!r}).touch()\nclass Own:\n    pass\n"


def flip(path, draw):
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data) * 8)
    data[place // 8] ^= 1 << (place % 8)
    path.write_bytes(data)


def change_bytes(path, draw, folder):
    """Flip, cut, lengthen, zero or replace."""
    way, data = draw.choice(("flip", "cut", "longer", "zero", "line", "other")), path.read_bytes()
    place = draw.randrange(len(data))
    if way == "flip":
        flip(path, draw)
    elif way == "line":
        lines = data.split(b"\n")
        lines[draw.randrange(len(lines))] = draw.choice(LINES)
        path.write_bytes(b"\n".join(lines))
    else:
        changed = {"cut": data[:place], "longer": data + draw.randbytes(50), "other": draw.choice(OTHER)}
        path.write_bytes(changed.get(way, data[:place] + bytes(16) + data[place + 16 :]))


def change_json(path, draw, folder):
    """Another value, a missing or unknown key, somewhere in a JSON file; its own digest may be made to fit."""
    value = json.loads(path.read_bytes())
    holder, key = draw.choice(list(_places(value)))
    way = draw.choice(("value", "value", "missing", "unknown", "number"))
    if way == "missing":
        del holder[key]
    elif way == "unknown" and isinstance(holder, dict):
        holder[draw.choice(("unknown", "../x", "", "__class__", "auto_map", "dtype"))] = draw.choice(VALUES)
    elif way == "number" and type(holder[key]) in (int, float):
        holder[key] = draw.choice((holder[key] + 1, -holder[key], holder[key] * 1000))
    else:
        holder[key] = draw.choice(VALUES)
    write_with_digest(path, value)


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def change_arrays(path, draw, folder):
    """A module file or weights file of another dtype or shape, with fields too many or too few, or not finite."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    packed = path.suffix == ".npy"
    content = np.load(path, allow_pickle=False) if packed else load_file(path)
    arrays = {name: np.array(content[name]) for name in (content.dtype.names if packed else content)}
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    flat = array.reshape(-1).astype(np.float32)
    flat[draw.randrange(flat.size)] = draw.choice((np.nan, np.inf, 3e38))
    changes = {
        "number": flat.reshape(array.shape), "float16": array.astype("float16"), "int": array.astype(np.int64),
        "shape": array[:1].copy(), "flat": array.reshape(-1), "gone": None, "values": array + np.ones((), array.dtype),
    }  # fmt: skip
    arrays[name] = changes[draw.choice(sorted(changes))]
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items() if value is not None}
    if packed:
        content = np.zeros((), np.dtype([(key, value.dtype, value.shape) for key, value in arrays.items()], align=True))
        for key, value in arrays.items():
            content[key] = value
        np.save(path, content)
    else:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        save_file(arrays, path, metadata)


def change_pth(path, draw, folder):
    """A .pth with a part missing or not finite, or a pickle that would leave a marker."""
    if draw.random() < 0.3:
        path.write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(folder / MARKER) + b"'\ntR.")
        return
    content = torch.load(path, map_location="cpu", weights_only=True)
    if draw.random() < 0.5:
        del content[draw.choice(sorted(content))]
    else:
        content["state_dict"][draw.choice(sorted(content["state_dict"]))] *= float("nan")
    torch.save(content, path)


def change_place(path, draw, folder):
    """Something else under the file's name: nothing, a folder, a link out of the folder or in a circle, a pipe."""
    way = draw.choice(("gone", "folder", "outside", "circle", "pipe"))
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way != "gone":
        path.symlink_to(folder.parent / "outside" / "file.txt" if way == "outside" else path.name)


def plant_code(path, draw, folder):
    """A model or tokenizer folder that asks for code of its own."""
    value = json.loads(path.read_text())
    value |= {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}, "trust_remote_code": True}
    value |= {key: "own" for key in ("model_type", "tokenizer_class") if key in value}
    path.write_text(json.dumps(value))
    (path.parent / "own.py").write_text(CODE.format(path=str(folder / MARKER)))


FORMATS = {".json": change_json, ".npy": change_arrays, ".safetensors": change_arrays, ".pth": change_pth}


def mutate(path, draw, folder):
    chance = draw.random()
    change = FORMATS.get(path.suffix, change_bytes)
    if chance < 0.3:
        change = change_bytes if chance > 0.06 else change_place
    elif chance < 0.4 and path.name in ("config.json", "tokenizer_config.json"):
        change = plant_code
    change(path, draw, folder)
    if draw.random() < 0.7 and path.is_file() and not path.is_symlink():
        make_digests_fit(path, folder)


def make_digests_fit(path, folder):
    """Write a file's new digest into the record beside it, so that what comes after the digest is tried too."""
    record = path.parent / "record.json"
    if record == path or not record.is_file():
        return
    value = json.loads(record.read_bytes())
    if path.name in value.get("files", {}):
        value["files"][path.name] = file_digest(path)
    for entry in value.get("variants", {}).values():
        if isinstance(entry, dict) and entry.get("file") == path.name:
            entry["sha256"] = file_digest(path)
    write_with_digest(record, value)


def write_with_digest(path, value):
    """Write JSON; where it has a digest of its own, this is made to fit."""
    if isinstance(value, dict) and "digest" in value:
        value["digest"] = digest({name: item for name, item in value.items() if name != "digest"})
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def files_of(place):
    """[[paths of one format]], so that a library's many files don't count for more than its record."""
    kinds = collections.defaultdict(list)
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file() and path.name != "README.md" and path.stat().st_size:
            kinds[path.name if path.suffix == ".json" else path.suffix].append(path)
    return [kinds[kind] for kind in sorted(kinds)]


def damage(shop, base, known, name, number):
    """Damage a file that a stage reads: (kind, detail) of what went wrong, or None; "refused" is as it should be."""
    draw = random.Random(f"{name}/{number}")
    folder, outside = lay_out(shop, name, base), base / "outside"
    outside.mkdir()
    (outside / "file.txt").write_text("not yours\n")
    path = draw.choice(draw.choice(files_of(folder)))
    mutate(path, draw, folder)
    before = contents(base)
    done = run(name, folder)
    after, shown = contents(base), f"{path.relative_to(folder)}: exit {done.code}: {done.err[-500:]}"
    if (folder / MARKER).exists():
        return "code_run", shown
    made = {path for path in before | after if is_made(name, path.removeprefix("case/"))}
    changed = sorted(path for path in (before.keys() | after.keys()) - made if before.get(path) != after.get(path))
    if changed:
        return "touched", f"{changed[0]}; {shown}"
    return (done.verdict, shown) if done.verdict else None


def flip_bit(shop, base, known, output, number):
    """Flip a bit of an output that has digests, and run the stage that reads it."""
    name, draw = READERS[output], random.Random(f"{output}/{number}")
    folder = lay_out(shop, name, base)
    path = draw.choice(draw.choice(files_of(folder / output)))
    flip(path, draw)
    done = run(name, folder)
    shown = f"{path.relative_to(folder)}: exit {done.code}: {done.err[-500:]}"
    if done.verdict:
        return done.verdict, shown
    wanted, result, _ = known[name]
    made = {p: item for p, item in contents(folder).items() if is_made(name, p) and folder / p != path}
    is_same = all(wanted.get(p) == item for p, item in made.items()) and result_of(done) == result
    return ("accepted_flips", shown) if done.code == 0 and not is_same else None


# --- the program -------------------------------------------------------------------------------------------------

ATTACKS = {"kill": kill, "race": race, "damage": damage, "flip": flip_bit}
KINDS = ("lost", "refused", "different", "tracebacks", "hangs", "not_one_line", "accepted_flips", "code_run", "touched")


def cases_of(args, known):
    """The identifiers of all cases: KIND/STAGE/NUMBER."""
    if args.case:
        return [args.case]
    operations = [f"kill/{name}/{at}" for name, (_, _, count) in known.items() for at in range(count)]
    count = min(args.kills, len(operations))
    cases = [operations[n * len(operations) // count] for n in range(count)]
    cases += [f"race/{writers}/{number}" for number in range(args.races) for writers in (2, 8)]
    draw, readers = random.Random(args.seed), list(READERS)
    for number in range(args.damages):
        if number % 2:
            cases.append(f"flip/{readers[number // 2 % len(readers)]}/{args.seed}-{number}")
        else:
            cases.append(f"damage/{draw.choice(list(STAGES))}/{args.seed}-{number}")
    return cases


def attack(args):
    started, counts, failed = time.monotonic(), collections.Counter(), []
    with scratch() as place:
        shop = place / "shop"
        shop.mkdir()
        known = build(shop)
        before, cases = contents(shop), cases_of(args, known)

        def work(case):
            kind, *rest = case.split("/")
            with scratch() as base:
                try:
                    return ATTACKS[kind](shop, base, known, *rest)
                except Exception:
                    return "attacker_failed", traceback.format_exc()

        for case, problem in zip(cases, map(work, cases)):
            counts[case.partition("/")[0]] += 1
            if problem:
                counts[problem[0]] += 1
                failed.append(case)
                print(f"{case}: {problem[0]}: {problem[1]}", file=sys.stderr, flush=True)
        if contents(shop) != before:
            failed.append("a case changed a file outside of its folder")
    seconds = round(time.monotonic() - started)
    attacks = {f"{kind}s": counts.pop(kind, 0) for kind in ATTACKS}
    result = {**attacks, **dict.fromkeys(KINDS, 0), **counts, "failed": failed[:100], "seconds": seconds}
    if failed:
        print(json.dumps(result))
        raise SystemExit(1)
    return result


def main(argv=None):
    return launch(parser(), attack, argv)


if __name__ == "__main__":
    sys.exit(main())
