"""What a method is given of some rows: their tokens as training reads them, and which of them the loss is on."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from spunge.data.query import ROW
from spunge.data.samples import IGNORED, Encoded, Samples
from spunge.unlearning.batches import encoded, packed
from spunge.unlearning.checking import WHOLE


class Shown(NamedTuple):
    """One sample. Its text is in pieces, each with whether the loss is on it."""

    part: str
    of: str  # forget, retain or teach
    given: str  # what it is to the method, where that is not the row itself: a refusal in its answer's place
    row: int | None  # its number in its file, from 1; None for a packed sequence, which holds several
    pieces: list[tuple[str, bool]]
    ids: list[int]
    tokens: int  # before it was cut

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "of": self.of,
            "as": self.given or self.of,
            "row": self.row,
            "text": "".join(text for text, _ in self.pieces),
            "scored": "".join(text for text, scored in self.pieces if scored),
            "ids": self.ids,
            "tokens": self.tokens,
        }


def shown(
    samples: Samples,
    count: int,
    part: str,
    of: str,
    tokenizer: Any,
    length: int,
    *,
    given: str = "",
    packing: bool = False,
) -> list[Shown]:
    """The first `count` samples of a part, cut at `length` tokens. Raises RecipeError for a row that cannot be used."""
    if packing:
        sequences = packed(samples, tokenizer, length)[:count]
        return [
            Shown(part, of, given, None, list(_pieces(each, tokenizer)), each.ids, len(each.ids)) for each in sequences
        ]
    rows = range(min(count, len(samples)))
    numbers = samples.table[ROW].to_pylist() if ROW in samples.table.column_names else list(rows)
    setting = f"forget, part {part!r}" if of == "forget" else of
    coded = encoded(samples, rows, tokenizer, length, setting)
    whole = encoded(samples, rows, tokenizer, WHOLE, setting)
    return [
        Shown(part, of, given, numbers[row], list(_pieces(each, tokenizer)), each.ids, len(uncut.ids))
        for row, each, uncut in zip(rows, coded, whole, strict=True)
    ]


def _pieces(sample: Encoded, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Runs of tokens that are scored or not, each as it reads after those before it."""
    start, before = 0, ""
    scored = [label != IGNORED for label in sample.labels]
    for stop in range(1, len(scored) + 1):
        if stop < len(scored) and scored[stop] == scored[start]:
            continue
        whole = _decoded(sample.ids[:stop], tokenizer)
        # Decoded alone, some tokenizers drop the space before the first word.
        alone = _decoded(sample.ids[start:stop], tokenizer)
        yield whole[len(before) :] if whole.startswith(before) else alone, scored[start]
        start, before = stop, whole


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
