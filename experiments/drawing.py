"""Points as SVG: in the page of an experiment, where each leads to its row, or as a picture that stands alone.

Colours are those of `STYLE`, light or dark as the reader's system is. Every series has a shape of its own besides.
"""

import math
from typing import NamedTuple

from markupsafe import escape

from common.evaluation.pictures import LOOKS

WIDTH, HEIGHT, TOP, RIGHT, BOTTOM, LEFT = 440, 310, 26, 14, 40, 48  # of the frame, in the picture's units
FONT, LINE, WIDE = 12, 17, 6.7  # of a text: its size, a line's height, a character's width
MOST_LABELS = 24  # more points than that have no numbers beside them
SHAPES = {  # by matplotlib's names
    "o": '<circle r="4.5"/>',
    "s": '<rect x="-4" y="-4" width="8" height="8"/>',
    "*": '<path d="M0-7 1.7-2.3 6.7-2.2 2.7.9 4.1 5.7 0 2.9-4.1 5.7-2.7.9-6.7-2.2-1.7-2.3Z"/>',
    "^": '<path d="M0-5 4.5 4-4.5 4Z"/>',
}
HOLLOW = "s^"  # told apart without colour, too
DARK = {"#0072B2": "#56B4E9", "#D55E00": "#E69F00", "#009E73": "#2BD6A3", "#000000": "#FFFFFF"}  # on a dark page


def _colours(choose):
    return " ".join(f".{series} {{ --series: {choose(colour)}; }}" for series, (colour, _) in LOOKS.items())


STYLE = f"""
svg {{ color: #1a1a1a; --page: #fff; font: {FONT}px system-ui, sans-serif; }}
{_colours(lambda colour: colour)}
@media screen and (prefers-color-scheme: dark) {{
svg {{ color: #e8e8e8; --page: #16181b; }}
{_colours(lambda colour: DARK.get(colour, colour))}
}}
svg text {{ fill: currentColor; }}
svg .frame {{ fill: none; stroke: currentColor; stroke-opacity: .6; }}
svg .grid {{ stroke: currentColor; stroke-opacity: .12; }}
svg .band {{ fill: currentColor; fill-opacity: .09; }}
svg .mark {{ fill: var(--series); stroke: var(--series); stroke-width: 1.5; }}
{", ".join(f"svg .mark.{series}" for series, (_, shape) in LOOKS.items() if shape in HOLLOW)} {{ fill: var(--page); }}
svg .line {{ fill: none; stroke: var(--series, currentColor); stroke-width: 1.3; }}
svg .interval {{ stroke-opacity: .45; }}
svg .dashed {{ stroke-dasharray: 6 3; }}
svg .broken {{ stroke-dasharray: 12 3; }}
svg .dotted {{ stroke-dasharray: 1.5 3; }}
""".strip()


class Point(NamedTuple):
    """A model: `interval` of its y, (low, high); `number` stands beside it, `title` is told of it, `target` its row."""

    x: float
    y: float
    series: str
    interval: list | None = None
    number: str = ""
    title: str = ""
    target: str = ""


class Line(NamedTuple):
    """A line through some (x, y), an x of None being the edge of the frame; `look`: classes of `STYLE`."""

    ends: list
    look: str
    legend: str = ""


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other):
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def frontier(points):
    """Those (cost, quality) that no other point beats, by rising cost: none costs less and is as good."""
    best, line = float("-inf"), []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if quality > best:
            best = quality
            line.append((cost, quality))
    return line


def ticks(low, high, most=7):
    """Round numbers between two others, at most as many."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * (1 - 1e-9))
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def limits(values):
    """The ends of an axis, a little beyond its values."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def draw(points, x_title, y_title, *, legend, lines=(), band=None, numbers="", from_zero=False):
    """A picture of points, as SVG.

    Args:
        legend: {series: what it is}, of those that are drawn.
        lines: each with its own row in the legend, if it has a text for it.
        band: (left, right, text of the legend) of x, shaded.
        numbers: what the numbers beside points mean.
        from_zero: whether the axis of x begins there.
    """
    xs = [point.x for point in points] + [x for line in lines for x, _ in line.ends if x is not None]
    ys = [y for point in points for y in (point.y, *(point.interval or ()))]
    ys += [y for line in lines for _, y in line.ends]
    (left, right), (low, high) = limits(xs), limits(ys)
    left = 0 if from_zero else left

    def across(x):
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def down(y):
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    shown = []
    if band:
        start, end = (across(x) for x in band[:2])
        size = f'width="{end - start:.1f}" height="{HEIGHT - BOTTOM - TOP}"'
        shown.append(f'<rect class="band" x="{start:.1f}" y="{TOP}" {size}/>')
    for x in ticks(left, right):
        shown.append(_path([(across(x), TOP), (across(x), HEIGHT - BOTTOM)], "grid"))
        shown.append(_text(across(x), HEIGHT - BOTTOM + 15, f"{x:g}", "middle"))
    for y in ticks(low, high):
        shown.append(_path([(LEFT, down(y)), (WIDTH - RIGHT, down(y))], "grid"))
        shown.append(_text(LEFT - 6, down(y) + 4, f"{y:g}", "end"))
    shown.append(_path([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], "frame"))
    shown.append(_text(4, 14, y_title))
    shown.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle"))

    drawn = []  # every line, as it lies in the picture
    for line in lines:
        edges = [LEFT, *[WIDTH - RIGHT] * (len(line.ends) - 1)]
        ends = [(edge if x is None else across(x), down(y)) for (x, y), edge in zip(line.ends, edges)]
        drawn.append(ends)
        shown.append(_path(ends, f"line {line.look}"))
    for point in points:
        if point.interval:
            ends = [(across(point.x), down(y)) for y in point.interval]
            drawn.append(ends)
            shown.append(_path(ends, f"line interval {point.series}"))
    centres = [(across(point.x), down(point.y)) for point in points]
    for point, (x, y) in zip(points, centres):
        mark = f'<g class="mark {point.series}" transform="translate({x:.1f} {y:.1f})">{shape_of(point.series)}</g>'
        title = f"<title>{escape(point.title)}</title>" if point.title else ""
        link = f'<a href="#{escape(point.target)}" tabindex="-1" data-row="{escape(point.target)}">{title}{mark}</a>'
        shown.append(link if point.target else f"<g>{title}{mark}</g>")
    numbered = [point.number for point in points]
    if sum(map(bool, numbered)) <= MOST_LABELS:
        for number, (x, y) in zip(numbered, place(centres, numbered, drawn)):
            shown += [_text(x, y + 4, number, "middle")] if number else []
    else:
        numbers = ""
    rows = [(f'<g class="mark {series}">{shape_of(series)}</g>', text) for series, text in legend.items()]
    if any(point.interval for point in points):
        series = next(point.series for point in points if point.interval)
        rows.append((_path([(0, -6), (0, 6)], f"line interval {series}"), "95 % interval"))
    rows += [(_path([(-12, 0), (12, 0)], f"line {line.look}"), line.legend) for line in lines if line.legend]
    rows += [('<rect class="band" x="-12" y="-5" width="24" height="10"/>', band[2])] if band else []
    rows += [(_text(0, 4, "0", "middle"), numbers)] if numbers else []
    for n, (sign, text) in enumerate(rows):
        y = HEIGHT + LINE * n + LINE / 2
        shown.append(f'<g transform="translate({LEFT + 12} {y})">{sign}</g>' + _text(LEFT + 34, y + 4, text))
    height = HEIGHT + LINE * len(rows) + 4
    label = escape(f"{y_title} over {x_title}: {len(points)} points, whose figures are in the table")
    body = "\n".join(shown)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">\n{body}\n</svg>\n'


def alone(svg):
    """A picture with the colours that a page would give it, to be a file."""
    head, rest = svg.split("\n", 1)
    return f'{head}\n<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="var(--page)"/>\n{rest}'


def place(centres, texts, lines):
    """The middle of each text, beside its point, clear of points, lines and other texts wherever that is possible."""
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    taken += [Box(x - 1, y - 1, x + 1, y + 1) for line in lines for x, y in _along(line)]
    frame, found = Box(LEFT, TOP - 6, WIDTH, HEIGHT - BOTTOM), []
    for (x, y), text in zip(centres, texts):
        half = WIDE * len(text) / 2
        best = None
        for far in (0, 5, 12, 22, 34):
            for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                middle = x + right * (half + 7 + far), y - up * (12 + far)
                box = Box(middle[0] - half, middle[1] - 5, middle[0] + half, middle[1] + 5)
                inside = (
                    box.left > frame.left
                    and box.right < frame.right
                    and box.top > frame.top
                    and box.bottom < frame.bottom
                )
                covers = sum(map(box.meets, taken)) + 1000 * (not inside)
                if best is None or covers < best[0]:
                    best = covers, middle, box
            if best[0] == 0:
                break
        found.append(best[1])
        if text:
            taken.append(best[2])
    return found


def _along(line):
    """Points of a line, close to each other."""
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        steps = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / 3))
        yield from ((x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps) for n in range(steps + 1))


def _path(ends, look):
    return f'<path class="{look}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in ends)}"/>'


def _text(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def shape_of(series):
    return SHAPES[LOOKS[series][1]]
