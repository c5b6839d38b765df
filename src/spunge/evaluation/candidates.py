"""Log-likelihoods of several candidates after one prompt: what they share is run once, its keys and values serve every one.

Shared are the prompt and the tokens that all candidates begin with. Prompts are padded on the left, so that all end in the
same column; positions are given explicitly. A candidate's first token of its own is scored by the last shared position, its
others by a second pass over them alone, in batches of like length.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Encoded, token_losses
from spunge.evaluation.likelihood import Likelihood, batch_tokens, head_at
from spunge.model.board import batched
from spunge.model.loading import Base
from spunge.progress import Steps

ENOUGH = {"cpu": 128}  # tokens that keep a device busy; a batch takes more than these only with little padding
ENOUGH_ELSEWHERE = 1024
PADDING = 0.2  # share of a batch's tokens that is little


class Question(NamedTuple):
    prompt: list[int]  # ids, at least one
    candidates: list[list[int]]  # ids of each


class Shared(NamedTuple):
    """What a question's candidates share, and the rest of each."""

    context: list[int]  # the prompt and the candidates' common beginning
    common: int  # tokens of that beginning
    rests: list[list[int]]  # ids of each candidate after it; may be empty

    @property
    def following(self) -> int:
        """Tokens of the second pass."""
        return sum(max(0, len(rest) - 1) for rest in self.rests)


def question_of(encoded: Sequence[Encoded]) -> Question | None:
    """The shared prompt of an item's texts; None where their prompts' tokens differ or there is no token before one.

    What a tokenizer puts behind every text is no token of the candidate.
    """
    starts = [next((at for at, label in enumerate(text.labels) if label != IGNORED), len(text.ids)) for text in encoded]
    prompts = [text.ids[:start] for text, start in zip(encoded, starts, strict=True)]
    if not prompts[0] or any(prompt != prompts[0] for prompt in prompts):
        return None
    scored = [[token for token in text.labels if token != IGNORED] for text in encoded]
    if any(text.ids[start : start + len(own)] != own for text, start, own in zip(encoded, starts, scored, strict=True)):
        return None
    return Question(prompts[0], scored)


def shared(question: Question) -> Shared:
    columns = zip(*question.candidates, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    context = question.prompt + question.candidates[0][:common]
    return Shared(context, common, [candidate[common:] for candidate in question.candidates])


def candidate_likelihoods(base: Base, questions: Sequence[Question], progress: Steps) -> list[list[Likelihood]]:
    """For each question, the log-likelihood of every candidate given the prompt."""
    scores: list[list[Likelihood]] = [[] for _ in questions]
    parts = [shared(question) for question in questions]
    widths, following = [len(part.context) for part in parts], [part.following for part in parts]
    finished = 0

    groups = alike(widths, batch_tokens(base), enough(base), following)
    sizes = [sum(pair) for pair in zip(widths, following, strict=True)]
    probed = parts[0].context if parts else []
    for rows, logs in batched(base, groups, sizes, _of_rows, parts, probed, "evaluate"):
        sums = iter(logs)
        for row in rows:
            scores[row] = [Likelihood(next(sums), len(candidate)) for candidate in questions[row].candidates]
        finished += len(rows)
        progress(finished, len(questions))
    return scores


def enough(base: Base) -> int:
    return ENOUGH.get(base.device.type, ENOUGH_ELSEWHERE)


def alike(sizes: Sequence[int], budget: int, least: int, extras: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Groups of rows of like size, longest first. Padded sizes and extras together stay within the budget, and padding
    within its share from `least` tokens on."""
    rows: list[int] = []
    filled = extra = 0
    for row in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        more = extras[row] if extras else 0
        padded = (len(rows) + 1) * sizes[rows[0] if rows else row]
        wasteful = padded > least and padded - filled - sizes[row] > PADDING * padded
        if rows and (wasteful or padded + extra + more > budget):
            yield rows
            rows, filled, extra = [], 0, 0
        rows.append(row)
        filled, extra = filled + sizes[row], extra + more
    if rows:
        yield rows


def _of_rows(base: Base, parts: Sequence[Shared], rows: Sequence[int]) -> list[float]:
    return _scored(base, [parts[row] for row in rows])


@torch.inference_mode()
def _scored(base: Base, parts: Sequence[Shared]) -> list[float]:
    """Log-likelihoods of all candidates, question after question."""
    width = max(len(part.context) for part in parts)
    ids, mask, wanted = (torch.zeros(len(parts), width, dtype=torch.long) for _ in range(3))
    for row, part in enumerate(parts):
        ids[row, width - len(part.context) :] = torch.tensor(part.context)
        mask[row, width - len(part.context) :] = 1
        wanted[row, width - part.common - 1 :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with head_at(base, wanted.bool().to(base.device)):
        out = _forward(base, ids, mask, positions, None)
    owners = [row for row, part in enumerate(parts) for _ in part.rests]
    rests = [rest for part in parts for rest in part.rests]
    sums = _begun(out.logits[0], parts)
    longer = [at for at, rest in enumerate(rests) if len(rest) > 1]
    groups = list(alike([len(rests[at]) - 1 for at in longer], batch_tokens(base), enough(base)))
    for number, group in enumerate([[longer[at] for at in each] for each in groups]):
        last = number == len(groups) - 1
        cache = out.past_key_values if last else copy.deepcopy(out.past_key_values)
        rows = torch.tensor([owners[at] for at in group])
        sums[group] += _rest(base, cache, rows, mask, positions, [rests[at] for at in group])
    return list(sums.tolist())


def _begun(logits: Tensor, parts: Sequence[Shared]) -> Tensor:
    """Sums over the common beginning and each candidate's first token of its own: (n,). logits: (common + 1 a part, v)."""
    logs = logits.float().log_softmax(-1)
    places: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    start = 0
    for part in parts:
        for rest in part.rests:
            scored = [*part.context[len(part.context) - part.common :], *rest[:1]]
            places += range(start, start + len(scored))
            tokens += scored
            counts.append(len(scored))
        start += part.common + 1
    at = torch.tensor([places, tokens], dtype=torch.long, device=logs.device)
    picked = logs[at[0], at[1]].double().cpu()
    return torch.stack([piece.sum() for piece in torch.split(picked, counts)])


def _rest(base: Base, cache: Any, rows: Tensor, mask: Tensor, positions: Tensor, rests: Sequence[list[int]]) -> Tensor:
    """Sums over each candidate's tokens after its first own one: (n,). `rows` (n,) says whose context it follows."""
    cache.batch_select_indices(rows.to(base.device))
    width = max(len(rest) for rest in rests) - 1
    ids = torch.zeros(len(rests), width, dtype=torch.long)
    labels = torch.full((len(rests), width), IGNORED, dtype=torch.long)
    for at, rest in enumerate(rests):
        ids[at, : len(rest) - 1] = torch.tensor(rest[:-1])
        labels[at, : len(rest) - 1] = torch.tensor(rest[1:])
    given = labels != IGNORED
    whole = torch.cat([mask[rows], given.long()], dim=1)
    following = positions[rows, -1:] + 1 + torch.arange(width)
    with head_at(base, given.to(base.device)):
        logits = _forward(base, ids, whole, following, cache).logits[0]
    logs = -token_losses(logits, labels[given].to(base.device))
    return torch.stack([piece.sum() for piece in torch.split(logs.double().cpu(), given.sum(dim=1).tolist())])


def _forward(base: Base, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
    device = base.device
    return base.model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
    )
