"""The stages that take second moments of a branch on its own rows, for merge rules that need them; kept beside its delta."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from spunge.errors import RecipeError
from spunge.files import fingerprint
from spunge.merging.measuring import gradient_moments, input_moments, rows_of
from spunge.merging.moments import taking
from spunge.model.architecture import DOWN_PROJECTIONS
from spunge.model.loading import arithmetic
from spunge.recipe.merging import RuleSettings
from spunge.recipe.training import LoRA, Selected
from spunge.registry import METHODS, RULES
from spunge.run.costs import LETTERS_PER_TOKEN, merging_cost
from spunge.run.graph import Cost, Made
from spunge.run.keys import flattened
from spunge.run.models import Lineup, Model, Training
from spunge.run.session import Session
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.header import TensorInfo
from spunge.weights.moments import Kind, moment_files, write_moments
from spunge.weights.rounding import Storage
from spunge.weights.sources import DeltaSource

VERSION = 1  # rises when the same settings give other moments


@dataclass(frozen=True)
class Wanted:
    """Moments of one branch. others: the trainings that it is merged with, itself among them."""

    training: Training
    others: tuple[Training, ...]
    kind: Kind
    settings: dict[str, Any]
    lineup: Lineup

    @property
    def name(self) -> str:
        """`moments:branch:europe/inputs-3f0a12bc`, without its seed's mark."""
        return f"moments:{self.training.name}/{self.files[0].stem.removeprefix('moments-')}"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.training.folder / name for name in moment_files(self.kind, self.settings))

    @property
    def names(self) -> frozenset[str]:
        """The tensors that any of the trainings changed, which must be done."""
        return frozenset(name for training in self.others for name in open_delta(training.folder).tensors)


def wanted_of(model: Model, line: Lineup) -> Iterator[Wanted]:
    """What a model's rule needs beside the deltas: moments of each of its trainings."""
    if model.merge is not None and not model.apart and (kind := RULES.get(model.merge.rule).moments) is not None:
        for training in model.trainings:
            yield Wanted(training, model.trainings, kind, taking(model.merge), line)


def refuse_moments(line: Lineup) -> None:
    """Raises RecipeError, before anything is trained, for merges whose rule cannot have its moments."""
    for model in line.models:
        if model.merge is None or (kind := RULES.get(model.merge.rule).moments) is None:
            continue
        if any(training.after is not None for training in model.trainings):
            raise RecipeError(
                f"controls: rule {model.merge.rule!r} merges models that all began from the base, but those of "
                "`train: sequential` began from one another; name another rule for it"
            )
        if line.inputs.recipe.model.device_map is not None:
            raise RecipeError(
                f"model.device_map: rule {model.merge.rule!r} takes moments of the weights themselves, whole on one device; leave "
                "one of the two out"
            )
        base = line.inputs.base
        if kind == "gradients" and base.untaught.is_dir() and arithmetic(base.untaught, base.judged) == torch.float16:
            raise RecipeError(
                f"model.dtype: float16 loses most squared gradients, and rule {model.merge.rule!r} needs them; "
                "give bfloat16 or float32"
            )


def moments_inputs(wanted: Wanted) -> dict[str, Any]:
    """What a branch's moments depend on beside its delta."""
    inputs = wanted.lineup.inputs
    content = {
        **flattened("merge.moments", wanted.settings),
        "kind": wanted.kind,
        "moments' version": VERSION,
        # Its content: another run's training of the same key may differ in its last bits.
        "delta": DeltaSource(open_delta(wanted.training.folder)).fingerprint,
        "tensors": fingerprint(sorted(wanted.names)),
        "arithmetic": inputs.base.judged.dtype,
        **flattened("merge", _storage(inputs.recipe.merge)._asdict()),
    }
    content |= {f"part {part.value}": part.samples.sha256 for part in wanted.training.parts}
    return content | ({"seed": inputs.recipe.seed} if wanted.settings.get("labels") == "sampled" else {})


def _storage(merge: RuleSettings) -> Storage:
    return Storage(merge.dtype, merge.rounding)


def take_moments(wanted: Wanted, session: Session) -> Made:
    """Of the branch as it is judged: with the values that a checkpoint of it would hold."""
    inputs, training = wanted.lineup.inputs, wanted.training
    storage = _storage(inputs.recipe.merge)
    base = session.itself(Model("branch", training.name, training.name, (training,), storage=storage))
    samples = [part.samples for part in training.parts]
    rows = rows_of(samples, base, wanted.settings["rows"], wanted.settings["max_length"])
    if wanted.kind == "gradients":
        labels = wanted.settings["labels"]
        taken = gradient_moments(base, rows, wanted.names, labels, inputs.recipe.seed, session.step)
    else:
        taken = input_moments(base, rows, wanted.names, session.step)
    if bad := [name for name, value in taken.tensors.items() if not bool(torch.isfinite(value).all())]:
        raise RecipeError(
            f"merge.rule: second moments of {training.name} are not finite at {bad[0]!r}; lower unlearn.learning_rate"
        )
    source = DeltaSource(open_delta(training.folder))
    files = write_moments(source, wanted.kind, wanted.settings, taken.tensors, taken.info)
    return Made(files, f"{len(taken.tensors)} tensors on {len(rows)} rows")


# ---- what they take


def moments_cost(wanted: Wanted) -> Cost:
    """Gradients: as large as the tensors themselves, for a pass with a gradient of each row. Inputs: a matrix of inputs by inputs
    for each layer, for a pass without."""
    infos = changed_infos(wanted.lineup)
    tokens = float(sum(_tokens(part.samples, wanted.settings) for part in wanted.training.parts))
    entries = float(sum(map(_squared if wanted.kind == "inputs" else _plain, infos)))
    if wanted.kind == "inputs":
        return Cost(tokens=tokens, kept=4 * entries, held=4 * entries)
    return Cost(tokens=3 * tokens, kept=4 * entries, held=8 * entries)


def merged_cost(line: Lineup) -> Cost:
    """Of the merge that is written; by inputs' moments, with what the largest layer takes in float64 and the products of all."""
    cost = merging_cost(line)
    if RULES.get(line.inputs.recipe.merge.rule).moments != "inputs":
        return cost
    infos = changed_infos(line)
    held = max((24.0 * _squared(info) + 32.0 * info.numel for info in infos), default=0.0)
    branches = len(line.models[-1].trainings)
    products = sum(2.0 * (branches + 1) * info.numel * info.shape[-1] + float(info.shape[-1]) ** 3 for info in infos)
    return replace(cost, held=held, products=products)


def changed_infos(line: Lineup) -> Sequence[TensorInfo]:
    """About which matrices a branch changes, told by their names."""
    unlearn, checkpoint = line.inputs.unlearn, Checkpoint(line.inputs.base.untaught)
    what = dict(unlearn).get("trainable")
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    if isinstance(what, Selected):
        return [info for info in matrices if any(fnmatch(info.name, match) for match in what.match)]
    if isinstance(what, LoRA):
        named = what.targets if isinstance(what.targets, list) else ["q_proj", "v_proj", "query_key_value", "c_attn"]
        inside = [info for info in matrices if info.name not in checkpoint.embeddings]
        return [info for info in inside if what.targets == "all-linear" or any(f".{n}." in info.name for n in named)]
    entries = METHODS.get(unlearn.method).stored_entries(unlearn, checkpoint)
    if entries < sum(info.numel for info in matrices):  # a few of the output projections
        matrices = [info for info in matrices if any(f".{name}.weight" in info.name for name in DOWN_PROJECTIONS)]
        count = max(1, round(entries / max((info.numel for info in matrices), default=1)))
        return matrices[-count:]
    return [info for info in matrices if info.name not in checkpoint.embeddings]


def _plain(info: TensorInfo) -> int:
    return info.numel


def _squared(info: TensorInfo) -> int:
    """Of inputs by inputs. (GPT-2 keeps its weights the other way round: there it is more than is taken.)"""
    return int(info.shape[-1]) ** 2


def _tokens(samples: Any, settings: dict[str, Any]) -> float:
    rows = min(settings["rows"], len(samples))
    mean = samples.table.nbytes / LETTERS_PER_TOKEN / max(1, len(samples))
    return float(rows * min(mean, settings["max_length"]))
