"""What the models wrote on the same prompts, side by side, from the files of RUN/evaluation as far as they are kept.

A page holds some of it: of each group the prompts on which base and merged model differ most, and some that are drawn.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from markupsafe import escape

from spunge.errors import printable
from spunge.files import parse_json
from spunge.report.reading import shown
from spunge.report.wording import MISSING, name, number
from spunge.results import SUBJECTS, Evaluation, Model, Results, real

GROUPS = 60  # of which prompts can be looked at apart
MOST, DRAWN = 6, 4  # prompts of a group, with up to PROMPTS in all
PROMPTS = 160
SAMPLES = 3  # completions of a prompt by one model
LONGEST = 1500  # characters of a text
ROOM = 1_500_000  # bytes of all texts together as HTML, so that the page stays below 3 MB
MODELS = 4

Members = dict[str, dict[int, list[str]]]  # evaluation -> item -> its subjects


class Scored(NamedTuple):
    """A text with the scorer's score of it, where one was kept; ready to be shown."""

    text: str
    score: str


class Side(NamedTuple):
    """What one model wrote after a prompt."""

    texts: tuple[Scored, ...]
    more: int  # completions that are not shown
    scores: tuple[tuple[str, str, str], ...]  # evaluation, metric, value


class Answered(NamedTuple):
    """A prompt and what each model wrote after it; None: it was not asked, or its texts are not kept."""

    row: int
    prompt: str
    groups: tuple[int, ...]
    subjects: str
    sides: tuple[Side | None, ...]
    most: bool
    drawn: bool


class Completions(NamedTuple):
    models: tuple[Model, ...]
    groups: tuple[str, ...]  # the subjects
    answered: tuple[Answered, ...]
    known: int  # prompts that are kept
    most: int  # of the shown ones


@dataclass
class _Prompt:
    """A prompt of an evaluation, before some are chosen. texts, rated and scores: by model."""

    row: int
    prompt: str
    subjects: list[str]
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rated: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)
    change: tuple[float, float] = (0.0, 0.0)


def completions(run: Path, results: Results, keep: str) -> Completions | None:
    """What is kept and may be shown; None where that is nothing. keep: the recipe's `keep_texts`.

    Raises RecipeError where a file that a judging wrote is damaged.
    """
    if keep == "none":
        return None
    models = _compared(results.models)
    none: Members = {}
    subjects = shown(run / SUBJECTS, _memberships, none)
    prompts: list[_Prompt] = []
    stored = dict(_stored(run, {model.stage for model in models}))
    for evaluation in results.evaluations:
        of_models = {model.stage: stored.get((model.stage, evaluation.name)) for model in models}
        prompts += _prompts(evaluation, {stage: each for stage, each in of_models.items() if each}, subjects)
    prompts = list(_together(prompts))
    return _chosen(prompts, models) if prompts else None


def writes(results: Results) -> bool:
    """Whether an evaluation lets a model write."""
    return any("generation" in (each.settings or {}) for each in results.evaluations)


def _compared(models: Sequence[Model]) -> tuple[Model, ...]:
    """The base, the joint control (else the first), models beside them and the merged one."""
    controls = sorted((each for each in models if each.kind == "control"), key=lambda model: model.train != "joint")
    others = [each for each in models if each.kind in ("model", "reference")]
    first = [each for each in models if each.kind == "base"]
    last = [each for each in models if each.kind == "merged"]
    return (*first, *[*controls[:1], *others][: MODELS - len(first) - len(last)], *last)


class _Measured(NamedTuple):
    """A metric and its value of each item."""

    metric: str
    values: tuple[float, ...]


class _Judging(NamedTuple):
    """A judging's file: its measures over all items, whether they are another's under an attack, and the folder and the names of
    the files with its texts."""

    folder: Path
    measures: tuple[_Measured, ...]
    again: bool
    texts: tuple[str, ...]


def _stored(run: Path, stages: set[str]) -> Iterator[tuple[tuple[str, str], _Judging]]:
    for file in sorted(run.glob("evaluation/*/????????????.json")):
        told = shown(file, lambda content, file=file: _judging(file, content), None)  # type: ignore[misc]
        if told is not None and told[0][0] in stages:
            yield told


def _judging(file: Path, content: Mapping[str, Any]) -> tuple[tuple[str, str], _Judging]:
    """Raises what `shown` takes for damage."""
    texts = tuple(each for each in content.get("text_files") or [] if Path(each).name == each)
    about, measures = (content["stage"], content["evaluation"]), content["measures"]
    if not all(isinstance(each, str) for each in about) or not isinstance(measures, list):
        raise TypeError("it holds no measures of a stage")
    over_all = tuple(_measured(each) for each in measures if each.get("subject") is None)
    return about, _Judging(file.parent, over_all, any(each.get("of") for each in measures), texts)


def _measured(measure: Mapping[str, Any]) -> _Measured:
    """Raises what `shown` takes for damage."""
    values = []
    for above, below in zip(measure["numerator"], measure["denominator"], strict=True):
        value, count = float(real(above)), float(real(below))
        if measure.get("combine", "ratio") == "ratio":
            value = value / count if count else math.nan
        if measure.get("transform") == "exp":
            value = math.exp(min(value, 700.0))
        values.append(value)
    return _Measured(str(measure["metric"]), tuple(values))


def _memberships(content: Mapping[str, Any]) -> Members:
    """What the file says by item; the subject of all items is left out where there are others."""
    known: Members = {}
    for evaluation, members in content.items():
        count = len({item for items in members.values() for item in items})
        for subject, items in members.items():
            if len(members) == 1 or len(items) < count:
                for item in items:
                    known.setdefault(evaluation, {}).setdefault(item, []).append(subject)
    return known


def _prompts(
    evaluation: Evaluation, judgings: Mapping[str, _Judging], subjects: Mapping[str, Mapping[int, Sequence[str]]]
) -> Iterator[_Prompt]:
    """An evaluation's prompts. One that measures again, under an attack, is left out: its prompts are another's."""
    if any(judging.again for judging in judgings.values()):
        return
    lines = [(stage, judging, line) for stage, judging in judgings.items() for line in _completed(judging)]
    prompts: dict[int, set[str]] = {}
    for _, _, line in lines:
        if line.prompt is not None:
            prompts.setdefault(line.row, set()).add(line.prompt)
    rated = {stage: _rated(judging) for stage, judging in judgings.items()}
    known: dict[tuple[int, str], _Prompt] = {}
    for stage, judging, line in lines:
        # The base's texts may be of a version that kept no prompts; the other models were asked the same.
        of_row = prompts.get(line.row, set())
        prompt = line.prompt if line.prompt is not None else next(iter(of_row)) if len(of_row) == 1 else None
        if prompt is None:
            continue
        about = list(subjects.get(evaluation.name, {}).get(line.row, []))
        asked = known.setdefault((line.row, prompt), _Prompt(line.row, prompt, about))
        asked.texts[stage] = line.texts
        asked.rated[stage] = rated[stage].get(line.row, [])
        asked.scores[stage] = _scores(evaluation, judging, line.row)
    yield from known.values()


class _Line(NamedTuple):
    row: int
    prompt: str | None
    texts: tuple[str, ...]


def _completed(judging: _Judging) -> Iterator[_Line]:
    """The completions of a judging."""
    for file in (judging.folder / each for each in judging.texts if each.startswith("texts-")):
        for line in _lines(file):
            row, prompt, texts = line.get("row"), line.get("prompt"), line.get("texts")
            if _is_row(row) and isinstance(prompt, str | None) and isinstance(texts, list):
                yield _Line(row, prompt, tuple(map(str, texts)))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The mappings of a file of JSON lines. What is not kept, or cannot be read, is none."""
    try:
        # Not splitlines: a completion may hold other line breaks of Unicode's.
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


def _is_row(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _rated(judging: _Judging) -> dict[int, list[float]]:
    """Row -> the scorer's score of each of its completions."""
    scores: dict[int, list[float]] = {}
    for file in (judging.folder / each for each in judging.texts if each.startswith("scored-")):
        for line in _lines(file):
            row, score = line.get("row"), line.get("score")
            if _is_row(row) and isinstance(score, int | float) and 0 <= score <= 1:
                scores.setdefault(row, []).append(float(score))
    return scores


def _scores(evaluation: Evaluation, judging: _Judging, row: int) -> list[tuple[str, str, float]]:
    """Every measure of an item."""
    return [(evaluation.name, each.metric, each.values[row]) for each in judging.measures if row < len(each.values)]


def _together(prompts: Iterable[_Prompt]) -> Iterator[_Prompt]:
    """Evaluations that judged the same texts are one, with the scores of each."""
    known: dict[tuple[int, str, tuple[tuple[str, tuple[str, ...]], ...]], _Prompt] = {}
    for each in prompts:
        key = (each.row, each.prompt, tuple(sorted(each.texts.items())))
        if key not in known:
            known[key] = each
            continue
        first = known[key]
        first.subjects = list(dict.fromkeys([*first.subjects, *each.subjects]))
        for stage, scores in each.scores.items():
            first.scores[stage] = [*first.scores[stage], *scores]
            first.rated[stage] = first.rated[stage] or each.rated[stage]
    yield from known.values()


def _chosen(prompts: Sequence[_Prompt], models: Sequence[Model]) -> Completions:
    """Of each group those that changed most and some that are drawn."""
    before, after = models[0].stage, models[-1].stage
    for each in prompts:
        each.change = _change(each, before, after)
    by_group: dict[str, list[int]] = {}
    for at, each in enumerate(prompts):
        for group in each.subjects or [""]:
            by_group.setdefault(group, []).append(at)
    groups = list(by_group)[:GROUPS]
    count = max(1, min(MOST, PROMPTS // 2 // len(groups)))
    drawn_count = max(1, min(DRAWN, PROMPTS // 2 // len(groups)))
    most: set[int] = set()
    drawn: set[int] = set()
    for group in groups:
        members = by_group[group]
        changed = [at for at in members if prompts[at].change > (0.0, 0.0)]
        most |= set(sorted(changed, key=lambda at: prompts[at].change, reverse=True)[:count])
        drawn |= set(sorted(members, key=lambda at: _lot(prompts[at]))[:drawn_count])
    by_change = sorted(most | drawn, key=lambda at: prompts[at].change, reverse=True)
    by_lot = sorted(drawn, key=lambda at: _lot(prompts[at]))
    # One of each in turn: where there is no room for all, some of both are shown.
    turns = dict.fromkeys(at for pair in zip_longest(by_change, by_lot) for at in pair if at is not None)
    fitting, left = {}, ROOM
    for at in turns:
        fitting[at] = _answered(prompts[at], models, groups, at in most, at in drawn)
        left -= _size(fitting[at])
        if left < 0:
            del fitting[at]
            break
    answered = [fitting[at] for at in by_change if at in fitting]
    used = sorted({group for line in answered for group in line.groups})
    renumbered = {group: number for number, group in enumerate(used)}
    return Completions(
        models=tuple(models),
        groups=tuple(name(groups[at]) for at in used),
        answered=tuple(line._replace(groups=tuple(renumbered[at] for at in line.groups)) for line in answered),
        known=len(prompts),
        most=sum(line.most for line in answered),
    )


def _size(line: Answered) -> int:
    """Bytes of its texts in the page."""
    texts = [line.prompt, *(text.text for side in line.sides if side for text in side.texts)]
    return sum(len(escape(text).encode()) for text in texts)


def _change(prompt: _Prompt, before: str, after: str) -> tuple[float, float]:
    """How much two models differ on a prompt: by the largest change of a score from 0 to 1, then by their words."""
    if before not in prompt.texts or after not in prompt.texts:
        return 0.0, 0.0
    first = {(evaluation, metric): value for evaluation, metric, value in prompt.scores[before]}
    pairs = [(first.get((evaluation, metric), math.nan), value) for evaluation, metric, value in prompt.scores[after]]
    moved = [abs(two - one) for one, two in pairs if 0 <= one <= 1 and 0 <= two <= 1]
    one, other = (Counter(" ".join(prompt.texts[stage]).split()) for stage in (before, after))
    every = (one | other).total()
    return max(moved, default=0.0), 1 - (one & other).total() / every if every else 0.0


def _lot(prompt: _Prompt) -> str:
    """By this the prompts are drawn: the same ones whenever the page is made."""
    return hashlib.sha256(f"{prompt.row} {prompt.prompt}".encode("utf-8", "replace")).hexdigest()


def _answered(prompt: _Prompt, models: Sequence[Model], groups: Sequence[str], most: bool, drawn: bool) -> Answered:
    told = {metric for scores in prompt.scores.values() for _, metric, value in scores if value}
    return Answered(
        row=prompt.row,
        prompt=_text(prompt.prompt),
        groups=tuple(at for at, group in enumerate(groups) if group in (prompt.subjects or [""])),
        subjects=", ".join(map(name, prompt.subjects)),
        sides=tuple(_side(prompt, model.stage, told) for model in models),
        most=most,
        drawn=drawn,
    )


def _side(prompt: _Prompt, stage: str, told: set[str]) -> Side | None:
    """told: metrics that are not 0 for every model; one that is stands nowhere where it has company."""
    if stage not in prompt.texts:
        return None
    texts, rated = prompt.texts[stage], prompt.rated[stage]
    scores = prompt.scores[stage]
    return Side(
        texts=tuple(
            Scored(_text(text), number(rated[at], True) if len(rated) == len(texts) else "")
            for at, text in enumerate(texts[:SAMPLES])
        ),
        more=max(0, len(texts) - SAMPLES),
        scores=tuple(
            (name(evaluation), name(metric), MISSING if math.isnan(value) else number(value, 0 <= value <= 1))
            for evaluation, metric, value in scores
            if metric in told or len(scores) == 1 or not told
        ),
    )


def _text(text: str) -> str:
    """A text as text: control characters escaped, cut where it is long."""
    more = len(text) - LONGEST
    cut = text if more <= 0 else f"{text[:LONGEST]}… ({more} more characters)"
    return printable(cut, keep="\n\t")
