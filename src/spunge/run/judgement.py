"""Judge models as they are: a run whose recipe unlearns nothing, with the same stages, files, results and page."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, one_line
from spunge.progress import Watcher
from spunge.recipe.loading import apply_overrides, load_recipe
from spunge.recipe.schema import Recipe
from spunge.results import Results
from spunge.run.pipeline import run
from spunge.weights.checkpoint import ADAPTER, has_model, read_object
from spunge.weights.delta import DESCRIPTION
from spunge.weights.hub import fetched

LONGEST = 50  # characters of a stage's name
UNLEARNING = (
    "unlearn",
    "calibrate",
    "watch",
    "controls",
    "merge",
    "teach",
    "seeds",
)  # blocks that say how models are made


def judge(
    models: Sequence[str | Path],
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    evaluate: Sequence[Mapping[str, Any]] = (),
    base: str | Path | None = None,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Results:
    """Judge checkpoints, adapters or deltas side by side, and train nothing.

    models: folders or Hub ids. recipe: whose evaluations, rows and parts are taken; evaluate: evaluations in place of its. base:
    what the others are compared with and adapters are laid over; by default the first model, or the one that the first names as
    its own. out: the run's folder, `runs/judge-NAME` by default. Raises RecipeError as a run does.
    """
    chosen = judging_recipe(models, recipe, evaluate, base)
    return run(chosen, out or default_folder(models), watcher)


def default_folder(models: Sequence[str | Path]) -> Path:
    return Path("runs") / f"judge-{_named(str(models[0]))}" if models else Path("runs") / "judge"


def judging_recipe(
    models: Sequence[str | Path],
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    evaluate: Sequence[Mapping[str, Any]] = (),
    base: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of such a run. overrides: `a.b=value`, applied to it."""
    if not models:
        raise RecipeError("judge: no model is named; give a folder or a Hub id")
    if recipe is None and not evaluate:
        raise RecipeError("judge: nothing says what by; give --recipe, whose evaluations are taken, or --evaluate")
    places = [_place(model) for model in models]
    if base is not None:
        first = _place(base)
        others = [place for place in places if place != first]
    elif (own := _base_of(places[0])) is not None:
        first, others = own, places
    else:
        first, others = places[0], places[1:]
    content = _content(recipe)
    listed = [*(content.get("judge") or []), *({"name": name, "path": path} for name, path in _names(others).items())]
    if (content.get("reference") or {}).get("path") in (first, *others):
        del content["reference"]  # it is judged as one of them
    content["model"] = {**content.get("model", {}), "path": first, "revision": None}
    # What a recipe leaves out for cost, or because a stage does not exist here, is asked of all models that are named.
    asked = list(evaluate) or [{**entry, "stages": None} for entry in content.get("evaluate", [])]
    content |= {"evaluate": asked, "judge": listed, "aggregates": {} if evaluate else content.get("aggregates", {})}
    apply_overrides(content, overrides)
    content["aggregates"] = dict(_comparable(content))
    return load_recipe(content)


def _comparable(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The aggregates whose models are all judged here; the others are said."""
    there = {f"model:{model['name']}" for model in content["judge"]}
    there |= {f"reference:{content['reference']['name']}"} if content.get("reference") else set()
    for name, aggregate in content["aggregates"].items():
        against = aggregate.get("against")
        if against is None or against in there:
            yield name, aggregate
            continue
        mend = f"--set aggregates.{name}.against=model:NAME names one that is"
        logging.getLogger("spunge").warning(
            one_line(f"the aggregate {name!r} is left out: {against!r} is not judged here; {mend}")
        )


def _content(recipe: Recipe | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """A recipe's settings but for those of unlearning; a reference that exists stays."""
    if recipe is None:
        return {}
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    content = loaded.model_dump(mode="json", exclude=set(UNLEARNING))
    if loaded.reference is None or loaded.reference.path is None:
        del content["reference"]
    return content


def _place(model: str | Path) -> str:
    """A folder's absolute path; anything else is a Hub id."""
    given = os.path.expanduser(model)
    return os.path.abspath(given) if os.path.isdir(given) else str(model)


def _base_of(place: str) -> str | None:
    """The model that an adapter is of; None of a checkpoint. Raises RecipeError where it does not say."""
    folder = fetched(place, "judge")
    if has_model(folder):
        return None
    if (folder / ADAPTER).exists():
        named = read_object(folder / ADAPTER, "judge").get("base_model_name_or_path")
        if isinstance(named, str) and named:
            return _place(named)
    if (folder / ADAPTER).exists() or (folder / DESCRIPTION).exists():
        raise RecipeError(f"judge: {place!r} does not say which model it is laid over; give --base")
    return None


def _names(places: Sequence[str]) -> dict[str, str]:
    """Name -> place: the last part of its path, with the one before it where two end alike, and then a number."""
    names: dict[str, str] = {}
    for place in places:
        name = _named(place)
        if name in names:
            name = _named("-".join(Path(place).parts[-2:]))
        tries = (f"{name}-{number}" for number in range(2, len(places) + 2))
        names[name if name not in names else next(each for each in tries if each not in names)] = place
    return names


def _named(place: str) -> str:
    last = re.sub(r"[^a-z0-9._-]+", "-", Path(place).name.lower())[:LONGEST].strip("-._")
    return last or "model"
