"""RUN/report.html: one file that opens offline, with what the run's own files say and nothing else."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from spunge.files import read_json, write_text
from spunge.report.attacks import Attack, attacks, curve_lines, drawn_stages, panels, recovered_table
from spunge.report.figure import figure, legend, looks
from spunge.report.published import published
from spunge.report.reading import read_scores
from spunge.report.scores import GROUPS, Metric, Scores, Stage
from spunge.report.spillover import spillover
from spunge.report.training import trained
from spunge.report.verdict import basis, verdict
from spunge.report.weights import merge_facts
from spunge.report.wording import MISSING, clean, duration, name, shortened, size


def write_page(run: Path) -> Path:
    """Write RUN/report.html and return its path. Files that are missing leave their section out.

    Raises RecipeError when the folder cannot be written.
    """
    file = run / "report.html"
    write_text(file, page(run))
    return file


def page(run: Path) -> str:
    """The page's HTML. Everything from the run's files is escaped."""
    recipe_text = _read(run / "recipe.yaml")
    recipe = _mapping(_yaml(recipe_text))
    results = _mapping(read_json(run / "results.json"))
    split = _mapping(read_json(run / "split.json"))
    scores = read_scores(results)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_template))
    environment.filters |= {"clean": clean, "name": name, "short": _short, "duration": duration, "size": size}
    return environment.get_template("page.html").render(
        title=_title(recipe, run),
        recipe=clean(recipe_text, keep="\n\t"),
        results=results,
        split=split,
        scores=scores,
        findings=verdict(scores),
        basis=basis(scores),
        published=published(scores),
        charts=[_chart(metric, scores, f"chart-{index}") for index, metric in enumerate(scores.metrics)],
        groups=GROUPS,
        attacks=[_attack(attack, scores, f"audit-{index}") for index, attack in enumerate(attacks(scores))],
        back=dict(zip(("stages", "lines"), recovered_table(scores), strict=True)),
        spillover=spillover(scores),
        evaluations=[row for row in results.get("evaluations") or [] if isinstance(row, Mapping)],
        branches=trained(run, "branches", split, results),
        controls=trained(run, "controls", split, results),
        merge=merge_facts(_mapping(read_json(run / "merge.json"))),
        missing=MISSING,
    )


def _title(recipe: Mapping[str, Any], run: Path) -> dict[str, str]:
    """Model, method and rule in a word each."""
    model, unlearn, merge = (_mapping(recipe.get(key)) for key in ("model", "unlearn", "merge"))
    path = str(model.get("path") or run.name)
    return {
        # A folder's own name tells the model; a Hub id is `owner/name` and stays whole.
        "model": Path(path).name if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path,
        "method": str(unlearn.get("method", "")),
        "rule": str(merge.get("rule", "")),
    }


def _chart(metric: Metric, scores: Scores, identifier: str) -> dict[str, Any]:
    """A metric with its drawing and its table, of the stages that were judged by it."""
    columns = _columns(metric, scores)
    return {
        "metric": metric,
        "svg": Markup(figure(metric, scores, identifier)),  # noqa: S704 - built by ElementTree, which escapes
        "legend": legend(scores, metric),
        "columns": columns,
        "rows": [_line(metric, columns, index) for index in range(len(metric.subjects))],
        "grouped": len({subject.group for subject in metric.subjects}) > 1,
    }


def _attack(attack: Attack, scores: Scores, identifier: str) -> dict[str, Any]:
    """An attack as a curve in small panels, or with a chart and a table for each metric."""
    if attack.points:
        drawn = [Markup(svg) for svg in panels(attack, scores)]  # noqa: S704 - built by ElementTree, which escapes
        at = [f"{point.at:g}" for point in attack.points]
        shapes = {looks(scores)[stage.key].shape for stage in drawn_stages(attack, scores)}
        told = [key for key in legend(scores) if key.shape in shapes]
        return {"name": attack.name, "panels": drawn, "legend": told, "at": at, "lines": curve_lines(attack, scores)}
    charts = [_chart(metric, scores, f"{identifier}-{index}") for index, metric in enumerate(attack.metrics)]
    return {"name": attack.name, "charts": charts}


def _template(file: str) -> str:
    return resources.files("spunge.report").joinpath(file).read_text("utf-8")


def _columns(metric: Metric, scores: Scores) -> list[Stage]:
    """What decides comes first, so that it is seen without scrolling past a dozen branches."""
    order = ("base", "merged", "control", "branch", "stage")
    return sorted(metric.judged(scores.stages), key=lambda stage: order.index(stage.kind))


def _line(metric: Metric, columns: list[Stage], index: int) -> dict[str, Any]:
    """A row of the full table: a subject's cells in the order of the columns."""
    subject = metric.subjects[index]
    cells = [(stage, metric.cell(stage.key, subject.name)) for stage in columns]
    change = metric.change("merged", "base", subject.name)
    counts = {cell.n for _, cell in cells if cell is not None and cell.n is not None}
    return {
        "subject": subject,
        "first": index == 0 or metric.subjects[index - 1].group != subject.group,
        "cells": [
            {
                "value": MISSING if cell is None else metric.shown(cell.value),
                "interval": "" if cell is None else metric.interval(cell),
                "spread": "" if cell is None else metric.spread(cell),
                "below": cell is not None and cell.below_chance,
                "kind": "own" if stage.key == subject.branch else stage.kind,
                "change": metric.moved(change) or MISSING,
                "change_interval": metric.moved_interval(change),
                "certain": change is not None and change.way != 0,
            }
            for stage, cell in cells
        ],
        "n": "/".join(map(str, sorted(counts))) or MISSING,
    }


def _short(value: object, columns: int) -> str:
    return shortened(name(value), columns)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
