"""A heat map of what configurations remove: heads, neurons and weights apart, by kind of block and layer.

A cell is the fraction of a block's heads, neurons or weights, as a percentage. A row is a configuration, and rows of
blocks of one kind stand together.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.cli import flags as cli
from common.composing.configurations import SIZES, block_of, nth_configuration, read_configurations, removed_count
from common.evaluation.pictures import check_picture, plain, save_picture
from common.runtime.files import check_apart

PARTS = {"attention": "heads", "feed_forward": "neurons", "linear": "single weights"}  # a panel each
CELL, GAP = 0.25, 0.9  # a cell's side in inches, and the space above each kind of block in cells, for its name


def build_parser():
    parser = cli.Parser(__doc__.partition("\n\n")[0])
    parser.add_argument("configurations", nargs="?", default="conf.json", help="the configurations: conf.json")
    parser.add_argument("-n", "--nth", type=cli.natural, nargs="+", help="which of them; without it all")
    parser.add_argument("-o", "--output", default="rates.png", help="the picture, .png, .svg or .pdf")
    return parser


def places_of(blocks):
    """{block: (kind, layer)}: ("encoder SelfAttention", 3) for encoder.block.3.layer.0.SelfAttention.

    A kind is a block's name but for the number of its layer, the first in it, shortened where that is clear enough. A
    name without a number is a kind of its own.
    """
    short, full = {}, {}
    for block in blocks:
        parts = block.split(".")
        first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        layer = 0 if first is None else int(parts[first])
        if first is None:
            short[block] = full[block] = block, layer
        else:
            short[block] = " ".join([*parts[max(first - 2, 0) : first - 1], parts[-1]]), layer
            full[block] = ".".join([*parts[:first], "N", *parts[first + 1 :]]), layer
    return short if len(set(short.values())) == len(short) else full


def fractions(modules, config):
    """What a configuration removes: {kind of module: {block: fraction}}; of a block's Linears together."""
    sums = {}
    for name, module in modules.items():
        kind, rate = module["kind"], config.get(name, 0)
        size = module[SIZES[kind]]
        removed = removed_count(rate, size)
        sums.setdefault(kind, {}).setdefault(block_of(name, module), []).append((removed, size))
    return {
        kind: {block: sum(n for n, _ in each) / sum(size for _, size in each) for block, each in blocks.items()}
        for kind, blocks in sums.items()
    }


def draw(modules, configs, names, what="configuration"):
    """The figure: a panel each for heads, neurons and single weights.

    Args:
        names: of the configurations, for the rows.
        what: what the names are.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is wanted, and there may be no display

    found = [fractions(modules, config) for config in configs]
    kinds = [kind for kind in PARTS if any(any(each.get(kind, {}).values()) for each in found)] or ["linear"]
    places = places_of(dict.fromkeys(block for kind in kinds for block in found[0][kind]))
    layers = sorted({layer for _, layer in places.values()})  # their numbers
    rows = {kind: list(dict.fromkeys(places[block][0] for block in found[0][kind])) for kind in kinds}
    tallest = max(len(each) for each in rows.values()) * (len(configs) + GAP)
    width = max(CELL * len(layers), 1.6) + 0.07 * max(map(len, names)) + 0.4
    figure = Figure(figsize=(len(kinds) * width + 0.9, CELL * tallest + 0.8), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, kind in zip(axes, kinds):
        mesh = draw_panel(axis, rows[kind], places, [each[kind] for each in found], names, layers)
        axis.set(xlim=(-0.5, len(layers) - 0.5), ylim=(tallest, 0))  # cells of all panels are of one size
        axis.set_title(f"{PARTS[kind]} removed", fontsize=10)
        axis.set_ylabel(what, fontsize=8, loc="top")
    shape = {"shrink": min(1.0, 10 / tallest), "anchor": (0, 1), "aspect": 15, "fraction": 0.05, "pad": 0.02}
    bar = figure.colorbar(mesh, ax=list(axes), label="removed (%)", ticks=range(0, 101, 25), **shape)
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_panel(axis, kinds, places, fractions, names, layers):
    """A panel's cells, a row for each kind of block and configuration; returns matplotlib's mesh.

    Args:
        places: see `places_of`; `layers`: the numbers of the layers, in order.
        fractions: one {block: fraction} a configuration.
    """
    import numpy

    count = len(fractions)
    cells = numpy.full((len(kinds), count, len(layers)), numpy.nan)  # not a number: there is no such block
    for number, blocks in enumerate(fractions):
        for block, fraction in blocks.items():
            kind, layer = places[block]
            cells[kinds.index(kind), number, layers.index(layer)] = 100 * fraction
    tops = [index * (count + GAP) + GAP for index in range(len(kinds))]
    for top, kind, of_kind in zip(tops, kinds, cells):
        axis.text(-0.5, top - 0.15, plain(kind), fontsize=8, va="bottom")
        edges = numpy.arange(len(layers) + 1) - 0.5, top + numpy.arange(count + 1)
        # The more is gone, the darker, in any colours and in none.
        mesh = axis.pcolormesh(*edges, of_kind, cmap="Blues", vmin=0, vmax=100, edgecolors="0.8", linewidth=0.5)
        for row, column in zip(*numpy.nonzero(numpy.isfinite(of_kind))):
            value = of_kind[row, column]
            look = {"color": "white" if value > 55 else "black", "fontsize": 6, "ha": "center", "va": "center"}
            axis.text(column, top + row + 0.5, f"{value:.0f}", **look)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks([top + row + 0.5 for top in tops for row in range(count)], list(map(plain, names)) * len(kinds))
    axis.tick_params(length=0, labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.xaxis.set_label_position("top")
    axis.spines[:].set_visible(False)
    return mesh


def run(args):
    check_apart({"-o": args.output}, {"the configurations": args.configurations})
    check_picture(args.output)
    found = read_configurations(args.configurations)
    numbers = range(len(found.configs)) if args.nth is None else args.nth
    for number in numbers:
        nth_configuration(found.configs, number, args.configurations)  # it is there
    picture = draw(found.modules, [found.configs[n] for n in numbers], list(map(str, numbers)))
    save_picture(args.output, picture)
    return {"output": args.output, "configurations": list(numbers)}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
