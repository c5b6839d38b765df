"""Relearning by every optimizer and on every kind of rows; the first step against hand-made gradients."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.attacks.relearning import RELEARN, RelearnSettings
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.perplexity import PerplexitySettings
from spunge.recipe.loading import load_recipe
from spunge.unlearning.finetuning import finetune
from toys import Told, rows, texts

ITEMS = pa.table({"text": texts("forget", 4)})
TARGET = Target(PerplexitySettings(name="texts"), ITEMS)
BENCH = Bench(
    "merged",
    "model",
    Path(),
    Path(),
    forget={"a": Samples(ITEMS)},
    retain=Samples(pa.table({"text": texts("other", 4)})),
    finetune=finetune,
)
RATE = 1e-3
# What the first step takes off a weight of gradient g.
FIRST = {
    "adamw": lambda g: RATE * g / (g.abs() + 1e-8),
    "sgd": lambda g: RATE * 1.9 * g,  # Nesterov: g + 0.9 g
    "rmsprop": lambda g: RATE * g / ((0.01 * g * g).sqrt() + 1e-8),
}


@pytest.mark.parametrize("optimizer", FIRST)
def test_the_first_step_on_all_weights_is_the_optimizers_own(
    load: Callable[..., Any], bits_of: Callable[..., Any], optimizer: Any
) -> None:
    base = load()
    before = bits_of(base.model)
    base.model.requires_grad_(True)
    ids = [base.tokenizer(text)["input_ids"] for text in ITEMS["text"].to_pylist()]
    losses = [base.model(input_ids=torch.tensor([each]), labels=torch.tensor([each])).loss for each in ids]
    counts = torch.tensor([len(each) - 1.0 for each in ids])
    gradients = torch.autograd.grad(
        sum(loss * count for loss, count in zip(losses, counts, strict=True)) / counts.sum(),
        list(base.model.parameters()),
    )
    names = [name for name, _ in base.model.named_parameters()]
    base.model.requires_grad_(False)
    seen: dict[str, torch.Tensor] = {}
    finetune(
        base,
        Samples(ITEMS),
        pauses=[1],
        pause=lambda step: seen.update(bits_of(base.model)),
        batch_size=4,
        learning_rate=RATE,
        max_length=64,
        seed=0,
        trainable="all",
        optimizer=optimizer,
    )
    for name, gradient in zip(names, gradients, strict=True):
        clear = gradient.abs() > 1e-6  # where rounding decides no sign
        taken = (before[name] - seen[name])[clear]
        torch.testing.assert_close(taken, FIRST[optimizer](gradient)[clear], rtol=2e-2, atol=2e-7)
    after = bits_of(base.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_every_way_of_relearning_has_a_name_of_its_own_and_begins_where_the_model_is(load: Callable[..., Any]) -> None:
    base = load()
    rows = pa.table({"text": texts("unrelated", 9)})
    ways: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["after relearning on 4 retain rows"]),
        (
            {"on": "forget", "trainable": "all", "optimizer": "sgd"},
            ["after relearning on 4 forget rows (all weights, sgd)"],
        ),
        (
            {"on": "source", "samples": 5, "learning_rate": [0.01, 0.001]},
            ["after relearning on 5 source rows at 0.001", "after relearning on 5 source rows at 0.01"],
        ),
    ]
    plain = TARGET.measured(base, BENCH)[0].numerator.tolist()
    for changes, names in ways:
        attack = RelearnSettings(**{"steps": [0, 2], "batch_size": 4, **changes})
        found = RELEARN.run(base, attack, replace(TARGET, rows=rows if attack.on == "source" else None), BENCH)
        assert [each.metric for each in found] == [f"perplexity {name}, {at} steps" for name in names for at in (0, 2)]
        assert len({each.curve for each in found}) == len(names)
        assert all(each.numerator.tolist() == plain for each in found if each.at == 0)
        assert len({tuple(each.numerator.tolist()) for each in found}) == 1 + len(names)


def test_a_rate_that_breaks_the_model_is_told_and_the_model_is_whole(
    load: Callable[..., Any], bits_of: Callable[..., Any]
) -> None:
    base = load()
    before = bits_of(base.model)
    attack = RelearnSettings(trainable="all", optimizer="sgd", learning_rate=1e30, steps=[3])
    with pytest.raises(RecipeError, match=r"^evaluate\.attack\.learning_rate: 1e\+30: the loss became"):
        RELEARN.run(base, attack, TARGET, BENCH)
    after = bits_of(base.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("attack", "rows", "message"),
    [
        ({"on": "source"}, None, r"^evaluate\.attack\.on: source goes with rows of the audit's own"),
        ({}, ["a"], r"^evaluate\.attack\.on: source goes with rows"),
        ({"on": "source"}, ["a", " ", None], r"^evaluate\.attack\.text: 'text' is empty in 2 of 3 rows"),
        ({"on": "source"}, [1, 2], r"^evaluate\.attack\.text: 'text' holds int64, not text"),
        ({"on": "source"}, [], r"^evaluate\.attack\.text: 'text'"),
    ],
)
def test_rows_that_cannot_be_learned_are_told_before_anything_is_trained(
    attack: dict[str, Any], rows: list[Any] | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        RELEARN.instrument(RelearnSettings(**attack), None if rows is None else pa.table({"text": rows}))


def test_a_run_relearns_unrelated_text(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    attack = {"kind": "relearn", "on": "source", "steps": [0, 1], "samples": 4, "batch_size": 2, "max_length": 32}
    audit = {"kind": "audit", "of": "perplexity", "attack": attack, "source": "neutral", "limit": 50}
    given = {**toy_recipe, "evaluate": [*toy_recipe["evaluate"], {**audit, "stages": ["base"]}], "controls": []}
    results = spunge.run(load_recipe(given), tmp_path / "run")
    metrics = {row.metric for row in results.rows if row.attack == "relearn"}
    assert metrics == {f"perplexity after relearning on 4 source rows, {at} steps" for at in (0, 1)}
    [told] = [each.instrument for each in results.evaluations if each.kind == "audit"]
    assert len(told["learned texts"]) == 64


def test_a_source_that_changes_while_it_is_measured_is_refused_and_not_vouched_for(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The key says the rows that were there when the run began."""
    source = write_rows("learned.jsonl", rows(["other"]))

    class Changing(Told):
        def begin(self, title: str) -> None:
            if title.startswith("judge base: audit"):
                write_rows("learned.jsonl", rows(["another"]))
            super().begin(title)

    attack = {"kind": "relearn", "on": "source", "steps": [0, 1], "samples": 4, "batch_size": 2, "max_length": 32}
    toy_recipe["evaluate"].append({"kind": "audit", "of": "perplexity", "attack": attack, "source": str(source)})
    toy_recipe["evaluate"][-1] |= {"name": "audit", "stages": ["base"]}
    recipe = load_recipe(toy_recipe, ["controls=[]", "unlearn.steps=1"])
    with pytest.raises(RecipeError, match=r"^evaluate\.audit: its rows or files changed while the run was at work"):
        spunge.run(recipe, tmp_path / "run", Changing())
    assert not [name for name in (tmp_path / "run" / "stamps").rglob("*.json") if "audit" in name.read_text()]
