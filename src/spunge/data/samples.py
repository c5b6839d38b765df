"""Texts on their way to a model: a sample is a prompt (may be empty) and the completion that is learned or scored."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from spunge.errors import RecipeError

IGNORED = -100  # label of a token that is neither learned nor scored


class Text(NamedTuple):
    prompt: str
    completion: str


class Encoded(NamedTuple):
    ids: list[int]
    labels: list[int]  # the ids of the completion, IGNORED elsewhere


class Batch(NamedTuple):
    """Right-padded. Shapes (b, t); labels are not shifted and IGNORED on prompts and padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    rows: tuple[int, ...] = ()  # which of the samples these are, where that is known


@dataclass(frozen=True)
class Samples:
    """Rows of text in an Arrow table: column `text`, or `prompt` and `completion`, or `messages`."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def texts(self, rows: Sequence[int], tokenizer: Any) -> list[Text]:
        """The given rows as texts; chat messages go through the tokenizer's template."""
        chosen = self.table.take(pa.array(rows, pa.int64()))
        if "text" in chosen.column_names:
            return [Text("", text) for text in chosen["text"].to_pylist()]
        if "prompt" in chosen.column_names:
            pairs = zip(chosen["prompt"].to_pylist(), chosen["completion"].to_pylist(), strict=True)
            return [Text(prompt, completion) for prompt, completion in pairs]
        return [_chat(messages, tokenizer) for messages in chosen["messages"].to_pylist()]

    @cached_property
    def sha256(self) -> str:
        """Of the rows' content, in order, whatever their layout in memory."""
        return table_sha256(self.table)


def union(parts: Mapping[str, Samples]) -> Samples:
    """The samples of all parts. A row of two parts stays twice, as the two branches together see it twice."""
    return Samples(pa.concat_tables([samples.table for samples in parts.values()]))


def table_sha256(table: pa.Table) -> str:
    """Of a table's column names, types and values, in order. Fast: it hashes Arrow buffers, not Python objects."""
    digest = hashlib.sha256()
    sink = pa.PythonFile(_Hashed(digest), mode="w")
    # Taking every row lays the buffers out anew, so that equal rows have equal bytes whatever table they came from.
    fresh = table.replace_schema_metadata(None).take(pa.array(np.arange(table.num_rows))).combine_chunks()
    with pa.ipc.new_stream(sink, fresh.schema) as writer:
        writer.write_table(fresh)
    return digest.hexdigest()


class _Hashed(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        return view.nbytes


def _chat(messages: list[dict[str, Any]], tokenizer: Any) -> Text:
    if not tokenizer.chat_template:
        raise RecipeError(
            "forget.messages: the model's tokenizer has no chat template; give prompt and completion instead"
        )
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    return Text(prompt, whole.removeprefix(prompt))


def encode(text: Text, tokenizer: Any, max_length: int) -> Encoded:
    """Tokens of prompt + completion, at most `max_length`: a long prompt loses its start, a long completion its end.

    A token belongs to the completion when any of its characters does.
    """
    boundary = len(text.prompt)
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text.prompt + text.completion, return_offsets_mapping=True)
        ids = list(coded["input_ids"])
        inside = [stop > boundary for _, stop in coded["offset_mapping"]]
    else:
        head = tokenizer(text.prompt)["input_ids"] if boundary else tokenizer("")["input_ids"]
        tail = tokenizer(text.completion, add_special_tokens=False)["input_ids"]
        ids, inside = [*head, *tail], [False] * len(head) + [True] * len(tail)
    first = inside.index(True) if True in inside else len(ids)
    tail_length = min(len(ids) - first, max_length if first == 0 else max_length - 1)
    skip = max(0, first + tail_length - max_length)
    ids, inside = ids[skip : first + tail_length], inside[skip : first + tail_length]
    return Encoded(ids, [token if scored else IGNORED for token, scored in zip(ids, inside, strict=True)])


def collate(samples: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Pad on the right to the longest. The padding's id is 0: it is masked out everywhere, so any id would do."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full((len(samples), width), IGNORED, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, : len(sample.ids)] = 1
        labels[row, : len(sample.ids)] = torch.tensor(sample.labels)
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def shuffled_batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Row numbers, epoch after epoch without end, each epoch in a new order; an epoch's last batch may be smaller."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows).tolist()
        yield from (order[start : start + size] for start in range(0, rows, size))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:  # (n, v), (n,) -> (n,) float32
    """Negative log-likelihood, in nats, of each label under the logits that predict it."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
