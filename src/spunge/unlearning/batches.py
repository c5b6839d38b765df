"""In what order samples reach a method: batches of one part, parts in turn, or all parts as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spunge.data.samples import Batch, Encoded, Samples, collate, encode, shuffled_batches
from spunge.errors import RecipeError
from spunge.model.loading import Base


class Stream:
    """Batches on the base's device without end, in an order of the seed. `drawn` counts those given so far."""

    def __init__(
        self,
        samples: Samples,
        base: Base,
        size: int,
        max_length: int | Sequence[int],
        seed: int,
        *,
        order: str = "shuffled",
        packing: bool = False,
    ) -> None:
        """`max_length`: of all rows, or one a row. `order`: shuffled, in_order or with_replacement."""
        self.samples = samples
        self.base = base
        self.size = size  # of a batch
        self.drawn = 0
        self.lengths = [max_length] * len(samples) if isinstance(max_length, int) else max_length
        self._packed = packed(samples, base.tokenizer, max(self.lengths)) if packing else None
        self.count = len(samples) if self._packed is None else len(self._packed)  # samples, or packed sequences
        self._rows = _row_numbers(self.count, size, seed, order)

    def __next__(self) -> Batch:
        rows = next(self._rows)
        self.drawn += 1
        return self.batch(rows)

    def skip(self, count: int) -> None:
        """Pass over so many batches, as if they had been given."""
        for _ in range(count):
            next(self._rows)
        self.drawn += count

    def replaced(self, samples: Samples) -> "Stream":
        """A stream of other samples, row for row in place of these, to be asked for the same rows."""
        return Stream(samples, self.base, 1, self.lengths, 0)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows as a batch."""
        return collate(self.encoded(rows), self.base.device)._replace(rows=tuple(rows))

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """The given rows' tokens."""
        if self._packed is not None:
            return [self._packed[row] for row in rows]
        lengths = [self.lengths[row] for row in rows]
        return encoded(self.samples, rows, self.base.tokenizer, lengths)

    @property
    def packed(self) -> bool:
        return self._packed is not None


def encoded(
    samples: Samples, rows: Sequence[int], tokenizer: Any, max_length: int | Sequence[int], setting: str = "rows"
) -> list[Encoded]:
    """The given rows' tokens. `max_length`: of all of them, or one a row; `setting` names the rows in errors."""
    lengths = [max_length] * len(rows) if isinstance(max_length, int) else max_length
    texts = samples.texts(rows, tokenizer, setting)
    return [encode(text, tokenizer, length) for text, length in zip(texts, lengths, strict=True)]


def packed(samples: Samples, tokenizer: Any, length: int) -> list[Encoded]:
    """All texts in a row, an end token between two, cut into sequences of `length` tokens; the last is shorter.

    Raises RecipeError for prompts, and where the tokenizer has no end token.
    """
    if not samples.plain:
        raise RecipeError("unlearn.packing: prompts and completions are not packed, only plain texts; set it to false")
    if tokenizer.eos_token_id is None:
        raise RecipeError("unlearn.packing: the tokenizer has no end token to part the texts; set it to false")
    end = [tokenizer.eos_token_id]
    ids: list[int] = []
    for start in range(0, len(samples), 1000):
        rows = range(start, min(start + 1000, len(samples)))
        for text in samples.texts(rows, tokenizer):
            own = list(tokenizer(text.completion)["input_ids"])
            ids += own if own[-1:] == end else own + end  # some tokenizers close every text themselves
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [Encoded(piece, list(piece)) for piece in pieces if len(piece) > 1]


def _row_numbers(rows: int, size: int, seed: int, order: str) -> Iterator[list[int]]:
    if order == "shuffled":
        yield from shuffled_batches(rows, size, seed)
    generator = np.random.default_rng(seed)
    while order == "with_replacement":
        yield generator.integers(0, rows, size).tolist()
    while True:
        yield from (list(range(start, min(start + size, rows))) for start in range(0, rows, size))


def interleaved(steps: Mapping[str, int]) -> list[str]:
    """The part of each step, every part's steps spread evenly: with equal numbers, one batch of each in turn."""
    places = [
        ((step + 0.5) / count, position, value)
        for position, (value, count) in enumerate(steps.items())
        for step in range(count)
    ]
    return [value for _, _, value in sorted(places)]
