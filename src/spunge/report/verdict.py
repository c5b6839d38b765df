"""What the numbers say, in sentences: only comparisons that the rows hold, with their intervals."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import Cell, Group, Metric, Scores, Stage, Subject, overlap
from spunge.report.wording import isolated

LISTED = 6  # parts that get a line each; of more, only those that moved least
LEAST = 3


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


def verdict(scores: Scores) -> list[Finding]:
    """Did it forget, for each part; what did it cost; how does the merge stand against each control."""
    controls = scores.of_kind("control")
    findings = {
        "Parts to forget": [_forgotten(metric, controls, scores.parts) for metric in scores.metrics],
        "Subjects to be kept": [_kept(metric, controls) for metric in scores.metrics],
        "All rows together": [_mixed(metric, controls) for metric in scores.metrics],
    }
    for control in controls:
        findings[f"Merged against the {isolated(control.label)}"] = [
            _against(metric, control) for metric in scores.metrics
        ]
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
            found.append(Pair(subject, one, other))
    return found


def _forgotten(metric: Metric, controls: Sequence[Stage], parts: Sequence[str]) -> Fact | None:
    found = pairs(metric, "forget")
    if not found:
        asked = any(subject.group == "forget" for subject in metric.subjects)
        return Fact(metric.name, "was measured on no part for both base and merged.") if asked else None
    # A part that was not measured must not pass for one that was forgotten.
    unknown = [part for part in parts if part not in {pair.subject.name for pair in found}]
    count = f"{len(found)} measured" if unknown else f"{len(found)}"
    fell = sum(pair.after.value < pair.before.value for pair in found)
    rose = sum(pair.after.value > pair.before.value for pair in found)
    moves = [f"{word} on {moved} of {count}" for word, moved in (("fell", fell), ("rose", rose)) if moved]
    text = f"{' and '.join(moves) or 'did not change on any'}; {_separate(found)}."
    if len(found) > 1 and metric.share:
        text += f" Mean over these parts: {_means(metric, found, controls)}."
    text += _unknown(unknown)
    shown = found
    if len(found) > LISTED:
        way = 1 if 2 * sum(metric.loss(pair.before, pair.after) > 0 for pair in found) >= len(found) else -1
        shown = sorted(found, key=lambda pair: way * metric.loss(pair.before, pair.after))[:LEAST]
        text += f" The {LEAST} that moved least that way:"
    return Fact(metric.name, text, tuple(_line(metric, pair, controls) for pair in shown))


def _unknown(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(isolated(name, 30) for name in names[:LISTED]) + (" ..." if len(names) > LISTED else "")
    return f" Not measured on both base and merged: {listed} ({len(names)})."


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


def _kept(metric: Metric, controls: Sequence[Stage]) -> Fact | None:
    found = pairs(metric, "other")
    if not found:
        return None
    worst = max(found, key=lambda pair: metric.loss(pair.before, pair.after))
    if metric.loss(worst.before, worst.after) <= 0:
        start = f"got worse on none of {len(found)}"
    else:
        start = f"lost most on {_line(metric, worst, ())}"
    others = [_worst_of(metric, control) for control in controls]
    tail = f" {_separate(found).capitalize()}." if len(found) > 1 else ""
    compared = {pair.subject.name for pair in found}
    tail += _unknown([s.name for s in metric.subjects if s.group == "other" and s.name not in compared])
    return Fact(metric.name, f"{start}.{tail}{''.join(others)}")


def _worst_of(metric: Metric, control: Stage) -> str:
    found = pairs(metric, "other", "base", control.key)
    if not found:
        return ""
    worst = max(found, key=lambda pair: metric.loss(pair.before, pair.after))
    if metric.loss(worst.before, worst.after) <= 0:
        return f" The {isolated(control.label)} got worse on none."
    change = metric.change(worst.before, worst.after)
    return f" The {isolated(control.label)} lost most on {isolated(worst.subject.name)} ({change})."


def _mixed(metric: Metric, controls: Sequence[Stage]) -> Fact | None:
    found = pairs(metric, "mixed")
    return Fact(metric.name, f"of {_line(metric, found[0], controls)}.") if found else None


def _against(metric: Metric, control: Stage) -> Fact | None:
    clauses = []
    groups: tuple[tuple[Group, str], ...] = (("forget", "parts to forget"), ("other", "subjects to be kept"))
    for group, noun in groups:
        known = [(pair, overlap(pair.before, pair.after)) for pair in pairs(metric, group, control.key, "merged")]
        judged = [(pair, shared) for pair, shared in known if shared is not None]
        if not judged:
            continue
        apart = [pair for pair, shared in judged if not shared]
        above = sum(pair.after.value > pair.before.value for pair in apart)
        clause = f"overlapping intervals on {len(judged) - len(apart)} of {len(judged)} {noun}"
        sides = [
            f"above it on {above}" if above else "",
            f"below it on {len(apart) - above}" if len(apart) > above else "",
        ]
        clauses.append(clause + "".join(f", merged lies {side}" for side in sides if side))
    return Fact(metric.name, f"has {'; '.join(clauses)}.") if clauses else None


def _separate(found: Sequence[Pair]) -> str:
    known = [shared for pair in found if (shared := overlap(pair.before, pair.after)) is not None]
    if not known:
        return "no intervals were measured"
    return f"the 95% intervals of base and merged do not overlap on {known.count(False)} of {len(known)}"


def _line(metric: Metric, pair: Pair, controls: Sequence[Stage]) -> str:
    """`Europe: 0.98 [0.90 1.00] → 0.30 [0.21 0.44] (−0.68), intervals do not overlap; joint control 0.32`."""
    shared = overlap(pair.before, pair.after)
    said = {True: ", intervals overlap", False: ", intervals do not overlap", None: ""}[shared]
    change = metric.change(pair.before, pair.after)
    text = f"{isolated(pair.subject.name)}: {metric.with_interval(pair.before)} → {metric.with_interval(pair.after)}"
    text += f" ({change})" if change else ""
    beside = [(control, metric.cell(control.key, pair.subject.name)) for control in controls]
    tail = [f"; {isolated(control.label)} {metric.with_interval(cell)}" for control, cell in beside if cell is not None]
    return text + said + "".join(tail)
