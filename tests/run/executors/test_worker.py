"""A process that makes stages for another one: what an interrupt does to it."""

import signal
from types import SimpleNamespace

import pytest

from spunge.run.executors import worker
from spunge.run.executors.worker import Stopping
from spunge.stopping import Stop


def test_an_interrupt_raises_where_a_stop_was_asked_for_and_nobody_looks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop, speaker = Stop(), SimpleNamespace(busy=False)
    monkeypatch.setattr(worker, "STOP", stop)
    stopping = object.__new__(Stopping)
    monkeypatch.setattr(stopping, "_speaker", speaker, raising=False)
    stopping._interrupted(signal.SIGINT, None)  # a terminal's, before the other process has heard it
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        stopping._interrupted(signal.SIGINT, None)
    speaker.busy = True
    stopping._interrupted(signal.SIGINT, None)


def test_an_interrupt_that_is_heard_late_leaves_a_training_to_keep_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, kept = Stop(), []
    monkeypatch.setattr(worker, "STOP", stop)
    stopping = object.__new__(Stopping)
    monkeypatch.setattr(stopping, "_speaker", SimpleNamespace(busy=False), raising=False)

    def training() -> None:
        with stop.looked_for():  # leaving the block it obeys
            stop.ask()
            stopping._interrupted(signal.SIGINT, None)
            kept.append("state")

    with pytest.raises(KeyboardInterrupt):
        training()
    assert kept
