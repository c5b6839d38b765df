"""The other files of a run's folder: read into what is shown, or told as damaged with their names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from spunge.errors import RecipeError, printable
from spunge.files import parse_json
from spunge.report.wording import name
from spunge.results import ANEW

T = TypeVar("T")


def shown(file: Path, show: Callable[[Mapping[str, Any]], T], missing: T) -> T:
    """What `show` makes of the file's JSON object; `missing` where there is no file.

    Raises RecipeError, with the file's name, where it holds something else than `show` can take.
    """
    try:
        content = parse_json(file.read_bytes())
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return show(content)
    except (FileNotFoundError, NotADirectoryError):
        return missing
    except OSError as error:
        raise RecipeError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RecipeError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}); {ANEW}") from None


class PartLine(NamedTuple):
    """A part of the split."""

    value: str
    rows: str
    empty: str  # rows left out because a text of theirs is empty
    selected: str
    slug: str
    sha256: str


class SplitFacts(NamedTuple):
    """What split.json says, as text."""

    attribute: str
    rows: str
    filtered: str
    unassigned: str
    parts: tuple[PartLine, ...]
    dropped: tuple[tuple[str, str], ...]  # value, why
    notes: tuple[str, ...]
    names: dict[str, str]  # a part's folder -> its value


def split_facts(content: Mapping[str, Any]) -> SplitFacts:
    parts = content.get("parts") or []
    rows, filtered, unassigned = (_count(content.get(key)) for key in ("rows", "filtered", "unassigned"))
    return SplitFacts(
        attribute=column(content.get("attribute") or ""),
        rows=rows,
        filtered=filtered,
        unassigned=unassigned,
        parts=tuple(
            PartLine(
                value=name(part["value"]),
                rows=_count(part.get("rows")),
                empty=_count(part.get("empty")),
                selected=_count(part.get("selected")),
                slug=printable(part["slug"]),
                sha256=printable(part.get("sha256") or "")[:16],
            )
            for part in parts
        ),
        dropped=tuple((name(value), printable(reason)) for value, reason in (content.get("dropped") or {}).items()),
        notes=tuple(map(printable, content.get("notes") or [])),
        names={str(part["slug"]): str(part["value"]) for part in parts},
    )


def _count(value: Any) -> str:
    return "" if value is None else f"{value:d}"


def column(expression: str) -> str:
    """An attribute as people call it: a column that SQL has in quotes without them."""
    inner = expression[1:-1]
    quoted = len(expression) > 2 and expression[0] == expression[-1] == '"' and '"' not in inner.replace('""', "")
    return printable(inner.replace('""', '"') if quoted else expression)
