"""Models that are judged as they are: a checkpoint by itself, or an adapter or delta that is laid over the base."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from spunge.copies import folder_here
from spunge.errors import RecipeError
from spunge.model.hub import local_folder
from spunge.recipe.decoding import DExperts, GeDi
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.hub import fetched
from spunge.weights.opening import check_source, open_source, stored_weights
from spunge.weights.sources import Source

if TYPE_CHECKING:
    from spunge.run.inputs import BaseInputs

DESCRIPTIONS = ("delta.json", "adapter_config.json")


@dataclass(frozen=True)
class Given:
    """A folder or a Hub id. Nothing is fetched before it is asked for."""

    path: str
    revision: str | None
    setting: str  # the recipe's key, for errors

    @cached_property
    def folder(self) -> Path:
        return fetched(self.path, self.setting, self.revision)

    @property
    def here(self) -> bool:
        """Whether nothing is to be downloaded any more."""
        return "folder" in vars(self) or os.path.isdir(os.path.expanduser(folder_here(self.path)))

    @cached_property
    def whole(self) -> bool:
        """Whether it is a checkpoint of its own."""
        return stored_weights(self.folder, self.setting).of is None

    def key(self, base: "BaseInputs") -> str:
        """Fingerprint of all in it that results depend on, beside the base."""
        if self.whole:
            return base.key_of(self.folder, Checkpoint(self.folder, self.setting).fingerprint())
        digest = hashlib.sha256(stored_weights(self.folder, self.setting).fingerprint().encode())
        for name in DESCRIPTIONS:
            if (self.folder / name).exists():
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def over(self, base: Path) -> Source:
        """An adapter or a delta as a difference from the base. Raises RecipeError where it does not fit."""
        source = open_source(self.folder, base, self.path, self.setting)
        check_source(Checkpoint(base), source)
        return source

    def refuse(self, base: "BaseInputs") -> None:
        """Raises RecipeError, before anything is trained, for what cannot be judged, and for the base itself."""
        if not self.whole:
            decode = base.recipe.decode
            if isinstance(decode, DExperts | GeDi):
                raise RecipeError(
                    f"{self.setting}: {self.path!r} changes the small model, and {decode.kind} takes what its own trainings left; "
                    "leave it out"
                )
            if base.recipe.teach is None and base.untaught.is_dir():  # else the base is still to be made
                self.over(base.untaught)
            return
        local_folder(ModelSettings(path=self.path, revision=self.revision), self.setting)
        weights = Checkpoint(self.folder, self.setting).fingerprint()
        if base.untaught.is_dir() and weights == Checkpoint(base.untaught).fingerprint():
            which = "the base itself" if base.recipe.teach is None else "the model before it is taught (`untaught`)"
            raise RecipeError(f"{self.setting}: {self.path!r} has the weights of {which}; give another model")
        if base.folder.is_dir() and weights == base.weights:
            raise RecipeError(f"{self.setting}: {self.path!r} has the weights of the base itself; give another model")
