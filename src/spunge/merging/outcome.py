"""What a merge reports: per tensor and over all, for merge.json, the summary and the model card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from spunge.weights.rounding import KEPT
from spunge.weights.sources import Source

WARNED = 0.1  # share of the change's norm that random rounding may add without a word


@dataclass
class Tally:
    """Sums over one tensor's chunks; k branches, in the engine's order."""

    gram: Tensor  # (k, k) float64: inner products of the branches' deltas
    kept: Tensor  # (k,) int64: entries that the trim leaves and that are not zero
    contested: int = 0  # entries kept by two branches or more whose weight is not 0
    conflicts: int = 0  # of those, the ones with both signs once each is multiplied by its branch's weight
    merged: float = 0.0  # squared norm of the merged delta
    entries: int = 0
    error: float = 0.0  # squared norm of what the written tensor has beyond base + merged delta, or lacks of it
    along: float = 0.0  # inner product of the written tensor's change with the merged delta
    changed: int = 0  # entries of the merged delta that are not zero
    stayed: int = 0  # of those, the ones that are written as the base has them

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
        self.error += other.error
        self.along += other.along
        self.changed += other.changed
        self.stayed += other.stayed

    def note_written(self, base: Tensor, merged: Tensor, written: Tensor) -> None:
        """What rounding made of one chunk: (n,) each, the first two in float32."""
        change = written.float() - base
        error = change - merged
        self.error, self.along = float(error.dot(error)), float(change.dot(merged))
        if not math.isfinite(self.error + self.along):  # squares of large numbers overflow float32
            self.error, self.along = (
                float(error.double().dot(error.double())),
                float(change.double().dot(merged.double())),
            )
        self.changed = int(torch.count_nonzero(merged))
        self.stayed = int(torch.count_nonzero(merged.masked_fill(change != 0, 0)))

    def dump(self) -> dict[str, Any]:
        return {**vars(self), "gram": self.gram.tolist(), "kept": self.kept.tolist()}

    @classmethod
    def load(cls, content: Mapping[str, Any]) -> "Tally":
        gram = torch.tensor(content["gram"], dtype=torch.float64)
        return cls(**{**content, "gram": gram, "kept": torch.tensor(content["kept"])})


def tally(deltas: Tensor, kept: Tensor, merged: Tensor, weights: Tensor) -> Tally:
    """The sums over one chunk: (k, n), (k, n), (n,), (k,)."""
    signs = (kept * weights.unsqueeze(1)).sign()  # what the rule adds up: a weight below 0 turns a branch round
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
    conflicts: float  # share of weighted entries with both signs, among those that two branches or more keep
    before: list[float]  # Euclidean norm of each branch's delta
    after: float  # norm of the merged delta
    lost: float | None = (
        None  # norm of what rounding takes away or adds, over the merged delta's; None in older reports
    )
    arrived: float | None = (
        None  # share of the merged delta that the written change has along it: 1 where nothing is lost
    )
    stayed: float | None = None  # share of the changed entries that are written as the base has them


@dataclass(frozen=True)
class SourceReport:
    label: str
    fingerprint: str
    weight: float


def reports_of(sources: Sequence[Source], weights: Sequence[float]) -> list[SourceReport]:
    return [SourceReport(each.label, each.fingerprint, weight) for each, weight in zip(sources, weights, strict=True)]


@dataclass(frozen=True)
class Written:
    """What rounding made of the merged delta, over all its tensors; see TensorReport."""

    dtype: str  # of the merged tensors; several where they differ
    rounding: str  # nearest or stochastic
    lost: float
    arrived: float
    stayed: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    rule: str
    settings: dict[str, Any]
    base: str  # the base folder's name
    sources: list[SourceReport]
    tensors: dict[str, TensorReport]
    cosine: list[list[float]]  # between branches, over all their changed tensors
    written: Written | None = None  # None in the report of an earlier version
    key: str = ""  # fingerprint of the inputs
    notes: list[str] = field(default_factory=list)
    checked: str = ""  # what transformers makes of the merged folder
    files: dict[str, int] = field(default_factory=dict)  # weight file -> bytes

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the merge touched."""
        return list(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return {
            "format": 2,
            "rule": self.rule,
            "settings": self.settings,
            "base": self.base,
            "sources": [vars(source) for source in self.sources],
            "cosine": self.cosine,
            "notes": self.notes,
            "written": None if self.written is None else vars(self.written),
            "checked": self.checked,
            "files": self.files,
            "tensors": {name: vars(entry) for name, entry in self.tensors.items()},
            "key": self.key,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MergeReport":
        """Raises ValueError for what is no report."""
        report: MergeReport = _reader().validate_python(dict(content))
        return report


@cache
def _reader() -> TypeAdapter[MergeReport]:
    return TypeAdapter(MergeReport)


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
        **_shares([entry]),
    )


def written_of(tallies: Mapping[str, Tally], dtypes: Mapping[str, torch.dtype], at_random: bool) -> Written:
    names = dict.fromkeys(str(dtypes[name]).removeprefix("torch.") for name in tallies)
    rounding = "stochastic" if at_random else "nearest"
    return Written(" and ".join(names), rounding, **_shares(list(tallies.values())))


def _shares(tallies: Sequence[Tally]) -> dict[str, float]:
    merged = sum(entry.merged for entry in tallies)
    changed = sum(entry.changed for entry in tallies)
    return {
        "lost": _rounded(math.sqrt(sum(entry.error for entry in tallies) / merged)) if merged else 0.0,
        "arrived": _rounded(sum(entry.along for entry in tallies) / merged) if merged else 1.0,
        "stayed": _rounded(sum(entry.stayed for entry in tallies) / changed) if changed else 0.0,
    }


def rounding_notes(written: Written) -> list[str]:
    """What a person must know of the rounding: that it is random, or that more than a tenth of the change is lost in it."""
    share, whole = f"{written.arrived:.0%}", "merge.dtype float32 (--dtype float32) writes it whole"
    if written.rounding == "stochastic" and abs(written.arrived - 1) <= 1 - KEPT:
        if written.lost <= WARNED:
            return []
        return [
            f"the change is smaller than the steps of {written.dtype} and was rounded up or down at random, by fixed draws: so "
            f"{share} of it arrives, spread over many entries, and what is judged is the model as it was written; {whole}"
        ]
    if written.rounding == "stochastic":
        return [
            f"the change is too small for {written.dtype}: rounded at random {share} of it arrives, and what is written is not "
            f"what was merged; {whole}"
        ]
    if written.arrived >= KEPT:
        return []
    return [
        f"{1 - written.arrived:.0%} of the change is lost in rounding to {written.dtype}, and {written.stayed:.0%} of the changed "
        f"entries stay as the base has them; {whole}, and merge.rounding stochastic keeps it in the mean over many entries"
    ]


def _rounded(value: float) -> float:
    """Five digits: what is left of float32 sums in any order."""
    return float(f"{value:.5g}")
