"""An attribute by labels in words: a model of natural language inference says which of them a text entails (Yin et al. 2019,
arXiv 1909.00161), through transformers' own pipeline.

    split: {by: {zero_shot: [biology, chemistry, computer security], threshold: 0.6}}
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator

from spunge.data.attribution import AttributeSource, Valued
from spunge.data.unlabelled import Unlabelled, labelled_once, lines_of
from spunge.errors import RecipeError
from spunge.evaluation.attributes.scored import DIGITS, held_labels
from spunge.evaluation.scorers.classifiers import fingerprint_of, load_classifier
from spunge.recipe.block import Place
from spunge.recipe.split import AttributeSettings

MODEL = "facebook/bart-large-mnli"  # the pipeline's own default
BATCH = 8  # pairs of a text and a label
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class ZeroShotSettings(AttributeSettings):
    kind: str = "zero_shot"
    zero_shot: list[Label] = Field(min_length=2, description="The labels, in words that say what a text is about.")
    model: Annotated[str, Place("model")] = Field(
        MODEL, description="Model of natural language inference, one of whose labels is entailment: folder or Hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of it on the Hub.")
    hypothesis: str = Field("This example is {}.", description="What a text is to entail; {} stands for the label.")
    several: bool = Field(False, description="A row may have several labels, or none: each is judged by itself.")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Rows whose best label has a lower score are in no part; with several, a row gets every label that reaches it "
        "(default: 0.5).",
    )

    @field_validator("zero_shot")
    @classmethod
    def _different(cls, labels: list[str]) -> list[str]:
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice")
        return labels

    @field_validator("hypothesis")
    @classmethod
    def _with_a_label(cls, hypothesis: str) -> str:
        if hypothesis.count("{}") != 1 or hypothesis.count("{") != 1:
            raise ValueError(f"{hypothesis!r}: {{}} must stand in it once, for the label")
        return hypothesis


def values(unlabelled: Unlabelled, settings: ZeroShotSettings) -> Valued:
    """Which of some labels in words a text entails, by a model of natural language inference."""
    setting, labels = f"{unlabelled.setting}.model", settings.zero_shot
    revision = fingerprint_of(settings.model, settings.revision, setting)
    pipeline = cache(lambda: _pipeline(settings, setting))

    def labels_of(texts: list[str]) -> list[list[str]]:
        made_from = ["zero_shot", ZERO_SHOT.version, revision, labels, settings.hypothesis, settings.several, texts]
        known = labelled_once(made_from, lambda: {"scores": _scores(texts, settings, pipeline)})
        return held_labels(labels, known["scores"], settings.threshold, settings.several)

    return Valued(lines_of(unlabelled, labels_of))


def _pipeline(settings: ZeroShotSettings, setting: str) -> Any:
    """Raises RecipeError for a model of anything else than natural language inference."""
    from transformers import ZeroShotClassificationPipeline

    loaded = load_classifier(settings.model, settings.revision, setting)
    numbered = {label: at for at, label in enumerate(loaded.labels)}
    entailment, known = (
        [at for label, at in named.items() if label.lower().startswith("entail")]
        for named in (numbered, loaded.model.config.label2id)
    )
    if len(entailment) != 1 or entailment != known:
        raise RecipeError(
            f"{setting}: none of the labels of {settings.model!r} is entailment ({', '.join(loaded.labels)}); give a model of "
            "natural language inference, such as one trained on MNLI"
        )
    loaded.tokenizer.model_max_length = loaded.max_length  # a longer text loses its end
    return ZeroShotClassificationPipeline(model=loaded.model, tokenizer=loaded.tokenizer, device=loaded.model.device)


def _scores(texts: list[str], settings: ZeroShotSettings, pipeline: Callable[[], Any]) -> list[list[float]]:
    """(n, labels): the share of each label's entailment, or its own probability. Raises RecipeError."""
    if not texts:
        return []
    answers = pipeline()(
        texts,
        candidate_labels=list(settings.zero_shot),
        hypothesis_template=settings.hypothesis,
        multi_label=settings.several,
        batch_size=BATCH,
    )
    scores = [dict(zip(answer["labels"], answer["scores"], strict=True)) for answer in answers]
    return [[round(float(score[label]), DIGITS) for label in settings.zero_shot] for score in scores]


ZERO_SHOT = AttributeSource(
    settings=ZeroShotSettings,
    source="Yin et al. 2019, arXiv 1909.00161",
    values=values,
    title=lambda query, settings: "label by zero-shot classification",
    fits=lambda query, settings: False,
)
