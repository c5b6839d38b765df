"""What a recipe trains and which models come of it: branches, controls, the merged model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spunge.data.split import Part, random_parts
from spunge.errors import RecipeError
from spunge.files import read_json
from spunge.merging.values import merged_values
from spunge.model.loading import Base
from spunge.recipe.decoding import DExperts
from spunge.recipe.merging import Control, RuleSettings
from spunge.recipe.training import MethodSettings
from spunge.registry import METHODS, RULES
from spunge.results import UNTAUGHT, Kind
from spunge.run.given import Given
from spunge.run.inputs import SeedInputs
from spunge.unlearning.loop import TrainingSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.overlay import applied, as_written, overlaid, swapped
from spunge.weights.rounding import Storage
from spunge.weights.sources import DeltaSource

EXPERT = "expert"


@dataclass(frozen=True)
class Training:
    """The unlearning of one part, or of several at once."""

    name: str  # branch:SLUG, control:joint, control:random/random-1 ...
    folder: Path
    parts: tuple[Part, ...]
    after: "Training | None" = None  # it starts from the model that this one left, not from the base
    own: tuple[tuple[str, float], ...] = ()  # learning_rate and steps of a joint control's own

    def settings(self, unlearn: MethodSettings) -> MethodSettings:
        """What it is trained with: the recipe's settings, but for its own."""
        own: dict[str, Any] = dict(self.own)
        if "steps" in own:
            own |= {"epochs": None} if len(self.parts) == 1 else {"joint_steps": own.pop("steps")}
        return unlearn.model_copy(update=own)

    @property
    def earlier(self) -> "list[Training]":
        """Those whose deltas lie over the base when it starts, the first one first."""
        return [] if self.after is None else [*self.after.earlier, self.after]


@dataclass(frozen=True)
class Model:
    """A model that is judged: the base with the deltas of some trainings, merged by a rule or laid one over the other."""

    kind: Kind
    label: str  # a branch's value, a control's name, else the kind
    name: str  # base, branch:SLUG, control:NAME, merged
    trainings: tuple[Training, ...] = ()
    merge: RuleSettings | None = None
    folder: Path | None = None  # of the merged model, which is a checkpoint
    alone: Callable[[], Path] | None = (
        None  # the folder of one that stands beside the base, where the run makes it or is told it
    )
    given: Given | None = None  # one that is judged as it is
    storage: Storage = field(
        default_factory=Storage
    )  # what a checkpoint of it would be written in, where no rule says so
    scale: float = 1.0  # of the deltas, where no rule merges them
    calibration: Path | None = None  # the file that says its scale, where that is calibrated
    expert: Training | None = None  # beside it, where it is judged as dexperts
    apart: bool = False  # its trainings stay models of their own, which shift the logits of a larger one (`decode`)

    @property
    def shifting(self) -> "list[Model]":
        """The small models that shift a larger one's logits for it: itself, or one of each training."""
        if not self.apart:
            return [replace(self, expert=None)]
        return [
            replace(self, expert=None, trainings=(training,), merge=None, apart=False) for training in self.trainings
        ]

    @property
    def shared(self) -> bool:
        """Whether it is the same for every seed."""
        return self.kind in ("base", "reference", "model")

    def scaled(self, scale: float) -> "Model":
        """The same at another scale, laid together in memory."""
        if self.merge is None:
            return replace(self, scale=scale, calibration=None)
        return replace(self, merge=self.merge.model_copy(update={"scale": scale}), folder=None, calibration=None)

    @property
    def settled(self) -> "Model":
        """At the scale that was calibrated for it, where one was."""
        if self.calibration is None:
            return self
        return replace(self.scaled(read_json(self.calibration)["scale"]), folder=self.folder)

    @property
    def by_itself(self) -> Path | None:
        """The folder of a model that is loaded by itself, and not laid over the base."""
        if self.given is not None:
            return self.given.folder if self.given.whole else None
        return self.alone() if self.alone else None

    def laid_over(self, base: Base) -> AbstractContextManager[None]:
        """Inside the block, the base in memory holds this model's values: those in its files, or that its files would hold."""
        if self.folder is not None:
            report = read_json(self.folder.parent / "merge.json") or {}
            merged, plain = Checkpoint(self.folder), Checkpoint(base.folder)
            retyped = [name for name, info in merged.tensors.items() if info.dtype != plain.tensors[name].dtype]
            return swapped(base.parameters, merged, dict.fromkeys([*report["tensors"], *retyped]))
        return overlaid(base.parameters, self.values(base.folder))

    def values(self, base: Path) -> Iterator[tuple[str, Tensor]]:
        """Of a model without files of its own: the tensors that differ from the base's, as files would hold them, one by one."""
        if self.given is not None:
            added = RULES.get("task_arithmetic").settings.model_validate({"rule": "task_arithmetic"})
            return merged_values(base, [self.given.over(base)], added)
        if self.calibration is not None:
            return self.settled.values(base)
        if self.merge is None:
            deltas = [open_delta(training.folder) for training in self.trainings]
            return as_written(Checkpoint(base), deltas, self.storage, self.scale)
        return merged_values(base, delta_sources(self.trainings), self.merge)


@contextmanager
def stacked(trainings: "tuple[Training, ...] | list[Training]", base: Base) -> Iterator[None]:
    """Inside the block, the deltas of some trainings lie over the base, one over the other."""
    with ExitStack() as layers:
        for training in trainings:
            layers.enter_context(applied(base.parameters, open_delta(training.folder)))
        yield


def delta_sources(trainings: "tuple[Training, ...]") -> list[DeltaSource]:
    """Deltas that are to be merged."""
    return [DeltaSource(open_delta(training.folder), training.parts[0].value) for training in trainings]


@dataclass(frozen=True)
class Lineup:
    """What one seed trains and judges, in order. `folder`: RUN, or RUN/seeds/SEED for a further seed."""

    inputs: SeedInputs
    folder: Path
    trainings: tuple[Training, ...]
    models: tuple[Model, ...]


def calibration_file(folder: Path, model: str) -> Path:
    return folder / "calibration" / f"{model.replace(':', '-')}.json"


def lineup(inputs: SeedInputs, folder: Path, written: bool = True) -> Lineup:
    """The branches and controls of a recipe, and the models that come of them. written: the merged model becomes a checkpoint;
    else it is only laid together in memory, with the same values."""
    recipe, parts = inputs.recipe, inputs.parts.parts

    def calibration(name: str) -> Path | None:
        return calibration_file(folder, name) if recipe.calibrate is not None else None

    apart = recipe.decode is not None and recipe.decode.merge != "weights"
    storage = Storage(recipe.merge.dtype, recipe.merge.rounding)
    unlearned = parts if recipe.unlearn is not None else ()
    branches = tuple(Training(f"branch:{part.slug}", folder / "branches" / part.slug, (part,)) for part in unlearned)
    models = [Model("base", "base", "base")]
    if recipe.teach is not None:
        models.append(Model("reference", UNTAUGHT, UNTAUGHT, alone=lambda: inputs.base.untaught))
    if (asked := recipe.reference) is not None:
        given = inputs.base.given_reference
        made = None if given else lambda: inputs.base.retrained
        models.append(Model("reference", asked.name, f"reference:{asked.name}", alone=made, given=given))
    models += [Model("model", name, f"model:{name}", given=given) for name, given in inputs.base.judged_models.items()]
    for part, branch in zip(unlearned, branches, strict=True):
        models.append(Model("branch", part.value, branch.name, (branch,), storage=storage))
    trainings = {branch.name: branch for branch in branches}
    for control in recipe.controls:
        own = branches if control.train == "parts" else _trainings(control, inputs, folder / "controls")
        trainings |= {training.name: trainings.get(training.name, training) for training in own}
        merge = recipe.merge if control.train == "random" and control.merge is None else control.merge
        chosen = tuple(trainings[training.name] for training in own)
        name = f"control:{control.name}"
        own_apart = apart and control.train == "random" and control.merge is None
        models.append(
            Model(
                "control",
                control.name,
                name,
                chosen,
                merge,
                storage=storage,
                calibration=calibration(name),
                apart=own_apart,
            )
        )
    if recipe.unlearn is not None:
        scale, merged = calibration("merged"), folder / "merged" if written and not apart else None
        models.append(
            Model(
                "merged",
                "merged",
                "merged",
                branches,
                recipe.merge,
                merged,
                storage=storage,
                calibration=scale,
                apart=apart,
            )
        )
    if (expert := _expert(inputs, folder)) is not None:
        trainings[expert.name] = expert
        models = [replace(model, expert=expert) if model.trainings else model for model in models]
    return Lineup(inputs, folder, tuple(trainings.values()), tuple(models))


def _of_its_own(control: Control, inputs: SeedInputs, folder: Path) -> Training:
    """A joint training with other settings than the recipe's. Raises RecipeError where there is nothing to train, and where a
    control without its own would be trained under the same name."""
    if not isinstance(inputs.unlearn, TrainingSettings):
        raise RecipeError(
            f"controls.{control.name}.{next(iter(control.own))}: {inputs.unlearn.method} trains nothing; leave it out"
        )
    plain = [each.name for each in inputs.recipe.controls if each.train == "joint" and not each.own]
    if control.name == "joint" and plain:
        raise RecipeError(
            f"controls: joint has its own {next(iter(control.own))} and {plain[0]} the recipe's; give the first another name"
        )
    own = tuple(control.own.items())
    return Training(f"control:{control.name}", folder / control.name, inputs.parts.parts, own=own)


def _expert(inputs: SeedInputs, folder: Path) -> Training | None:
    """The training on the rows to keep, where the recipe decodes by experts."""
    decode = inputs.recipe.decode
    if not isinstance(decode, DExperts) or decode.expert != "retain" or inputs.retain is None:
        return None
    part = Part(EXPERT, EXPERT, len(inputs.retain), inputs.retain)
    return Training(EXPERT, folder / EXPERT, (part,))


def _trainings(control: Control, inputs: SeedInputs, folder: Path) -> tuple[Training, ...]:
    """The trainings that a control is made from."""
    recipe, parts = inputs.recipe, inputs.parts.parts
    if control.own:
        return (_of_its_own(control, inputs, folder),)
    if control.train == "joint":
        return (Training("control:joint", folder / "joint", parts),)
    if control.train == "random":
        dealt = random_parts(parts, recipe.seed)
        return tuple(Training(f"control:random/{part.slug}", folder / "random" / part.slug, (part,)) for part in dealt)
    if not METHODS.get(inputs.unlearn.method).trains:
        raise RecipeError(
            f"controls: {inputs.unlearn.method} trains nothing, so its branches all start from the base; leave `sequential` out"
        )
    links: list[Training] = []
    for part in parts:
        name, own = f"control:sequential/{part.slug}", folder / "sequential" / part.slug
        links.append(Training(name, own, (part,), links[-1] if links else None))
    return tuple(links)
