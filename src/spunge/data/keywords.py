"""An attribute by words: which of some regular expressions are found in a row's texts.

split: {by: {keywords: {women: ['\\bwom[ae]n\\b', girls?], age: [old people, elderly]}}}
"""

from typing import Annotated

import pyarrow as pa
from pydantic import Field, StringConstraints

from spunge.data.attribution import AttributeSource, Valued
from spunge.data.patterns import matches
from spunge.data.query import ROW
from spunge.data.unlabelled import Unlabelled, row_texts
from spunge.recipe.split import AttributeSettings

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class KeywordsSettings(AttributeSettings):
    kind: str = "keywords"
    keywords: dict[Name, Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1,
        description="Part: regular expressions, searched for in all that a row says, whatever the case. A row with none of them "
        "is in no part (`unassigned`), one with several parts' in all of these.",
    )


def values(unlabelled: Unlabelled, settings: KeywordsSettings) -> Valued:
    """Regular expressions that are found in a row's texts; a row may be in several parts, or in none."""
    setting = f"{unlabelled.setting}.keywords"
    holds = {name: matches(patterns, f"{setting}.{name}") for name, patterns in settings.keywords.items()}
    read = row_texts(unlabelled)
    of_row: dict[int, list[str | None]] = {int(row): [None] for row in unlabelled.rows}
    for row, text in zip(read.rows.tolist(), read.texts, strict=True):
        of_row[row] = [name for name, found in holds.items() if found(text)] or [None]
    lines = [(row, name) for row, names in of_row.items() for name in names]
    return Valued(
        pa.table(
            {
                ROW: pa.array([row for row, _ in lines], pa.int64()),
                "value": pa.array([name for _, name in lines], pa.string()),
            }
        )
    )


KEYWORDS = AttributeSource(
    settings=KeywordsSettings,
    source="regular expressions (the package regex)",
    values=values,
    title=lambda query, settings: "keywords",
    fits=lambda query, settings: False,
)
