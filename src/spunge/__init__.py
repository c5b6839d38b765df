"""Make an open-weight language model forget, part by part, and measure what was forgotten and what was kept.

    import spunge
    results = spunge.run("demo")
    results.value("merged", "Europe", "accuracy")

Names are imported when first used: `import spunge` alone is quick and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spunge.data.split import split_rows as split_rows
    from spunge.errors import RecipeError as RecipeError
    from spunge.evaluation.scorers.training import train_probe as train_probe
    from spunge.merging.engine import merge as merge
    from spunge.recipe.loading import load_recipe as load_recipe
    from spunge.recipe.schema import Recipe as Recipe
    from spunge.results import Results as Results
    from spunge.results import read_results as read_results
    from spunge.run.judgement import judge as judge
    from spunge.run.pipeline import run as run
    from spunge.run.plan import plan as plan
    from spunge.run.tune import tune as tune
    from spunge.weights.delta import open_delta as open_delta

__version__ = "0.1.0"

_PLACES = {
    "Recipe": "spunge.recipe.schema",
    "RecipeError": "spunge.errors",
    "Results": "spunge.results",
    "judge": "spunge.run.judgement",
    "load_recipe": "spunge.recipe.loading",
    "merge": "spunge.merging.engine",
    "open_delta": "spunge.weights.delta",
    "plan": "spunge.run.plan",
    "read_results": "spunge.results",
    "run": "spunge.run.pipeline",
    "split_rows": "spunge.data.split",
    "train_probe": "spunge.evaluation.scorers.training",
    "tune": "spunge.run.tune",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spunge' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
