"""What the attackers share: tiny models, every stage with arguments that do its work on them, and a fork server.

A process that has imported everything once forks a child for every case. The child changes into the case's folder, runs
one stage as its script would, and ends; that takes a fraction of a second where a fresh Python takes five.
"""

import collections
import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import random
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds that a case may take
MEMORY = Path("/dev/shm")  # where files cost nothing to write
WORDS = {
    "dog": "Hund", "cat": "Katze", "child": "Kind", "man": "Mann", "sees": "sieht", "likes": "mag", "hears": "hört",
    "the": "das", "a": "ein", "good": "gut", "bad": "schlecht", "film": "Film",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command line that reads files of the workshop and makes others there."""

    name: str
    command: str  # script and arguments
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    over: tuple[str, ...] = ()  # old outputs that lie where the new ones go, in the order of `makes`
    trains: bool = False  # long enough to be interrupted at any moment

    @property
    def script(self) -> str:
        return shlex.split(self.command)[0]

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.command)[1:]


def _stages():
    t5, bert = ("model/t5", "tokenizer/t5", "data/t5"), ("model/bert", "tokenizer/bert", "data/bert")
    rates = "--attention 0.25 0.5 --linear 0.3 0.5 --feed-forward 0 0.5"
    block = "block-level_finetuning.py --batch-size 8 --held-out 8 --calibration 16"
    model = "model-level_finetuning.py -m model/t5 -c conf.json --batch-size 8"
    compose = "compose_model.py -m model/t5 -c conf.json"

    def fine_tuned(name):
        return name, f"{name}.csv", f"{name}-blocks.csv"

    return [
        Stage(
            "download-t5-demo",
            "download_model.py t5-demo --name demo",
            (),
            ("model/demo", "tokenizer/demo", "data/demo"),
            trains=True,
        ),
        Stage(
            "download-distilbert-demo",
            "download_model.py distilbert-demo",
            (),
            ("model/distilbert-demo", "tokenizer/distilbert-demo", "data/distilbert-demo"),
            trains=True,
        ),
        Stage("configure", f"config_generator.py -m model/t5 {rates} -n 2", t5, ("conf.json",)),
        Stage(
            "grid",
            "config_generator.py -m model/t5 --attention 0 0.5 --linear 0 0.3 --grid -o grid.json",
            t5,
            ("grid.json",),
        ),
        Stage(
            "configure-over",
            f"config_generator.py -m model/t5 {rates} -n 2 -o conf-over.json --overwrite",
            t5,
            ("conf-over.json",),
            over=("grid.json",),
        ),
        Stage("random", f"config_generator.py -m model/t5 {rates} -n 3 --random -o random.json", t5, ("random.json",)),
        Stage(
            "bert-configure",
            "config_generator.py -m model/bert --attention 0.25 0.5 --linear 0.3 0.5 -n 2 -o bert.json",
            bert,
            ("bert.json",),
        ),
        Stage("scheme", "prune_scheme_generator.py", ("conf.json",), ("conf_prune.json",)),
        Stage(
            "grid-scheme",
            "prune_scheme_generator.py -i grid.json -o grid_prune.json",
            ("grid.json",),
            ("grid_prune.json",),
        ),
        Stage(
            "bert-scheme",
            "prune_scheme_generator.py -i bert.json -o bert_prune.json",
            ("bert.json",),
            ("bert_prune.json",),
        ),
        Stage("prune", "prune.py -m model/t5 -o pruned", (*t5, "conf_prune.json"), ("pruned",)),
        Stage(
            "prune-grid",
            "prune.py -m model/t5 -c grid_prune.json -o grid-pruned",
            (*t5, "grid_prune.json"),
            ("grid-pruned",),
        ),
        Stage(
            "prune-reconstruction",
            "prune.py -m model/t5 -o chosen --criterion reconstruction --calibration 16 --batch-size 8",
            (*t5, "conf_prune.json"),
            ("chosen",),
        ),
        Stage(
            "prune-over",
            "prune.py -m model/t5 -o pruned-over --overwrite",
            (*t5, "conf_prune.json"),
            ("pruned-over",),
            over=("chosen",),
        ),
        Stage(
            "bert-prune",
            "prune.py -m model/bert -c bert_prune.json -o bert-pruned",
            (*bert, "bert_prune.json"),
            ("bert-pruned",),
        ),
        Stage(
            "reconstruct",
            f"{block} -m model/t5 -p pruned -o solved --method reconstruct",
            (*t5, "pruned"),
            fine_tuned("solved"),
            trains=True,
        ),
        Stage(
            "train",
            f"{block} -m model/t5 -p pruned -o trained --method train --epochs 2",
            (*t5, "pruned"),
            fine_tuned("trained"),
            trains=True,
        ),
        Stage(
            "train-over",
            f"{block} -m model/t5 -p pruned -o trained-over --method train --epochs 2 --lr 1e-3 --overwrite",
            (*t5, "pruned"),
            fine_tuned("trained-over"),
            over=fine_tuned("trained"),
            trains=True,
        ),
        Stage(
            "both",
            f"{block} -m model/t5 -p pruned -o both --method both --epochs 2 --ridge 1e-3 1e-2",
            (*t5, "pruned"),
            fine_tuned("both"),
            trains=True,
        ),
        Stage(
            "joint",
            f"{block} -m model/t5 -p pruned -o joint --method joint --epochs 2",
            (*t5, "pruned", "conf.json"),
            (*fine_tuned("joint"), "joint-compositions.csv"),
            trains=True,
        ),
        Stage(
            "grid-reconstruct",
            f"{block} -m model/t5 -p grid-pruned -o grid-solved --method reconstruct",
            (*t5, "grid-pruned"),
            fine_tuned("grid-solved"),
            trains=True,
        ),
        Stage(
            "bert-reconstruct",
            f"{block} -m model/bert -p bert-pruned -o bert-solved",
            (*bert, "bert-pruned"),
            fine_tuned("bert-solved"),
            trains=True,
        ),
        Stage(
            "search",
            "config_generator.py -m model/t5 --search grid-solved -c grid.json --budget-of 1 2 -o found.json "
            "--report found-report.json --score-examples 4 --batch-size 8 --overwrite",
            (*t5, "grid.json", "grid-solved"),
            ("found.json", "found-report.json", "grid-solved/record.json"),  # into which it writes scores
        ),
        Stage(
            "compose", f"{compose} -p solved -n 0 1 -o 'composed/{{n}}'", (*t5, "conf.json", "solved"), ("composed",)
        ),
        Stage(
            "compose-over",
            f"{compose} -p pruned -n 1 -o composed-over --overwrite",
            (*t5, "conf.json", "pruned"),
            ("composed-over",),
            over=("composed/0",),
        ),
        Stage(
            "compose-pth", f"{compose} -p joint -n 0 -o composed.pth", (*t5, "conf.json", "joint"), ("composed.pth",)
        ),
        Stage(
            "compose-compact",
            f"{compose} -p solved -n 1 -o compact --compact",
            (*t5, "conf.json", "solved"),
            ("compact",),
        ),
        Stage(
            "compose-half",
            f"{compose} -p solved -n 1 -o half --compact --dtype float16 --max-shard-size 10KB",
            (*t5, "conf.json", "solved"),
            ("half",),
        ),
        Stage(
            "bert-compose",
            "compose_model.py -m model/bert -c bert.json -p bert-solved -n 1 -o bert-composed --compact",
            (*bert, "bert.json", "bert-solved"),
            ("bert-composed",),
        ),
        Stage(
            "finetune",
            f"{model} -p solved -n 0 -o finetuned/0 --epochs 2",
            (*t5, "conf.json", "solved"),
            ("finetuned",),
            trains=True,
        ),
        Stage(
            "finetune-pth",
            f"{model} -p pruned -n 0 1 -o 'baseline-{{n}}.pth' --epochs 2",
            (*t5, "conf.json", "pruned"),
            ("baseline-0.pth", "baseline-1.pth", "baseline-0.csv", "baseline-1.csv"),
            trains=True,
        ),
        Stage(
            "finetune-over",
            f"{model} -p solved -n 1 -o finetuned-over --epochs 1 --compact --overwrite",
            (*t5, "conf.json", "solved"),
            ("finetuned-over", "finetuned-over.csv"),
            over=("finetuned/0", "finetuned/0.csv"),
            trains=True,
        ),
        Stage(
            "evaluate-t5",
            "evaluate-t5.py -m composed/0 --limit 4 --report report.json --batch-size 4 --max-new-tokens 8",
            (*t5, "composed"),
            ("report.json",),
        ),
        Stage(
            "evaluate-pth", "evaluate-t5.py -m baseline-0.pth --limit 4 --max-new-tokens 8", (*t5, "baseline-0.pth"), ()
        ),
        Stage("evaluate-compact", "evaluate-t5.py -m compact --limit 4 --max-new-tokens 8", (*t5, "compact"), ()),
        Stage("evaluate-half", "evaluate-t5.py -m half --limit 4 --max-new-tokens 8", (*t5, "half"), ()),
        Stage(
            "evaluate-distilbert",
            "evaluate-distilbert.py -m bert-composed --limit 4 --report bert-report.json",
            (*bert, "bert-composed"),
            ("bert-report.json",),
        ),
        Stage(
            "download-local",
            "download_model.py t5 --checkpoint ./finetuned/0 --name local",
            (*t5, "finetuned"),
            ("model/local", "tokenizer/local"),
        ),
        Stage(
            "plot",
            "plot_loss.py baseline-0.csv baseline-1.csv joint-compositions.csv -o loss.png",
            ("baseline-0.csv", "baseline-1.csv", "joint-compositions.csv"),
            ("loss.png",),
        ),
        Stage("rates", "experiments/rates.py conf.json -o rates.png", ("conf.json",), ("rates.png",)),
        Stage(
            "pareto",
            "experiments/pareto.py report.json --against bytes_in_memory -o pareto.png",
            ("report.json",),
            ("pareto.png",),
        ),
        Stage(
            "explore",
            "experiments/explore.py -m model/t5 -p grid-solved -c grid.json --drop 50 --score-examples 4 --limit 4 "
            "--max-new-tokens 4 -o smallest.json --report explored.json",
            (*t5, "grid.json", "grid-solved"),
            ("smallest.json", "explored.json"),
        ),
    ]


STAGES = {stage.name: stage for stage in _stages()}


# --- running a stage in a child --------------------------------------------------------------------------------------


@dataclass
class Done:
    """How a case ended."""

    code: int | None  # as of a shell's child: negative for a signal, None for one that hung
    out: str = ""
    err: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str | None:
        """What is wrong with it, whatever its input was: None if nothing is."""
        if self.code is None:
            return "hang"
        if "Traceback" in self.err or self.code == 1:
            return "traceback"
        if self.code not in (0, 2):
            return f"exit {self.code}"
        if self.code == 2 and (self.err.count("\n") != 1 or not self.err.endswith("\n")):
            return "not one line"
        if self.code == 0 and re.search(r"\b(NaN|-?Infinity)\b", self.out):
            return "not finite"
        return None


def in_child(work, folder: Path, patience: float = PATIENCE, meddle=None) -> Done:
    """Call `work()`, which returns an exit code, in a child whose working folder is `folder`.

    Its stdin says "y" to every question. `meddle(pid)` is called in the parent while the child runs.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _be_the_child(work, folder, out.fileno(), err.fileno())
        if meddle:
            meddle(child)
        status = _wait(child, started + patience)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Done(status, *texts, time.monotonic() - started)


def _wait(child, until):
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def _be_the_child(work, folder, out, err):
    code = 1
    try:
        os.chdir(folder)
        os.umask(0o022)
        with tempfile.TemporaryFile() as answers:
            answers.write(b"y\n" * 20)
            answers.seek(0)
            os.dup2(answers.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
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


@contextlib.contextmanager
def scratch():
    """An empty folder, in memory where there is such a thing, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="attack-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


class Workshop:
    """A folder with every input of every stage, and a parent process from which children run them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.scripts = {}
        self.seconds = {}  # that each stage took

    def build(self, names=None) -> "Workshop":
        """Make the tiny models, then run every stage in turn, or those that the named ones need.

        Raises:
            RuntimeError: a stage did not do its work, undisturbed.
        """
        _import_everything()
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("t5", "bert"):
            make_model(self.folder, kind)
        for name in needed(names or STAGES):
            stage = STAGES[name]
            self._lay_old(stage, self.folder, self.folder)
            report = self.folder / "modules.txt"
            done = self.run(stage, self.folder, report=report, patience=120)
            if done.code != 0:
                raise RuntimeError(f"{name} ended with {done.code}: {done.err}")
            for module in report.read_text().split():  # so that the next child need not import them
                if module.partition(".")[0] not in ("__main__", "common") and module not in sys.modules:
                    with contextlib.suppress(Exception):
                        importlib.import_module(module)
            report.unlink()
            self.seconds[name] = done.seconds
        return self

    def script(self, name):
        """A script as a module; imported once."""
        if name not in self.scripts:
            spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name.removesuffix(".py")), ROOT / name)
            self.scripts[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.scripts[name])
        return self.scripts[name]

    def flags(self, stage):
        """The flags that a stage's script knows."""
        parser = self.script(stage.script).build_parser()
        return {flag for action in parser._actions for flag in action.option_strings}

    def run(self, stage, folder, *, before=None, patience=PATIENCE, meddle=None, report=None, more=()) -> Done:
        """Run a stage in a folder; `before()` is called in the child, first."""
        script = self.script(stage.script)
        quiet = ["--quiet"] if "--quiet" in self.flags(stage) else []  # then an error's line is the only one

        def work():
            sys.argv = [stage.script, *stage.arguments, *more, *quiet]
            _shorten_demos()
            if before:
                before()
            code = script.main(sys.argv[1:])
            if report:
                report.write_text("\n".join(sorted(sys.modules)))
            return code

        return in_child(work, folder, patience, meddle)

    def lay_out(self, stage, folder: Path, reads=None) -> Path:
        """Copy what a stage reads into a fresh folder, and old outputs where it has some."""
        folder.mkdir(parents=True)
        for name in stage.reads if reads is None else reads:
            copy(self.folder / name, folder / name)
        self._lay_old(stage, self.folder, folder)
        return folder

    def _lay_old(self, stage, source, folder):
        for old, new in zip(stage.over, stage.makes):
            copy(source / old, folder / new)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder; links stay links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def needed(names):
    """The stages that make what the named ones read, and these themselves, in order."""
    wanted, files = set(names), set()
    for stage in reversed(STAGES.values()):
        made = {*stage.makes, *(path.partition("/")[0] for path in stage.makes)}
        if stage.name in wanted or made & files:
            wanted.add(stage.name)
            files |= {*stage.reads, *(path.partition("/")[0] for path in stage.over), *stage.over}
            files -= {"model/t5", "model/bert"}
    return [name for name in STAGES if name in wanted]


def _import_everything():
    import torch

    torch.set_num_threads(1)
    for module in (
        *("block_level", "closed_form", "search", "report", "pictures", "composition", "compact", "studies"),
        "demo",
    ):
        importlib.import_module(f"common.{module}")


def _shorten_demos():
    """Let a demo take a fraction of a second instead of a minute; what is written, and in which order, stays."""
    from common import demo

    parts = demo.build.__globals__
    for family, folder in list(parts["DATA"].items()):
        parts["DATA"][family] = Path(tempfile.mkdtemp())
        for path in folder.iterdir():
            lines = path.read_text(encoding="utf-8").splitlines(True)
            (parts["DATA"][family] / path.name).write_text("".join(lines[:48]), encoding="utf-8")
    for recipe in parts["RECIPES"].values():
        recipe |= {"epochs": 2, "batch_size": 16}


def make_model(folder: Path, kind: str) -> None:
    """A tiny "t5" or DistilBERT ("bert") with random weights, its tokenizer and its data, all of one seed."""
    import torch
    import transformers

    from common.records import make_record, write_record

    torch.manual_seed(0)
    draw = random.Random(0)
    words = [*WORDS, *WORDS.values(), "translate", "English", "to", "German:"]
    parts = {part: folder / part / kind for part in ("model", "tokenizer", "data")}
    parts["data"].mkdir(parents=True)
    sentences = [draw.choices(list(WORDS), k=draw.randint(3, 6)) for _ in range(40)]
    if kind == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -3.0) for word in words)]
        tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=1, num_decoder_layers=1,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
        for stem, part in (("train", sentences[:24]), ("val", sentences[24:32]), ("test2016", sentences[32:])):
            for language, texts in (("en", part), ("de", [[WORDS[word] for word in text] for text in part])):
                (parts["data"] / f"{stem}.{language}").write_text("".join(f"{' '.join(text)}\n" for text in texts))
    else:
        vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in words)])
        tokenizer = transformers.DistilBertTokenizer(
            vocab={word: n for n, word in enumerate(vocabulary)}, model_max_length=32
        )
        config = transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_heads=4, n_layers=2, hidden_dim=24, max_position_embeddings=32, pad_token_id=0
        )
        model = transformers.DistilBertForSequenceClassification(config)
        for split, part in (("train", sentences[:24]), ("validation", sentences[24:32]), ("test", sentences[32:])):
            rows = [json.dumps({"text": " ".join(text), "label": n % 2}) for n, text in enumerate(part)]
            (parts["data"] / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    model.save_pretrained(parts["model"])
    tokenizer.save_pretrained(parts["tokenizer"])
    record = make_record("download_model.py", {"type": kind}, model_type="t5" if kind == "t5" else "distilbert")
    write_record(parts["tokenizer"], record)
    named = {part: {"folder": f"../{part}/{kind}"} for part in ("tokenizer", "data")}
    write_record(parts["model"], {**record, **named})


# --- comparing folders ---------------------------------------------------------------------------------------------


def contents(folder: Path, but=()) -> dict[str, tuple]:
    """{path: (kind, mode, digest; or JSON or CSV as it is)} of all in a folder; seconds don't count.

    Args:
        but: names at the top that are left out.
    """
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            shown = str(path.relative_to(folder))
            if shown.partition("/")[0] not in but:
                found[shown] = _described(path)
    return found


def _described(path):
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        return "link", 0, os.readlink(path)
    mode = stat.S_IMODE(status.st_mode)
    if kind != stat.S_IFREG:
        return kind, mode
    data = _without_seconds(path)
    return kind, mode, data if path.suffix in (".json", ".csv") else hashlib.sha256(data).hexdigest()


def _without_seconds(path):
    data = path.read_bytes()
    try:
        if path.suffix == ".csv":
            rows = [line.split(",") for line in data.decode().split("\n")]
            timed = [n for n, name in enumerate(rows[0]) if "second" in name]
            return repr([[cell for n, cell in enumerate(row) if n not in timed] for row in rows]).encode()
        if path.suffix == ".json" and b"second" in data:
            return repr(_untimed(json.loads(data))).encode()
    except (ValueError, RecursionError):  # damaged: it counts as it is
        pass
    return data


def _untimed(value):
    if isinstance(value, dict):
        return {name: None if "second" in name else _untimed(item) for name, item in value.items()}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def compared(found: dict, wanted: dict) -> tuple[list[str], list[str]]:
    """The paths that are missing or other than wanted, and those that are too many."""
    return sorted(path for path in wanted if found.get(path) != wanted[path]), sorted(found.keys() - wanted.keys())


def explained(path: str, found: dict, wanted: dict) -> str:
    """Where a file is other than wanted, in a few words."""
    here, there = found.get(path), wanted.get(path)
    if here is None or there is None or here[:2] != there[:2] or not isinstance(here[-1], bytes):
        return f"{path}: {'missing' if here is None else 'other'}" + (f" {here[:2]}, {there[:2]}" if here else "")
    start = next((n for n, (a, b) in enumerate(zip(here[-1], there[-1])) if a != b), min(len(here[-1]), len(there[-1])))
    near = slice(max(0, start - 80), start + 60)
    return f"{path}: {here[-1][near]!r} where undisturbed {there[-1][near]!r}"


# --- file operations -------------------------------------------------------------------------------------------------

EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate",
    "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.rmtree", "fcntl.flock",
}  # fmt: skip
NEED_ROOM = ("open", "os.rename", "os.mkdir", "tempfile", "os.fsync", "write", "exchange")  # fail where a disk is full
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Watch:
    """Counts the operations on files that a child makes in a folder, and disturbs it from the k-th on.

    Python tells of most of them by its audit events; fsync, writing, exchanging and safetensors' writing are wrapped.
    Torch writes a file in thousands of pieces, which gather in a buffer: of the writes that follow one another, the
    1st, 2nd, 4th, 8th … count.
    """

    folder: Path
    at: int | None = None  # disturb before the operation of this number, counted from 0
    disturb: str = "kill"  # or the name of an errno, which this operation and all later ones that need room end with
    run: int = 0  # writes that have followed one another
    count: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))
    log: object = field(default_factory=lambda: tempfile.TemporaryFile(buffering=0))  # noqa: SIM115

    def operations(self) -> list[str]:
        """What was done, in order."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").splitlines()

    @property
    def number(self) -> int:
        return struct.unpack("q", self.count[:8])[0]

    def install(self):
        """Begin to watch this process; to be called in the child."""
        import safetensors.torch

        from common import files

        root = os.fspath(self.folder)

        def heard(event, arguments):
            if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITING):
                return
            path = arguments[0]
            if isinstance(path, (str, bytes, os.PathLike)):
                path = os.path.abspath(os.fsdecode(path))
                if not path.startswith(root):
                    return
            self._step(event, path)

        def wrap(owner, name, event, torn=None):
            original = getattr(owner, name, None)
            if original is None:
                return

            def wrapped(*arguments, **named):
                try:
                    self._step(event, name, lambda: torn and torn(original, *arguments, **named))
                except OSError as error:
                    if owner is files._Handle:  # which remembers what the file under it raises
                        arguments[0].failure = error
                    raise
                return original(*arguments, **named)

            setattr(owner, name, wrapped)

        def half_a_write(original, handle, data):
            data = memoryview(data).cast("B") if not isinstance(data, (bytes, bytearray)) else data
            original(handle, data[: len(data) // 2])
            handle.file.flush()

        def half_a_file(original, tensors, filename, **named):
            original(tensors, filename, **named)
            os.truncate(filename, os.path.getsize(filename) // 2)

        wrap(os, "fsync", "os.fsync")
        wrap(getattr(files, "_Handle", None), "write", "write", half_a_write)
        wrap(safetensors.torch, "serialize_file", "write safetensors", half_a_file)
        sys.addaudithook(heard)

    def _step(self, event, what, tear=None):
        self.run = self.run + 1 if event == "write" else 0
        if self.run & (self.run - 1):
            return
        number = self.number
        self.count[:8] = struct.pack("q", number + 1)
        what = os.path.relpath(what, self.folder) if isinstance(what, str) and os.path.isabs(what) else what
        os.write(self.log.fileno(), f"{event} {what}\n".encode(errors="replace"))
        if self.at is None or number < self.at:
            return
        if self.disturb == "kill":
            if tear:
                self.at = None  # what it does is not counted
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        if event.startswith(NEED_ROOM):
            import errno

            code = getattr(errno, self.disturb)
            if event == "write safetensors":
                from safetensors import SafetensorError

                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            raise OSError(code, os.strerror(code))


# --- reporting -------------------------------------------------------------------------------------------------------


class Findings:
    """Counts by stage and kind, and the cases that failed."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)
        self.failed = []

    def count(self, stage, **numbers):
        self.counts[stage].update(numbers)

    def fail(self, stage, case, kind, detail):
        """A case that did not end as it should; printed at once."""
        self.counts[stage][kind] += 1
        self.failed.append(case)
        print(f"FAILED {case}: {kind}: {' | '.join(str(detail).split(chr(10)))[:600]}", flush=True)

    def table(self, columns):
        """The counts as aligned text, with totals."""
        total = collections.Counter()
        for counts in self.counts.values():
            total.update(counts)
        others = sorted(set(total) - set(columns))
        rows = [["", *columns, *others]]
        for name, counts in [*self.counts.items(), ("total", total)]:
            rows.append([name, *(str(counts[column]) for column in (*columns, *others))])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def shares(cases, jobs, work):
    """Share cases among forked workers, each of which returns its findings; a generator of (case, what came of it).

    Args:
        work: what is called with a case in a worker; returns a JSON value.
    """
    if jobs == 1:
        for case in cases:
            yield case, work(case)
        return
    import multiprocessing

    cases = list(cases)
    with multiprocessing.get_context("fork").Pool(jobs, _remember, (work,)) as pool:
        yield from zip(cases, pool.imap(_work, cases, chunksize=4))


_task = None


def _remember(work):
    global _task
    _task = work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the pool ends its workers


def _work(case):
    return _task(case)


counter = itertools.count()


def fresh(base: Path) -> Path:
    """A path in `base` that nothing has yet."""
    return base / f"{os.getpid()}-{next(counter)}" / "case"
