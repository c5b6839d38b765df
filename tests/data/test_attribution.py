"""Attribute sources: what every one promises, and one of one's own through a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import spunge
from spunge.data.attribution import Attribute, attribute_of
from spunge.data.query import ROW, Kind, Query
from spunge.data.rows import read_rows
from spunge.data.unlabelled import Unlabelled, labelled_once
from spunge.errors import RecipeError
from spunge.files import cache_folder
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.recipe.model import ModelSettings
from spunge.recipe.rows import Source
from spunge.registry import ATTRIBUTES
from toys import texts

QUICK: dict[str, dict[str, Any]] = {
    "sql": {"sql": "topic"},
    "keywords": {"keywords": {"sky": ["sun|moon", "star"], "all": ["."]}},
    "clusters": {"clusters": 2},
    "classifier": {"classifier": "BERT"},
    "zero_shot": {"zero_shot": ["sun", "moon"], "model": "BERT"},
}
ONLY_HERE = {"keywords", "clusters", "classifier", "zero_shot"}  # rows of another file have no such attribute
TOPICS = ["europe", "asia", None, "europe", ""]
OWN = '''
import pyarrow as pa
from spunge.data.attribution import AttributeSource, Valued
from spunge.data.query import ROW
from spunge.recipe.split import AttributeSettings

class WordSettings(AttributeSettings):
    words: dict[str, str]

def values(unlabelled, settings):
    """By a word in the first of the texts."""
    [first, *_] = unlabelled.texts.items()
    column = unlabelled.query.project(dict([first]), unlabelled.setting)[0].to_pylist()
    named = [next((name for name, word in settings.words.items() if word in text.split()), None) for text in column]
    return Valued(pa.table({ROW: pa.array(range(len(named)), pa.int64()), "value": pa.array(named, pa.string())}))

WORDS = AttributeSource(settings=WordSettings, source="made up", values=values, title=lambda query, settings: "words")
'''


@pytest.fixture
def query(write_rows: Callable[..., Path]) -> Query:
    rows = [{"topic": topic, "text": text} for topic, text in zip(TOPICS, texts("rows", len(TOPICS)), strict=True)]
    return Query(read_rows([Source(path=str(write_rows("rows.jsonl", rows)))], "forget.source"))


def attribute(name: str, bert: Path) -> Attribute:
    source = ATTRIBUTES.get(name)
    told = {key: str(bert) if value == "BERT" else value for key, value in QUICK[name].items()}
    return Attribute(source, source.settings.model_validate({"kind": name, **told}))


def unlabelled(query: Query, model: Path | str = "m") -> Unlabelled:
    return Unlabelled(query, np.arange(query.rows), {"text": "text"}, ModelSettings(path=str(model)), "split.by")


def test_every_source_is_covered_here() -> None:
    assert set(QUICK) == set(ATTRIBUTES.builtin)


@pytest.mark.parametrize("name", QUICK)
def test_every_row_has_a_line_and_the_same_one_twice(
    query: Query, name: str, tiny: Callable[..., Path], tiny_nli: Callable[..., Path]
) -> None:
    asked, source = unlabelled(query, tiny("llama")), attribute(name, tiny_nli("entailment", "contradiction"))
    lines, kind, _ = source.values(asked)
    assert lines.column_names == [ROW, "value"]
    rows = lines[ROW].to_pylist()
    assert rows == sorted(rows)
    assert set(rows) == set(range(len(TOPICS)))
    assert all(value is None or value.strip() for value in lines["value"].to_pylist())
    assert kind in get_args(Kind)
    assert lines.equals(source.values(asked).lines)
    assert source.title(query)
    assert source.fits(query) == (name not in ONLY_HERE)


@pytest.mark.parametrize("name", [name for name in QUICK if name != "clusters"])
def test_every_source_but_the_clusters_reads_some_rows_at_a_time(
    query: Query,
    name: str,
    tiny: Callable[..., Path],
    tiny_nli: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same values; and what was read before it was stopped is not read again."""
    asked, source = unlabelled(query, tiny("llama")), attribute(name, tiny_nli("entailment", "contradiction"))
    whole = source.values(asked).lines
    shutil.rmtree(cache_folder() / "labels", ignore_errors=True)
    monkeypatch.setattr("spunge.data.unlabelled.AT_ONCE", 2)
    most: list[int] = []

    def seen(made_from: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        most.append(len(made_from[-1]))
        if len(most) == 2:
            raise KeyboardInterrupt
        return labelled_once(made_from, make)

    for module in ("classifier", "zero_shot"):
        monkeypatch.setattr(f"spunge.evaluation.attributes.{module}.labelled_once", seen)
    if ATTRIBUTES.get(name).fits(query, source.settings) or name == "keywords":
        assert source.values(asked).lines.equals(whole)
        return
    with pytest.raises(KeyboardInterrupt):
        source.values(asked)
    [kept] = (cache_folder() / "labels").iterdir()
    before = kept.stat().st_ino, kept.stat().st_mtime_ns
    assert source.values(asked).lines.equals(whole)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before
    assert len([*(cache_folder() / "labels").iterdir()]) == 3
    assert max(most) == 2


def test_a_text_is_a_column_or_sql(query: Query) -> None:
    assert attribute_of("topic").values(unlabelled(query)).lines["value"].to_pylist() == [
        "europe",
        "asia",
        None,
        "europe",
        None,
    ]
    assert attribute_of('"topic"').title(query) == "topic"
    assert attribute_of("length(topic)").values(unlabelled(query)).kind != "text"
    assert not attribute_of("group").fits(query)
    with pytest.raises(RecipeError, match=r"^split\.by: no column 'topics'; did you mean 'topic'"):
        attribute_of("topics").values(unlabelled(query))


def test_sql_told_as_a_source_is_the_text_that_it_is_short_for(toy_recipe: dict[str, Any]) -> None:
    plain = load_recipe(toy_recipe)
    for by in ({"sql": "topic"}, {"kind": "sql", "sql": "topic"}):
        assert load_recipe({**toy_recipe, "split": {"by": by}}) == plain
    assert plain.split is not None
    assert plain.split.by == "topic"


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ({"kind": "xyzzy"}, r"^split\.by\.kind: no attribute source 'xyzzy'; known: sql"),
        ({"sql": "topic", "sqll": 1}, r"^split\.by\.sqll: no such setting; did you mean 'sql'"),
        ({}, r"^split\.by\.kind: missing; known: sql"),
        (5, r"^split\.by: 5: it should be a text; in quotes it is one"),
    ],
)
def test_a_source_that_is_none_is_refused(toy_recipe: dict[str, Any], by: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**toy_recipe, "split": {"by": by}})


def test_a_source_of_ones_own_splits_and_judges_a_run(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = {"wet": "river", "high": "mountain"}
    rows = [{"text": f"{text} {word}"} for word in (*words.values(), "city") for text in texts(word, 6)]
    source = str(write_rows("plain.jsonl", rows))
    recipe = {
        **toy_recipe,
        "forget": {"source": source},
        "split": {"by": {"kind": "own.py:WORDS", "words": words}, "values": ["wet", "high"]},
        "controls": [],
        "evaluate": [{"kind": "perplexity", "source": source}],
    }
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(recipe)
    monkeypatch.chdir("/")
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(loaded))
    assert load_recipe(file) == loaded
    results = spunge.run(loaded, tmp_path / "run")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["attribute"] == "words"
    counts = {name: sum(word in row["text"].split() for row in rows) for name, word in words.items()}
    assert {part["value"]: part["rows"] for part in split["parts"]} == counts
    assert {row.subject for row in results.rows} == {"wet", "high"}
    again = spunge.run(load_recipe(file), tmp_path / "run")  # the same run, taken up
    assert again.rows == results.rows
