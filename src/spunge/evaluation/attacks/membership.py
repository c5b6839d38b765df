"""Membership inference: do the forget rows still look as if the model had been trained on them?

Min-k% probability (Shi et al. 2023, arXiv 2310.16789): the mean log-probability of a text's least likely k% of tokens,
compared between forget rows and rows of the same kind that the model has never seen. The AUROC is the chance that a
forget row scores higher than an unseen one: 0.5 when nothing tells them apart, 1 when the forget rows are all known.
Below 0.5 they look stranger than unseen ones, which gives away that they were unlearned.

    - {kind: audit, attack: membership, source: held_out.jsonl}
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from spunge.data.arrays import counted
from spunge.data.samples import PROMPT_SHARE, Samples, encode
from spunge.data.split import draw, seed_for
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.columns import sample_columns
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.likelihood import token_logs
from spunge.evaluation.membership_scores import min_k
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings

EVERYTHING = "all"


class MembershipSettings(AttackSettings):
    kind: str = "membership"
    text: str | None = Field(None, description="Column of the unseen rows with the text. Default: forget's columns.")
    prompt: str | None = Field(None, description="Column with context that is not scored; goes with completion.")
    completion: str | None = Field(None, description="Column with what is scored after the prompt.")
    messages: str | None = Field(None, description="Column with conversations, scored as forget's rows are learned.")
    k: float = Field(20.0, gt=0, le=100, description="Percent of a text's tokens, the least likely, that count.")
    rows: int = Field(200, ge=1, description="At most so many forget rows of each part, drawn at random.")
    max_length: int = Field(512, ge=2, description="Tokens of a text; longer ones are cut.")


def columns(attack: MembershipSettings, forget: Mapping[str, str]) -> dict[str, str]:
    return sample_columns(attack, forget, "evaluate.attack")


def run(base: Base, attack: MembershipSettings, target: Target, bench: Bench) -> list[Measure]:
    """Tell forget rows from unseen ones (the audit's own source) by their least likely tokens.

    The AUROC for each part, and for all of them where there are several. Each measure holds its own items. Texts without a
    token to score (a text of one token) are left out; raises RecipeError where no other is left.
    """
    unseen = Samples(target.items)
    parts = {value: _drawn(samples, attack, bench.seed, value) for value, samples in bench.forget.items()}
    every = [samples.answers_alone() for samples in (unseen, *parts.values())]
    texts = [
        text for samples in every for text in samples.texts(range(len(samples)), base.tokenizer, "evaluate.attack")
    ]
    logs = token_logs(
        base,
        [encode(text, base.tokenizer, base.reach(attack.max_length), PROMPT_SHARE) for text in texts],
        bench.progress,
    )
    scores = np.array([min_k(each.numpy(), attack.k) for each in logs])
    stops = np.cumsum([len(samples) for samples in every])
    others, *members = (each[~np.isnan(each)] for each in np.split(scores, stops[:-1]))
    by_subject = dict(zip(parts, members, strict=True))
    if len(by_subject) > 1:
        by_subject.setdefault(EVERYTHING, np.concatenate(members))
    for subject, known in {"the unseen rows": others, **by_subject}.items():
        if not len(known):
            raise RecipeError(f"evaluate.attack: no text of {subject!r} has a token to score")
    return [_measure(known, others, subject, attack, target.label) for subject, known in by_subject.items()]


def _drawn(samples: Samples, attack: MembershipSettings, seed: int, value: str) -> Samples:
    rows = draw(counted(len(samples)), attack.rows, seed_for(seed, "membership", value))
    return Samples(taken(samples.table, rows))


def _measure(
    known: np.ndarray, others: np.ndarray, subject: str, attack: MembershipSettings, label: str | None
) -> Measure:
    return Measure(
        f"min-{attack.k:g}% AUROC" + (f" {label}" if label else ""),
        np.concatenate([known, others]),
        np.concatenate([np.ones(len(known)), np.zeros(len(others))]),
        higher=None,
        target=0.5,
        combine="auroc",
        subject=subject,
        chance=0.5,
    )


MEMBERSHIP = Attack(
    settings=MembershipSettings,
    source="Shi et al. 2023, arXiv 2310.16789",
    run=run,
    of=False,
    reads=frozenset({"source", "where", "limit", "subject"}),
    rows="rows that the model has not seen",
    unseen=True,
    columns=columns,
    version=3,  # an AUROC is wanted near 0.5
)
