"""Relearning: a little fine-tuning, on benign rows, on unrelated text or on a few of those forgotten; what comes back was not gone.

LoRA factors on every linear layer, or all weights, are trained; the model is measured on the way, and put back. That some
fine-tuning on few forget rows undoes unlearning: Lynch et al. 2024 (arXiv 2402.16835), Hu et al. 2024 (arXiv 2406.13356); that
unrelated rows do: Łucki et al. 2024 (arXiv 2409.18025). How much comes back hangs on the optimizer and its learning rate (Tamirisa
et al. 2024, arXiv 2408.00761), so one setting that brings back nothing shows little.

    - {kind: audit, of: capitals, attack: {kind: relearn, on: forget, samples: 32, steps: [0, 5, 10, 20, 40]}}
    - {kind: audit, of: capitals, attack: {kind: relearn, on: source, trainable: all, learning_rate: [1.0e-5, 1.0e-4]},
       source: neutral}
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from spunge.data.arrays import counted
from spunge.data.samples import Samples, table_sha256, union
from spunge.data.split import draw, seed_for
from spunge.data.tables import taken
from spunge.data.texts import blank, refuse_other_types
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target, share_of
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe
from spunge.recipe.training import OPTIMIZERS_TOLD, Optimizer, refuse_optimizer

NO_RETAIN = "evaluate.attack.on: the recipe has no retain rows; add retain.source, or set it to forget or source"
Rate = Annotated[float, Field(gt=0)]


class RelearnSettings(AttackSettings):
    kind: str = "relearn"
    on: Literal["retain", "forget", "source"] = Field(
        "retain",
        description="Rows that are learned: benign ones, some of those forgotten (as many of each part), or texts of the audit's "
        "own source, such as unrelated ones (source: neutral).",
    )
    text: str = Field("text", description="Column or SQL expression of the source: a text.")
    samples: int = Field(32, ge=1, description="How many rows, drawn at random.")
    steps: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 5, 10, 20, 40],
        min_length=1,
        description="Optimizer steps after which it is measured; 0 is before the first.",
    )
    batch_size: int = Field(8, ge=1, description="Rows a step.")
    trainable: Literal["lora", "all"] = Field("lora", description="LoRA factors on every linear layer, or all weights.")
    optimizer: Optimizer = Field("adamw", description=OPTIMIZERS_TOLD)
    learning_rate: Rate | Annotated[list[Rate], Field(min_length=1)] = Field(
        2e-4, description="Of the optimizer; or several, each a curve of its own."
    )
    max_length: int = Field(256, ge=2, description="Tokens of a row; longer ones are cut.")

    @property
    def rates(self) -> list[float]:
        return sorted(set(self.learning_rate)) if isinstance(self.learning_rate, list) else [self.learning_rate]


def run(base: Base, attack: RelearnSettings, target: Target, bench: Bench) -> list[Measure]:
    """Fine-tune on a few rows and measure again, after each of some numbers of steps.

    A curve for each learning rate: every metric of the evaluation after each number. Raises RecipeError without the rows, and where
    the fine-tuning goes wrong.
    """
    samples = chosen(attack, target, bench)
    measures: list[Measure] = []
    for number, rate in enumerate(attack.rates):
        one = attack.model_copy(update={"learning_rate": rate})
        part = replace(bench, progress=share_of(bench.progress, number, len(attack.rates)))
        _fine_tune(base, one, samples, target, part, f"{_titled(attack, samples)}{_at(attack, rate)}", measures.append)
    return measures


def _fine_tune(
    base: Base,
    attack: RelearnSettings,
    samples: Samples,
    target: Target,
    bench: Bench,
    title: str,
    keep: Callable[[Measure], None],
) -> None:
    """Fine-tune at one learning rate, and keep what is measured on the way."""
    steps, [rate] = sorted(set(attack.steps)), attack.rates

    def pause(step: int) -> None:
        round_bench = replace(bench, progress=share_of(bench.progress, steps.index(step), len(steps)))
        # Before the first step the model is the stage's own, and so are the texts that it wrote.
        change = ["relearn", attack.model_dump(mode="json", exclude={"steps"}), samples.sha256, bench.seed, step]
        for measure in target.measured(base, round_bench, change if step else None):
            keep(target.again(measure, title, ", {} steps", at=step, unit="steps"))

    if bench.finetune is None:
        raise RecipeError("evaluate.attack: relearn needs a way to fine-tune, which this caller does not give")
    bench.finetune(
        base,
        samples,
        pauses=steps,
        pause=pause,
        batch_size=attack.batch_size,
        learning_rate=rate,
        max_length=attack.max_length,
        seed=seed_for(bench.seed, "relearn"),
        trainable=attack.trainable,
        optimizer=attack.optimizer,
    )


def _titled(attack: RelearnSettings, samples: Samples) -> str:
    """What is not as by default stands in the metric's name."""
    told = [*(["all weights"] if attack.trainable == "all" else []), *({attack.optimizer} - {"adamw"})]
    return f"after relearning on {len(samples)} {attack.on} rows" + (f" ({', '.join(told)})" if told else "")


def _at(attack: RelearnSettings, rate: float) -> str:
    return f" at {rate:g}" if len(attack.rates) > 1 else ""


def chosen(attack: RelearnSettings, target: Target, bench: Bench) -> Samples:
    """The rows to learn, drawn by the seed: as many of each part, the first ones getting what is left over."""
    if attack.on == "source":
        assert target.rows is not None
        return _drawn(Samples(target.rows), attack.samples, seed_for(bench.seed, "relearn", "source"))
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
    rows = draw(counted(len(samples)), count, seed) if count else np.arange(0)
    return Samples(taken(samples.table, rows))


def columns(attack: RelearnSettings, _forget: Mapping[str, str]) -> dict[str, str]:
    return {"text": attack.text}


def instrument(attack: RelearnSettings, rows: pa.Table | None) -> dict[str, Any]:
    """The texts of the audit's own. Raises RecipeError where there are none, where they are not to be learned, and where the
    optimizer's package is missing."""
    refuse_optimizer(attack.optimizer, "evaluate.attack")
    if (rows is not None) != (attack.on == "source"):
        raise RecipeError(
            "evaluate.attack.on: source goes with rows of the audit's own (evaluate.source); give both or neither"
        )
    if rows is None:
        return {}
    refuse_other_types(rows["text"].type, attack.text, "evaluate.attack.text", nested=False)
    if (empty := blank(rows["text"])).any() or not len(empty):
        raise RecipeError(
            f"evaluate.attack.text: {attack.text!r} is empty in {empty.sum()} of {len(empty)} rows; leave them out by a where"
        )
    return {"learned texts": table_sha256(rows)}


def check(attack: RelearnSettings, _other: EvaluatorSettings | None, recipe: Recipe) -> None:
    if attack.on == "retain" and recipe.retain is None:
        raise RecipeError(NO_RETAIN)


RELEARN = Attack(
    settings=RelearnSettings,
    source="Lynch et al. 2024, arXiv 2402.16835; Hu et al. 2024, arXiv 2406.13356",
    run=run,
    reads=frozenset({"source", "where", "limit"}),
    rows="texts to learn",
    columns=columns,
    instrument=instrument,
    check=check,
    whole=True,
)
