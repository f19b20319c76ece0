#!/usr/bin/env python3
"""The table and the page of an experiment: table.json, table.txt and report.html in its folder.

The folder is one that composability.sh, search.sh or explore.sh left. What these have measured is gathered into
table.json, from which both the text and the page are made. The page is one file that asks nothing of a network and
reads without JavaScript, which adds sorting, filtering and what is told of a point.

The README's picture:
report.py experiments/demo.json -o /tmp/report.html --picture experiments/demo.svg
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `common` lies beside this folder

from common.cli.flags import Parser
from common.cli.launch import launch
from common.evaluation.pictures import metric_name
from common.runtime.errors import UserError
from common.runtime.files import check_writable, damage_in, write_bytes
from common.runtime.records import read_json, write_json

HERE = Path(__file__).resolve().parent
MARK = "composable-pruning report.py"  # in every page, so that we know our own again
AGAINST = ("kept", "nonzero_parameters", "multiply_adds", "seconds_per_batch", "seconds_per_generated_token")
VERSION = 1  # of table.json
FEWEST = 3  # points of a picture


def build_parser():
    parser = Parser(__doc__, usage="%(prog)s FOLDER [flags]", example="report.py results/t5-demo")
    parser.add_argument("folder", metavar="FOLDER", help="what an experiment left, or the table.json of one")
    parser.add_argument("-o", "--output", help="the page; without it report.html in FOLDER")
    parser.add_argument("--criterion", help="of composability.sh, where a folder has libraries by several")
    parser.add_argument("--picture", metavar="FILE", help="also write the page's first picture, as SVG")
    return parser


def kinds():
    """The modules that know an experiment each, by its name."""
    from experiments import composability_report, explore_report, search_report

    return {"composability": composability_report, "search": search_report, "explore": explore_report}


def run(args):
    folder = Path(args.folder)
    output = Path(args.output or (folder if folder.is_dir() else folder.parent) / "report.html")
    check_page(output)
    summary = summarize(folder, args.criterion)
    kind = kinds()[summary["experiment"]]
    page = kind.page(summary)
    write_bytes(output, as_html(summary, page).encode())
    result = {"output": str(output), "experiment": summary["experiment"], "models": len(page["models"])}
    if folder.is_dir():
        write_json(folder / "table.json", summary)
        write_bytes(folder / "table.txt", f"{kind.as_text(summary)}\n".encode())
    if args.picture:
        from experiments.drawing import alone

        check_writable(args.picture, is_file=True)
        write_bytes(args.picture, alone(page["pictures"][0][1]).encode())
    return result


def summarize(folder, criterion=None):
    """The figures of an experiment's folder, or those that lie in a table.json.

    Raises:
        UserError: it is neither.
    """
    known = kinds()
    if folder.is_dir():
        for kind in known.values():
            if kind.is_here(folder):
                return {"version": VERSION, **kind.summarize(folder, *[criterion] * bool(criterion))}
        raise UserError(
            f"{folder}: holds no finished experiment (its evaluations' reports, search.json or explored.json); run "
            f"{', '.join(f'experiments/{name}.sh' for name in known)} into it"
        )
    summary = read_json(folder, "experiments/report.py")
    if summary.get("experiment") not in known or summary.get("version") != VERSION:
        raise UserError(f"{folder}: is no table.json of this version; give the folder of the experiment")
    return summary


def check_page(path):
    """Make sure, before any work, that a page can be written, and that no other one is lost by it."""
    check_writable(path, is_file=True)
    if path.exists() and not damage_in(path) and MARK.encode() not in path.read_bytes():
        raise UserError(f"{path}: exists already and is no page of this suite; choose another output")


# --- the page ------------------------------------------------------------------------------------------------------


def as_html(summary, page):
    """The page, one file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from experiments.drawing import STYLE, shape_of
    from experiments.results import row_of

    models = page["models"]
    if "original" in page:
        models = [as_model(page["original"], models), *models]
    columns = columns_of(models, page["titles"], summary["metric"])
    rows = [
        {
            "id": row_of(model),
            "series": model["series"],
            "name": model["name"],
            "rates": model.get("rates", ""),
            "cells": [cell(model, key, digits) for key, _, digits in columns],
        }
        for model in models
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        mark=MARK,
        style=STYLE,
        shapes={row["series"]: shape_of(row["series"]) for row in rows},
        page=page,
        summary=summary,
        metric=metric_name(summary["metric"]),
        columns=[title for _, title, _ in columns],
        rows=rows,
        has_rates=any(row["rates"] for row in rows),
        pictures=[*page["pictures"], *scatters(models, page, summary)],
        modules=rates_by_module(summary["rates"]),
    )


def as_model(original, models):
    """The original as a row beside the others: its figures are those that it was compared by."""
    figures = next((model["figures"] for model in models if model.get("figures")), {})
    figures = {name: {"model": each["original"], "ratio": 1.0} for name, each in figures.items() if each["original"]}
    return {"series": "original", "name": "", "figures": figures, **original}


def columns_of(models, titles, metric):
    """[(key, title, digits)] of what any of the models has; digits None: a cost."""
    from common.evaluation.tables import COSTS
    from experiments.results import METRICS

    digits = METRICS[metric]
    columns = [("kept", "kept", 3), ("before", "as pruned", digits), ("quality", metric_name(metric), digits)]
    columns += [("test", "on the test split", digits), ("loss", "validation loss", 4)]
    columns += [("finetuned", "fine-tuned", digits), ("finetuned_loss", "loss fine-tuned", 4)]
    columns += [(name, f"{title}, {unit}", None) for name, (title, unit, _) in COSTS.items()]
    columns += [("seconds", "seconds", 1)]
    return [
        (key, titles.get(key, title), digits)
        for key, title, digits in columns
        if any(value_of(model, key, digits) is not None for model in models)
    ]


def value_of(model, key, digits):
    return model.get("figures", {}).get(key, {}).get("model") if digits is None else model.get(key)


def cell(model, key, digits):
    """{"value": the number, for sorting; "text"; "small": what stands behind it}."""
    from common.evaluation.tables import COSTS

    value = value_of(model, key, digits)
    if value is None:
        return {"value": "", "text": "–", "small": ""}
    if digits is None:
        ratio, share = model["figures"][key]["ratio"], value / COSTS[key][2]
        return {"value": value, "text": f"{share:.3g}", "small": "" if ratio is None else f"×{ratio:.2f}"}
    interval = model.get({"quality": "interval"}.get(key, f"{key}_interval"))
    small = f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else ""
    return {"value": value, "text": f"{value:.{digits}f}", "small": small}


def scatters(models, page, summary):
    """[(title, SVG)]: quality against what is kept and against each cost, with the line of those that none beats."""
    from common.evaluation.tables import COSTS
    from experiments.drawing import Line, Point, draw, frontier
    from experiments.results import quality_text, row_of

    found, measured = [], [model for model in models if model.get("quality") is not None]
    quality = page["titles"].get("quality", f"{metric_name(summary['metric'])} on the test split")
    levels = [Line([(None, y), (None, y)], "dotted", text) for text, y in page.get("levels", {}).items()]
    for cost in AGAINST:
        name = page["titles"].get("kept") if cost == "kept" else f"{COSTS[cost][0]}, relative to the original"
        points = []
        for model in measured:
            x, interval = relative(model, cost), model.get("interval")
            if x is not None:
                title = f"{row_of(model)}: {quality_text(summary, model['quality'], interval)}, {name} {x:.3f}"
                text = ". ".join(filter(None, [title, model.get("rates")]))
                points.append(Point(x, model["quality"], model["series"], interval, model["name"], text, row_of(model)))
        if len(points) < FEWEST:
            continue
        legend = page["series"] | {"original": "the original"}
        legend = {series: legend[series] for series in legend if any(point.series == series for point in points)}
        lines = []
        for series in filter(page["series"].get, legend):
            best = frontier([point[:2] for point in points if point.series == series])
            look = f"{series} {'broken' if lines else 'dashed'}"
            lines.append(Line(best, look, f"{series}: no other is both cheaper and better"))
        svg = draw(points, name, quality, legend=legend, lines=lines + levels, numbers="number of the configuration")
        found.append((f"Quality and {name.partition(',')[0]}", svg))
    return found


def relative(model, cost):
    """A cost of a model as a fraction of the original's, or None."""
    return model.get("kept") if cost == "kept" else model.get("figures", {}).get(cost, {}).get("ratio")


def rates_by_module(rates):
    """What `results.rates_in` gives, or {} where each kind has one rate in all modules of a configuration."""
    from experiments.results import uniform_rates

    labels = next(iter(rates.values()))["rates"]
    return {} if all(uniform_rates(rates, label) for label in labels) else rates


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
