"""How the rows to forget are split: `split`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from spunge.recipe.block import Strict
from spunge.recipe.named import named
from spunge.recipe.rows import Scalar
from spunge.registry import ATTRIBUTES


class AttributeSettings(Strict):
    kind: str = Field(description="Name of the attribute source (`spunge list attributes`).")


def spelled_out(by: Any) -> Any:
    """{keywords: ..} as {kind: keywords, keywords: ..}, and what `sql` is told as the text that it is short for."""
    if not isinstance(by, Mapping):
        return by
    if "kind" not in by and len(names := [key for key in by if key in ATTRIBUTES.names()]) == 1:
        by = {"kind": names[0], **by}
    return by["sql"] if by.keys() == {"kind", "sql"} and by["kind"] == "sql" else by


class Split(Strict):
    by: Annotated[
        str | SerializeAsAny[AttributeSettings], named(ATTRIBUTES, "kind", texts=True), BeforeValidator(spelled_out)
    ] = Field(
        description="The attribute: the name of a column, whatever it looks like, or else an SQL expression; or {kind: NAME, ..}, "
        "another source of its values (`spunge list attributes`). A list puts a row into several parts."
    )
    values: list[Scalar] | dict[str, list[Scalar]] | None = Field(
        None, description="Values to make parts of, or {part: [values]}. Default: every value that occurs."
    )
    min_rows: int = Field(1, ge=1, description="Parts with fewer rows are dropped.")
    unassigned: Literal["drop", "keep", "error"] = Field(
        "drop", description="Rows whose value is in no part: drop them, keep them as a part of their own, or stop."
    )
