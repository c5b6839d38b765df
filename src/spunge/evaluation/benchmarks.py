"""Public benchmarks by EleutherAI's lm-evaluation-harness (Gao et al. 2021), run as a library on the model in memory.

`preset: paper-10` are the ten of SPUNGE (Kadhe et al. 2024, arXiv 2406.11780) with its shots. Prompts, few-shot draws and
scores are the harness's own, those of its command line at its default seeds. Each task is a subject, and `average` is the
plain mean over tasks; a bootstrap draws from the items of all tasks together, which is close to drawing within each.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import io
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import BeforeValidator, Field, model_validator

from spunge.evaluation.evaluator import Bench, Measure
from spunge.folders import fingerprint, read_json, write_json, write_text
from spunge.models import Base
from spunge.recipe import EvaluatorSettings, Place, Strict
from spunge.registry import RecipeError, suggestion

METRIC = "benchmark accuracy"
AVERAGE = "average"
PRESETS = {
    "paper-10": {
        "arc_challenge": 25,
        "arc_easy": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "winogrande": 5,
        "gsm8k": 5,
        "mathqa": 5,
        "piqa": 5,
        "pubmedqa": 5,
        "truthfulqa_mc2": 0,
    }
}
PREFERRED = ("acc_norm", "acc", "exact_match")  # the metric of a task that has several
SHARES = ("acc", "exact_match")  # what metrics that are shares begin with
SEED = 1234  # of the harness's command line, for few-shot draws and sampling
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class Benchmark(Strict):
    task: str = Field(description="A task, group or tag of lm-evaluation-harness (`lm-eval ls tasks`).")
    shots: int | None = Field(None, ge=0, description="Examples before each question. Default: the task's own number.")
    limit: int | None = Field(None, ge=1, description="Questions, at most: the first ones. Default: the evaluation's.")
    metric: str | None = Field(
        None,
        description="The metric to report, or `metric,filter`. Default: acc_norm, else acc, else exact_match, else its first.",
    )


def _listed(value: Any) -> Any:
    return [{"task": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


Files = str | list[str]


class BenchmarksSettings(EvaluatorSettings):
    kind: Literal["lm_eval"] = "lm_eval"
    preset: Literal["paper-10"] | None = Field(None, description="paper-10: the ten benchmarks of SPUNGE's paper.")
    tasks: Annotated[list[Benchmark], BeforeValidator(_listed)] = Field(
        default_factory=list,
        description="Names, or {task, shots, limit, metric}; with a preset they are added to it, or replace its own.",
    )
    files: Annotated[dict[str, Files | dict[str, Files]], Place("file")] = Field(
        default_factory=dict,
        description="{task: file} or {task: {split: file}}: read a task's questions from local files in its own fields.",
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="{task: {key: value}}: laid over the task's configuration in the harness.",
    )
    include_path: Annotated[list[str], Place("file")] = Field(
        default_factory=list, description="Folders with task YAMLs of your own."
    )
    limit: int | None = Field(None, ge=1, description="Questions of each task, at most: the first ones, as `--limit`.")
    batch_size: int | Literal["auto"] = Field(8, description="Texts of a batch; auto: as many as the memory takes.")
    log_samples: bool = Field(
        False, description="Keep every prompt and answer in the stage's folder, samples-TASK.jsonl."
    )

    @model_validator(mode="after")
    def _names_tasks(self) -> "BenchmarksSettings":
        for key in ("source", "where", "by"):
            if getattr(self, key) is not None:
                raise RecipeError(f"evaluate.{key}: lm_eval brings its own questions; leave {key} out (see files)")
        names = [entry.task for entry in self.tasks]
        if not names and self.preset is None:
            raise RecipeError("evaluate.tasks: missing; give tasks, or preset: paper-10")
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"evaluate.tasks: {name!r} is named twice")
        return self

    @property
    def benchmarks(self) -> list[Benchmark]:
        """The preset's tasks and the recipe's own."""
        chosen = {task: Benchmark(task=task, shots=shots) for task, shots in PRESETS.get(self.preset or "", {}).items()}
        return list((chosen | {entry.task: entry for entry in self.tasks}).values())


class Leaf(NamedTuple):
    """A single task of the harness, and what is laid over its configuration."""

    name: str
    changes: dict[str, Any]


class Outcome(NamedTuple):
    """What a subject's items gave, as a ratio of sums."""

    subject: str
    metric: str  # the harness's name of it
    numerator: list[float]
    denominator: list[float]
    higher_is_better: bool
    transform: Literal["none", "exp"]
    chance: float | None

    @property
    def is_share(self) -> bool:
        return self.metric.startswith(SHARES)


class Benchmarks:
    """Tasks of lm-evaluation-harness: accuracy of each, and its plain mean over them."""

    Settings: ClassVar[type[EvaluatorSettings]] = BenchmarksSettings
    version: ClassVar[int] = 1
    reads_rows: ClassVar[bool] = False

    @staticmethod
    def columns(settings: BenchmarksSettings, forget: Mapping[str, str]) -> dict[str, str]:
        return {}

    @staticmethod
    def instrument(settings: BenchmarksSettings) -> dict[str, Any]:
        """Version, tasks with their shots, limit, and the content of local files. Nothing is loaded."""
        content: dict[str, Any] = {
            "lm_eval": installed(),
            "tasks": {entry.task: entry.shots for entry in settings.benchmarks},
            "limit": settings.limit,
        }
        if local := local_files(settings):
            content["files"] = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in local}
        return content | ({"subject": settings.subject} if settings.subject else {})

    @staticmethod
    def measure(base: Base, settings: BenchmarksSettings, items: pa.Table, bench: Bench) -> list[Measure]:
        instrument = Benchmarks.instrument(settings)
        found: list[Outcome] = []
        for number, entry in enumerate(settings.benchmarks):
            found += outcomes(base, entry, settings, instrument, bench)
            bench.progress(number + 1, len(settings.benchmarks))
        subjects = [outcome.subject for outcome in found]
        for subject in subjects:
            if subjects.count(subject) > 1:
                raise RecipeError(f"evaluate.tasks: {subject!r} is measured twice: as a task and in a group or tag")
        measures = [measure_of(outcome) for outcome in found]
        shares = [outcome for outcome in found if outcome.is_share]
        return [*measures, average(shares, settings.subject or AVERAGE)] if shares else measures


def installed() -> str:
    """The harness's version. Raises RecipeError where it is missing."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise RecipeError("evaluate.kind: lm_eval needs lm-evaluation-harness; pip install 'spunge[judge]'") from None


def measure_of(outcome: Outcome) -> Measure:
    return Measure(
        METRIC if outcome.is_share else outcome.metric,
        np.array(outcome.numerator, dtype=np.float64),
        np.array(outcome.denominator, dtype=np.float64),
        higher_is_better=outcome.higher_is_better,
        transform=outcome.transform,
        subject=outcome.subject,
        chance=outcome.chance,
    )


def average(found: Sequence[Outcome], subject: str) -> Measure:
    """The plain mean over tasks, as a mean over all their items: an item weighs N / (T n), n the items of its task."""
    numerator = evened([outcome.numerator for outcome in found])
    chances = [outcome.chance for outcome in found if outcome.chance is not None]
    chance = float(np.mean(chances)) if len(chances) == len(found) else None
    return Measure(METRIC, numerator, np.ones(len(numerator)), higher_is_better=True, subject=subject, chance=chance)


def evened(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Each list's scores, weighted so that their mean is the plain mean of the lists' means: (N,)."""
    total = sum(map(len, scores))
    weighed = [np.asarray(each, dtype=np.float64) * (total / (len(scores) * len(each))) for each in scores]
    return np.concatenate(weighed)


def outcomes(
    base: Base, entry: Benchmark, settings: BenchmarksSettings, instrument: Mapping[str, Any], bench: Bench
) -> list[Outcome]:
    """One benchmark's outcomes. They are kept, so that a killed run goes on with the next one."""
    own = [entry.task, *(name for name in (*settings.files, *settings.overrides) if name != entry.task)]
    key = {
        "model": bench.model,
        "entry": entry.model_dump(mode="json"),
        "changes": {name: [settings.files.get(name), settings.overrides.get(name)] for name in own},
        "include_path": settings.include_path,
        "instrument": {name: value for name, value in instrument.items() if name not in ("tasks", "subject")},
        "batch_size": settings.batch_size,
        "version": Benchmarks.version,
        "log_samples": settings.log_samples,
    }
    file = bench.folder / f"lm_eval-{fingerprint(key)[:16]}.json"
    kept = read_json(file)
    if kept is not None:
        return [Outcome(**outcome) for outcome in kept]
    found = run(base, entry, settings, bench)
    write_json(file, [outcome._asdict() for outcome in found])
    return found


def run(base: Base, entry: Benchmark, settings: BenchmarksSettings, bench: Bench) -> list[Outcome]:
    """Ask the model a benchmark's questions."""
    with quiet(), seeded(base):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        manager = manager_of(settings)
        leaves = leaves_of(entry, settings, manager.task_index)
        tasks = loaded(manager, entry, leaves)
        # The harness sets the padding of the tokenizer that it is given.
        model = HFLM(pretrained=base.model, tokenizer=copy.deepcopy(base.tokenizer), batch_size=settings.batch_size)
        limit = entry.limit or settings.limit
        found = lm_eval.evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    if settings.log_samples:
        for name in tasks:
            lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples[name]]
            write_text(bench.folder / f"samples-{name.replace('/', '_')}.jsonl", "".join(lines))
    return summed(entry, manager.task_index[entry.task], tasks, samples)


def summed(entry: Benchmark, listed: Any, tasks: Mapping[str, Any], samples: Mapping[str, Any]) -> list[Outcome]:
    """The outcome of each of a benchmark's tasks, or the one of a group that says how it is summed up."""
    rules = (listed.cfg or {}).get("aggregate_metric_list") if listed.kind.name == "GROUP" else None
    rule = (rules[0] if isinstance(rules, list) else rules) or {}
    metric = entry.metric or rule.get("metric")
    found = [outcome(name, task, samples[name], metric) for name, task in tasks.items()]
    if not rule:
        return found
    if any(each.transform != "none" or set(each.denominator) != {1.0} for each in found):
        raise RecipeError(f"evaluate.tasks: the group {entry.task!r} has no mean over its questions; name its tasks")
    scores = [each.numerator for each in found]
    joined = np.concatenate(scores) if rule.get("weight_by_size", True) else evened(scores)
    chances = [each.chance for each in found]
    weights = [len(each) for each in scores] if rule.get("weight_by_size", True) else None
    chance = None if None in chances else float(np.average(np.array(chances, dtype=np.float64), weights=weights))
    first = found[0]
    return [
        first._replace(subject=entry.task, numerator=joined.tolist(), denominator=[1.0] * len(joined), chance=chance)
    ]


def outcome(name: str, task: Any, samples: Sequence[Mapping[str, Any]], metric: str | None) -> Outcome:
    """A task's items under one metric. Raises RecipeError where the metric is not a ratio of sums over items."""
    aggregations: dict[str, Any] = task.aggregation()
    wanted, _, filtered = (metric or "").partition(",")
    chosen = wanted or next((each for each in PREFERRED if each in aggregations), next(iter(aggregations)))
    if chosen not in aggregations:
        raise RecipeError(f"evaluate.tasks.metric: {name!r} has no metric {chosen!r}{suggestion(chosen, aggregations)}")
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    if filtered and filtered not in filters:
        raise RecipeError(f"evaluate.tasks.metric: {name!r} has no filter {filtered!r}{suggestion(filtered, filters)}")
    mine = [sample for sample in samples if sample["filter"] == (filtered or filters[0])]
    values = [sample[chosen] for sample in mine]
    kind = getattr(aggregations[chosen], "__name__", "")
    found = terms(kind, values)
    if found is None:
        raise RecipeError(
            f"evaluate.tasks.metric: {name!r}: its {chosen!r} is no mean over items ({kind}); name another"
        )
    higher = bool(task.higher_is_better().get(chosen, True))
    transform: Literal["none", "exp"] = "exp" if kind in ("perplexity", "weighted_perplexity") else "none"
    return Outcome(name, chosen, *found, higher, transform, guessing(task, chosen, mine))


def terms(kind: str, values: Sequence[Any]) -> tuple[list[float], list[float]] | None:
    """Numerators and denominators of the harness's aggregation called `kind`; None where it is no ratio of sums."""
    if kind in ("mean", "nanmean"):
        return [float(value) for value in values], [1.0] * len(values)
    if kind == "perplexity":
        return [-float(value) for value in values], [1.0] * len(values)
    if kind in ("weighted_perplexity", "bits_per_byte"):
        unit = math.log(2) if kind == "bits_per_byte" else 1.0
        return [-float(log) / unit for log, _ in values], [float(size) for _, size in values]
    return None


def guessing(task: Any, metric: str, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The share that guessing gets right, where the candidates are all that a question's texts are."""
    config = task.config
    if config.output_type != "multiple_choice" or callable(config.process_results):
        return None
    if metric not in ("acc", "acc_norm", "acc_bytes") or any(isinstance(sample["target"], list) for sample in samples):
        return None
    return float(np.mean([1 / len(sample["filtered_resps"]) for sample in samples]))


# ---- the harness's tasks


def manager_of(settings: BenchmarksSettings) -> Any:
    """The harness's index of the tasks that are asked for, and of all where they need that.

    All take it ten seconds and more to read, the folders that define the names alone less than one.
    """
    for folder in settings.include_path:
        if not Path(folder).is_dir():
            raise RecipeError(f"evaluate.include_path: no folder {folder!r}")
    own, names = tuple(settings.include_path), [entry.task for entry in settings.benchmarks]
    narrow = task_manager(own, tuple(defining(names)))
    return narrow if all(is_whole(name, narrow.task_index) for name in names) else task_manager(own, None)


@functools.lru_cache(maxsize=4)
def task_manager(own: tuple[str, ...], folders: tuple[str, ...] | None) -> Any:
    """Index the given folders of the harness (None: all) and one's own, which come last and win."""
    from lm_eval.tasks import TaskManager

    # In the harness's own index the first of two equal names wins, between folders the last.
    return TaskManager(include_path=[*reversed(folders or ()), *own] or None, include_defaults=folders is None)


def defining(names: Sequence[str]) -> list[str]:
    """The harness's folders that define a task or a group of one of the names."""
    import lm_eval

    wanted = "|".join(map(re.escape, names))
    pattern = re.compile(rf"""^["']?(?:task|group)["']?\s*:\s*["']?(?:{wanted})["']?\s*$""".encode(), re.MULTILINE)
    folders = sorted(folder for folder in (Path(lm_eval.__file__).parent / "tasks").iterdir() if folder.is_dir())
    return [str(folder) for folder in folders if any(pattern.search(f.read_bytes()) for f in folder.rglob("*.yaml"))]


def is_whole(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the index holds all of a task or group. A tag's tasks may lie anywhere."""
    if name not in index or index[name].kind.name == "TAG":
        return False
    if index[name].kind.name != "GROUP":
        return True
    return all(isinstance(member, str) and is_whole(member, index) for member in _listed_members(index[name].cfg))


def _listed_members(group: Mapping[str, Any]) -> list[Any]:
    return group["task"] if isinstance(group["task"], list) else [group["task"]]


def leaves_of(entry: Benchmark, settings: BenchmarksSettings, index: Mapping[str, Any]) -> list[Leaf]:
    """A benchmark's single tasks with their changes. Raises RecipeError for names that nobody has."""
    if entry.task not in index:
        near = difflib.get_close_matches(entry.task, list(index), n=1)
        raise RecipeError(f"evaluate.tasks: lm_eval has no task {entry.task!r}{suggestion(entry.task, near)}")
    known = {name for other in settings.benchmarks for name in _names(other.task, index)}
    for key, given in (("files", settings.files), ("overrides", settings.overrides)):
        for name in given:
            if name not in known:
                raise RecipeError(f"evaluate.{key}: {name!r} is none of the tasks{suggestion(name, sorted(known))}")
    shots = {} if entry.shots is None else {"num_fewshot": entry.shots}
    found = []
    for leaf in _members(entry.task, index):
        changes = {**leaf.changes, **shots}
        for name in dict.fromkeys((entry.task, leaf.name)):
            config = {**(index[leaf.name].cfg or {}), **changes}
            changes |= laid_over(leaf.name, config, settings.files.get(name), settings.overrides.get(name, {}))
        found.append(Leaf(leaf.name, changes))
    return found


def _names(name: str, index: Mapping[str, Any]) -> list[str]:
    return [name, *(leaf.name for leaf in _members(name, index))] if name in index else [name]


def _members(name: str, index: Mapping[str, Any]) -> list[Leaf]:
    """The single tasks of a task, group or tag, with what their groups lay over them."""
    listed = index[name]
    if listed.kind.name == "TAG":
        return [Leaf(task, {}) for task in sorted(listed.tags)]
    if listed.kind.name != "GROUP":
        return [Leaf(name, {})]
    return _inside(listed.cfg, index)


GROUP_KEYS = ("group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata", "include", "version")


def _inside(group: Mapping[str, Any], index: Mapping[str, Any]) -> list[Leaf]:
    common = {key: value for key, value in group.items() if key not in GROUP_KEYS}
    found = []
    for member in _listed_members(group):
        content = {"task": member} if isinstance(member, str) else dict(member)
        if isinstance(content["task"], list):
            inner = _inside(content, index)
        elif content["task"] in index:
            own = {key: value for key, value in content.items() if key not in GROUP_KEYS}
            inner = [Leaf(leaf.name, {**leaf.changes, **own}) for leaf in _members(content["task"], index)]
        else:
            raise RecipeError(f"evaluate.tasks: a group's member {content['task']!r} is no task; name its tasks")
        found += [Leaf(leaf.name, {**common, **leaf.changes}) for leaf in inner]
    return found


def laid_over(
    name: str, config: Mapping[str, Any], files: "Files | dict[str, Files] | None", overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Overrides of a task's configuration, with those that reading its questions from local files needs."""
    options = dict(overrides.get("dataset_kwargs") or {})
    reader = overrides.get("dataset_path")
    if files is None and reader in READERS.values():
        files = options.pop("data_files", None)
    if files is None:
        return dict(overrides)
    asked = config.get("test_split") or config.get("validation_split") or "test"
    by_split = files if isinstance(files, dict) else {asked: files}
    if asked not in by_split:
        if config.get("validation_split") not in by_split:
            raise RecipeError(f"evaluate.files: {name!r} asks what is in its split {asked!r}; name a file for it")
        asked = config["validation_split"]
    first = next(iter(by_split.values()))
    suffix = Path(first if isinstance(first, str) else first[0]).suffix
    changes: dict[str, Any] = {
        "dataset_path": reader or READERS.get(suffix, "json"),
        "dataset_name": None,
        "dataset_kwargs": {**options, "data_files": by_split},
        **{key: config[key] if config.get(key) in by_split else None for key in SPLITS},
        "test_split": asked,
        "validation_split": None,
    }
    examples = config.get("fewshot_config") or {}
    if config.get("num_fewshot") and not (
        changes["training_split"] or changes["fewshot_split"] or "samples" in examples
    ):
        changes["fewshot_split"] = asked  # the harness leaves the question itself out then
    return changes | {key: value for key, value in overrides.items() if key not in ("dataset_path", "dataset_kwargs")}


def loaded(manager: Any, entry: Benchmark, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The tasks by name, with their data. Raises RecipeError where these cannot be had."""
    # Inside a group, changes are laid over a task that the harness knows; outside they would be all of it.
    members = [{"task": leaf.name, **leaf.changes} for leaf in leaves]
    try:
        tasks: dict[str, Any] = manager.load([{"group": "spunge", "task": members}])["tasks"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(
            f"evaluate.tasks: {entry.task!r} could not be loaded ({reason}); offline, give its questions by files"
        ) from error
    for task in tasks.values():
        if entry.shots is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", entry.shots or 0)
        task.set_fewshot_seed(SEED)
    return tasks


def local_files(settings: BenchmarksSettings) -> list[Path]:
    """All local files that the outcome depends on. Raises RecipeError for a missing one."""
    given = list(settings.files.values())
    given += [(over.get("dataset_kwargs") or {}).get("data_files", []) for over in settings.overrides.values()]
    named = [
        file
        for each in given
        for part in (each.values() if isinstance(each, dict) else [each])
        for file in ([part] if isinstance(part, str) else part)
    ]
    for file in named:
        if "://" not in file and not any(mark in file for mark in "*?[") and not Path(file).is_file():
            raise RecipeError(f"evaluate.files: no file {file!r}")
    folders = [Path(folder) for folder in settings.include_path]
    own = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in (".yaml", ".py")]
    return [*(Path(file) for file in dict.fromkeys(named) if Path(file).is_file()), *own]


# ---- its surroundings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the harness prints and draws is not shown; its errors are raised."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def seeded(base: Base) -> Iterator[None]:
    """The harness's own seeds inside, and every generator as it was after."""
    state, numbers, training = random.getstate(), np.random.get_state(), base.model.training
    try:
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
        base.model.train(training)
