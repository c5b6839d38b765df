"""Processes that train together, forked from this one: they need not import anything again."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from spunge.model.ranks import Ranks, Seat, seated

PATIENCE = 300.0  # seconds for all that they do


def _member(seat: Seat, call: Callable[[Ranks], Any], pipe: "Connection[Any, Any]") -> None:
    torch.set_num_threads(1)
    try:
        with seated(seat) as ranks:
            pipe.send((True, call(ranks)))
    except BaseException as error:
        pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


def together(count: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """What `call` gives in each of so many processes, as values that can be pickled; numpy arrays in place of tensors."""
    context = multiprocessing.get_context("fork")
    pipes, members = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            mine, theirs = context.Pipe()
            seat = Seat(rank, count, Path(folder) / "meeting")
            members.append(context.Process(target=_member, args=(seat, call, theirs), daemon=True))
            members[-1].start()
            pipes.append(mine)
        try:
            told = [pipe.recv() if pipe.poll(PATIENCE) else (False, ("", "", "nothing was heard")) for pipe in pipes]
        finally:
            for member in members:
                member.join(5)
                member.kill()
    for well, given in told:
        assert well, given[2]
    return [given for _, given in told]
