"""What an unlearning method is: one class with its settings, its source, and a function from a task to a branch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from spunge.data.samples import Samples
from spunge.model.loading import Base
from spunge.recipe.schema import MethodSettings
from spunge.weights.delta import Change

Store = dict[tuple[object, ...], dict[int, Tensor]]  # what, of which texts -> row -> (t, d)


def ignore_progress(step: int, steps: int, loss: float) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Task:
    """One branch's work: forget these parts, each with a seed of its own. The joint control has all parts, a branch one."""

    base: Base
    parts: Mapping[str, Samples]  # attribute value -> its samples
    retain: Samples | None
    seeds: Mapping[str, int]  # attribute value -> its seed, the same in its branch and in the joint control
    log: Path | None = None  # one JSON line a step
    state: Path | None = None  # where a training run keeps its state, and takes up what it finds
    save_seconds: float = 300.0  # at least so long between two saves
    progress: Callable[[int, int, float], None] = ignore_progress
    # Activations of the model that it starts from, shared by the tasks that start there; None: none are kept.
    kept: Store | None = None

    @property
    def seed(self) -> int:
        return sum(self.seeds.values()) % (1 << 63)


@dataclass(frozen=True)
class Branch:
    """What a method changed, by checkpoint tensor name, and how it went."""

    changes: Mapping[str, Change]
    steps: int
    losses: Mapping[str, float]  # mean of each logged term over the last tenth of the steps
    stopped: str | None = None  # why before the last step, if so
    notes: Mapping[str, Any] = field(default_factory=dict)


class Settled(NamedTuple):
    """What a method chose where its settings said `auto`."""

    settings: Any
    notes: Mapping[str, Any]  # in a few words, for delta.json and the report
    measured: list[dict[str, Any]]  # what the choice was made from, for RUN/settled.json


class Method(Protocol):
    """`summary` is the class's docstring. `version` rises when the same settings give another delta.

    A method may also have:
    `settle(base, parts, retain, settings, seed) -> Settled`, called once per run, before its first training, when some
    setting is `auto`; all branches and controls of the run then have the settings that it gives;
    `last_block(settings, depth) -> int | None`: the last block that training needs; where it is not None, `task.base`
    may be the model's first blocks alone, without its output layer;
    `inputs(settings, values, all_values) -> Any`: what a job of some parts' values depends on beyond settings and rows,
    JSON-able, and `settings.stored_entries(checkpoint)`, how many numbers a branch holds, for methods that train nothing.
    """

    Settings: ClassVar[type[MethodSettings]]  # with `steps_of(rows)`, `batch_size`, `accumulation` and `max_length`
    source: ClassVar[str]
    needs_retain: ClassVar[bool]  # or a function of the settings
    version: ClassVar[int]

    @staticmethod
    def passes(settings: Any, depth: int) -> float:
        """Forward passes of a whole model of `depth` blocks that one forget sample costs, for estimates."""
        ...

    @staticmethod
    def unlearn(task: Task, settings: Any) -> Branch:
        """Leaves `task.base` exactly as it was."""
        ...
