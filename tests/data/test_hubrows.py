"""Datasets of the Hub, which are folders here in their place: their text files give the rows that the same files give anywhere."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from spunge.data import hubrows
from spunge.data.rows import read_rows
from spunge.errors import RecipeError
from spunge.recipe.rows import Source

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {path}\n{rest}---\n"
WORDS = [{"name": "NA", "code": "007", "day": "2024-01-05"}, {"name": "null", "code": "1e3", "day": None}]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def dataset(folder: Path, name: str, content: str, rest: str = "") -> str:
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "README.md").write_text(CARD.format(path=name, rest=rest))
    return str(folder)


def rows(hub: str, **values: Any) -> list[dict[str, Any]]:
    return list(read_rows([Source(hub=hub, **values)], "forget.source").table.to_pylist())


@pytest.mark.parametrize(
    ("name", "mark", "rest"),
    [("a.csv", ",", ""), ("a.csv", "\t", '  sep: "\\t"\n'), ("a.csv", ";", "  delimiter: ;\n"), ("a.csv", ";", "")],
    ids=["commas", "tabs by the card", "semicolons by the card", "semicolons by the heading"],
)
def test_words_and_numbers_of_csv_stay_as_they_are_written(tmp_path: Path, name: str, mark: str, rest: str) -> None:
    lines = [mark.join(WORDS[0]), *(mark.join(value or "" for value in row.values()) for row in WORDS)]
    hub = dataset(tmp_path / "d", name, "\n".join(lines) + "\n", rest)
    assert rows(hub) == WORDS
    assert rows(hub) == read_rows([Source(path=str(tmp_path / "d" / name))], "x").table.to_pylist()


def test_dates_of_json_stay_text(tmp_path: Path) -> None:
    hub = dataset(tmp_path / "d", "a.jsonl", "".join(json.dumps(row) + "\n" for row in WORDS))
    assert rows(hub, assign={"side": "left"}) == [{**row, "side": "left"} for row in WORDS]


def test_a_dataset_of_parquet_is_read_by_its_library(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_list(WORDS).to_parquet(tmp_path / "d" / "train.parquet")
    assert rows(str(tmp_path / "d")) == WORDS


@pytest.mark.parametrize(
    ("rest", "values", "said"),
    [
        ("", {"split": "train[:10%]"}, r"has no split 'train\[:10%\]'; known: train"),
        ("  skiprows: 1\n", {}, "sets skiprows in its card"),
        ("", {"config": "other"}, "cannot be read"),
    ],
)
def test_what_would_be_read_otherwise_is_refused(tmp_path: Path, rest: str, values: dict[str, Any], said: str) -> None:
    hub = dataset(tmp_path / "d", "a.csv", "a,b\n1,2\n3,4\n", rest)
    with pytest.raises(RecipeError, match=rf"^forget.source: .*{said}") as caught:
        rows(hub, **values)
    assert "\n" not in str(caught.value)


def test_files_of_the_hub_are_fetched_at_the_datasets_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(*given: str, **named: str) -> str:
        asked.append((*given, named))
        return str(tmp_path / "a.csv")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    file = hubrows._downloaded("hf://datasets/owner/name@refs%2Fpr%2F1/data/a b.csv")
    assert file == tmp_path / "a.csv"
    assert asked == [("owner/name", "data/a b.csv", {"repo_type": "dataset", "revision": "refs/pr/1"})]
    assert hubrows._downloaded(str(tmp_path / "x.csv")) == tmp_path / "x.csv"
