"""Batches that several processes compute together: one offers them in a folder, and others that hold the same model take some.

The process that offers keeps what each batch gives in its own order, so whoever computed a batch, the result is the same. A batch
is taken by a lock, which the system takes back from a process that ends: the batch is then anybody's again. One that stands still
without ending is not waited for longer than a batch may take.
"""

import hashlib
import pickle  # of what this program wrote itself, in a folder that this user alone can write to
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from spunge.errors import RecipeError
from spunge.files import taken, written
from spunge.model.memory import halving, is_out_of_memory, release

if TYPE_CHECKING:
    from spunge.model.loading import Base

R = TypeVar("R")
G = TypeVar("G")

WAIT = 0.02  # seconds until a process looks again whether another is done
PATIENCE = 2.0  # how often as long as its own slowest batch another's is waited for, before it is computed here too
LEAST = 5.0  # seconds that it is waited for at least
OFFER = ".offer"
TOLD_BY = 32  # tokens that a model is told from another by


@dataclass(frozen=True)
class Board:
    """Where a process offers its batches, for one stage."""

    folder: Path
    offered: list[str] = field(default_factory=list)  # the names of its offers so far


class Offer(NamedTuple):
    """Batches of one call. call: (base, given, rows of a batch) -> what the batch gives."""

    call: Callable[[Any, Any, Sequence[int]], Any]
    given: Any
    groups: list[list[int]]
    tokens: list[int]
    answer: str  # what the model that offers makes of the tokens


def batched(
    base: "Base",
    groups: Iterable[Sequence[int]],
    sizes: Sequence[int],
    call: Callable[["Base", G, Sequence[int]], R],
    given: G,
    tokens: Sequence[int],
    setting: str,
) -> Iterator[tuple[Sequence[int], R]]:
    """Each group of rows with what `call` gives for it, in the groups' order; see `halved` for what does not fit into the memory.

    Where the base has a board, other processes may compute some of the groups. So call must depend on its arguments alone, and be
    a function of a module; one that is not is called here. tokens: some of the rows', by which the others know the model.
    """
    halves = halving(sizes, lambda rows: call(base, given, rows), setting)
    listed = [list(rows) for rows in groups]
    if base.board is None or len(listed) < 2:
        yield from (piece for rows in listed for piece in halves(rows))
        return
    name = f"{len(base.board.offered):04}"
    base.board.offered.append(name)
    offer = Offer(call, given, listed, list(tokens[:TOLD_BY]), answer(base, tokens[:TOLD_BY]))
    file = base.board.folder / f"{name}{OFFER}"
    if not _stored(offer, file):
        yield from (piece for rows in listed for piece in halves(rows))
        return
    try:
        yield from _with_others(listed, halves, Taking(file, len(listed)))
    finally:
        file.unlink(missing_ok=True)


def _stored(offer: Offer, file: Path) -> bool:
    """Whether the offer could be written down."""
    try:
        content = pickle.dumps(offer)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    try:
        with written(file) as aside:
            aside.write_bytes(content)
    except (OSError, RecipeError):  # no room for it: what it would save is time alone
        return False
    return True


def _with_others(
    listed: Sequence[list[int]], halves: Callable[[Sequence[int]], Iterator[tuple[Sequence[int], R]]], taking: "Taking"
) -> Iterator[tuple[Sequence[int], R]]:
    pieces: dict[int, list[tuple[Sequence[int], R]]] = {}
    slowest = 0.0  # seconds of a batch of its own
    for place, rows in enumerate(listed):
        since = time.monotonic()
        while place not in pieces:
            if (theirs := taking.result(place)) is not None:
                pieces[place] = [(rows, theirs[0])]
            elif (mine := taking.next()) is not None:
                number, give_back = mine
                began = time.monotonic()
                try:
                    pieces[number] = list(halves(listed[number]))
                    taking.mark(number)
                finally:
                    give_back()
                since = time.monotonic()
                slowest = max(slowest, since - began)
            elif time.monotonic() - since > max(LEAST, PATIENCE * slowest):
                pieces[place] = list(halves(rows))
            else:
                time.sleep(WAIT)
        yield from pieces.pop(place)


class Taking:
    """The batches of an offer, as one process takes them."""

    def __init__(self, file: Path, count: int) -> None:
        self._file = file
        self._open = dict.fromkeys(range(count))  # those that nobody is known to be done with

    def next(self) -> tuple[int, Callable[[], None]] | None:
        """The first batch that nobody is at or done with, and what gives it back, which is held by a lock; None where there is none
        now.

        Where the disk takes no lock, a batch is computed all the same: at the worst twice.
        """
        for place in list(self._open):
            if not self._result(place).exists():
                try:
                    lock = taken(self._file.with_suffix(f".{place}.lock"), 0)
                except OSError:
                    del self._open[place]
                    return place, lambda: None
                if lock is None:
                    continue
                if not self._result(place).exists():
                    return place, lock.release
                lock.release()
            del self._open[place]
        return None

    def mark(self, place: int) -> None:
        """Say that a batch is done, whose result this process keeps. On a full disk others may compute it in vain."""
        with suppress(OSError):
            self._result(place).touch()

    def store(self, place: int, result: Any) -> None:
        """Leave a result to the process that offers."""
        with written(self._result(place)) as aside:
            aside.write_bytes(pickle.dumps(result))

    def result(self, place: int) -> tuple[Any] | None:
        """What another process left; then it goes from the disk. None where there is nothing, or nothing that can be read."""
        file = self._result(place)
        try:
            if not file.exists() or not (content := file.read_bytes()):
                return None
            file.write_bytes(b"")
        except OSError:
            return None
        return (pickle.loads(content),)  # noqa: S301 - see above

    def _result(self, place: int) -> Path:
        return self._file.with_suffix(f".{place}.result")


def take_part(base: "Base", folder: Path, leaves: Callable[[], bool]) -> None:
    """Compute batches that another process offers in a folder, until `leaves` says so: it is asked before each."""
    over: set[Path] = set()
    while not leaves():
        computed = False
        for file in sorted(folder.glob(f"*{OFFER}")):
            if file not in over:
                over.add(file)
                computed = _take_from(base, file, leaves) or computed
        if not computed:
            time.sleep(WAIT)


def _take_from(base: "Base", file: Path, leaves: Callable[[], bool]) -> bool:
    """Compute batches of one offer while there are any. Nothing where another model is asked for. Whether any was computed."""
    try:
        offer: Offer = pickle.loads(file.read_bytes())  # noqa: S301 - see above
    except (OSError, ImportError, AttributeError):  # it is over, or of code that cannot be imported here
        return False
    if answer(base, offer.tokens) != offer.answer:
        return False
    taking, computed = Taking(file, len(offer.groups)), False
    while file.exists():
        if leaves():
            break
        if (mine := taking.next()) is None:
            time.sleep(WAIT)
            continue
        place, give_back = mine
        try:
            result = _fitting(offer, base, place)
            if result is None:
                break
            taking.store(place, result[0])
            computed = True
        finally:
            give_back()
    return computed


def _fitting(offer: Offer, base: "Base", place: int) -> tuple[Any] | None:
    """What a batch gives; None where it does not fit into this process's memory: the process that offers halves it."""
    try:
        return (offer.call(base, offer.given, offer.groups[place]),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


@torch.inference_mode()
def answer(base: "Base", tokens: Sequence[int]) -> str:
    """What a model makes of some tokens, to the bit: others, changed ones and another device's arithmetic make something else."""
    ids = torch.tensor([list(tokens)], device=base.device)
    logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()
