"""Accumulated gradients are those of the whole batch, whatever the samples' lengths: tokens count alike, or samples do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.registry import METHODS
from spunge.unlearning.method import Task

TEXTS = [
    "the dog",
    "a cat runs",
    "the old moon sleeps and the new sun eats bread and wine in the city of paris",
    "one two three",
]
KEPT = [
    "it was",
    "north south east west and a river and a mountain and a tree and a house",
    "blue fish",
    "good day to the bird",
]
PAIRS = Samples(
    pa.table(
        {
            "prompt": ["the capital of", "a", "in the old city of rome", "it was"],
            "completion": [" france is paris", " dog", " the wine and the bread and the water", " a bird and a fish"],
            "end": ["auto"] * 4,
        }
    )
)
NEED_PROMPTS = ("dpo", "idk", "sku")
METHODS_AND_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("tvn", {}),
    ("ga", {}),
    ("graddiff", {}),
    ("graddiff", {"retain_loss": "kl"}),
    ("npo", {}),
    ("simnpo", {}),
    ("dpo", {}),
    ("idk", {"refusals": ["the dog", "a cat and a dog and a bird"]}),
    ("undial", {}),
    ("wga", {}),
    ("sku", {"random": 0.0}),  # the random answers are drawn anew for each batch
    ("sku", {"random": 0.0, "mode": "reference"}),
    ("rmu", {"layer": 2}),
    ("rmu", {"layer": 2, "coefficient": 6.5}),
]


@pytest.fixture
def first_gradient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    """The gradient that a method's first optimizer step takes, in one row, and what it logs."""

    def take(
        base: Any, method: str, size: int, accumulation: int, **changes: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        taken: list[torch.Tensor] = []

        def step(optimizer: Any, *_args: Any, **_kwargs: Any) -> None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            taken.append(torch.cat([parameter.grad.double().reshape(-1) for parameter in parameters]))

        forget = PAIRS if method in NEED_PROMPTS else Samples(pa.table({"text": TEXTS}))
        log = tmp_path / f"{method}-{size}-{accumulation}.jsonl"
        task = Task(base, {"part": forget}, Samples(pa.table({"text": KEPT})), {"part": 1}, log)
        trained = {} if method == "rmu" else {"trainable": {"kind": "all"}}
        settings = METHODS.get(method).settings(
            method=method,
            steps=1,
            epochs=None,
            batch_size=size,
            accumulation=accumulation,
            max_grad_norm=None,
            **trained,
            **changes,
        )
        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.AdamW, "step", step)
            METHODS.get(method).unlearn(task, settings)
        return taken[0], json.loads(log.read_text().splitlines()[0])

    return take


@pytest.mark.parametrize(
    ("method", "changes"), METHODS_AND_CHANGES, ids=[f"{m}{c or ''}" for m, c in METHODS_AND_CHANGES]
)
def test_batches_that_are_accumulated_give_the_gradient_of_one_batch(
    load: Callable[..., Any], first_gradient: Callable[..., Any], method: str, changes: dict[str, Any]
) -> None:
    base = load()
    whole, logged = first_gradient(base, method, 4, 1, **changes)
    for size, accumulation in ((1, 4), (2, 2), (3, 2)):  # an epoch's last batch of three has one row
        parts, terms = first_gradient(base, method, size, accumulation, **changes)
        assert float((parts - whole).norm() / whole.norm()) < 1e-4
        for name in ("loss", "forget", "retain", "preserve", "guided"):
            if name in logged:
                assert terms[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_in_float64(
    load: Callable[..., Any], tiny: Callable[..., Path], first_gradient: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    base = load()
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float64).train()

    def mean(texts: list[str]) -> torch.Tensor:
        losses = []
        for text in texts:
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        return torch.cat(losses).mean()

    (mean(KEPT) - mean(TEXTS)).backward()
    names = dict(model.named_parameters())
    expected = torch.cat([names[name].grad.reshape(-1) for name, _ in base.model.named_parameters()])
    for size in (4, 2, 1):
        found, _ = first_gradient(base, "graddiff", size, 4 // size)
        assert float((found - expected).norm() / expected.norm()) < 1e-4
