"""What the model in training writes after the forget prompts, and how a scorer of the product rewards it: for quark and demem.

A row's prompt is asked as it stands; of a plain text the first part is the prompt, and the rest is its answer. What is written is
drawn from the model's own distribution by noise of the seed, the round, the row and the draw, so that a run that goes on from
its state draws the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import IGNORED, Batch, Encoded, collate
from spunge.errors import RecipeError
from spunge.model.padding import grouped
from spunge.model.reading import reading_of
from spunge.recipe.scoring import SCORING, Scoring
from spunge.recipe.training import LoRA, Trainable
from spunge.registry import SCORERS
from spunge.unlearning.batches import Stream
from spunge.unlearning.calls import Writing
from spunge.unlearning.drawing import drawn
from spunge.unlearning.method import Task
from spunge.unlearning.outputs import OutputSettings
from spunge.unlearning.trained import evaluation_mode

if TYPE_CHECKING:
    from spunge.evaluation.scorers.scorer import Loaded

FIELDS = frozenset({"prompt", "reference"})  # that a scorer is told beside a text


class PolicySettings(OutputSettings):
    """Of methods that learn from what the model writes itself."""

    scorer: Scoring = Field(
        "tomh/toxigen_roberta", validate_default=True, description=f"Who scores what is written: {SCORING}"
    )
    wanted: Literal["low", "high"] = Field(
        "low", description="Which scores are rewarded. low: the reward is 1 - score. high: it is the score."
    )
    tokens: int = Field(20, ge=1, description="Tokens that are written after a prompt, at the most.")
    least_tokens: int = Field(3, ge=0, description="No end is written before so many tokens.")
    samples: int = Field(1, ge=1, description="Texts that are written after each prompt.")
    prefix: float = Field(0.5, gt=0, lt=1, description="Share of a plain text's tokens that is its prompt.")
    alpha: float = Field(0.0, ge=0, description="Weight of the retain term; 0 leaves it out.")
    trainable: Trainable = Field(default=LoRA(dropout=0.0), description="What is trained.")

    @model_validator(mode="after")
    def _prompt_by_prompt(self) -> "PolicySettings":
        if self.packing:
            raise ValueError(f"packing: {self.method} writes after each sample's prompt; set it to false")
        if self.least_tokens > self.tokens:
            raise ValueError(
                f"least_tokens: {self.least_tokens} of at most {self.tokens} tokens; lower it, or raise tokens"
            )
        return self

    def writing(self, prompts: int) -> Writing:
        """What a plan counts where the model writes after so many prompts."""
        return Writing(prompts * self.samples, self.tokens, at_once=self.batch_size * self.samples)


class Asked(NamedTuple):
    """A forget sample, as the model is asked."""

    ids: list[int]  # of the prompt
    prompt: str
    reference: str  # the answer that is to be forgotten


def asked_of(task: Task, settings: PolicySettings, forget: Stream, before: int = 0) -> list[Asked]:
    """Every forget sample's prompt and answer. before: tokens that may stand before a prompt.

    Raises RecipeError for a sample without a prompt or without an answer, and where the model has no positions for what is written.
    """
    tokenizer, plain, every = task.base.tokenizer, forget.samples.plain, list[Asked]()
    for row in range(forget.count):
        sample, where = forget.encoded([row])[0], f"forget: row {forget.samples.number(row)}"
        learned = [place for place, label in enumerate(sample.labels) if label != IGNORED]
        first = max(1, int(settings.prefix * len(sample.ids))) if plain else learned[0]
        stop = next((at for at in range(first, len(sample.ids)) if sample.labels[at] == IGNORED), len(sample.ids))
        if first == 0 or stop <= first:
            lacks = "no prompt to write after" if first == 0 else "a single token, and no answer behind a prompt"
            raise RecipeError(f"{where} has {lacks}; filter the row out")
        prompt, answer = sample.ids[:first], sample.ids[first:stop]
        told = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (prompt, answer))
        every.append(Asked(prompt, *told))
    longest = before + max(len(each.ids) for each in every)
    if (room := task.base.reach(1 << 40) - longest) < settings.tokens:
        raise RecipeError(
            f"{task.setting}.tokens: {settings.tokens}: the longest prompt has {longest} tokens, and the model no positions for so "
            f"many after it; lower it to {max(1, room)}, or lower max_length"
        )
    return every


def encoded(prompt: Sequence[int], tokens: Sequence[int]) -> Encoded:
    """A prompt with what was written after it, which is learned."""
    return Encoded([*prompt, *tokens], [IGNORED] * len(prompt) + list(tokens))


class Rewarding(NamedTuple):
    """The scorer of a training, and what its scores are worth."""

    loaded: "Loaded"
    wanted: Literal["low", "high"]
    setting: str

    def of(self, texts: Sequence[str], asked: Sequence[Asked]) -> list[float]:
        """Rewards in [0, 1] of texts after the prompts of some samples; 0 for a text without a letter or digit, unscored."""
        said = [at for at, text in enumerate(texts) if any(letter.isalnum() for letter in text)]
        rewards = [0.0] * len(texts)
        with told_as(self.setting):
            prompts, references = [asked[at].prompt for at in said], [asked[at].reference for at in said]
            scores = self.loaded.scores_of([texts[at] for at in said], prompts, references).tolist() if said else []
        for at, score in zip(said, scores, strict=True):
            rewards[at] = score if self.wanted == "high" else 1.0 - score
        return rewards


class Rollout(NamedTuple):
    """What was written after one sample's prompt."""

    round: int
    row: int
    reward: float
    advantage: float  # over the prompt's others, where that is known
    tokens: list[int]
    logs: list[float]  # each token's log-probability under the model that wrote it, where that is known


@dataclass(frozen=True)
class Writer:
    """The model in training, as it writes after the forget samples' prompts and is rewarded for that."""

    task: Task
    settings: PolicySettings
    asked: Sequence[Asked]  # by row
    reward: Rewarding

    def rollouts(
        self, rows: Sequence[int], number: int, told: Callable[[int], None] = lambda done: None
    ) -> list[Rollout]:
        """What the model as it is now writes after the prompts of some rows, `samples` texts each, in the rows' order.

        number: of the round. told: hears after how many prompts it has written. As many are written at once as fit into the
        tokens of `batch_size` of the longest, which is less than a step of training holds.
        """
        found: dict[int, list[Rollout]] = {}
        texts: dict[int, list[str]] = {}
        sizes = [len(self.asked[row].ids) + self.settings.tokens for row in rows]
        with evaluation_mode(self.task.base.model):
            alike = not reading_of(self.task.base).padded
        for batch in grouped(sizes, self.settings.batch_size * max(sizes), alike):
            own = [rows[at] for at in batch]
            written = iter(self._written([(row, at) for row in own for at in range(self.settings.samples)], number))
            for row in own:
                tokens = [next(written) for _ in range(self.settings.samples)]
                found[row] = [Rollout(number, row, 0.0, 0.0, each, []) for each in tokens]
                texts[row] = [self._text(each) for each in tokens]
            told(len(found))
        every = [each for row in rows for each in found[row]]
        rewards = self.reward.of(
            [text for row in rows for text in texts[row]], [self.asked[each.row] for each in every]
        )
        return [each._replace(reward=value) for each, value in zip(every, rewards, strict=True)]

    def batch(self, rollouts: Sequence[Rollout], device: torch.device) -> Batch:
        """Rollouts behind their prompts, to be scored."""
        return collate([encoded(self.asked[each.row].ids, each.tokens) for each in rollouts], device)

    def _written(self, draws: Sequence[tuple[int, int]], number: int) -> list[list[int]]:
        """The tokens, an end token among them, of each draw: of a row, and how manieth it is."""
        base, settings = self.task.base, self.settings
        ends = base.model.generation_config.eos_token_id
        ends = base.tokenizer.eos_token_id if ends is None else ends
        ending: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

        def scored(so_far: Tensor, logits: Tensor) -> Tensor:
            scores = logits.float()
            if ending and so_far.shape[1] < settings.least_tokens:
                scores[:, ending] = float("-inf")
            return scores

        prompts = [self.asked[row].ids for row, _ in draws]
        seeds = [[self.task.seed, number, row, at] for row, at in draws]
        every = drawn(base, prompts, settings.tokens, seeds, scored, ending or None)
        return [ids[: next((at + 1 for at, each in enumerate(ids) if each in ending), len(ids))] for ids in every]

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.task.base.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()


def writer_of(task: Task, settings: PolicySettings, forget: Stream, before: int = 0) -> Writer:
    """The writer of a training. before: tokens that may stand before a prompt.

    Raises RecipeError as `asked_of` does, where the scorer cannot be loaded, and for an answer that it cannot compare a text with.
    """
    asked = asked_of(task, settings, forget, before)
    scorer = SCORERS.get(settings.scorer.kind)
    with told_as(task.setting):
        loaded = scorer.load(settings.scorer)
        if scorer.compares:
            answers = [each.reference for each in asked]
            loaded.scores_of(answers, [each.prompt for each in asked], answers)
    return Writer(task, settings, asked, Rewarding(loaded, settings.wanted, task.setting))


@contextmanager
def told_as(setting: str) -> Iterator[None]:
    """Inside the block a scorer's errors name the method's block."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(str(error).replace("evaluate.scorer", f"{setting}.scorer")) from error


def check(settings: PolicySettings) -> None:
    """Raises RecipeError where the scorer cannot be had, or wants to know more than these methods tell it."""
    with told_as("unlearn"):
        SCORERS.get(settings.scorer.kind).check(settings.scorer, FIELDS)


def inputs(settings: PolicySettings, _values: Sequence[str], _every: Sequence[str]) -> Mapping[str, Any]:
    """What tells the scorer, its weights among it, from others."""
    with told_as("unlearn"):
        instrument = SCORERS.get(settings.scorer.kind).instrument(settings.scorer)
    return {"scorer": instrument, "version": SCORERS.version(settings.scorer.kind)}


def kept(rollouts: Sequence[Rollout]) -> list[float]:
    """Rollouts as numbers, for the loop's state."""
    return [
        float(number)
        for each in rollouts
        for number in (*each[:4], len(each.tokens), len(each.logs), *each.tokens, *each.logs)
    ]


def rollouts_of(numbers: Sequence[float]) -> list[Rollout]:
    """The rollouts again. One that is cut off, as by a step that the memory did not hold, is left out."""
    found, at = [], 0
    while at + 6 <= len(numbers):
        own, tokens, logs = numbers[at : at + 4], int(numbers[at + 4]), int(numbers[at + 5])
        middle, end = at + 6 + tokens, at + 6 + tokens + logs
        if end > len(numbers):
            break
        written = [int(token) for token in numbers[at + 6 : middle]]
        found.append(Rollout(int(own[0]), int(own[1]), own[2], own[3], written, list(numbers[middle:end])))
        at = end
    return found
