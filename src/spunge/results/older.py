"""Files of older versions, with the fields that they lack.

Before `wanted`, `higher_is_better` said it of what is to be kept. Before `models`, the names of stages, subjects and metrics
carried what are fields today.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spunge.results.directions import Higher, wanted

NAMES = ("stage", "subject", "metric")


def higher_of_older_version(metric: str, higher_is_better: bool) -> Higher:
    """What a higher value says, of a metric that a version before `wanted` wrote: it counted perplexity, whose good way depends
    on the rows, with toxicity, whose good way does not."""
    if higher_is_better:
        return "known"
    perplexity = "perplexity" in metric and not metric.startswith("completion perplexity")
    return "unknown" if perplexity else "bad"


def with_wanted(content: Mapping[str, Any]) -> dict[str, Any]:
    """With `wanted` in the rows that say `higher_is_better` in its place. What is damaged stays as it is."""
    if not isinstance(content["rows"], list):
        return dict(content)
    forget = {"forget": True, "keep": False}
    rows = []
    for row in content["rows"]:
        if isinstance(row, Mapping) and "higher_is_better" in row and "wanted" not in row:
            metric, better = str(row.get("of") or row.get("metric")), row["higher_is_better"]
            group = forget.get(str(row.get("group")))
            way = wanted(higher_of_older_version(metric, better), group) if isinstance(better, bool) else better
            row = {**{key: value for key, value in row.items() if key != "higher_is_better"}, "wanted": way}
        rows.append(row)
    return {**content, "rows": rows}


def of_older_version(content: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that such a file lacks, read off its names. Rows alone suffice. What is damaged stays as it is."""
    if any(not isinstance(content.get(key, []), list) for key in ("rows", "parts", "stages", "evaluations")):
        return {**content, "models": []}
    rows = [dict(row) if isinstance(row, Mapping) else row for row in content["rows"]]
    named = [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in NAMES)]
    parts = {str(part.get("value")): str(part.get("slug")) for part in _mappings(content, "parts")}
    stages = list(content.get("stages", []))
    stages += [stage for stage in dict.fromkeys(row["stage"] for row in named) if stage not in stages]
    # Without an attribute the one part is called `all`, as are rows without subjects: nothing tells them apart.
    forgotten = set() if content.get("attribute") is None and parts.keys() <= {"all"} else set(parts)
    for metric in dict.fromkeys(row["metric"] for row in named):
        mine = [row for row in named if row["metric"] == metric]
        reporting = [entry for entry in _mappings(content, "evaluations") if metric in _list(entry, "metrics")]
        _group(mine, forgotten, {"all", *(str(entry.get("overall")) for entry in reporting)})
    _curves([row for row in named if isinstance(row.get("of"), str)])
    branches = {f"branch:{slug}": value for value, slug in parts.items()}
    models = [_model(stage, branches) for stage in stages if isinstance(stage, str)]
    return {**content, "rows": rows, "stages": stages, "models": models}


def _model(stage: str, parts: Mapping[str, str]) -> dict[str, str]:
    kind, _, name = stage.partition(":")
    if kind in ("branch", "control") and name:
        return {"stage": stage, "kind": kind, "name": parts.get(stage, name)}
    return {"stage": stage, "kind": stage if stage in ("base", "merged") else "other", "name": stage}


def _group(rows: Sequence[dict[str, Any]], forgotten: set[str], overall: set[str]) -> None:
    """Fill in the groups of one metric's subjects."""
    subjects = {row["subject"] for row in rows}
    for row in rows:
        subject = row["subject"]
        held = subject.removeprefix("worst of ") if subject != "worst" else "all"
        if subject in forgotten:
            row["group"] = "forget"
        elif subject in overall and (not forgotten or subjects & forgotten):
            row["group"] = "together"
        elif subject == "worst" or held in subjects - {subject}:
            row |= {"group": "worst", "worst_of": held}
        else:
            row["group"] = "keep"


def _curves(rows: Sequence[dict[str, Any]]) -> None:
    """Metrics that are called alike but for one number are a curve along it."""
    number = re.compile(r"\d+(?:\.\d+)?")
    families: dict[tuple[str, str], dict[str, list[re.Match[str]]]] = {}
    for row in rows:
        metric = row["metric"]
        alike = families.setdefault((row["of"], number.sub("#", metric)), {})
        alike[metric] = list(number.finditer(metric))
    points: dict[str, dict[str, Any]] = {}
    for family in families.values():
        columns = [{match.group() for match in column} for column in zip(*family.values(), strict=True)]
        differing = [column for column, numbers in enumerate(columns) if len(numbers) > 1]
        for metric, matches in family.items() if len(differing) == 1 else ():
            start, stop = matches[differing[0]].span()
            unit = {"unit": "steps"} if "step" in metric else {}
            points[metric] = {"curve": f"{metric[:start]}N{metric[stop:]}", "at": float(metric[start:stop]), **unit}
    for row in rows:
        row |= points.get(row["metric"], {})


def _mappings(content: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    yield from (value for value in _list(content, key) if isinstance(value, Mapping))


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    return value if isinstance(value := content.get(key), list) else []
