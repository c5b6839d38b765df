"""Hidden knowledge: does the model still tell right from wrong inside, though it no longer says so?

Logistic regression on the hidden states, averaged over the tokens of question and candidate, of a block in the middle:
right candidates against wrong ones. It is trained on some items and asked about others. Linear probes of what unlearning
left behind: Patil et al. 2023 (arXiv 2309.17410), Lynch et al. 2024 (arXiv 2402.16835, section 3.5); of truth in general,
Azaria and Mitchell 2023 (arXiv 2304.13734). Needs scikit-learn, as in 'spunge[judge]'.

    - {kind: audit, of: capitals, attack: {kind: probe, block: 0.5}}
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from spunge.data.samples import Text, encode
from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.choices import ChoicesSettings, answers_of
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.scorers.probe import pooled_states
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe

Share = Annotated[float, Field(ge=0, le=1)]
Index = Annotated[int, Field(ge=0)]


class ProbeSettings(AttackSettings):
    kind: str = "probe"
    block: Index | Share | list[Index | Share] = Field(
        0.5,
        description="Block whose output is read: its number from 0, or a share of the depth such as 0.5; or several.",
    )
    folds: int = Field(5, ge=2, description="The items are cut into so many; each is probed by what the others taught.")
    strength: float = Field(
        0.01, gt=0, description="scikit-learn's C: how little the logistic regression is regularised."
    )


def run(base: Base, attack: ProbeSettings, target: Target, bench: Bench) -> list[Measure]:
    """Train a linear probe on hidden states to tell right candidates from wrong ones, and measure it on other items.

    For each block, the share of items whose right candidate has the probe's highest score; guessing gives `chance`.

    An item's candidates are never on both sides of a fold. Where the same few candidates recur in all items, right in
    one and wrong in the others, the probe can do worse than chance. Raises RecipeError where the evaluation has no
    candidates or fewer items than folds.
    """
    settings = of_choices(target.settings)
    rows = target.items.to_pylist()
    if len(rows) < attack.folds:
        raise RecipeError(f"evaluate.attack.folds: {attack.folds} folds of {len(rows)} items; give more items")
    answers = answers_of(rows, settings)
    counts = np.array([len(row["choices"]) for row in rows])
    owners = np.repeat(np.arange(len(rows)), counts)
    right = np.concatenate([np.arange(count) == answer for count, answer in zip(counts, answers, strict=True)])
    texts = [Text(row["question"], settings.separator + str(candidate)) for row in rows for candidate in row["choices"]]
    coded = [encode(text, base.tokenizer, base.reach(settings.max_length)) for text in texts]
    blocks = block_numbers(attack.block, base.depth)
    states = np.split(pooled_states(base, coded, blocks), len(blocks), axis=1)
    measures: list[Measure] = []
    for number, (block, each) in enumerate(zip(blocks, states, strict=True), start=1):
        scores = out_of_fold(centred(each, owners), right, owners, attack, seed_for(bench.seed, "probe"))
        best = [int(np.argmax(scores[owners == item])) for item in range(len(rows))]
        plain = Measure(
            "accuracy",
            np.array([float(guess == answer) for guess, answer in zip(best, answers, strict=True)]),
            np.ones(len(rows)),
            higher="known",
            chance=float((1 / counts).mean()),
        )
        measures.append(target.again(plain, "of a linear probe", ", block {}", at=block, unit="block"))
        bench.progress(number, len(blocks))
    return measures


def of_choices(settings: EvaluatorSettings) -> ChoicesSettings:
    """Raises RecipeError for an evaluation without candidates."""
    if not isinstance(settings, ChoicesSettings):
        raise RecipeError(
            f"evaluate.of: attack probe needs a 'choices' evaluation, and this is a {settings.kind!r} one"
        )
    return settings


def check(_attack: ProbeSettings, other: EvaluatorSettings | None, _recipe: Recipe) -> None:
    if other is not None:
        of_choices(other)


def block_numbers(given: int | float | Sequence[int | float], depth: int) -> list[int]:
    """Blocks by number; a float is a share of the depth. Raises RecipeError for a number beyond the last."""
    listed = given if isinstance(given, Sequence) else [given]
    numbers = [min(depth - 1, int(each * depth)) if isinstance(each, float) else each for each in listed]
    if max(numbers) >= depth:
        raise RecipeError(f"evaluate.attack.block: {max(numbers)}: the model's blocks are 0 to {depth - 1}")
    return sorted(set(numbers))


def centred(states: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Without what an item's candidates have in common, which tells no right from wrong: (n, d) -> (n, d)."""
    sums = np.zeros((owners[-1] + 1, states.shape[1]))
    np.add.at(sums, owners, states)
    centre_free: np.ndarray = states - (sums / np.bincount(owners)[:, None])[owners]
    return centre_free


def out_of_fold(
    states: np.ndarray, right: np.ndarray, owners: np.ndarray, attack: ProbeSettings, seed: int
) -> np.ndarray:
    """The probe's score of every candidate, (n,), by a probe that saw none of its item's."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise RecipeError("evaluate.attack: probe needs scikit-learn; pip install 'spunge[judge]'") from None
    folds = np.random.default_rng(seed).permutation(owners[-1] + 1) % attack.folds
    scores = np.empty(len(owners))
    for fold in range(attack.folds):
        test = folds[owners] == fold
        mean, deviation = states[~test].mean(axis=0), states[~test].std(axis=0) + 1e-6
        model = LogisticRegression(C=attack.strength, max_iter=1000)
        model.fit((states[~test] - mean) / deviation, right[~test])
        scores[test] = model.decision_function((states[test] - mean) / deviation)
    return scores


PROBE = Attack(
    settings=ProbeSettings,
    source="Patil et al. 2023, arXiv 2309.17410; Lynch et al. 2024, arXiv 2402.16835",
    run=run,
    check=check,
)
