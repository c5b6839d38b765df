"""What can be named in a recipe: unlearning methods, merge rules and evaluators, each imported only when it is used.

A name is one of the lines below, one from an installed package's entry points (`spunge.methods`, `spunge.rules`,
`spunge.evaluators`), or `path/to/file.py:Name` for a file of your own.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, suggestion


@dataclass(frozen=True)
class Registry:
    setting: str  # the recipe's key, for errors
    noun: str
    group: str  # entry-point group
    builtin: Mapping[str, str]  # name -> "module:object"

    def names(self) -> list[str]:
        """Built-in names, then those that installed packages add."""
        return [
            *self.builtin,
            *(point.name for point in entry_points(group=self.group) if point.name not in self.builtin),
        ]

    def get(self, name: str) -> Any:
        """The object behind a name. Raises RecipeError for a name that nobody has."""
        if name in self.builtin:
            return _load(self.builtin[name])
        if ".py:" in name:
            return self._from_file(name)
        for point in entry_points(group=self.group):
            if point.name == name:
                return point.load()
        raise RecipeError(f"{self.setting}: no {self.noun} {name!r}{suggestion(name, self.names())}")

    def version(self, name: str) -> str:
        """What a result depends on beyond the settings: the object's own `version`, or its file's content."""
        if ".py:" in name:
            return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()[:16]
        return str(getattr(self.get(name), "version", 1))

    def _from_file(self, name: str) -> Any:
        path, _, attribute = name.rpartition(":")
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise RecipeError(f"{self.setting}: no file {path!r}; give path/to/file.py:Name")
        module_name = f"spunge_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
        module = sys.modules.get(module_name)
        if module is None:
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None:
                raise RecipeError(f"{self.setting}: {path!r} cannot be imported as Python")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            raise RecipeError(f"{self.setting}: {path!r} has no {attribute!r}{suggestion(attribute, vars(module))}")
        return getattr(module, attribute)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


METHODS = Registry(
    "unlearn.method",
    "method",
    "spunge.methods",
    {
        "rmu": "spunge.unlearning.rmu.rmu:RMU",
        "tvn": "spunge.unlearning.tvn:TVN",
        "sku": "spunge.unlearning.sku:SKU",
        "ga": "spunge.unlearning.ga:GA",
        "graddiff": "spunge.unlearning.graddiff:GradDiff",
        "npo": "spunge.unlearning.npo:NPO",
        "simnpo": "spunge.unlearning.simnpo:SimNPO",
        "dpo": "spunge.unlearning.dpo:DPO",
        "idk": "spunge.unlearning.idk:IDK",
        "undial": "spunge.unlearning.undial:UNDIAL",
        "wga": "spunge.unlearning.wga:WGA",
        "precomputed": "spunge.unlearning.precomputed:Precomputed",
    },
)
RULES = Registry(
    "merge.rule",
    "rule",
    "spunge.rules",
    {
        "ties": "spunge.merging.rules:ties",
        "task_arithmetic": "spunge.merging.rules:task_arithmetic",
        "average": "spunge.merging.rules:average",
        "weighted_sum": "spunge.merging.rules:weighted_sum",
        "consensus": "spunge.merging.rules:consensus",
        "dare_linear": "spunge.merging.rules:dare_linear",
        "dare_ties": "spunge.merging.rules:dare_ties",
        "della": "spunge.merging.rules:della",
        "breadcrumbs": "spunge.merging.rules:breadcrumbs",
        "sce": "spunge.merging.rules:sce",
        "slerp": "spunge.merging.rules:slerp",
    },
)
EVALUATORS = Registry(
    "evaluate.kind",
    "evaluator",
    "spunge.evaluators",
    {
        "choices": "spunge.evaluation.choices:Choices",
        "perplexity": "spunge.evaluation.perplexity:Perplexity",
        "toxicity": "spunge.evaluation.toxicity:Toxicity",
        "harm": "spunge.evaluation.harm:Harm",
        "fluency": "spunge.evaluation.fluency:Fluency",
        "similarity": "spunge.evaluation.similarity:Similarity",
        "lm_eval": "spunge.evaluation.benchmarks:Benchmarks",
        "audit": "spunge.evaluation.audit:Audit",
    },
)
