"""KGA's gap and loss beside three models by hand, and which retain rows stand for new data."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.kga import KGASettings, parted
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Branch, Task
from toys import texts

WAYS = {"lora": {"kind": "lora", "rank": 2, "dropout": 0, "targets": ["q_proj", "lm_head"]}, "all": {"kind": "all"}}


def rows(topic: str, count: int) -> Samples:
    return Samples(pa.table({"text": texts(topic, count)}))


def logs_of(model: Any, batch: Batch) -> Tensor:
    """(n, v) at all scored places, in float64, by transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    return logits[batch.labels[:, 1:] != -100].double().log_softmax(-1)


def divergence(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


def moved(loop: Loop, seed: int, size: float) -> None:
    """The weights of a training that is not done here, by the model in it: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loop.parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.formula("kga")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("far", [0.3, 0.02], ids=["above the gap", "below it"])
def test_the_loss_is_how_far_the_divergence_from_the_copy_is_from_that_of_new_data(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, way: str, far: float
) -> None:
    base, retain, order = load("llama"), rows("europe", 10), iter(["new", "forget", "model"])
    task = Task(base, {"part": rows("asia", 3)}, retain, {"part": 1}, common=5)
    settings = KGASettings(alpha=0, batch_size=3, trainable=WAYS[way])
    logs: dict[str, Tensor] = {}
    seen: dict[str, Any] = {}
    untrained = copy.deepcopy(base.model)
    new = parted(retain, settings, 5).new

    def run(loop: Loop) -> History:
        name = next(order)
        sizes = {"new": 0.1, "forget": far, "model": 0.05}
        moved(loop, len(name), sizes[name])
        base.model.eval()
        if name == "new":
            batch = loop.streams[0].batch(range(len(new)))
            seen["new"] = divergence(logs_of(untrained, batch), logs_of(base.model, batch))
            assert loop.streams[0].samples.table["text"].to_pylist() == new.table["text"].to_pylist()
            return History(1, {}, None, {})
        logs[name] = logs_of(base.model, loop.streams[0].batch(range(3)))
        if name == "model":
            loss = loop.next_loss(0)
            loss.total.backward()
            seen["loss"], seen["gradient"] = (
                float(loss.total.detach()),
                sum(p.grad.abs().sum() for p in loop.parameters),
            )
            assert torch.equal(logs_of(base.model, loop.streams[0].batch(range(3))), logs["model"])
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    METHODS.get("kga").unlearn(task, settings)
    between = divergence(logs["model"], logs["forget"])
    assert (between > seen["new"]) == (far == 0.3)
    assert seen["loss"] == pytest.approx(abs(between - seen["new"]), rel=1e-3)
    assert seen["gradient"] > 0


@pytest.mark.parametrize(("size", "accumulation"), [(1, 4), (3, 2)])
def test_accumulated_batches_on_both_sides_of_the_gap_give_the_gradient_of_one_batch(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, size: int, accumulation: int
) -> None:
    """The distance from the gap is that of all the step's tokens, not of each piece."""
    base, seen = load("llama"), dict[str, Any]()
    samples = Samples(pa.table({"text": ["the dog", "a cat runs in the city", "one two three", "the old moon sleeps"]}))

    def gradient(gap: float, size: int, accumulation: int) -> Tensor:
        order = iter(["forget", "model"])

        def run(loop: Loop) -> History:
            name = next(order)
            moved(loop, len(name), 0.3 if name == "forget" else 0.05)
            base.model.eval()
            seen[name] = [logs_of(base.model, loop.streams[0].batch([row])) for row in range(4)]
            if name == "model":
                with base.autocast():
                    for micro in range(accumulation):
                        (loop.next_loss(micro).total / accumulation).backward()
                seen["gradient"] = torch.cat([p.grad.flatten() for p in loop.parameters])
            return History(1, {}, None, {})

        monkeypatch.setattr(Loop, "run", run)
        monkeypatch.setattr("spunge.unlearning.kga.gap_of", lambda *_: gap)
        settings = KGASettings(alpha=0, batch_size=size, accumulation=accumulation, steps=1, trainable=WAYS["all"])
        METHODS.get("kga").unlearn(Task(base, {"part": samples}, rows("europe", 3), {"part": 1}, common=5), settings)
        return seen["gradient"]

    gradient(0.0, 4, 1)
    each = sorted(divergence(one, other) for one, other in zip(seen["model"], seen["forget"], strict=True))
    gap = (each[0] + each[1]) / 2
    whole, parts = gradient(gap, 4, 1), gradient(gap, size, accumulation)
    assert float((parts - whole).norm() / whole.norm()) < 1e-4


def test_new_rows_are_those_of_the_run_and_none_of_them_is_retained() -> None:
    retain, settings = rows("europe", 10), KGASettings(new_share=0.25)
    new, kept = parted(retain, settings, 1)
    assert (len(new), len(kept)) == (2, 8)
    together = new.table["text"].to_pylist() + kept.table["text"].to_pylist()
    assert sorted(together) == sorted(retain.table["text"].to_pylist())
    assert parted(retain, settings, 1).new.table.equals(new.table)
    assert not parted(retain, settings, 2).new.table.equals(new.table)
    assert [len(each) for each in parted(rows("europe", 2), KGASettings(new_share=0.9), 1)] == [1, 1]


def test_one_retain_row_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"retain: 1 row, and kga takes a share of them"):
        METHODS.get("kga").refuse({"a": rows("asia", 3)}, rows("europe", 1), KGASettings())


class Killed(Exception):
    """What ends a branch in the middle."""


@pytest.mark.parametrize("at", ["copying-new", "copying-forget"])
def test_a_branch_that_is_killed_while_a_copy_is_trained_goes_on_to_the_same_delta(
    load: Callable[..., Any], tmp_path: Path, at: str
) -> None:
    base, told = load("llama"), list[str]()

    def unlearned(progress: Callable[..., None], state: Path | None) -> Branch:
        settings = KGASettings(steps=2, batch_size=2, copies={"epochs": 1}, learning_rate=0.01)
        task = Task(base, {"a": rows("asia", 5)}, rows("europe", 10), {"a": 1}, None, state, 0, progress)
        return METHODS.get("kga").unlearn(task, settings)

    def stopping(step: int, steps: int, note: str = "") -> None:
        told.append(note)
        if note.startswith(f"{at}, step 1 of"):
            raise Killed

    def changes(branch: Branch) -> Iterator[tuple[str, Tensor]]:
        for name, change in branch.changes.items():
            yield name, change if isinstance(change, Tensor) else change.dense()

    whole = unlearned(lambda step, steps, note="": None, None)
    with pytest.raises(Killed):
        unlearned(stopping, tmp_path / "state.pt")
    after = dict(changes(unlearned(lambda step, steps, note="": None, tmp_path / "state.pt")))
    assert all(torch.equal(after[name], change) for name, change in changes(whole))
    assert whole.notes["new data"] == "2 of 10 retain rows"
