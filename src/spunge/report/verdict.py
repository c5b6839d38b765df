"""What the numbers say, in sentences. That something fell, rose, got worse or better is said only where the interval of
the difference, paired by item, excludes no difference.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import Cell, Change, Group, Metric, Recovered, Scores, Stage, Subject
from spunge.report.wording import isolated

LISTED = 6  # subjects that get a line each; of more, only a few
LEAST = 3
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
    before: Cell
    after: Cell
    change: Change | None

    @property
    def way(self) -> int:
        return self.change.way if self.change else 0

    @property
    def over(self) -> bool:
        """It fell below chance: what was there before, or was there without a certain fall, was not pushed there."""
        return self.after.below_chance and not self.before.below_chance and self.way < 0


class Words(NamedTuple):
    """What is said of a change; where none is certain, `no certain SAME`."""

    down: str
    up: str
    same: str = "change"
    lead: str = ""  # before the first of them


MOVED = Words("fell", "rose")
JUDGED = Words("got worse", "got better")
STANDS = Words("lower", "higher", "difference")
AGAINST: dict[Group, Words] = {
    "forget": Words("lower", "higher", "difference", "is "),
    "other": Words("worse", "better", "difference", "is "),
}
NOUNS: dict[Group, str] = {"forget": "parts to forget", "other": "subjects to be kept"}


def basis(scores: Scores) -> str:
    """What all claims rest on, in a line; nothing where there is nothing to claim."""
    if not scores.metrics:
        return ""
    seeds = f" Values are means over {scores.seeds} seeds, ± their standard deviation." if scores.seeds > 1 else ""
    if not scores.paired:
        return f"These results hold no paired differences, so no change is claimed.{seeds}"
    return (
        "A change is claimed only where the 95% interval of its difference, paired by item, excludes no change; "
        f"the interval stands in brackets.{seeds}"
    )


def verdict(scores: Scores) -> list[Finding]:
    """Did it forget, for each part; what did it cost; how does the merge stand against each control; what comes back."""
    controls = scores.of_kind("control")
    findings = {
        "Parts to forget": [_forgotten(metric, controls, scores.parts) for metric in scores.metrics],
        "Subjects to be kept": [_kept(metric, controls) for metric in scores.metrics],
        "All rows together": [_mixed(metric, controls) for metric in scores.metrics],
    }
    for control in controls:
        heading = f"Merged against the {isolated(control.label)}"
        findings[heading] = [_against(metric, control) for metric in scores.metrics]
    findings["What attacks bring back"] = [_brought_back(metric, scores) for metric in scores.audits]
    if scores.parts and scores.metrics and not any(findings["Parts to forget"] + findings["All rows together"]):
        findings["Parts to forget"] = [Fact("Nothing", "was measured on the parts to forget.")]
    found = [Finding(heading, tuple(fact for fact in facts if fact)) for heading, facts in findings.items()]
    return [finding for finding in found if finding.facts]


def pairs(metric: Metric, group: Group, before: str = "base", after: str = "merged") -> list[Pair]:
    """The subjects of a group that both stages were judged on."""
    found = []
    for subject in metric.subjects:
        one, other = metric.cell(before, subject.name), metric.cell(after, subject.name)
        if subject.group == group and one is not None and other is not None:
            found.append(Pair(subject, one, other, metric.change(after, before, subject.name)))
    return found


def _forgotten(metric: Metric, controls: Sequence[Stage], parts: Sequence[str]) -> Fact | None:
    found = pairs(metric, "forget")
    if not found:
        asked = any(subject.group == "forget" for subject in metric.subjects)
        return Fact(metric.name, "was measured on no part for both base and merged.") if asked else None
    # A part that was not measured must not pass for one that was forgotten.
    unknown = [part for part in parts if part not in {pair.subject.name for pair in found}]
    text = f"{_counted([pair.way for pair in found], MOVED)}{' measured' if unknown else ''}."
    over = [pair.subject.name for pair in found if pair.over]
    if over:
        text += f" {OVER.capitalize()} on {len(over)}: {_listed(over)}."
    if len(found) > 1 and metric.share:
        text += f" Mean over these parts: {_means(metric, found, controls)}."
    text += _unknown(unknown)
    shown = [pair for pair in found if pair.way] if metric.side else found
    if metric.side and not shown:
        return None
    if len(shown) > LISTED:
        way = 1 if 2 * sum(_worse(metric, pair) > 0 for pair in found) >= len(found) else -1
        shown = sorted(shown, key=lambda pair: way * _worse(metric, pair))[:LEAST]
        text += f" The {LEAST} that moved least that way:"
    return Fact(metric.name, text, tuple(_line(metric, pair, controls) for pair in shown))


def _kept(metric: Metric, controls: Sequence[Stage]) -> Fact | None:
    found = pairs(metric, "other")
    if not found:
        return None
    text = f"{_counted([_better(metric, pair) for pair in found], JUDGED)}."
    worst = max(found, key=lambda pair: _worse(metric, pair))
    lines: tuple[str, ...] = ()
    if _worse(metric, worst) > 0:
        text += " The largest loss:" if len(found) > 1 else ""
        lines = (_line(metric, worst, ()),)
    else:
        text += " No value is worse."
    compared = {pair.subject.name for pair in found}
    text += _unknown([s.name for s in metric.subjects if s.group == "other" and s.name not in compared])
    lines += tuple(filter(None, (_loss_of(metric, control) for control in controls)))
    if metric.side and not any(_better(metric, pair) for pair in found):
        return None
    return Fact(metric.name, text, lines)


def _loss_of(metric: Metric, control: Stage) -> str:
    """What a control lost on what is kept, beside the merge's own loss."""
    found = pairs(metric, "other", "base", control.key)
    if not found:
        return ""
    text = f"{isolated(control.label)}: {_counted([_better(metric, pair) for pair in found], JUDGED)}"
    worst = max(found, key=lambda pair: _worse(metric, pair))
    if _worse(metric, worst) <= 0:
        return text
    return f"{text}; the largest loss on {isolated(worst.subject.name)}, {_said(metric, worst)}"


def _mixed(metric: Metric, controls: Sequence[Stage]) -> Fact | None:
    found = [pair for pair in pairs(metric, "mixed") if pair.way or not metric.side]
    return Fact(metric.name, f"of {_line(metric, found[0], controls)}.") if found else None


def _against(metric: Metric, control: Stage) -> Fact | None:
    clauses, certain = [], []
    for group, words in AGAINST.items():
        found = pairs(metric, group, control.key, "merged")
        ways = [pair.way if group == "forget" else _better(metric, pair) for pair in found]
        if found:
            clauses.append(f"{_counted(ways, words, NOUNS[group])}")
        certain += [pair for pair in found if pair.way]
    if metric.side and not certain:
        return None
    largest = sorted(certain, key=lambda pair: -abs(_worse(metric, pair)))
    shown = largest if len(largest) <= LISTED else largest[:LEAST]
    end = f". The {LEAST} largest differences:" if len(largest) > LISTED else "."
    lines = tuple(_line(metric, pair, (), STANDS) for pair in shown)
    return Fact(metric.name, "; ".join(clauses) + end, lines) if clauses else None


def _brought_back(metric: Metric, scores: Scores) -> Fact | None:
    """The largest share of what was forgotten that an attack brings back, for the merge and for each control."""
    mine = [entry for entry in scores.recovered if entry.metric == metric.name]
    judged = {stage for stage, _ in metric.cells}
    told = [stage for stage in (*scores.of_kind("merged"), *scores.of_kind("control")) if stage.key in judged]
    if not told:
        return None
    clauses = []
    for stage in told:
        found = [entry for entry in mine if entry.stage == stage.key]
        largest = max(found, key=lambda entry: entry.value, default=None)
        who = "" if stage.kind == "merged" else f"{isolated(stage.label)} "
        clauses.append(
            f"{who}{_largest(metric, largest) if largest else _nothing(scores.metric(str(metric.of)), stage)}"
        )
    return Fact(metric.name, f"brings back {'; '.join(clauses)}.")


def _nothing(before: Metric | None, stage: Stage) -> str:
    """Why there is no share that comes back."""
    changes = [before.change(stage.key, "base", subject.name) for subject in before.subjects] if before else []
    paired = [change for change in changes if change is not None and change.interval is not None]
    if not paired or any(change.way for change in paired):
        return "an unknown share"
    return "nothing, since nothing was forgotten for certain"


def _largest(metric: Metric, entry: Recovered) -> str:
    sure = "" if entry.interval is not None and entry.interval.low > 0 else ", not certainly anything"
    what = "" if entry.stage != "merged" else f" of the {isolated(metric.of)} that was forgotten"
    return f"up to {entry.shown}{what} (on {isolated(entry.subject)}{sure})"


def _counted(ways: Sequence[int], words: Words, noun: str = "") -> str:
    """`fell on 2 of 4, rose on 1, no certain change on 1`."""
    counts = ((words.down, ways.count(-1)), (words.up, ways.count(1)), (f"no certain {words.same}", ways.count(0)))
    clauses = [f"{word} on {count}" for word, count in counts if count]
    clauses[0] += f" of {len(ways)}{f' {noun}' if noun else ''}"
    lead = words.lead if counts[0][1] or counts[1][1] else "shows "
    return lead + ", ".join(clauses)


def _better(metric: Metric, pair: Pair) -> int:
    """1 better, -1 worse, each for certain; else 0."""
    return pair.way if metric.higher_is_better else -pair.way


def _worse(metric: Metric, pair: Pair) -> float:
    if pair.change is not None:
        return metric.worse(pair.change)
    # One of the two is infinite, such as the perplexity of a broken model.
    if pair.before.value == pair.after.value:
        return 0.0
    down = pair.before.value - pair.after.value
    return down if metric.higher_is_better else -down


def _means(metric: Metric, found: Sequence[Pair], controls: Sequence[Stage]) -> str:
    means = [
        f"base {metric.shown(fmean(pair.before.value for pair in found))}",
        f"merged {metric.shown(fmean(pair.after.value for pair in found))}",
    ]
    for control in controls:
        cells = [metric.cell(control.key, pair.subject.name) for pair in found]
        values = [cell.value for cell in cells if cell is not None]
        if len(values) == len(found):
            means.append(f"{isolated(control.label)} {metric.shown(fmean(values))}")
    return ", ".join(means)


def _unknown(names: Sequence[str]) -> str:
    return f" Not measured on both base and merged: {_listed(names)} ({len(names)})." if names else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(isolated(name, 30) for name in names[:LISTED]) + more


def _line(metric: Metric, pair: Pair, controls: Sequence[Stage], words: Words = MOVED) -> str:
    """`Europe: fell by 0.60 [0.50 0.70], 0.90 → 0.30 [0.21 0.44]; joint control 0.32 [0.22 0.45]`."""
    before, after = metric.shown(pair.before.value), metric.with_interval(pair.after)
    text = f"{isolated(pair.subject.name)}: {_said(metric, pair, words)}"
    text += f", {before} → {after}" if words is MOVED else f", {after} against {before}"
    if pair.after.below_chance:
        text += f", {OVER if pair.over else 'below chance'}{f' as {before} is' if pair.before.below_chance else ''}"
    beside = [(control, metric.cell(control.key, pair.subject.name)) for control in controls]
    # Of several only the values; each has a heading of its own.
    told = [
        (control, metric.with_interval(cell) if len(controls) == 1 else metric.shown(cell.value))
        for control, cell in beside
        if cell is not None
    ]
    return text + "".join(f"; {isolated(control.label)} {shown}" for control, shown in told)


def _said(metric: Metric, pair: Pair, words: Words = MOVED) -> str:
    """`fell by 0.60 [0.50 0.70]`, or `no certain change (−0.05 [−0.12 0.02])`."""
    if pair.change is not None and pair.way:
        return f"{words.up if pair.way > 0 else words.down} {metric.by(pair.change)}"
    moved = f"{metric.moved(pair.change)} {metric.moved_interval(pair.change)}".strip()
    return f"no certain {words.same}" + (f" ({moved})" if moved else "")
