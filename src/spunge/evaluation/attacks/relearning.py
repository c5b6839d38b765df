"""Relearning: a little fine-tuning, on benign rows or on a few of those forgotten; what comes back was not gone.

The model gets LoRA factors on every linear layer, is measured on the way, and loses them again. That some fine-tuning on
few forget rows undoes unlearning: Lynch et al. 2024 (arXiv 2402.16835), Hu et al. 2024 (arXiv 2406.13356); that unrelated
rows do: Łucki et al. 2024 (arXiv 2409.18025).

    - {kind: audit, of: capitals, attack: {kind: relearn, on: forget, samples: 32, steps: [0, 5, 10, 20, 40]}}
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from spunge.data.samples import Samples, union
from spunge.data.split import draw, seed_for
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target, share_of
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.schema import AttackSettings, EvaluatorSettings, Recipe

NO_RETAIN = "evaluate.attack.on: the recipe has no retain rows; add retain.source, or set it to forget"


class RelearnSettings(AttackSettings):
    kind: str = "relearn"
    on: Literal["retain", "forget"] = Field(
        "retain", description="Rows that are learned: benign ones, or some of those forgotten, as many of each part."
    )
    samples: int = Field(32, ge=1, description="How many rows, drawn at random.")
    steps: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 5, 10, 20, 40],
        min_length=1,
        description="Optimizer steps after which it is measured; 0 is before the first.",
    )
    batch_size: int = Field(8, ge=1, description="Rows a step.")
    learning_rate: float = Field(2e-4, gt=0, description="Of AdamW on the LoRA factors.")
    max_length: int = Field(256, ge=2, description="Tokens of a row; longer ones are cut.")


def run(base: Base, attack: RelearnSettings, target: Target, bench: Bench) -> list[Measure]:
    """Fine-tune on a few rows and measure again, after each of some numbers of steps.

    A curve: every metric of the evaluation after each number. Raises RecipeError without retain rows.
    """
    samples = chosen(attack, bench)
    steps = sorted(set(attack.steps))
    measures: list[Measure] = []

    def pause(step: int) -> None:
        round_bench = replace(bench, progress=share_of(bench.progress, steps.index(step), len(steps)))
        # Before the first step the model is the stage's own, and so are the texts that it wrote.
        change = ["relearn", attack.model_dump(mode="json", exclude={"steps"}), samples.sha256, bench.seed, step]
        for measure in target.measured(base, round_bench, change if step else None):
            measures.append(
                target.again(
                    measure,
                    f"after relearning on {len(samples)} {attack.on} rows",
                    ", {} steps",
                    at=step,
                    unit="steps",
                )
            )

    if bench.finetune is None:
        raise RecipeError("evaluate.attack: relearn needs a way to fine-tune, which this caller does not give")
    bench.finetune(
        base,
        samples,
        pauses=steps,
        pause=pause,
        batch_size=attack.batch_size,
        learning_rate=attack.learning_rate,
        max_length=attack.max_length,
        seed=seed_for(bench.seed, "relearn"),
    )
    return measures


def chosen(attack: RelearnSettings, bench: Bench) -> Samples:
    """The rows to learn, drawn by the seed: as many of each part, the first ones getting what is left over."""
    if attack.on == "retain":
        if bench.retain is None:
            raise RecipeError(NO_RETAIN)
        return _drawn(bench.retain, attack.samples, seed_for(bench.seed, "relearn", "retain"))
    share, left = divmod(attack.samples, len(bench.forget))
    parts = {
        value: _drawn(samples, share + (number < left), seed_for(bench.seed, "relearn", "forget", value))
        for number, (value, samples) in enumerate(bench.forget.items())
    }
    return union(parts)


def _drawn(samples: Samples, count: int, seed: int) -> Samples:
    rows = draw(np.arange(len(samples)), count, seed) if count else np.arange(0)
    return Samples(taken(samples.table, rows))


def check(attack: RelearnSettings, _other: EvaluatorSettings | None, recipe: Recipe) -> None:
    if attack.on == "retain" and recipe.retain is None:
        raise RecipeError(NO_RETAIN)


RELEARN = Attack(
    settings=RelearnSettings,
    source="Lynch et al. 2024, arXiv 2402.16835; Hu et al. 2024, arXiv 2406.13356",
    run=run,
    check=check,
)
