"""An attribute by words: which of some regular expressions are found in a row's texts.

split: {by: {keywords: {women: ['\\bwom[ae]n\\b', girls?], age: [old people, elderly]}}}
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field, StringConstraints

from spunge.data.arrays import blocks
from spunge.data.attribution import AttributeSource, Valued
from spunge.data.keeping import together
from spunge.data.patterns import matches
from spunge.data.query import ROW
from spunge.data.unlabelled import Unlabelled, row_texts_apart
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
    tests = {name: matches(patterns, f"{setting}.{name}") for name, patterns in settings.keywords.items()}

    def lines() -> Iterator[pa.Table]:
        after = 0  # of the asked rows, which ascend; those that say nothing are between the others
        for rows, texts in row_texts_apart(unlabelled):
            end = int(np.searchsorted(unlabelled.rows, rows[-1:], side="right").max(initial=after))
            names = dict(
                zip(
                    rows.tolist(),
                    ([name for name, holds in tests.items() if holds(text)] for text in texts),
                    strict=True,
                )
            )
            yield _lines({row: names.get(row) or [None] for row in unlabelled.rows[after:end].tolist()})
            after = end
        for part in blocks(len(unlabelled.rows) - after):
            yield _lines({row: [None] for row in unlabelled.rows[after:][part].tolist()})

    return Valued(together(lines()))


def _lines(names_of: Mapping[int, Sequence[str | None]]) -> pa.Table:
    rows = [row for row, names in names_of.items() for _ in names]
    names = [name for names in names_of.values() for name in names]
    return pa.table({ROW: pa.array(rows, pa.int64()), "value": pa.array(names, pa.string())})


KEYWORDS = AttributeSource(
    settings=KeywordsSettings,
    source="regular expressions (the package regex)",
    values=values,
    title=lambda query, settings: "keywords",
    fits=lambda query, settings: False,
)
