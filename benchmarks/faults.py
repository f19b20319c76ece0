"""Interrupt every stage wherever it can be interrupted, and see that a rerun makes what an undisturbed run makes.

--kills: SIGKILL before every operation on files. --moments N: SIGKILL and SIGTERM at random moments of training.
--races: two and sixteen writers of one library. --disk: full disks, limits and read-only folders. --situations: a table
of hostile outputs. Without any of these, all of them. It prints a table, and ends with 1 if anything went wrong; the
identifier of a case that failed repeats it alone, with --case.
"""

import json
import os
import random
import resource
import signal
import sys
import time

import attack
from attack import STAGES, Watch, compared, contents, explained, fresh

from common import cli

TEMPORARY = (".pruning-part", ".pruning-old", ".part", ".tmp")
KINDS = ("kills", "moments", "races", "disk", "situations")
ROOM = ("ENOSPC", "EIO")  # what an operation ends with from some moment on
LIMITS = (1000, 5000, 20000, 100000)  # bytes that a file may have, stderr among them


def parser():
    flags = cli.build_parser(__doc__, overwrite=False)
    flags.add_argument("--kills", action="store_true", help="SIGKILL before every operation on files")
    flags.add_argument("--moments", type=cli.natural, default=0, metavar="N", help="kills at random moments a stage")
    flags.add_argument("--races", action="store_true", help="several writers of one library")
    flags.add_argument("--disk", action="store_true", help="full disks, limits, read-only folders")
    flags.add_argument("--situations", action="store_true", help="outputs that are devices, links, inputs, other files")
    flags.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="NAME")
    flags.add_argument("--limit", type=cli.positive, help="so many cases of each stage at most, evenly spread")
    flags.add_argument("--rounds", type=cli.positive, default=3, help="of every race")
    flags.add_argument("--jobs", type=cli.positive, default=1, help="cases at the same time")
    flags.add_argument("--case", metavar="ID", help="repeat one case and show all of it")
    return flags


# --- interrupted, and run again -------------------------------------------------------------------------------------


def undisturbed(shop, base, stage):
    """(what a stage leaves, the operations that it does)."""
    folder = shop.lay_out(stage, fresh(base))
    watch = Watch(folder)
    done = shop.run(stage, folder, before=watch.install, patience=60)
    if done.code != 0:
        raise RuntimeError(f"{stage.name} ended with {done.code}: {done.err}")
    return contents(folder), watch.operations(), done.seconds


def rerun(shop, stage, folder, wanted):
    """Run a stage again that was interrupted; [(kind, detail)] of what is not as after an undisturbed run."""
    done = shop.run(stage, folder)
    if done.code != 0:
        return [("refused", f"exit {done.code}: {done.err}")]
    found = contents(folder)
    differing, leftovers = compared(found, wanted)
    differences = [explained(path, found, wanted) for path in differing]
    return [(kind, paths) for kind, paths in (("differences", differences), ("leftovers", leftovers)) if paths]


def killed(shop, base, stage, wanted, at):
    """Kill a stage before an operation, and run it again."""
    folder = shop.lay_out(stage, fresh(base))
    watch = Watch(folder, at)
    before = contents(folder)
    done = shop.run(stage, folder, before=watch.install)
    if done.code != -signal.SIGKILL:
        return [("not killed", f"exit {done.code} of {watch.number} operations: {done.err}")]
    lost = [path for path in before if path not in contents(folder) and not _is_made(stage, path)]
    return ([("lost", lost)] if lost else []) + rerun(shop, stage, folder, wanted)


def stopped(shop, base, stage, wanted, seconds, number, at):
    """Send a signal after some time, and run the stage again."""
    folder = shop.lay_out(stage, fresh(base))

    def meddle(child):
        time.sleep(max(at * seconds, 0.1))  # before that, no script has begun
        os.kill(child, number)

    done = shop.run(stage, folder, meddle=meddle)
    problems = []
    if done.code not in (0, -signal.SIGKILL if number == signal.SIGKILL else 128 + number):
        problems.append(("unclean end", f"exit {done.code}: {done.err}"))
    elif done.code == 128 + number and done.err.strip().count("\n"):
        problems.append(("not one line", done.err))
    return problems + rerun(shop, stage, folder, wanted)


def _is_made(stage, path):
    return any(path == made or path.startswith(f"{made}/") for made in stage.makes)


# --- full, read-only, limited --------------------------------------------------------------------------------------


def full(shop, base, stage, wanted, at, errno):
    """From an operation on, all that need room fail; later there is room again."""
    folder = shop.lay_out(stage, fresh(base))
    watch = Watch(folder, at, errno)
    return _failing(shop, stage, folder, wanted, lambda: shop.run(stage, folder, before=watch.install))


def limited(shop, base, stage, wanted, size):
    """No file may be larger than `size` bytes."""
    folder = shop.lay_out(stage, fresh(base))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return _failing(shop, stage, folder, wanted, lambda: shop.run(stage, folder, before=limit))


def read_only(shop, base, stage, wanted, where):
    """A folder does not let us write; run as somebody who is not root."""
    folder = shop.lay_out(stage, fresh(base))
    os.chmod(base, 0o755)
    os.chmod(folder.parent, 0o755)
    for parent, _, names in os.walk(folder):
        for path in [parent, *(os.path.join(parent, name) for name in names)]:
            os.chown(path, 65534, 65534)
    place = folder if where == "." else folder / where
    if not place.is_dir():
        return []
    os.chmod(place, 0o555)
    mode = contents(folder)

    def run():
        return shop.run(stage, folder, before=lambda: (os.setgid(65534), os.setuid(65534)))

    problems = _failing(shop, stage, folder, None, run)
    return problems + ([("changed", "a read-only folder")] if place == folder and contents(folder) != mode else [])


def _failing(shop, stage, folder, wanted, run):
    """Whether a run that cannot write ends with one line, loses nothing, leaves nothing, and can be made up for."""
    before = contents(folder)
    done, problems = run(), []
    if done.verdict:
        problems.append((done.verdict, f"exit {done.code}: {done.err[-700:]}"))
    after = contents(folder)
    lost = [path for path in before if path not in after]
    changed = [path for path in before if path in after and after[path] != before[path] and not _is_made(stage, path)]
    half = [path for path in after if path.rpartition("/")[2].endswith(TEMPORARY)]
    problems += [
        (kind, paths) for kind, paths in (("lost", lost), ("changed", changed), ("half-written", half)) if paths
    ]
    return problems + (rerun(shop, stage, folder, wanted) if wanted else [])


# --- all the cases of a stage ----------------------------------------------------------------------------------------


def cases_of(kind, stage, operations, args):
    """The identifiers of a stage's cases, `KIND/STAGE/…`."""
    draw = random.Random(f"{args.seed} {stage.name}")
    made = {
        "kills": [str(at) for at in range(len(operations))],
        "moments": [
            f"{draw.choice(['SIGKILL', 'SIGTERM'])}/{draw.random():.4f}" for _ in range(args.moments * stage.trains)
        ],
        "disk": [f"{errno}/{at}" for errno in ROOM for at in range(len(operations))]
        + [f"size/{size}" for size in LIMITS]
        + [f"read-only/{name.replace('/', ':')}" for name in (".", *stage.makes) if os.getuid() == 0],
    }[kind]
    if args.limit and len(made) > args.limit:
        made = [made[n * len(made) // args.limit] for n in range(args.limit)]
    return [f"{kind}/{stage.name}/{each}" for each in made]


def attempt(shop, base, known, case):
    """One case: [(kind, detail)] of what went wrong."""
    kind, name, *rest = case.split("/")
    stage = STAGES[name]
    wanted, _, seconds = known[name]
    if kind == "kills":
        return killed(shop, base, stage, wanted, int(rest[0]))
    if kind == "moments":
        return stopped(shop, base, stage, wanted, seconds, getattr(signal, rest[0]), float(rest[1]))
    if rest[0] == "size":
        return limited(shop, base, stage, wanted, int(rest[1]))
    if rest[0] == "read-only":
        return read_only(shop, base, stage, wanted, rest[1].replace(":", "/"))
    return full(shop, base, stage, wanted, int(rest[1]), rest[0])


def attempt_in(shop, base, known):
    """`attempt` for workers: each case's folder is removed after it."""

    def work(case):
        with attack.scratch() as own:
            try:
                return attempt(shop, own, known, case)
            except Exception as error:
                return [("attacker failed", repr(error))]

    return work


# --- races -------------------------------------------------------------------------------------------------------


def race(shop, base, writers, scheme, is_old, level, seed):
    """Several writers of one library at once; [(kind, detail)], compared with one writer after the other."""
    stage = STAGES["prune" if level == "prune" else "reconstruct"]
    results = []
    for at_once in (False, True):
        folder = shop.lay_out(stage, fresh(base))
        commands = _writers(folder, shop, stage, writers, scheme, is_old, level, random.Random(seed))
        if at_once:
            codes = _start(shop, folder, commands)
        else:
            codes = [shop.run(command, folder) for command in commands]
        results.append((codes, _library(folder / "library")))
    (_, wanted), (codes, found) = results
    problems = [("refused", f"exit {done.code}: {done.err}") for done in codes if done.code != 0]
    lost = sorted(wanted.keys() - found.keys())
    differing = sorted(name for name in found if found[name] != wanted.get(name))
    return problems + [(kind, names) for kind, names in (("lost", lost), ("differences", differing)) if names]


def _writers(folder, shop, stage, writers, scheme, is_old, level, draw):
    """The commands of the writers, after laying out what each of them reads."""
    commands = []
    source = "conf_prune.json" if level == "prune" else "pruned"
    if is_old:
        attack.copy(shop.folder / ("chosen" if level == "prune" else "trained"), folder / "old")
        (folder / "old").rename(folder / "library")
    for n in range(writers):
        own = f"{n}-{source}"
        attack.copy(shop.folder / source, folder / own)
        path = folder / own if level == "prune" else folder / own / "record.json"
        content = json.loads(path.read_text())
        if level == "prune":
            blocks = content["blocks"]
            names = _share(sorted(blocks), n, writers, scheme, draw)
            content["blocks"] = {name: blocks[name] for name in blocks if name in names}
            content["configs"] = [
                {name: variant for name, variant in config.items() if name in names} for config in content["configs"]
            ]
        else:
            names = _share(sorted(content["variants"]), n, writers, scheme, draw)
            content["variants"] = {pair: content["variants"][pair] for pair in names}
        from common.records import digest, sealed

        if level != "prune":
            content = sealed(content)
        elif "digest" in content:
            content["digest"] = digest({key: value for key, value in content.items() if key != "digest"})
        path.write_text(json.dumps(content))
        command = f"prune.py -m model/t5 -o library -c {own}"
        if level != "prune":
            command = (
                f"block-level_finetuning.py -m model/t5 -p {own} -o library --method reconstruct --stats {n}.csv "
                "--batch-size 8 --held-out 8 --calibration 16"
            )
        commands.append(attack.Stage(f"writer-{n}", f"{command} --overwrite", (), ()))
    return commands


def _share(names, n, writers, scheme, draw):
    if scheme == "disjoint":
        return set(names[n::writers]) or set(names[:1])
    return set(draw.sample(names, max(1, len(names) * 2 // 3)))


def _start(shop, folder, commands):
    """Start all commands at once and wait for them; how they ended."""
    gate, opener = os.pipe()
    ends = []

    def wait_at_the_gate():  # in a child: until nobody holds its other end any more
        os.close(opener)
        os.read(gate, 1)

    def start(rest):
        if not rest:
            os.close(opener)
            return
        ends.append(
            shop.run(rest[0], folder, before=wait_at_the_gate, patience=120, meddle=lambda child: start(rest[1:]))
        )

    start(commands)
    os.close(gate)
    return ends


def _library(folder):
    """{name: content} of a library, whatever the order in which its variants were written."""
    record = json.loads((folder / "record.json").read_text())
    found = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    return found | {f"entry {name}": json.dumps(entry, sort_keys=True) for name, entry in record["variants"].items()}


# --- the program ---------------------------------------------------------------------------------------------------


def run(args):
    started = time.monotonic()
    if args.case:
        kind, name = args.case.split("/")[:2]
        kinds, args.stages = {kind}, [name] if name in STAGES else args.stages
    else:
        kinds = {kind for kind in KINDS if getattr(args, kind)} or set(KINDS)
        args.moments = args.moments or 10
    with attack.scratch() as base:
        names = {*args.stages, *(["prune", "reconstruct", "train", "chosen"][:3] if "races" in kinds else [])}
        shop = attack.Workshop(base / "shop").build(
            None if "situations" in kinds else names | ({"prune-reconstruction"} if "races" in kinds else set())
        )
        findings = attack.Findings()
        for kind in [kind for kind in KINDS if kind in kinds]:
            if kind == "races":
                races(shop, base, args, findings)
            elif kind == "situations":
                import situations

                situations.attack_all(shop, base, args.case, findings)
            else:
                everywhere(kind, shop, base, args, findings)
    columns = ("operations", "cases", "refused", "differences", "leftovers", "lost")
    print(findings.table(columns))
    print(f"{len(findings.failed)} cases failed; {time.monotonic() - started:.0f} s", flush=True)
    total = sum(counts["cases"] for counts in findings.counts.values())
    result = {"cases": total, "failed": sorted(set(findings.failed))[:200]}
    if findings.failed:
        print(json.dumps(result))
        raise SystemExit(1)
    return result


def everywhere(kind, shop, base, args, findings):
    """All cases of a kind, stage by stage."""
    for name in args.stages:
        if args.case and not args.case.startswith(f"{kind}/{name}/"):
            continue
        stage = STAGES[name]
        known = {name: undisturbed(shop, base, stage)}
        wanted, operations, _ = known[name]
        again, *_ = undisturbed(shop, base, stage)
        row = f"{kind} {name}"
        if again != wanted:
            findings.fail(row, f"{kind}/{name}", "not reproducible", compared(again, wanted))
            continue
        cases = [args.case] if args.case else cases_of(kind, stage, operations, args)
        findings.count(row, operations=len(operations), cases=len(cases))
        for case, problems in attack.shares(cases, args.jobs, attempt_in(shop, base, known)):
            at = int(case.rpartition("/")[2]) if case.rpartition("/")[2].isdecimal() else -1
            what = operations[at] if kind in ("kills", "disk") and 0 <= at < len(operations) else ""
            for problem, detail in problems:
                findings.fail(row, case, problem, f"[{what}] {detail}")
        if not args.quiet:
            print(f"{row}: {len(cases)} cases", file=sys.stderr, flush=True)


def races(shop, base, args, findings):
    """Two and sixteen writers, with the same work and with different work, of a new library and of an old one."""
    for writers in (2, 16):
        for level in ("prune", "block"):
            for scheme in ("disjoint", "overlapping"):
                for old in ("new", "old"):
                    row = f"races {writers}-{level}-{scheme}-{old}"
                    for number in range(args.rounds):
                        case = f"races/{writers}-{level}-{scheme}-{old}/{number}"
                        if args.case not in (None, case):
                            continue
                        findings.count(row, cases=1)
                        for kind, detail in race(shop, base, writers, scheme, old == "old", level, case):
                            findings.fail(row, case, kind, detail)
                    if not args.quiet:
                        print(row, file=sys.stderr, flush=True)


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
