"""Models that a recipe compares with, and that nothing is made of."""

from typing import Any

from pydantic import Field, model_validator

from spunge.recipe.block import Strict
from spunge.recipe.patterns import STAGE_NAME


class Reference(Strict):
    """A model that never saw the rows to forget, to compare with: what exact unlearning would give."""

    path: str | None = Field(
        None,
        description="Folder or Hub id of one that exists: a checkpoint, or an adapter of the base. Default: one is made by the "
        "same teaching on the taught rows without those to forget.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    minus: str | None = Field(
        None,
        description="SQL condition: the taught rows that it is not taught. Default: those with the very texts of a row to forget.",
    )
    name: str = Field("retrained", pattern=STAGE_NAME, max_length=60, description="Names its stage, reference:NAME.")

    @model_validator(mode="after")
    def _one_way(self) -> "Reference":
        if self.path is not None and self.minus is not None:
            raise ValueError("minus: a model that exists is not taught; leave out one of path and minus")
        if self.path is None and self.revision is not None:
            raise ValueError("revision: of what? give path, or leave it out")
        return self


def referred(value: Any) -> Any:
    """`retrained` is short for one that is made."""
    if isinstance(value, str) and value != "retrained":
        raise ValueError(f"{value!r}: write retrained, or {{path: {value}}} for a model that exists")
    return {} if value == "retrained" else value


class JudgedModel(Strict):
    """A model that is judged as it is, beside the base."""

    name: str = Field(pattern=STAGE_NAME, max_length=60, description="Names its stage, model:NAME.")
    path: str = Field(description="Folder or Hub id: a checkpoint, or an adapter or delta of the base.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
