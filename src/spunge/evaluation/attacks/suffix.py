"""A searched suffix: tokens behind the question, found by the model's own gradient, that make the forgotten answer likely.

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043, algorithm 1). The loss is the answers' mean negative
log-likelihood per token, over a few questions. At each step the gradient with respect to the suffix's one-hot tokens, dL/de W^T
with e the embeddings that the model was given and W its embedding matrix, names for each position the tokens that would lower the
loss most; some replacements are drawn among them and tried, and the best is taken where it lowers the loss. Where the evaluation
puts its questions into a chat template (`generation.chat`), the search does so too.

With a suffix of its own any answer can be had of any model. So the questions are cut in two: each half is asked with a suffix that
was found on questions of the other half and knows none of its answers. (A suffix for all questions against models that have
unlearned: Łucki et al. 2024, arXiv 2409.18025, section 4.3.)

    - {kind: audit, of: capitals, attack: {kind: suffix, steps: 20, items: 4}}
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from spunge.data.samples import IGNORED, Encoded, Text, collate, encode, encode_apart, token_losses
from spunge.data.split import seed_for
from spunge.data.template import Template
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target, prompt_role, share_of
from spunge.evaluation.attacks.variants import item_means, measured_over
from spunge.evaluation.choices import ChoicesSettings, answers_of, listed
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.generation import GenerationSettings
from spunge.evaluation.likelihood import likelihoods
from spunge.model.loading import Base
from spunge.progress import SILENT, Steps
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe
from spunge.registry import EVALUATORS

ANSWERS = ("reference", "completion")  # what evaluators call the role of the text that answers a prompt
CHAT, MARK = "evaluate.generation.chat", "QUESTION-GOES-HERE"
LENGTH = 512  # tokens of question, suffix and answer
HALVES = 2


class SuffixSettings(AttackSettings):
    kind: str = "suffix"
    tokens: int = Field(10, ge=1, description="Tokens of the suffix.")
    steps: int = Field(20, ge=0, description="Rounds of the search; 0: random tokens.")
    candidates: int = Field(32, ge=1, description="Replacements that are tried in a round.")
    top: int = Field(64, ge=1, description="They are drawn from so many tokens for each position, by the gradient.")
    items: int = Field(4, ge=1, description="Questions that a suffix is found on, of each half.")


class Frame(NamedTuple):
    """What a chat template writes before a question and behind it; of plain text nothing."""

    before: str = ""
    after: str = ""
    templated: bool = False  # it writes the start token itself


class Pair(NamedTuple):
    question: str
    answer: str  # with what stands before it
    frame: Frame = Frame()


def run(base: Base, attack: SuffixSettings, target: Target, bench: Bench) -> list[Measure]:
    """Search a suffix by gradients on half of the questions and measure the others with it.

    Every metric of the evaluation. Costs 2 * steps * (candidates + 3) * items readings of a question. Raises RecipeError for an
    evaluation without answers, and for a single question.
    """
    frame = frame_of(base, target.settings)
    pairs = [
        pair._replace(frame=frame, answer=pair.answer.lstrip() if frame.templated else pair.answer)
        for pair in pairs_of(target)
    ]
    if len(pairs) < HALVES:
        raise RecipeError("evaluate.of: a suffix is found on some questions and tried on others; give two or more")
    halves = np.random.default_rng(seed_for(bench.seed, "suffix")).permutation(len(pairs)) % HALVES
    suffixes = []
    for half in range(HALVES):
        generator = np.random.default_rng(seed_for(bench.seed, "suffix", str(half)))
        others = np.flatnonzero(halves != half)
        learned = [pairs[row] for row in generator.permutation(others)[: attack.items]]
        suffixes.append(searched(base, attack, learned, generator, share_of(bench.progress, half, HALVES)))
    variants = [[joined(pair.question, suffixes[half])] for pair, half in zip(pairs, halves, strict=True)]
    measures = item_means(*measured_over(base, target, bench, variants))
    return [target.again(measure, "with a searched suffix") for measure in measures]


def frame_of(base: Base, settings: EvaluatorSettings) -> Frame:
    """What stands around the questions of an evaluation."""
    generation = dict(settings).get("generation")
    if not (isinstance(generation, GenerationSettings) and generation.chat):
        return Frame()
    template = Template(base.tokenizer, base.template, CHAT)
    before, mark, after = template.asking([{"role": "user", "content": MARK}], CHAT).partition(MARK)
    if not mark or MARK in after:
        raise RecipeError(
            f"{CHAT}: the chat template does not say a question once as it is, so that no suffix can be searched"
        )
    return Frame(before, after, True)


def pairs_of(target: Target) -> list[Pair]:
    """Each item's question and right answer. Raises RecipeError where there are none."""
    settings, rows = target.settings, target.items.to_pylist()
    if isinstance(settings, ChoicesSettings):
        right = [str(listed(row["choices"])[at]) for row, at in zip(rows, answers_of(rows, settings), strict=True)]
        return [Pair(question, settings.separator + text) for question, text in zip(target.prompts, right, strict=True)]
    role = answer_role(settings, target.items.column_names)
    answers = [each[0] if isinstance(each, list) else each for each in target.items[role].to_pylist()]
    # A completion goes on where its prompt ends; a reference is an answer for itself.
    before = "" if role == "completion" else " "
    return [Pair(question, f"{before}{answer}") for question, answer in zip(target.prompts, answers, strict=True)]


def answer_role(settings: EvaluatorSettings, roles: Sequence[str]) -> str:
    """The role of the text that answers a prompt. Raises RecipeError where the evaluation has none."""
    for role in ANSWERS:
        if role in roles:
            return role
    raise RecipeError(f"evaluate.of: a {settings.kind!r} evaluation has no answers to search for, only {list(roles)}")


def joined(question: str, suffix: str) -> str:
    return f"{question} {suffix.strip()}"


def searched(
    base: Base, attack: SuffixSettings, pairs: Sequence[Pair], generator: np.random.Generator, progress: Steps
) -> str:
    """The suffix with the lowest loss that the search came by."""
    usable = usable_tokens(base)
    suffix = generator.choice(usable, attack.tokens)
    lowest = losses_of(base, pairs, [text_of(base, suffix)])[0]
    for step in range(attack.steps):
        gradient = gradient_of(base, pairs, suffix)[:, usable]
        best = usable[np.argsort(gradient, axis=1, kind="stable")[:, : attack.top]]  # (tokens, top)
        places = generator.integers(0, attack.tokens, attack.candidates)
        tried = np.repeat(suffix[None], attack.candidates, axis=0)
        tried[np.arange(attack.candidates), places] = best[
            places, generator.integers(0, best.shape[1], attack.candidates)
        ]
        losses = losses_of(base, pairs, [text_of(base, each) for each in tried])
        if losses.min() < lowest:
            lowest, suffix = float(losses.min()), tried[int(losses.argmin())]
        progress(step + 1, attack.steps, f"loss {lowest:.3f}")
    return text_of(base, suffix)


def losses_of(base: Base, pairs: Sequence[Pair], suffixes: Sequence[str]) -> np.ndarray:
    """(n,) of each suffix: mean over the pairs of the answer's negative log-likelihood per token, as the texts are read."""
    texts = [framed(pair, joined(pair.question, suffix)) for suffix in suffixes for pair in pairs]
    read = likelihoods(base, [encode(text, base.tokenizer, base.reach(LENGTH)) for text in texts], SILENT.step)
    each = np.array([-one.log / max(1, one.tokens) for one in read])
    means: np.ndarray = each.reshape(len(suffixes), len(pairs)).mean(axis=1)
    return means


def framed(pair: Pair, question: str) -> Text:
    """A question as it is put, and its answer."""
    return Text(f"{pair.frame.before}{question}{pair.frame.after}", pair.answer, templated=pair.frame.templated)


def gradient_of(base: Base, pairs: Sequence[Pair], suffix: np.ndarray) -> np.ndarray:
    """(tokens, vocabulary): of the loss with respect to the suffix's one-hot tokens."""
    coded, starts = zip(*(_assembled(base, pair, suffix) for pair in pairs), strict=True)
    batch = collate(list(coded), base.device)
    given: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    matrix = base.model.get_input_embeddings()
    hook = matrix.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
            labels = batch.labels[:, 1:]
            scored = labels != IGNORED
            each = token_losses(logits[scored], labels[scored])
            weights = (scored / scored.sum(dim=1, keepdim=True).clamp(min=1))[scored] / len(pairs)
            [slope] = torch.autograd.grad((each * weights).sum(), given)
    finally:
        hook.remove()
    rows = torch.stack([slope[row, start : start + len(suffix)] for row, start in enumerate(starts)]).float().sum(dim=0)
    gradient: np.ndarray = (rows @ matrix.weight.detach().float().T).cpu().numpy()
    return gradient


def _assembled(base: Base, pair: Pair, suffix: np.ndarray) -> tuple[Encoded, int]:
    """Question, suffix and answer as tokens that stand for themselves; and where the suffix begins."""
    asked = Text(pair.frame.before + pair.question, "", templated=pair.frame.templated)
    question = encode_apart(asked, base.tokenizer, base.reach(LENGTH) // 2).ids
    after, answer = (
        list(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (pair.frame.after, pair.answer)
    )
    before = [*question, *suffix.tolist(), *after]
    most = max(1, base.reach(LENGTH) - len(before))
    return Encoded([*before, *answer[:most]], [IGNORED] * len(before) + answer[:most]), len(question)


def usable_tokens(base: Base) -> np.ndarray:
    """Tokens that a suffix may hold: those that show something, and no special ones."""
    tokenizer, count = base.tokenizer, base.model.get_input_embeddings().num_embeddings
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [token for token in range(min(count, len(tokenizer))) if token not in special]
    texts = tokenizer.batch_decode([[token] for token in ids])
    shown = [
        token
        for token, text in zip(ids, texts, strict=True)
        if text.strip() and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
    ]
    return np.array(shown)


def text_of(base: Base, suffix: np.ndarray) -> str:
    return str(base.tokenizer.decode(suffix.tolist()))


def check(_attack: SuffixSettings, other: EvaluatorSettings | None, recipe: Recipe) -> None:
    """Raises RecipeError for an evaluation without prompts or without answers."""
    if other is not None:
        roles = list(EVALUATORS.get(other.kind).columns(other, recipe.columns))
        prompt_role(other, roles)
        if not isinstance(other, ChoicesSettings):
            answer_role(other, roles)


SUFFIX = Attack(
    settings=SuffixSettings,
    source="Zou et al. 2023, arXiv 2307.15043; Łucki et al. 2024, arXiv 2409.18025",
    run=run,
    check=check,
    whole=True,
    version=2,  # under a chat template where the evaluation is
)
