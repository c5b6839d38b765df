"""Public benchmarks by EleutherAI's lm-evaluation-harness (Gao et al. 2021), run as a library on the model in memory.

`preset: paper-10` are the ten of SPUNGE (Kadhe et al. 2024, arXiv 2406.11780) with its shots. Prompts, few-shot draws and
scores are the harness's own, those of its command line at its default seeds. Each task is a subject, and `average` is the
plain mean over tasks; a bootstrap draws from the items of all tasks together, which is close to drawing within each.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from spunge.data.naming import slug
from spunge.errors import RecipeError, suggestion
from spunge.evaluation import harness
from spunge.evaluation.evaluator import Bench, Evaluator, Measure
from spunge.evaluation.harness import Files, Leaf
from spunge.files import fingerprint, read_json, sealed, unsealed, write_json, write_text
from spunge.model.loading import Base
from spunge.recipe.block import Place, Strict
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.results import Higher

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


class BenchmarksSettings(EvaluatorSettings):
    kind: str = "lm_eval"
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
            if dict(self)[key] is not None:
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


class Outcome(NamedTuple):
    """What a subject's items gave, as a ratio of sums."""

    subject: str
    metric: str  # the harness's name of it
    numerator: list[float]
    denominator: list[float]
    higher: Higher
    transform: Literal["none", "exp"]
    chance: float | None

    @property
    def is_share(self) -> bool:
        return self.metric.startswith(SHARES)


def columns(settings: BenchmarksSettings, forget: Mapping[str, str]) -> dict[str, str]:
    return {}


def instrument_of(settings: BenchmarksSettings) -> dict[str, Any]:
    """Version, tasks with their shots, limit, and the content of local files. Nothing is loaded."""
    content: dict[str, Any] = {
        "lm_eval": harness.installed(),
        "tasks": {entry.task: entry.shots for entry in settings.benchmarks},
        "limit": settings.limit,
    }
    if local := harness.local_files(settings.files, settings.overrides, settings.include_path):
        content["files"] = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in local}
    return content | ({"subject": settings.subject} if settings.subject else {})


def measure(base: Base, settings: BenchmarksSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Tasks of lm-evaluation-harness: accuracy of each, and its plain mean over them."""
    described = instrument_of(settings)
    every: list[Outcome] = []
    for number, entry in enumerate(settings.benchmarks):
        every += outcomes(base, entry, settings, described, bench)
        bench.progress(number + 1, len(settings.benchmarks))
    subjects = [outcome.subject for outcome in every]
    for subject in subjects:
        if subjects.count(subject) > 1:
            raise RecipeError(f"evaluate.tasks: {subject!r} is measured twice: as a task and in a group or tag")
    measures = [measure_of(outcome) for outcome in every]
    shares = [outcome for outcome in every if outcome.is_share]
    return [*measures, average(shares, settings.subject or AVERAGE)] if shares else measures


def measure_of(outcome: Outcome) -> Measure:
    return Measure(
        METRIC if outcome.is_share else outcome.metric,
        np.array(outcome.numerator, dtype=np.float64),
        np.array(outcome.denominator, dtype=np.float64),
        higher=outcome.higher,
        transform=outcome.transform,
        subject=outcome.subject,
        chance=outcome.chance,
    )


def average(parts: Sequence[Outcome], subject: str) -> Measure:
    """The plain mean over tasks, as a mean over all their items: an item weighs N / (T n), n the items of its task."""
    numerator = evened([outcome.numerator for outcome in parts])
    chances = [outcome.chance for outcome in parts if outcome.chance is not None]
    chance = float(np.mean(chances)) if len(chances) == len(parts) else None
    return Measure(METRIC, numerator, np.ones(len(numerator)), higher="known", subject=subject, chance=chance)


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
        "version": BENCHMARKS.version,
        "log_samples": settings.log_samples,
    }
    file = bench.folder / f"lm_eval-{fingerprint(key)[:16]}.json"
    bench.kept.add(file)
    kept = unsealed(read_json(file))
    if kept is not None and all((bench.folder / name).is_file() for name in kept["samples"]):
        bench.kept.update(bench.folder / name for name in kept["samples"])
        return [Outcome(**outcome) for outcome in kept["outcomes"]]
    made = run(base, entry, settings, bench)
    samples = sorted(other.name for other in bench.kept if other.name.startswith("samples-"))
    if instrument != instrument_of(settings):  # else a file that is put back would have what was measured on another
        raise RecipeError(
            f"evaluate.tasks: {entry.task!r}: files of it changed while it was asked; give the same command again"
        )
    write_json(file, sealed({"outcomes": [outcome._asdict() for outcome in made], "samples": samples}))
    return made


def run(base: Base, entry: Benchmark, settings: BenchmarksSettings, bench: Bench) -> list[Outcome]:
    """Ask the model a benchmark's questions."""
    with harness.quiet(), harness.seeded(base):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        manager = harness.manager_of([each.task for each in settings.benchmarks], settings.include_path)
        leaves = leaves_of(entry, settings, manager.task_index)
        tasks = harness.loaded(manager, entry.task, entry.shots, leaves)
        # The harness sets the padding of the tokenizer that it is given.
        model = HFLM(pretrained=base.model, tokenizer=copy.deepcopy(base.tokenizer), batch_size=settings.batch_size)
        limit = entry.limit or settings.limit
        results = lm_eval.evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    if settings.log_samples:
        for name in tasks:
            lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples[name]]
            file = bench.folder / f"samples-{slug(name)}.jsonl"
            write_text(file, "".join(lines))
            bench.kept.add(file)
    return summed(entry, manager.task_index[entry.task], tasks, samples)


def leaves_of(entry: Benchmark, settings: BenchmarksSettings, index: Mapping[str, Any]) -> list[Leaf]:
    """A benchmark's single tasks with their changes. Raises RecipeError for names that nobody has."""
    changed: dict[str, Mapping[str, Any]] = {"files": settings.files, "overrides": settings.overrides}
    harness.check_names([each.task for each in settings.benchmarks], changed, index)
    return harness.leaves_of(entry.task, entry.shots, settings.files, settings.overrides, index)


def summed(entry: Benchmark, listed: Any, tasks: Mapping[str, Any], samples: Mapping[str, Any]) -> list[Outcome]:
    """The outcome of each of a benchmark's tasks, or the one of a group that says how it is summed up."""
    rules = (listed.cfg or {}).get("aggregate_metric_list") if listed.kind.name == "GROUP" else None
    rule = (rules[0] if isinstance(rules, list) else rules) or {}
    metric = entry.metric or rule.get("metric")
    single = [outcome(name, task, samples[name], metric) for name, task in tasks.items()]
    if not rule:
        return single
    if any(each.transform != "none" or set(each.denominator) != {1.0} for each in single):
        raise RecipeError(f"evaluate.tasks: the group {entry.task!r} has no mean over its questions; name its tasks")
    scores = [each.numerator for each in single]
    joined = np.concatenate(scores) if rule.get("weight_by_size", True) else evened(scores)
    chances = [each.chance for each in single]
    weights = [len(each) for each in scores] if rule.get("weight_by_size", True) else None
    chance = None if None in chances else float(np.average(np.array(chances, dtype=np.float64), weights=weights))
    first = single[0]
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
    ratio_terms = terms(kind, values)
    if ratio_terms is None:
        raise RecipeError(
            f"evaluate.tasks.metric: {name!r}: its {chosen!r} is no mean over items ({kind}); name another"
        )
    higher: Higher = "known" if task.higher_is_better().get(chosen, True) else "unknown"
    transform: Literal["none", "exp"] = "exp" if kind in ("perplexity", "weighted_perplexity") else "none"
    return Outcome(name, chosen, *ratio_terms, higher, transform, guessing(task, chosen, mine))


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


BENCHMARKS = Evaluator(
    settings=BenchmarksSettings,
    source="lm-evaluation-harness",
    measure=measure,
    columns=columns,
    instrument=instrument_of,
    reads_rows=False,
    rereads=True,
)
