"""What `spunge report` prints after the table: what the numbers say, the paper's figures, the branches' spillover."""

from spunge.errors import printable
from spunge.report.headline import headline
from spunge.report.published import published
from spunge.report.scores import Scores, arranged
from spunge.report.spillover import spillover
from spunge.report.verdict import basis, verdict
from spunge.report.wording import MISSING, aligned, duration, name, shortened, size, unisolated
from spunge.results import Results

NAME = 40  # columns that a name may take


def report_text(results: Results) -> str:
    """Plain text without colour; a section that has nothing to say is left out."""
    scores = arranged(results)
    sections = (verdict_text(scores), published_text(scores), spillover_text(scores))
    return "\n".join(section for section in sections if section)


def short_text(results: Results) -> str:
    """A run in three plain sentences: what was forgotten and what it cost, what certain means here, and what it took."""
    scores = arranged(results)
    told = headline(scores)
    sure = (
        "For certain means that the 95% interval of the difference, paired by item, excludes no change."
        if scores.paired
        else ""
    )
    took = [] if results.seconds is None else [f"took {duration(results.seconds)}"]
    took += [] if results.peak_memory is None else [f"held at most {size(results.peak_memory)} of memory"]
    where = f" on {results.device}" if results.device and took else ""
    last = f"All stages together {' and '.join(took)}{where}." if took else ""
    return "".join(f"{unisolated(printable(line))}\n" for line in (told, sure, last) if line)


def verdict_text(scores: Scores) -> str:
    lines = [told for told in (headline(scores), basis(scores)) if told]
    for finding in verdict(scores):
        lines += ["", finding.heading]
        for fact in finding.facts:
            lines.append(f"  {name(fact.metric)} {fact.text}")
            lines += [f"    {line}" for line in fact.lines]
    return "".join(f"{unisolated(line)}\n" for line in lines)


def remarks_text(results: Results) -> str:
    """What to look at before some scores are believed, a line each."""
    remarks = [(each.name, remark) for each in results.evaluations for remark in each.remarks]
    return "".join(f"note: {name(evaluation)}: {printable(remark)}\n" for evaluation, remark in remarks)


def published_text(scores: Scores) -> str:
    figures = published(scores)
    if not figures:
        return ""
    head = ["metric", "subject", "stage", "ours", "", "paper", "difference", "source"]
    names = ([shortened(text, NAME) for text in line[:3]] for line in figures)
    lines = [[*mine, *line[3:]] for mine, line in zip(names, figures, strict=True)]
    return f"Beside the paper (difference: ours less the paper's)\n{aligned([head, *lines])}"


def spillover_text(scores: Scores) -> str:
    lines = [["metric", "branch", "own part", "", "others, mean", "certain on"]]
    for matrix in spillover(scores):
        for effect in matrix.effects:
            own = (effect.own.value, effect.own.interval) if effect.own else (MISSING, "")
            names = (shortened(printable(matrix.metric.name), NAME), shortened(name(effect.model.name), NAME))
            lines.append([*names, *own, effect.others, f"{effect.certain} of {effect.measured}"])
    return f"Spillover: what each branch changed against the base\n{aligned(lines)}" if len(lines) > 1 else ""
