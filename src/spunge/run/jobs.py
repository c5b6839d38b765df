"""A recipe in its folder: which trainings there are, which models come of them, and what each depends on.

Every training and every model has a fingerprint of all it depends on (base weights, rows, settings, the method's
version). What a folder holds under that fingerprint is complete and is left alone.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from spunge.data.items import Items, read_items, refuse_shared_subjects
from spunge.data.samples import Samples
from spunge.data.selection import Selection, select_retain
from spunge.data.split import Part, Parts, random_parts, split_rows
from spunge.errors import RecipeError
from spunge.files import fingerprint, is_done, read_json, unwritable, write_text
from spunge.model.hub import local_folder, unpickled
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.recipe.schema import Control, EvaluatorSettings, Recipe, RuleSettings, evaluation_name
from spunge.registry import EVALUATORS, METHODS, RULES
from spunge.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Job:
    """A training: the unlearning of one part, or of several at once."""

    title: str  # branch:SLUG, control:joint, control:random/random-1 ...
    folder: Path
    parts: tuple[Part, ...]
    after: "Job | None" = None  # it starts from the model that this one left, not from the base


@dataclass(frozen=True)
class Model:
    """What is judged as one stage: the base with the deltas of some jobs, merged by a rule or laid one over the other."""

    jobs: tuple[Job, ...] = ()
    merge: RuleSettings | None = None


class Run:
    """A recipe in its folder. `base_scores`: the folder of a run whose scores of the base serve here too."""

    def __init__(self, recipe: Recipe, folder: Path, base_scores: Path | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self._base_scores = base_scores or folder

    @cached_property
    def parts(self) -> Parts:
        return split_rows(self.recipe)

    @cached_property
    def retained(self) -> Selection | None:
        return select_retain(self.recipe, self.parts)

    @property
    def retain(self) -> Samples | None:
        return self.retained.samples if self.retained else None

    @cached_property
    def base_folder(self) -> Path:
        return unpickled(local_folder(self.recipe.model), self.folder / "base", self.recipe.model)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the base's weights."""
        return Checkpoint(self.base_folder).fingerprint()

    @cached_property
    def base_key(self) -> str:
        """Of everything in the base that results depend on: weights, configuration, tokenizer, arithmetic."""
        digest = hashlib.sha256(self.weights.encode())
        for pattern in ("config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja"):
            for file in sorted(self.base_folder.glob(pattern)):
                digest.update(file.name.encode() + file.read_bytes())
        digest.update(self.recipe.model.dtype.encode())
        return digest.hexdigest()

    @cached_property
    def branches(self) -> list[Job]:
        parts = self.parts.parts
        return [Job(f"branch:{part.slug}", self.folder / "branches" / part.slug, (part,)) for part in parts]

    @cached_property
    def joint(self) -> Job:
        """All parts at once."""
        return Job("control:joint", self.folder / "controls" / "joint", self.parts.parts)

    @cached_property
    def random(self) -> list[Job]:
        """Branches of a random split."""
        folder = self.folder / "controls" / "random"
        parts = random_parts(self.parts.parts, self.recipe.seed)
        return [Job(f"control:random/{part.slug}", folder / part.slug, (part,)) for part in parts]

    @cached_property
    def sequence(self) -> list[Job]:
        """One part after the other."""
        if self.recipe.unlearn.method == "precomputed":
            raise RecipeError("controls: precomputed branches all start from the base; leave `sequential` out")
        links: list[Job] = []
        for part in self.parts.parts:
            folder = self.folder / "controls" / "sequential" / part.slug
            links.append(Job(f"control:sequential/{part.slug}", folder, (part,), links[-1] if links else None))
        return links

    def jobs_of(self, control: Control) -> list[Job]:
        """The trainings that a control is made from."""
        by_kind = {
            "parts": lambda: self.branches,
            "joint": lambda: [self.joint],
            "random": lambda: self.random,
            "sequential": lambda: self.sequence,
        }
        return by_kind[control.train]()

    @cached_property
    def trainings(self) -> list[Job]:
        """Every training, in order: the branches first."""
        jobs = [*self.branches, *(job for control in self.recipe.controls for job in self.jobs_of(control))]
        return list({job.title: job for job in jobs}.values())

    @cached_property
    def models(self) -> dict[str, Model]:
        """Stage -> model, in the order of the results."""
        found = {"base": Model(), **{job.title: Model((job,)) for job in self.branches}}
        for control in self.recipe.controls:
            merge = self.recipe.merge if control.train == "random" and control.merge is None else control.merge
            found[f"control:{control.name}"] = Model(tuple(self.jobs_of(control)), merge)
        found["merged"] = Model(tuple(self.branches), self.recipe.merge)
        return found

    def key(self, job: Job) -> str:
        """Fingerprint of all that the job's delta depends on."""
        unlearn = self.recipe.unlearn
        content: dict[str, Any] = {
            "base": self.base_key,
            "unlearn": unlearn.model_dump(mode="json"),
            "version": METHODS.version(unlearn.method),
            "parts": [[part.value, part.samples.sha256] for part in job.parts],
            "retain": self.retain.sha256 if self.retain else None,
            "seed": self.recipe.seed,
        }
        if job.after is not None:
            content["after"] = self.key(job.after)
        # A method may read files of its own: `inputs(settings, values of the job's parts, of all)` gives their content.
        if (inputs := getattr(METHODS.get(unlearn.method), "inputs", None)) is not None:
            every = [part.value for part in self.parts.parts]
            content["inputs"] = inputs(unlearn, [part.value for part in job.parts], every)
        return fingerprint(content)

    def done(self, job: Job) -> bool:
        return is_done(job.folder, self.key(job))

    def model_key(self, stage: str) -> str:
        """Fingerprint of the model that is judged as a stage."""
        model = self.models[stage]
        if not model.jobs:
            return self.base_key
        keys = [self.key(job) for job in model.jobs]
        if model.merge is None:
            return keys[0] if len(keys) == 1 else fingerprint({"base": self.base_key, "sequence": keys})
        return fingerprint(
            {
                "base": self.base_key,
                "merge": model.merge.model_dump(mode="json"),
                "version": RULES.version(model.merge.rule),
                "branches": keys,
            }
        )

    @property
    def merged(self) -> bool:
        """Whether the merge is done already."""
        report = read_json(self.folder / "merge.json") or {}
        whole = (self.folder / "merged" / "config.json").exists()
        return whole and report.get("fingerprint") == self.model_key("merged")

    @cached_property
    def evaluations(self) -> list[Items]:
        found: dict[str, Items] = {}
        entries = self.recipe.evaluate
        # Those that measure another one again come after it, whatever the recipe's order.
        for place, entry in sorted(enumerate(entries), key=lambda pair: getattr(pair[1], "of", None) is not None):
            found[evaluation_name(entry)] = self._items(entry, f"evaluate.{place}", found)
        read = [found[evaluation_name(entry)] for entry in entries]
        refuse_shared_subjects([items for items in read if getattr(items.settings, "of", None) is None])
        return read

    def _items(self, entry: EvaluatorSettings, setting: str, earlier: Mapping[str, Items]) -> Items:
        evaluator = EVALUATORS.get(entry.kind)
        of = getattr(entry, "of", None)
        if of is not None:
            return replace(earlier[of], name=evaluation_name(entry), settings=entry)
        if not getattr(evaluator, "reads_rows", True):
            return Items(evaluation_name(entry), entry, pa.table({}), {}, "")
        return read_items(self.recipe, entry, evaluator.columns(entry, self.recipe.forget.columns), setting)

    def evaluation_folder(self, stage: str) -> Path:
        run = self._base_scores if stage == "base" else self.folder
        return run / "evaluation" / stage.replace(":", "-")

    def scores_file(self, stage: str, items: Items) -> Path:
        return self.evaluation_folder(stage) / f"{fingerprint(items.name)[:12]}.json"

    def scores_key(self, stage: str, items: Items) -> str:
        """Fingerprint of all that a stage's scores in an evaluation depend on."""
        return self._scores_key(self.model_key(stage), items)

    def _scores_key(self, model: str, items: Items) -> str:
        named = {"source", "name", "subject", "by", "where", "limit", "stages"}
        evaluator = EVALUATORS.get(items.settings.kind)
        content: dict[str, Any] = {
            "model": model,
            "settings": items.settings.model_dump(mode="json", exclude=named),
            "items": items.sha256,
            "version": EVALUATORS.version(items.settings.kind),
        }
        if hasattr(evaluator, "instrument"):
            content["instrument"] = self.instrument(items)
        if (of := getattr(items.settings, "of", None)) is not None:
            inner = next(other for other in self.evaluations if other.name == of)
            content["of"] = self._scores_key("", inner)
        if of is not None or getattr(evaluator, "uses_samples", False):
            content["rows"] = [[part.value, part.samples.sha256] for part in self.parts.parts]
            content["retain"] = self.retain.sha256 if self.retain else None
        return fingerprint(content)

    def instrument(self, items: Items) -> dict[str, Any] | None:
        """What an evaluation measures with beyond its settings, such as a scorer and its revision."""
        if items.name not in self._instruments:
            tell = getattr(EVALUATORS.get(items.settings.kind), "instrument", None)
            self._instruments[items.name] = None if tell is None else tell(items.settings)
        return self._instruments[items.name]

    @cached_property
    def _instruments(self) -> dict[str, dict[str, Any] | None]:
        return {}

    def judged_at(self, stage: str) -> list[Items]:
        """The evaluations that a stage is judged by."""
        return [
            items
            for items in self.evaluations
            if items.settings.stages is None or any(fnmatchcase(stage, pattern) for pattern in items.settings.stages)
        ]

    def unscored(self, stage: str) -> list[Items]:
        """The evaluations of a stage that are still to be done."""
        return [
            items
            for items in self.judged_at(stage)
            if (read_json(self.scores_file(stage, items)) or {}).get("fingerprint") != self.scores_key(stage, items)
        ]


def claim(work: Run) -> None:
    """Make the run's folder, or take up one of the same recipe. Raises RecipeError when it belongs to something else."""
    folder = work.folder
    existing = folder / "recipe.yaml"
    if existing.exists():
        try:
            other = identity(load_recipe(existing))
        except RecipeError:
            other = {}
        for setting, value in identity(work.recipe).items():
            if other.get(setting) != value:
                raise RecipeError(
                    f"--out: {str(folder)!r} was made by another recipe "
                    f"({setting} there: {other.get(setting)!r}, here: {value!r}); "
                    "give another folder"
                )
    elif folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise RecipeError(f"--out: {str(folder)!r} exists and is no run's folder; give another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
    except OSError as error:
        raise unwritable(folder / "recipe.yaml", error) from error
    if not existing.exists():
        write_text(existing, dump_recipe(work.recipe))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block, no other process can be in a block of the same run's folder. Raises RecipeError where one is."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"--out: another process is at work in {str(folder)!r}; wait for it, or give another folder"
        ) from None
    except NotImplementedError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two recipes the same run: the model, the forget rows' source and the attribute. The rest may change."""
    return {
        "model.path": recipe.model.path,
        "model.revision": recipe.model.revision,
        "forget.source": [source.path or source.hub for source in recipe.forget.source],
        "split.by": recipe.split.by if recipe.split else None,
    }
