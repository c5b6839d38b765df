"""Accumulated gradients are those of the whole batch, whatever the samples' lengths: tokens count alike, or samples do."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.architecture import find_blocks
from spunge.registry import METHODS
from spunge.unlearning.method import Task
from toys import ANSWERING, ANSWERING_BOTH

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
            "refusal": ["the dog", "a cat and a dog and a bird", "the dog", "a new sun"],
            "end": ["auto"] * 4,
        }
    )
)
ALIKE = {"satimp", "ce_u", "me_gd", "altpo", "whp"}  # means over tokens or samples as those of others here
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
    ("satimp", {}),
    ("ce_u", {}),
    ("me_gd", {}),
    ("idk_ap", {"refusals": ["the dog", "a cat and a dog and a bird"]}),
    ("llmu", {"random_answers": ["the dog"]}),  # the answers are drawn anew for each batch
    ("pdu", {}),
    ("altpo", {}),
    ("whp", {}),
    ("lat", {"inner": {"steps": 2}}),
    ("npo", {"optimizer": {"sam": 0.5}, "gru": 0.8}),
    ("tvn", {"optimizer": {"sam": 0.5}}),
    ("sku", {"random": 0.0}),  # the random answers are drawn anew for each batch
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

        forget = PAIRS if method in ANSWERING else Samples(pa.table({"text": TEXTS}))
        retain = PAIRS if method in ANSWERING_BOTH else Samples(pa.table({"text": KEPT}))
        log = tmp_path / f"{method}-{size}-{accumulation}.jsonl"
        task = Task(base, {"part": forget}, retain, {"part": 1}, log)
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
        return taken[-1], json.loads(log.read_text().splitlines()[0])

    return take


@pytest.mark.parametrize(
    ("method", "changes"),
    [pytest.param(m, c, marks=pytest.mark.thorough if m in ALIKE else ()) for m, c in METHODS_AND_CHANGES],
    ids=[f"{m}{c or ''}" for m, c in METHODS_AND_CHANGES],
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


@contextmanager
def little_memory(base: Any, rows: int) -> Iterator[list[int]]:
    """A model that runs out of memory in the backward pass of more than so many rows; yields the rows of each call."""
    called: list[int] = []

    def refuse(grad: torch.Tensor) -> None:
        if grad.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def watch(_module: Any, _inputs: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        called.append(hidden.shape[0])
        if hidden.requires_grad:
            hidden.register_hook(refuse)

    hook = find_blocks(base.model)[2].register_forward_hook(watch)
    try:
        yield called
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("method", "changes", "rows"),
    [
        ("tvn", {}, 1),
        ("graddiff", {"retain_loss": "kl"}, 1),
        ("npo", {}, 2),
        ("dpo", {}, 1),
        ("idk", {"refusals": ["the dog", "a cat and a dog and a bird"]}, 1),
        ("undial", {}, 1),
        pytest.param("idk_ap", {}, 1, marks=pytest.mark.thorough),
        ("pdu", {}, 1),
        ("tar", {"attack": {"steps": 2}}, 1),
        ("npo", {"optimizer": {"sam": 0.5}, "gru": 0.8}, 1),
        ("sku", {}, 2),
        ("rmu", {"layer": 2}, 2),
        ("rmu", {"layer": 2, "coefficient": 6.5}, 1),
    ],
)
def test_what_does_not_fit_into_the_memory_is_done_in_pieces_with_the_same_gradient(
    load: Callable[..., Any], first_gradient: Callable[..., Any], method: str, changes: dict[str, Any], rows: int
) -> None:
    base = load()
    whole, logged = first_gradient(base, method, 4, 1, retain_batch_size=3, **changes)
    if method == "sku":
        rows *= 5  # random answers to each prompt
    with little_memory(base, rows) as called:
        parts, terms = first_gradient(base, method, 4, 1, retain_batch_size=3, **changes)
    assert max(called) > rows >= called[-1]
    assert float((parts - whole).norm() / whole.norm()) < 1e-4
    for name in ("loss", "forget", "retain", "preserve", "guided", "random"):
        if name in logged:
            assert terms[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6)


def test_a_sample_that_does_not_fit_alone_is_refused_in_one_line(
    load: Callable[..., Any], first_gradient: Callable[..., Any]
) -> None:
    base = load()
    with (
        little_memory(base, 0),
        pytest.raises(RecipeError, match=r"unlearn\.max_length: 256: the memory does not hold"),
    ):
        first_gradient(base, "npo", 4, 1)


def test_pieces_outlast_a_kill(load: Callable[..., Any], tmp_path: Path) -> None:
    """What was found to fit is kept in the state; the branch goes on to the delta that it would have had."""
    base, npo = load(), METHODS.get("npo")
    settings = npo.settings(method="npo", steps=4, epochs=None, batch_size=3)
    task = Task(base, {"part": Samples(pa.table({"text": TEXTS}))}, Samples(pa.table({"text": KEPT})), {"part": 1})

    def killed(done: int, total: int, note: str = "") -> None:
        if done == 3:
            raise KeyboardInterrupt

    with little_memory(base, 2):
        whole = npo.unlearn(task, settings)
        state = {"state": tmp_path / "state.pt", "save_seconds": 0}
        with pytest.raises(KeyboardInterrupt):
            npo.unlearn(replace(task, **state, progress=killed), settings)
    with little_memory(base, 3) as called:  # there is room again
        resumed = npo.unlearn(replace(task, **state), settings)
    assert max(called) == 2
    assert whole.notes == resumed.notes == {"out of memory": "each batch in 2 pieces"}
    for name, change in whole.changes.items():
        assert torch.equal(change.dense(), resumed.changes[name].dense())


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
