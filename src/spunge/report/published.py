"""A paper's figures beside the run's own."""

from typing import NamedTuple

from spunge.errors import printable
from spunge.report.scores import Scores
from spunge.report.wording import MISSING, name, signed


class Beside(NamedTuple):
    """A line of the table; text that is ready to be shown."""

    metric: str
    subject: str
    stage: str
    ours: str
    interval: str
    paper: str
    difference: str  # ours less the paper's
    source: str


def published(scores: Scores) -> list[Beside]:
    """A line for each of the paper's figures, in the recipe's order; what the run did not measure is `–`."""
    labels = {model.stage: model.label for model in scores.models}
    lines = []
    for entry in scores.published:
        metric = scores.metric(entry.metric)
        row = metric.row(entry.stage, entry.subject) if metric else None
        shown: tuple[str, str, str] = (MISSING, "", MISSING)
        if metric is not None and row is not None:
            bounds = " ".join(filter(None, (metric.interval(row), metric.spread(row))))
            difference = signed(row.value - entry.value, metric.share, metric.digits)
            shown = (metric.shown(row.value), bounds, difference)
        lines.append(
            Beside(
                metric=printable(entry.metric),
                subject=name(entry.subject),
                stage=printable(labels.get(entry.stage, entry.stage)),
                ours=shown[0],
                interval=shown[1],
                paper=f"{entry.value:g}",  # as printed
                difference=shown[2],
                source=printable(entry.source),
            )
        )
    return lines
