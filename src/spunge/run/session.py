"""What the stages of a run share while they are made: the base in memory, the models that judge, kept activations."""

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from spunge.evaluation.evaluator import Judges
from spunge.files import shown_size
from spunge.model.board import Board
from spunge.model.loading import Base, arithmetic, device_map_of, load_base, pick_device
from spunge.model.memory import held_memory, peak_memory
from spunge.model.placing import laid_out, placed
from spunge.model.ranks import ALONE, Ranks
from spunge.progress import Watcher
from spunge.recipe.model import ModelSettings
from spunge.run.decoding import laid_together, load_small
from spunge.run.inputs import BaseInputs
from spunge.run.models import Model
from spunge.unlearning.method import Store


class Used(NamedTuple):
    """What a process had in use. device, dtype: of the model, None where it loaded none. peak_memory: bytes."""

    device: str | None
    dtype: str | None
    peak_memory: int


class Session:
    """One process at work on a run. The base is loaded when first needed: whole, or until then its first blocks alone.

    ranks: the processes that train a model together, of which this is one. Then the session is for one training.
    """

    def __init__(self, base: BaseInputs, watcher: Watcher, ranks: Ranks = ALONE) -> None:
        self.watcher = watcher
        self.ranks = ranks
        self.board: Board | None = None  # where other processes take batches of the stage that is made
        self.judges = Judges()
        self.activations: Store = {}  # of the base, shared by the trainings of one seed
        self.activations_of: object = None  # that seed's inputs
        self._elsewhere: list[Used] = []  # what other processes had, which made stages for this one
        self._inputs = base
        self._first: dict[int, Base] = {}  # last block -> the base without those above it
        self._whole: Base | None = None
        self._shown: Model | None = None  # the model that lies over the base
        self._placed = False  # whether what is shown lies on the devices of its map
        self._combined: Base | None = None  # the large model with those that shift it, where the recipe decodes
        self._layers = ExitStack()

    def turn_to(self, base: BaseInputs) -> None:
        """Go on with a run's base. What is in memory stays there where it is the same model."""
        if base is self._inputs:
            return
        self.close()
        self.activations, self.activations_of = {}, None
        if (base.folder, base.trained) != (self._inputs.folder, self._inputs.trained):
            self._first.clear()
        self._inputs = base

    def _loaded(self, settings: ModelSettings, folder: Path) -> Base:
        """A whole model in the arithmetic that some settings ask for, packed or not: training and judging may ask for two. One is
        held."""
        here = self._whole
        spread = device_map_of(settings, pick_device(settings.device))
        held = (folder, arithmetic(folder, settings), settings.train_in, settings.part, spread)
        if here is None or (here.folder, here.dtype, here.train_in, here.part, here.device_map) != held:
            self.close()
            if here is not None or self._first:
                here = self._whole = None
                self._first.clear()
                gc.collect()
            here = self._whole = load_base(folder, settings, ranks=self.ranks)
        return here

    def step(self, done: int, total: int, note: str = "", /) -> None:
        """Tell how far the stage is that is made, and the memory that is in use now."""
        base = self.loaded
        held = held_memory(None if base is None else base.device)
        self.watcher.step(done, total, ", ".join([*([note] if note else []), shown_size(held)]))

    @property
    def untaught(self) -> Base:
        """The given model, to be taught."""
        self.close()
        return self._loaded(self._inputs.trained, self._inputs.untaught)

    @property
    def base(self) -> Base:
        """The base itself, nothing laid over it, to be trained."""
        self.close()
        return self._loaded(self._inputs.trained, self._inputs.folder)

    def first_blocks(self, last: int | None) -> Base:
        """A base with blocks 0..last at the least, over the devices of its map; None: all of it, with the output layer, on one."""
        settings = self._inputs.recipe.model
        spread = device_map_of(settings, pick_device(settings.device)) is not None
        if last is None or (not spread and self._whole is not None and self._whole.folder == self._inputs.folder):
            return self.base
        if last not in self._first:
            self.close()
            self._whole = None  # if any, it is another model, or on one device
            self._first.clear()
            gc.collect()
            self._first = {last: laid_out(load_base(self._inputs.folder, settings, last))}
        return self._first[last]

    @property
    def loaded(self) -> Base | None:
        """What is in memory, if anything."""
        return self._whole or next(iter(self._first.values()), None)

    @property
    def used(self) -> Used:
        """By this process, and by those that made stages for it: of these, the last one's model and the highest peak."""
        peak, base = peak_memory(), self.loaded
        own = [] if base is None else [Used(str(base.device), str(base.dtype).removeprefix("torch."), peak)]
        models = [*own, *(each for each in reversed(self._elsewhere) if each.device)]
        device, dtype = models[0][:2] if models else (None, None)
        return Used(device, dtype, max([peak, *(each.peak_memory for each in self._elsewhere)]))

    def used_elsewhere(self, stages: Sequence[Used]) -> None:
        """What other processes had in use as they made stages, in the stages' order."""
        self._elsewhere = list(stages)

    def show(self, model: Model | None) -> Base:
        """A model to be judged, until another is shown: the base with its values laid over it, or one by itself; None: the base
        as it is."""
        if self._inputs.recipe.decode is not None:
            return self._shifted(model)
        return self.itself(model)

    def itself(self, model: Model | None) -> Base:
        """The same of a model's own weights, also where they shift a larger one's logits."""
        alone = None if model is None else model.by_itself
        base = self._loaded(self._inputs.judged, alone or self._inputs.folder)
        if model is not self._shown or not self._placed:
            self.close()
            if model is not None and alone is None:
                self._layers.enter_context(model.laid_over(base))
            self._layers.enter_context(placed(base))
            self._shown, self._placed = model, True
        return base

    def _shifted(self, model: Model | None) -> Base:
        """The same of a large model whose logits small ones shift. The large one stays in memory from model to model, and what
        shifts it is loaded anew."""
        if model is not None and model is self._shown and self._combined is not None:
            return self._combined
        self.close()
        alone = None if model is None else model.by_itself
        large = self._loaded(self._inputs.large_settings, alone or self._inputs.large)
        if model is None or alone is not None:
            return large
        self._combined, hook = laid_together(large, load_small(self._inputs), model, self._inputs.recipe)
        self._layers.callback(hook.remove)
        self._shown = model
        return self._combined

    def close(self) -> None:
        """Leave the base as it is, nothing laid over it."""
        self._layers.close()
        self._shown = self._combined = None
        self._placed = False
