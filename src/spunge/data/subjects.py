"""The subjects that an evaluation's rows count for: values of an attribute, or the parts of the rows to forget."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from spunge.data.arrays import among, mark, zeros
from spunge.data.attribute import same_attribute, subjects_of
from spunge.data.attribution import attribute_of
from spunge.data.query import ROW
from spunge.data.split import UNASSIGNED, Part, Parts
from spunge.data.unlabelled import Unlabelled
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.schema import Recipe
from spunge.recipe.split import AttributeSettings


class Subjects(NamedTuple):
    """Which rows of a source count for which subjects."""

    counted: np.ndarray  # (rows of the source,) of bool: whether a row counts for any
    of: Callable[[np.ndarray], Sequence[Sequence[str]]]  # some rows' numbers, ascending -> the subjects of each


def told_subjects(recipe: Recipe, entry: EvaluatorSettings, unlabelled: Unlabelled, parts: Parts | None) -> Subjects:
    """The subjects of an evaluation's rows. By an attribute that the forget rows alone have, these have their parts, others none.

    Rows to forget that the split keeps as a part of their own (`unassigned`) count for it. Raises RecipeError for an attribute that
    is none.
    """
    query = unlabelled.query
    own: Sequence[Part] = ()
    if recipe.forget is not None and entry.source in (None, recipe.forget.source) and parts is not None:
        own = parts.parts
    by: str | AttributeSettings | None = entry.by
    if by is None and recipe.split is not None:
        by = recipe.split.by
        if not attribute_of(by).fits(query):
            return _by_part(own, query.rows)
    if by is None:
        return _by_part((), query.rows)
    known = attribute_of(by).values(unlabelled)
    counted = zeros(query.rows, bool)
    for piece in known.lines.select([ROW, "value"]).to_batches():
        mark(counted, piece[ROW].filter(piece["value"].is_valid()).to_numpy())
    named = Subjects(counted, lambda rows: subjects_of(known, query, rows, by, recipe.split))
    if recipe.split is None or recipe.split.unassigned != "keep" or not same_attribute(query, recipe.split.by, by):
        return named
    return _beside(named, _by_part([part for part in own if part.value == UNASSIGNED], query.rows))


def _by_part(parts: Sequence[Part], count: int) -> Subjects:
    """count: of the source's rows."""
    members = {part.value: part.members for part in parts if part.members is not None}
    counted = zeros(count, bool)
    for own in members.values():
        mark(counted, own)

    def of(rows: np.ndarray) -> list[list[str]]:
        inside = {value: among(rows, own) for value, own in members.items()}
        return [[value for value, there in inside.items() if there[at]] for at in range(len(rows))]

    return Subjects(counted, of)


def _beside(named: Subjects, left: Subjects) -> Subjects:
    """left: the rows that the split left over, which count for that part alone."""
    counted = named.counted
    mark(counted, np.flatnonzero(left.counted))
    return Subjects(
        counted, lambda rows: [over or own for own, over in zip(named.of(rows), left.of(rows), strict=True)]
    )
