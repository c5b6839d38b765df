"""The prompt-decouple term against autograd on transformers' own loss, through a kill, and in a recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.method import Branch, Task
from toys import texts

RATE, FIRST = 0.01, 1.9  # SGD's first step with Nesterov's momentum of 0.9 is this many gradients
PROMPTS, ANSWERS = texts("harmless prompts", 5), [f" {text}" for text in texts("ordinary answers", 5)]
DECOUPLED = Samples(pa.table({"prompt": PROMPTS, "completion": ANSWERS}))


def unlearned(
    base: Any, method: str, decoupled: Samples | None, task: dict[str, Any] | None = None, **changes: Any
) -> Branch:
    answers = {"prompt": texts("asked", 6), "completion": [f" {text}" for text in texts("answered", 6)]}
    kept = Samples(pa.table({"prompt": texts("kept", 6), "completion": [f" {text}" for text in texts("kept so", 6)]}))
    values = {
        "optimizer": "sgd",
        "learning_rate": RATE,
        "steps": 1,
        "batch_size": 6,
        "max_grad_norm": None,
        "max_damage": None,
    }
    settings = METHODS.get(method).settings(**{"method": method, **values, "trainable": {"kind": "all"}, **changes})
    work = Task(base, {"a": Samples(pa.table(answers))}, kept, {"a": 1}, decouple=decoupled, **(task or {}))
    return METHODS.get(method).unlearn(work, settings)


def slope(base: Any) -> dict[str, torch.Tensor]:
    """The gradient of transformers' own loss on the ordinary answers, by parameter."""
    asked = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    answered = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS]
    most = max(len(one) + len(two) for one, two in zip(asked, answered, strict=True))
    ids, labels = torch.zeros(5, most, dtype=torch.long), torch.full((5, most), -100)
    for row, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    parameters = dict(base.model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = base.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    base.model.requires_grad_(False)
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("graddiff", {}),
        ("npo", {"alpha": 0.0, "decouple": 1.0}),
        ("npo", {"batch_size": 2, "accumulation": 3}),
        ("idk_ap", {}),  # its retain term is its own
    ],
)
def test_a_step_goes_down_the_ordinary_answers_loss_beside_the_methods_own(
    load: Callable[..., Any], method: str, changes: dict[str, Any]
) -> None:
    base = load("llama")
    given = {"retain_batch_size": 5, **changes}
    without, beside = (unlearned(base, method, rows, **given) for rows in (None, DECOUPLED))
    weight = changes.get("decouple", 0.5)
    for name, gradient in slope(base).items():
        [stored] = base.names[name][:1]
        moved = beside.changes[stored] - without.changes[stored]
        torch.testing.assert_close(moved, -RATE * FIRST * weight * gradient, rtol=2e-3, atol=2e-6)
    assert "decouple" in beside.losses
    assert "decouple" not in without.losses


class Killed(Exception):
    """What ends a branch in the middle."""


def test_a_killed_branch_goes_on_to_the_same_delta(load: Callable[..., Any], tmp_path: Path) -> None:
    base, given = load("llama"), {"steps": 4, "batch_size": 2, "optimizer": "adamw", "gru": 0.8}
    whole = unlearned(base, "graddiff", DECOUPLED, **given)

    def progress(step: int, steps: int, note: str) -> None:
        if step == 3:
            raise Killed

    state = {"state": tmp_path / "state.pt", "save_seconds": 0}
    with pytest.raises(Killed):
        unlearned(base, "graddiff", DECOUPLED, {**state, "progress": progress}, **given)
    resumed = unlearned(base, "graddiff", DECOUPLED, state, **given)
    assert all(torch.equal(resumed.changes[name], change) for name, change in whole.changes.items())


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "ordinary.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("ordinary", 6)))
    unlearn = {"method": "npo", "steps": 2, "batch_size": 4, "learning_rate": 0.01}
    return {**toy_recipe, "unlearn": unlearn, "decouple": {"source": str(rows)}, "evaluate": [], "controls": []}


def test_a_run_learns_the_rows_of_its_recipe_and_trains_again_where_they_change(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spunge.run(recipe, run)
    [log, *_] = sorted((run / "branches").glob("*/log.jsonl"))
    assert "decouple" in json.loads(log.read_text().splitlines()[0])
    assert json.loads((run / "split.json").read_text())["decouple"]["selected"] == 6
    before = (log.parent / "delta.safetensors").read_bytes()
    rows = Path(recipe["decouple"]["source"])
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("other", 6)))
    spunge.run(recipe, run, replace=True)
    assert (log.parent / "delta.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlearn": {"method": "rmu", "layer": 2, "steps": 1}}, "decouple: unlearn.method 'rmu' has no such term"),
        ({"decouple": {}}, "decouple.source: missing"),
        ({"decouple": "forget"}, "decouple: .* rows are rows to forget too"),
    ],
)
def test_rows_that_cannot_be_decoupled_are_refused(
    recipe: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if changes.get("decouple") == "forget":
        changes = {"decouple": {"source": recipe["forget"]["source"]}}
    with pytest.raises(RecipeError, match=message):
        spunge.run({**recipe, **changes}, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("delta.*"))
