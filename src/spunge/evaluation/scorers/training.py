"""`spunge probe`: train a scorer of your own from labelled rows, to judge completions where no classifier is at hand."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.data.selection import select_rows
from spunge.data.split import draw, seed_for, split_rows
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.scorers.probe import (
    FILE,
    FOLDS,
    default_blocks,
    fit,
    frozen_model,
    row_hash,
    save_probe,
    text_states,
)
from spunge.files import read_json
from spunge.recipe.loading import load_recipe
from spunge.recipe.rows import Source
from spunge.recipe.schema import Recipe
from spunge.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Trained:
    """A probe's folder and what its probe.json says."""

    folder: Path
    description: dict[str, Any]


def train_probe(
    model: str,
    rows: str | Path,
    text: str,
    label: str,
    out: str | Path,
    *,
    where: str | None = None,
    blocks: list[int] | None = None,
    limit: int | None = None,
    max_length: int = 128,
    revision: str | None = None,
    forget: Recipe | str | Path | None = None,
    seed: int = 0,
) -> Trained:
    """Train a probe on the mean-pooled hidden states of a frozen model.

    model: folder or Hub id. rows: file, folder or glob. text: column or SQL expression. label: SQL condition, true for what
    is to be scored high. blocks: whose states; by default two, at 0.4 and 2/3 of the depth. forget: a recipe; rows that it
    forgets, or trains on as retain rows, are refused. Raises RecipeError for those, for fewer than 10 rows of a class, and where
    `out` holds something else.
    """
    folder = Path(os.path.expanduser(out)).resolve()
    if (
        os.path.exists(folder)
        and any(folder.iterdir() if folder.is_dir() else [folder])
        and not (folder / FILE).exists()
    ):
        raise RecipeError(f"--out: {str(folder)!r} exists and is no probe; give another folder")
    texts, labels = _labelled(Path(rows), text, label, where, limit, seed)
    if forget is not None:
        _refuse_forgotten(texts, forget if isinstance(forget, Recipe) else load_recipe(forget))
    name = str(Path(os.path.expanduser(model)).resolve()) if os.path.isdir(os.path.expanduser(model)) else model
    base = frozen_model(name, revision, max(blocks) if blocks else None, "--model")
    chosen = sorted(set(blocks)) if blocks else default_blocks(base.depth)
    if chosen[0] < 0 or chosen[-1] >= base.depth:
        raise RecipeError(f"--block: {chosen} are not all among the model's blocks 0 to {base.depth - 1}")
    fitted = fit(text_states(base, texts, chosen, max_length), labels)
    description = {
        "model": name,
        "revision": revision,
        "weights": Checkpoint(base.folder).fingerprint(),
        "blocks": chosen,
        "max_length": max_length,
        "text": text,
        "label": label,
        "where": where,
        "rows": len(texts),
        "positive": int(labels.sum()),
        "folds": FOLDS,
    }
    save_probe(folder, fitted, texts, description)
    return Trained(folder, read_json(folder / FILE))


def _labelled(
    rows: Path, text: str, label: str, where: str | None, limit: int | None, seed: int
) -> tuple[list[str], np.ndarray]:
    query = Query(read_rows([Source(path=os.path.expanduser(rows))], "--rows"))
    chosen = draw(query.where(where, "--where"), limit, seed_for(seed, "probe"))
    named = {"text": text, "label": f"CAST({query.sql(label, '--label')} AS BOOLEAN)"}
    table = taken(query.project(named, "--"), chosen)
    known = table.filter(pa.compute.is_valid(table["label"]))
    labels = np.array(known["label"].to_pylist(), dtype=np.int64)
    for name, count in (("meet", int(labels.sum())), ("do not meet", int((1 - labels).sum()))):
        if count < 10:
            raise RecipeError(f"--label: {count} rows {name} {label!r}; a probe needs at least 10 of each kind")
    return [str(text) for text in known["text"].to_pylist()], labels


def _refuse_forgotten(texts: list[str], recipe: Recipe) -> None:
    own = {row_hash(text) for text in texts}
    trained = [part.samples for part in split_rows(recipe).parts]
    trained += [select_rows(recipe.retain, recipe, "retain").samples] if recipe.retain else []
    for samples in trained:
        shared = sum(row_hash(text) in own for text in samples.words())
        if shared:
            raise RecipeError(
                f"--forget: {shared} of the rows are trained on by that recipe; give the probe rows of its own (--where)"
            )
