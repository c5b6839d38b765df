"""A run as a graph of stages. `run`, `plan`, `status` and `verify` walk it; nothing else knows the order of work.

A stage is a value: a name, what it needs, its inputs (what its key is made of, beside the keys of what it needs), its cost
and the function that makes its files. Its state is read off the folder: a stamp of the same key whose files are whole
means done.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from spunge.files import fingerprint
from spunge.run.planning.steps import Steps
from spunge.run.stamps import Fault, FileMark, Stamp, faults, read_stamp, store_stamp
from spunge.unlearning.calls import Writing

SHOWN = 40  # characters of a changed input's value in a message
LISTED = 3  # changed inputs in a message
STAGE = "stage "  # what the name of an input begins with that is another stage's key
SessionT = TypeVar("SessionT", contravariant=True)


class Made(NamedTuple):
    """What a stage's function leaves behind."""

    files: Sequence[Path]
    outcome: str = ""  # for the person who watches
    byproducts: Sequence[Path] = ()  # such as a log: not worth making the stage again


class NotMadeError(Exception):
    """Something is asked of a stage that is not made, such as the fingerprint of a base that is still to be converted."""


@dataclass(frozen=True)
class Cost:
    """About what a stage takes: a training's steps, tokens through the whole model without gradient, bytes read or written."""

    steps: Steps | None = None
    copying: Steps | None = None  # of copies of the base that are trained before it
    tokens: float = 0.0  # that are read
    written: float = 0.0  # that are written, one after the other
    first: Sequence[Writing] = ()  # what the base writes before a training
    watched: float = 0.0  # tokens that are read beyond these, to measure a training on its way
    watched_written: float = 0.0
    nbytes: float = 0.0
    held: float = 0.0  # bytes in memory beside the model and its batches
    products: float = 0.0  # float64 multiplications of matrices, on the processor
    kept: float = 0.0  # bytes on the disk that its files take
    passing: float = 0.0  # the same, for the time that it is made


@dataclass(frozen=True)
class Stage(Generic[SessionT]):
    name: str  # branch:europe, merged, judge:merged/3f0a..., with `seed-N:` before it for a further seed
    title: str  # as people read it
    needs: tuple[str, ...] = ()  # their keys are part of this one's
    after: tuple[str, ...] = ()  # made before it, though nothing of them enters the key
    inputs: Callable[[], Mapping[str, Any]] = dict
    files: tuple[str, ...] = ()  # patterns, relative to RUN
    passing: tuple[str, ...] = ()  # the same, of files that are of no use once the stage is done
    make: Callable[[SessionT], Made] | None = None  # None: a model that is only laid together in memory
    cost: Callable[[], Cost] = Cost
    told: str = ""  # what a plan says of it beyond the title
    together: bool = False  # several processes can make it of one model; the main one of them leaves the files
    # Shows the model whose batches other processes may take while the stage is made (`model.board`).
    shown: Callable[[SessionT], Any] | None = None
    light: bool = False  # made at once, without a model: by whoever gives the others out
    # Tells how its very folder was made: another run's of the same key says what is not so of this one.
    own: bool = False

    @cached_property
    def takes(self) -> Cost:
        """Its cost, computed once: it counts a model's tensors and all rows."""
        return self.cost()


class State(NamedTuple):
    kind: Literal["done", "stale", "damaged", "missing", "unknown"]
    why: str = ""  # which input changed, or which file is not as it was
    stamp: Stamp | None = None

    @property
    def done(self) -> bool:
        return self.kind == "done"


@dataclass
class Graph(Generic[SessionT]):
    """The stages of a run by name, each after those that it needs. `folder`: RUN."""

    folder: Path
    stages: dict[str, Stage[SessionT]] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)
    _faults: dict[tuple[str, str], list[Fault]] = field(default_factory=dict)  # stage, key -> its files' faults

    def add(self, stage: Stage[SessionT]) -> None:
        """Raises KeyError where something that it needs is not there: so there is no circle."""
        for name in (*stage.needs, *stage.after):
            self.stages[name]
        self.stages.setdefault(stage.name, stage)

    def inputs(self, name: str) -> dict[str, Any]:
        """All that a stage's key is made of. Raises NotMadeError."""
        stage = self.stages[name]
        return {**stage.inputs(), **{f"{STAGE}{need}": self.key(need) for need in stage.needs}}

    def key(self, name: str) -> str:
        """Fingerprint of all that a stage depends on. Raises NotMadeError."""
        if name not in self._keys:
            self._keys[name] = fingerprint(self.inputs(name))
        return self._keys[name]

    def state(self, name: str) -> State:
        """Whether a stage's files are there, whole, and of this key. Every byte of them is read, once."""
        if self.stages[name].make is None:
            return self._virtual(name)
        stamp = read_stamp(self.folder, name)
        if stamp is None:
            return State("missing")
        try:
            key = self.key(name)
        except NotMadeError as error:
            return State("unknown", f"waits for {error}", stamp)
        if stamp.key != key:
            return State("stale", self._why(stamp.inputs, self.inputs(name)), stamp)
        problems = self.faults(stamp)
        if problems:
            return State("damaged", "; ".join(map(str, problems)), stamp)
        return State("done", "its texts were dropped" if stamp.dropped else "", stamp)

    def _why(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """The first inputs that differ, and how many more; stages by their titles."""
        told = list(changed(self._titled(before), self._titled(now)))
        more = [f"{len(told) - LISTED} more"] if len(told) > LISTED else []
        return "; ".join([*told[:LISTED], *more])

    def _titled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        titles = {f"{STAGE}{name}": f"{STAGE}{stage.title!r}" for name, stage in self.stages.items()}
        return {titles.get(name, name): value for name, value in inputs.items()}

    def _virtual(self, name: str) -> State:
        """Of a stage that makes nothing: done when all that it needs is."""
        open_needs = [need for need in self.stages[name].needs if not self.state(need).done]
        return State("missing", f"needs {', '.join(open_needs)}") if open_needs else State("done")

    def faults(self, stamp: Stamp) -> list[Fault]:
        """What is wrong with the files that a stamp vouches for."""
        if (stamp.stage, stamp.key) not in self._faults:
            self._faults[stamp.stage, stamp.key] = list(faults(self.folder, stamp, byproducts=False))
        return self._faults[stamp.stage, stamp.key]

    def known(self) -> dict[str, str]:
        """The keys that were asked for."""
        return dict(self._keys)

    def know(self, keys: Mapping[str, str]) -> None:
        """Take the keys as another process knows them, whatever was known here."""
        self._keys = dict(keys)
        self._faults.clear()

    def vouch(self, name: str, marks: Mapping[str, FileMark], seconds: float) -> None:
        """Write the stamp of a stage that was made. Keys that depend on what it holds are found anew."""
        stamp = Stamp(name, self.key(name), self.inputs(name), marks, round(seconds, 2))
        self.renewed(store_stamp(self.folder, stamp))
        self.tidy(name)

    def renewed(self, stamp: Stamp) -> None:
        """A stage has new files, which are whole."""
        self._keys.clear()
        self._faults[stamp.stage, stamp.key] = []

    def tidy(self, name: str) -> None:
        """Remove what is of no use once a stage is done: a process that was killed may have left it."""
        for pattern in self.stages[name].passing:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def to_do(self) -> Iterator[Stage[SessionT]]:
        """The stages that are still to be made when their turn comes, each after those that it needs."""
        for stage in self.stages.values():
            if stage.make is not None and not self.state(stage.name).done:
                yield stage


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Which inputs differ: `unlearn.steps was 80, is 40`, `part europe changed`."""
    differ = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    own = [name for name in differ if not name.startswith(STAGE)]
    for name in own or differ:
        old, new = before.get(name), now.get(name)
        if name not in now:
            yield f"{name} is gone"
        elif name not in before:
            yield f"{name} is new"
        elif _is_hash(old) and _is_hash(new):
            yield f"{name} changed"
        else:
            yield f"{name} was {_shown(old)}, is {_shown(new)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) in (32, 64) and all(letter in "0123456789abcdef" for letter in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
