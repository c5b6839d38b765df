"""What a recipe brings: its base model, its rows, the items it is judged by. Each is read when first asked for."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from spunge.data.halves import halved
from spunge.data.items import Items, read_items, refuse_shared_subjects
from spunge.data.samples import Samples
from spunge.data.selection import Selection, select_decoupled, select_lesson, select_retain, without_forgotten
from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError, suggestion
from spunge.files import checksum, fingerprint
from spunge.model.conversion import Conversion, conversion
from spunge.model.hub import local_folder
from spunge.model.layered import base_folder
from spunge.model.loading import load_tokenizer
from spunge.recipe.calibration import calibrated_by
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name, measured_again
from spunge.recipe.model import Dtype, ModelSettings
from spunge.recipe.schema import Recipe
from spunge.recipe.training import MethodSettings
from spunge.registry import EVALUATORS
from spunge.run.given import Given
from spunge.run.named import judges
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.folder import description, description_sha256
from spunge.weights.rounding import main_dtype


class BaseInputs:
    """The base model and the items that it and its descendants are judged by: the same for every seed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """`folder`: the run's, where a model of pickled or quantised weights is converted to (RUN/base) and one that is taught
        is written (RUN/taught), beside one that is to compare with (RUN/reference)."""
        self.recipe = recipe
        self.converted = folder / "base"
        self.taught = folder / "taught"
        self.retrained = folder / "reference"

    @cached_property
    def given(self) -> Path:
        """The model's folder as the recipe names it, downloaded where it is a Hub id."""
        return base_folder(self.recipe.model)

    @property
    def local(self) -> bool:
        """Whether the model is here already: a Hub id may be still to be downloaded."""
        path = self.recipe.model.path
        return "given" in vars(self) or os.path.isdir(os.path.expanduser(path)) or path.startswith((".", "/", "~"))

    @cached_property
    def conversion(self) -> Conversion | None:
        """What is to be converted, where the weights are pickled or quantised."""
        return conversion(self.given)

    @cached_property
    def unconverted(self) -> str:
        """Fingerprint of the files that the base is converted from."""
        if self.conversion is None:
            return fingerprint([])
        beside = description_sha256(self.given)
        return fingerprint([*([file.name, checksum(file)] for file in self.conversion.files), beside])

    @property
    def untaught(self) -> Path:
        """The folder of the given model with safetensors weights. What is no value of a weight is the same in the base."""
        return self.converted if self.conversion else self.given

    @property
    def folder(self) -> Path:
        """The folder of the base: the given model, or what comes of teaching it."""
        return self.untaught if self.recipe.teach is None else self.taught

    @cached_property
    def tokenizer(self) -> Any:
        """The given model's. Raises RecipeError where there is none that can be read."""
        return load_tokenizer(self.recipe.model, self.given)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the base's weights."""
        return Checkpoint(self.folder).fingerprint()

    @property
    def known_weights(self) -> str | None:
        """The fingerprint of the base's weights, where it was asked for."""
        return vars(self).get("weights")

    @cached_property
    def key(self) -> str:
        """Of everything in the base that results depend on."""
        return self.key_of(self.folder, self.weights)

    def key_of(self, folder: Path, weights: str | None = None) -> str:
        """Of everything in a model that results depend on: weights, configuration, tokenizer, code, arithmetic. weights: their
        fingerprint, where it is known."""
        digest = hashlib.sha256((weights or Checkpoint(folder).fingerprint()).encode())
        for each in description(folder):
            digest.update(each)
        digest.update(self.recipe.model.dtype.encode())
        if self.recipe.model.template:
            digest.update(fingerprint(self.recipe.model.template).encode())
        return digest.hexdigest()

    @cached_property
    def large(self) -> Path:
        """The folder of the model that is shifted while it decodes. Raises RecipeError where the recipe names none that can be
        loaded as it is."""
        decode = self.recipe.decode
        if decode is None:
            raise RecipeError("decode: missing; nothing is shifted without it")
        folder = local_folder(
            self.recipe.model.model_copy(update={"path": decode.path, "revision": decode.revision}), "decode.path"
        )
        if conversion(folder) is not None:
            raise RecipeError(
                f"decode.path: {decode.path!r} has weights that are pickled or quantised; give a plain checkpoint (spunge merge "
                "converts one)"
            )
        return folder

    @property
    def large_here(self) -> bool:
        """Whether nothing of it is to be downloaded any more."""
        decode = self.recipe.decode
        return decode is not None and ("large" in vars(self) or os.path.isdir(os.path.expanduser(decode.path)))

    @cached_property
    def large_key(self) -> str:
        """Of everything in the large model that results depend on."""
        return self.key_of(self.large)

    @property
    def large_settings(self) -> ModelSettings:
        """How the large model is loaded: as the recipe's, and in float32 where it is written in it."""
        model = self.recipe.model.model_copy(update={"path": str(self.large), "revision": None, "train_in": None})
        wide = main_dtype(Checkpoint(self.large, "decode.path")).itemsize > 2
        return model.model_copy(update={"dtype": "float32"}) if wide and model.dtype == "auto" else model

    @cached_property
    def lesson(self) -> Selection | None:
        """The rows that are taught before all else."""
        return select_lesson(self.recipe)

    def own_dtype(self, dtype: Dtype) -> Dtype:
        """What a model is written in, as told of the given model: `base` is what the taught one is written in."""
        return dtype if dtype != "base" or self.recipe.teach is None else self.recipe.teach.dtype

    @cached_property
    def given_reference(self) -> Given | None:
        """A reference that exists."""
        asked = self.recipe.reference
        return None if asked is None or asked.path is None else Given(asked.path, asked.revision, "reference.path")

    @cached_property
    def judged_models(self) -> dict[str, Given]:
        """Name -> model that is judged as it is."""
        return {
            model.name: Given(model.path, model.revision, f"judge.{place}.path")
            for place, model in enumerate(self.recipe.judge or ())
        }

    @property
    def judged(self) -> ModelSettings:
        """How the models are loaded to be judged: unpacked, whatever they are trained in. What is written in float32 is judged in
        it, as it will be loaded: fewer bits would round away what the file holds. A dtype that the recipe names is kept."""
        model = self.recipe.model.model_copy(update={"train_in": None})
        return model.model_copy(update={"dtype": "float32"}) if self.wide and model.dtype == "auto" else model

    @property
    def trained(self) -> ModelSettings:
        """How the base is loaded to be trained: on one device."""
        return self.recipe.model.model_copy(update={"device_map": None})

    @property
    def wide(self) -> bool:
        """Whether some model is written in float32."""
        merges = [self.recipe.merge, *(control.merge for control in self.recipe.controls)]
        dtypes = {self.own_dtype(merge.dtype) for merge in merges if merge is not None}
        own = [(self.untaught, "model.path")] if "base" in dtypes and self.untaught.is_dir() else []
        given = [*self.judged_models.values(), *([self.given_reference] if self.given_reference else [])]
        others = [(each.folder, each.setting) for each in given if each.here and each.whole]
        checkpoints = (Checkpoint(folder, setting) for folder, setting in (*own, *others))
        return "float32" in dtypes or any(main_dtype(checkpoint).itemsize > 2 for checkpoint in checkpoints)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the model and how it is judged."""
        packed = self.recipe.model.train_in
        told = []
        if packed is not None:
            told.append(
                f"model.train_in: {packed}: for the training alone; merged and judged are the weights as they are"
            )
        if not self.wide or self.recipe.model.dtype != "bfloat16":
            return told
        return [
            *told,
            "model.dtype: bfloat16: models that are written in float32 are judged rounded to bfloat16; leave model.dtype out to "
            "judge them as they are",
        ]

    @cached_property
    def parts(self) -> Parts:
        """The rows to forget as the first seed draws them."""
        return split_rows(self.recipe)

    @cached_property
    def evaluations(self) -> list[Items]:
        """The recipe's evaluations with their rows, in its order."""
        read: dict[str, Items] = {}
        entries = self.recipe.evaluate
        # Those that measure another one again come after it, whatever the recipe's order.
        for index, entry in sorted(enumerate(entries), key=lambda pair: measured_again(pair[1]) is not None):
            read[evaluation_name(entry)] = self._items(entry, f"evaluate.{index}", read)
        ordered = [read[evaluation_name(entry)] for entry in entries]
        refuse_shared_subjects([items for items in ordered if measured_again(items.settings) is None])
        return ordered

    def _items(self, entry: EvaluatorSettings, setting: str, earlier: Mapping[str, Items]) -> Items:
        evaluator = EVALUATORS.get(entry.kind)
        of = measured_again(entry)
        if of is not None:
            return replace(earlier[of], name=evaluation_name(entry), settings=entry)
        if not evaluator.reads_rows:
            return Items(evaluation_name(entry), entry, pa.table({}), {}, "")
        if evaluation_name(entry) in self._chosen_by:
            return self._halves[evaluation_name(entry)][1]
        return self._whole_items(entry, setting)

    def _whole_items(self, entry: EvaluatorSettings, setting: str) -> Items:
        evaluator = EVALUATORS.get(entry.kind)
        columns = evaluator.columns(entry, self.recipe.columns)
        items = read_items(self.recipe, entry, columns, setting, evaluator.others(entry), self.parts)
        if entry.half is None:
            return items
        validation, test = halved(items, 0, f"{setting}.half")
        return validation if entry.half == "validation" else test

    @property
    def _chosen_by(self) -> dict[str, str]:
        """The evaluations by which something is chosen before the judging -> the block that names them first."""
        calibrate, watch = self.recipe.calibrate, self.recipe.watch
        named = dict.fromkeys(calibrated_by(calibrate, self.recipe.aggregates), "calibrate")
        chosen = (
            {} if watch is None or not watch.chooses else {name: block for block, name in watch.evaluations.items()}
        )
        return {**chosen, **named}

    @cached_property
    def _halves(self) -> dict[str, tuple[Items, Items]]:
        """Of each evaluation that something is chosen by: the items for that, and those that are judged."""
        halves, calibrate = {}, self.recipe.calibrate
        for place, entry in enumerate(self.recipe.evaluate):
            name = evaluation_name(entry)
            if (block := self._chosen_by.get(name)) is None:
                continue
            items = self._whole_items(entry, f"evaluate.{place}")
            if calibrate is not None and block == "calibrate" and calibrate.aggregate is None:
                _refuse_calibrated(items, calibrate.subject)
            seed = calibrate.seed if calibrate is not None and block == "calibrate" else 0
            halves[name] = halved(items, seed, f"{block}.evaluation")
        return halves

    @property
    def calibration_items(self) -> tuple[Items, ...]:
        """Those that scales are calibrated by, of each evaluation that it is done by."""
        names = calibrated_by(self.recipe.calibrate, self.recipe.aggregates)
        return tuple(self._halves[name][0] for name in names)

    def watched_items(self, evaluation: str) -> Items:
        """What trainings are measured by on their way: of an evaluation by which a step is chosen, the half that is not judged."""
        if self.recipe.watch is not None and self.recipe.watch.chooses:
            return self._halves[evaluation][0]
        return next(items for items in self.evaluations if items.name == evaluation)

    @cached_property
    def instruments(self) -> dict[str, dict[str, Any] | None]:
        """Evaluation -> what it measures with beyond its settings, such as a scorer and its revision."""
        told = {}
        for items in self.evaluations:
            tell = EVALUATORS.get(items.settings.kind).instrument
            told[items.name] = None if tell is None else tell(items.settings)
        return told

    def judged_at(self, stage: str) -> list[Items]:
        """The evaluations that a model is judged by."""
        return [items for items in self.evaluations if judges(items.settings, stage)]


class SeedInputs:
    """The rows to forget, in parts, and those to retain, as one seed draws them."""

    def __init__(self, recipe: Recipe, base: BaseInputs) -> None:
        self.recipe = recipe
        self.base = base

    @property
    def unlearn(self) -> MethodSettings:
        """The method's settings, of a recipe that unlearns."""
        if self.recipe.unlearn is None:
            raise RecipeError("unlearn: missing; the recipe must give it")
        return self.recipe.unlearn

    @cached_property
    def parts(self) -> Parts:
        return self.base.parts if self.recipe.seed == self.base.recipe.seed else split_rows(self.recipe)

    @cached_property
    def retained(self) -> Selection | None:
        return select_retain(self.recipe, self.parts)

    @cached_property
    def decoupled(self) -> Selection | None:
        """The rows of the prompt-decouple term."""
        return select_decoupled(self.recipe, self.parts)

    @property
    def decouple(self) -> Samples | None:
        return self.decoupled.samples if self.decoupled else None

    @property
    def retain(self) -> Samples | None:
        return self.retained.samples if self.retained else None

    @cached_property
    def reference(self) -> Selection | None:
        """What a reference that is made is taught: the taught rows without those to forget."""
        asked, lesson = self.recipe.reference, self.base.lesson
        if asked is None or asked.path is not None or lesson is None:
            return None
        return without_forgotten(lesson, self.parts, asked.minus)

    @property
    def notes(self) -> list[str]:
        """What a person should look at: rows that are left out, values that look like slips, rows to forget and to keep, rows that
        are not measured."""
        return [
            *self.parts.notes,
            *(self.retained.notes if self.retained else ()),
            *(self.decoupled.notes if self.decoupled else ()),
            *(self.base.lesson.notes if self.base.lesson else ()),
            *(self.reference.notes if self.reference else ()),
            *(items.note for items in self.base.evaluations if items.note and measured_again(items.settings) is None),
            *(self.base.notes if self.base.local else ()),
        ]


def _refuse_calibrated(items: Items, subject: str | None) -> None:
    """Raises RecipeError for a subject that scales cannot be calibrated by."""
    if subject is None and items.overall is None and len(items.subjects) > 1:
        raise RecipeError(
            f"calibrate.subject: missing, and {items.name!r} has several: {', '.join(items.subjects)}; name what must be kept"
        )
    if subject is not None and subject not in items.subjects:
        raise RecipeError(f"calibrate.subject: {items.name!r} has no {subject!r}{suggestion(subject, items.subjects)}")
