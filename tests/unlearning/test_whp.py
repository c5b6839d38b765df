"""What errors of the first stage of `whp` name, the copy's training, and what it does where the memory is short."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning import finetuning, whp
from spunge.unlearning.method import Branch, Task
from toys import texts


def unlearned(base: Any, **changes: Any) -> Branch:
    given = {"steps": 2, "batch_size": 4, "trainable": {"kind": "all"}, "reinforce": {"epochs": 1}, **changes}
    task = Task(base, {"a": Samples(pa.table({"text": texts("a", 6)}))}, None, {"a": 1})
    return METHODS.get("whp").unlearn(task, METHODS.get("whp").settings(method="whp", **given))


def short_of_memory(most: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call on at most so many samples."""

    def called(model: Any, batch: Batch, *rest: Any) -> Any:
        if len(batch.ids) > most:
            raise torch.OutOfMemoryError("out of memory")
        return call(model, batch, *rest)

    return called


@pytest.mark.parametrize(
    ("setting", "changes", "module"),
    [
        (
            "unlearn.reinforce.learning_rate",
            {"reinforce": {"epochs": 2, "learning_rate": 1e30}, "max_grad_norm": None},
            None,
        ),
        ("unlearn.max_length", {}, finetuning),
        ("unlearn.max_length", {}, whp),
        ("unlearn.trainable.match", {"trainable": {"kind": "tensors", "match": ["*.none"]}}, None),
    ],
)
def test_an_error_of_the_copys_training_names_a_setting_that_is_there(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, setting: str, changes: dict[str, Any], module: Any
) -> None:
    if module is not None:
        monkeypatch.setattr(module, "outputs", short_of_memory(0, module.outputs))
    with pytest.raises(RecipeError) as raised:
        unlearned(load(), **changes)
    assert str(raised.value).startswith(f"{setting}: ")
    settings = METHODS.get("whp").settings(method="whp", **changes)
    reduce(lambda block, name: dict(block)[name], setting.split(".")[1:], settings)


def test_the_tokens_are_the_same_where_the_memory_does_not_hold_a_batch(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, found = load(), []
    taken = whp.generic_tokens
    monkeypatch.setattr(whp, "generic_tokens", lambda *given: found.append(taken(*given)) or found[-1])
    unlearned(base, steps=1)
    monkeypatch.setattr(whp, "base_outputs", short_of_memory(1, whp.base_outputs))
    unlearned(base, steps=1)
    assert found[0] == found[1]
