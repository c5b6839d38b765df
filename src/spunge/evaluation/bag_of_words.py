"""Can two sets of texts be told apart without any model? Then a membership test of them says little of the model.

Logistic regression on tf-idf of words, out of fold, as Das et al. 2024 (arXiv 2406.16201) and Meeus et al. 2024 (arXiv 2406.17975)
show that members and non-members of well-known sets differ by their words alone.
"""

from collections.abc import Sequence

import numpy as np

from spunge.errors import RecipeError
from spunge.evaluation.rouge import UnicodeWords

FOLDS = 5


def told_apart(texts: Sequence[str], classes: np.ndarray, setting: str) -> np.ndarray:
    """(n,) out-of-fold scores, higher the more a text looks like class 1; the same whatever the texts' order.

    classes: (n,) of 1 and 0, two of each at least. Raises RecipeError without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise RecipeError(
            f"{setting}: needs scikit-learn; pip install 'spunge[judge]', or set baseline to false"
        ) from None
    order = sorted(range(len(texts)), key=lambda at: (texts[at], classes[at]))
    words = [UnicodeWords().tokenize(texts[at]) for at in order]
    scores = np.zeros(len(texts))
    if not any(words):
        return scores
    # A text that stands twice is never on both sides of a fold.
    groups = np.unique([texts[at] for at in order], return_inverse=True)[1]
    folds = StratifiedGroupKFold(min(FOLDS, *np.bincount(classes.astype(int))), shuffle=True, random_state=0)
    # The empty text's word keeps a fold of texts without words from being nothing at all.
    model = make_pipeline(
        TfidfVectorizer(analyzer=lambda each: [*each, ""], sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    scores[order] = cross_val_predict(
        model, words, classes[order].astype(int), groups=groups, cv=folds, method="decision_function"
    )
    return scores
