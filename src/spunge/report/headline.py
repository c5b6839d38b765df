"""The verdict in one plain sentence: what the merged model forgot for certain, and what that cost for certain."""

from collections.abc import Sequence
from typing import NamedTuple

from spunge.report.scores import Metric, Scores
from spunge.report.verdict import listed, never_there, pairs
from spunge.results import Group


class _Told(NamedTuple):
    """Subjects of a group by what happened to them on the measures that say which way is good."""

    better: list[str]  # for certain on a measure, and on none worse
    mixed: list[str]  # better on one, worse on another
    worse: list[str]  # for certain on a measure, and on none better
    absent: list[str]  # the base scores nothing by any measure, so there was nothing to forget
    same: list[str]

    @property
    def every(self) -> int:
        return sum(map(len, self))


def headline(scores: Scores) -> str:
    """One sentence; of what no interval decides it says so."""
    if not scores.metrics:
        return (
            "No model was judged, so what was forgotten and what it cost is not known (evaluate says what to judge by)."
        )
    if not scores.of_kind("merged"):
        count = len(scores.models)
        judged = f"{count} models were judged as they are" if count != 1 else "One model was judged as it is"
        return f"{judged}; nothing was unlearned here."
    if not scores.paired:
        return "Whether anything was forgotten cannot be said: these results hold no paired differences."
    forgotten, kept = (_told(scores, group) for group in ("forget", "keep"))
    over = sorted({pair.subject.name for metric in scores.metrics for pair in pairs(metric, "forget") if pair.over})
    below = f", {listed(over)} to below chance" if over else ""
    named = {name for names in forgotten for name in names}
    # A part that was not measured must not pass for one that is not there. Where no part is named, other rows stand for them.
    missing = [part for part in scores.parts if part not in named] if named & {*scores.parts} else []
    return f"{_of_forgetting(forgotten, below, missing)} {_of_keeping(kept)}"


def _of_forgetting(told: _Told, below: str, missing: Sequence[str]) -> str:
    if not told.every:
        return "What the merged model forgot was not measured;"
    also = f"; {listed(told.mixed)} only by some measures and the opposite by others" if told.mixed else ""
    also += f"; it knows more for certain of {listed(told.worse)}" if told.worse else ""
    also += f"; of {listed(told.absent)} the base showed nothing to forget" if told.absent else ""
    also += f"; {listed(missing)} was not measured on both base and merged" if missing else ""
    parts = f"{_parts(told.every)}{' measured' if missing else ''}"
    if not told.better:
        return f"The merged model forgot none of the {parts} for certain{also}{below};"
    some = "both" if told.every == 2 else f"all {told.every}"
    count = f"{some} parts" if len(told.better) == told.every > 1 and not missing else f"{len(told.better)} of {parts}"
    count = (
        "what it was to forget" if told.every == 1 and not missing else f"{count} for certain ({listed(told.better)})"
    )
    return f"The merged model forgot {count}{also}{below};"


def _parts(count: int) -> str:
    return f"{count} parts" if count != 1 else "1 part"


def _of_keeping(told: _Told) -> str:
    if not told.every:
        return "what it cost was not measured."
    lost = [*told.worse, *told.mixed]
    if not lost:
        return "of what it was to keep, nothing got worse for certain."
    subject = f"{len(lost)} of {told.every} subjects" if told.every > 1 else "the only subject"
    return f"it got worse for certain on {subject} to be kept ({listed(lost)})."


def _told(scores: Scores, group: Group) -> _Told:
    ways: dict[str, set[int]] = {}
    there: set[str] = set()  # subjects of which the base showed something
    for metric in _main(scores.metrics):
        for pair in pairs(metric, group):
            if pair.subject.wanted is None:
                continue
            # A fall from nothing is none, however certain: 0.00002 to 0.00001.
            absent = never_there(metric, pair)
            ways.setdefault(pair.subject.name, set()).add(0 if absent and pair.better > 0 else pair.better)
            there |= set() if absent else {pair.subject.name}
    return _Told(
        better=[subject for subject, went in ways.items() if 1 in went and -1 not in went],
        mixed=[subject for subject, went in ways.items() if {1, -1} <= went],
        worse=[subject for subject, went in ways.items() if -1 in went and 1 not in went],
        absent=[subject for subject, went in ways.items() if went == {0} and subject not in there],
        same=[subject for subject, went in ways.items() if went == {0} and subject in there],
    )


def _main(metrics: Sequence[Metric]) -> list[Metric]:
    """Without checks on other metrics, where there is another."""
    main = [metric for metric in metrics if not metric.side]
    return main or list(metrics)
