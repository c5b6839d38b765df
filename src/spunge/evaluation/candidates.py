"""Log-likelihoods of several candidates after one prompt: the prompt is run once, its keys and values serve every candidate.

Prompts are padded on the left, so that all end in the same column; positions are given explicitly. The first token of each
candidate is scored by the prompt's last position, the others by a second pass over the candidates alone.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.evaluation.likelihood import Likelihood, batch_tokens, grouped, head_at
from spunge.models import Base
from spunge.texts import IGNORED, Encoded


class Question(NamedTuple):
    prompt: list[int]  # ids, at least one
    candidates: list[list[int]]  # ids of each


def question_of(encoded: Sequence[Encoded]) -> Question | None:
    """The shared prompt of an item's texts; None where their prompts' tokens differ or there is no token before one."""
    starts = [next((at for at, label in enumerate(text.labels) if label != IGNORED), len(text.ids)) for text in encoded]
    prompts = [text.ids[:start] for text, start in zip(encoded, starts, strict=True)]
    if not prompts[0] or any(prompt != prompts[0] for prompt in prompts):
        return None
    return Question(prompts[0], [text.ids[start:] for text, start in zip(encoded, starts, strict=True)])


def candidate_likelihoods(
    base: Base, questions: Sequence[Question], progress: Callable[[int, int], None]
) -> list[list[Likelihood]]:
    """For each question, the log-likelihood of every candidate given the prompt."""
    found: list[list[Likelihood]] = [[] for _ in questions]
    sizes = [len(question.prompt) + sum(len(candidate) for candidate in question.candidates) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: -sizes[index])
    finished = 0
    for rows in grouped(order, sizes, batch_tokens(base)):
        for row, likelihoods in zip(rows, _scored(base, [questions[row] for row in rows]), strict=True):
            found[row] = likelihoods
        finished += len(rows)
        progress(finished, len(questions))
    return found


@torch.inference_mode()
def _scored(base: Base, questions: Sequence[Question]) -> list[list[Likelihood]]:
    width = max(len(question.prompt) for question in questions)
    ids = torch.zeros(len(questions), width, dtype=torch.long)
    mask = torch.zeros(len(questions), width, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, width - len(question.prompt) :] = torch.tensor(question.prompt)
        mask[row, width - len(question.prompt) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    last = torch.zeros(len(questions), width, dtype=torch.bool)
    last[:, -1] = True
    with head_at(base.model, last.to(base.device)):
        out = _forward(base, ids, mask, positions, None)
    first = out.logits[0].float().log_softmax(-1).cpu()  # (questions, vocabulary)
    owners = [row for row, question in enumerate(questions) for _ in question.candidates]
    candidates = [candidate for question in questions for candidate in question.candidates]
    sums = first[torch.tensor(owners), torch.tensor([candidate[0] for candidate in candidates])].double()
    longer = [at for at, candidate in enumerate(candidates) if len(candidate) > 1]
    if longer:
        rows = torch.tensor([owners[at] for at in longer])
        sums[longer] += _rest(base, out.past_key_values, rows, mask, positions, [candidates[at] for at in longer])
    scores = iter(zip(sums.tolist(), candidates, strict=True))
    return [[Likelihood(*_counted(next(scores))) for _ in question.candidates] for question in questions]


def _counted(scored: tuple[float, list[int]]) -> tuple[float, int]:
    return scored[0], len(scored[1])


def _rest(
    base: Base, cache: Any, rows: Tensor, mask: Tensor, positions: Tensor, candidates: Sequence[list[int]]
) -> Tensor:
    """Sums over each candidate's tokens after its first: (n,). `rows` (n,) says whose prompt it follows."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(rows.to(base.device))
    width = max(len(candidate) for candidate in candidates) - 1
    ids = torch.zeros(len(candidates), width, dtype=torch.long)
    labels = torch.full((len(candidates), width), IGNORED, dtype=torch.long)
    for at, candidate in enumerate(candidates):
        ids[at, : len(candidate) - 1] = torch.tensor(candidate[:-1])
        labels[at, : len(candidate) - 1] = torch.tensor(candidate[1:])
    given = labels != IGNORED
    whole = torch.cat([mask[rows], given.long()], dim=1)
    following = positions[rows, -1:] + 1 + torch.arange(width)
    with head_at(base.model, given.to(base.device)):
        logits = _forward(base, ids, whole, following, cache).logits[0]
    logs = -torch.nn.functional.cross_entropy(logits.float(), labels[given].to(base.device), reduction="none")
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
