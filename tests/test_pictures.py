"""How pictures look: nothing overlaps, axes have names and enough ticks, colours are told apart by everybody."""

import itertools
import xml.etree.ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from common.evaluation.curves import draw, read_stats
from experiments.drawing import HEIGHT, LEFT, WIDTH, Point, alone, frontier, place, ticks
from experiments.drawing import draw as draw_points

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


def test_numbers_cover_neither_points_nor_lines_nor_each_other():
    """Points in pairs closer than a number is wide, and at the edges. Oracle: rectangles, by hand."""
    points = [(60, 60), (64, 62), (200, 150), (208, 150), (420, 260), (420, 255), (60, 260), (200, 100)]
    lines = [[(60, 60), (200, 150), (420, 260)]]
    middles = place(points, [str(n) for n in range(100, 108)], lines)
    texts = [(x - 10, y - 5, x + 10, y + 5) for x, y in middles]
    for (left, top, right, bottom), other in itertools.combinations(texts, 2):
        assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    along = [(200 + 220 * n / 100, 150 + 110 * n / 100) for n in range(101)]
    for left, top, right, bottom in texts:
        assert not any(left < x < right and top < y < bottom for x, y in points + along)
        assert left > LEFT and right < WIDTH and bottom < HEIGHT


@pytest.mark.parametrize(
    "low, high, expected", [(0, 60, [0, 10, 20, 30, 40, 50, 60]), (0.49, 1.02, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])]
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == expected


def test_a_picture_of_equal_points_is_drawn():
    """One point alone has an axis around it, and its title is text."""
    svg = draw_points([Point(1, 1, "composed", title='<&">')], "x", "y", legend={"composed": "a & b"})
    root = xml.etree.ElementTree.fromstring(svg)
    assert [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")] == ['<&">']
    assert xml.etree.ElementTree.fromstring(alone(svg)).tag == root.tag


@pytest.mark.parametrize(
    "points, line",
    [
        ([], []),
        ([(3, 5.0)], [(3, 5.0)]),
        ([(4, 33), (1, 20), (3, 25), (2, 30)], [(1, 20), (2, 30), (4, 33)]),  # (2, 30) beats (3, 25) in both
        ([(1, 30), (2, 30), (2, 20)], [(1, 30)]),  # no better at a higher cost
        ([(1, 10), (1, 12), (1, 11)], [(1, 12)]),  # the best at the same cost
        ([(2, 7), (2, 7)], [(2, 7)]),  # twins are one
        ([(1, 3), (2, 2), (3, 1)], [(1, 3)]),
        ([(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2), (3, 3)]),
    ],
)
def test_the_frontier_by_hand(points, line):
    assert frontier(points) == line


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
