"""Arrays and rows that lie in files give what those in memory give, of every kind of source, and are in files indeed."""

import csv
import json
import mmap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from spunge.data import arrays, digests, keeping
from spunge.data.items import read_items
from spunge.data.query import Query
from spunge.data.rows import Records
from spunge.data.samples import shuffled_batches
from spunge.data.selection import select_retain, split_content
from spunge.data.split import draw, split_rows
from spunge.recipe.loading import load_recipe

COUNT = 97
WORDS = ["ash", "elm", "oak", "fir"]


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has all that is kept of rows go to files, some rows at a time."""

    def have() -> None:
        monkeypatch.setattr(arrays, "IN_MEMORY", 0)
        monkeypatch.setattr(arrays, "AT_ONCE", 7)
        monkeypatch.setattr(arrays, "_counted", np.arange(0))
        monkeypatch.setattr(digests, "TOGETHER", 10)
        for module in ("keeping", "selection", "unlabelled", "rows"):
            monkeypatch.setattr(f"spunge.data.{module}.AT_ONCE", 11)
        monkeypatch.setattr(keeping, "IN_MEMORY", 16)
        monkeypatch.setattr("spunge.data.query.BATCH", 5)

    return have


def rows(said: str) -> list[dict[str, Any]]:
    return [
        {
            "text": f"{said} {number}" if number % 13 else "",
            "answer": f" {WORDS[number % 4]}",
            "one": WORDS[number % 3] if number % 5 else None,
            "groups": [WORDS[(number + step) % 4] for step in range(number % 4)] * 2,
            "score": number % 10,
        }
        for number in range(COUNT)
    ]


def write(folder: Path, ending: str, name: str, said: str) -> str:
    file = folder / f"{name}.{ending}"
    table = pa.Table.from_pylist(rows(said))
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(said)))
    elif ending == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(table.column_names)
            writer.writerows([value if value is not None else "" for value in row.values()] for row in rows(said))
    elif ending == "parquet":
        pa.parquet.write_table(table, file, row_group_size=10)
    elif ending == "arrow":
        pa.feather.write_feather(table, file, chunksize=10)
    else:
        import datasets

        datasets.Dataset(table).save_to_disk(str(file))
    return str(file)


def told_of(folder: Path, ending: str, **forget: Any) -> tuple[Any, Any]:
    """What split.json holds, and the numbers and rows of all parts, of rows to keep and of an evaluation."""
    by = {"keywords": {"ones": ["1"], "twos": ["2"]}} if ending == "keywords" else "groups"
    kind = "jsonl" if ending == "keywords" else ending
    by = "one" if kind == "csv" else by
    first, second = write(folder, kind, "first", "says"), write(folder, kind, "second", "tells")
    sources = [{"path": first, "assign": {"from": "first"}, "row_number": "number"}, {"path": second}]
    kept = [{"path": first}, {"path": write(folder, kind, "kept", "keeps")}]
    recipe = load_recipe(
        {
            "model": {"path": "none/needed"},
            "forget": {"source": sources, "where": "CAST(score AS INT) < 8", **forget},
            "split": {"by": by},
            "retain": {"source": kept, "where": "CAST(score AS INT) > 2"},
            "unlearn": {"method": "graddiff"},
            "evaluate": [{"kind": "perplexity", "text": "text", "by": by, "where": "text <> ''"}]
            if kind == ending
            else [],
        }
    )
    parts = split_rows(recipe)
    retain = select_retain(recipe, parts)
    assert retain is not None
    content = split_content(parts, retain)
    held = {part.value: (part.members.tolist(), part.samples.table.to_pylist()) for part in parts.parts}
    for array in (parts.rows, *(part.members for part in parts.parts)):
        assert arrays.IN_MEMORY != 0 or not len(array) or is_mapped(array)
    items = [read_items(recipe, entry, {"text": "text"}, "evaluate.0", parts=parts) for entry in recipe.evaluate]
    judged = [({name: own.tolist() for name, own in each.subjects.items()}, each.forgotten.tolist()) for each in items]
    return content, (held, parts.rows.tolist(), retain.numbers.tolist(), judged)


def is_mapped(array: np.ndarray) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base is not None


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "arrow", "saved", "keywords"])
def test_rows_in_files_are_split_and_selected_as_those_in_memory(
    ending: str, in_files: Callable[[], None], tmp_path: Path
) -> None:
    expected = told_of(tmp_path, ending)
    in_files()
    assert told_of(tmp_path, ending) == expected
    assert any("rows are rows to forget too" in note for note in expected[0]["notes"])


def test_prompts_and_drawn_rows_in_files_are_those_in_memory(in_files: Callable[[], None], tmp_path: Path) -> None:
    forget = {"prompt": "text", "completion": "answer", "limit": 9}
    expected = told_of(tmp_path, "parquet", **forget)
    in_files()
    assert told_of(tmp_path, "parquet", **forget) == expected


def test_parts_in_files_hold_the_rows_that_python_counts(in_files: Callable[[], None], tmp_path: Path) -> None:
    in_files()
    file = write(tmp_path, "jsonl", "rows", "says")
    values = {"first": ["ash", "elm"], "again": ["elm"], "last": ["fir"]}
    recipe = load_recipe(
        {
            "model": {"path": "none/needed"},
            "forget": {"source": file},
            "split": {"by": "groups", "values": values},
            "unlearn": {"method": "tvn"},
        }
    )
    parts = split_rows(recipe)
    for part in parts.parts:
        own = [at for at, row in enumerate(rows("says")) if {*row["groups"]} & {*values[part.value]}]
        assert part.members is not None
        assert part.members.tolist() == own
    inside = {at for part in parts.parts for at in (part.members if part.members is not None else ())}
    assert parts.rows.tolist() == sorted(inside)
    assert parts.unassigned == COUNT - len(inside)


@pytest.mark.parametrize(
    "expression",
    ["row_number() OVER (ORDER BY score DESC, text)", "score - (SELECT min(score) FROM rows)", "upper(text)", "score"],
)
def test_what_an_expression_says_stands_at_its_row(expression: str, in_files: Callable[[], None]) -> None:
    in_files()
    records = Records(pa.table({"text": [f"t{n}" for n in range(60)], "score": [n * 7 % 60 for n in range(60)]}))
    if expression.startswith("row_number"):
        expected = [60 - n * 7 % 60 for n in range(60)]
    else:
        expected = [f"T{n}" if "upper" in expression else n * 7 % 60 for n in range(60)]
    query = Query(records)
    assert query.project({"text": expression}, "forget.")["text"].to_pylist() == expected
    lines = query.values(expression, "split.by")
    assert lines["value"].to_pylist() == [str(value) for value in expected]


@pytest.fixture(params=[0, 1 << 20], ids=["in files", "in memory"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "IN_MEMORY", request.param)
    monkeypatch.setattr(arrays, "AT_ONCE", 7)
    monkeypatch.setattr(arrays, "_counted", np.arange(0))


@pytest.mark.usefixtures("small")
def test_arrays_are_what_numpy_makes_of_them() -> None:
    generator = np.random.default_rng(0)
    mask = generator.random(50) < 0.4
    some = np.sort(generator.choice(50, 30, replace=False))
    assert arrays.numbers_of(mask).tolist() == np.flatnonzero(mask).tolist()
    assert arrays.chosen(some, mask).tolist() == some[mask[some]].tolist()
    assert arrays.chosen(some, mask, False).tolist() == some[~mask[some]].tolist()
    assert arrays.count_of(some, mask) == mask[some].sum()
    assert arrays.among(np.arange(-2, 60), some).tolist() == np.isin(np.arange(-2, 60), some).tolist()
    assert not arrays.among(some, some[:0]).any()
    assert [arrays.counted(length).tolist() for length in (20, 5, 31, 0)] == [[*range(n)] for n in (20, 5, 31, 0)]
    with pytest.raises(ValueError, match="read-only"):
        arrays.counted(5)[0] = 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [0, 1, 5, 50])
def test_numbers_are_shuffled_as_numpy_shuffles_them(count: int) -> None:
    shuffled = arrays.shuffled(count, np.random.default_rng(3))
    order = np.random.default_rng(3).permutation(count)
    assert shuffled.tolist() == order.tolist()
    assert is_mapped(shuffled) == (arrays.IN_MEMORY == 0 and count > 0)
    pieces = arrays.dealt(count, [2, 4], np.random.default_rng(3))
    assert [piece.tolist() for piece in pieces] == [sorted(part.tolist()) for part in np.split(order, [2, 4])]


def test_of_many_rows_as_many_are_drawn_at_random_by_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = np.arange(300) * 3, np.zeros(300)
    few = [draw(rows, 90, seed).tolist() for seed in range(2)]
    assert few[0] == np.sort(np.random.default_rng(0).choice(rows, 90, replace=False)).tolist()
    monkeypatch.setattr("spunge.data.split.MANY", 200)
    monkeypatch.setattr(arrays, "IN_MEMORY", 0)
    for seed in range(200):
        drawn = draw(rows, 90, seed)
        assert drawn.tolist() == sorted({*drawn.tolist()})
        assert len(drawn) == 90
        counts[drawn // 3] += 1
    assert is_mapped(drawn)
    assert draw(rows, 90, 199).tolist() == drawn.tolist()
    assert draw(rows, 6, 0).tolist() == np.sort(np.random.default_rng(0).choice(rows, 6, replace=False)).tolist()
    assert abs(counts - 60).max() < 5 * (200 * 0.3 * 0.7) ** 0.5


def test_what_a_training_draws_from_many_rows_is_held_in_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen times as many it takes no more."""
    monkeypatch.setattr(arrays, "IN_MEMORY", 1 << 16)
    monkeypatch.setattr(arrays, "AT_ONCE", 1 << 13)
    taken = []
    for count in (1 << 17, 1 << 21):
        tracemalloc.start()
        batches = shuffled_batches(count, 4, 0)
        drawn = [next(batches) for _ in range(3)]
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len({row for rows in drawn for row in rows}) == 12
    assert taken[1] < 1.2 * taken[0] < 1 << 20


@pytest.mark.parametrize("together", [3, 1000])
def test_digests_are_found_among_others_by_all_their_bits(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "TOGETHER", together)
    generator = np.random.default_rng(1)
    own = generator.integers(0, 4, (40, 2)).astype(np.uint64)  # many share one half and not the other
    others = generator.integers(0, 4, (6, 2)).astype(np.uint64)
    pairs = {*map(tuple, others.tolist())}
    known = digests.are_among([own[:17], own[17:]], [others[:1], others[1:]], 40, 6)
    assert known.tolist() == [tuple(pair) in pairs for pair in own.tolist()]
    assert not digests.are_among([own], [], 40, 0).any()
