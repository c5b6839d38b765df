"""An attribute by a classifier: the label that a text-classification model gives to a row, where nobody labelled it.

split: {by: {classifier: tomh/toxigen_roberta, threshold: 0.8}}
"""

from functools import cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from spunge.data.attribution import AttributeSource, Valued
from spunge.data.unlabelled import Unlabelled, labelled_once, lines_of
from spunge.evaluation.attributes.scored import DIGITS, held_labels
from spunge.evaluation.scorers.classifiers import fingerprint_of, load_classifier
from spunge.recipe.block import Place
from spunge.recipe.split import AttributeSettings


class ClassifierSettings(AttributeSettings):
    kind: str = "classifier"
    classifier: Annotated[str, Place("model")] = Field(
        description="Text-classification model: folder or Hub id. Its labels name the parts; split.values picks and renames them."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of it on the Hub.")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Rows whose best label is less likely are in no part. Of a model whose labels do not exclude each other a row "
        "gets all that are as likely; default: 0.5.",
    )


def values(unlabelled: Unlabelled, settings: ClassifierSettings) -> Valued:
    """The label that a text-classification model gives to a row's texts."""
    path, setting = settings.classifier, f"{unlabelled.setting}.classifier"
    revision = fingerprint_of(path, settings.revision, setting)
    loaded = cache(lambda: load_classifier(path, settings.revision, setting))

    def rated(texts: list[str]) -> dict[str, Any]:
        classifier = loaded()
        scores = np.round(classifier.probabilities(texts), DIGITS).tolist()
        return {"labels": classifier.labels, "several": classifier.separate, "scores": scores}

    def labels_of(texts: list[str]) -> list[list[str]]:
        known = labelled_once(["classifier", CLASSIFIER.version, revision, texts], lambda: rated(texts))
        return held_labels(known["labels"], known["scores"], settings.threshold, known["several"])

    return Valued(lines_of(unlabelled, labels_of))


CLASSIFIER = AttributeSource(
    settings=ClassifierSettings,
    source="transformers",
    values=values,
    title=lambda query, settings: "label by a classifier",
    fits=lambda query, settings: False,
)
