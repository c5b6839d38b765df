"""The recipes of a search: of the base alone, of a trial on validation items, of a chosen point on test items."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spunge.errors import RecipeError
from spunge.recipe.evaluating import Half, evaluation_name
from spunge.recipe.explanation import validated
from spunge.recipe.loading import Draft, finished
from spunge.recipe.ranges import SEARCHED, Searched, ranges_in, with_values
from spunge.recipe.schema import Recipe
from spunge.run.objectives import Objective, aggregates_of, compared_with, halvable, needed

CORNERS = 64  # combinations of the ranges' ends that are looked at before anything is trained, at most
JUDGED = ("base", "merged")


@dataclass(frozen=True)
class Space:
    """A recipe with ranges."""

    draft: Draft
    searched: tuple[Searched, ...]

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with values in place of its ranges. Raises RecipeError where they are no settings."""
        return finished(replace(self.draft, content=with_values(self.draft.content, self.searched, values)))


def space_of(draft: Draft) -> Space:
    """The ranges of a recipe. Raises RecipeError where it has none, or where an end of one is no setting."""
    every = ranges_in(draft.content)
    # A part may be called `low`, and settings that are told of each part look like a range.
    space = Space(draft, tuple(setting for setting in every if not _stands(draft, every, setting)))
    if not space.searched:
        finished(draft)  # a range that is misspelt is told as the wrong setting that it is
        raise RecipeError(
            f"tune: the recipe has no range under {' or '.join(SEARCHED)}; write {{low: .., high: ..}}, with log: true where that "
            "fits, or {choices: [..]} in place of a value"
        )
    ends = [[(setting.name, end) for end in setting.range.ends] for setting in space.searched]
    if math.prod(map(len, ends)) <= CORNERS:
        corners = [dict(corner) for corner in itertools.product(*ends)]
    else:  # each end by itself
        corners = [{**dict(own[0] for own in ends), name: end} for own in ends for name, end in own]
    for corner in corners:
        space.recipe(corner)
    return space


def _stands(draft: Draft, every: Sequence[Searched], setting: Searched) -> bool:
    """Whether what looks like a range is a setting as it is."""
    others = [other for other in every if other is not setting]
    values = {other.name: other.range.ends[0] for other in others}
    try:
        finished(replace(draft, content=with_values(draft.content, others, values)))
    except RecipeError:
        return False
    return True


def base_recipe(recipe: Recipe, objectives: Sequence[Objective]) -> Recipe:
    """Of the base alone, judged on the validation items of the objectives."""
    content = trial_recipe(recipe, objectives).model_dump(mode="json", exclude={"unlearn", "merge", "controls"})
    return validated(Recipe, {**content, "judge": content["judge"] or [], "calibrate": None, "seeds": 1})


def trial_recipe(recipe: Recipe, objectives: Sequence[Objective]) -> Recipe:
    """Of a trial: the base and the merged model, judged on the validation items of the objectives alone."""
    names = [evaluation_name(entry) for entry in needed(objectives, recipe)]
    others = compared_with(objectives, recipe)
    content = _halved(recipe, "validation")
    content["evaluate"] = [
        {**entry, "stages": [*JUDGED, *others]}
        for entry in content["evaluate"]
        if (entry["name"] or entry["kind"]) in names
    ]
    needed_of = {*aggregates_of(objectives, recipe), *([recipe.calibrate.aggregate] if recipe.calibrate else ())}
    content["aggregates"] = {name: each for name, each in content["aggregates"].items() if name in needed_of}
    if not any(stage.startswith("reference:") for stage in others):
        content["reference"] = None
    judged = [model for model in content["judge"] or () if f"model:{model['name']}" in others]
    return validated(Recipe, {**content, "controls": [], "judge": judged or None, "published": []})


def point_recipe(recipe: Recipe) -> Recipe:
    """Of a chosen point: the recipe itself, judged on the test items of every evaluation that is of rows."""
    return validated(Recipe, _halved(recipe, "test"))


def _halved(recipe: Recipe, half: Half) -> dict[str, Any]:
    """A search watches no training: trials are many, and what they share is found by its key."""
    content = {**recipe.model_dump(mode="json"), "watch": None}
    for entry, settings in zip(content["evaluate"], recipe.evaluate, strict=True):
        if halvable(settings):
            entry["half"] = half
    return content
