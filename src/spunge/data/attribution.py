"""What an attribute source is: a value that says of each row which values of the attribute it has.

split: {by: topic}                      # a text is a column or an SQL expression: the source `sql`
split: {by: {kind: own.py:TOPICS}}      # any other, with its settings
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
from pydantic import Field

from spunge.data.query import Kind, Query
from spunge.data.unlabelled import Unlabelled
from spunge.recipe.split import AttributeSettings
from spunge.registry import ATTRIBUTES, summary_of

S = TypeVar("S", bound=AttributeSettings)


class Valued(NamedTuple):
    """Which rows have which values."""

    # Columns __row__ and value (text): one line for each row, or one for each of its values; null: it has none. By rows,
    # ascending; those that were not asked for may be among them.
    lines: pa.Table
    kind: Kind = "text"  # numbers and truth values have several spellings: 4 and 4.0 are one value
    notes: tuple[str, ...] = ()  # what a person should know of how the values came about


@dataclass(frozen=True)
class AttributeSource(Generic[S]):
    """An attribute source. Lists say the first line of `values`' docstring of it."""

    settings: type[S]
    source: str  # the paper, or the package
    # Every asked row's values. The same rows have the same values.
    values: Callable[[Unlabelled, S], Valued]
    title: Callable[[Query, S], str]  # what reports call the attribute
    # Whether rows of another file have the attribute as well, so that an evaluation can report by it. Where they have not, an
    # evaluation of the forget rows themselves reports by their parts.
    fits: Callable[[Query, S], bool] = lambda query, settings: True
    version: int = 1  # rises when the same settings give other values

    @property
    def summary(self) -> str:
        return summary_of(self.values)


class Attribute(NamedTuple):
    """What a recipe's `by` means: a source and its settings."""

    source: AttributeSource[Any]
    settings: AttributeSettings

    def values(self, unlabelled: Unlabelled) -> Valued:
        """Every asked row's values. Raises RecipeError for an attribute that these rows have not."""
        return self.source.values(unlabelled, self.settings)

    def title(self, query: Query) -> str:
        return self.source.title(query, self.settings)

    def fits(self, query: Query) -> bool:
        return self.source.fits(query, self.settings)


def attribute_of(by: str | AttributeSettings) -> Attribute:
    """The attribute that a recipe names; a text is a column or an SQL expression."""
    settings = SQLSettings(sql=by) if isinstance(by, str) else by
    return Attribute(ATTRIBUTES.get(settings.kind), settings)


class SQLSettings(AttributeSettings):
    kind: str = "sql"
    sql: str = Field(description="The name of a column, whatever it looks like, or else an SQL expression.")


def values(unlabelled: Unlabelled, settings: SQLSettings) -> Valued:
    """A column, or an SQL expression over the row; a list puts a row into several parts."""
    query, setting = unlabelled.query, unlabelled.setting
    return Valued(query.values(settings.sql, setting), query.spelled_as(settings.sql, setting))


SQL = AttributeSource(
    settings=SQLSettings,
    source="DuckDB",
    values=values,
    title=lambda query, settings: query.column(settings.sql) or settings.sql,
    fits=lambda query, settings: query.has(settings.sql),
)
