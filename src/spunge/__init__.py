"""Make an open-weight language model forget, part by part, and prove what was forgotten and what was kept.

    import spunge
    results = spunge.run("demo")
    results.value("merged", "Europe", "accuracy")

Names are imported when first used: `import spunge` alone is quick and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spunge.data.split import split_rows as split_rows
    from spunge.deltas import open_delta as open_delta
    from spunge.merging.engine import merge as merge
    from spunge.pipeline import run as run
    from spunge.planning import plan as plan
    from spunge.probing import train_probe as train_probe
    from spunge.recipe import Recipe as Recipe
    from spunge.recipe import load_recipe as load_recipe
    from spunge.registry import RecipeError as RecipeError

__version__ = "0.1.0"

_PLACES = {
    "Recipe": "spunge.recipe",
    "RecipeError": "spunge.registry",
    "load_recipe": "spunge.recipe",
    "merge": "spunge.merging.engine",
    "open_delta": "spunge.deltas",
    "plan": "spunge.planning",
    "run": "spunge.pipeline",
    "split_rows": "spunge.data.split",
    "train_probe": "spunge.probing",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spunge' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
