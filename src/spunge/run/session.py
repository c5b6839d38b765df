"""What the stages of a run share while they are made: the base in memory, the models that judge, kept activations."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

from spunge.evaluation.evaluator import Judges
from spunge.model.loading import Base, load_base
from spunge.progress import Watcher
from spunge.run.inputs import BaseInputs
from spunge.run.models import Model
from spunge.unlearning.method import Store


class Session:
    """One process at work on a run. The base is loaded when first needed: whole, or until then its first blocks alone."""

    def __init__(self, base: BaseInputs, watcher: Watcher) -> None:
        self.watcher = watcher
        self.judges = Judges()
        self.activations: Store = {}  # of the base, shared by the trainings of one seed
        self.activations_of: object = None  # that seed's inputs
        self._inputs = base
        self._first: dict[int, Base] = {}  # last block -> the base without those above it
        self._shown: Model | None = None  # the model that lies over the base
        self._layers = ExitStack()

    @cached_property
    def _whole(self) -> Base:
        self._first.clear()
        gc.collect()
        return load_base(self._inputs.folder, self._inputs.recipe.model)

    @property
    def base(self) -> Base:
        """The base itself, nothing laid over it."""
        self.show(None)
        return self._whole

    def first_blocks(self, last: int | None) -> Base:
        """A base with blocks 0..last at the least; None: all of it, with the output layer."""
        if last is None or self.whole_is_loaded:
            return self.base
        if last not in self._first:
            self._first = {last: load_base(self._inputs.folder, self._inputs.recipe.model, last)}
        return self._first[last]

    @property
    def whole_is_loaded(self) -> bool:
        return "_whole" in vars(self)

    @property
    def loaded(self) -> Base | None:
        """What is in memory, if anything."""
        return self._whole if self.whole_is_loaded else next(iter(self._first.values()), None)

    def show(self, model: Model | None) -> Base:
        """The base with a model's values laid over it, until another is shown; None: the base as it is."""
        if model is not self._shown:
            self._layers.close()
            self._shown = None
            if model is not None:
                self._layers.enter_context(model.laid_over(self._whole))
            self._shown = model
        return self._whole


@contextmanager
def session(base: BaseInputs, watcher: Watcher) -> Iterator[Session]:
    """A session whose base is as it was when the block ends."""
    opened = Session(base, watcher)
    try:
        yield opened
    finally:
        if opened.whole_is_loaded:
            opened.show(None)
