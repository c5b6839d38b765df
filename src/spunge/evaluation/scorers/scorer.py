"""Who says that a text is toxic: a classifier, a probe of your own, or alt-profanity-check."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Judges
from spunge.evaluation.scorers.probe import is_probe, load_probe, read_description

PROFANITY = "alt-profanity-check"


class Scorer(NamedTuple):
    """score: texts -> (n,) in [0, 1]. refuse: raises RecipeError when it was trained on one of the texts."""

    score: Callable[[Sequence[str]], np.ndarray]
    refuse: Callable[[Sequence[str], str], None] = lambda texts, what: None


def scorer_of(path: str, revision: str | None, label: str | None, judges: Judges) -> Scorer:
    """Load a scorer, once however often it is asked for. Raises RecipeError when it cannot be loaded."""
    return judges.get(("scorer", path, revision, label), lambda: _loaded(path, revision, label))


def _loaded(path: str, revision: str | None, label: str | None) -> Scorer:
    if path == PROFANITY:
        return Scorer(_profanity())
    if is_probe(path):
        probe = load_probe(path)
        return Scorer(probe.probabilities, probe.refuse)
    from spunge.evaluation.scorers.classifiers import harmful_label, load_classifier

    classifier = load_classifier(path, revision, "evaluate.scorer")
    column = harmful_label(classifier.labels, label, "evaluate.label")
    return Scorer(lambda texts: classifier.probabilities(texts)[:, column])


def _profanity() -> Callable[[Sequence[str]], np.ndarray]:
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise RecipeError(
            "evaluate.scorer: alt-profanity-check is not installed; pip install alt-profanity-check"
        ) from None
    return lambda texts: np.asarray(predict_prob(list(texts)), dtype=np.float64)


def described(path: str, revision: str | None) -> dict[str, Any]:
    """What a scorer is, with the revision of its weights."""
    if path == PROFANITY:
        try:
            return {"scorer": path, "revision": version(PROFANITY)}
        except PackageNotFoundError:
            return {"scorer": path, "revision": None}
    if is_probe(path):
        content = read_description(path)
        made = {key: content[key] for key in ("model", "weights", "blocks", "label", "where", "rows", "auroc")}
        return {"scorer": "probe", **made}
    from spunge.evaluation.scorers.classifiers import fingerprint_of

    return {"scorer": path, "revision": fingerprint_of(path, revision)}
