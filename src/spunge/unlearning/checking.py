"""What training will be given, looked at before anything is trained: rows of which nothing can be learned are refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spunge.data.query import ROW
from spunge.data.samples import IGNORED, Encoded, Samples
from spunge.errors import RecipeError
from spunge.unlearning.batches import encoded
from spunge.unlearning.loop import TrainingSettings

AT_ONCE = 500  # rows


def refuse_unusable(
    parts: Mapping[str, Samples], retain: Samples | None, settings: TrainingSettings, tokenizer: Any, embeddings: int
) -> None:
    """Raises RecipeError, with the row's number, where a chat template refuses a conversation, where no token of an answer is
    left to learn, and where a text holds a token that the model has no embedding for.

    parts: attribute value -> samples. embeddings: rows of the model's embedding matrix.
    """
    for value, samples in parts.items():
        _refuse(samples, tokenizer, settings.length_of(value), embeddings, f"forget, part {value!r}")
    if retain is not None:
        _refuse(retain, tokenizer, settings.length_of("retain"), embeddings, "retain")


def _refuse(samples: Samples, tokenizer: Any, length: int, embeddings: int, setting: str) -> None:
    unknown = max(tokenizer.get_vocab().values(), default=0) >= embeddings
    if samples.plain and not unknown:
        return  # an empty text was refused when it was read
    for number, sample in _each(samples, tokenizer, length, setting):
        if unknown and max(sample.ids, default=0) >= embeddings:
            token = max(sample.ids)
            raise RecipeError(
                f"{setting}: row {number} holds the token {tokenizer.convert_ids_to_tokens(token)!r} (number {token}), and the "
                f"model has {embeddings} embeddings; take it out of the text, or give a model that knows it"
            )
        if not samples.plain and all(label == IGNORED for label in sample.labels[1:]):
            raise RecipeError(
                f"{setting}: row {number} has no token to learn within {length} tokens; filter the row out"
            )


def _each(samples: Samples, tokenizer: Any, length: int, setting: str) -> Iterator[tuple[int, Encoded]]:
    """Every row's number in its source, and its tokens."""
    numbers = samples.table[ROW].to_pylist() if ROW in samples.table.column_names else list(range(len(samples)))
    for start in range(0, len(samples), AT_ONCE):
        rows: Sequence[int] = range(start, min(start + AT_ONCE, len(samples)))
        for row, sample in zip(rows, encoded(samples, rows, tokenizer, length, setting), strict=True):
            yield numbers[row], sample
