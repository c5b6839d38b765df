"""What the numbers say, in sentences. That something fell, rose, got worse or better is said only where the interval of
the difference, paired by item, excludes no difference.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import LISTED, Metric, Scores, Shift, Subject, few_items, interval, share_back
from spunge.report.watching import saved
from spunge.report.wording import isolated
from spunge.results import UNTAUGHT, Calibration, Group, Model, Recovered, Row, Wanted

LEAST = 3  # lines, where there are more subjects than are listed
OVER = "below chance (over-forgetting)"


class Fact(NamedTuple):
    """A sentence that begins with the metric's name, and what it rests on."""

    metric: str
    text: str
    lines: tuple[str, ...] = ()


class Finding(NamedTuple):
    """Facts under one heading."""

    heading: str
    facts: tuple[Fact, ...]


class Pair(NamedTuple):
    """A subject's measurement before and after."""

    subject: Subject
    before: Row
    after: Row
    shift: Shift | None

    @property
    def way(self) -> int:
        return self.shift.way if self.shift else 0

    @property
    def better(self) -> int:
        """1 better, -1 worse, each for certain; else 0."""
        if self.subject.wanted != "near":
            return self.way * WAYS.get(self.subject.wanted, 0)
        if not self.way:
            return 0
        away = self.subject.worse(self.before.value, self.after.value)
        target = self.subject.target or 0.0
        if (self.before.value - target) * (self.after.value - target) >= 0:
            return (away < 0) - (away > 0)
        # From one side of the target to the other: certain only where the whole of one interval is nearer than the other.
        (near, far), (now, then) = (_distances(row, target) for row in (self.before, self.after))
        return (then < near) - (far < now)

    @property
    def over(self) -> bool:
        """It fell below chance: what was there before, or was there without a certain fall, was not pushed there."""
        return bool(self.after.below_chance) and not self.before.below_chance and self.way < 0


def _distances(row: Row, target: float) -> tuple[float, float]:
    """The least and the greatest distance of an interval from a target; of a value without one none is known."""
    ends = interval(row)
    if ends is None:
        return 0.0, math.inf
    least = 0.0 if ends.low <= target <= ends.high else min(abs(end - target) for end in ends)
    return least, max(abs(end - target) for end in ends)


class Words(NamedTuple):
    """What is said of a change; where none is certain, `no certain SAME`."""

    down: str
    up: str
    same: str = "change"
    lead: str = ""  # before the first of them


MOVED = Words("fell", "rose")
JUDGED = Words("got worse", "got better")
STANDS = Words("lower", "higher", "difference")
LIES = Words("lower", "higher", "difference", "is ")
BESIDE = Words("worse", "better", "difference", "is ")
WAYS: dict[Wanted | None, int] = {"up": 1, "down": -1}
NOUNS: dict[Group, str] = {"forget": "parts to forget", "keep": "subjects to be kept"}


def basis(scores: Scores) -> str:
    """What all claims rest on, in a line; nothing where there is nothing to claim."""
    if not scores.metrics:
        return ""
    seeds = f" Values are means over {scores.seeds} seeds, ± their standard deviation." if scores.seeds > 1 else ""
    few = f" {told}" if (told := few_items(scores)) else ""
    if not scores.paired:
        return f"These results hold no paired differences, so no change is claimed.{seeds}{few}"
    return (
        "A change is claimed only where the 95% interval of its difference, paired by item, excludes no change; "
        f"the interval stands in brackets.{seeds}{few}"
    )


def verdict(scores: Scores) -> list[Finding]:
    """Did it forget, for each part; what did it cost; how does the merge stand against each control; what comes back."""
    controls, merged = scores.of_kind("control"), scores.of_kind("merged")
    references = [model for model in scores.of_kind("reference") if model.stage != UNTAUGHT]
    findings = {
        "What was taught: the base against the untaught model": [
            _against(metric, UNTAUGHT, "base") for metric in scores.metrics
        ],
        "Saved steps": _saved(scores),
        "Calibration": _calibrated(scores.models),
        "Controls with settings of their own": [_of_its_own(control, merged) for control in controls],
        "Parts to forget": [_forgotten(metric, controls, scores.parts) for metric in scores.metrics if merged],
        "Subjects to be kept": [_kept(metric, controls) for metric in scores.metrics],
        "All rows together": [_together(metric, controls) for metric in scores.metrics],
    }
    models = scores.of_kind("model")
    for model in [*controls, *references, *models] if merged else ():
        heading = f"Merged against the {isolated(model.label)}"
        findings[heading] = [_against(metric, model.stage) for metric in scores.metrics]
    for model in models:
        findings[f"{isolated(model.label)} against the base"] = [
            _against(metric, "base", model.stage) for metric in scores.metrics
        ]
    findings["What attacks bring back"] = [_brought_back(metric, scores) for metric in scores.audits]
    measured = any(findings["Parts to forget"] + findings["All rows together"])
    if scores.parts and scores.metrics and merged and not measured:
        findings["Parts to forget"] = [Fact("Nothing", "was measured on the parts to forget.")]
    told = [Finding(heading, tuple(fact for fact in facts if fact)) for heading, facts in findings.items()]
    return [finding for finding in told if finding.facts]


def _saved(scores: Scores) -> list[Fact | None]:
    """By what the saved steps were chosen, where they were."""
    chosen = saved(scores.watched)
    return [] if chosen is None else [Fact(*chosen)]


def _of_its_own(control: Model, merged: Sequence[Model]) -> Fact | None:
    """Which settings a control was trained with that the branches were not: the comparison is then of two tuned runs."""
    if control.settings is None or not merged or merged[0].settings is None:
        return None
    mine, theirs = control.settings, merged[0].settings
    told = [
        f"{words} {mine[name]:g}" + (f" ({theirs[name]:g} of the branches)" if theirs.get(name) is not None else "")
        for name, words in (("learning_rate", "a learning rate of"), ("joint_steps", "joint steps"))
        if mine.get(name) is not None and mine[name] != theirs.get(name)
    ]
    return Fact(isolated(control.label), f"was trained with {' and '.join(told)}.") if told else None


def _calibrated(models: Sequence[Model]) -> list[Fact | None]:
    """At which scale each model keeps what it was to keep, and where none does."""
    set_for = [(model, each) for model in models for each in model.calibration or ()]
    if not set_for:
        return []
    first = set_for[0][1]
    text = (
        f"of {isolated(first.subject)} is to keep {first.keep:.1%} of the base's: each model has the largest scale at which it "
        f"does, found on {first.n} items that are judged nowhere."
    )
    return [Fact(first.metric, text, tuple(_scale(model, each) for model, each in set_for))]


def _scale(model: Model, found: Calibration) -> str:
    """`merged: scale 0.53 keeps 95.4%`, or that the point was not reached."""
    line = f"{isolated(model.label)}: scale {found.scale:.3g} keeps {found.share:.1%}"
    if found.bound == "high":
        return f"{line}; it is the largest scale, so the point is not reached"
    return f"{line}; the point is not reached, and no smaller scale was tried" if found.bound == "low" else line


def pairs(metric: Metric, group: Group, before: str = "base", after: str = "merged") -> list[Pair]:
    """The subjects of a group that both stages' models were judged on."""
    compared = []
    for subject in metric.subjects:
        one, other = metric.row(before, subject.name), metric.row(after, subject.name)
        if subject.group == group and one is not None and other is not None:
            compared.append(Pair(subject, one, other, metric.shift(after, before, subject.name)))
    return compared


def never_there(metric: Metric, pair: Pair) -> bool:
    """The value before is shown as 0 where it should fall, so no fall can be seen."""
    return metric.share and pair.subject.wanted == "down" and round(pair.before.value, metric.digits) == 0


def _forgotten(metric: Metric, controls: Sequence[Model], parts: Sequence[str]) -> Fact | None:
    compared = pairs(metric, "forget")
    if not compared:
        asked = any(subject.group == "forget" for subject in metric.subjects)
        return Fact(metric.name, "was measured on no part for both base and merged.") if asked else None
    # A part that was not measured must not pass for one that was forgotten.
    unknown = [part for part in parts if part not in {pair.subject.name for pair in compared}]
    told = [pair.subject.name for pair in compared if pair.subject.name in parts]
    unknown = unknown if told else []  # other rows stand for the parts
    ways = {pair.subject.way for pair in compared}
    # What should be near a value is no better for having fallen.
    aimed = all(pair.subject.wanted == "near" for pair in compared)
    counted = (
        _counted([pair.better for pair in compared], JUDGED)
        if aimed
        else _counted([pair.way for pair in compared], MOVED)
    )
    text = f"{counted}{' measured' if unknown else ''}"
    text += f" ({ways.pop()} is wanted)." if len(ways) == 1 and "" not in ways else "."
    over = [pair.subject.name for pair in compared if pair.over]
    if over:
        text += f" {OVER.capitalize()} on {len(over)}: {listed(over)}."
    if len(compared) > 1 and metric.share:
        text += f" Mean over these parts: {_means(metric, compared, controls)}."
    text += _unknown(unknown)
    absent = [pair.subject.name for pair in compared if never_there(metric, pair)]
    text += f" Of {listed(absent)} the base showed nothing to forget." if absent else ""
    shown = [pair for pair in compared if pair.way] if metric.side else compared
    if metric.side and not shown:
        return None
    if len(shown) > LISTED:
        most: Wanted = "up" if 2 * sum(_moved(metric, pair) > 0 for pair in compared) >= len(compared) else "down"
        # Where no way is wanted, the way that most of them went.
        shown = sorted(shown, key=lambda pair: -_worse(metric, pair, most))[:LEAST]
        text += f" The {LEAST} that moved least that way:"
    return Fact(metric.name, text, tuple(_line(metric, pair, controls) for pair in shown))


def _kept(metric: Metric, controls: Sequence[Model]) -> Fact | None:
    compared = pairs(metric, "keep")
    if not compared:
        return None
    text = f"{_judged(compared)}."
    worst = max(compared, key=lambda pair: _worse(metric, pair))
    lines: tuple[str, ...] = ()
    if _worse(metric, worst) > 0:
        text += f" The largest {'loss' if worst.subject.wanted else 'change'}:" if len(compared) > 1 else ""
        lines = (_line(metric, worst, ()),)
    else:
        text += " No value is worse." if worst.subject.wanted else " No value moved."
    known = {pair.subject.name for pair in compared}
    text += _unknown([s.name for s in metric.subjects if s.group == "keep" and s.name not in known])
    lines += tuple(filter(None, (_loss_of(metric, control) for control in controls)))
    if metric.side and not any(pair.way for pair in compared):
        return None
    return Fact(metric.name, text, lines)


def _loss_of(metric: Metric, control: Model) -> str:
    """What a control lost on what is kept, beside the merge's own loss."""
    compared = pairs(metric, "keep", "base", control.stage)
    if not compared:
        return ""
    text = f"{isolated(control.label)}: {_judged(compared)}"
    worst = max(compared, key=lambda pair: _worse(metric, pair))
    if _worse(metric, worst) <= 0:
        return text
    what = "loss" if worst.subject.wanted else "change"
    return f"{text}; the largest {what} on {isolated(worst.subject.name)}, {_said(metric, worst)}"


def _judged(compared: Sequence[Pair]) -> str:
    """`got worse on 1 of 2, no certain change on 1`; where no way is wanted, which way they went."""
    if any(pair.subject.wanted is None for pair in compared):
        return _counted([pair.way for pair in compared], MOVED)
    return _counted([pair.better for pair in compared], JUDGED)


def _together(metric: Metric, controls: Sequence[Model]) -> Fact | None:
    compared = [pair for pair in pairs(metric, "together") if pair.way or not metric.side]
    return Fact(metric.name, f"of {_line(metric, compared[0], controls)}.") if compared else None


def _against(metric: Metric, other: str, stage: str = "merged") -> Fact | None:
    clauses, certain = [], []
    for group in NOUNS:
        compared = pairs(metric, group, other, stage)
        judged = group == "keep" and all(pair.subject.wanted for pair in compared)
        ways = [pair.better if judged else pair.way for pair in compared]
        if compared:
            clauses.append(_counted(ways, BESIDE if judged else LIES, NOUNS[group]))
        certain += [pair for pair in compared if pair.way]
    if metric.side and not certain:
        return None
    largest = sorted(certain, key=lambda pair: -abs(_worse(metric, pair)))
    shown = largest if len(largest) <= LISTED else largest[:LEAST]
    end = f". The {LEAST} largest differences:" if len(largest) > LISTED else "."
    lines = tuple(_line(metric, pair, (), STANDS) for pair in shown)
    return Fact(metric.name, "; ".join(clauses) + end, lines) if clauses else None


def _brought_back(metric: Metric, scores: Scores) -> Fact | None:
    """The largest share of what was forgotten that an attack brings back, for the merge and for each control."""
    models = metric.judged((*scores.of_kind("merged"), *scores.of_kind("control")))
    if not models:
        return None
    clauses = []
    for model in models:
        shares = [row for row in scores.recovered if (row.metric, row.stage) == (metric.name, model.stage)]
        largest = max(shares, key=lambda row: row.value, default=None)
        who = "" if model.kind == "merged" else f"{isolated(model.label)} "
        clauses.append(
            f"{who}{_largest(metric, largest) if largest else _nothing(scores.metric(str(metric.of)), model)}"
        )
    return Fact(metric.name, f"brings back {'; '.join(clauses)}.")


def _nothing(before: Metric | None, model: Model) -> str:
    """Why there is no share that comes back."""
    shifts = [before.shift(model.stage, "base", subject.name) for subject in before.subjects] if before else []
    paired = [shift for shift in shifts if shift is not None and shift.interval is not None]
    if not paired or any(shift.way for shift in paired):
        return "an unknown share"
    return "nothing, since nothing was forgotten for certain"


def _largest(metric: Metric, share: Recovered) -> str:
    ends = interval(share)
    sure = "" if ends is not None and ends.low > 0 else ", not certainly anything"
    what = "" if share.stage != "merged" else f" of the {isolated(metric.of)} that was forgotten"
    return f"up to {share_back(share)}{what} (on {isolated(share.subject)}{sure})"


def _counted(ways: Sequence[int], words: Words, noun: str = "") -> str:
    """`fell on 2 of 4, rose on 1, no certain change on 1`."""
    counts = ((words.down, ways.count(-1)), (words.up, ways.count(1)), (f"no certain {words.same}", ways.count(0)))
    clauses = [f"{word} on {count}" for word, count in counts if count]
    clauses[0] += f" of {len(ways)}{f' {noun}' if noun else ''}"
    lead = words.lead if counts[0][1] or counts[1][1] else "shows "
    return lead + ", ".join(clauses)


def _worse(metric: Metric, pair: Pair, most: Wanted | None = None) -> float:
    """How far it went the wrong way; where no way is wanted, how far against `most`, or without that how far it went."""
    moved, way = _moved(metric, pair), pair.subject.wanted or most
    if way == "near":
        return pair.subject.worse(pair.before.value, pair.after.value)
    return -WAYS[way] * moved if way else abs(moved)


def _moved(metric: Metric, pair: Pair) -> float:
    """How far up it went."""
    if pair.shift is not None:
        return metric.size(pair.shift)
    # One of the two is infinite, such as the perplexity of a broken model.
    return 0.0 if pair.before.value == pair.after.value else pair.after.value - pair.before.value


def _means(metric: Metric, compared: Sequence[Pair], controls: Sequence[Model]) -> str:
    means = [
        f"base {metric.shown(fmean(pair.before.value for pair in compared))}",
        f"merged {metric.shown(fmean(pair.after.value for pair in compared))}",
    ]
    for control in controls:
        rows = [metric.row(control.stage, pair.subject.name) for pair in compared]
        values = [row.value for row in rows if row is not None]
        if len(values) == len(compared):
            means.append(f"{isolated(control.label)} {metric.shown(fmean(values))}")
    return ", ".join(means)


def _unknown(names: Sequence[str]) -> str:
    return f" Not measured on both base and merged: {listed(names)} ({len(names)})." if names else ""


def listed(names: Sequence[str]) -> str:
    """Some names of a sentence, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(isolated(name, 30) for name in names[:LISTED]) + more


def _line(metric: Metric, pair: Pair, controls: Sequence[Model], words: Words = MOVED) -> str:
    """`Europe: fell by 0.60 [0.50 0.70], 0.90 → 0.30 [0.21 0.44]; joint control 0.32 [0.22 0.45]`."""
    before, after = metric.shown(pair.before.value), metric.with_interval(pair.after)
    text = f"{isolated(pair.subject.name)}: {_said(metric, pair, words)}"
    text += f", {before} → {after}" if words is MOVED else f", {after} against {before}"
    if pair.after.below_chance:
        text += f", {OVER if pair.over else 'below chance'}{f' as {before} is' if pair.before.below_chance else ''}"
    beside = [(control, metric.row(control.stage, pair.subject.name)) for control in controls]
    # Of several only the values; each has a heading of its own.
    told = [
        (control, metric.with_interval(row) if len(controls) == 1 else metric.shown(row.value))
        for control, row in beside
        if row is not None
    ]
    return text + "".join(f"; {isolated(control.label)} {shown}" for control, shown in told)


def _said(metric: Metric, pair: Pair, words: Words = MOVED) -> str:
    """`fell by 0.60 [0.50 0.70]`, or `no certain change (−0.05 [−0.12 0.02])`."""
    if pair.shift is not None and pair.way:
        return f"{words.up if pair.way > 0 else words.down} {metric.by(pair.shift)}"
    if pair.shift is not None and pair.shift.changed == 0:
        return f"no item changed (n = {pair.shift.n})"
    moved = f"{metric.moved(pair.shift)} {metric.moved_interval(pair.shift)}".strip()
    return f"no certain {words.same}" + (f" ({moved})" if moved else "")
