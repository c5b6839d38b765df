"""DeMem (Kassem, Mahmoud and Saad 2023, arXiv 2305.01550): write something else than the true continuation, by PPO.

The model writes k continuations of each forget prompt. With s the similarity of one to the sample's own answer and pi, pi_0 the
model and the base,

    R         = (1 - s) - beta * sum over its tokens of (log pi_old - log pi_0)
    A         = R - mean of R over the prompt's other continuations
    ratio     = pi / pi_old of a token
    forget loss = -mean over tokens, and then over continuations, of min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)

pi_old is the model that wrote them; each batch of continuations is learned for `updates` steps. The similarity is a scorer's:
`rouge` by default, which needs no model; `bleu`, and `similarity` by sentence embeddings, are others. The paper rewards negative
BERTScore, which is another such score of meaning, and measures with SacreBLEU. A continuation without a letter or digit has R's
first term at 0.

The paper trains with PPO and a value head. trl 1.16 has no PPO trainer any more, and a value head is no part of a delta: the mean
of the prompt's other continuations stands in its place (RLOO, Ahmadian et al. 2024, arXiv 2402.14740), and one advantage is that of
all tokens. Ratios are taken without dropout, so activations are not recomputed. A pass over the samples takes `updates` times as
many steps. The numbers are no figures of the paper's, and none of these was measured again here.
"""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.recipe.scoring import SCORING, Scoring
from spunge.unlearning.batches import samples_of
from spunge.unlearning.calls import FORGET, Group, Writing, descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import Session, descend, needs_retain
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.rollouts import PolicySettings, Rollout, Writer, check, inputs, kept, rollouts_of, writer_of
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import evaluation_mode, stored_entries

IF_FLAT = "all continuations of each prompt had the same reward; raise samples or tokens, or take another scorer"


class DeMemSettings(PolicySettings):
    method: str = "demem"
    scorer: Scoring = Field("rouge", validate_default=True, description=f"Who scores what is written: {SCORING}")
    tokens: int = Field(50, ge=1, description="Tokens that are written after a prompt, at the most.")
    samples: int = Field(4, ge=2, description="k: continuations of each prompt.")
    beta: float = Field(0.05, ge=0, description="Weight of the penalty for leaving the base.")
    clip: float = Field(0.2, gt=0, lt=1, description="How far a token's ratio counts.")
    updates: int = Field(4, ge=1, description="Steps on each batch of continuations.")

    def steps_for(self, rows: int) -> int:
        """Optimizer steps for so many samples: each batch is learned `updates` times."""
        return super().steps_for(rows) * (1 if self.steps is not None else self.updates)


def unlearn(task: Task, settings: DeMemSettings) -> Branch:
    """Write other continuations of the forget prompts than the true ones (PPO on negative similarity)."""
    if task.base.checkpoint_activations:
        raise RecipeError(
            "model.checkpoint_activations: true: demem takes its ratios without dropout, and the model is then not in the mode in "
            "which activations are recomputed; set it to false, or lower batch_size and raise accumulation"
        )
    forget = forget_stream(task, settings, settings.updates)
    writer = writer_of(task, settings, forget)

    def loss(session: Session, batch: Batch) -> Tensor:
        with evaluation_mode(session.trained.model):
            own = written(session, settings, writer, batch)
            session.logged["reward"] = sum(each.reward for each in own) / len(own)
            found = session.outputs(writer.batch(own, batch.ids.device))
        return surrogate(found, own, settings.clip)

    return descend(task, settings, loss, over=samples_of, forget=forget, remembered=["rollouts"], if_flat=IF_FLAT)


def written(session: Session, settings: DeMemSettings, writer: Writer, batch: Batch) -> list[Rollout]:
    """The continuations of a batch's rows: those of this round, made at its first step and kept for the others."""
    memory, now = session.memory["rollouts"], session.step // settings.updates
    every: dict[int, list[Rollout]] = {}
    for each in rollouts_of(memory):
        if each.round == now:
            every.setdefault(each.row, []).append(each)
    whole = {row: own for row, own in every.items() if len(own) == settings.samples}
    if missing := [row for row in dict.fromkeys(batch.rows) if row not in whole]:
        whole |= made(session, settings, writer, missing, now)
        memory[:] = kept([each for own in whole.values() for each in own])
    return [each for row in batch.rows for each in whole[row]]


def made(
    session: Session, settings: DeMemSettings, writer: Writer, rows: Sequence[int], now: int
) -> dict[int, list[Rollout]]:
    """New continuations of some rows, with their rewards and advantages."""
    every = writer.rollouts(rows, now)
    together = writer.batch(every, session.task.base.device)
    with torch.no_grad():
        base, own = base_outputs(session.trained, together).losses(), session.outputs(together)
        logs = -own.losses()
        penalties = own.per_sample(logs + base).tolist()
    values = [each.reward - settings.beta * penalty for each, penalty in zip(every, penalties, strict=True)]
    gains = advantages(torch.tensor(values, dtype=torch.float64).view(len(rows), -1)).flatten().tolist()
    each_logs = [each.tolist() for each in torch.split(logs, [len(each.tokens) for each in every])]
    found: dict[int, list[Rollout]] = {row: [] for row in rows}
    for each, gain, own_logs in zip(every, gains, each_logs, strict=True):
        found[each.row].append(each._replace(advantage=gain, logs=own_logs))
    return found


def advantages(rewards: Tensor) -> Tensor:
    """(prompts, k): each reward less the mean of its prompt's others."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def surrogate(found: Scored, rollouts: Sequence[Rollout], clip: float) -> Tensor:
    """Scalar: PPO's clipped loss of the model's outputs on some rollouts."""
    logs = -found.losses()
    old = logs.new_tensor([value for each in rollouts for value in each.logs])
    gains = logs.new_tensor([each.advantage for each in rollouts for _ in each.tokens])
    return found.sample_mean(clipped(logs, old, gains, clip))


def clipped(logs: Tensor, old: Tensor, gains: Tensor, clip: float) -> Tensor:
    """(n,): of tokens' log-probabilities now and when they were written, and their advantages."""
    ratio = (logs - old).exp()
    return -torch.minimum(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains)


def calls(settings: DeMemSettings, _depth: int) -> list[Group]:
    looked = FORGET._replace(gradient=False, samples=settings.samples)
    return descending(settings, (looked, looked, FORGET._replace(samples=settings.samples)))


def writing(samples: Samples, settings: DeMemSettings, passes: float) -> Writing:
    return settings.writing(math.ceil(len(samples) * passes / settings.updates))


DEMEM = Method(
    settings=DeMemSettings,
    source="Kassem, Mahmoud and Saad 2023, arXiv 2305.01550",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    inputs=inputs,
    check=check,
    writing=writing,
)
