"""The base's outputs while its weights are being trained: from the same weights, kept, or stored beforehand.

With LoRA the adapter is switched off; with tensors trained in full their original values are put in for the call. No
second model is ever held.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from spunge.data.samples import Batch, sent
from spunge.files import about, require_space
from spunge.model.loading import Through
from spunge.model.memory import halved
from spunge.unlearning.batches import Stream
from spunge.unlearning.scored import LogProbabilities, Scored, outputs
from spunge.unlearning.trained import Trained, evaluation_mode


def base_outputs(trained: Trained, batch: Batch, in_one: bool = False) -> Scored:
    """The base's outputs at the scored places, without gradient and without dropout. in_one: as of `outputs`.

    Of a model that is trained through a larger one's logits they are the larger one's: a change of nothing shifts nothing.
    """
    if trained.through is not None:
        return _larger_outputs(trained.through, batch)
    return _own_base_outputs(trained, batch, in_one)


def trained_outputs(trained: Trained, batch: Batch, in_one: bool = False) -> Scored:
    """The trained model's outputs at the scored places; through a larger model, that one's, shifted."""
    if trained.through is None:
        return outputs(trained.model, batch, in_one=in_one)
    larger, base = _larger_outputs(trained.through, batch), _own_base_outputs(trained, batch)
    return summed(larger, outputs(trained.model, batch), base, trained.through.alpha)


def summed(larger: Scored, own: Scored, base: Scored, alpha: float) -> Scored:
    """larger + alpha * (own - base), logit by logit (arXiv 2404.11045, equation 2). What one vocabulary's padding has beyond the
    other is left as it is. The states are those of all three, side by side; a gradient reaches own's alone."""
    three = (own, base, larger)
    widths = [each.states.shape[1] for each in three]

    def logits_of(states: Tensor) -> Tensor:
        mine, plain, large = (
            each.logits_of(part.to(each.states.dtype))
            for each, part in zip(three, torch.split(states, widths, dim=1), strict=True)
        )
        width = min(large.shape[1], mine.shape[1])
        shifted = large[:, :width] + alpha * (mine[:, :width] - plain[:, :width])
        return torch.cat([shifted, large[:, width:]], dim=1)

    states = torch.cat([each.states.float() for each in three], dim=1)
    return replace(own, states=states, logits_of=logits_of, piece=max(1, min(each.piece for each in three) // 3))


def _larger_outputs(through: Through, batch: Batch) -> Scored:
    with torch.no_grad():
        larger = outputs(through.model, batch)

    def logits_of(states: Tensor) -> Tensor:
        with torch.no_grad():
            return larger.logits_of(states)

    return replace(larger, logits_of=logits_of, trains_head=False)


def _own_base_outputs(trained: Trained, batch: Batch, in_one: bool = False) -> Scored:
    model, head = trained.model, trained.model.get_output_embeddings()
    learned = head is not None and any(p.requires_grad for p in head.parameters())
    adapted = learned and not trained.originals and not trained.swaps
    with torch.no_grad(), evaluation_mode(model), trained.adapter_off():
        if trained.originals:
            call, values = partial(_with_originals, trained), partial(_originals_of_head, trained)
            base = outputs(model, batch, call, values, in_one)
        elif trained.swaps and head is not None:
            base = outputs(model, batch, values=partial(_copied, head), in_one=in_one)
        else:
            base = outputs(model, batch, in_one=in_one)

    def logits_of(states: Tensor) -> Tensor:  # later, when the adapter is on again
        with torch.no_grad(), trained.adapter_off() if adapted else nullcontext():
            return base.logits_of(states)

    return replace(base, logits_of=logits_of, trains_head=False)


def outputs_with(trained: Trained, weights: Sequence[Tensor], batch: Batch) -> Scored:
    """The outputs with other values of what is trained, without gradient and without dropout."""
    model, head = trained.model, trained.model.get_output_embeddings()
    learned = head is not None and any(parameter.requires_grad for parameter in head.parameters())
    with torch.no_grad(), evaluation_mode(model), _holding(trained.parameters, weights):
        other = outputs(model, batch, values=partial(_copied, head)) if learned else outputs(model, batch)
    return replace(other, trains_head=False)


@contextmanager
def _holding(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the parameters have these values."""
    held = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # which may hold them in another dtype, as they were
        yield
    finally:
        for parameter, value in zip(parameters, held, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()


def _with_originals(trained: Trained, **arguments: Any) -> Any:
    return torch.func.functional_call(trained.model, trained.originals, (), arguments)


def _copied(head: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}


def _originals_of_head(trained: Trained) -> dict[str, Tensor]:
    """The output layer's parameters -> their base values, also where a weight is trained under the embeddings' name."""
    parameters = dict(trained.model.named_parameters())
    values = {id(parameters[name]): value for name, value in trained.originals.items()}
    head = trained.model.get_output_embeddings()
    return {name: values.get(id(p), p) for name, p in head.named_parameters()} if head is not None else {}


class Sums:
    """The base's summed negative log-likelihood of each sample of a stream: computed with the first batch that has it, and kept."""

    def __init__(self, trained: Trained, stream: Stream, kept: list[float]) -> None:
        """kept: row and value in turn, of the samples so far; the loop saves it, and shortens it where it repeats a step."""
        self._trained, self._stream, self._kept = trained, stream, kept
        self._values: dict[float, float] = {}

    def of(self, batch: Batch) -> Tensor:
        """(b,) float32, of a batch of the stream."""
        if 2 * len(self._values) != len(self._kept):
            self._values = dict(zip(self._kept[::2], self._kept[1::2], strict=True))
        new = [row for row in dict.fromkeys(batch.rows) if row not in self._values]
        ranks = self._stream.base.ranks
        if ranks.any(bool(new)):  # then all call the model, and each knows the others' samples too from now on
            asked = new or list(batch.rows)
            missing = batch if asked == list(batch.rows) else self._stream.batch(asked)
            own: list[float] = base_outputs(self._trained, missing).sums().tolist()
            values: dict[float, float] = {}
            for pairs in ranks.each(dict(zip(asked, own, strict=True))):
                values |= {row: value for row, value in pairs.items() if row not in self._values}
            self._values.update(values)
            self._kept += [number for pair in values.items() for number in pair]
        return sent(torch.tensor([self._values[row] for row in batch.rows]), batch.ids.device)


class Live:
    """The base's distributions, computed when they are asked for."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    def log_probabilities(self, _stream: Stream, batch: Batch) -> LogProbabilities:
        """Of the scored places in a batch of a stream."""
        return base_outputs(self._trained, batch).log_probabilities


class Stored:
    """The base's distributions on every sample of some streams, written to a temporary file before training begins: the
    log-probabilities of every scored token in float32, tokens * vocabulary * 4 bytes on the disk."""

    def __init__(self, trained: Trained, streams: Sequence[Stream], folder: Path | None, size: int) -> None:
        self._files = {id(stream): _Distributions(trained, stream, folder, size) for stream in streams}

    def log_probabilities(self, stream: Stream, batch: Batch) -> LogProbabilities:
        """As Live's."""
        return self._files[id(stream)].of(batch)


def _each(trained: Trained, stream: Stream, size: int) -> Iterator[Scored]:
    """What the base gives for every sample of a stream, in the samples' order, batch after batch."""

    def given(rows: Sequence[int]) -> Scored:
        return base_outputs(trained, stream.batch(rows))

    groups = (range(start, min(start + size, stream.count)) for start in range(0, stream.count, size))
    for _, each in halved(groups, stream.longest, given, "unlearn.reference"):
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
            for places in each.places():
                values = each.log_probabilities(places).cpu()
                if folder is not None and len(counts) == 1 and places.start == 0:
                    nbytes = values[:1].nbytes * _tokens(stream, size)
                    require_space(folder, nbytes, "a file of the base's outputs", "unlearn.reference: stored")
                with about(folder or Path(tempfile.gettempdir())):
                    self._file.write(values.numpy().data.cast("B"))
            counts += torch.bincount(each.rows.cpu(), minlength=each.samples).tolist()
            self._width = values.shape[1]
        self._file.flush()
        self._starts = np.cumsum(counts)
        self._values = np.memmap(self._file, np.float32, "r", shape=(int(self._starts[-1]), self._width))

    def of(self, batch: Batch) -> LogProbabilities:
        """Of the scored places of a batch; read when they are asked for."""
        kept = np.concatenate([np.arange(self._starts[row], self._starts[row + 1]) for row in batch.rows])
        return lambda places: torch.from_numpy(self._values[kept[places]]).to(batch.ids.device)
