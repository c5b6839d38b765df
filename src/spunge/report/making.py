"""How a run was made: the command that makes it again, what results depend on, and what each stage took."""

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import printable
from spunge.files import fingerprint, read_json
from spunge.report.reading import SplitFacts
from spunge.report.wording import duration, size
from spunge.results import Results

SHORTEST = 0.1  # seconds: a stage that took less is left out
STAGES = 60  # that are listed, those that took longest


class StageTime(NamedTuple):
    name: str
    seconds: float
    share: int  # percent of the longest


class Making(NamedTuple):
    command: str
    facts: tuple[tuple[str, str], ...]
    stages: tuple[StageTime, ...]


def making(run: Path, results: Results, split: SplitFacts | None) -> Making:
    """From the run's own files; what they do not say is left out."""
    again = f"spunge run recipe.yaml --out {shlex.quote(f'../{run.resolve().name}-again')}"
    times = sorted(_times(run, results), key=lambda stage: -stage[1])[:STAGES]
    longest = max((seconds for _, seconds in times), default=1.0)
    stages = tuple(StageTime(name, seconds, round(100 * seconds / longest)) for name, seconds in times)
    return Making(printable(again), tuple(_facts(run, results, split)), stages)


def _facts(run: Path, results: Results, split: SplitFacts | None) -> Iterator[tuple[str, str]]:
    taken = Counter(str(stamp["taken"]) for stamp in _stamps(run) if stamp.get("taken"))
    if results.seconds is not None:
        yield f"Time of all stages{' that were made here' if taken else ''}", duration(results.seconds)
    if taken:
        yield "Stages taken from other runs", printable(", ".join(f"{n} from {name}" for name, n in taken.items()))
    if results.peak_memory is not None:
        yield "Memory at the peak", size(results.peak_memory)
    if results.device:
        yield "Device", printable(f"{results.device}, {results.dtype}" if results.dtype else results.device)
    for decode in dict.fromkeys(model.decode for model in results.models if model.kind == "merged"):
        if decode is not None:
            offset = "one small model's" if decode.merge is None else f"{decode.merge} of the parts' offsets, as logits"
            yield (
                "Unlearned while decoding",
                printable(f"{decode.kind}, alpha {decode.alpha:g}: {offset}; no weight of {decode.model} changed"),
            )
    for model in results.models:
        if model.kind == "base":
            named = f"{model.base or ''}{f' at {model.revision}' if model.revision else ''}"
            yield "Base", printable(named)
    fingerprints = dict.fromkeys(model.base_fingerprint for model in results.models if model.base_fingerprint)
    if fingerprints:
        yield "Fingerprint of the base's weights", printable(", ".join(fingerprints))
    for part in split.parts if split else ():
        yield f"Rows of {part.value}", f"{part.selected or part.rows}, sha256 {part.sha256}"
    for evaluation in results.evaluations:
        yield printable(f"Items of {evaluation.name}"), printable(f"sha256 {evaluation.rows}")
    if results.versions:
        told = {"spunge": results.spunge, **results.versions}
        yield "Versions", printable(", ".join(f"{name} {version}" for name, version in told.items() if version))


def _times(run: Path, results: Results) -> Iterator[tuple[str, float]]:
    """What each stage took, as its stamp says. A judging's stage is known by its evaluation's file: here by its name."""
    evaluations = {fingerprint(each.name)[:12]: each.name for each in results.evaluations}
    for stamp in _stamps(run):
        if isinstance(stamp.get("seconds"), int | float) and stamp["seconds"] >= SHORTEST:
            stage, _, judged = str(stamp.get("stage", "")).rpartition("/")
            name = f"{stage}: {evaluations[judged]}" if judged in evaluations else f"{stage}/{judged}".lstrip("/")
            yield printable(name), float(stamp["seconds"])


def _stamps(run: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((run / "stamps").rglob("*.json")):
        stamp = read_json(file)
        if isinstance(stamp, dict):
            yield {"stage": file.stem, **stamp}
