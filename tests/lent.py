"""A judging by two processes, one of which is killed or stopped as soon as both have measured something."""

import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import spunge
from spunge.errors import LostError
from spunge.recipe.loading import load_recipe
from spunge.run.executors import lending
from spunge.run.executors.executor import Given
from spunge.run.executors.lending import Lending
from spunge.run.executors.making import Job
from spunge.run.executors.processes import Process
from started import TWO, until


def judged(recipe: dict[str, Any], run: Path, who: str | None, number: int) -> tuple[int, list[str], int]:
    """How many batches were measured by another process, what errors there were, and how many boards are left. who: maker, helper
    or None."""
    boards: list[Path] = []
    team: dict[str, Process] = {}
    left: set[Path] = set()
    lend, begin, give = Lending.lend, Lending.begin, Process.send

    def lent(self: Any, process: Process, given: Given) -> Any:
        team["helper"] = process
        return lend(self, process, given)

    def begun(self: Any, *given: Any) -> Any:
        job = begin(self, *given)
        boards.append(job.board)
        return job

    def sent(self: Process, message: Any) -> None:
        if isinstance(message, Job):
            team["maker"] = self
        give(self, message)

    def watch() -> None:
        def some() -> bool:
            for board in boards:
                left.update(file for file in board.glob("*.result") if file.exists() and file.stat().st_size)
            return len(left) > 1

        until(some)
        if who:
            os.kill(team[who]._process.pid, number)

    errors = []
    with (
        patch.object(lending, "LENT_AFTER", 0.0),
        patch.object(Lending, "lend", lent),
        patch.object(Lending, "begin", begun),
        patch.object(Process, "send", sent),
    ):
        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        for _ in range(2 if who == "maker" else 1):
            try:
                spunge.run(load_recipe(recipe, TWO), run)
            except LostError as error:
                errors.append(str(error))
        watching.join(1.0)
    return len(left), errors, sum(board.exists() for board in boards)
