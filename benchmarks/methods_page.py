"""The tables of docs/benchmarks/methods.md, from benchmarks/methods.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "methods.md"
COLUMNS = {  # question -> heading -> subject and metric, digits
    "demo": {
        "Europe": ("Europe: accuracy", 2),
        "Asia": ("Asia: accuracy", 2),
        "Africa": ("Africa: accuracy", 2),
        "Americas": ("Americas: accuracy", 2),
        "facts": ("facts: accuracy", 2),
        "perplexity": ("plain text: perplexity", 1),
    },
    "tofu": {
        "forgotten": ("forgotten: answer probability", 3),
        "extraction": ("forgotten: extraction strength", 3),
        "retained": ("retained: answer probability", 3),
        "world facts": ("world facts: probability among options", 3),
    },
}


def write_page(rows: Mapping[str, Mapping[str, Any]], names: list[str]) -> None:
    """names: the methods in the order of the tables; those without a row are left out."""
    page = PAGE.read_text(encoding="utf-8")
    for question in COLUMNS:
        if rows[question]:
            start, end = f"<!-- table: {question}, python benchmarks/methods.py -->", "<!-- end of table -->"
            fresh = f"{start}\n{table(question, rows[question], names)}\n{end}"
            pattern = f"{re.escape(start)}.*?{re.escape(end)}"
            if not re.search(pattern, page, flags=re.DOTALL):
                raise SystemExit(f"{PAGE.name}: no place for the table of {question}")
            page = re.sub(pattern, lambda _, fresh=fresh: fresh, page, flags=re.DOTALL)  # type: ignore[misc]
    PAGE.write_text(page, "utf-8")


def table(question: str, rows: Mapping[str, Any], names: list[str]) -> str:
    head = ["method", "", *COLUMNS[question], "a step", "joint training", "memory"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    if "base" in rows:
        lines.append(f"| (base) | | {' | '.join(cells(question, rows['base']['scores']['base']))} | | | |")
    for name in names:
        if name in rows:
            row = rows[name]
            cost = f"{row['step']:.2f} s | {row['seconds']:.0f} s | {row['memory'] / 2**30:.1f} GiB"
            of_joint, of_merged = (cells(question, row["scores"][stage]) for stage in ("control:joint", "merged"))
            stopped = [f"{stage} stopped at {step}" for stage, step in row.get("stopped", {}).items()]
            own, parts = ([each for each in stopped if each.startswith("joint ") is joint] for joint in (True, False))
            lines.append(f"| {name} | {', '.join(own) or 'joint'} | {' | '.join(of_joint)} | {cost} |")
            lines.append(f"| | {', '.join(['SPUNGE', *parts])} | {' | '.join(of_merged)} | | | |")
    return "\n".join(lines)


def cells(question: str, scores: Mapping[str, list[float]]) -> list[str]:
    return [cell(scores[key], digits) for key, digits in COLUMNS[question].values()]


def cell(values: list[float], digits: int) -> str:
    value, *interval = (f"{each:.{digits}f}" for each in values)
    return f"{value} [{' '.join(interval)}]" if interval else value
