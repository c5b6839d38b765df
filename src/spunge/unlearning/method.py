"""What an unlearning method is: a value that holds its settings class, its source, and a function from a task to a branch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from spunge.data.samples import Samples
from spunge.model.loading import Base
from spunge.progress import SILENT, Steps
from spunge.recipe.training import MethodSettings
from spunge.registry import summary_of
from spunge.unlearning.calls import FORGET, Group, Writing
from spunge.unlearning.watching import Watch, Watched
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change

S = TypeVar("S", bound=MethodSettings)

Store = dict[tuple[object, ...], dict[int, Tensor]]  # what, of which texts -> row -> (t, d)


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
    progress: Steps = SILENT.step
    setting: str = "unlearn"  # the recipe's block that asks for it, for errors
    # Activations of the model that it starts from, shared by the tasks that start there; None: none are kept.
    kept: Store | None = None
    decouple: Samples | None = None  # of the prompt-decouple term
    watch: Watch | None = None  # what it is measured by on its way
    common: int = 0  # a seed of what all branches and controls of a run begin with

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
    watched: Watched | None = None  # where its task has a watch; `steps` is then the step that is kept


class Settled(NamedTuple):
    """What a method chose where its settings said `auto`."""

    settings: MethodSettings
    notes: Mapping[str, Any]  # in a few words, for delta.json and the report
    measured: list[dict[str, Any]]  # what the choice was made from, for RUN/settled.json


class Told(NamedTuple):
    """What others answered to a method."""

    content: Any  # JSON-able
    about: Mapping[str, Any]  # how it came to be, JSON-able too
    outcome: str  # in a few words


@dataclass(frozen=True)
class Asking(Generic[S]):
    """What a method asks of others over the network, once a run, before anything is trained; where the recipe says so and never
    else. The answer is kept in RUN/NAME.json, and RUN/NAME-asked.json says how it came to be."""

    name: str
    wanted: Callable[[S], bool]  # whether the recipe asks for it
    inputs: Callable[[Mapping[str, Samples], S], Mapping[str, Any]]  # what the answer depends on; JSON-able
    sent: Callable[[Mapping[str, Samples], S], str]  # in a sentence, what would be sent where now; empty where nothing
    ask: Callable[[Mapping[str, Samples], S, Steps], Told]  # raises RecipeError where there is no answer
    # (settings, the answer's content, a training's parts) -> settings with what of the answer the parts need, and `wanted` no more.
    # Raises ValueError for content that is no answer.
    settled: Callable[[S, Any, Mapping[str, Samples]], S]


def every_entry(_settings: Any, base: Checkpoint) -> int:
    """Of a method that may change every tensor."""
    return sum(info.numel for info in base.tensors.values())


@dataclass(frozen=True)
class Method(Generic[S]):
    """An unlearning method. The first line of `unlearn`'s docstring is what lists say of it."""

    settings: type[S]  # of a method that trains, a TrainingSettings
    source: str  # the paper
    unlearn: Callable[[Task, S], Branch]  # leaves task.base exactly as it was
    trains: bool = True  # False: it brings branches that were made from the base before
    needs_retain: Callable[[S], bool] = lambda settings: False  # whether the recipe must have retain rows
    # For plans. (settings, depth) -> the calls of a step: by default one on the forget samples, and its gradient.
    # (settings, base) -> entries that a branch stores at the most.
    calls: Callable[[S, int], list[Group]] = lambda settings, depth: [(FORGET,)]
    stored_entries: Callable[[S, Checkpoint], int] = every_entry
    # For plans too. Float32 copies of what is trained that a step holds beside values, gradients and the optimizer's state; and
    # (samples of a part, settings, passes over them) -> what the base writes first, or the model on its way.
    copies: int = 0
    writing: Callable[[Samples, S, float], Writing] = lambda samples, settings, passes: Writing()
    # (settings, samples of each part, retain samples) -> optimizer steps in which copies of the base are trained before the first.
    copying: Callable[[S, Mapping[str, int], int], int] = lambda settings, rows, retain: 0
    # (settings, depth) -> the last block that training needs: `task.base` may then be the model's first blocks alone, without
    # its output layer. None: all of the model.
    last_block: Callable[[S, int], int | None] | None = None
    # (base, parts, retain, settings, seed): called once per run, before its first training, where a setting is `auto`. All
    # branches and controls then have the settings that it gives.
    settle: Callable[[Base, Mapping[str, Samples], Samples | None, S, int], Settled] | None = None
    asking: Asking[S] | None = None
    # (parts, retain, settings): raises RecipeError for rows that it cannot be trained on; called before anything is made.
    refuse: Callable[[Mapping[str, Samples], Samples | None, S], None] = lambda parts, retain, settings: None
    # (settings, values of a training's parts, values of all parts) -> what its delta depends on beyond settings and rows, such
    # as the content of files of its own. JSON-able.
    inputs: Callable[[S, Sequence[str], Sequence[str]], Mapping[str, Any]] | None = None
    # (settings): raises RecipeError where something beside the rows is missing, such as a scorer; called before anything is made.
    check: Callable[[S], None] = lambda settings: None
    # (settings, base): raises RecipeError for a base that it cannot train; called before anything is trained.
    refuse_base: Callable[[S, Checkpoint], None] = lambda settings, base: None
    # (samples, settings, tokenizer) -> what it is given of a part's samples, by name where that is not the samples themselves:
    # `spunge split --show` shows them.
    given: Callable[[Samples, S, Any], Mapping[str, Samples]] = lambda samples, settings, tokenizer: {"": samples}
    # Several processes can train it together (`execution: {kind: sharded}`): it calls the model as a whole, by `outputs`, as often
    # in one process as in another, and trains what `training` gives it in the `Loop`.
    shares: bool = False
    # It can be trained through a larger model's logits (`decode.through: sum`): its losses are of `Session.outputs` and of the
    # base's likelihoods and distributions alone, and what was trained is what is unlearned.
    through: bool = False
    version: int = 1  # rises when the same settings give another delta

    @property
    def summary(self) -> str:
        return summary_of(self.unlearn)
