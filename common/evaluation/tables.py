"""Tables for people, as lines of text: what evaluations and reports say, and the experiments by the same function."""

from collections.abc import Iterable

WIDTH = 100  # characters of a line
LEAST = 12  # that are left of a first cell
COSTS = {  # of a report's figures: how a column is called, its unit and how many of the figure's make one
    "bytes_on_disk": ("bytes on disk", "MB", 1e6),
    "parameters": ("parameters", "M", 1e6),
    "nonzero_parameters": ("non-zeros", "M", 1e6),
    "multiply_adds": ("multiply-adds", "M", 1e6),
    "bytes_in_memory": ("in memory", "MB", 1e6),
    "seconds_per_batch": ("seconds a batch", "ms", 1e-3),
    "seconds_per_generated_token": ("a generated token", "ms", 1e-3),
    "seconds_per_generated_token_of_32": ("a token, 32 texts at once", "ms", 1e-3),
}
SHORT = {  # of the same, in a table of many models: the title, and whether the ratio alone is shown
    "bytes_on_disk": ("MB", False),
    "parameters": ("M parameters", False),
    "seconds_per_batch": ("a batch", True),
    "seconds_per_generated_token": ("a token", True),
    "seconds_per_generated_token_of_32": ("a token of 32", True),
}


def aligned(lines: Iterable[Iterable[str]]) -> list[str]:
    """Rows of cells as lines of text, their columns below each other; long first cells lose their beginning."""
    first, *others = zip(*lines)
    widths = [max(map(len, column)) for column in others]
    room = max(LEAST, WIDTH - sum(2 + width for width in widths))
    first = [cell if len(cell) <= room else f"…{cell[1 - room :]}" for cell in first]
    columns = zip([max(map(len, first)), *widths], [first, *others])
    return [
        "  ".join(row).rstrip() for row in zip(*([cell.ljust(width) for cell in cells] for width, cells in columns))
    ]


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
    rows = [["model", *metrics, *(SHORT[name][0] for name in shown)]]
    for result, of_model in zip(results, costs):
        intervals = {task.metric: result.get("intervals", {}).get(task.metric)}  # of the others there is no room
        scores = [score(result[metric], intervals.get(metric)) for metric in metrics]
        rows.append([result["model"], *scores, *(short_cost(name, of_model.get(name)) for name in shown)])
    return aligned(rows)


def unrelated(result):
    """The figures that an evaluation without a report knows."""
    return {name: {"model": result[name], "ratio": None} for name in ("bytes_on_disk", "parameters")}


def short_cost(name, figure):
    """A figure and its ratio, or that alone."""
    value, ratio = (figure["model"], figure["ratio"]) if figure else (None, None)
    relative = "-" if ratio is None else f"×{ratio:.2f}"
    if SHORT[name][1]:
        return relative
    return "-" if value is None else f"{value / COSTS[name][2]:.2f}" + (f" {relative}" if ratio is not None else "")


def of_costs(figures: dict[str, dict]) -> list[str]:
    """A report's figures below each other, beside the original's if that is known."""
    rows = [["", "model", "original", "ratio"]]
    for name, (title, unit, size) in COSTS.items():
        if name in figures:
            values = [figures[name][of] for of in ("model", "original")]
            ratio = figures[name]["ratio"]
            cells = ["-" if value is None else f"{value / size:.4g}" for value in values]
            rows.append([f"{title}, {unit}", *cells, "-" if ratio is None else f"×{ratio:.2f}"])
    return aligned(rows)
