"""In what order samples reach a method: batches of one part, parts in turn, or all parts as one."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np

from spunge.data.arrays import joined
from spunge.data.samples import (
    PROMPT_SHARE,
    Answer,
    Batch,
    Encoded,
    Samples,
    collate,
    encode,
    shuffled_batches,
    start_once,
)
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.model.loading import Base
from spunge.unlearning.lengths import Lengths, Run


class Stream:
    """Batches on the base's device without end, in an order of the seed. `drawn` counts those drawn so far, `tokens` theirs.

    A batch is given in `pieces`, one by one, where it does not fit into the memory as a whole. Of several processes that train
    together each is given as many pieces of every batch; `step` has those of all.
    """

    def __init__(
        self,
        samples: Samples,
        base: Base,
        size: int,
        max_length: int | Lengths,
        seed: int,
        *,
        order: str = "shuffled",
        packing: bool = False,
        accumulation: int = 1,
        repeats: int = 1,
    ) -> None:
        """`max_length`: of all rows, or one a row; texts are cut to the model's positions where these are fewer.

        `order`: shuffled, in_order or with_replacement. `accumulation`: batches of an optimizer step. `repeats`: steps
        in a row that are given the same batches.
        """
        self.samples = samples
        self.base = base
        self.size = size  # of a batch
        self.drawn = 0
        self.tokens = 0  # of all batches that were put together, without padding
        self.pieces = 1
        given = max_length if isinstance(max_length, Lengths) else Lengths([Run(max_length, len(samples))])
        self.lengths = Lengths(Run(base.reach(run.tokens), run.samples) for run in given.runs)
        self._packed = packed(samples, base.tokenizer, self.lengths.longest) if packing else None
        self.count = len(samples) if self._packed is None else len(self._packed)  # samples, or packed sequences
        self._rows = repeated(_row_numbers(self.count, size, seed, order), accumulation, repeats)
        self._seed, self._order, self._accumulation, self._repeats = seed, order, accumulation, repeats
        self._known: Collection[int] | None = None  # rows that it may give; None: all
        self._drawn_rows: list[list[int]] = []  # of the step's batches
        self._step: list[Batch] = []  # in pieces
        self._left: list[Batch] = []  # of the step, still to be given

    def __next__(self) -> Batch:
        if not self._left:  # a step's batches are drawn together, so that each knows its share
            self._drawn_rows = [next(self._rows) for _ in range(self._accumulation)]
            self._cut()
        if len(self._left) % self.pieces == 0:
            self.drawn += 1
        batch = self._left.pop(0)
        return batch._replace(step=tuple(self._step) if len(self._step) > 1 else ())

    def _cut(self) -> None:
        """Cut the step's batches into pieces of about the same number of samples, as many for each process."""
        ranks = self.base.ranks
        pieces = self.pieces * ranks.count
        self._step = []
        for drawn in self._drawn_rows:
            size = -(-len(drawn) // pieces)
            starts = range(0, len(drawn), size)
            batches = [
                self.batch(drawn[start : start + size])._replace(drawn=tuple(drawn), start=start) for start in starts
            ]
            self._step += batches + [batches[-1]._replace(counts=False)] * (pieces - len(batches))
        self._left = self._step[ranks.rank :: ranks.count]

    def give_again(self, drawn: int, pieces: int) -> None:
        """Give the step that is under way from its start, in so many pieces a batch. `drawn`: at its start."""
        begun, self.drawn, self.pieces = self.drawn != drawn, drawn, pieces
        self._left = []
        if begun:
            self._cut()

    def skip(self, count: int) -> None:
        """Pass over the batches of whole steps, as if they had been given."""
        for _ in range(count):
            next(self._rows)
        self.drawn += count

    def learned(self, steps: int) -> list[int]:
        """The rows that so many optimizer steps draw from the start, in their order among the samples: what is made for each row
        before the first step is made for these."""
        numbers = _row_numbers(self.count, self.size, self._seed, self._order)
        found: set[int] = set()
        for drawn in islice(repeated(numbers, self._accumulation, self._repeats), steps * self._accumulation):
            found.update(drawn)
            if len(found) == self.count:
                break
        return sorted(found)

    def replaced(self, samples: Samples, known: Collection[int] | None = None) -> "Stream":
        """A stream of other samples, row for row in place of these: it gives the same rows in the same order. known: the rows that
        have another sample; to ask for others is an error. None: all."""
        other = Stream(
            samples,
            self.base,
            self.size,
            self.lengths,
            self._seed,
            order=self._order,
            accumulation=self._accumulation,
            repeats=self._repeats,
        )
        other._known = None if known is None else frozenset(known)
        return other

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows as a batch."""
        coded = self.encoded(rows)
        self.tokens += sum(len(each.ids) for each in coded)
        return collate(coded, self.base.device)._replace(rows=tuple(rows))

    def answered(self, pairs: Sequence[tuple[int, Answer]]) -> Batch:
        """Rows of prompts with other answers than their own, (row, answer), as a batch."""
        return collate(answered(self.samples, pairs, self.base.tokenizer, self.lengths), self.base.device)

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """The given rows' tokens."""
        if self._known is not None and (unknown := [row for row in rows if row not in self._known]):
            raise IndexError(f"rows {unknown} have no sample in place of their own")
        if self._packed is not None:
            return [self._packed[row] for row in rows]
        lengths = [self.lengths[row] for row in rows]
        return encoded(self.samples, rows, self.base.tokenizer, lengths)

    @property
    def batches(self) -> int:
        """Of a pass over the samples."""
        return -(-self.count // self.size)

    @property
    def longest(self) -> Lengths:
        """For each sample, or packed sequence, the tokens that any of them may have."""
        return Lengths([Run(self.lengths.longest, self.count)])

    @property
    def packed(self) -> bool:
        return self._packed is not None


def share(batch: Batch, count: Callable[[Batch], float]) -> float:
    """What a mean over a batch counts for in its optimizer step, whose batches count for 1 on average.

    Then the step's gradient is that of a mean over all its batches at once. count: of what the mean is over, such as tokens.
    """
    total = sum(count(each) for each in batch.step if each.counts)
    return len(batch.step) * batch.counts * count(batch) / total if total else 1.0


def learned_tokens(batch: Batch) -> float:
    return batch.learned


def samples_of(batch: Batch) -> float:
    return batch.ids.shape[0]


def encoded(
    samples: Samples, rows: Sequence[int], tokenizer: Any, max_length: int | Sequence[int], setting: str = "rows"
) -> list[Encoded]:
    """The given rows' tokens. `max_length`: of all of them, or one a row; `setting` names the rows in errors."""
    lengths = [max_length] * len(rows) if isinstance(max_length, int) else max_length
    texts = samples.texts(rows, tokenizer, setting)
    coded = [encode(text, tokenizer, length, PROMPT_SHARE) for text, length in zip(texts, lengths, strict=True)]
    if (none := next((row for row, each in zip(rows, coded, strict=True) if not each.ids), None)) is not None:
        raise RecipeError(f"{setting}: row {samples.number(none)} has no token; filter the row out")
    return coded


def answered(
    samples: Samples, pairs: Sequence[tuple[int, Answer]], tokenizer: Any, lengths: Sequence[int]
) -> list[Encoded]:
    """The tokens of rows with other answers than their own, (row, answer), of which the last answer alone is learned. lengths: most
    tokens of each of the samples."""
    asked = Samples(taken(samples.table, [row for row, _ in pairs])).answered([each for _, each in pairs], learn="last")
    texts = asked.texts(range(len(asked)), tokenizer)
    return [encode(text, tokenizer, lengths[row], PROMPT_SHARE) for text, (row, _) in zip(texts, pairs, strict=True)]


class Packed(Sequence[Encoded]):
    """Sequences of so many tokens each, cut from one row of tokens (n,); the last may be shorter, and has two at the least."""

    def __init__(self, ids: np.ndarray, length: int) -> None:
        self._ids, self._length = ids, length

    def __len__(self) -> int:
        whole, rest = divmod(len(self._ids), self._length)
        return (whole if self._length > 1 else 0) + (rest > 1)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        start = range(len(self))[place] * self._length
        ids = self._ids[start : start + self._length].tolist()
        return Encoded(ids, list(ids))


def packed(samples: Samples, tokenizer: Any, length: int) -> Packed:
    """All texts in a row, an end token between two, cut into sequences of `length` tokens; the last is shorter. Of many texts the
    tokens lie in a file.

    Raises RecipeError for prompts, and where the tokenizer has no end token.
    """
    if not samples.plain:
        raise RecipeError("unlearn.packing: prompts and completions are not packed, only plain texts; set it to false")
    if tokenizer.eos_token_id is None:
        raise RecipeError("unlearn.packing: the tokenizer has no end token to part the texts; set it to false")
    end = [tokenizer.eos_token_id]

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(samples), 1000):
            ids: list[int] = []
            for text in samples.texts(range(start, min(start + 1000, len(samples))), tokenizer):
                own = start_once(tokenizer(text.completion)["input_ids"], tokenizer)
                ids += own if own[-1:] == end else own + end  # some tokenizers close every text themselves
            yield np.array(ids, np.int32)

    return Packed(joined(pieces(), np.int32), length)


def _row_numbers(rows: int, size: int, seed: int, order: str) -> Iterator[list[int]]:
    if order == "shuffled":
        yield from shuffled_batches(rows, size, seed)
    generator = np.random.default_rng(seed)
    while order == "with_replacement":
        yield generator.integers(0, rows, size).tolist()
    while True:
        yield from (list(range(start, min(start + size, rows))) for start in range(0, rows, size))


def repeated(batches: Iterator[list[int]], count: int, times: int) -> Iterator[list[int]]:
    """The batches without end, `count` of them so many times before the next."""
    while True:
        step = [next(batches) for _ in range(count)] if times > 1 else [next(batches)]
        for _ in range(times):
            yield from step


def interleaved(steps: Mapping[str, int]) -> list[str]:
    """The part of each step, every part's steps spread evenly: with equal numbers, one batch of each in turn."""
    places = [
        ((step + 0.5) / count, position, value)
        for position, (value, count) in enumerate(steps.items())
        for step in range(count)
    ]
    return [value for _, _, value in sorted(places)]
