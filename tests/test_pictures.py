"""How pictures look: nothing overlaps, axes have names and enough ticks, colours are told apart by everybody."""

import itertools
import json

import pytest
from helpers import load_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from common.composing.configurations import read_configurations
from common.composing.scheme import DENSE, make_scheme
from common.evaluation.pictures import place_labels, set_ticks
from common.runtime.records import FORMAT_VERSION, make_record, write_record

# jfly.uni-koeln.de/color
OKABE_ITO = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
T5 = [
    *(f"encoder.block.{n}.layer.{k}.{name}" for n in range(6) for k, name in enumerate(("SelfAttention", "Dense"))),
    *(
        f"decoder.block.{n}.layer.{k}.{name}"
        for n in range(6)
        for k, name in enumerate(("SelfAttention", "EncDecAttention", "Dense"))
    ),
]
SIXTY = [f"bert.encoder.layer.{n}.{name}" for n in range(30) for name in ("attention", "feed_forward")]


def modules_of(blocks, neurons=True):
    """The modules of a `conf.json`: attention blocks of 8 heads, feed-forward blocks of 64 neurons."""
    found = {}
    for block in blocks:
        if "ttention" in block:
            found[block] = {"kind": "attention", "heads": 8}
            found[f"{block}.o"] = {"kind": "linear", "weights": 1000, "block": block, "linear": "o"}
        else:
            if neurons:
                found[block] = {"kind": "feed_forward", "neurons": 64}
            for linear, weights in (("wi", 1000), ("wo", 3000)):
                found[f"{block}.{linear}"] = {"kind": "linear", "weights": weights, "block": block, "linear": linear}
    return found


def boxes(texts, renderer):
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()]


def overlapping(figure):
    """Pairs of texts of a figure that share some of their area, by matplotlib's own boxes, a pixel of grace."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = []
    for axis in figure.axes:
        x, y = axis.get_xlim(), axis.get_ylim()
        ticks = [
            tick.label2 if tick.label2.get_visible() else tick.label1
            for side, (low, high) in ((axis.xaxis, sorted(x)), (axis.yaxis, sorted(y)))
            for tick in side.get_major_ticks()
            if low <= tick.get_loc() <= high
        ]
        texts = [*ticks, *axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
        found += [(text, box) for text in texts if text.get_text() for box in boxes([text], renderer)]
    for legend in figure.legends:
        found += [(text, box) for text in legend.get_texts() for box in boxes([text], renderer)]
    return [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in itertools.combinations(found, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.mark.parametrize(
    "low, high, log", [(0, 1, False), (2.9, 2.95, False), (0, 97, False), (2, 4, True), (0.01, 3, True)]
)
def test_values_have_four_ticks_at_least(low, high, log):
    """Oracle: those that lie within the limits."""
    axis = Figure().subplots()
    axis.set_ylim(low, high)
    if log:
        axis.set_yscale("log")
    axis.set_ylim(low or 1e-3, high)
    set_ticks(axis.yaxis, log=log)
    assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) >= 4


def test_labels_cover_neither_points_nor_each_other():
    """Points in pairs closer than a label is wide, and at the edges. Oracle: matplotlib's boxes."""
    figure = Figure()
    axis = figure.subplots()
    points = [(0, 0), (0.01, 0.01), (0.5, 0.5), (0.52, 0.5), (1, 1), (1, 0.99), (0, 1)]
    axis.plot(*zip(*points), "o", markersize=4)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    place_labels(axis, points, [f"label {n}" for n in range(len(points))])
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = boxes(axis.texts, renderer)
    assert len(found) == 7 and not [pair for pair in itertools.combinations(found, 2) if pair[0].overlaps(pair[1])]
    frame = axis.get_window_extent(renderer)
    for box in found:
        assert not any(box.contains(*axis.transData.transform(point)) for point in points)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


# --- heat maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks, count", [(T5, 5), (SIXTY, 1)], ids=["30 blocks", "60 blocks"])
def test_a_heat_map_is_legible(blocks, count):
    """Oracle: matplotlib's boxes; a panel each for heads, neurons and weights, a number in every cell."""
    rates = load_script("experiments/rates.py")
    modules = modules_of(blocks)
    configs = [dict.fromkeys(modules, 0.25 * (n % 3 + 1)) for n in range(count)]
    figure = rates.draw(modules, configs, [f"configuration {n}" for n in range(count)])
    assert [axis.get_title() for axis in figure.axes[:3]] == [
        "heads removed",
        "neurons removed",
        "single weights removed",
    ]
    assert overlapping(figure) == []
    numbers = [text for axis in figure.axes for text in axis.texts if text.get_text().isdecimal()]
    assert len(numbers) == 2 * len(blocks) * count


def test_a_heat_map_shows_what_is_removed():
    """By hand: of 8 heads 0.3 is 2; weights together, (100 + 0.7 · 3000) / 4000."""
    rates = load_script("experiments/rates.py")
    modules = modules_of(["encoder.layers.0.attention", "encoder.layers.1.attention", "encoder.layers.1.ffn"], False)
    config = {
        "encoder.layers.0.attention": 0.3,
        "encoder.layers.0.attention.o": 0.5,
        "encoder.layers.1.ffn.wi": 0.1,
        "encoder.layers.1.ffn.wo": 0.7,
    }
    heads, weights, _ = rates.draw(modules, [config], ["0"]).axes
    assert heads.collections[0].get_array().tolist() == [[25.0, 0.0]]
    attention, forward = (mesh.get_array() for mesh in weights.collections)
    assert attention.tolist() == [[50.0, 0.0]]
    assert forward.tolist() == [[None, pytest.approx(55.0)]]  # there is no such block in layer 0
    assert [text.get_text() for text in weights.texts if not text.get_text().isdecimal()] == [
        "encoder attention",
        "encoder ffn",
    ]


def test_rates_as_a_command(succeeds, call, chain, tmp_path):
    """Oracle: the configurations of the tests' chain; the same again gives the same bytes."""
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    count = len(json.loads((chain / "conf.json").read_text())["configs"])
    assert succeeds("experiments/rates.py", chain / "conf.json", "-o", one)["configurations"] == list(range(count))
    succeeds("experiments/rates.py", chain / "conf.json", "-o", two)
    assert one.read_bytes() == two.read_bytes()
    assert succeeds("experiments/rates.py", chain / "conf.json", "-n", 1, "-o", two)["configurations"] == [1]
    code, _, err = call("experiments/rates.py", chain / "conf.json", "-n", count, "-o", two)
    assert code == 2 and f"has no configuration {count}" in err


# --- curves ----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two configurations, each as baseline and composed, with a metric, records and conf.json, in a folder."""
    monkeypatch.chdir(tmp_path)
    modules = modules_of(T5)
    rates = [
        {"attention": 0.25, "linear": 0.3, "feed_forward": 0},
        {"attention": 0.5, "linear": 0.5, "feed_forward": 0.5},
    ]
    configs = [{name: each[module["kind"]] for name, module in modules.items()} for each in rates]
    model = {"name": "t5", "type": "t5", "fingerprint": "ab" * 32}
    (tmp_path / "conf.json").write_text(
        json.dumps({"version": FORMAT_VERSION, "model": model, "modules": modules, "configs": configs})
    )
    scheme, paths = make_scheme(read_configurations("conf.json")), []
    for n, config in enumerate(scheme.configs):
        for way in ("baseline", "model-finetuned"):
            folder = tmp_path / way / str(n)
            folder.mkdir(parents=True)
            variants = {block: variant for block, variant in config.items() if variant != DENSE}
            write_record(folder, make_record("x", {}, task="translation", original=model, variants=variants))
            rows = [
                f"{e},{'' if e == 0 else 3 - e / 2},{3 - e / 2 + n},{30 * e},{4},{20 + 2 * e}.5,r" for e in range(4)
            ]
            head = "epoch,train_loss,val_loss,train_seconds,val_seconds,bleu,run"
            path = tmp_path / way / f"{n}.csv"
            path.write_text("\n".join([head, *rows, ""]))
            paths.append(str(path.relative_to(tmp_path)))
    return paths


NAMES = [
    "configuration 0: attention 0.25, linear 0.3, feed-forward 0",
    "configuration 1: attention 0.5, linear 0.5, feed-forward 0.5",
]


@pytest.fixture
def drawn(call, monkeypatch):
    """drawn(*arguments): the figure that plot_loss.py would save."""

    def draw(*arguments):
        saved = []
        script = load_script("plot_loss.py")
        monkeypatch.setattr(script, "save_picture", lambda path, figure: saved.append(figure))
        assert script.main(list(map(str, arguments))) == 0
        return saved[0]

    return draw


def names_in(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_are_named_by_their_rates(runs, drawn):
    """Oracle: the rates in conf.json; the record beside the CSV says whose they are, not the file's name."""
    figure = drawn("model-finetuned/0.csv", "model-finetuned/1.csv")
    assert names_in(figure) == [*NAMES, "validation", "training"]
    figure = drawn("baseline/1.csv", "model-finetuned/1.csv")
    assert names_in(figure)[:2] == [f"baseline/1, {NAMES[1]}", f"model-finetuned/1, {NAMES[1]}"]
    figure = drawn("baseline/1.csv", "--labels", "mine")
    assert names_in(figure)[0] == "mine"


def test_panels_are_named_by_their_rates(runs, drawn):
    figure = drawn(*runs, "--panels", 2, "--labels", *["baseline", "composed"] * 2, "--draw", "loss")
    assert [axis.get_title() for axis in figure.axes] == [name.replace(": ", "\n") for name in NAMES]
    assert overlapping(figure) == []


def test_loss_and_metric_over_epochs_and_seconds(runs, drawn):
    """Oracle: the CSV. The metric is drawn without being asked for; seconds are those up to an epoch, from 0."""
    figure = drawn("baseline/0.csv", "--over", "epochs", "seconds")
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == [
        ("epoch", "loss (nats per token)"),
        ("seconds of training and validation", ""),
        ("epoch", "BLEU on validation data"),
        ("seconds of training and validation", ""),
    ]
    curves = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert curves[0][0] == [[0, 3], [1, 2.5], [2, 2], [3, 1.5]]
    assert curves[1][0] == [[0, 3], [34, 2.5], [98, 2], [192, 1.5]]
    assert curves[2] == [[[0, 20.5], [1, 22.5], [2, 24.5], [3, 26.5]]]
    assert curves[3] == [[[0, 20.5], [34, 22.5], [98, 24.5], [192, 26.5]]]
    assert overlapping(figure) == []
    (axis,) = drawn("baseline/0.csv", "--draw", "metric").axes
    assert axis.get_ylabel() == "BLEU on validation data"


@pytest.mark.parametrize("count, epochs", [(1, 2), (12, 30)])
def test_nothing_overlaps_whatever_is_drawn(tmp_path, drawn, count, epochs):
    """Oracle: matplotlib's boxes; epochs are whole, the loss has four ticks."""
    paths = []
    for n in range(count):
        rows = [f"{e},,{2 + n / 8 + 1 / (e + 1)},1,1" for e in range(epochs)]
        path = tmp_path / f"a-rather-long-name-of-a-run-whose-settings-are-all-in-it-{n}.csv"
        path.write_text("\n".join(["epoch,train_loss,val_loss,train_seconds,val_seconds", *rows, ""]))
        paths.append(path)
    figure = drawn(*paths, "--title", "a heading " * 12)
    assert overlapping(figure) == []
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) >= 4
    assert all(tick == round(tick) for tick in axis.get_xticks())
    assert {to_hex(line.get_color()).upper() for line in axis.lines} <= set(OKABE_ITO)


def test_seconds_and_a_metric_that_nobody_knows(tmp_path, call):
    """Oracle: the contract for mistakes."""
    blocks = tmp_path / "s-blocks.csv"
    blocks.write_text("block,variant,epoch,train_loss,val_loss,seconds\na,b,0,,1,0\n")
    for flags, words in ((("--over", "seconds"), "knows no seconds"), (("--draw", "metric"), "no CSV has a column")):
        code, _, err = call("plot_loss.py", blocks, *flags, "-o", tmp_path / "loss.png")
        assert code == 2 and words in err and not (tmp_path / "loss.png").exists()


def test_losses_of_variants_that_lie_far_apart_have_a_logarithmic_axis(tmp_path, drawn):
    """The largest is 100 times the median. --no-log says otherwise."""
    path = tmp_path / "s-blocks.csv"
    rows = [f"b,{n},{e},,{(100 if n == 0 else 1) * (2 - e)},0" for n in range(5) for e in (0, 1)]
    path.write_text("\n".join(["block,variant,epoch,train_loss,val_loss,seconds", *rows, ""]))
    (axis,) = drawn(path).axes
    assert (axis.get_yscale(), axis.get_ylabel()) == ("log", "error of a block's output (NMSE)")
    assert drawn(path, "--no-log").axes[0].get_yscale() == "linear"


# --- size and speed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 12])
def test_quality_against_size_with_long_names(count):
    """Points close together, named at length; five panels stand in two rows. Oracle: matplotlib's boxes."""
    pareto = load_script("experiments/pareto.py")
    points = [("bleu", 80 + n, dict.fromkeys(pareto.AXES, 10000000.0 * (1 + n / 20))) for n in range(count)]
    figure = pareto.draw(points, [f"report-{n}" for n in range(count)], [""] * count, None, list(pareto.AXES)[:5])
    assert overlapping(figure) == []
    assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["million parameters that are not zero", "MB on disk"]
    assert {axis.get_ylabel() for axis in figure.axes} == {"BLEU", ""}
    assert len({round(axis.get_position().y0, 2) for axis in figure.axes}) == 2
