"""An attribute by likeness: k-means on what a model makes of the texts; parts are named by their most telling words.

    split: {by: {clusters: 4}}                                                   # the base's own hidden states
    split: {by: {clusters: 4, model: sentence-transformers/all-MiniLM-L6-v2}}    # a sentence encoder's embeddings

Words are ranked by their part in the divergence of a cluster's words from all words (pointwise Kullback-Leibler; Tomokiyo and Hurst
2003). The confidence of a row is its simplified silhouette (b - a) / b: a is its distance to its own centre, b to the next one
(Hruschka et al. 2004).
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from spunge.data.attribution import AttributeSource, Valued
from spunge.data.query import ROW
from spunge.data.unlabelled import Unlabelled, labelled_once, row_texts
from spunge.errors import RecipeError
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.evaluation.scorers.probe import default_blocks, text_states
from spunge.evaluation.similarity import load_encoder
from spunge.model.hub import judges_folder
from spunge.model.loading import load_base, model_depth
from spunge.recipe.block import Place
from spunge.recipe.split import AttributeSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.folder import description_sha256

STARTS = 10  # k-means begins anew so often, and keeps the best
SHOWN_OF = 2000  # rows that the silhouette is told of, at most
WORD = r"(?u)\b[^\W\d_][\w'-]+\b"


class ClustersSettings(AttributeSettings):
    kind: str = "clusters"
    clusters: int = Field(ge=2, description="k: how many parts.")
    model: Annotated[str, Place("model")] | None = Field(
        None,
        description="Sentence-transformers model that embeds the texts: folder or Hub id. Default: the recipe's model before any "
        "teaching, its hidden states at 0.4 of the depth, averaged over a text's tokens.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the encoder on the Hub.")
    max_length: int = Field(256, ge=2, description="Tokens of a text that the recipe's model reads.")
    words: int = Field(3, ge=1, le=10, description="Words that name a part.")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Rows nearer than this to another part's centre are in no part: simplified silhouette, 0 on the border, 1 on "
        "the own centre. Default: every row is in the nearest part.",
    )
    seed: int = Field(0, ge=0, description="Of k-means. The recipe's seed changes no part.")


def values(unlabelled: Unlabelled, settings: ClustersSettings) -> Valued:
    """Groups of texts that are alike: k-means on the base's hidden states or a sentence encoder's embeddings."""
    setting = f"{unlabelled.setting}.clusters"
    read = row_texts(unlabelled)
    if len(set(read.texts)) < settings.clusters:
        raise RecipeError(
            f"{setting}: {settings.clusters}: the rows have {len(set(read.texts))} different texts; give fewer"
        )
    made_from = [
        "clusters",
        CLUSTERS.version,
        settings.model_dump(exclude={"threshold", "words"}),
        _model_key(unlabelled, settings),
        read.texts,
    ]
    known = labelled_once(made_from, lambda: _grouped(read.texts, _states(read.texts, unlabelled, settings), settings))
    called = telling_words(read.texts, np.array(known["cluster"]), settings.clusters, settings.words)
    confident = np.array(known["confidence"]) >= (settings.threshold or 0.0)
    names = [called[at] if sure else None for at, sure in zip(known["cluster"], confident.tolist(), strict=True)]
    of_row = dict(zip(read.rows.tolist(), names, strict=True))
    rows = unlabelled.rows.tolist()
    sizes = ", ".join(f"{name!r} {known['cluster'].count(at)}" for at, name in enumerate(called))
    told = f"{settings.clusters} clusters ({sizes}): silhouette {known['silhouette']:.2f} (1: far apart, 0: no border between them)"
    if settings.threshold is not None:
        told += f"; {int((~confident).sum())} rows below the threshold {settings.threshold:g} are in none"
    lines = {ROW: pa.array(rows, pa.int64()), "value": pa.array([of_row.get(row) for row in rows], pa.string())}
    return Valued(pa.table(lines), notes=(f"{unlabelled.setting}: {told}",))


def _model_key(unlabelled: Unlabelled, settings: ClustersSettings) -> object:
    """What tells the model that reads the texts from others, and how it reads them."""
    if settings.model is not None:
        return fingerprint_of(settings.model, settings.revision, f"{unlabelled.setting}.model")
    folder = judges_folder(unlabelled.model, "model.path")
    return [Checkpoint(folder).fingerprint(), description_sha256(folder)]


def _states(texts: Sequence[str], unlabelled: Unlabelled, settings: ClustersSettings) -> np.ndarray:  # (n, d)
    """What the model makes of each text: of the base standardised, as some entries of its states are far larger than others; of
    length 1."""
    if settings.model is not None:
        encoder = load_encoder(settings.model, settings.revision, None, f"{unlabelled.setting}.model")
        made = np.asarray(encoder.encode(list(texts), show_progress_bar=False, convert_to_numpy=True), dtype=np.float64)
    else:
        # In float32, so that no part depends on the machine.
        asked = unlabelled.model.model_copy(update={"dtype": "float32", "train_in": None, "device_map": None})
        folder = judges_folder(asked, "model.path")
        [block, *_] = default_blocks(model_depth(folder, asked))
        base = load_base(folder, asked, block, "model.path")
        made = text_states(base, texts, [block], settings.max_length).astype(np.float64)
        made = (made - made.mean(axis=0)) / (made.std(axis=0) + 1e-6)
    return np.asarray(made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12))


def _grouped(texts: Sequence[str], states: np.ndarray, settings: ClustersSettings) -> dict[str, Any]:
    """Which cluster each text is in, largest first, how surely, and the silhouette."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise RecipeError("split.by.clusters: needs scikit-learn; pip install 'spunge[judge]'") from None
    k = settings.clusters
    means = KMeans(n_clusters=k, n_init=STARTS, random_state=settings.seed).fit(states)
    order = np.argsort(-np.bincount(means.labels_, minlength=k), kind="stable")
    cluster = np.argsort(order)[means.labels_]
    if len(np.unique(cluster)) < k:
        raise RecipeError(
            f"split.by.clusters: {k}: the texts are only {len(np.unique(cluster))} to the model; give fewer"
        )
    distances = np.sort(means.transform(states), axis=1)
    confidence = 1 - distances[:, 0] / np.maximum(distances[:, 1], 1e-12)
    chosen = min(len(states), SHOWN_OF)
    silhouette = 0.0
    if k < len(states):
        silhouette = float(silhouette_score(states, cluster, sample_size=chosen, random_state=settings.seed))
    return {
        "cluster": cluster.tolist(),
        "confidence": np.round(np.clip(confidence, 0, 1), 6).tolist(),
        "silhouette": silhouette,
    }


def telling_words(texts: Sequence[str], cluster: np.ndarray, k: int, count: int) -> list[str]:
    """A name for each cluster: the words by which it differs most from all rows together.

    A word's score is p log(p / q), with its share p of the cluster's words and q of all words: one that is as frequent everywhere
    tells nothing.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    for stop in ("english", None):
        counter = CountVectorizer(stop_words=stop, token_pattern=WORD)
        try:
            counts = counter.fit_transform(texts)
        except ValueError:  # no word is left
            continue
        break
    else:
        return [f"cluster {at + 1}" for at in range(k)]
    words, names = counter.get_feature_names_out(), list[str]()
    of_cluster = np.stack([np.asarray(counts[cluster == at].sum(axis=0)).ravel() for at in range(k)])
    overall = of_cluster.sum(axis=0) / of_cluster.sum()
    share = of_cluster / np.maximum(of_cluster.sum(axis=1, keepdims=True), 1)
    scores = share * np.log(np.where(share > 0, share, 1) / np.where(overall > 0, overall, 1))
    for at in range(k):
        best = [word for word in np.argsort(-scores[at], kind="stable")[:count] if scores[at][word] > 0]
        name = " ".join(str(words[word]) for word in best)
        names.append(name if name and name not in names else f"{name or 'cluster'} {at + 1}")
    return names


CLUSTERS = AttributeSource(
    settings=ClustersSettings,
    source="k-means (scikit-learn)",
    values=values,
    title=lambda query, settings: f"{settings.clusters} clusters",
    fits=lambda query, settings: False,
)
