"""A sweep: from how many configurations on composability is faster, and by how much.

For growing numbers N of configurations, each layer's rates drawn from a grid, the blocks are fine-tuned once, into one
growing library. Each configuration's model is then fine-tuned twice by one recipe: from the pruned blocks (baseline),
and from the library's (composed) until it is as good as the baseline's best. The ratio for N is

    seconds of the baselines to their targets / (block-level seconds + the composed models' seconds to the same)

A target is the baseline's best validation loss, over all epochs or up to one of them. Where it is reached before any
fine-tuning of the whole, that costs no seconds; where never, it costs the whole run's: the ratio is then only an upper
bound, and marked. Seconds are those of training: validation and loading count on neither side.

The suite's own scripts do the work and keep what is there: after an interruption, run it again. The work folder keeps
all models, two for each configuration.
"""

import csv
import io
import itertools
import random
import re
import shlex
import subprocess
import sys
from math import inf, nan
from pathlib import Path

from measure import cli, emit, machine

from common.devices import resolve_device
from common.errors import UserError
from common.models import data_source, load_model
from common.records import read_json, write_bytes, write_json
from common.schemes import SCHEME_BY, read_scheme

ROOT = Path(__file__).resolve().parent.parent


def parser():
    flags = cli.build_parser(__doc__.partition("\n\n")[0], overwrite=False)
    flags.add_argument("-m", "--model", required=True, help="the original model: folder or .pth")
    flags.add_argument(
        "--counts",
        type=cli.positive,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="numbers of configurations",
    )
    flags.add_argument(
        "--attention",
        type=cli.rate,
        nargs="+",
        default=[0.25, 0.5],
        metavar="RATE",
        help="the attention rates that a layer's is drawn from",
    )
    flags.add_argument(
        "--linear",
        type=cli.rate,
        nargs="+",
        default=[0.3, 0.5, 0.7],
        metavar="RATE",
        help="the rates of Linears that a layer's is drawn from",
    )
    flags.add_argument("--epochs", type=cli.positive, default=6, help="model-level epochs")
    flags.add_argument("--epoch-size", type=cli.positive, default=2500, help="examples in a model-level epoch")
    flags.add_argument("--block-args", default="", help="further flags for block-level_finetuning.py")
    flags.add_argument(
        "--model-args",
        default="",
        help="further flags for model-level_finetuning.py, the same for baseline and composed",
    )
    flags.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the work folder")
    cli.add_data_flags(flags, batch_size=32)
    return flags


# --- from curves to ratios: a curve is [(validation loss, seconds of training so far)], epoch 0 first --------------


def read_curve(rows):
    """The curve of a stats CSV's rows."""
    seconds = itertools.accumulate(float(row["train_seconds"]) for row in rows)
    return [(float(row["val_loss"] or inf), spent) for row, spent in zip(rows, seconds)]


def seconds_to(curve, target):
    """Seconds until the loss is no higher than `target`, and whether it ever is; if not, the whole run's."""
    return next(((spent, True) for loss, spent in curve if loss <= target), (curve[-1][1], False))


def targets(baseline):
    """{"best": a baseline's lowest loss, "epoch 1": its lowest up to there, …}"""
    so_far = list(itertools.accumulate((loss for loss, _ in baseline), min))
    return {"best": so_far[-1]} | {f"epoch {epoch}": loss for epoch, loss in enumerate(so_far) if epoch}


def compare(baseline, composed):
    """What a configuration's two runs took to each of the baseline's targets."""
    comparison = {}
    for name, loss in targets(baseline).items():
        (its, _), (ours, reached) = seconds_to(baseline, loss), seconds_to(composed, loss)
        comparison[name] = {
            "loss": loss,
            "baseline_seconds": round(its, 3),
            "composed_seconds": round(ours, 3),
            "composed": "reached" if reached else "not reached",
        }
    return comparison


def gain(comparisons, block_seconds):
    """{target: sums over the configurations compared, their ratio, and the configurations that never got there}

    A baseline that stopped early has its best as the target of the epochs that it did not run.
    """
    gains = {}
    for target in max(comparisons, key=len):
        each = [comparison.get(target, comparison["best"]) for comparison in comparisons]
        baseline, composed = (sum(one[f"{side}_seconds"] for one in each) for side in ("baseline", "composed"))
        total = block_seconds + composed
        gains[target] = {
            "ratio": round(baseline / total, 4) if total else None,
            "baseline_seconds": round(baseline, 3),
            "composed_seconds": round(composed, 3),
            "not_reached": [n for n, one in enumerate(each) if one["composed"] != "reached"],
        }
    return gains


def own_seconds(rows, variant_rows):
    """What each variant took by itself in a block-level run, {(block, variant): seconds}, from its two CSVs.

    There, a gradient epoch's seconds include the variant's validation, which is taken out by the epoch's share of it;
    a closed form, an epoch 1 without a training loss, has an equal share of what all variants took.
    """
    share = {}
    for row in rows:
        train, val = float(row["train_seconds"]), float(row["val_seconds"])
        share[row["epoch"]] = train / (train + val or 1) if row["train_loss"] else float(row["epoch"] != "0")
    own = {}
    for row in variant_rows:
        pair = row["block"], row["variant"]
        own[pair] = own.get(pair, 0.0) + share.get(row["epoch"], 1.0) * float(row["seconds"])
    return own


def without_reuse(configs, own, teacher_seconds):
    """Block-level seconds if every configuration fine-tuned all its blocks for itself, and ran the teacher for itself.

    Args:
        configs: one {block: variant} each; what `own` does not know of is left as it was, and costs nothing.
    """
    return sum(teacher_seconds + sum(own.get(pair, 0.0) for pair in config.items()) for config in configs)


def draw(modules, count, attention, linear, seed):
    """`count` configurations: for each layer one attention rate and one rate of its Linears, from the two grids."""
    rng, configs = random.Random(seed), []
    layers = {name: re.match(r".*?\.\d+(?=\.)", name)[0] for name in modules}  # "encoder.block.0" of T5, for instance
    for _ in range(count):
        rates = {
            layer: {"attention": rng.choice(attention), "linear": rng.choice(linear)}
            for layer in dict.fromkeys(layers.values())
        }
        configs.append({name: rates[layers[name]][module["kind"]] for name, module in modules.items()})
    return configs


# --- the sweep ---------------------------------------------------------------------------------------------------


def stage(script, *arguments):
    """Run one of the suite's scripts."""
    code = subprocess.call([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.DEVNULL)
    if code:
        raise UserError(f"{script} ended with exit code {code}; what it said is above")


def read_rows(path):
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


class Sweep:
    def __init__(self, args):
        self.args, self.folder = args, Path(args.output)
        self.own, self.block_seconds, self.teacher_seconds = {}, 0.0, None  # of the block-level stage, so far
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = ["--seed", args.seed, "--device", args.device, *["--quiet"] * args.quiet]
        self.data = [
            part
            for name in ("tokenizer", "data", "max_length", "limit", "batch_size")
            if vars(args)[name]
            for part in (f"--{name.replace('_', '-')}", vars(args)[name])
        ]

    def configure(self):
        """Write conf-N.json for every N: the first N of all configurations."""
        path = self.folder / "modules.json"
        stage(
            "config_generator.py",
            "-m",
            self.args.model,
            "-o",
            path,
            "--attention",
            self.args.attention[0],
            "--linear",
            self.args.linear[0],
            "-n",
            1,
            "--overwrite",
            *self.common,
        )
        content = read_json(path, "config_generator.py")
        configs = draw(content["modules"], max(self.args.counts), self.args.attention, self.args.linear, self.args.seed)
        for n in self.args.counts:
            write_json(self.folder / f"conf-{n}.json", content | {"configs": configs[:n]})

    def fine_tune_blocks(self, n):
        """Fine-tune the blocks that N configurations need and that are not there yet: the scheme.

        N has a pruned library of its own, else a rerun would fine-tune a later N's blocks for an earlier one.
        """
        scheme, pruned, stats = (self.folder / name for name in (f"scheme-{n}.json", f"pruned-{n}", f"blocks-{n}.csv"))
        stage(SCHEME_BY, "-i", self.folder / f"conf-{n}.json", "-o", scheme, "--overwrite", *self.common)
        stage("prune.py", "-m", self.args.model, "-c", scheme, "-o", pruned, *self.common)
        stage(
            "block-level_finetuning.py",
            "-m",
            self.args.model,
            "-p",
            pruned,
            "-o",
            self.folder / "tuned",
            "--stats",
            stats,
            *self.data,
            *self.common,
            *shlex.split(self.args.block_args),
        )
        rows = read_rows(stats)  # of the variants that are new for N, fine-tuned now or in an earlier run
        own = own_seconds(rows, read_rows(stats.with_name(f"{stats.stem}-blocks.csv")))
        spent, alone = sum(float(row["train_seconds"]) for row in rows), sum(own.values())
        self.block_seconds += max(spent, alone)  # killed between two solutions, it told of some in the second CSV alone
        if self.teacher_seconds is None:
            self.teacher_seconds = max(spent - alone, 0.0)
        self.own |= own
        wanted = read_scheme(scheme)
        if set(self.own) != set(wanted.variants()):
            raise UserError(
                f"{self.folder}: its blocks-*.csv are not about the variants of {scheme.name}, so their "
                "seconds are unknown; start again in another work folder (-o)"
            )
        return wanted

    def fine_tune_model(self, name, library, n, nth, *more):
        """Fine-tune the nth configuration out of a library: its curve."""
        stats = self.folder / f"{name}-{nth}.csv"
        stage(
            "model-level_finetuning.py",
            "-m",
            self.args.model,
            "-p",
            self.folder / library,
            "-n",
            nth,
            "-c",
            self.folder / f"conf-{n}.json",
            "-o",
            self.folder / f"{name}-{nth}.pth",
            "--stats",
            stats,
            "--epochs",
            self.args.epochs,
            "--epoch-size",
            self.args.epoch_size,
            *self.data,
            *self.common,
            *shlex.split(self.args.model_args),
            *more,
        )
        return read_curve(read_rows(stats))

    def compare(self, n, nth, rates):
        """Fine-tune the nth configuration both ways, one after the other."""
        baseline = self.fine_tune_model("baseline", f"pruned-{n}", n, nth)
        composed = self.fine_tune_model("composed", "tuned", n, nth, "--target-loss", targets(baseline)["best"])
        comparison = compare(baseline, composed)
        emit(
            figure="configuration",
            configuration=nth,
            mean_rates=rates,
            targets=comparison,
            **{
                name: {
                    "val_loss": [None if loss == inf else loss for loss, _ in curve],
                    "train_seconds": [round(s, 3) for _, s in curve],
                }
                for name, curve in (("baseline", baseline), ("composed", composed))
            },
        )
        return comparison


def plot(path, sweep):
    """The ratios over the number of configurations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axis, counts = figure.subplots(), [each["configurations"] for each in sweep]

    def line(kind, target, style, label):
        gains = [each[kind].get(target, each[kind]["best"]) for each in sweep]
        heights = [nan if gain["ratio"] is None else gain["ratio"] for gain in gains]
        axis.plot(counts, heights, style, markersize=4, label=label)
        bounds = [(n, height) for n, height, gain in zip(counts, heights, gains) if gain["not_reached"]]
        axis.plot(*zip(*bounds), "kx") if bounds else None

    line("with_reuse", "best", "C0-o", "target: the baseline's best")
    line("without_reuse", "best", "C0--o", "the same without reuse (computed)")
    for number, target in enumerate((name for name in sweep[-1]["with_reuse"] if name != "best"), start=1):
        line("with_reuse", target, f"C{number}:.", f"its best up to {target}")
    axis.plot([], [], "kx", label="not always reached: an upper bound")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, map(str, counts))
    axis.set(xlabel="configurations", ylabel="baseline's seconds / composed models' seconds", ylim=(0, None))
    axis.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    write_bytes(path, picture.getvalue())


def run(args):
    args.counts = sorted(set(args.counts))
    loaded = load_model(args.model)
    emit(
        figure="setting",
        model=args.model,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        data=str(data_source(args.data, loaded)),
        seed=args.seed,
        attention=args.attention,
        linear=args.linear,
        epochs=args.epochs,
        epoch_size=args.epoch_size,
        block_args=args.block_args,
        model_args=args.model_args,
        seconds="of training; validation is counted nowhere",
        **machine(resolve_device(args.device)),
    )
    del loaded
    sweep, comparisons, figures = Sweep(args), [], []
    sweep.configure()
    for n in args.counts:
        scheme = sweep.fine_tune_blocks(n)
        comparisons += [sweep.compare(n, nth, scheme.requested[nth]) for nth in range(len(comparisons), n)]
        alone = without_reuse(scheme.configs, sweep.own, sweep.teacher_seconds)
        figures.append(
            {
                "figure": "sweep",
                "configurations": n,
                "blocks_with_reuse": len(scheme.variants()),
                "blocks_without_reuse": scheme.count_without_reuse(),
                "block_seconds": round(sweep.block_seconds, 3),
                "block_seconds_without_reuse": round(alone, 3),
                "with_reuse": gain(comparisons, sweep.block_seconds),
                "without_reuse_is": "computed from the variants' own seconds and the teacher's passes",
                "without_reuse": gain(comparisons, alone),
            }
        )
        plot(sweep.folder / "ratio.png", figures)
        if n != args.counts[-1]:
            emit(**figures[-1])
    return figures[-1]


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
