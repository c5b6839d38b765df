"""A probe: logistic regression on the mean-pooled hidden states of a frozen model, trained on rows that somebody labelled.

A folder with `probe.json` (what it was made from) and `probe.safetensors` (its numbers); scikit-learn is needed to train
one, not to use it. The hashes of the rows that it was trained on are kept, so that it never judges rows it knows.
(Alain and Bengio 2016, arXiv 1610.01644, on reading hidden states by linear models.)
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import load_file

from spunge.data.samples import Encoded, Text, collate, encode
from spunge.errors import RecipeError
from spunge.evaluation.likelihood import batch_tokens
from spunge.evaluation.scorers.scorer import Loaded, Scorer
from spunge.files import read_json, write_json
from spunge.model.architecture import noted
from spunge.model.hub import judges_folder
from spunge.model.loading import Base, load_base
from spunge.model.memory import halved
from spunge.model.padding import grouped
from spunge.recipe.block import Place
from spunge.recipe.model import ModelSettings
from spunge.recipe.scoring import ScorerSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.writing import write_tensors

FILE = "probe.json"
FOLDS = 5
STRENGTHS = np.logspace(-4, 1, 6)  # of the regularisation, scikit-learn's C, tried by cross-validation


class Fitted(NamedTuple):
    """Logistic regression: sigmoid(weight (x - mean) / deviation + bias)."""

    weight: np.ndarray  # (d,)
    bias: float
    mean: np.ndarray  # (d,)
    deviation: np.ndarray  # (d,)
    auroc: float  # out of fold
    strength: float

    def probabilities(self, states: np.ndarray) -> np.ndarray:  # (n, d) -> (n,)
        chances: np.ndarray = 1 / (1 + np.exp(-((states - self.mean) / self.deviation @ self.weight + self.bias)))
        return chances


@dataclass(frozen=True)
class Probe:
    """A trained probe with its model in memory."""

    base: Base
    blocks: tuple[int, ...]
    max_length: int
    fitted: Fitted
    known: frozenset[int]  # hashes of the rows that it was trained on

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:  # (n,)
        return self.fitted.probabilities(text_states(self.base, texts, self.blocks, self.max_length))

    def refuse(self, texts: Iterable[str], what: str) -> None:
        """Raises RecipeError when it was trained on one of the texts."""
        shared = sum(row_hash(text) in self.known for text in texts)
        if shared:
            raise RecipeError(
                f"evaluate.scorer: the probe was trained on {shared} of the {what}; train it on rows of its own "
                "(`spunge probe --where`)"
            )


def is_probe(path: str) -> bool:
    return os.path.isfile(Path(os.path.expanduser(path)) / FILE)


def read_description(path: str) -> dict[str, Any]:
    """probe.json. Raises RecipeError where it is damaged."""
    content = read_json(Path(os.path.expanduser(path)) / FILE)
    if not isinstance(content, dict) or "blocks" not in content:
        raise RecipeError(f"evaluate.scorer: {path!r} has a damaged {FILE}; train the probe again")
    return content


def load_probe(path: str) -> Probe:
    """Raises RecipeError where its model is missing or is not the one that it was trained on."""
    content, folder = read_description(path), Path(os.path.expanduser(path))
    base = frozen_model(content["model"], content["revision"], max(content["blocks"]))
    if Checkpoint(base.folder).fingerprint() != content["weights"]:
        raise RecipeError(
            f"evaluate.scorer: {content['model']!r} is not the model that the probe {path!r} was trained on"
        )
    numbers = load_file(folder / "probe.safetensors")
    fitted = Fitted(
        numbers["weight"],
        float(numbers["bias"][0]),
        numbers["mean"],
        numbers["deviation"],
        content["auroc"],
        content["strength"],
    )
    return Probe(base, tuple(content["blocks"]), content["max_length"], fitted, frozenset(numbers["rows"].tolist()))


def frozen_model(path: str, revision: str | None, last: int | None, setting: str = "evaluate.scorer") -> Base:
    """The first blocks of a model of its own in memory: the judged one's weights change. Always in float32, so that a score
    does not depend on the machine."""
    settings = ModelSettings(path=path, revision=revision, dtype="float32")
    return load_base(judges_folder(settings, setting), settings, last, setting)


def save_probe(folder: Path, fitted: Fitted, texts: Sequence[str], description: dict[str, Any]) -> None:
    """Write the folder; probe.json last."""
    hashes = np.array(sorted({row_hash(text) for text in texts}), dtype=np.int64)
    arrays = {"weight": fitted.weight, "mean": fitted.mean, "deviation": fitted.deviation}
    arrays |= {"bias": np.array([fitted.bias]), "rows": hashes}
    write_tensors(folder / "probe.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()})
    write_json(folder / FILE, {**description, "auroc": fitted.auroc, "strength": fitted.strength})


def row_hash(text: str) -> int:
    """63 bits that stand for a text; white space around it does not count."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big") >> 1


def default_blocks(depth: int) -> list[int]:
    """Two blocks, at 0.4 and two thirds of the depth."""
    return sorted({round(0.4 * depth), min(depth - 1, round(2 * depth / 3))})


@torch.inference_mode()
def pooled_states(base: Base, coded: Sequence[Encoded], blocks: Sequence[int], last: bool = False) -> np.ndarray:
    """Hidden states after each of the blocks, averaged over a text's tokens, or of its last one:
    (n, len(blocks) * hidden size) float32."""
    sizes = [len(text.ids) for text in coded]
    pooled: dict[int, np.ndarray] = {}

    def means(rows: Sequence[int]) -> np.ndarray:
        batch = collate([coded[row] for row in rows], base.device)
        inner = getattr(base.model, base.model.base_model_prefix, base.model)  # without the output layer
        inner(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        lengths = batch.mask.sum(dim=1, keepdim=True)
        at = torch.arange(batch.mask.shape[1], device=lengths.device)
        weights = (at == lengths - 1).float() if last else batch.mask.float() / lengths
        if any(states.ndim != 3 for states in seen.values()):
            raise RecipeError(
                f"evaluate: {type(base.model).__name__} keeps several hidden states for each token, which are not read here"
            )
        parts = [torch.einsum("bt,btd->bd", weights, seen[block].to(weights.device).float()) for block in blocks]
        seen.clear()
        mean: np.ndarray = torch.cat(parts, dim=1).cpu().numpy()
        return mean

    with noted(base.model, blocks) as seen:
        for rows, states in halved(grouped(sizes, batch_tokens(base)), sizes, means, "evaluate"):
            pooled.update(zip(rows, states, strict=True))
    return np.stack([pooled[row] for row in range(len(coded))])


def text_states(base: Base, texts: Sequence[str], blocks: Sequence[int], max_length: int) -> np.ndarray:
    """pooled_states of plain texts; an empty one counts as its start token, or a space."""
    coded = [encode(Text("", text), base.tokenizer, base.reach(max_length)) for text in texts]
    blank = encode(Text("", " "), base.tokenizer, max_length)
    return pooled_states(base, [each if each.ids else blank for each in coded], blocks)


def fit(states: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Fitted:
    """Logistic regression on standardised states (n, d), labels (n,) 0 or 1; C and the AUROC by cross-validation.

    groups (n,): rows of one group are never on both sides of a fold. Raises RecipeError without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise RecipeError("probe: needs scikit-learn; pip install 'spunge[judge]'") from None
    mean, deviation = states.mean(axis=0), states.std(axis=0) + 1e-6
    scaled = (states - mean) / deviation
    names = np.arange(len(labels)) if groups is None else groups
    folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(scaled, labels, names))
    auroc_of: dict[float, float] = {}
    for strength in STRENGTHS:
        scores = np.empty(len(labels))
        for train, test in folds:
            model = LogisticRegression(C=strength, max_iter=500).fit(scaled[train], labels[train])
            scores[test] = model.decision_function(scaled[test])
        auroc_of[strength] = float(roc_auc_score(labels, scores))
    best = max(auroc_of, key=lambda strength: auroc_of[strength])
    model = LogisticRegression(C=best, max_iter=500).fit(scaled, labels)
    return Fitted(model.coef_[0], float(model.intercept_[0]), mean, deviation, auroc_of[best], float(best))


class ProbeSettings(ScorerSettings):
    kind: str = "probe"
    path: Annotated[str, Place("file")] = Field(description="The folder that `spunge probe` wrote.")


def load(settings: ProbeSettings) -> Loaded:
    """A linear probe of your own on a frozen model's hidden states (`spunge probe`)."""
    probe = load_probe(settings.path)
    return Loaded(probe.probabilities, probe.refuse)


def instrument(settings: ProbeSettings) -> dict[str, Any]:
    """The model it reads, what it was trained on, and how well it told."""
    content = read_description(settings.path)
    made = {key: content[key] for key in ("model", "weights", "blocks", "label", "where", "rows", "auroc")}
    return {"scorer": "probe", **made}


PROBE = Scorer(
    settings=ProbeSettings,
    source="Alain & Bengio 2016, arXiv 1610.01644",
    load=load,
    instrument=instrument,
    matches=is_probe,
)
