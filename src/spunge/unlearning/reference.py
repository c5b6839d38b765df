"""The base's outputs while its weights are being trained: from the same weights, or computed and stored beforehand.

With LoRA the adapter is switched off; with tensors trained in full their original values are put in for the call. No
second model is ever held.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from spunge.data.samples import Batch
from spunge.files import about, require_space
from spunge.model.memory import halved
from spunge.unlearning.batches import Stream
from spunge.unlearning.scored import Scored, scored
from spunge.unlearning.trained import Trained


def base_logits(trained: Trained, batch: Batch) -> Tensor:
    """(b, t, v): the base's logits, without gradient and without dropout."""
    model = trained.model
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trained.adapter_off():
            if trained.originals:
                return torch.func.functional_call(model, trained.originals, (), arguments).logits  # type: ignore[no-any-return]
            return model(**arguments).logits  # type: ignore[no-any-return]
    finally:
        model.train(was_training)


class Live:
    """The base's outputs, computed when they are asked for."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    def log_probabilities(self, _stream: Stream, batch: Batch) -> Tensor:
        """(n, v): of each scored token's place in a batch of a stream."""
        return scored(base_logits(self._trained, batch), batch).logits.log_softmax(-1)

    def sums(self, _stream: Stream, batch: Batch) -> Tensor:
        """(b,): the summed negative log-likelihood of each sample's scored tokens."""
        return scored(base_logits(self._trained, batch), batch).sums()


class Stored:
    """The base's outputs on every sample of some streams, written to a temporary file before training begins.

    One float a sample where sums are all that is wanted; else the log-probabilities of every scored token, in float32:
    tokens * vocabulary * 4 bytes on the disk.
    """

    def __init__(
        self, trained: Trained, sums: Sequence[Stream], distributions: Sequence[Stream], folder: Path | None, size: int
    ) -> None:
        self._sums = {id(stream): torch.cat(list(_each(trained, stream, size, Scored.sums))) for stream in sums}
        self._files = {id(stream): _Distributions(trained, stream, folder, size) for stream in distributions}

    def log_probabilities(self, stream: Stream, batch: Batch) -> Tensor:
        """As Live's."""
        return self._files[id(stream)].of(batch)

    def sums(self, stream: Stream, batch: Batch) -> Tensor:
        """As Live's."""
        return self._sums[id(stream)][list(batch.rows)]


def _each(
    trained: Trained, stream: Stream, size: int, what: Callable[[Scored], Any] = lambda scored: scored
) -> Iterator[Any]:
    """What the base gives for every sample of a stream, in the samples' order, batch after batch."""

    def given(rows: Sequence[int]) -> Any:
        batch = stream.batch(rows)
        return what(scored(base_logits(trained, batch), batch))

    groups = (range(start, min(start + size, stream.count)) for start in range(0, stream.count, size))
    for _, each in halved(groups, [max(stream.lengths)] * stream.count, given, "unlearn.reference"):
        yield each


def _tokens(stream: Stream, size: int) -> int:
    """Tokens of all samples of a stream."""
    groups = (range(start, min(start + size, stream.count)) for start in range(0, stream.count, size))
    return sum(int(stream.batch(rows).mask.sum()) for rows in groups)


class _Distributions:
    """Log-probabilities on the disk, sample after sample."""

    def __init__(self, trained: Trained, stream: Stream, folder: Path | None, size: int) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the branch trains
        counts = [0]
        for each in _each(trained, stream, size):
            values = each.logits.log_softmax(-1).cpu()
            if folder is not None and len(counts) == 1:
                nbytes = values[:1].nbytes * _tokens(stream, size)
                require_space(folder, nbytes, "a file of the base's outputs", "unlearn.reference: stored")
            with about(folder or Path(tempfile.gettempdir())):
                self._file.write(memoryview(values.numpy()).cast("B"))
            counts += torch.bincount(each.rows.cpu(), minlength=each.samples).tolist()
            self._width = values.shape[1]
        self._file.flush()
        self._starts = np.cumsum(counts)
        self._values = np.memmap(self._file, np.float32, "r", shape=(int(self._starts[-1]), self._width))

    def of(self, batch: Batch) -> Tensor:
        parts = [self._values[self._starts[row] : self._starts[row + 1]] for row in batch.rows]
        return torch.from_numpy(np.concatenate(parts)).to(batch.ids.device)
