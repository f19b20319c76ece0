"""How pictures look: nothing overlaps, axes have names and enough ticks, colours are told apart by everybody."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from common.evaluation.curves import draw, read_stats
from common.evaluation.pictures import place_labels

# jfly.uni-koeln.de/color
OKABE_ITO = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


def boxes(texts, renderer):
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()]


def overlapping(figure):
    """Pairs of texts of a figure that share some of their area, by matplotlib's own boxes, a pixel of grace."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = []
    for axis in figure.axes:
        ticks = [
            tick.label1
            for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim()))
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


@pytest.mark.parametrize("count, epochs", [(1, 2), (12, 30)])
def test_nothing_overlaps_whatever_is_drawn(tmp_path, count, epochs):
    """Oracle: matplotlib's boxes; epochs are integers, the loss has four ticks."""
    curves, names = [], [f"a-rather-long-name-of-a-run-whose-settings-are-all-in-it-{n}" for n in range(count)]
    for n, name in enumerate(names):
        rows = [f"{e},,{2 + n / 8 + 1 / (e + 1)},1,1,{20 + e}" for e in range(epochs)]
        (tmp_path / name).write_text("\n".join(["epoch,train_loss,val_loss,train_seconds,val_seconds,bleu", *rows, ""]))
        curves.append(read_stats(tmp_path / name))
    figure = draw(curves, names, over=["epochs", "seconds"], title="a heading " * 12)
    assert overlapping(figure) == []
    axis = figure.axes[0]
    low, high = axis.get_ylim()
    assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) >= 4
    assert all(tick == round(tick) for tick in axis.get_xticks())
    assert {to_hex(line.get_color()).upper() for line in axis.lines} <= set(OKABE_ITO)
