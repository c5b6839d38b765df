"""The attribute's values: how a recipe may spell them, and which of them look like slips."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spunge.data.attribute import REMARKS, look_alikes
from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import dump_recipe, load_recipe

Split = Callable[..., Parts]


@pytest.fixture
def split_by(toy_recipe: dict[str, Any], tmp_path: Path) -> Split:
    """split_by([values of a column `v`], "split.values=...") -> the parts; the recipe is read from a file, as a person's is."""

    def run(values: list[Any], *lines: str, name: str = "rows.jsonl") -> Parts:
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"v": values, "text": [f"words {n}" for n in range(len(values))]}), tmp_path / name)
        else:
            rows = [{"v": value, "text": f"words {number}"} for number, value in enumerate(values)]
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {**toy_recipe, "forget": {"source": name}}
        del content["split"], content["evaluate"], content["retain"]
        content["unlearn"] = {"method": "tvn"}
        file = tmp_path / "recipe.yaml"
        file.write_text("\n".join([json.dumps(content)[1:-1].replace("\n", " "), ""]))
        body = "\n".join(f"{key}: {json.dumps(value)}" for key, value in content.items())
        file.write_text("\n".join([body, "split:", "  by: v", *(f"  {line}" for line in lines), ""]))
        recipe = load_recipe(file)
        assert load_recipe_text(dump_recipe(recipe), tmp_path).split == recipe.split, "a dumped recipe says the same"
        return split_rows(recipe)

    return run


def load_recipe_text(text: str, folder: Path) -> Any:
    (folder / "dumped.yaml").write_text(text)
    return load_recipe(folder / "dumped.yaml")


def sizes(parts: Parts) -> dict[str, int]:
    return {part.value: part.rows for part in parts.parts}


@pytest.mark.parametrize("word", ["4", "4.0", "4e0", "0x4", "4.00", "+4", "'4'"])
@pytest.mark.parametrize("value", [4, 4.0])
def test_a_number_may_be_spelled_in_every_way_of_yaml(split_by: Split, word: str, value: float) -> None:
    assert sizes(split_by([value, value + 1], f"values: [{word}]")) == {word.strip("'"): 1}
    assert sizes(split_by([value, value + 1], f"values: {{four: [{word}]}}")) == {"four": 1}


@pytest.mark.parametrize("word", ["007", "1e5", "2024-01-05", "1_000", "0x10", "1.50", "12:30", "010"])
def test_a_text_that_looks_like_a_number_or_a_date_is_wanted_as_it_is_written(split_by: Split, word: str) -> None:
    assert sizes(split_by([word, "7", "100000", "x"], f"values: [{word}]")) == {word: 1}
    assert sizes(split_by([word, "7", "100000", "x"], "values:", f"  {word}: [{word}, x]")) == {word: 2}


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "yes"])
def test_a_truth_value_may_be_spelled_in_every_way_of_yaml(split_by: Split, word: str) -> None:
    assert sizes(split_by([True, False], f"values: [{word}]")) == {word: 1}


@pytest.mark.parametrize("word", ["NO", "yes", "True", "off", "null", "~"])
def test_a_text_that_yaml_takes_for_a_truth_value_is_that_text(split_by: Split, word: str) -> None:
    assert sizes(split_by([word, "false", "other"], f"values: ['{word}']")) == {word: 1}
    if word not in ("null", "~"):
        assert sizes(split_by([word, "false", "other"], f"values: [{word}]")) == {word: 1}


def test_another_spelling_of_a_text_is_another_text(split_by: Split) -> None:
    with pytest.raises(RecipeError, match=r"split\.values: no row has '7' as v"):
        split_by(["007", "x"], "values: [7]")


def test_dates_of_parquet_are_wanted_as_iso(split_by: Split) -> None:
    import datetime

    days = [datetime.date(2024, 1, 5), datetime.date(2024, 1, 6)]
    assert sizes(split_by(days, "values: [2024-01-05]", name="rows.parquet")) == {"2024-01-05": 1}


def test_one_number_in_two_spellings_is_no_two_parts(split_by: Split) -> None:
    with pytest.raises(RecipeError, match=r"'4' and '4\.0' are one value"):
        split_by([4, 5], "values: [4, 4.0]")


def test_overrides_keep_the_spelling_too(split_by: Split, tmp_path: Path) -> None:
    split_by(["007", "7"])
    recipe = load_recipe(tmp_path / "recipe.yaml", ["split.values=[007]"])
    assert sizes(split_rows(recipe)) == {"007": 1}
    recipe = load_recipe(tmp_path / "recipe.yaml", ["split.values.sevens=[007, 7]"])
    assert sizes(split_rows(recipe)) == {"sevens": 2}


@pytest.mark.parametrize("other", [" a", "a ", "A", "a\u00a0"])
def test_values_that_look_alike_are_parts_of_their_own_and_remarked_on(split_by: Split, other: str) -> None:
    parts = split_by(["a", "a", other, "b"])
    assert sizes(parts) == {"a": 2, other: 1, "b": 1}
    (note,) = parts.notes
    assert f"'a' (2 rows) and {other!r} (1 rows)" in note
    assert parts.to_json()["notes"] == [note]
    assert not split_by(["a", "a", other], f"values: {{a: [a, {json.dumps(other)}]}}").notes
    (left_out,) = split_by(["a", "a", other], "values: [a]").notes
    assert repr(other) in left_out


def test_values_that_differ_by_unicode_form_alone_are_remarked_on_as_escapes(split_by: Split) -> None:
    (note,) = split_by(["caf\u00e9", "cafe\u0301", "\uff21", "b"]).notes
    assert r"'caf\xe9'" in note
    assert r"'cafe\u0301'" in note
    assert len(split_by(["\ufb01n", "fin"]).notes) == 1


def test_of_many_remarks_the_rest_is_counted() -> None:
    values = [word for number in range(REMARKS + 3) for word in (f"v{number}", f"V{number}")]
    remarks = look_alikes(dict.fromkeys(values, 1), {value: value for value in values})
    assert len(remarks) == REMARKS + 1
    assert "3 more" in remarks[-1]
