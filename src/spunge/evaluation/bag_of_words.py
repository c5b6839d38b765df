"""Can two sets of texts be told apart without any model? Then a membership test of them says little of the model.

Logistic regression on tf-idf of words, out of fold, as Das et al. 2024 (arXiv 2406.16201) and Meeus et al. 2024 (arXiv 2406.17975)
show that members and non-members of well-known sets differ by their words alone.
"""

from collections.abc import Sequence

import numpy as np

from spunge.errors import RecipeError
from spunge.evaluation.rouge import UnicodeWords

FOLDS = 5


def told_apart(
    texts: Sequence[str], classes: np.ndarray, setting: str, clusters: Sequence[object] | None = None
) -> np.ndarray:
    """(n,) out-of-fold scores, higher the more a text looks like class 1; the same whatever the texts' order.

    classes: (n,) of 1 and 0, two of each at least. clusters: (n,) what each text is about, two for either class at least: all texts
    about one thing lie in one fold, since the name of an author who was seen in training would tell his other texts. Raises
    RecipeError without scikit-learn.
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
    about = list(texts) if clusters is None else [str(cluster) for cluster in clusters]
    groups = np.unique([about[at] for at in order], return_inverse=True)[1]
    apart = [len({about[at] for at in range(len(texts)) if classes[at] == side}) for side in (0, 1)]
    fewest = apart if clusters is not None else np.bincount(classes.astype(int)).tolist()
    folds = StratifiedGroupKFold(min(FOLDS, *fewest), shuffle=True, random_state=0)
    # The empty text's word keeps a fold of texts without words from being nothing at all.
    model = make_pipeline(
        TfidfVectorizer(analyzer=lambda each: [*each, ""], sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    scores[order] = cross_val_predict(
        model, words, classes[order].astype(int), groups=groups, cv=folds, method="decision_function"
    )
    return scores
