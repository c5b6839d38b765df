"""Settings as the keys of stages have them: one by one, so that a change is told by its setting."""

from collections.abc import Iterator, Mapping
from typing import Any

# Of the optimizers whose steps once were others: rises when the same settings give another delta.
OPTIMIZERS = {"sophia": 2}
UNCHANGED = [("optimizer", "adamw"), ("gru", None), ("stop", None), ("decouple", 0.5)]


def keyed(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A training's settings as its key has them, without those that once were not there and change nothing."""
    told = flattened(name, {key: value for key, value in settings.items() if (key, value) not in UNCHANGED})
    given = settings.get("optimizer")
    stepper = given.get("optimizer") if isinstance(given, Mapping) else given  # inside SAM
    return told | ({f"{stepper}'s version": OPTIMIZERS[stepper]} if stepper in OPTIMIZERS else {})


def flattened(name: str, value: Any) -> dict[str, Any]:
    """A settings block as `unlearn.trainable.rank: 16`, so that a change is told by its setting."""
    return dict(_leaves(name, value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value
