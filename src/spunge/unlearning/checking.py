"""What training will be given, looked at before anything is trained: rows of which nothing can be learned are refused."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spunge.data.samples import IGNORED, Encoded, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.batches import encoded
from spunge.unlearning.loop import TrainingSettings

AT_ONCE = 500  # rows
WHOLE = 1 << 30  # tokens: nothing is cut
SHORT, WORD = 32, re.compile(r"\w")  # characters of a text that may have no token; what a token is made of


@dataclass(frozen=True)
class Reader:
    """What reads the samples. embeddings: rows of the model's embedding matrix; positions: tokens that it has learned positions
    for, where they are learned."""

    tokenizer: Any
    embeddings: int
    positions: int | None = None
    seen: Mapping[int, str] = field(
        default_factory=dict
    )  # tokens in whose place images are put -> what they are called


def refuse_unusable(
    parts: Mapping[str, Samples],
    retain: Samples | None,
    settings: TrainingSettings,
    reader: Reader,
    decouple: Samples | None = None,
) -> list[str]:
    """Remarks on the samples of parts (attribute value -> samples), on those to retain and those of the prompt-decouple term; see
    `refuse_samples`."""
    every = [(f"forget, part {value!r}", samples, settings.length_of(value)) for value, samples in parts.items()]
    for name, rows in (("retain", retain), ("decouple", decouple)):
        if rows is not None:
            every.append((name, rows, settings.length_of("retain")))
    hidden = METHODS.get(settings.method).last_block is not None  # hidden states are learned, a single one too
    remarks = []
    for setting, samples, length in every:
        remarks += refuse_samples(samples, reader, length, setting, "unlearn.max_length", predicted=not hidden)
    return remarks


def refuse_samples(
    samples: Samples, reader: Reader, asked: int, setting: str, bound: str, predicted: bool = True
) -> list[str]:
    """Remarks on samples that are too long and will be cut, and on texts of a single token, whose token nothing predicts.

    asked: tokens of a sample at the most, as the setting `bound` says. predicted: it is tokens that are learned. Raises
    RecipeError, with the row's number, where a chat template refuses a conversation, where there is no token to learn (of texts:
    in none of them), and where a token has no embedding in the model.
    """
    remarks = []
    tokenizer, positions = reader.tokenizer, reader.positions
    length = asked if positions is None else min(asked, positions)
    why = bound if length == asked else "as many as the model has positions for"
    cut = sum(size > length for size in _sizes(samples, reader, setting))
    if cut:
        remarks.append(f"{setting}: {cut} of {len(samples)} samples are cut to {length} tokens ({why})")
    single = _single_tokens(samples, tokenizer, setting) if samples.plain else []
    if single and predicted:
        if len(single) == len(samples):
            raise RecipeError(
                f"{setting}: every text is a single token, of which nothing is learned; give longer texts"
            )
        which = f"{len(single)} of {len(samples)} samples, which are a single token (row {single[0]})"
        remarks.append(f"{setting}: nothing is learned of {which}")
    return remarks


def _sizes(samples: Samples, reader: Reader, setting: str) -> Iterator[int]:
    """How many tokens each sample has. Plain texts are not counted where the model knows every token, and sees nothing."""
    tokenizer, embeddings = reader.tokenizer, reader.embeddings
    unknown = max(tokenizer.get_vocab().values(), default=0) >= embeddings
    seen = reader.seen
    for number, sample in _each(samples, tokenizer, setting) if unknown or seen or not samples.plain else ():
        refuse_token(sample.ids, tokenizer, embeddings, seen, f"{setting}: row {number}")
        if not samples.plain and all(label == IGNORED for label in sample.labels[1:]):
            raise RecipeError(f"{setting}: row {number} has no token to learn; filter the row out")
        yield len(sample.ids)


def refuse_token(ids: Sequence[int], tokenizer: Any, embeddings: int, seen: Mapping[int, str], where: str) -> None:
    """Raises RecipeError for a token in whose place the model puts an image, and for one that it has no embedding for.

    where: the setting and the row, for the error. The others are as in `Reader`.
    """
    if (token := next((each for each in ids if each in seen), None)) is not None:
        raise RecipeError(
            f"{where} holds {tokenizer.convert_ids_to_tokens(token)!r}, in whose place the model puts what it sees "
            f"({seen[token]}), and rows are texts alone; take it out of the text"
        )
    if (token := max(ids, default=0)) >= embeddings:
        raise RecipeError(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(token)!r} (number {token}), and the model has "
            f"{embeddings} embeddings; take it out of the text, or give a model that knows it"
        )


def _single_tokens(samples: Samples, tokenizer: Any, setting: str) -> list[int]:
    """The rows' numbers of texts of one token, a start token among it. Raises RecipeError for a text that the tokenizer leaves
    nothing of. Only short texts and those without letters are asked."""
    single: list[int] = []
    for start in range(0, len(samples), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(samples)))
        for row, text in zip(rows, samples.texts(rows, tokenizer), strict=True):
            said = text.completion
            if len(said) > SHORT and WORD.search(said):
                continue
            if not tokenizer(said, add_special_tokens=False)["input_ids"]:
                raise RecipeError(
                    f"{setting}: row {samples.number(row)} ({said[:20]!r}) has no token to learn; filter the row out"
                )
            if len(tokenizer(said)["input_ids"]) == 1:
                single.append(samples.number(row))
    return single


def _each(samples: Samples, tokenizer: Any, setting: str) -> Iterator[tuple[int, Encoded]]:
    """Every row's number in its file, and all of its tokens."""
    for start in range(0, len(samples), AT_ONCE):
        rows: Sequence[int] = range(start, min(start + AT_ONCE, len(samples)))
        for row, sample in zip(rows, encoded(samples, rows, tokenizer, WHOLE, setting), strict=True):
            yield samples.number(row), sample
