"""Membership: do texts look as if the model had been trained on them, beside texts of the same kind that it has not seen?

    - {kind: membership, source: forget.jsonl, non_members: held_out.jsonl}
    - {kind: membership, source: all.jsonl, member: "split = 'train'", scores: [min_k, reference], reference: org/other-model}

The AUROC is the chance that a member scores higher than a non-member: 0.5 where nothing tells them apart. Below 0.5 members look
stranger than unseen texts, which gives away that they were unlearned. What ends a text or an answer is none of its tokens.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.items import MEMBER
from spunge.data.samples import IGNORED, PROMPT_SHARE, Encoded, Samples, Text, encode
from spunge.errors import RecipeError, one_line
from spunge.evaluation.bag_of_words import told_apart
from spunge.evaluation.columns import sample_columns
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.fluency import load_judge
from spunge.evaluation.likelihood import likelihoods
from spunge.evaluation.membership_scores import ScoreName, member_scores
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.evaluation.statistics import score
from spunge.model.loading import Base
from spunge.recipe.block import Place
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.rows import Source, Sources
from spunge.recipe.schema import Recipe
from spunge.results import Higher

SETTING = "evaluate.membership"
FALSE = 0.01  # where nothing else is asked for
CLUSTER = "cluster"  # the role that says what a row is about
UNTOLD = 0.5  # AUROC where nothing tells members from others; below it they were unlearned so far that it shows
TELLING = 0.6  # AUROC of words alone from which on a warning is due


class MembershipSettings(EvaluatorSettings):
    kind: str = "membership"
    text: str | None = Field(None, description="Column or SQL expression with plain text. Default: forget's columns.")
    prompt: str | None = Field(
        None, description="Column or SQL expression: context that is not scored; goes with completion."
    )
    completion: str | None = Field(None, description="Column or SQL expression: what is scored after the prompt.")
    messages: str | None = Field(None, description="Column with conversations; their last answer is scored.")
    member: str | None = Field(
        None, description="Column or SQL condition that is true of members, where one source holds both."
    )
    non_members: Sources | None = Field(
        None,
        description="The source of rows that the model has not seen, with the same columns; `source` then holds members alone.",
    )
    cluster: str | None = Field(
        None,
        description="Column or SQL expression that tells what a row is about, such as its author: the bag of words never learns "
        "from rows about one and is tried on others about the same, whose names it would know again.",
    )
    scores: list[ScoreName] = Field(
        ["loss", "zlib", "min_k", "min_k++"],
        min_length=1,
        description="What texts are scored by; reference needs another model, gradient a backward pass for each text.",
    )
    k: float = Field(
        20.0, gt=0, le=100, description="Percent of a text's tokens, the lowest, that count in min_k and min_k++."
    )
    false_positives: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of non-members that may be taken for members where the true positive rate is read. Default: 0.01, where "
        "there are 100 non-members or more.",
    )
    reference: Annotated[str, Place("model")] | None = Field(
        None, description="The other model of the score of that name: folder or Hub id."
    )
    reference_revision: str | None = Field(None, description="Branch, tag or commit of the reference on the Hub.")
    reference_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="As model.dtype, of the reference."
    )
    baseline: bool = Field(
        True,
        description="Report how well a bag of words tells the two sets apart without the model, and warn where it does.",
    )
    max_length: int = Field(512, ge=2, description="Tokens of a text; longer ones are cut.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "MembershipSettings":
        if (self.member is None) == (self.non_members is None):
            raise ValueError(
                "non_members: give their source, or member, a condition that tells them from members; not both"
            )
        if ("reference" in self.scores) != (self.reference is not None):
            raise ValueError("reference: the score and the model of this name go together; give both or neither")
        return self


def columns(settings: MembershipSettings, forget: Mapping[str, str]) -> dict[str, str]:
    beside = {MEMBER: settings.member, CLUSTER: settings.cluster}
    return sample_columns(settings, forget, SETTING) | {role: given for role, given in beside.items() if given}


def check(settings: MembershipSettings, recipe: Recipe) -> None:
    """Raises RecipeError for a reference that is the base itself, beside which the base knows nothing more."""
    if settings.reference is not None and os.path.realpath(os.path.expanduser(settings.reference)) == os.path.realpath(
        os.path.expanduser(recipe.model.path)
    ):
        raise RecipeError(
            f"{SETTING}.reference: {settings.reference!r} is the base itself; give a model that has not seen the members"
        )


def others(settings: MembershipSettings) -> list[Source] | None:
    return settings.non_members


def measure(base: Base, settings: MembershipSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """AUROC and true positive rate of membership inference: loss, zlib, min-k%, min-k%++, another model, gradients."""
    rows, classes = text_rows(items), np.array(items[MEMBER].to_pylist(), dtype=np.float64)
    texts = rows.texts(range(len(rows)), base.tokenizer, SETTING)
    coded = encoded(texts, base.tokenizer, base.reach(settings.max_length))

    def by_reference() -> Sequence[float]:
        assert settings.reference is not None
        other = load_judge(
            settings.reference, settings.reference_revision, settings.reference_dtype, base, bench.judges
        )
        own = rows.texts(range(len(rows)), other.tokenizer, f"{SETTING}.reference")
        read = encoded(own, other.tokenizer, other.reach(settings.max_length))
        return [each.log for each in likelihoods(other, read, bench.progress)]

    scored = member_scores(base, texts, coded, settings.scores, settings.k, by_reference, bench.progress)
    false = false_positives(settings, classes)
    measures = []
    for name, values in scored.items():
        called = named(name, settings.k)
        measures.append(area(f"AUROC of {called}", values, classes))
        if false is not None:
            measures.append(
                Measure(
                    f"TPR at {100 * false:g}% FPR of {called}",
                    values,
                    classes,
                    higher="bad",
                    combine="detected",
                    false=false,
                    chance=false,
                )
            )
    if settings.baseline:
        said = [text.prompt + text.completion for text in texts]
        words = told_apart(said, classes, f"{SETTING}.baseline", clusters(items))
        measures.append(area("AUROC of a bag of words", words, classes, side=True))
    return measures


def metrics(settings: MembershipSettings, items: pa.Table) -> dict[str, Higher]:
    """Every metric, and what a higher value says."""
    told: dict[str, Higher] = {}
    false = false_positives(settings, np.array(items[MEMBER].to_pylist(), dtype=np.float64))
    for name in settings.scores:
        called = named(name, settings.k)
        told[f"AUROC of {called}"] = None
        if false is not None:
            told[f"TPR at {100 * false:g}% FPR of {called}"] = "bad"
    return told | ({"AUROC of a bag of words": None} if settings.baseline else {})


def area(metric: str, values: np.ndarray, classes: np.ndarray, side: bool = False) -> Measure:
    return Measure(
        metric,
        values,
        classes,
        higher=None,
        target=None if side else UNTOLD,
        combine="auroc",
        chance=None if side else UNTOLD,
        side=side,
    )


def named(name: ScoreName, k: float) -> str:
    """What metrics call a score."""
    return {"min_k": f"min-{k:g}%", "min_k++": f"min-{k:g}%++", "gradient": "gradient norm"}.get(name, name)


def text_rows(items: pa.Table) -> Samples:
    """The items' texts, without what ends an answer."""
    return Samples(
        items.drop_columns([role for role in (MEMBER, CLUSTER) if role in items.column_names])
    ).answers_alone()


def clusters(items: pa.Table) -> list[object] | None:
    """What each item is about, where that is told; one without an answer is alone."""
    if CLUSTER not in items.column_names:
        return None
    told = items[CLUSTER].to_pylist()
    return [("row", at) if value is None else value for at, value in enumerate(told)]


def encoded(texts: Sequence[Text], tokenizer: Any, length: int) -> list[Encoded]:
    return [encode(text, tokenizer, length, PROMPT_SHARE) for text in texts]


def false_positives(settings: MembershipSettings, classes: np.ndarray) -> float | None:
    """The share of false alarms at which true ones are counted; None where there are too few non-members to see it."""
    if settings.false_positives is not None:
        return settings.false_positives
    return FALSE if (classes == 0).sum() * FALSE >= 1 else None


def check_items(settings: MembershipSettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError, with rows' numbers, for sets that cannot be compared. Warns where words alone tell them apart."""
    rows, members = text_rows(items), np.array(items[MEMBER].to_pylist(), dtype=bool)
    numbers = [rows.number(at) for at in range(len(rows))]
    for what, own in (("members", members), ("non-members", ~members)):
        if own.sum() < 2:
            raise RecipeError(f"{SETTING}: {own.sum()} rows are {what}; two at least are needed to compare with")
    outside = int((~members).sum())
    if settings.false_positives is not None and outside * settings.false_positives < 1:
        raise RecipeError(
            f"{SETTING}.false_positives: {settings.false_positives:g} of {outside} non-members is less than one; give more of "
            "them, or a larger share"
        )
    texts = rows.texts(range(len(rows)), limits.tokenizer, SETTING)
    length = min(settings.max_length, limits.positions or settings.max_length)
    for at, text in enumerate(encoded(texts, limits.tokenizer, length)):
        if all(label == IGNORED for label in text.labels[1:]):
            whose = "member" if members[at] else "non-member"
            raise RecipeError(
                f"{SETTING}: row {numbers[at]} ({whose}) has no token to score after a first one; filter it out with where"
            )
    said = [" ".join((text.prompt + text.completion).split()) for text in texts]
    _refuse_shared(said, members, numbers)
    about = clusters(items)
    for what, own in (("members", members), ("non-members", ~members)):
        if about is not None and len({str(about[at]) for at in np.flatnonzero(own)}) < 2:
            raise RecipeError(
                f"{SETTING}.cluster: all {what} are about {about[int(np.flatnonzero(own)[0])]!r}; "
                "two at least are needed to compare with"
            )
    if settings.baseline:
        _warn(said, members, about)


def _refuse_shared(said: Sequence[str], members: np.ndarray, numbers: Sequence[int]) -> None:
    """Raises RecipeError for a text that is a member and a non-member."""
    known = {text: numbers[at] for at, text in reversed(list(enumerate(said))) if members[at]}
    both = [(known[text], numbers[at]) for at, text in enumerate(said) if not members[at] and text in known]
    if both:
        raise RecipeError(
            f"{SETTING}: {len(both)} rows are members and non-members (first: member row {both[0][0]}, non-member row "
            f"{both[0][1]}); leave them out of one of the two"
        )


def _warn(said: Sequence[str], members: np.ndarray, about: Sequence[object] | None) -> None:
    classes = members.astype(np.float64)
    words = area("", told_apart(said, classes, f"{SETTING}.baseline", about), classes)
    known = score([words], range(len(said)))
    if known.value >= TELLING and known.low > 0.5:
        logging.getLogger("spunge").warning(
            one_line(
                f"{SETTING}: a bag of words tells members from non-members without the model (AUROC {known.value:.2f} "
                f"[{known.low:.2f} {known.high:.2f}]), so that no score says much of the model; give non-members of the same kind"
            )
        )


def instrument(settings: MembershipSettings) -> dict[str, Any]:
    """The other model and what tells its weights from others."""
    if settings.reference is None:
        return {}
    revision = fingerprint_of(settings.reference, settings.reference_revision, f"{SETTING}.reference")
    return {"reference": settings.reference, "revision": revision}


MEMBERSHIP = Evaluator(
    settings=MembershipSettings,
    source="Shi et al. 2023, arXiv 2310.16789; Zhang et al. 2024, arXiv 2404.02936",
    measure=measure,
    columns=columns,
    metrics=metrics,
    others=others,
    beside=lambda settings: settings.reference,
    check=check,
    instrument=instrument,
    check_items=check_items,
    whole=lambda settings: "score gradient" if "gradient" in settings.scores else "",
    version=2,  # an AUROC is wanted near 0.5
)
