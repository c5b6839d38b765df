"""What can be named in a recipe, each imported only when it is used.

A name is one of the lines below, one from an installed package's entry points (groups `spunge.methods`, `spunge.rules` and so
on), or `path/to/file.py:NAME` for a file of your own. Behind each name is one frozen dataclass: its settings class, its source,
its functions, and what it need not have as fields with defaults.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from spunge.errors import RecipeError, suggestion

if TYPE_CHECKING:
    from spunge.data.attribution import AttributeSource
    from spunge.evaluation.attacks.attack import Attack
    from spunge.evaluation.evaluator import Evaluator
    from spunge.evaluation.scorers.scorer import Scorer
    from spunge.merging.rule import Rule
    from spunge.recipe.block import Strict
    from spunge.run.executors.executor import Executor
    from spunge.run.trackers.tracker import Tracker
    from spunge.unlearning.method import Method


class Value(Protocol):
    """What every registered value has, whatever its registry."""

    @property
    def settings(self) -> "type[Strict]":
        """The class of its settings in a recipe."""

    @property
    def source(self) -> str:
        """Paper or package."""

    @property
    def summary(self) -> str:
        """One sentence."""

    @property
    def version(self) -> int:
        """Rises when the same settings give another result."""


T = TypeVar("T", bound=Value)


@dataclass(frozen=True, eq=False)
class Registry(Generic[T]):
    setting: str  # the recipe's key, for errors
    noun: str
    group: str  # entry-point group
    kind: str  # "module:class" of the values
    builtin: Mapping[str, str]  # name -> "module:object"

    def names(self) -> list[str]:
        """Built-in names, then those that installed packages add."""
        return [*self.builtin, *self._added()]

    def get(self, name: str) -> T:
        """The value behind a name. Raises RecipeError for a name that nobody has, or of something else."""
        if name in self.builtin:
            value: Any = _load(self.builtin[name])
        elif ".py:" in name:
            value = self._from_file(name)
        elif name in (added := self._added()):
            value = self._imported(name, added[name])
        else:
            raise RecipeError(f"{self.setting}: no {self.noun} {name!r}{suggestion(name, self.names())}")
        kind = _load(self.kind)
        if not isinstance(value, kind):
            raise RecipeError(
                f"{self.setting}: {name!r} is no {self.noun}; it must be a value made by {kind.__name__}(...)"
            )
        return cast(T, value)

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its value."""
        for name in self.names():
            yield name, self.get(name)

    def version(self, name: str) -> str:
        """What a result depends on beyond the settings: the value's own `version`, or its file's content."""
        if ".py:" in name:
            return hashlib.sha256(self._file(name).read_bytes()).hexdigest()[:16]
        return str(self.get(name).version)

    def _added(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.builtin}

    def _imported(self, name: str, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise RecipeError(
                f"{self.setting}: {name!r} of the package {package} cannot be imported ({_told(error)})"
            ) from error

    def _file(self, name: str) -> Path:
        path = name.rpartition(":")[0]
        file = Path(os.path.expanduser(path)).resolve()
        if not os.path.isfile(file):
            raise RecipeError(f"{self.setting}: no file {path!r}; give path/to/file.py:NAME")
        return file

    def _from_file(self, name: str) -> Any:
        path, _, attribute = name.rpartition(":")
        content = vars(self._module(self._file(name), path))
        if attribute not in content:
            raise RecipeError(f"{self.setting}: {path!r} has no {attribute!r}{suggestion(attribute, content)}")
        return content[attribute]

    def _module(self, file: Path, path: str) -> ModuleType:
        """The file as a module. Its name holds its content, so that an edited file is never taken for what it was."""
        source = file.read_bytes()
        digest = hashlib.sha256(str(file).encode() + b"\0" + source).hexdigest()
        name = f"spunge_file_{digest[:16]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise RecipeError(f"{self.setting}: {path!r} cannot be imported as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            # Not by the loader: it would take compiled code of the same size and second for this file's.
            exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))  # noqa: S102 - the user named it
        except Exception as error:
            del sys.modules[name]
            raise RecipeError(f"{self.setting}: {path!r} cannot be imported ({_told(error)})") from error
        return module


def summary_of(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return vars(importlib.import_module(module))[attribute]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


METHODS: "Registry[Method[Any]]" = Registry(
    "unlearn.method",
    "method",
    "spunge.methods",
    "spunge.unlearning.method:Method",
    {
        "rmu": "spunge.unlearning.rmu.rmu:RMU",
        "tvn": "spunge.unlearning.tvn:TVN",
        "sku": "spunge.unlearning.sku:SKU",
        "ga": "spunge.unlearning.ga:GA",
        "graddiff": "spunge.unlearning.graddiff:GRADDIFF",
        "npo": "spunge.unlearning.npo:NPO",
        "simnpo": "spunge.unlearning.simnpo:SIMNPO",
        "dpo": "spunge.unlearning.dpo:DPO",
        "idk": "spunge.unlearning.idk:IDK",
        "undial": "spunge.unlearning.undial:UNDIAL",
        "wga": "spunge.unlearning.wga:WGA",
        "satimp": "spunge.unlearning.satimp:SATIMP",
        "ce_u": "spunge.unlearning.ce_u:CE_U",
        "me_gd": "spunge.unlearning.me_gd:ME_GD",
        "idk_ap": "spunge.unlearning.idk_ap:IDK_AP",
        "llmu": "spunge.unlearning.llmu:LLMU",
        "altpo": "spunge.unlearning.altpo:ALTPO",
        "pdu": "spunge.unlearning.pdu:PDU",
        "whp": "spunge.unlearning.whp:WHP",
        "rr": "spunge.unlearning.rr:RR",
        "elm": "spunge.unlearning.elm:ELM",
        "kga": "spunge.unlearning.kga:KGA",
        "eul": "spunge.unlearning.eul:EUL",
        "lat": "spunge.unlearning.lat:LAT",
        "tar": "spunge.unlearning.tar:TAR",
        "quark": "spunge.unlearning.quark:QUARK",
        "demem": "spunge.unlearning.demem:DEMEM",
        "gedi": "spunge.unlearning.gedi:GEDI",
        "precomputed": "spunge.unlearning.precomputed:PRECOMPUTED",
    },
)
RULES: "Registry[Rule]" = Registry(
    "merge.rule",
    "rule",
    "spunge.rules",
    "spunge.merging.rule:Rule",
    {
        "ties": "spunge.merging.rules:ties",
        "ties_norm": "spunge.merging.rules:ties_norm",
        "task_arithmetic": "spunge.merging.rules:task_arithmetic",
        "average": "spunge.merging.rules:average",
        "weighted_sum": "spunge.merging.rules:weighted_sum",
        "consensus": "spunge.merging.rules:consensus",
        "dare_linear": "spunge.merging.rules:dare_linear",
        "dare_ties": "spunge.merging.rules:dare_ties",
        "della": "spunge.merging.rules:della",
        "della_linear": "spunge.merging.rules:della_linear",
        "breadcrumbs": "spunge.merging.rules:breadcrumbs",
        "breadcrumbs_ties": "spunge.merging.rules:breadcrumbs_ties",
        "sce": "spunge.merging.rules:sce",
        "slerp": "spunge.merging.rules:slerp",
        "nuslerp": "spunge.merging.spheres:nuslerp",
        "multislerp": "spunge.merging.spheres:multislerp",
        "karcher": "spunge.merging.spheres:karcher",
        "model_stock": "spunge.merging.spheres:model_stock",
        "tsv": "spunge.merging.spectral:tsv",
        "iso_c": "spunge.merging.spectral:iso_c",
        "fisher": "spunge.merging.moments:fisher",
        "regmean": "spunge.merging.moments:regmean",
        "nearswap": "spunge.merging.towards_one:nearswap",
        "arcee_fusion": "spunge.merging.towards_one:arcee_fusion",
    },
)
EVALUATORS: "Registry[Evaluator[Any]]" = Registry(
    "evaluate.kind",
    "evaluator",
    "spunge.evaluators",
    "spunge.evaluation.evaluator:Evaluator",
    {
        "choices": "spunge.evaluation.choices:CHOICES",
        "perplexity": "spunge.evaluation.perplexity:PERPLEXITY",
        "toxicity": "spunge.evaluation.toxicity:TOXICITY",
        "harm": "spunge.evaluation.harm:HARM",
        "refusal": "spunge.evaluation.refusal:REFUSAL",
        "leakage": "spunge.evaluation.leakage:LEAKAGE",
        "fluency": "spunge.evaluation.fluency:FLUENCY",
        "similarity": "spunge.evaluation.similarity:SIMILARITY",
        "lm_eval": "spunge.evaluation.benchmarks:BENCHMARKS",
        "memorization": "spunge.evaluation.memorization:MEMORIZATION",
        "match": "spunge.evaluation.match:MATCH",
        "membership": "spunge.evaluation.membership:MEMBERSHIP",
        "audit": "spunge.evaluation.audit:AUDIT",
    },
)
ATTACKS: "Registry[Attack[Any]]" = Registry(
    "evaluate.attack.kind",
    "attack",
    "spunge.attacks",
    "spunge.evaluation.attacks.attack:Attack",
    {
        "relearn": "spunge.evaluation.attacks.relearning:RELEARN",
        "quantise": "spunge.evaluation.attacks.quantisation:QUANTISE",
        "reword": "spunge.evaluation.attacks.rewording:REWORD",
        "prefix": "spunge.evaluation.attacks.prefixing:PREFIX",
        "probe": "spunge.evaluation.attacks.hidden:PROBE",
        "lens": "spunge.evaluation.attacks.lens:LENS",
        "ablate": "spunge.evaluation.attacks.direction:ABLATE",
        "suffix": "spunge.evaluation.attacks.suffix:SUFFIX",
        "membership": "spunge.evaluation.attacks.membership:MEMBERSHIP",
    },
)
SCORERS: "Registry[Scorer[Any]]" = Registry(
    "evaluate.scorer",
    "scorer",
    "spunge.scorers",
    "spunge.evaluation.scorers.scorer:Scorer",
    {
        "classifier": "spunge.evaluation.scorers.classifiers:CLASSIFIER",
        "probe": "spunge.evaluation.scorers.probe:PROBE",
        "alt-profanity-check": "spunge.evaluation.scorers.profanity:PROFANITY",
        "keywords": "spunge.evaluation.scorers.keywords:KEYWORDS",
        "judge": "spunge.evaluation.scorers.judge:JUDGE",
        "rouge": "spunge.evaluation.scorers.likeness:ROUGE",
        "bleu": "spunge.evaluation.scorers.likeness:BLEU",
        "similarity": "spunge.evaluation.scorers.likeness:SIMILARITY",
    },
)
ATTRIBUTES: "Registry[AttributeSource[Any]]" = Registry(
    "split.by.kind",
    "attribute source",
    "spunge.attributes",
    "spunge.data.attribution:AttributeSource",
    {
        "sql": "spunge.data.attribution:SQL",
        "keywords": "spunge.data.keywords:KEYWORDS",
        "clusters": "spunge.evaluation.attributes.clusters:CLUSTERS",
        "classifier": "spunge.evaluation.attributes.classifier:CLASSIFIER",
        "zero_shot": "spunge.evaluation.attributes.zero_shot:ZERO_SHOT",
    },
)
EXECUTORS: "Registry[Executor[Any]]" = Registry(
    "execution.kind",
    "executor",
    "spunge.executors",
    "spunge.run.executors.executor:Executor",
    {
        "here": "spunge.run.executors.here:HERE",
        "processes": "spunge.run.executors.processes:PROCESSES",
        "ray": "spunge.run.executors.cluster:RAY",
        "sharded": "spunge.run.executors.sharded:SHARDED",
    },
)
TRACKERS: "Registry[Tracker[Any]]" = Registry(
    "track.kind",
    "tracker",
    "spunge.trackers",
    "spunge.run.trackers.tracker:Tracker",
    {
        "tensorboard": "spunge.run.trackers.tensorboard:TENSORBOARD",
        "wandb": "spunge.run.trackers.wandb:WANDB",
        "mlflow": "spunge.run.trackers.mlflow:MLFLOW",
        "trackio": "spunge.run.trackers.trackio:TRACKIO",
    },
)
