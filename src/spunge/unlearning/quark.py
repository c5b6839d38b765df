"""Quark (Lu et al. 2022, arXiv 2205.13636): learn what the model writes itself, told how good it is, and ask for the best.

Now and then the model writes after every forget prompt that its steps learn. All that was written so far is a pool, and is cut by
its rewards into K equal levels, the best first; what is left over is of the last. A step learns texts y of the pool after their
prompts x, with a label r of the level before the prompt:

    loss = -log p(y | r, x) + beta * KL(p(. | r, x) || p_0(. | x)) - entropy * H(p(. | r, x))

each the mean over a text's tokens, and then over texts, p_0 the base. The reward is 1 - score of a scorer, toxicity by default;
`similarity`, `rouge` or `bleu` reward what is unlike the sample's own answer: knowledge is forgotten by these (`scorer: rouge`),
not by the default. A text without a letter or digit has reward 0.

The authors add K tokens to the vocabulary. A delta holds tensors of the base alone, so a label here is a text of ordinary tokens,
one of `labels`, behind the start token where there is one; and **the best level has none**. So the model explores, is judged and
is used without a label, where theirs is always asked with the best token. The arithmetic is that of their code (GXimingLu/Quark,
read in November 2026): the divergence is KL(p || p_0) there, and KL(p_0 || p) in the paper. Its means are over a batch's tokens,
and its batches are drawn from the whole pool; here a pass takes every prompt once, with one of its texts.

The first exploration is the base's; each adds `samples` texts a prompt to the pool. beta 0.05, entropy 0.06, K 5, 20 tokens and no
end before 3 are theirs; they explore every 500 steps. An end token is learned, which theirs takes off. The pool is part of the
branch's state. Where a scorer says yes or no, equal rewards are cut into levels too, the earlier first. No figure of the paper was
measured again here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import Batch, Samples, collate
from spunge.errors import RecipeError
from spunge.unlearning.batches import samples_of
from spunge.unlearning.calls import FORGET, Group, Writing, descending, learned_rows
from spunge.unlearning.feed import forget_stream, total_steps
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import Session, descend, needs_retain
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.rollouts import (
    PolicySettings,
    Rollout,
    Writer,
    check,
    encoded,
    inputs,
    kept,
    rollouts_of,
    writer_of,
)
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class QuarkSettings(PolicySettings):
    method: str = "quark"
    explorations: int = Field(
        4,
        ge=1,
        description="How often the model writes after every forget prompt that its steps learn: at the start, and evenly over "
        "the steps.",
    )
    quantiles: int = Field(5, ge=2, description="K: levels of reward.")
    labels: list[str] | None = Field(
        None,
        description="What stands before a prompt whose text is of the second level, of the third and so on: K - 1 texts. Default: "
        "`[level 2] ` and so on.",
    )
    beta: float = Field(0.05, ge=0, description="Weight of the divergence from the base.")
    entropy: float = Field(0.06, ge=0, description="Weight of the entropy that is sought.")

    @model_validator(mode="after")
    def _a_label_for_each_level(self) -> "QuarkSettings":
        if self.labels is not None and len(self.labels) != self.quantiles - 1:
            raise ValueError(
                f"labels: {len(self.labels)} for {self.quantiles - 1} levels (the best has none); give one for each"
            )
        return self


def unlearn(task: Task, settings: QuarkSettings) -> Branch:
    """Learn the texts that the model writes itself, told their level of reward, and write as on the best one."""
    forget = forget_stream(task, settings)
    labels = labels_of(task, settings)
    writer = writer_of(task, settings, forget, max(map(len, labels)))
    learned = forget.learned(total_steps(task, settings))
    if (count := len(learned) * settings.samples) < settings.quantiles:
        raise RecipeError(
            f"{task.setting}.quantiles: {settings.quantiles} of {count} texts of an exploration; lower it, or raise samples"
        )
    pools: dict[int, Pool] = {}  # one, once the session is there

    def loss(session: Session, batch: Batch) -> Tensor:
        pool = pools[0]
        chosen = [pool.drawn(row, [task.seed, forget.drawn, row]) for row in batch.rows]
        start = task.base.tokenizer.bos_token_id
        told = [
            encoded(labelled(writer.asked[each.row].ids, labels[level], start), each.tokens) for each, level in chosen
        ]
        session.logged["reward"] = pool.reward()
        base = base_outputs(session.trained, writer.batch([each for each, _ in chosen], batch.ids.device))
        found = session.outputs(collate(told, batch.ids.device))
        return found.sample_mean(losses(found, base, settings.beta, settings.entropy))

    def exploring(session: Session) -> Callable[[int], None]:
        pool = pools.setdefault(0, Pool(session.memory["pool"], settings.quantiles))
        starts = starts_of(total_steps(task, settings), settings.explorations)

        def explore(step: int) -> None:
            if step in starts:
                pool.numbers += kept(explored(writer, settings, learned, starts[step], step))

        if task.state is None or not task.state.exists():  # else the pool is in the state
            explore(0)
        return explore

    return descend(task, settings, loss, over=samples_of, forget=forget, remembered=["pool"], stopping=exploring)


def labels_of(task: Task, settings: QuarkSettings) -> list[list[int]]:
    """The tokens that stand before the prompts of each level; none for the best. Raises RecipeError where two are the same."""
    texts = settings.labels or [f"[level {level}] " for level in range(2, settings.quantiles + 1)]
    labels = [[], *(list(task.base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)]
    if len({tuple(each) for each in labels}) < len(labels):
        raise RecipeError(
            f"{task.setting}.labels: {texts}: two levels have the same tokens, or one has none; give other words"
        )
    return labels


def labelled(prompt: Sequence[int], label: Sequence[int], start: int | None) -> list[int]:
    """A prompt with a label before it, behind its start token."""
    own = 1 if start is not None and list(prompt[:1]) == [start] else 0
    return [*prompt[:own], *label, *prompt[own:]]


def starts_of(steps: int, count: int) -> dict[int, int]:
    """Step -> number of the exploration that comes before the next."""
    rounds = min(count, steps)
    return {number * steps // rounds: number for number in range(rounds)}


def explored(writer: Writer, settings: QuarkSettings, rows: Sequence[int], number: int, step: int) -> list[Rollout]:
    """What the model as it is writes after some rows' prompts. Raises RecipeError where the base's texts all have one reward."""
    task = writer.task
    steps = total_steps(task, settings)

    def told(done: int) -> None:
        task.progress(step, steps, f"exploration {number + 1}, {done} of {len(rows)} prompts")

    every = writer.rollouts(rows, number, told)
    rewards = [each.reward for each in every]
    if number == 0 and min(rewards) == max(rewards):
        raise RecipeError(
            f"{task.setting}.scorer: every text that the base wrote has the reward {rewards[0]:g}, which tells none from another; "
            "give another scorer, or raise samples or tokens"
        )
    return every


@dataclass
class Pool:
    """All that was written so far. `numbers` is part of the branch's state."""

    numbers: list[float]
    quantiles: int
    _read: int = field(default=0, init=False)  # numbers of which the rest is made
    _rows: dict[int, list[tuple[Rollout, int]]] = field(default_factory=dict, init=False)
    _reward: float = field(default=0.0, init=False)

    def drawn(self, row: int, seeds: Sequence[int]) -> tuple[Rollout, int]:
        """One of a row's texts, and its level, 0 the best."""
        self._look()
        own = self._rows[row]
        return own[int(np.random.default_rng(seeds).integers(len(own)))]

    def reward(self) -> float:
        """Mean reward of the last exploration."""
        self._look()
        return self._reward

    def _look(self) -> None:
        if self._read == len(self.numbers):
            return
        every = rollouts_of(self.numbers)
        self._rows, self._read = {}, len(self.numbers)
        for each, level in zip(every, levels([each.reward for each in every], self.quantiles), strict=True):
            self._rows.setdefault(each.row, []).append((each, level))
        last = [each.reward for each in every if each.round == every[-1].round]
        self._reward = sum(last) / len(last)


def levels(rewards: Sequence[float], count: int) -> list[int]:
    """Each one's level, 0 the best: as many in each, and what is left over in the last. Of equal rewards the earlier is better."""
    order = sorted(range(len(rewards)), key=lambda at: -rewards[at])
    found = [0] * len(rewards)
    for place, at in enumerate(order):
        found[at] = min(place // max(1, len(rewards) // count), count - 1)
    return found


def losses(found: Scored, base: Scored, beta: float, entropy: float) -> Tensor:
    """(n,): of each token, -log p + beta KL(p || p_0) - entropy H(p)."""

    def loss(logits: Tensor, places: slice) -> Tensor:
        logs = logits.log_softmax(-1)
        chances, nll = logs.exp(), -logs.gather(1, found.labels[places, None])[:, 0]
        divergence = (chances * (logs - base.log_probabilities(places))).sum(-1)
        return nll + beta * divergence + entropy * (chances * logs).sum(-1)

    return found.each(loss)


def calls(settings: QuarkSettings, _depth: int) -> list[Group]:
    return descending(settings, (FORGET._replace(gradient=False), FORGET._replace(beside=True)))


def writing(samples: Samples, settings: QuarkSettings, passes: float) -> Writing:
    return settings.writing(settings.explorations * learned_rows(samples, passes))


QUARK = Method(
    settings=QuarkSettings,
    version=2,  # explores after the prompts that its steps learn, no others
    source="Lu et al. 2022, arXiv 2205.13636",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    inputs=inputs,
    check=check,
    writing=writing,
)
