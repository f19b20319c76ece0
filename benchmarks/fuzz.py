"""Damage what a stage reads, or finds where its outputs go, and see that it refuses in one line or does its work.

Every case is drawn from the seed and its number: a stage, a file that it reads, and a mutation of that file's format.
Nothing may end in a traceback or hang, nothing outside of the outputs may change, no code out of a file may run, and
what is not finite may not end with 0. --flips: of every output, one bit is flipped; the next stage must refuse it.
"""

import json
import os
import random
import shlex
import sys
import time

import attack
import numpy as np
from attack import STAGES, contents, fresh

from common import cli
from common.records import digest, file_digest

MARKER = "code-was-run"
NUMBERS = (0, -1, 1e308, -1e308, 10**30, 10**400, 0.5, 1e-320, float("nan"), float("inf"), -float("inf"), 2**31, 2**63)
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "../../up",
    "/etc/passwd",
    "\ud800",
    "a\0b",
    "ä" * 300,
    [],
    {},
    [[]],
    {"": 0},
    [1],
)
BAD_CODE = "import pathlib\npathlib.Path({path!r}).touch()\nclass Own:\n    pass\n"
WEIGHTS = (".safetensors", ".npy", ".pth")
CHANGES_NOTHING = ("README.md",)


def parser():
    flags = cli.build_parser(__doc__, overwrite=False)
    flags.add_argument("--cases", type=cli.positive, default=5000, metavar="N", help="mutations")
    flags.add_argument(
        "--flips", type=cli.natural, default=0, metavar="N", help="single bit flips of every output file"
    )
    flags.add_argument("--outputs-only", action="store_true", help="flips alone")
    flags.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="NAME")
    flags.add_argument("--jobs", type=cli.positive, default=1, help="cases at the same time")
    flags.add_argument("--case", metavar="ID", help="repeat one case and show all of it")
    return flags


# --- mutations: of bytes, of JSON, of arrays, of folders --------------------------------------------------------------


def change_bytes(path, draw):
    """Flip, cut, lengthen, zero or replace."""
    data = bytearray(path.read_bytes())
    way = draw.choice(("flip", "flips", "cut", "longer", "zero", "empty", "other"))
    if way == "flip" and data:
        flip(data, draw)
    elif way == "flips" and data:
        for _ in range(20):
            flip(data, draw)
    elif way == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif way == "longer":
        data += draw.randbytes(draw.randint(1, 100))
    elif way == "zero" and data:
        start = draw.randrange(len(data))
        data[start : start + 16] = bytes(len(data[start : start + 16]))
    elif way == "empty":
        data.clear()
    elif way == "other":
        data[:] = draw.choice((b"\x80\x04.", b"PK\x03\x04", b"{}", b"\xff\xfe", b"[" * 100_000, draw.randbytes(500)))
    rewrite(path, bytes(data))
    return way


def flip(data, draw):
    place = draw.randrange(len(data) * 8)
    data[place // 8] ^= 1 << (place % 8)


def rewrite(path, data):
    """New content under a name, never through a link."""
    path.unlink()
    path.write_bytes(data)


def change_json(path, draw):
    """Another value, a missing, unknown or doubled key, somewhere in a JSON file; its own digest may be made to fit."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return change_bytes(path, draw)
    places = list(_places(value))
    if not places:
        return change_bytes(path, draw)
    holder, key = draw.choice(places)
    way = draw.choice(("value", "value", "number", "number", "missing", "unknown", "twin", "deep", "swap"))
    if way == "value":
        holder[key] = draw.choice(VALUES)
    elif way == "number":
        old = holder[key]
        holder[key] = draw.choice((*NUMBERS, *((old + 1, -old, old * 1000) if type(old) in (int, float) else ())))
    elif way == "missing":
        del holder[key]
    elif way == "unknown" and isinstance(holder, dict):
        holder[draw.choice(("unknown", "../x", "", "__class__", "auto_map", "torch_dtype", "dtype"))] = draw.choice(
            VALUES
        )
    elif way == "swap":
        other, name = draw.choice(places)
        holder[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(holder[key]))
    if isinstance(value, dict) and "digest" in value and draw.random() < 0.7:
        value["digest"] = digest({name: item for name, item in value.items() if name != "digest"})
        way += ", digest made to fit"
    text = json.dumps(value, indent=1)
    if way.startswith("twin") and isinstance(value, dict):
        text = text[:-1] + f', "{draw.choice(list(value))}": 0}}'
    elif way.startswith("deep"):
        text = text.replace(json.dumps(holder[key]), "[" * 5000 + "]" * 5000, 1)
    rewrite(path, text.encode("utf-8", "surrogatepass"))
    return f"{way} at {key}"


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def change_array(path, draw):
    """A module file of another dtype or shape, with values that are not finite or not where the mask says."""
    packed = np.load(path, allow_pickle=False)
    arrays = {name: np.array(packed[name]) for name in packed.dtype.names}
    name = draw.choice(list(arrays))
    way = draw.choice(
        (
            "nan",
            "inf",
            "huge",
            "float16",
            "float64",
            "big-endian",
            "int",
            "shape",
            "gone",
            "more",
            "mask",
            "plain",
            "list",
        )
    )
    array = arrays[name]
    spoil_array(arrays, name, way, draw)
    if way == "plain":
        np.save(path, array)
        return way
    if way == "list":
        packed = np.zeros(2, [(key, each.dtype, each.shape) for key, each in arrays.items()])
    else:
        packed = np.zeros((), np.dtype([(key, each.dtype, each.shape) for key, each in arrays.items()], align=True))
        for key, each in arrays.items():
            packed[key] = each
    np.save(path, packed)
    return f"{way} in {name}"


def spoil_array(arrays, name, way, draw):
    """Change one of several arrays in place."""
    array = arrays[name]
    if way in ("nan", "inf", "huge"):
        array = array.astype(np.float32)
        array.reshape(-1)[draw.randrange(array.size)] = {"nan": np.nan, "inf": np.inf, "huge": 3e38}[way]
        arrays[name] = array
    elif way in ("float16", "float64"):
        arrays[name] = array.astype(way)
    elif way == "big-endian":
        arrays[name] = array.astype(">f4")
    elif way == "int":
        arrays[name] = array.astype(np.int64)
    elif way == "shape":
        arrays[name] = draw.choice((array.T.copy(), array[:1].copy(), array.reshape(-1), array[..., None]))
    elif way == "gone":
        del arrays[name]
    elif way == "more":
        arrays["extra.weight"] = array
    elif way == "mask":
        arrays[name] = ~array if array.dtype == bool else array + 1


def change_safetensors(path, draw):
    """The same for a safetensors file."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    arrays = load_file(path)
    name = draw.choice(sorted(arrays))
    way = draw.choice(("nan", "inf", "huge", "float16", "float64", "int", "shape", "gone", "more", "metadata"))
    if way == "metadata":
        metadata = {
            key: draw.choice(("", "{}", '{"x": [1]}', value.replace("1", "9" * 12))) for key, value in metadata.items()
        }
    else:
        spoil_array(arrays, name, way, draw)
    path.unlink()
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, metadata)
    return f"{way} in {name}"


def change_pth(path, draw, folder):
    """The same for a .pth, or a pickle that would leave a marker."""
    import torch

    if draw.random() < 0.3:
        rewrite(path, b"cos\nsystem\n(S'touch " + os.fsencode(folder / MARKER) + b"'\ntR.")
        return "pickle"
    content = torch.load(path, map_location="cpu", weights_only=True)
    way = draw.choice(("key", "nan", "record", "config", "state", "digest"))
    name = draw.choice(sorted(content["state_dict"]))
    if way == "key":
        del content[draw.choice(sorted(content))]
    elif way == "nan":
        content["state_dict"][name] = content["state_dict"][name] * float("nan")
    elif way in ("record", "config"):
        content[way] = draw.choice(("{}", "[]", "x", "null", content[way][:50], content[way].replace("2", "-1")))
    elif way == "state":
        content["state_dict"][name] = draw.choice((None, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)))
    elif way == "digest":
        content["digest"] = "0"
    if draw.random() < 0.6 and "digest" in content and way != "digest":
        from common.records import content_digest

        content["digest"] = content_digest({key: value for key, value in content.items() if key != "digest"})
        way += ", digest made to fit"
    path.unlink()
    torch.save(content, path)
    return f"{way} {name}"


def change_text(path, draw):
    """A line more, fewer, empty, very long, or not UTF-8; of JSONL also other values."""
    lines = path.read_bytes().split(b"\n")
    number = draw.randrange(len(lines))
    lines[number : number + 1] = draw.choice(
        ([b""], [], [lines[number]] * 2, [b"\xff\xfe"], [b"the " * 3000], [b"\r"], [b'{"text": "\\ud800", "label": 1}'],
         [b'{"text": ' + b"[" * 5000], [b'{"text": 1, "label": "x"}'], [b'{"text": "x", "label": 1e400}'],
         [b'{"text": "x", "label": 99999999999999999999}'], [b"0,nan,inf,1,1"], [b"0,,,,"], [b"1e999,-1,x,\0,"]),
    )  # fmt: skip
    rewrite(path, b"\n".join(lines))
    return f"line {number}"


def change_place(path, draw, folder):
    """Something else under the file's name: nothing, a folder, a link out of the folder or in a circle, a pipe."""
    way = draw.choice(("gone", "folder", "outside", "circle", "pipe", "unreadable"))
    if way == "unreadable":
        path.chmod(0)
        return way
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "outside":
        path.symlink_to(folder.parent / "outside" / "file.txt")
    elif way == "circle":
        path.symlink_to(path.name)
    elif way == "pipe":
        os.mkfifo(path)
    return way


def plant_code(path, draw, folder):
    """A model or tokenizer folder that asks for code of its own."""
    config = path.parent / ("config.json" if (path.parent / "config.json").exists() else "tokenizer_config.json")
    value = json.loads(config.read_text())
    own = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"], "AutoModelForSeq2SeqLM": "own.Own"}
    value |= {"auto_map": own, "trust_remote_code": True, "tokenizer_class": draw.choice(("Own", "T5Tokenizer"))}
    if draw.random() < 0.7 and "model_type" in value:
        value["model_type"] = draw.choice(("own", "gpt2", "", None, "compact-t5"))
    rewrite(config, json.dumps(value).encode())
    (path.parent / "own.py").write_text(BAD_CODE.format(path=str(folder / MARKER)))
    return "code planted"


def mutate(path, draw, folder):
    """Mutate a file as suits its format; returns what was done."""
    if draw.random() < 0.06:
        return change_place(path, draw, folder)
    if path.name in ("config.json", "tokenizer_config.json") and draw.random() < 0.15:
        return plant_code(path, draw, folder)
    if draw.random() < 0.2:
        return change_bytes(path, draw)
    if path.suffix == ".json":
        return change_json(path, draw)
    if path.suffix == ".npy":
        return change_array(path, draw)
    if path.suffix == ".safetensors":
        return change_safetensors(path, draw)
    if path.suffix == ".pth":
        return change_pth(path, draw, folder)
    return change_text(path, draw) if path.suffix in (".csv", ".jsonl", ".en", ".de") else change_bytes(path, draw)


def make_digests_fit(path, folder):
    """Write the new digest of a file into the records above it, so that what comes after the digest is tried too."""
    for parent in path.parents:
        record = parent / "record.json"
        if record == path or not record.is_file() or path.is_symlink() or not path.is_file():
            continue
        try:
            value = json.loads(record.read_bytes())
            name = str(path.relative_to(parent))
            if name in value.get("files", {}):
                value["files"][name] = file_digest(path)
            for entry in [*value.get("variants", {}).values(), value.get("rest", {})]:
                if entry.get("file") == name:
                    entry["sha256"] = file_digest(path)
                    packed = np.load(path, allow_pickle=False)
                    entry["shapes"] = {field: list(packed[field].shape) for field in packed.dtype.names or ()}
            if "digest" in value:
                value["digest"] = digest({key: item for key, item in value.items() if key != "digest"})
            record.write_text(json.dumps(value, indent=1))
        except Exception:  # the file or the record is too damaged for it
            return
        if parent == folder:
            return


# --- a case -------------------------------------------------------------------------------------------------------


def files_of(folder):
    """What may be damaged, by format first, so that a library's many files don't count for more than a record."""
    kinds = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in CHANGES_NOTHING and path.stat().st_size:
            kinds.setdefault(path.suffix if path.suffix != ".json" else path.name, []).append(path)
    return kinds


def attempt(shop, base, case):
    """One case: (verdict or None, what was done, what the stage said)."""
    _, name, number, seed = case.split("/")
    draw = random.Random(case)
    stage = STAGES[name]
    case_folder = fresh(base)
    folder = shop.lay_out(stage, case_folder)
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file.txt").write_text("not yours\n")
    finds_outputs = draw.random() < 0.2
    if finds_outputs:
        for made in stage.makes:
            if not (folder / made).exists():
                attack.copy(shop.folder / made, folder / made)
    kinds = files_of(folder)
    if not kinds:
        return None, "nothing to damage", ""
    done_to = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        path = draw.choice(kinds[draw.choice(sorted(kinds))])
        if not path.is_file() or path.is_symlink() or path.parent.is_symlink():
            continue
        try:
            what = mutate(path, draw, folder)
        except Exception:  # damaged beyond its format already, by the first of two
            if not os.path.lexists(path):
                path.write_bytes(b"")
            what = "damaged beyond this format already"
        if draw.random() < 0.7:
            make_digests_fit(path, folder)
            what += ", its digest fits"
        done_to.append(f"{path.relative_to(folder)}: {what}")
    more = ["--overwrite"] if finds_outputs and draw.random() < 0.3 and "--overwrite" not in stage.arguments else []
    more = more if "--overwrite" in shop.flags(stage) else []
    before = contents(folder)
    done = shop.run(stage, folder, more=more)
    return judge(stage, folder, outside, before, done), "; ".join(done_to), f"exit {done.code}: {done.err[-600:]}"


def judge(stage, folder, outside, before, done):
    """What is wrong with how a case ended, or None."""
    if (folder / MARKER).exists():
        return "code run"
    if contents(outside) != OUTSIDE or len(list(folder.parent.iterdir())) != 2:
        return "touched outside"
    after = contents(folder)
    made = lambda path: any(path == each or path.startswith(f"{each}/") for each in stage.makes)  # noqa: E731
    changed = [path for path in before if not made(path) and after.get(path) != before[path]]
    if changed:
        return f"touched inputs {changed[0]}"
    return done.verdict


OUTSIDE = {}


# --- single bits -----------------------------------------------------------------------------------------------------

# Output: a stage that reads it. What people edit, and what is only looked at (conf.json, stats), has no digest.
READERS = {
    "conf_prune.json": "prune", "pruned": "reconstruct", "solved": "compose",
    "joint": "compose-pth", "composed": "evaluate-t5", "baseline-0.pth": "evaluate-pth", "compact": "evaluate-compact",
    "bert-composed": "evaluate-distilbert", "grid-solved": "search",
    "finetuned": "download-local",
}  # fmt: skip


def flipped(shop, base, case, undamaged):
    """Flip one bit of a file that a stage reads: (verdict or None, what was done, what the stage said)."""
    _, output, kind, number = case.split("/")
    stage, draw = STAGES[READERS[output]], random.Random(case)
    folder = shop.lay_out(stage, fresh(base))
    place = folder / output
    paths = files_of(place)[kind] if place.is_dir() else [place]
    path = draw.choice(paths)
    data = bytearray(path.read_bytes())
    flip(data, draw)
    rewrite(path, bytes(data))
    done = shop.run(stage, folder)
    verdict = done.verdict
    if verdict is None and done.code == 0:
        made = {name: item for name, item in contents(folder).items() if _under(name, stage.makes)}
        is_same = made == undamaged[output]["made"] and _result(done) == undamaged[output]["result"]
        verdict = "harmless" if is_same else "accepted"
    return verdict, f"{path.relative_to(folder)}: a bit", f"exit {done.code}: {done.err[-400:]}"


def _under(name, made):
    return any(name == each or name.startswith(f"{each}/") for each in made)


def _result(done):
    try:
        return repr(attack._untimed(json.loads(done.out)))
    except ValueError:
        return done.out


def flips(shop, base, args, findings):
    """Bits of every kind of file of every output."""
    undamaged, cases = {}, []
    for output, name in READERS.items():
        stage = STAGES[name]
        folder = shop.lay_out(stage, fresh(base))
        done = shop.run(stage, folder)
        made = {path: item for path, item in contents(folder).items() if _under(path, stage.makes)}
        undamaged[output] = {"made": made, "result": _result(done)}
        place = shop.folder / output
        kinds = files_of(place) if place.is_dir() else {place.suffix: [place]}
        cases += [f"flip/{output}/{kind}/{n}" for kind in kinds for n in range(args.flips)]

    def work(case):
        with attack.scratch() as own:
            return flipped(shop, own, case, undamaged)

    for case, (verdict, what, said) in attack.shares([args.case] if args.case else cases, args.jobs, work):
        row = " ".join(case.split("/")[:3])
        findings.count(row, cases=1)
        if verdict == "harmless":
            findings.count(row, harmless=1)
        elif verdict:
            findings.fail(row, case, verdict, f"{what}: {said}")
        else:
            findings.count(row, refused=1)
        if args.case:
            print(what, said, verdict)


# --- the program ---------------------------------------------------------------------------------------------------


def run(args):
    started = time.monotonic()
    findings = attack.Findings()
    with attack.scratch() as base:
        shop = attack.Workshop(base / "shop").build()
        known = contents(shop.folder)
        probe = base / "probe"
        probe.mkdir()
        (probe / "file.txt").write_text("not yours\n")
        OUTSIDE.update(contents(probe))
        if not args.outputs_only and not (args.case or "").startswith("flip/"):
            names = [name for name in args.stages if STAGES[name].reads]
            slow = {"evaluate-t5": 4, "search": 3, "joint": 2, "both": 2, "in-sequence": 2}  # seconds, so fewer of them
            weights = [1 / slow.get(name, 1) for name in names]
            draw = random.Random(args.seed)
            cases = [f"fuzz/{draw.choices(names, weights)[0]}/{n}/{args.seed}" for n in range(args.cases)]

            def work(case):
                with attack.scratch() as own:
                    return attempt(shop, own, case)

            for case, (verdict, what, said) in attack.shares([args.case] if args.case else cases, args.jobs, work):
                row = shlex.split(STAGES[case.split("/")[1]].command)[0]
                findings.count(
                    row, cases=1, accepted=int(said.startswith("exit 0")), refused=int(said.startswith("exit 2"))
                )
                if args.case:
                    print(what, "|", said)
                if verdict:
                    findings.fail(row, case, verdict.split(" /")[0], f"{what}: {said}")
        if args.flips or args.outputs_only:
            args.flips = args.flips or 10
            flips(shop, base, args, findings)
        if contents(shop.folder) != known:
            findings.fail("workshop", "workshop", "touched", "a case changed a file outside of its folder")
    print(findings.table(("cases", "refused", "accepted")))
    print(f"{len(findings.failed)} cases failed; {time.monotonic() - started:.0f} s", flush=True)
    result = {"cases": sum(counts["cases"] for counts in findings.counts.values()), "failed": findings.failed[:200]}
    if findings.failed:
        print(json.dumps(result))
        raise SystemExit(1)
    return result


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
