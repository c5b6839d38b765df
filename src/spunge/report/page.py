"""RUN/report.html: one file that opens offline, with what the run's own files say and nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from spunge.errors import printable, redacted
from spunge.files import write_text
from spunge.recipe.spelling import read_yaml
from spunge.report.attacks import Family, curve_lines, drawn_models, families, panels, recovered_table
from spunge.report.completions import completions, writes
from spunge.report.figure import figure, legend, looks
from spunge.report.headline import headline
from spunge.report.heat import heat
from spunge.report.losses import losses
from spunge.report.making import making
from spunge.report.published import published
from spunge.report.radar import radars
from spunge.report.reading import shown, split_facts
from spunge.report.scores import GROUPS, Metric, Scores, arranged
from spunge.report.spillover import spillover
from spunge.report.tradeoff import trade_off
from spunge.report.training import taught, trained
from spunge.report.verdict import basis, verdict
from spunge.report.watching import curves as watched
from spunge.report.weights import merge_facts
from spunge.report.wording import MISSING, duration, name, shortened, size
from spunge.results import FILE, Model, Results, read_results

PAGE = "report.html"
LONGEST = 3_000_000  # bytes
FILES = ("results.json", "recipe.yaml", "split.json", "merge.json", "merged")  # that a reader may want beside the page
GLOSSARY = (  # the kind of models that a word is needed for, the word, what it means
    ("base", "base", "The model before anything was unlearned."),
    ("branch", "branch", "What unlearning one part alone made of the base. Branches know nothing of each other."),
    (
        "merged",
        "merged",
        "The branches' changes put together by the merge rule and laid over the base: the model that the run is for.",
    ),
    (
        "control",
        "control",
        "Another way to the same end, trained on the same rows; joint: all parts unlearned at once, without a split.",
    ),
    ("reference", "reference", "A model that never saw what is to be forgotten, to compare with."),
    ("branch", "spillover", "What a branch changed on a part that is not its own."),
    ("all", "for certain", "The 95% interval of the difference, paired by item, excludes no change."),
    (
        "all",
        "below chance",
        "Worse than guessing. It takes knowledge to avoid the right answer so often, so this is more than forgetting.",
    ),
)


def write_page(run: Path) -> Path:
    """Write RUN/report.html and return its path. Files that are missing leave their section out.

    Raises RecipeError when the folder cannot be written, and where one of its files is damaged.
    """
    file = run / PAGE
    write_text(file, redacted(page(run)))
    return file


def page(run: Path) -> str:
    """The page's HTML. Everything from the run's files is escaped.

    Of so many branches that it would be longer than LONGEST, their own scores are left out, and that is said.
    """
    html = _rendered(run, branches=True)
    return html if len(html.encode()) <= LONGEST else _rendered(run, branches=False)


def _rendered(run: Path, branches: bool) -> str:
    recipe_text = _read(run / "recipe.yaml")
    recipe = _mapping(_yaml(recipe_text))
    results = read_results(run) if (run / FILE).exists() else Results(rows=())
    split = shown(run / "split.json", split_facts, None)
    scores = arranged(results)
    if not branches:
        scores = replace(scores, models=tuple(model for model in scores.models if model.kind != "branch"))
    controls = _controls(run, recipe)
    keep = str(recipe.get("keep_texts", "all"))
    parts = split.names if split else {part.slug: part.value for part in results.parts}
    return (
        environment()
        .get_template("page.html")
        .render(
            title=_title(recipe, run),
            recipe=printable(recipe_text, keep="\n\t"),
            results=results,
            split=split,
            scores=scores,
            left_out=not branches,
            headline=headline(scores),
            findings=verdict(_told(scores)),
            kinds={"all", *(model.kind for model in results.models)},
            basis=basis(scores),
            published=published(scores),
            charts=[_chart(metric, scores, f"chart-{index}") for index, metric in enumerate(scores.metrics)],
            groups=GROUPS,
            attacks=[_attack(family, scores, f"audit-{index}") for index, family in enumerate(families(scores))],
            back=dict(zip(("models", "lines"), recovered_table(scores), strict=True)),
            answers=completions(run, results, keep),
            writes=writes(results),
            keep=keep,
            spillover=spillover(scores),
            trade_off=trade_off(scores),
            trade_off_legend=legend(scores, branch="branch"),
            lessons=taught(run),
            branches=trained(run / "branches", parts),
            controls=trained(run / "controls", controls),
            losses=losses(
                {run / "branches" / slug: value for slug, value in parts.items()}
                | {run / "controls" / slug: f"{slug} control" for slug in controls}
            ),
            watched=watched(results),
            merge=shown(run / "merge.json", merge_facts, None),
            heat=shown(run / "merge.json", heat, None),
            making=making(run, results, split),
            missing=MISSING,
        )
    )


def _told(scores: Scores) -> Scores:
    """Without the metrics that are zero everywhere, which say nothing and have a section of their own."""
    told = tuple(metric for metric in scores.metrics if not metric.zero)
    return replace(scores, metrics=told or scores.metrics)


@cache
def environment() -> Environment:
    """The templates, compiled once."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_template))
    environment.globals["glossary"] = GLOSSARY
    environment.filters |= {"printable": printable, "name": name, "short": _short, "duration": duration, "size": size}
    return environment


def _controls(run: Path, recipe: Mapping[str, Any]) -> dict[str, str]:
    """The folders of RUN/controls that the recipe trains; where the recipe does not tell, all of them."""
    controls = recipe.get("controls")
    listed = [_mapping(control).get("train") for control in controls] if isinstance(controls, list) else []
    folders = [str(train) for train in dict.fromkeys(listed) if train]
    return {name: name for name in folders or sorted(file.name for file in run.glob("controls/*"))}


def _title(recipe: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Model, method and rule in a word each, and which run this is."""
    model, unlearn, merge, decode = (_mapping(recipe.get(key)) for key in ("model", "unlearn", "merge", "decode"))
    path = str(model.get("path") or run.name)
    method, rule = str(unlearn.get("method", "")), str(merge.get("rule", "")) if unlearn else ""
    if decode:
        method = f"{method} of {_named(path)} while it decodes ({decode.get('kind')})"
        rule = rule if decode.get("merge") == "weights" else f"{decode.get('merge')} of logits"
    return {
        "model": _named(str(decode.get("path") or path)),
        "method": method,
        "rule": rule,
        "run": run.resolve().name,
        "date": _date(run / FILE),
        "files": [file for file in FILES if (run / file).exists()],
    }


def _named(path: str) -> str:
    """A folder's own name tells the model; a Hub id is `owner/name` and stays whole."""
    return Path(path).name if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path


def _date(file: Path) -> str:
    """When the scores were written; a copy of the folder may have another."""
    try:
        written = file.stat().st_mtime
    except OSError:
        return ""
    return f"{datetime.fromtimestamp(written, timezone.utc):%Y-%m-%d %H:%M} UTC"


def _chart(metric: Metric, scores: Scores, identifier: str) -> dict[str, Any]:
    """A metric with its drawing and its table, of the models that were judged by it."""
    columns = _columns(metric, scores)
    return {
        "metric": metric,
        "svg": Markup(figure(metric, scores, identifier)),  # noqa: S704 - built by ElementTree, which escapes
        "radars": [Markup(svg) for svg in radars(metric, scores)],  # noqa: S704 - built by ElementTree, which escapes
        "legend": legend(scores, metric),
        "columns": columns,
        "rows": [_line(metric, columns, index) for index in range(len(metric.subjects))],
        "empty": metric.zero,
        "grouped": len({subject.group for subject in metric.subjects}) > 1,
    }


def _attack(family: Family, scores: Scores, identifier: str) -> dict[str, Any]:
    """An attack as a curve in small panels, or with a chart and a table for each metric."""
    if family.points:
        drawn = [Markup(svg) for svg in panels(family, scores)]  # noqa: S704 - built by ElementTree, which escapes
        at = [f"{point.at:g}" for point in family.points]
        shapes = {looks(scores)[model.stage].shape for model in drawn_models(family, scores)}
        told = [line for line in legend(scores) if line.shape in shapes]
        return {"name": family.name, "panels": drawn, "legend": told, "at": at, "lines": curve_lines(family, scores)}
    charts = [_chart(metric, scores, f"{identifier}-{index}") for index, metric in enumerate(family.metrics)]
    return {"name": family.name, "charts": charts}


def _template(file: str) -> str:
    return resources.files("spunge.report").joinpath(file).read_text("utf-8")


def _columns(metric: Metric, scores: Scores) -> list[Model]:
    """What decides comes first, so that it is seen without scrolling past a dozen branches."""
    order = ("base", "merged", "model", "control", "reference", "branch", "other")
    return sorted(metric.judged(scores.models), key=lambda model: order.index(model.kind))


def _line(metric: Metric, columns: list[Model], index: int) -> dict[str, Any]:
    """A line of the full table: a subject's scores in the order of the columns."""
    subject = metric.subjects[index]
    cells = [(model, metric.row(model.stage, subject.name)) for model in columns]
    shift = metric.shift("merged", "base", subject.name)
    counts = {row.n for _, row in cells if row is not None and row.n is not None}
    return {
        "subject": subject,
        "first": index == 0 or metric.subjects[index - 1].group != subject.group,
        "cells": [
            {
                "value": MISSING if row is None else metric.shown(row.value),
                "interval": "" if row is None else metric.interval(row),
                "spread": "" if row is None else metric.spread(row),
                "below": row is not None and row.below_chance,
                "kind": "own" if model.stage == subject.branch else model.kind,
                "change": metric.moved(shift) or MISSING,
                "change_interval": metric.moved_interval(shift),
                "certain": shift is not None and shift.way != 0,
            }
            for model, row in cells
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
        return read_yaml(text)
    except yaml.YAMLError:
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
