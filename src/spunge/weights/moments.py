"""Second moments of a branch, which a merge rule may need beside its delta: of its gradients, or of its layers' inputs.

`moments-KIND-SETTINGS.safetensors` and `.json` lie beside the delta. gradients: for each tensor the mean square of the
log-likelihood's gradient, in the tensor's shape. inputs: for each linear layer's weight the mean of x x^T over its inputs x.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import fingerprint, read_json, write_json
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.sources import DeltaSource, Mapped, Source
from spunge.weights.writing import write_tensors

Kind = Literal["gradients", "inputs"]
TOLD: dict[Kind, str] = {"gradients": "the gradients", "inputs": "the layers' inputs"}


@dataclass(frozen=True)
class Moments:
    """As they are stored. Values are in float32, in no order of the files' own."""

    stored: Checkpoint
    label: str  # the branch's, for errors
    info: Mapping[str, Any]

    @cached_property
    def _mapped(self) -> Mapped:
        return Mapped(self.stored)

    @property
    def fingerprint(self) -> str:
        """Of the delta and the settings that they were taken with, and of the rows."""
        return fingerprint(dict(self.info))

    @property
    def norm(self) -> float:
        """Of gradients: the Euclidean norm of all their moments."""
        return float(self.info["norm"])

    @property
    def averaged(self) -> frozenset[str]:
        """Of inputs: tensors that are no linear layer's own weight, or not as a whole."""
        return frozenset(self.info["averaged"])

    @property
    def silent(self) -> frozenset[str]:
        """Of inputs: weights of layers that no row reached."""
        return frozenset(self.info["silent"])

    def axis(self, name: str) -> int:
        """Of inputs: the dimension of the stored tensor along which the layer's inputs lie."""
        return int(self.info["axes"][name])

    def of(self, name: str) -> Tensor:
        """Flat; do not write into it. Raises RecipeError where they were not taken of this tensor."""
        if name not in self.stored.tensors:
            raise RecipeError(
                f"merge.rule: the second moments of {self.label!r} hold nothing of {name!r}, which another model changes; "
                "merge the branches of one run, or name another rule"
            )
        return self._mapped.view(name)


def moment_files(kind: Kind, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the files, beside the delta: the tensors and what is known of them. settings: of how they are taken."""
    name = f"moments-{kind}-{fingerprint(dict(settings))[:8]}"
    return f"{name}.safetensors", f"{name}.json"


def write_moments(
    delta: DeltaSource, kind: Kind, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> Sequence[Path]:
    """Write the moments of a branch beside its delta; returns the files. info: as in `Moments`."""
    weights, description = (delta.delta.folder / name for name in moment_files(kind, settings))
    write_tensors(weights, tensors)
    write_json(description, {"format": 1, "kind": kind, "settings": dict(settings), "of": delta.fingerprint, **info})
    return [weights, description]


def moments_of(source: Source, kind: Kind, settings: Mapping[str, Any], rule: str) -> Moments:
    """What a run took of a source. Raises RecipeError where there is nothing of it, or where it is another delta's."""
    needs = f"merge.rule: {rule!r} needs second moments of {TOLD[kind]} of each model on its own rows"
    if not isinstance(source, DeltaSource):
        raise RecipeError(
            f"{needs}, and {source.label!r} is no branch of a run; give RUN/branches/SLUG of a run that merges by {rule!r}, or "
            "another rule"
        )
    weights, description = moment_files(kind, settings)
    folder = source.delta.folder
    info = read_json(folder / description)
    if info is None:
        raise RecipeError(
            f"{needs}, and {str(folder)!r} has no {description}; a run that merges by {rule!r} with these merge.moments makes "
            "it: give such a run's branches, or another rule"
        )
    if not isinstance(info, dict) or info.get("format") != 1 or info.get("of") != source.fingerprint:
        raise RecipeError(f"{needs}, and {description} in {str(folder)!r} is of another delta; run it again")
    return Moments(Checkpoint(folder, source.setting, weights), source.label, info)
