"""Parts by likeness: known groups come out as groups, under their own words, the same each time; no text is read twice."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError
from spunge.evaluation.attributes import clusters
from spunge.evaluation.attributes.clusters import ClustersSettings, telling_words
from spunge.files import cache_folder
from spunge.recipe.loading import load_recipe

ANIMALS = [
    f"the {one} and the {two} {what}"
    for one in ("dog", "cat")
    for two in ("fish", "bird")
    for what in ("runs", "sleeps")
]
PLACES = [f"city of {one} village {two}" for one in ("rome", "paris", "tokyo") for two in ("east", "west")]
ROWS = [{"text": text} for text in [*ANIMALS, *PLACES]]


@pytest.fixture
def parts_of(tiny: Callable[..., Path], write_rows: Callable[..., Path]) -> Callable[..., Parts]:
    """parts_of({"clusters": 2}) -> the parts of two kinds of rows."""

    def parts(by: dict[str, Any], model: Path | None = None, **split: Any) -> Parts:
        forget = {"source": str(write_rows("rows.jsonl", ROWS))}
        split = {"by": by, **split}
        path = str(model or tiny("llama"))
        recipe = {"model": {"path": path}, "forget": forget, "split": split, "unlearn": {"method": "tvn"}}
        return split_rows(load_recipe(recipe))

    return parts


def members(parts: Parts) -> dict[str, list[str]]:
    return {part.value: part.samples.table["text"].to_pylist() for part in parts.parts}


def test_two_kinds_of_texts_are_two_parts_named_by_their_words(parts_of: Callable[..., Parts]) -> None:
    parts = parts_of({"clusters": 2, "words": 2})
    assert sorted(map(sorted, members(parts).values())) == sorted(map(sorted, (ANIMALS, PLACES)))
    [animals] = [name for name, texts in members(parts).items() if set(texts) == set(ANIMALS)]
    assert set(animals.split()) < {"dog", "cat", "fish", "bird", "runs", "sleeps"}
    assert parts.attribute == "2 clusters"
    assert "2 clusters (" in parts.notes[0]
    assert "silhouette 0." in parts.notes[0]


def test_the_same_texts_are_read_once_and_another_threshold_reads_nothing(
    parts_of: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parts_of({"clusters": 2})

    def never(*_: Any) -> np.ndarray:
        raise AssertionError("the texts are read again")

    monkeypatch.setattr(clusters, "_states", never)
    assert members(parts_of({"clusters": 2})) == members(first)
    sure = parts_of({"clusters": 2, "threshold": 0.3}, unassigned="keep")
    assert sure.unassigned == 0
    assert sum(part.rows for part in sure.parts) == len(ROWS)
    assert parts_of({"clusters": 2, "threshold": 0.0}).unassigned == 0
    assert parts_of({"clusters": 2, "threshold": 0.3}).unassigned == len(members(sure).get("unassigned", []))
    with pytest.raises(AssertionError, match="read again"):
        parts_of({"clusters": 3})


def test_the_texts_are_read_again_by_a_model_that_reads_them_otherwise(
    parts_of: Callable[..., Parts], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    parts_of({"clusters": 2}, model)

    def asked(*_: Any) -> np.ndarray:
        raise AssertionError("the texts are read again")

    monkeypatch.setattr(clusters, "_states", asked)
    parts_of({"clusters": 2}, model)
    file = model / "tokenizer.json"  # the same weights, another tokenizer
    file.write_text(file.read_text().replace("tokyo", "kyoto"))
    with pytest.raises(AssertionError, match="read again"):
        parts_of({"clusters": 2}, model)


def test_kept_labels_that_are_damaged_are_made_again_and_hold_no_word_of_the_rows(
    parts_of: Callable[..., Parts],
) -> None:
    first = members(parts_of({"clusters": 2}))
    [kept] = (cache_folder() / "labels").iterdir()
    whole = kept.read_text()
    assert not [word for text in ANIMALS + PLACES for word in text.split() if len(word) > 3 and word in whole]
    kept.write_text(whole.replace('"cluster": [0', '"cluster": [1').replace('"cluster": [1, 1', '"cluster": [0, 1'))
    assert kept.read_text() != whole
    assert members(parts_of({"clusters": 2})) == first
    assert kept.read_text() == whole


def test_more_parts_than_texts_are_refused(parts_of: Callable[..., Parts]) -> None:
    with pytest.raises(
        RecipeError, match=f"split.by.clusters: 99: the rows have {len(ROWS)} different texts; give fewer"
    ):
        parts_of({"clusters": 99})


def test_a_sentence_encoder_is_asked_where_one_is_named(
    parts_of: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]
) -> None:
    class Encoder:
        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[1.0, 0.1 * text.count("runs")] if "dog" in text else [0.0, 1.0] for text in texts])

    asked: list[str] = []
    monkeypatch.setattr(clusters, "load_encoder", lambda path, *_: asked.append(path) or Encoder())
    parts = parts_of({"clusters": 2, "model": str(tiny("llama"))})
    dogs = [text for text in ANIMALS if "dog" in text]
    assert sorted(map(len, members(parts).values())) == sorted((len(dogs), len(ROWS) - len(dogs)))
    assert asked == [str(tiny("llama"))]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["cat cat dog", "cat dog", "tree tree", "tree dog"], ["cat", "tree"]),
        (["the of", "the", "to", "to"], ["the", "to"]),  # nothing but stop words
        (["1", "2", "3", "4"], ["cluster 1", "cluster 2"]),
        (["cat", "cat", "cat", "cat"], ["cluster 1", "cluster 2"]),  # the same words everywhere
    ],
)
def test_a_cluster_is_named_by_what_it_has_and_others_have_not(texts: list[str], expected: list[str]) -> None:
    assert telling_words(texts, np.array([0, 0, 1, 1]), 2, 1) == expected


def test_the_confidence_is_the_simplified_silhouette() -> None:
    states = np.array([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0], [0.9, 0.1], [0.45, 0.55]])
    made = clusters._grouped(list("abcde"), states, ClustersSettings(clusters=2))
    centres = np.stack([states[np.array(made["cluster"]) == at].mean(axis=0) for at in range(2)])
    away = np.linalg.norm(states[:, None] - centres[None], axis=-1)
    expected = [(b - a) / b for a, b in (sorted(row) for row in away)]
    assert np.allclose(made["confidence"], expected, atol=1e-5)
