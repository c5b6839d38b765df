"""What a judging leaves in its file: the items' measurements. A file that holds anything else is refused by its name."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Measure, Rated
from spunge.files import read_json
from spunge.results import higher_of_older_version


def _stored(kind: type) -> type[BaseModel]:
    """A dataclass as JSON holds it: an array is a list of numbers."""
    hints = get_type_hints(kind)
    columns: dict[str, Any] = {
        each.name: (
            list[float] if hints[each.name] is np.ndarray else hints[each.name],
            ... if each.default is MISSING else each.default,
        )
        for each in fields(kind)
    }
    return create_model(f"Stored{kind.__name__}", __config__=ConfigDict(strict=True, extra="forbid"), **columns)


class _Stored(BaseModel):
    stage: str
    evaluation: str
    measures: list[_stored(Measure)]  # type: ignore[valid-type]
    rated: list[_stored(Rated)] = []  # type: ignore[valid-type]
    device: str | None = None
    dtype: str | None = None
    text_files: list[str] = []


class Measured(NamedTuple):
    measures: list[Measure]
    rated: list[Rated]  # on which side of its threshold a scorer's scores fell
    device: str | None = None  # of the model as it was measured
    dtype: str | None = None
    text_files: tuple[str, ...] = ()  # beside this one that its texts were written to, as long as they are kept


def to_json(stage: str, evaluation: str, measured: Measured) -> dict[str, Any]:
    """What `from_json` reads back."""
    return {
        "stage": stage,
        "evaluation": evaluation,
        "measures": [
            {**vars(measure), "numerator": measure.numerator.tolist(), "denominator": measure.denominator.tolist()}
            for measure in measured.measures
        ],
        "rated": [vars(each) for each in measured.rated],
        "device": measured.device,
        "dtype": measured.dtype,
        "text_files": list(measured.text_files),
    }


def from_json(content: Any) -> Measured:
    """Raises ValueError for what no judging wrote."""
    try:
        stored = _Stored.model_validate(_renewed(content))
    except ValidationError as error:
        raise ValueError(f"{error.error_count()} values in it are not what they should be") from None
    measures = []
    for each in stored.measures:
        values = each.model_dump()
        arrays = {name: np.array(values[name], dtype=np.float64) for name in ("numerator", "denominator")}
        if arrays["numerator"].shape != arrays["denominator"].shape:
            raise ValueError("it holds two lists that should be equally long")
        measures.append(Measure(**{**values, **arrays}))
    rated = [Rated(**each.model_dump()) for each in stored.rated]
    return Measured(measures, rated, stored.device, stored.dtype, tuple(stored.text_files))


def _renewed(content: Any) -> Any:
    """What a version wrote that knew no directions, in today's words."""
    measures = content.get("measures") if isinstance(content, dict) else None
    if not isinstance(measures, list):
        return content
    return {**content, "measures": [_with_direction(each) for each in measures]}


def _with_direction(measure: Any) -> Any:
    if not isinstance(measure, dict) or type(measure.get("higher_is_better")) is not bool:
        return measure
    rest = {name: value for name, value in measure.items() if name != "higher_is_better"}
    metric = str(measure.get("of") or measure.get("metric"))
    return {**rest, "higher": higher_of_older_version(metric, measure["higher_is_better"])}


def read_measured(file: Path) -> Measured:
    """The measurements of a finished judging. Raises RecipeError for a file that holds none."""
    try:
        return from_json(read_json(file))
    except ValueError as error:
        raise RecipeError(
            f"--out: {str(file)!r} holds no measurements as a run writes them ({error}); remove it and give the same command again"
        ) from None
