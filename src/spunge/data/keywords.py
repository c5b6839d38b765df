"""An attribute by words: which of some regular expressions are found in a row's texts.

split: {by: {keywords: {women: ['\\bwom[ae]n\\b', girls?], age: [old people, elderly]}}}
"""

from typing import Annotated

from pydantic import Field, StringConstraints

from spunge.data.attribution import AttributeSource, Valued
from spunge.data.patterns import matches
from spunge.data.unlabelled import Unlabelled, lines_of
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

    return Valued(
        lines_of(unlabelled, lambda texts: ([name for name, holds in tests.items() if holds(text)] for text in texts))
    )


KEYWORDS = AttributeSource(
    settings=KeywordsSettings,
    source="regular expressions (the package regex)",
    values=values,
    title=lambda query, settings: "keywords",
    fits=lambda query, settings: False,
)
