"""Tables for people, as lines of text: what evaluations and reports say, and the experiments by the same function."""

import textwrap
from collections.abc import Iterable

WIDTH = 100  # characters of a line
LEAST = 12  # that are left of a first cell
COSTS = {  # of a report's figures: how a column is called, its unit and how many of the figure's make one
    "parameters": ("parameters", "M", 1e6),
    "nonzero_parameters": ("non-zeros", "M", 1e6),
    "multiply_adds": ("multiply-adds", "M", 1e6),
    "bytes_on_disk": ("on disk", "MB", 1e6),
    "bytes_in_memory": ("in memory", "MB", 1e6),
    "seconds_per_batch": ("time a batch", "ms", 1e-3),
    "seconds_per_generated_token": ("time a token", "ms", 1e-3),
    "seconds_per_generated_token_of_32": ("a token of 32", "ms", 1e-3),
}
SHORT = {  # of the same, in a table of many models; of times the ratio alone
    "bytes_on_disk": "MB",
    "parameters": "parameters",
    "seconds_per_batch": "a batch",
    "seconds_per_generated_token": "a token",
    "seconds_per_generated_token_of_32": "of 32",
}


def aligned(lines: Iterable[Iterable[str]]) -> list[str]:
    """Rows of cells as lines of text, their columns below each other; long first cells lose what is in the middle."""
    first, *others = zip(*lines)
    widths = [max(map(len, column)) for column in others]
    room = max(LEAST, WIDTH - sum(2 + width for width in widths))
    head = room // 3
    first = [cell if len(cell) <= room else f"{cell[:head]}…{cell[head + 1 - room :]}" for cell in first]
    columns = zip([max(map(len, first)), *widths], [first, *others])
    return [
        "  ".join(row).rstrip() for row in zip(*([cell.ljust(width) for cell in cells] for width, cells in columns))
    ]


def wrapped(*sentences: str) -> list[str]:
    """Sentences as lines of text, each beginning with a line of its own."""
    return [line for sentence in sentences for line in textwrap.wrap(sentence, WIDTH)]


def score(value: float, interval: tuple[float, float] | None = None) -> str:
    """A score, and its interval if that is known: "26.04 [24.87, 27.20]"."""
    digits = 2 if max(map(abs, [value, *(interval or ())])) > 1 else 4
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def of_models(task, results: list[dict], figures: dict[str, dict]) -> list[str]:
    """Models of a task below each other: quality, the main metric's with its interval; size; and time, as a fraction of
    the original's.

    Args:
        results: as an evaluation prints them.
        figures: {model: figures of its report}, {} where there are no reports.
    """
    metrics = sorted(task.metrics, key=lambda metric: metric != task.metric)
    costs = [figures.get(result["model"]) or unrelated(result) for result in results]
    shown = [name for name in SHORT if any(name in figures for figures in costs)]
    rows = [["model", *metrics, *(SHORT[name] for name in shown)]]
    for result, of_model in zip(results, costs):
        intervals = {task.metric: result.get("intervals", {}).get(task.metric)}  # of the others there is no room
        scores = [score(result[metric], intervals.get(metric)) for metric in metrics]
        rows.append([result["model"], *scores, *(short_cost(name, of_model.get(name)) for name in shown)])
    return aligned(rows)


def unrelated(result):
    """The figures that an evaluation without a report knows."""
    return {name: {"model": result[name], "ratio": None} for name in ("bytes_on_disk", "parameters")}


def short_cost(name, figure):
    """A figure and its ratio, of a time that alone; "-" where it is not known."""
    if figure is None:
        return "-"
    value, ratio = figure["model"] / COSTS[name][2], figure["ratio"]
    digits = 2 - (value >= 10) - (value >= 100)
    cells = [] if name.startswith("seconds") else [f"{value:.{digits}f}" + "M" * (name == "parameters")]
    return " ".join(cells + [ratio_text(ratio)] * (ratio is not None)) or "-"


def ratio_text(ratio):
    return "-" if ratio is None else f"×{ratio:.2f}"


def of_costs(figures: dict[str, dict]) -> list[str]:
    """A report's figures below each other, beside the original's if that is known."""
    rows = [["", "model", "original", "ratio"]]
    for name, (title, unit, size) in COSTS.items():
        if name in figures:
            values = [figures[name][of] for of in ("model", "original")]
            cells = ["-" if value is None else f"{value / size:.4g}" for value in values]
            rows.append([f"{title}, {unit}", *cells, ratio_text(figures[name]["ratio"])])
    return aligned(rows)
