"""Texts on their way to a model: a sample is a prompt (may be empty) and the completion that is learned or scored."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from spunge.data.arrays import shuffled
from spunge.data.chat import Conversation, Message, read_answer, read_conversation, read_pair, read_tools, tools_beside
from spunge.data.mapping import give_back
from spunge.data.query import ROW
from spunge.data.tables import taken
from spunge.data.template import Template, render

Answer = str | Message  # of a row of prompt and completion, of a conversation
PROMPT_SHARE = 0.5  # of a sample's tokens, left to its prompt where the answer alone would fill them
HASHED_ROWS = 1 << 16  # at a time
IGNORED = -100  # label of a token that is neither learned nor scored


class Text(NamedTuple):
    """A prompt, and what is learned or scored after it."""

    prompt: str
    completion: str
    unscored: Sequence[tuple[int, int]] = ()  # [start, stop) of the completion's characters that are context too
    templated: bool = False  # a chat template wrote it, with every special token that belongs there
    ends: bool = False  # the tokenizer's end token follows, and is learned or scored


class Encoded(NamedTuple):
    ids: list[int]
    labels: list[int]  # the ids of the completion, IGNORED elsewhere


class Counted(NamedTuple):
    """What is known of a batch without asking the device that it lies on, which would first have to end what it is at."""

    mask: Tensor  # the batch's own, by which it is known again
    labels: Tensor
    wanted: np.ndarray  # (b, t) bool: the next token is learned or scored
    reach: tuple[int, ...]  # (b,): places of each row up to the last that is read or scored


class Batch(NamedTuple):
    """Right-padded. Shapes (b, t); labels are not shifted and IGNORED on prompts and padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    rows: tuple[int, ...] = ()  # which of the samples these are, where that is known
    step: "tuple[Batch, ...]" = ()  # all batches of its optimizer step, where those are several
    drawn: tuple[int, ...] = ()  # the rows that were drawn together, of which these begin at `start`
    start: int = 0
    counts: bool = True  # False: a piece that stands in for none, where there are fewer samples than pieces
    collated: Counted | None = None

    @property
    def counted(self) -> Counted:
        """Of the mask and labels that the batch has now."""
        known = self.collated
        if known is not None and known.mask is self.mask and known.labels is self.labels:
            return known
        return _counted(self.mask, self.labels, self.mask.cpu().numpy(), self.labels.cpu().numpy())

    @property
    def learned(self) -> int:
        """Tokens that are learned: a first one is context alone."""
        return int(self.counted.wanted.sum())


def _counted(mask: Tensor, labels: Tensor, of_mask: np.ndarray, of_labels: np.ndarray) -> Counted:
    wanted = np.zeros(of_labels.shape, bool)
    wanted[:, :-1] = of_labels[:, 1:] != IGNORED
    used = (of_mask != 0) | wanted
    reach = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0)
    return Counted(mask, labels, wanted, tuple(reach.tolist()))


def sent(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Numbers of this process's memory on a device, which need not be there yet when this returns."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Rendering(NamedTuple):
    """How rows of prompt and completion, and of conversations, become texts."""

    chat: bool = False  # prompt and completion go through the chat template, as conversations always do
    learn: Literal["last", "all"] = "last"  # which of the assistant's messages
    end: str = "auto"  # what ends an answer: auto, none, or a text
    variables: Mapping[str, Any] = {}  # of the chat template


@dataclass(frozen=True)
class Samples:
    """Rows of text in an Arrow table: column `text`; `prompt`, `completion` and `end`; or `conversation`, a line of JSON.

    Beside them may stand `refusal`, and `__row__`, the row's number in its file, from 1.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def number(self, row: int) -> int:
        """A row's number in its file, from 1; where it came from none, its place here."""
        return int(self.table[ROW][row].as_py()) if ROW in self.table.column_names else row

    @property
    def plain(self) -> bool:
        """Whether the rows are plain texts, without prompts."""
        return "text" in self.table.column_names

    @property
    def form(self) -> str:
        """In words, how the rows become texts and what of them is learned."""
        if self.plain:
            return "plain texts, learned whole"
        if "prompt" in self.table.column_names:
            ends = pc.unique(self.table["end"]).to_pylist() if "end" in self.table.column_names else ["none"]
            end = {"auto": " and the tokenizer's end token, if it has one,", "none": ""}.get(
                first := min(ends), f" and {first!r}"
            )
            return f"prompt and completion, joined as they are, without a chat template; the completion{end} is learned"
        conversation = Conversation.from_json(self.table["conversation"][0].as_py())
        answers = "every assistant message" if conversation.learn == "all" else "the last assistant message"
        end = {"auto": " with the end of its turn", "none": " without its end"}.get(
            conversation.end, f" and {conversation.end!r}"
        )
        return f"conversations, through the chat template; {answers} is learned{end}"

    def texts(self, rows: Sequence[int], tokenizer: Any, setting: str = "rows") -> list[Text]:
        """The given rows as texts; conversations go through the tokenizer's template. `setting` names the rows in errors."""
        chosen = taken(self.table, rows)
        if self.plain:
            return [Text("", text) for text in chosen["text"].to_pylist()]
        if "prompt" in chosen.column_names:
            ends = chosen["end"].to_pylist() if "end" in chosen.column_names else ["none"] * len(chosen)
            pairs = zip(chosen["prompt"].to_pylist(), chosen["completion"].to_pylist(), ends, strict=True)
            return [_ended(*pair) for pair in pairs]
        numbers = chosen[ROW].to_pylist() if ROW in chosen.column_names else rows
        lines = zip(chosen["conversation"].to_pylist(), numbers, strict=True)
        templates: dict[str, Template] = {}
        return [_conversed(line, templates, tokenizer, setting, number) for line, number in lines]

    def answers(self) -> list[Answer]:
        """Each row's completion, or the last message that is learned. Not of plain texts."""
        if "prompt" in self.table.column_names:
            return list(self.table["completion"].to_pylist())
        return [Conversation.from_json(line).answer for line in self.table["conversation"].to_pylist()]

    def answered(self, answers: Sequence[Answer], learn: Literal["last", "all"] | None = None) -> "Samples":
        """The same prompts with other answers; a text answers a conversation as the assistant's message.

        learn: which of a conversation's messages are replaced and learned. Default: as they are.
        """
        if "prompt" in self.table.column_names:
            place = self.table.column_names.index("completion")
            return Samples(self.table.set_column(place, "completion", pa.array(answers, pa.large_string())))
        lines = []
        for line, answer in zip(self.table["conversation"].to_pylist(), answers, strict=True):
            conversation = Conversation.from_json(line)
            message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
            lines.append(replace(conversation, learn=learn or conversation.learn).answered(message).to_json())
        place = self.table.column_names.index("conversation")
        return Samples(self.table.set_column(place, "conversation", pa.array(lines, pa.large_string())))

    def answers_alone(self) -> "Samples":
        """The same rows, of which the last answer alone is scored, without what ends it: an end token or an end of turn is no word
        of the answer, and would count as one that is known, or as one that is not."""
        table = self.table
        if "end" in table.column_names:
            place = table.column_names.index("end")
            return Samples(table.set_column(place, "end", pa.array(["none"] * len(self), pa.string())))
        if "conversation" not in table.column_names:
            return self
        conversations = map(Conversation.from_json, table["conversation"].to_pylist())
        lines = [replace(each, learn="last", end="none").to_json() for each in conversations]
        place = table.column_names.index("conversation")
        return Samples(table.set_column(place, "conversation", pa.array(lines, pa.large_string())))

    def words(self) -> list[str]:
        """Everything that the rows say, without what a template adds: texts, prompts, answers, messages."""
        named = ("text", "prompt", "completion", "refusal")
        said = [text for name in named if name in self.table.column_names for text in self.table[name].to_pylist()]
        if "conversation" in self.table.column_names:
            for line in self.table["conversation"].to_pylist():
                said += [message["content"] for message in Conversation.from_json(line).messages]
        return [text for text in said if text]

    @cached_property
    def sha256(self) -> str:
        """Of the rows' content, in order, whatever their layout in memory and their place in the source."""
        return table_sha256(self.table)


def _ended(prompt: str, completion: str, end: str) -> Text:
    return Text(prompt, completion + ("" if end in ("auto", "none") else end), ends=end == "auto")


def _conversed(line: str, templates: dict[str, Template], tokenizer: Any, setting: str, number: int) -> Text:
    conversation = Conversation.from_json(line)
    key = repr(conversation.variables)
    if key not in templates:
        templates[key] = Template(tokenizer, conversation.variables, setting)
    text, scored, ends = render(conversation, templates[key], f"{setting}: row {number}")
    first, last = scored[0][0], len(text)
    stops = [stop for _, stop in scored]
    starts = [*(start for start, _ in scored[1:]), last]
    unscored = [(stop - first, start - first) for stop, start in zip(stops, starts, strict=True) if start > stop]
    return Text(text[:first], text[first:], unscored, templated=True, ends=ends)


def sample_table(
    table: pa.Table,
    rendering: Rendering,
    setting: str,
    rows: Sequence[int] | np.ndarray,
    names: Callable[[], list[str]] | None = None,
    tools: pa.ChunkedArray | None = None,
) -> pa.Table:
    """The table of Samples for columns named by role: text; prompt and completion; or messages; and refusal.

    rows: their numbers in their files. tools: the functions that each row's template is told of, where rows have any. names:
    gives `row 3 of chats.jsonl` and so on. Raises RecipeError for a conversation of no known shape, naming its row.
    """
    names = names or (lambda: [f"row {row}" for row in rows])
    kept = {name: table[name] for name in ("text", "refusal") if name in table.column_names}
    if "refusal" in kept and pa.types.is_nested(kept["refusal"].type):
        cells = zip(kept["refusal"].to_pylist(), names(), strict=True)
        answers = [read_answer(cell, f"{setting}.refusal: {name}") for cell, name in cells]
        kept["refusal"] = pa.chunked_array([pa.array(answers, pa.string())])
    if "text" not in kept:
        kept |= _told(table, rendering, setting, names, tools)
    return pa.table({**kept, ROW: pa.array(rows, pa.int64())})


def _told(
    table: pa.Table,
    rendering: Rendering,
    setting: str,
    names: Callable[[], list[str]],
    tools: pa.ChunkedArray | None,
) -> dict[str, Any]:
    """Columns of prompts and completions, or of conversations."""
    nested = any(pa.types.is_nested(table[name].type) for name in table.column_names if name != "refusal")
    if "messages" not in table.column_names and not rendering.chat and not nested:
        ends = pa.array([rendering.end] * len(table), pa.string())
        return {"prompt": table["prompt"], "completion": table["completion"], "end": ends}
    told, rows = [None] * len(table) if tools is None else tools.to_pylist(), names()
    if "messages" in table.column_names:
        cells = table["messages"].to_pylist()
        read = [
            (read_conversation(cell, f"{setting}.messages: {row}"), 0) for cell, row in zip(cells, rows, strict=True)
        ]
        told = [own or tools_beside(cell) for own, cell in zip(told, cells, strict=True)]
    else:
        pairs = zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), rows, strict=True)
        read = [read_pair(prompt, completion, f"{setting}: {row}") for prompt, completion, row in pairs]
    lines = []
    for (messages, start), own, row in zip(read, told, rows, strict=True):
        functions = read_tools(own, f"{setting}: {row}: tools")
        variables = {**rendering.variables, "tools": functions} if functions else rendering.variables
        lines.append(Conversation(messages, start, rendering.learn, rendering.end, variables).to_json())
    return {"conversation": pa.array(lines, pa.large_string())}


def union(parts: Mapping[str, Samples]) -> Samples:
    """The samples of all parts. A row of two parts stays twice, as the two branches together see it twice."""
    return Samples(pa.concat_tables([samples.table for samples in parts.values()]))


def table_sha256(table: pa.Table) -> str:
    """Of a table's column names, types and values, in order, but for row numbers. It hashes Arrow buffers, which is fast."""
    table = table.drop_columns([ROW]) if ROW in table.column_names else table
    digest = hashlib.sha256()
    sink = pa.PythonFile(_Hashed(digest), mode="w")
    table = table.replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for start in range(0, max(1, table.num_rows), HASHED_ROWS):
            # Taking every row lays the buffers out anew, so that equal rows have equal bytes whatever table they came from.
            give_back()
            piece = table.slice(start, HASHED_ROWS)
            writer.write_table(piece.take(pa.array(np.arange(piece.num_rows))).combine_chunks())
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


def encode(text: Text, tokenizer: Any, max_length: int, prompt_share: float = 0.0) -> Encoded:
    """Tokens of prompt + completion, at most `max_length`: a long prompt loses its start, a long completion its end.

    prompt_share: of max_length, as much as the completion leaves to the prompt at least, as far as the prompt needs it. A prompt's
    start token is kept. A token belongs to the completion when any of its characters does. An end is not taught
    where it was cut off, nor twice where the tokenizer closes every text by itself.
    """
    ids, inside = _tokens(text, tokenizer)
    end = tokenizer.eos_token_id if text.ends else None
    if end is not None:
        if not ids or ids[-1] != end:
            ids.append(end)
            inside.append(True)
        inside[-1] = True
    return _cut(ids, inside, tokenizer, max_length, prompt_share)


def encode_apart(text: Text, tokenizer: Any, max_length: int) -> Encoded:
    """As `encode`, with prompt and completion tokenised each by itself, so that no token holds characters of both."""
    head = start_once(tokenizer(text.prompt, add_special_tokens=not text.templated)["input_ids"], tokenizer)
    if head and head[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        head.pop()  # the tokenizer closes every text
    tail = list(tokenizer(text.completion, add_special_tokens=False)["input_ids"])
    return _cut(head + tail, [False] * len(head) + [True] * len(tail), tokenizer, max_length)


def crosses_the_join(text: Text, tokenizer: Any) -> bool:
    """Whether some token holds characters of both the prompt and the completion."""
    if not text.prompt or not tokenizer.is_fast:
        return False
    boundary = len(text.prompt)
    coded = tokenizer(text.prompt + text.completion, return_offsets_mapping=True)
    return any(start < boundary < stop for start, stop in coded["offset_mapping"])


def _cut(ids: list[int], inside: list[bool], tokenizer: Any, max_length: int, prompt_share: float = 0.0) -> Encoded:
    first = inside.index(True) if True in inside else len(ids)
    tail_length = min(len(ids) - first, max_length - min(first, max(1, int(prompt_share * max_length))))
    skip = max(0, first + tail_length - max_length)
    kept = list(range(skip, first + tail_length))
    if 0 < skip < first and ids[0] == tokenizer.bos_token_id:
        kept[0] = 0
    labels = [ids[at] if inside[at] else IGNORED for at in kept]
    return Encoded([ids[at] for at in kept], labels)


def _tokens(text: Text, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """All tokens, and which of them are the completion's."""
    boundary, whole = len(text.prompt), text.prompt + text.completion
    if tokenizer.is_fast:
        coded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=not text.templated)
        ids = start_once(coded["input_ids"], tokenizer)
        skipped = [(boundary + start, boundary + stop) for start, stop in text.unscored]
        inside = [
            stop > boundary and not any(low <= start and stop <= high for low, high in skipped)
            for start, stop in coded["offset_mapping"]
        ]
        return ids, inside[len(inside) - len(ids) :]
    ids = [] if text.templated else list(tokenizer("")["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids.pop()  # it closes every text, so it would stand before this one
    inside = [False] * len(ids)
    for piece, scored in _pieces(text):
        own = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += own
        inside += [scored] * len(own)
    once = start_once(ids, tokenizer)
    return once, inside[len(inside) - len(once) :]


def start_once(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """A text's tokens with one start token, where the text begins with it (as one that a chat template wrote) and the tokenizer
    puts another before it."""
    first = tokenizer.bos_token_id
    return list(ids)[1:] if first is not None and list(ids[:2]) == [first, first] else list(ids)


def _pieces(text: Text) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each is scored."""
    yield text.prompt, False
    at = 0
    for start, stop in text.unscored:
        yield text.completion[at:start], True
        yield text.completion[start:stop], False
        at = stop
    if text.completion[at:]:
        yield text.completion[at:], True


def collate(samples: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Pad on the right to the longest. The padding's id is 0: it is masked out everywhere, so any id would do."""
    width = max(len(sample.ids) for sample in samples)
    made = torch.zeros(3, len(samples), width, dtype=torch.long)
    ids, mask, labels = made
    labels.fill_(IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, : len(sample.ids)] = 1
        labels[row, : len(sample.ids)] = torch.tensor(sample.labels)
    there = sent(made, device)
    known = _counted(there[1], there[2], mask.numpy(), labels.numpy())
    return Batch(there[0], known.mask, known.labels, collated=known)


def shuffled_batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Row numbers, epoch after epoch without end, each epoch in a new order; an epoch's last batch may be smaller."""
    generator = np.random.default_rng(seed)
    while True:
        order = shuffled(rows, generator)
        yield from (order[start : start + size].tolist() for start in range(0, rows, size))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:  # (n, v), (n,) -> (n,) float32
    """Negative log-likelihood, in nats, of each label under the logits that predict it."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
