"""What is made for each sample before the first step is made for those that the steps learn, and for no others."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.registry import METHODS
from spunge.unlearning import alternatives, elm, quark, whp
from spunge.unlearning.batches import Stream
from spunge.unlearning.method import Task
from spunge.unlearning.rollouts import Rewarding

WORDS = ["city", "dog", "moon", "river", "old", "new", "one", "two"]
PAIRS = Samples(
    pa.table({"prompt": [f"the {word} is" for word in WORDS], "completion": [f" {word} in the city" for word in WORDS]})
)
FEW: dict[str, Any] = {"steps": 1, "batch_size": 2, "max_length": 16, "alpha": 0, "learning_rate": 0.01}
GIVEN: dict[str, dict[str, Any]] = {
    "whp": {"alpha": 5, "reinforce": {"epochs": 0.5, "learning_rate": 0.01}},
    "elm": {"expert": "old {concept}", "novice": "new {concept}", "change": "moon", "written_tokens": 2},
    "altpo": {"alternatives": {"count": 1, "tokens": 4}},
    "quark": {"scorer": "rouge", "tokens": 3, "least_tokens": 0, "quantiles": 2, "labels": ["moon"]},
}


def task_of(base: Any) -> Task:
    return Task(base, {"a": PAIRS}, None, {"a": 3})


def settings_of(method: str) -> Any:
    return METHODS.get(method).settings(**FEW | GIVEN[method])


@pytest.mark.parametrize("order", ["shuffled", "in_order", "with_replacement"])
@pytest.mark.parametrize(("accumulation", "repeats"), [(1, 1), (2, 1), (2, 3)])
def test_the_rows_of_so_many_steps_are_those_that_they_draw(
    load: Callable[..., Any], order: str, accumulation: int, repeats: int
) -> None:
    stream = Stream(PAIRS, load("llama"), 3, 16, 5, order=order, accumulation=accumulation, repeats=repeats)
    for steps in (1, 2, 4, 9):
        again = Stream(PAIRS, stream.base, 3, 16, 5, order=order, accumulation=accumulation, repeats=repeats)
        drawn = [row for _ in range(steps * accumulation) for row in next(again).rows]
        assert stream.learned(steps) == sorted(set(drawn))
    assert stream.drawn == 0


@pytest.mark.parametrize("method", list(GIVEN))
def test_the_delta_is_that_of_all_rows_made_and_the_others_are_not_made(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    made: list[int] = []
    module, name, count = {
        "whp": (whp, "foretold", lambda batch, *_: len(batch.rows)),
        "elm": (elm, "continued", lambda _task, _settings, texts, *_: len(texts)),
        "altpo": (alternatives, "written", lambda *_: 1),
        "quark": (quark, "explored", lambda _writer, _settings, rows, *_: len(rows)),
    }[method]
    take = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: made.append(count(*given)) or take(*given))
    monkeypatch.setattr(
        Rewarding, "of", lambda _self, texts, _asked: [place / len(texts) for place in range(len(texts))]
    )
    base = load("llama")
    few = METHODS.get(method).unlearn(task_of(base), settings_of(method))
    assert 2 <= sum(made) < 4
    if method == "quark":  # its levels are of what was written
        return
    made.clear()
    monkeypatch.setattr(Stream, "learned", lambda stream, _steps: list(range(stream.count)))
    every = METHODS.get(method).unlearn(task_of(base), settings_of(method))
    assert sum(made) >= len(WORDS)  # altpo draws again where it has no other answer
    assert few.losses == every.losses
    assert few.changes.keys() == every.changes.keys()
    for key, change in few.changes.items():
        assert all(
            torch.equal(own, other) for own, other in zip(parts_of(change), parts_of(every.changes[key]), strict=True)
        )


def parts_of(change: Any) -> list[torch.Tensor]:
    return [change] if isinstance(change, torch.Tensor) else [each for each in change if isinstance(each, torch.Tensor)]


def test_a_row_that_has_no_sample_of_its_own_is_an_error(load: Callable[..., Any]) -> None:
    stream = Stream(PAIRS, load("llama"), 3, 16, 5)
    other = stream.replaced(PAIRS, [1, 2])
    assert other.batch([2, 1]).rows == (2, 1)
    with pytest.raises(IndexError, match=r"rows \[3\] have no sample"):
        other.batch([1, 3])
