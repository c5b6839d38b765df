"""What an attack measures again: an evaluation of the recipe, with its items, under a changed model or changed prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Measure
from spunge.files import fingerprint
from spunge.model.loading import Base
from spunge.progress import Steps
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.registry import EVALUATORS

PROMPTS = ("question", "prompt")  # what evaluators call the role of the text that is put to the model


@dataclass(frozen=True)
class Target:
    """The evaluation named by `of`; for an attack that measures none again, the audit itself, with rows of its own."""

    settings: EvaluatorSettings
    items: pa.Table  # one row per item, columns named by role
    label: str | None = None  # what the recipe calls the attack
    rows: pa.Table | None = None  # of the audit's own source, beside the items; columns named by role

    def measured(self, base: Base, bench: Bench, change: object = None, items: pa.Table | None = None) -> list[Measure]:
        """Its measures as the model is now, on its own items or on others in their form.

        `change` says how the model differs from the stage's (JSON values), so that texts kept for the one are not
        taken for the other's.
        """
        model = bench.model if change is None else fingerprint([bench.model, change])
        evaluator = EVALUATORS.get(self.settings.kind)
        attacked = bench.attacked or change is not None
        under = replace(bench, model=model, attacked=attacked)
        return evaluator.measure(base, self.settings, self.items if items is None else items, under)

    def again(
        self, measure: Measure, attack: str, detail: str = "", *, at: float | None = None, unit: str | None = None
    ) -> Measure:
        """A measure made under an attack, named for it: `accuracy` becomes `accuracy ATTACK DETAIL`.

        at, unit: where it stands on a curve that the attack draws, such as 20 `steps`; `detail` then holds a {} for it.
        """
        name = f"{measure.metric} {self.label or attack}"
        again = replace(measure, metric=f"{name}{detail}", of=measure.metric, worst=False)
        if at is None:
            return again
        return replace(again, metric=name + detail.format(at), curve=name + detail.format("N"), at=at, unit=unit)

    @property
    def prompt_role(self) -> str:
        """The column that is put to the model. Raises RecipeError where the evaluation has none."""
        return prompt_role(self.settings, self.items.column_names)

    @property
    def prompts(self) -> list[str]:
        texts: list[str] = self.items[self.prompt_role].to_pylist()
        return texts


def share_of(progress: Steps, index: int, count: int) -> Steps:
    """The progress of one of several equal rounds."""

    def step(done: int, total: int, note: str = "", /) -> None:
        progress(index * total + done, count * total, note)

    return step


def prompt_role(settings: EvaluatorSettings, roles: Sequence[str]) -> str:
    """The role of the text that an evaluation puts to the model. Raises RecipeError where it has none."""
    for role in PROMPTS:
        if role in roles:
            return role
    raise RecipeError(
        f"evaluate.of: a {settings.kind!r} evaluation has no prompts to change, only {list(roles)}; "
        "name one with questions or prompts"
    )
