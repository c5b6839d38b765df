"""A stop that is asked for. Who works in steps looks for it after each, keeps what it has and ends; others are interrupted.

Commands ask for it, by handlers of signals (`spunge.cli`). In other people's programs nobody does: their handlers stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether this process is to stop, and whether someone looks for that."""

    def __init__(self) -> None:
        self.asked = False
        self._looking = 0

    def ask(self) -> bool:
        """Ask for it. False where nobody looks for it: then who asks has to interrupt."""
        self.asked = True
        return self._looking > 0

    @contextmanager
    def looked_for(self) -> Iterator[None]:
        """Inside the block a stop is only asked for, and `obey` is called again and again."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1
        self.obey()

    def obey(self) -> None:
        """Raises KeyboardInterrupt where a stop was asked for."""
        if self.asked:
            raise KeyboardInterrupt


STOP = Stop()
