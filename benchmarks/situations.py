"""Outputs that lie where something else is: devices, pipes, links, inputs, files of other people.

Each situation says how a stage must end: with 2 and one line, or with 0; and what must still be there, untouched.
"""

import os
import stat
from dataclasses import dataclass

from attack import STAGES, contents, fresh


@dataclass(frozen=True)
class Situation:
    """A stage with a few more arguments, in a folder that `prepare(folder)` has changed."""

    stage: str
    more: str
    code: int | tuple[int, ...]  # how it must end
    prepare: object = None
    stays: tuple[str, ...] = ()  # what must be as it was, besides the inputs


def write(name, text="mine\n"):
    """Somebody's file under a name."""

    def prepare(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return prepare


def folder_with(name, *names):
    """Somebody's folder with files."""

    def prepare(folder):
        for each in names:
            write(f"{name}/{each}")(folder)

    return prepare


def device(name):
    """A character device such as /dev/null, which a replaced file would destroy."""

    def prepare(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(1, 3))

    return prepare


def pipe(name):
    def prepare(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return prepare


def link(name, target, text="mine\n"):
    """A symbolic link; with a text also the file that it leads to."""

    def prepare(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            write(target, text)(folder)
        path.symlink_to(os.path.relpath(folder / target, path.parent))

    return prepare


def both(*steps):
    def prepare(folder):
        for step in steps:
            step(folder)

    return prepare


OUTPUTS = {  # stage: (the flag of an output, what it is called)
    "configure": ("-o", "conf.json"),
    "scheme": ("-o", "conf_prune.json"),
    "prune": ("-o", "pruned"),
    "train": ("-o", "trained"),
    "compose": ("-o", "other-{n}"),
    "compose-pth": ("-o", "composed.pth"),
    "finetune": ("-o", "finetuned/0"),
    "finetune-pth": ("-o", "baseline-{n}.pth"),
    "plot": ("-o", "loss.png"),
}
REPORTING = ("evaluate-t5", "evaluate-distilbert", "search", "explore")
WITH_STATS = ("train", "finetune", "joint", "reconstruct")


def _table():
    table = []
    for stage, (flag, name) in OUTPUTS.items():
        name = name.replace("{n}", "0")
        place = f"{flag} {name}"
        for overwrite in ("", " --overwrite"):
            if STAGES[stage].script == "prune_scheme_generator.py" and overwrite:
                continue
            more = place + overwrite
            if "{n}" in OUTPUTS[stage][1]:
                more += " -n 0"
            table += [
                Situation(stage, more, 2, pipe(name), (name,)),
                Situation(stage, more, 2, link(name, name, None), (name,)),
                Situation(stage, more, 2, write(name), (name,)),
                Situation(stage, more, 2, folder_with(name, "letter.txt", "a/b.txt"), (name,)),
                Situation(stage, more, 2, link(name, f"there/{name}"), (name, f"there/{name}")),
            ]
            if os.getuid() == 0:
                table.append(Situation(stage, more, 2, device(name), (name,)))
        suffix = " -n 0" if "{n}" in OUTPUTS[stage][1] else ""
        foreign = [f"{name}.checkpoint", f"{name}.part", f"{name}.old", f".{name}.old", f".{name}.part", f"{name}.tmp"]
        table.append(Situation(stage, place + suffix, (0, 2), both(*(write(each) for each in foreign)), tuple(foreign)))
        table.append(Situation(stage, f"{flag} file/{name}{suffix}", 2, write("file"), ("file",)))
        table.append(Situation(stage, f"{flag} {'n' * 250 + name[-4:]}{suffix}", (0, 2)))
        table.append(Situation(stage, f"{flag} /dev/null{suffix}", 2))
        table.append(Situation(stage, f"{flag} /proc/{name}{suffix}", 2))
        for read in STAGES[stage].reads:
            table.append(Situation(stage, f"{flag} {read}{suffix} --overwrite", 2))
    for stage in REPORTING:
        for read in (*STAGES[stage].reads, "/dev/null"):
            table.append(Situation(stage, f"--report {read}", 2))
        for inner in ("config.json", "record.json", "model.safetensors"):
            kind = "bert" if stage == "evaluate-distilbert" else "t5"
            table.append(Situation(stage, f"--report model/{kind}/{inner}", 2))
        table.append(Situation(stage, "--report r.json", 2, write("r.json"), ("r.json",)))
        table.append(Situation(stage, "--report r.json", 2, write("r.json", "{}"), ("r.json",)))
        table.append(Situation(stage, "--report r.json", 2, pipe("r.json"), ("r.json",)))
        table.append(Situation(stage, "--report r.json", 2, link("r.json", "r.json", None), ("r.json",)))
        table.append(Situation(stage, "--report r.json", 2, link("r.json", "note.json"), ("r.json", "note.json")))
    for stage in WITH_STATS:
        for name in ("conf.json", "/dev/null", "model/t5/config.json", "data/t5/train.en", "model", "pruned"):
            table.append(Situation(stage, f"--stats {name}", 2, write("conf.json", "{}"), ("conf.json",)))
        table.append(Situation(stage, "--stats s.csv", 2, write("s.csv"), ("s.csv",)))
        table.append(Situation(stage, "--stats s.csv", 2, pipe("s.csv"), ("s.csv",)))
        table.append(Situation(stage, "--stats s.csv", 2, link("s.csv", "s.csv", None), ("s.csv",)))
        table.append(Situation(stage, "--stats s.csv", 2, link("s.csv", "letter.txt"), ("s.csv", "letter.txt")))
        table.append(Situation(stage, "--stats s.csv", 0, link("s.csv", "there.csv", None), ("s.csv",)))
        if STAGES[stage].script.startswith("block"):
            for what in ("blocks", "compositions"):
                code = 2 if what == "blocks" or stage == "joint" else 0
                name = f"s-{what}.csv"
                table.append(Situation(stage, "--stats s.csv", code, write(name), (name,)))
    for name in ("model/demo", "data/demo", "tokenizer/demo"):
        for more in ("", "--overwrite"):
            table.append(Situation("download-t5-demo", more, 2, folder_with(name, "mine.txt"), (name,)))
            table.append(Situation("download-t5-demo", more, 2, write(name), (name,)))
            table.append(Situation("download-t5-demo", more, 2, link(name, "elsewhere/mine.txt"), (name, "elsewhere")))
    table.append(Situation("download-t5-demo", "", (0, 2), write("model/demo.checkpoint"), ("model/demo.checkpoint",)))
    for name in ("../up", "/tmp", ".", "..", "a/b"):
        table.append(Situation("download-t5-demo", f"--name {name}", (0, 2)))
    for stage in ("prune", "train", "compose", "finetune", "evaluate-t5", "search", "explore"):
        for more in (
            "--seed 99999999999999999999999", "--batch-size 99999999999999999999", "--limit 999999999999999999999",
            "--max-length 999999999999999999", "--max-length 1", "--device nonsense",
            "--device meta",
        ):  # fmt: skip
            table.append(Situation(stage, more, (0, 2)))
    for stage in ("train", "finetune", "joint"):
        for more in (
            "--epochs 0", "--lr 1e300", "--lr 1e-320", "--weight-decay 1e300", "--clip 1e-300", "--epoch-size 1",
            "--epoch-size 999999999999999999999", "--warmup 1", "--early-stop 99999999999999999999999",
            "--precision bf16",
            "--epochs 99999999999999999999999 --limit 1 --early-stop 1",
        ):  # fmt: skip
            table.append(Situation(stage, more, (0, 2)))
    for name in ("a b", "ä/ö", "$x$", "x" * 200, "-x", "a\nb", "{x}", "%s", "it's"):
        quoted = "'" + name.replace("'", "'\\''") + "'"
        table.append(Situation("plot", f"--title {quoted}", (0, 2)))
        table.append(Situation("plot", f"--labels {quoted} b c", (0, 2)))
        table.append(Situation("compose", f"--output={quoted} -n 0", (0, 2)))
        table.append(Situation("configure", f"--output={quoted}", (0, 2)))
    return table


def attack_all(shop, base, only, findings):
    """Try all situations, or the one with an identifier."""
    before = contents(shop.folder)
    for number, situation in enumerate(_table()):
        case = f"situations/{situation.stage}/{number}"
        if only in (None, case):
            findings.count("situations", cases=1)
            for kind, detail in attempt(shop, base, situation):
                findings.fail("situations", case, kind, f"{situation.more}: {detail}")
    if contents(shop.folder) != before:
        findings.fail("situations", "situations", "touched", "the workshop")


def attempt(shop, base, situation):
    """[(kind, detail)] of what is not as it must be."""
    import shlex

    stage = STAGES[situation.stage]
    folder = fresh(base)
    shop.lay_out(stage, folder)
    for old in stage.makes if situation.prepare else ():
        path = folder / old
        if path.exists() and not stage.over and old.partition("/")[0] not in stage.reads:
            raise RuntimeError(f"{old} is there already")
    if situation.prepare:
        situation.prepare(folder)
    more = shlex.split(situation.more)
    before = contents(folder)
    done = shop.run(stage, folder, more=more)
    problems = [(done.verdict, f"exit {done.code}: {done.err[-500:]}")] if done.verdict else []
    wanted = situation.code if isinstance(situation.code, tuple) else (situation.code,)
    if not done.verdict and done.code not in wanted:
        problems.append(("wrong exit", f"{done.code}: {done.err[-300:] or done.out[-200:]}"))
    after = contents(folder)
    kept = (*stage.reads, *situation.stays)
    changed = [
        path
        for path in before
        if after.get(path) != before[path]
        and path not in stage.makes
        and any(path == name or path.startswith(f"{name}/") for name in kept)
    ]
    if changed:
        problems.append(("changed", changed))
    if done.code == 2 and situation.code == 2 and after != before:
        new = sorted(set(after) - set(before))
        if new:
            problems.append(("left behind", new))
    return problems
