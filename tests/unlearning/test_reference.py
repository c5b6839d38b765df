"""The base's likelihood of a sample: asked for once, kept, and saved with the branch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import spunge.unlearning.reference
from spunge.data.samples import Batch, Samples
from spunge.registry import METHODS
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.reference import base_outputs
from toys import texts

ROWS = 7
PAIRS = Samples(pa.table({"prompt": texts("a", ROWS), "completion": [f" {text}" for text in texts("b", ROWS)]}))
RETAIN = Samples(pa.table({"text": texts("other", 5)}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that the base is asked about."""
    batches: list[Batch] = []

    def outputs(trained: Any, batch: Batch) -> Any:
        batches.append(batch)
        return base_outputs(trained, batch)

    monkeypatch.setattr(spunge.unlearning.reference, "base_outputs", outputs)
    return batches


def branch(base: Any, method: str, task: dict[str, Any], **changes: Any) -> Branch:
    settings = {"method": method, "epochs": 3, "batch_size": 3, "learning_rate": 1e-3, **changes}
    own = replace(Task(base, {"a": PAIRS}, RETAIN, {"a": 1}), **task)
    return METHODS.get(method).unlearn(own, METHODS.get(method).settings(**settings))


@pytest.mark.parametrize(("method", "streams"), [("npo", 1), ("dpo", 2), ("simnpo", 0)])
def test_the_base_is_asked_about_each_sample_once_in_all_epochs(
    load: Callable[..., Any], asked: list[Batch], method: str, streams: int
) -> None:
    branch(load(), method, {})
    assert sorted(row for batch in asked for row in batch.rows) == sorted(list(range(ROWS)) * streams)


def test_rows_that_come_twice_in_a_batch_or_with_others_have_the_bases_value(load: Callable[..., Any]) -> None:
    from spunge.recipe.training import LoRA
    from spunge.unlearning.batches import Stream
    from spunge.unlearning.reference import Sums
    from spunge.unlearning.trained import training

    base = load()
    stream = Stream(PAIRS, base, 3, 64, 0)
    with training(base, LoRA(rank=2), 0) as trained:
        whole = base_outputs(trained, stream.batch(range(ROWS))).sums()
        kept: list[float] = []
        sums = Sums(trained, stream, kept)
        for rows in ([3, 3, 1], [1, 0, 4], [4, 3, 0]):
            torch.testing.assert_close(sums.of(stream.batch(rows)), whole[rows])
        assert sorted(kept[::2]) == [0, 1, 3, 4]
        del kept[4:]  # as the loop does where it repeats a step
        torch.testing.assert_close(sums.of(stream.batch([0, 3])), whole[[0, 3]])


def test_a_killed_branch_goes_on_with_the_values_that_it_had(
    load: Callable[..., Any], asked: list[Batch], tmp_path: Path
) -> None:
    base = load()

    def killed(done: int, total: int, note: str = "") -> None:
        if done == 4:  # in the second epoch
            raise KeyboardInterrupt

    whole = branch(base, "npo", {})
    state = {"state": tmp_path / "state.pt", "save_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        branch(base, "npo", {**state, "progress": killed})
    asked.clear()
    resumed = branch(base, "npo", state)
    assert not asked
    for name, change in whole.changes.items():
        assert torch.equal(change.dense(), resumed.changes[name].dense())
