"""plot_loss.py: what it draws, checked on matplotlib's own objects, and which files it writes or leaves alone."""

import re
import statistics
import xml.etree.ElementTree

import matplotlib
import pytest
from helpers import fails, run
from matplotlib.figure import Figure
from PIL import Image

from common.evaluation.curves import draw, read_stats
from common.evaluation.pictures import LOOKS

RUN = [(0, "", 0.9), (1, 0.7, 0.5), (2, 0.4, 0.6)]  # epoch, training loss, validation loss
# Variants of two blocks that share a name; the second stopped after epoch 1. The losses are exact in binary.
BLOCKS = {
    ("a", "v-1"): [0.5, 0.25, 0.125],
    ("b", "v-1"): [1.0, 0.5],
    ("b", "v-2"): [0.75, 0.625, 0.375],
    ("c", "7"): [2.0, 1.5, 1.75],
}


def write_run(path, rows=RUN):
    path.parent.mkdir(exist_ok=True)
    lines = [f"{epoch},{train},{val},0.0,0.0" for epoch, train, val in rows]
    path.write_text("\n".join(["epoch,train_loss,val_loss,train_seconds,val_seconds", *lines, ""]))
    return path


def write_blocks(path):
    lines = [
        f"{block},{variant},{epoch},,{loss},0.0"
        for (block, variant), losses in BLOCKS.items()
        for epoch, loss in enumerate(losses)
    ]
    path.write_text("\n".join(["block,variant,epoch,train_loss,val_loss,seconds", *lines, ""]))
    return path


def drawn(axis):
    """The lines of a panel that have points, in order, without those that are there for the legend."""
    return [line for line in axis.lines if len(line.get_xdata())]


def points(line):
    return list(zip(line.get_xdata().tolist(), line.get_ydata().tolist()))


def legend(axis):
    return [text.get_text() for text in axis.figure.legends[0].get_texts()]


def median_of_blocks(epoch):
    """A variant that has stopped counts with its last loss."""
    return statistics.median(losses[min(epoch, len(losses) - 1)] for losses in BLOCKS.values())


# --- without arguments -----------------------------------------------------------------------------------------


def test_takes_what_the_default_flow_leaves(here):
    """Oracle: the order by hand. Numbers count as numbers, and the stats of blocks beside a model are no model's."""
    write_run(here / "other.csv")
    err = fails("plot_loss.py")
    assert "block-level_finetuning.py" in err and "model-level_finetuning.py" in err
    best = {"modules-finetuned": 0.25, "model-finetuned/2": 0.75, "model-finetuned/10": 0.5, "model-finetuned/x": 1.0}
    for name, loss in best.items():
        write_run(here / f"{name}.csv", [(0, "", 2.0), (1, 1.0, loss)])
    write_blocks(here / "model-finetuned" / "2-blocks.csv")
    result = run("plot_loss.py")
    best["x"] = best.pop("model-finetuned/x")  # neither a number nor there twice: the bare name is clear enough
    assert result == {"output": "loss.png", "best_val_loss": best}
    assert list(result["best_val_loss"]) == list(best)


# --- what is drawn ---------------------------------------------------------------------------------------------


def test_curves_of_a_run(tmp_path):
    """Oracle: the rows of the CSV. The training loss is dotted, in the colour of the validation loss."""
    (axis,) = draw([read_stats(write_run(tmp_path / "run.csv"))], ["run"]).axes
    validation, training = drawn(axis)
    assert points(validation) == [(epoch, val) for epoch, _, val in RUN]
    assert points(training)[1:] == [(epoch, train) for epoch, train, _ in RUN[1:]]
    assert (validation.get_linestyle(), training.get_linestyle()) == ("-", ":")
    assert validation.get_color() == training.get_color()
    assert legend(axis) == ["run", "validation", "training"]


def test_curves_of_variants(tmp_path):
    """Oracles: the rows of the CSV for each variant, and python's statistics.median."""
    (axis,) = draw([read_stats(write_blocks(tmp_path / "s-blocks.csv"))], ["library"]).axes
    *variants, median = drawn(axis)
    assert [points(line) for line in variants] == [list(enumerate(losses)) for losses in BLOCKS.values()]
    assert points(median) == [(epoch, median_of_blocks(epoch)) for epoch in range(3)]
    assert median.get_marker() == "o" and {line.get_marker() for line in variants} == {"None"}
    assert max(line.get_linewidth() for line in variants) < 1 < median.get_linewidth()
    assert all(line.get_alpha() < 0.5 and line.get_zorder() < median.get_zorder() for line in variants)
    assert {line.get_color() for line in drawn(axis)} == {median.get_color()}
    assert legend(axis) == ["library (median of 4)", "validation", "one variant"]


def test_errors_and_losses_have_axes_of_their_own(tmp_path):
    """Oracle: statistics.median. The mean of blocks that were tuned apart is an error, too: the stats of blocks beside
    it have rows of its run, and those of composed models have none."""
    stats = write_blocks(tmp_path / "s-blocks.csv"), write_run(tmp_path / "run.csv")
    for name in ("apart", "apart-blocks", "joint", "joint-blocks", "joint-compositions"):
        columns = {"blocks": "block,variant,", "compositions": "composition,"}.get(name.partition("-")[2], "")
        (tmp_path / f"{name}.csv").write_text(
            f"{columns}epoch,train_loss,val_loss,run\n{'a,' * columns.count(',')}0,,3,r\n"
        )
    paths = [*stats, tmp_path / "apart.csv", tmp_path / "joint.csv"]
    result = run(f"plot_loss.py {' '.join(map(str, paths))} -o {tmp_path}/loss.png")
    assert result["best_val_loss"] == {"run": 0.5, "joint": 3.0}
    assert result["best_error"] == {"s-blocks": min(map(median_of_blocks, range(3))), "apart": 3.0}
    losses, errors = draw([read_stats(path) for path in paths], ["baseline-0", "composed", "c", "d"]).axes
    assert (losses.get_ylabel(), errors.get_ylabel()) == ("loss", "error of a block's output (NMSE)")
    assert [points(line)[0] for line in drawn(losses)[::2]] == [(0, 0.9), (0, 3)]  # each is followed by its training
    assert [line.get_color() for line in drawn(losses)[:1]] == [LOOKS["composed"][0]]
    assert drawn(errors)[-3].get_color() == LOOKS["baseline"][0]


def test_loss_and_metric_over_epochs_and_seconds(tmp_path):
    """Oracle: the CSV's last run. The metric is drawn where there is one; seconds are those up to an epoch, from 0."""
    rows = [f"{e},,{3 - e / 2},{30 * e},4,{20 + 2 * e}.5,r" for e in range(4)]
    head = "epoch,train_loss,val_loss,train_seconds,val_seconds,bleu,run"
    (tmp_path / "run.csv").write_text("\n".join([head, "0,,9,1,1,1,before", *rows, ""]))
    figure = draw([read_stats(tmp_path / "run.csv")], ["run"], over=["epochs", "seconds"])
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == [
        ("epoch", "loss"),
        ("seconds of training and validation", ""),
        ("epoch", "BLEU on validation data"),
        ("seconds of training and validation", ""),
    ]
    curves = [points(axis.lines[0]) for axis in figure.axes]
    assert curves[0] == [(0, 3), (1, 2.5), (2, 2), (3, 1.5)]
    assert curves[1] == [(0, 3), (34, 2.5), (98, 2), (192, 1.5)]
    assert curves[2] == [(0, 20.5), (1, 22.5), (2, 24.5), (3, 26.5)]
    assert curves[3] == [(0, 20.5), (34, 22.5), (98, 24.5), (192, 26.5)]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\x89PNG\r\n\x1a\n\xff",
        b"epoch,train_loss,val_loss\n1,high,low\n",
        b"epoch,train_loss,val_loss\n",
        b"epoch,train_loss,val_loss\n0,,\n",
        b"epoch,train_loss,val_loss\n0,1,1\n0,1,1\n",
    ],
)
def test_what_is_no_stats_csv_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_bytes(content)
    err = fails(f"plot_loss.py {write_run(tmp_path / 'run.csv')} {path} -o {tmp_path}/loss.png")
    assert str(path) in err and ("no such file" if content is None else "is no stats CSV") in err


# --- the file --------------------------------------------------------------------------------------------------


def mark_in(path):
    """The program that a picture says it was made by, by other readers than the script."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return image.text["Software"]
    if path.suffix == ".pdf":
        return re.search(rb"/Creator \((.*?)\)", path.read_bytes())[1].decode()
    titles = xml.etree.ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}title")
    return "".join(title.text for title in titles)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_input_gives_equal_bytes(tmp_path, suffix):
    """Oracle: a second run; the file names neither a date nor a version, which would differ elsewhere."""
    path, blocks = write_run(tmp_path / "run.csv"), write_blocks(tmp_path / "s-blocks.csv")
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    for output in (one, two):
        run(f"plot_loss.py {path} {blocks} -o {output}")
    content, before = one.read_bytes(), one.stat()
    assert content == two.read_bytes()
    assert not any(word in content for word in (matplotlib.__version__.encode(), b"CreationDate", b"dc:date"))
    assert mark_in(one) == "composable-pruning plot_loss.py"
    run(f"plot_loss.py {path} {blocks} -o {one} --overwrite")
    assert one.stat().st_ino == before.st_ino  # an atomic write would give the file another inode


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture_of_somebody_else_is_never_replaced(tmp_path, suffix):
    """Oracle: the foreign bytes, drawn by matplotlib too."""
    path, output = write_run(tmp_path / "run.csv"), tmp_path / f"loss.{suffix}"
    figure = Figure()
    figure.subplots().plot([1, 2])
    figure.savefig(output)
    foreign = output.read_bytes()
    err = fails(f"plot_loss.py {path} -o {output} --overwrite")
    assert f"{output}: exists already and is no picture of this suite" in err and output.read_bytes() == foreign
