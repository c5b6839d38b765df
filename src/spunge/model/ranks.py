"""The processes that train one model together, and what they tell one another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # how far one process may be behind another, such as while the model is read


class Seat(NamedTuple):
    """Where a process sits among those that train together. meeting: a file, not there yet, by which they find one another."""

    rank: int
    ranks: int
    meeting: Path


@dataclass(frozen=True)
class Ranks:
    """Some processes, of which this one is number `rank`. All of them must ask the same things in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def shared(self) -> bool:
        """Whether there are several."""
        return self.count > 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def means(self, own: Sequence[float]) -> list[float]:
        """The means of each process's numbers, place by place."""
        return [total / self.count for total in self._reduced(own, distributed.ReduceOp.SUM)] if self.shared else [*own]

    def sum(self, own: float) -> float:
        return self._reduced([own], distributed.ReduceOp.SUM)[0] if self.shared else own

    def any(self, own: bool) -> bool:
        """Whether it is so in some process."""
        return self._reduced([own], distributed.ReduceOp.MAX)[0] > 0 if self.shared else own

    def each(self, own: T) -> list[T]:
        """What every process has, in their order."""
        if not self.shared:
            return [own]
        others: list[Any] = [None] * self.count
        distributed.all_gather_object(others, own)
        return others

    def wait(self) -> None:
        """Until every process is here."""
        self.sum(0)

    def _reduced(self, own: Sequence[float], by: distributed.ReduceOp.RedOpType) -> list[float]:
        numbers = torch.tensor([*own], dtype=torch.float64)
        distributed.all_reduce(numbers, by)
        listed: list[float] = numbers.tolist()
        return listed


ALONE = Ranks()


@contextmanager
def seated(seat: Seat) -> Iterator[Ranks]:
    """Inside the block, this process and the others of its meeting can tell one another things, and share tensors."""
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backends, init_method=f"file://{seat.meeting}", rank=seat.rank, world_size=seat.ranks, timeout=PATIENCE
    )
    yield Ranks(seat.rank, seat.ranks)
    distributed.destroy_process_group()  # after an error the process ends, and waits for no other
