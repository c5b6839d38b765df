"""A search, and one that is stopped in its midst."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spunge.run.tune import tune
from toys import Told


class Stopping(Told):
    """A watcher that stops after so many trainings, judgements of merged models and trials; 0: never."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def end(self, outcome: str) -> None:
        super().end(outcome)
        if "trial " in self.lines[-2] or "judge merged" in self.lines[-2] or "unlearn " in self.lines[-2]:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def searched(
    recipe: dict[str, Any], trials: int, objectives: list[str], out: Path, overrides: Sequence[str] = (), after: int = 0
) -> tuple[list[Any] | None, list[str]]:
    """Each trial's values and scores, None where it was stopped; and the lines that were said."""
    watcher = Stopping(after)
    try:
        search = tune(recipe, trials, objectives, out, overrides, watcher=watcher)
    except KeyboardInterrupt:
        return None, watcher.lines
    return [(trial.values, trial.scores) for trial in search.trials], watcher.lines
