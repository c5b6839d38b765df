"""What a merge reports: per tensor and over all, for merge.json, the summary and the model card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums over one tensor's chunks; k branches, in the engine's order."""

    gram: Tensor  # (k, k) float64: inner products of the branches' deltas
    kept: Tensor  # (k,) int64: entries that the trim leaves and that are not zero
    contested: int = 0  # entries kept by two branches or more
    conflicts: int = 0  # of those, the ones with both signs
    merged: float = 0.0  # squared norm of the merged delta
    entries: int = 0

    @classmethod
    def empty(cls, k: int) -> "Tally":
        return cls(torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.int64))

    def add(self, other: "Tally") -> None:
        self.gram += other.gram
        self.kept += other.kept
        self.contested += other.contested
        self.conflicts += other.conflicts
        self.merged += other.merged
        self.entries += other.entries

    def dump(self) -> dict[str, Any]:
        plain = {
            "contested": self.contested,
            "conflicts": self.conflicts,
            "merged": self.merged,
            "entries": self.entries,
        }
        return {"gram": self.gram.tolist(), "kept": self.kept.tolist(), **plain}

    @classmethod
    def load(cls, content: Mapping[str, Any]) -> "Tally":
        rest = {key: content[key] for key in ("contested", "conflicts", "merged", "entries")}
        return cls(torch.tensor(content["gram"], dtype=torch.float64), torch.tensor(content["kept"]), **rest)


def tally(deltas: Tensor, kept: Tensor, merged: Tensor) -> Tally:
    """The sums over one chunk: (k, n), (k, n), (n,)."""
    signs = kept.sign()
    number, balance = signs.abs().sum(dim=0), signs.sum(dim=0)
    return Tally(
        gram=(deltas @ deltas.T).double().cpu(),
        kept=torch.count_nonzero(kept, dim=1).cpu(),
        contested=int(torch.count_nonzero(number >= 2)),
        conflicts=int(torch.count_nonzero(number > balance.abs())),
        merged=float(merged.double().dot(merged.double())),
        entries=merged.numel(),
    )


@dataclass(frozen=True)
class TensorReport:
    """One changed tensor. Lists have one number per branch, in the order the branches were given."""

    kept: list[float]  # share of the tensor's entries that the trim leaves and that are not zero
    conflicts: float  # share of entries with both signs, among those that two branches or more keep
    before: list[float]  # Euclidean norm of each branch's delta
    after: float  # norm of the merged delta


@dataclass(frozen=True)
class SourceReport:
    label: str
    fingerprint: str
    weight: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    rule: str
    settings: dict[str, Any]
    base: str  # the base folder's name
    sources: list[SourceReport]
    tensors: dict[str, TensorReport]
    cosine: list[list[float]]  # between branches, over all their changed tensors
    key: str = ""  # fingerprint of the inputs
    notes: list[str] = field(default_factory=list)
    checked: str = ""  # what transformers makes of the merged folder

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the merge touched."""
        return list(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return {
            "format": 1,
            "rule": self.rule,
            "settings": self.settings,
            "base": self.base,
            "sources": [vars(source) for source in self.sources],
            "cosine": self.cosine,
            "notes": self.notes,
            "checked": self.checked,
            "tensors": {name: vars(entry) for name, entry in self.tensors.items()},
            "key": self.key,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MergeReport":
        return cls(
            rule=content["rule"],
            settings=content["settings"],
            base=content["base"],
            sources=[SourceReport(**entry) for entry in content["sources"]],
            tensors={name: TensorReport(**entry) for name, entry in content["tensors"].items()},
            cosine=content["cosine"],
            key=content["key"],
            notes=content["notes"],
            checked=content.get("checked", ""),
        )


def summed_up(tallies: Mapping[str, Tally], places: Sequence[int]) -> tuple[dict[str, TensorReport], list[list[float]]]:
    """Reports per tensor and the cosine matrix; `places[i]` is where the user's i-th branch stands in the tallies."""
    tensors = {name: _tensor_report(entry, places) for name, entry in tallies.items()}
    total = sum((entry.gram for entry in tallies.values()), torch.zeros(len(places), len(places), dtype=torch.float64))
    norms = total.diagonal().clamp(min=0).sqrt()
    cosine = total / (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp(min=1e-300)
    return tensors, [[_rounded(float(cosine[i, j])) for j in places] for i in places]


def _tensor_report(entry: Tally, places: Sequence[int]) -> TensorReport:
    return TensorReport(
        kept=[_rounded(int(entry.kept[place]) / max(1, entry.entries)) for place in places],
        conflicts=_rounded(entry.conflicts / entry.contested) if entry.contested else 0.0,
        before=[_rounded(math.sqrt(max(0.0, float(entry.gram[place, place])))) for place in places],
        after=_rounded(math.sqrt(entry.merged)),
    )


def _rounded(value: float) -> float:
    """Five digits: what is left of float32 sums in any order."""
    return float(f"{value:.5g}")
