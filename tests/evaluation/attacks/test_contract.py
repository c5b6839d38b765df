"""What every attack promises."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.audit import AUDIT, OWN, AuditSettings
from spunge.evaluation.choices import ChoicesSettings
from spunge.evaluation.evaluator import Bench, Measure
from spunge.recipe.explanation import validated
from spunge.registry import ATTACKS
from spunge.unlearning.finetuning import finetune
from toys import texts

QUICK: dict[str, dict[str, Any]] = {
    "relearn": {"steps": [0, 2], "batch_size": 4, "learning_rate": 0.02},
    "quantise": {},
    "reword": {},
    "prefix": {"shots": 1},
    "probe": {"folds": 2},
    "lens": {"block": [1, 2]},
    "ablate": {"block": 1},
    "suffix": {"steps": 2, "tokens": 3, "candidates": 4, "items": 2},
    "membership": {},
}
QUESTIONS = pa.table(
    {
        "question": texts("questions", 6),
        "choices": [[f"{text} .", "paris", "rome"] for text in texts("candidates", 6)],
        "answer": [number % 3 for number in range(6)],
    }
)
UNSEEN = pa.table({"text": texts("unseen", 7)})
INNER = ChoicesSettings(name="capitals")
GIVEN: Mapping[str, Any] = {
    "source": "rows.jsonl",
    "where": "true",
    "limit": 2,
    "by": "topic",
    "subject": "everything",
}
SAMPLES = {name: Samples(pa.table({"text": texts(name, 8)})) for name in ("asia", "europe", "other")}
FORGET = {name: SAMPLES[name] for name in ("asia", "europe")}
BENCH = Bench(
    "merged",
    "model",
    Path(),
    Path(),
    forget=FORGET,
    retain=SAMPLES["other"],
    settings_of={"capitals": INNER},
    finetune=finetune,
    seed=3,
)


def audit(kind: str, **changes: Any) -> AuditSettings:
    name = kind.rpartition(":")[2].lower()
    of = {"of": "capitals"} if ATTACKS.get(kind).of else {"source": "rows.jsonl"}
    return validated(AuditSettings, {"attack": {"kind": kind, **QUICK[name]}, **of, **changes})


def measured(base: Any, kind: str, seed: int = 3) -> list[Measure]:
    items = QUESTIONS if ATTACKS.get(kind).of else UNSEEN
    return AUDIT.measure(base, audit(kind), items, replace(BENCH, seed=seed))


def plain(measures: list[Measure]) -> list[Any]:
    return [
        (
            replace(each, numerator=None, denominator=None, attack=None),
            each.numerator.tolist(),
            each.denominator.tolist(),
        )
        for each in measures
    ]


def test_every_attack_is_covered_here() -> None:
    assert set(QUICK) == set(ATTACKS.builtin)


@pytest.mark.parametrize("name", QUICK)
def test_the_same_seed_measures_the_same_and_the_model_is_left_bit_for_bit(
    load: Callable[..., Any], bits_of: Callable[..., Any], name: str
) -> None:
    base = load()
    before = bits_of(base.model)
    torch.manual_seed(1)
    first = measured(base, name)
    torch.manual_seed(2)
    assert plain(first) == plain(measured(base, name))
    after = bits_of(base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_names_what_it_measures_again(load: Callable[..., Any], name: str) -> None:
    found = measured(load(), name)
    assert found
    assert {measure.attack for measure in found} == {name}
    assert len({(measure.metric, measure.subject) for measure in found}) == len(found)
    assert "accuracy" not in {measure.metric for measure in found}
    if ATTACKS.get(name).of:
        assert found[0].of == "accuracy"
        assert all(measure.subject is None and len(measure.numerator) == 6 for measure in found)
    else:
        assert all(measure.of is None and measure.subject is not None for measure in found)
    assert all(np.isfinite(measure.numerator).all() for measure in found)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("setting", OWN)
def test_an_audits_setting_that_the_attack_does_not_read_is_refused(name: str, setting: str) -> None:
    attack = ATTACKS.get(name)
    given = {"source": "rows.jsonl"} if attack.reads else {}  # the others go with rows of its own
    if setting in attack.reads:
        audit(name, **{**given, setting: GIVEN[setting]})
        return
    with pytest.raises(RecipeError, match=rf"^evaluate\.{setting}: attack {name} has no use for it"):
        audit(name, **given, **{setting: GIVEN[setting]})


@pytest.mark.parametrize("name", QUICK)
def test_the_evaluation_that_is_measured_again_is_named_where_there_is_one(name: str) -> None:
    if ATTACKS.get(name).of:
        with pytest.raises(RecipeError, match=rf"^evaluate\.of: missing; .* attack {name} measures again"):
            audit(name, of=None)
    else:
        with pytest.raises(RecipeError, match=rf"^evaluate\.of: attack {name} measures nothing again"):
            audit(name, of="capitals")


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_of_ones_own_file_is_told_by_its_name_and_its_content(
    load: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    module, _, value = ATTACKS.builtin[name].partition(":")
    file = tmp_path / "own.py"
    file.write_text(f"from {module} import {value} as {name.upper()}\n")
    kind = f"{file}:{name.upper()}"
    base = load()
    assert plain(measured(base, kind)) == plain(measured(base, name))
    if not ATTACKS.get(name).reads:
        versions = [AUDIT.instrument(audit(kind))["attack version"]]
        file.write_text(file.read_text() + "# edited\n")
        versions.append(AUDIT.instrument(audit(kind))["attack version"])
        assert versions[0] != versions[1]
        known = {} if (version := ATTACKS.version(name)) == "1" else {"attack version": version}
        assert AUDIT.instrument(audit(name)) == known
