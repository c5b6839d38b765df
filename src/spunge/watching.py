"""Who hears how a run goes: stages that begin and end, steps in between."""

from typing import Protocol


class Watcher(Protocol):
    """Hears how a run goes."""

    def begin(self, title: str) -> None: ...
    def step(self, done: int, total: int, note: str = "") -> None: ...
    def end(self, outcome: str) -> None: ...


class Silent:
    """Says nothing."""

    def begin(self, title: str) -> None:
        pass

    def step(self, done: int, total: int, note: str = "") -> None:
        pass

    def end(self, outcome: str) -> None:
        pass
