"""Who scores a text: a setting that names a scorer, of evaluations and of methods that are rewarded by one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from spunge.recipe.block import Place, Strict
from spunge.recipe.named import named
from spunge.registry import SCORERS

DEFAULT = "classifier"


class ScorerSettings(Strict):
    kind: str = Field(description="Name of the scorer (`spunge list scorers`), or path/to/file.py:NAME.")


def spelled_out(given: Any) -> Any:
    """A text that names a scorer as {kind: its name}, and what is known by a folder or a Hub id as {kind: .., path: TEXT}."""
    if not isinstance(given, str):
        return given
    if ".py:" in given or given in SCORERS.names():
        return {"kind": given}
    kind = next((name for name, scorer in SCORERS.items() if scorer.matches(given)), DEFAULT)
    return {"kind": kind, "path": given}


# What a setting `scorer` may hold; a default that is a text needs validate_default.
Scoring = Annotated[
    SerializeAsAny[ScorerSettings], Place("model"), named(SCORERS, "kind", texts=True), BeforeValidator(spelled_out)
]
SCORING = (
    "a text-classification model (folder or Hub id), the folder of a probe (`spunge probe`), the name of a scorer "
    "(`spunge list scorers`), path/to/file.py:NAME, or {kind: its name, ..} with its settings."
)
