"""Batches that several processes compute: the results of one, in its order, whoever is killed or holds another model."""

import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from spunge.data.samples import Text, encode
from spunge.evaluation import candidates, generation, likelihood
from spunge.evaluation.candidates import Question, candidate_likelihoods
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.likelihood import token_logs, token_values
from spunge.evaluation.reproduction import likeliest
from spunge.files import taken, written
from spunge.model import board
from spunge.model.board import OFFER, Board, Taking, take_part
from spunge.model.loading import Base
from spunge.progress import SILENT
from toys import texts

SAMPLED = GenerationSettings(max_new_tokens=5, temperature=1.0, samples=2)


@pytest.fixture
def base(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> Base:
    drawing, continued = threading.Lock(), generation._continued

    @wraps(continued)
    def alone(*given: Any) -> Any:
        with drawing:  # threads share torch's generator, processes don't
            return continued(*given)

    monkeypatch.setattr(generation, "_continued", alone)
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 60)
    for module in (likelihood, candidates):
        monkeypatch.setattr(module, "batch_tokens", lambda base: 40)
    return load()


def measured(base: Base, folder: Path) -> list[Any]:
    """What evaluators ask of a model: log-probabilities, likeliest tokens, candidates' likelihoods, drawn texts and their file."""
    coded = [encode(Text("", text), base.tokenizer, 64) for text in texts("asia", 12)]
    questions = [Question(text.ids[:-2], [[5, 6, 7], [5, 8]]) for text in coded]
    logs = [each.tolist() for each in token_logs(base, coded, SILENT.step)]
    hits = [each.tolist() for each in token_values(base, coded, likeliest, SILENT.step)]
    chosen = candidate_likelihoods(base, questions, SILENT.step)
    told = completions(base, texts("europe", 9), SAMPLED, Bench("base", "m", folder, folder))
    return [logs, hits, chosen, told, *(file.read_text() for file in folder.glob("texts-*.jsonl"))]


class Another:
    """One that takes part, in a thread of this process, with a model of its own."""

    def __init__(self, folder: Path, base: Base) -> None:
        self.computed: list[int] = []
        self._over = threading.Event()
        own = replace(base, model=copy.deepcopy(base.model))
        self._thread = threading.Thread(target=take_part, args=(own, folder, self._over.is_set))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The batches that others left, by offer and place."""
    left: list[str] = []
    store = Taking.store
    monkeypatch.setattr(
        Taking,
        "store",
        lambda self, place, result: (store(self, place, result), left.append(f"{self._file.stem}-{place}")),
    )
    return left


def awaited_by_the_first(monkeypatch: pytest.MonkeyPatch, left: list[str]) -> None:
    """The process that offers computes nothing of an offer before another has left something of it."""
    own = Taking.next

    def last(self: Taking) -> Any:
        if threading.current_thread() is threading.main_thread():
            until = time.monotonic() + 20
            while not any(each.startswith(self._file.stem) for each in left) and time.monotonic() < until:
                time.sleep(0.005)
        return own(self)

    monkeypatch.setattr(Taking, "next", last)


def test_what_others_compute_is_to_the_bit_what_one_process_does(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[str]
) -> None:
    (tmp_path / "board").mkdir()
    alone = measured(base, tmp_path / "alone")
    awaited_by_the_first(monkeypatch, stored)
    shared = replace(base, board=Board(tmp_path / "board"))
    with Another(tmp_path / "board", base):
        assert measured(shared, tmp_path / "shared") == alone
    assert {each.partition("-")[0] for each in stored} == {"0000", "0001", "0002", "0003"}  # of every call
    assert not list((tmp_path / "board").glob(f"*{OFFER}"))


def test_a_model_with_other_weights_takes_nothing(base: Base, tmp_path: Path, stored: list[str]) -> None:
    (tmp_path / "board").mkdir()
    alone = measured(base, tmp_path / "alone")
    head = base.model.get_output_embeddings().weight
    with Another(tmp_path / "board", base), torch.no_grad():
        before = head.clone()
        head.mul_(1.01)  # as an attack on the weights does
        try:
            changed = measured(replace(base, board=Board(tmp_path / "board")), tmp_path / "changed")
        finally:
            head.copy_(before)
    assert changed[0] != alone[0]
    assert not stored


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_a_batch_that_another_cannot_compute_is_computed_by_the_first(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    (tmp_path / "board").mkdir()
    alone = measured(base, tmp_path / "alone")
    tried: list[int] = []

    def fails(offer: board.Offer, base: Base, place: int) -> Any:
        tried.append(place)
        if error is torch.OutOfMemoryError:
            return None
        raise error

    monkeypatch.setattr(board, "_fitting", fails)
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    with Another(tmp_path / "board", base):
        assert measured(replace(base, board=Board(tmp_path / "board")), tmp_path / "shared") == alone
    assert len(tried) >= 1


@pytest.mark.parametrize("fault", ["another stands still at a batch", "no lock can be had"])
def test_who_offers_waits_for_nobody_for_ever(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = tmp_path / "board"
    folder.mkdir()
    alone = measured(base, tmp_path / "alone")
    if fault == "no lock can be had":

        def full(file: Path, patience: float) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(board, "taken", full)
        assert measured(replace(base, board=Board(folder)), tmp_path / "shared") == alone
        return
    monkeypatch.setattr(board, "LEAST", 0.05)
    held = [taken(folder / f"{offer:04}.{place}.lock") for offer in range(4) for place in (0, 2)]
    assert measured(replace(base, board=Board(folder)), tmp_path / "shared") == alone
    for lock in held:
        assert lock is not None
        lock.release()


def test_the_batch_of_a_process_that_was_killed_is_anybodys_again(tmp_path: Path) -> None:
    file = tmp_path / f"0000{OFFER}"
    holder = (
        "import sys, time; from pathlib import Path; from spunge.files import taken; "
        "lock = taken(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "0000.0.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    taking = Taking(file, 2)
    held, give_back = taking.next() or (None, None)
    assert held == 1
    assert give_back is not None
    taking.mark(1)
    give_back()
    assert taking.next() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = taking.next()
    assert again is not None
    assert again[0] == 0
    again[1]()


def test_a_function_that_no_other_process_can_import_is_called_here_alone(base: Base, tmp_path: Path) -> None:
    coded = [encode(Text("", text), base.tokenizer, 64) for text in texts("asia", 6)]
    shared = replace(base, board=Board(tmp_path))
    mine = token_values(shared, coded, lambda logits, labels: labels, SILENT.step)
    assert [each.tolist() for each in mine] == [text.ids[1:] for text in coded]
    assert not list(tmp_path.iterdir())


def test_an_offer_whose_code_is_not_there_is_passed_over(base: Base, tmp_path: Path) -> None:
    asked = threading.Event()
    with written(tmp_path / f"0000{OFFER}") as aside:
        aside.write_bytes(pickle.dumps(measured).replace(b"measured", b"measureX"))
    take_part(base, tmp_path, lambda: asked.is_set() or asked.set() is not None)
    assert not list(tmp_path.glob("*.result"))
