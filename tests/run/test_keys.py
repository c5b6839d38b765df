"""Settings that came later leave the keys of earlier trainings as they were."""

from typing import Any

import pytest

from spunge.registry import METHODS
from spunge.run.keys import UNCHANGED, keyed

# What `ga` and `npo` could be told when the first branches were made.
BEFORE = {
    *(
        "accumulation",
        "alpha",
        "batch_size",
        "epochs",
        "gamma",
        "joint_steps",
        "learning_rate",
        "max_damage",
        "max_grad_norm",
    ),
    *(
        "max_length",
        "max_lengths",
        "method",
        "packing",
        "reference",
        "retain_batch_size",
        "retain_loss",
        "retain_order",
    ),
    *("schedule", "steps", "warmup", "weight_decay"),
    *(f"trainable.{name}" for name in ("alpha", "dropout", "kind", "rank", "start", "targets")),
}


def key_of(method: str, **changes: Any) -> dict[str, Any]:
    given = METHODS.get(method).settings(method=method, steps=3, **changes)
    return keyed("unlearn", given.model_dump(mode="json"))


@pytest.mark.parametrize(("method", "own"), [("ga", set()), ("npo", {"beta"})])
def test_a_branchs_key_has_the_settings_that_it_always_had(method: str, own: set[str]) -> None:
    assert key_of(method).keys() == {f"unlearn.{name}" for name in BEFORE | own}


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("ga", "stop", {"n": 5}), ("npo", "gru", 0.8), ("npo", "optimizer", "sgd"), ("npo", "optimizer", {"sam": 0.1})],
)
def test_what_came_later_is_in_the_key_where_it_is_given_and_only_there(method: str, name: str, value: Any) -> None:
    assert key_of(method, **{name: dict(UNCHANGED)[name]}) == key_of(method)
    new = key_of(method, **{name: value}).keys() - key_of(method).keys()
    assert new
    assert all(f"{each}.".startswith(f"unlearn.{name}.") for each in new)


@pytest.mark.parametrize("optimizer", ["sophia", {"sam": 0.1, "optimizer": "sophia"}])
def test_an_optimizer_whose_steps_changed_is_another_key(optimizer: Any) -> None:
    assert keyed("unlearn", {"optimizer": optimizer})["sophia's version"] == 2
    assert keyed("unlearn", {"optimizer": "adamw", "steps": 1}) == {"unlearn.steps": 1}
    assert keyed("unlearn", {"optimizer": "sgd"}) == {"unlearn.optimizer": "sgd"}
