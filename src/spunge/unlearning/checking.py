"""What training will be given, looked at before anything is trained: rows of which nothing can be learned are refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spunge.data.query import ROW
from spunge.data.samples import IGNORED, Encoded, Samples
from spunge.errors import RecipeError
from spunge.unlearning.batches import encoded
from spunge.unlearning.loop import TrainingSettings

AT_ONCE = 500  # rows
WHOLE = 1 << 30  # tokens: nothing is cut


def refuse_unusable(
    parts: Mapping[str, Samples], retain: Samples | None, settings: TrainingSettings, tokenizer: Any, embeddings: int
) -> list[str]:
    """Remarks on samples that are too long and will be cut.

    parts: attribute value -> samples. embeddings: rows of the model's embedding matrix. Raises RecipeError, with the row's
    number, where a chat template refuses a conversation, where there is no token of an answer to learn, and where a text holds a
    token that the model has no embedding for.
    """
    every = [(f"forget, part {value!r}", samples, settings.length_of(value)) for value, samples in parts.items()]
    if retain is not None:
        every.append(("retain", retain, settings.length_of("retain")))
    remarks = []
    for setting, samples, length in every:
        cut = sum(size > length for size in _sizes(samples, tokenizer, embeddings, setting))
        if cut:
            remarks.append(
                f"{setting}: {cut} of {len(samples)} samples are cut to {length} tokens (unlearn.max_length)"
            )
    return remarks


def _sizes(samples: Samples, tokenizer: Any, embeddings: int, setting: str) -> Iterator[int]:
    """How many tokens each sample has. Of plain texts nothing can be wrong but tokens without an embedding."""
    unknown = max(tokenizer.get_vocab().values(), default=0) >= embeddings
    if samples.plain and not unknown:
        return
    for number, sample in _each(samples, tokenizer, setting):
        if unknown and max(sample.ids, default=0) >= embeddings:
            token = max(sample.ids)
            raise RecipeError(
                f"{setting}: row {number} holds the token {tokenizer.convert_ids_to_tokens(token)!r} (number {token}), and the "
                f"model has {embeddings} embeddings; take it out of the text, or give a model that knows it"
            )
        if not samples.plain and all(label == IGNORED for label in sample.labels[1:]):
            raise RecipeError(f"{setting}: row {number} has no token to learn; filter the row out")
        yield len(sample.ids)


def _each(samples: Samples, tokenizer: Any, setting: str) -> Iterator[tuple[int, Encoded]]:
    """Every row's number in its file, and all of its tokens."""
    numbers = samples.table[ROW].to_pylist() if ROW in samples.table.column_names else list(range(len(samples)))
    for start in range(0, len(samples), AT_ONCE):
        rows: Sequence[int] = range(start, min(start + AT_ONCE, len(samples)))
        for row, sample in zip(rows, encoded(samples, rows, tokenizer, WHOLE, setting), strict=True):
            yield numbers[row], sample
