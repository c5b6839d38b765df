"""The compiled path: finds where each branch's numbers lie in memory and hands them to the kernels."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spunge.errors import one_line
from spunge.merging.outcome import Tally
from spunge.merging.rules import TiesSettings, ties
from spunge.merging.thresholds import Bracket, keys_of
from spunge.merging.work import Job, Work
from spunge.weights.rounding import all_finite, rounded, seed_of, wrapped

KINDS = {torch.bfloat16: 1, torch.float32: 2}  # of kernels.py: a model's own values
DELTA, NOTHING = 0, 3


class Fast:
    """Kernels on one merge's tensors. The same bits as the torch path, which tests compare."""

    def __init__(self, work: Work) -> None:
        from spunge.merging.fast import kernels

        self.work = work
        self.kernels: Any = kernels
        plain = work.rule is ties and isinstance(work.settings, TiesSettings) and work.settings.tie == "plus"
        self.merges = (
            plain and len(work.sources) < kernels.NEGATIVE
        )  # whether the merge itself is compiled, or the counting alone

    def split(self, job: Job, place: int, row: Bracket) -> tuple[int, Tensor]:
        """Like Bracket.split, on the magnitudes of the branch at `place`."""
        address, kind, _owner = self._branch(job, place)
        if kind == NOTHING:
            return 0, torch.zeros((job.stop - job.start) if row.low == 0 else 0, dtype=torch.int32)
        base, base_kind, _base_owner = self._base(job)
        size = job.stop - job.start
        inside = np.empty(size + 1, np.int32)
        above, between = self.kernels.count_keys(address, kind, base, base_kind, size, row.low, row.high, inside)
        return above, torch.from_numpy(inside[:between])

    def sample(self, name: str, starts: Sequence[int], length: int) -> Tensor:  # (k, runs * length)
        """The keys of every branch's magnitudes in runs of entries."""
        base = self.work.mapped.view(name)
        rows = np.zeros((len(self.work.sources), len(starts) * length), np.int32)
        for place, source in enumerate(self.work.sources):
            part = self._lying(name, place)
            if part is not None and base.dtype in KINDS:
                values, kind = part
                self.kernels.sample_keys(
                    values.data_ptr(), kind, base.data_ptr(), KINDS[base.dtype], np.array(starts), length, rows[place]
                )
            elif self.work.changes(place, name):
                for run, start in enumerate(starts):
                    job = Job(name, start, start + length)
                    entries = source.read(name, job.start, job.stop, self.work.base_values(job))
                    rows[place, run * length : (run + 1) * length] = keys_of(entries).numpy()
        return torch.from_numpy(rows)

    def merge(self, job: Job) -> tuple[Tally, Tensor, bool]:
        """TIES on one chunk: its tally, the merged model's values as they are written, and whether all are finite."""
        k, size, dtype = len(self.work.sources), job.stop - job.start, self.work.dtypes[job.name]
        branches = [self._branch(job, place) for place in range(k)]
        base, base_kind, base_values = self._base(job)
        facts = self.work.facts.get(job.name) or self.work.facts[""]
        kind = KINDS.get(dtype, DELTA)
        out = torch.empty(size, dtype=dtype if kind != DELTA else torch.float32)
        gram, sums, counts = np.zeros((k, k)), np.zeros(3), np.zeros(k + 5, np.int64)
        self.kernels.ties(
            np.array([address for address, _, _ in branches]),
            np.array([kind for _, kind, _ in branches]),
            base,
            base_kind,
            size,
            facts["cut"].float().numpy(),
            self.work.weight_row.numpy(),
            np.float32(self.work.settings.scale),
            out.data_ptr(),
            kind,
            self.work.at_random,
            np.int64(wrapped(seed_of(self.work.seeded_as(job.name)) + job.start)),
            gram,
            sums,
            counts,
        )
        lower = torch.from_numpy(gram)
        tally = Tally(
            gram=lower + lower.T - torch.diag(lower.diagonal()),
            kept=torch.from_numpy(counts[:k].copy()),
            contested=int(counts[k]),
            conflicts=int(counts[k + 1]),
            merged=float(sums[0]),
            entries=size,
            error=float(sums[1]),
            along=float(sums[2]),
            changed=int(counts[k + 3]),
            stayed=int(counts[k + 4]),
        )
        finite = not counts[k + 2]
        if kind == DELTA:  # a dtype that the kernels do not write
            merged, plain = out, base_values.float()
            out = rounded(plain + merged, dtype, self.work.drawn(job))
            tally.note_written(plain, merged, out)
            finite = finite and all_finite(out)
        return tally, out, finite

    def _base(self, job: Job) -> tuple[int, int, Tensor]:
        """Address, kind and owner of the base's values."""
        values = self.work.mapped.view(job.name)[job.start : job.stop]
        values = values if values.dtype in KINDS else values.float()
        return values.data_ptr(), KINDS[values.dtype], values

    def _lying(self, name: str, place: int) -> tuple[Tensor, int] | None:
        """A branch's whole tensor and its kind, where it lies in a mapped file in a form the kernels read."""
        if not self.work.changes(place, name):
            return None
        source = self.work.sources[place]
        stored = source.stored(name)
        if stored is not None:
            return stored, DELTA
        raw = source.raw(name)
        return (raw, KINDS[raw.dtype]) if raw is not None and raw.dtype in KINDS else None

    def _branch(self, job: Job, place: int) -> tuple[int, int, Tensor | None]:
        """Address, kind and owner of a branch's numbers: where they lie, or formed for this chunk."""
        if not self.work.changes(place, job.name):
            return 0, NOTHING, None
        lying = self._lying(job.name, place)
        if lying is not None:
            part = lying[0][job.start : job.stop]
            return part.data_ptr(), lying[1], part
        source = self.work.sources[place]
        formed = source.read(job.name, job.start, job.stop, self.work.base_values(job)).contiguous()
        return formed.data_ptr(), DELTA, formed


def fast_path(work: Work, wanted: bool | None = None) -> Fast | None:
    """The compiled path; None where numba cannot be used on this machine, or when it is not wanted."""
    return None if wanted is False or not usable() else Fast(work)


@functools.cache
def usable() -> bool:
    """Whether the kernels can be compiled (or read from numba's cache) here, and compute what they should.

    Where they can't, it is said once: numba is missing or not made for this Python, finds no folder to keep its code in, or
    a compiler fails. Whatever it raises, torch does the same work.
    """
    try:
        from spunge.merging.fast import kernels

        reason = "" if kernels.tried() else "its code gives wrong numbers"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        told = (
            f"merging without numba, several times slower and with the same result: it cannot be used here ({reason})"
        )
        logging.getLogger("spunge").warning(one_line(told))
    return not reason
