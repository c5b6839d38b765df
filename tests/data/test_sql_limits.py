"""SQL of a recipe reads the rows and nothing else, and ends: every way out that DuckDB has is tried."""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from spunge.data import query
from spunge.data.query import Query
from spunge.data.rows import Records
from spunge.errors import RecipeError
from spunge.files import cache_folder

passwords = pa.table(
    {"password": ["open sesame"]}
)  # a variable of this process, which DuckDB for Python would take for a table


@pytest.fixture(scope="module")
def rows() -> Query:
    return Query(Records(pa.table({"text": ["a", "b"], "n": [1, 2], "user": ["x", "y"]})))


WAYS_OUT = {
    "files": [
        "(SELECT count(*) FROM read_csv('{file}'))",
        "(SELECT content FROM read_text('{file}'))",
        "(SELECT content FROM read_blob('{file}'))",
        "(SELECT count(*) FROM read_json_objects('{file}'))",
        "(SELECT count(*) FROM read_parquet('{file}'))",
        "(SELECT count(*) FROM parquet_metadata('{file}'))",
        "(SELECT count(*) FROM sniff_csv('{file}'))",
        "(SELECT count(*) FROM glob('/*'))",
        "(SELECT count(*) FROM '{file}')",
        '(SELECT count(*) FROM "{file}")',
        "1); COPY rows TO '{file}'; SELECT (1",
        "1) FROM rows; ATTACH '{file}.db'; SELECT (1",
        "(COPY rows TO '{file}')",
    ],
    "the network": [
        "(SELECT count(*) FROM read_csv('http://127.0.0.1:9/x.csv'))",
        "(SELECT count(*) FROM 'https://127.0.0.1:9/x.parquet')",
        "1); INSTALL httpfs; LOAD httpfs; SELECT (1",
    ],
    "settings": [
        "getenv('HOME')",
        "current_setting('memory_limit')",
        "(SELECT count(*) FROM duckdb_settings())",
        "(SELECT count(*) FROM duckdb_secrets())",
        "(SELECT count(*) FROM duckdb_extensions())",
        "(SELECT count(*) FROM pragma_version())",
        "1); SET lock_configuration = false; SELECT (1",
        "1); PRAGMA database_list; SELECT (1",
        "version()",
        "getvariable('x')",
        "current_query()",
        "pg_my_temp_schema()",
    ],
    "other tables": [
        "(SELECT password FROM passwords)",
        "(SELECT count(*) FROM information_schema.tables)",
        "(SELECT count(*) FROM sqlite_master)",
        "(SELECT count(*) FROM pg_catalog.pg_class)",
        "(SELECT count(*) FROM duckdb_tables())",
        "(SELECT count(*) FROM duckdb_logs())",
        "(SELECT name FROM (SHOW TABLES))",
        "(SELECT count(*) FROM (DESCRIBE rows))",
        "(SELECT count(*) FROM query('SELECT 1'))",
        "(SELECT count(*) FROM query_table('passwords'))",
        "(WITH q AS (SELECT * FROM passwords) SELECT count(*) FROM q)",
        "[x FOR x IN (SELECT list(password) FROM passwords)]",
        "CASE WHEN n = 1 THEN (SELECT max(a) FROM (VALUES ((SELECT count(*) FROM duckdb_views()))) t(a)) END",
    ],
    "what changes": [
        "random()",
        "now()",
        "uuid()",
        "nextval('x')",
        "txid_current()",
        "(SELECT n FROM rows USING SAMPLE 1)",
        "1); CREATE TABLE x AS SELECT 1; SELECT (1",
        "1); DROP VIEW rows; SELECT (1",
    ],
}


@pytest.mark.parametrize("sql", [sql for ways in WAYS_OUT.values() for sql in ways])
@pytest.mark.parametrize("asked", ["attribute", "condition", "column"])
def test_an_expression_that_asks_for_more_than_the_rows_is_refused(
    rows: Query, tmp_path: Path, sql: str, asked: str
) -> None:
    file = tmp_path / "secret.csv"
    file.write_text("password\nopen sesame\n")
    given = sql.format(file=file)
    ask = {
        "attribute": lambda: rows.values(given, "split.by"),
        "condition": lambda: rows.where(f"{given} IS NOT NULL", "forget.where"),
        "column": lambda: rows.project({"text": given}, "forget."),
    }[asked]
    with pytest.raises(RecipeError) as refused:
        ask()
    assert "sesame" not in str(refused.value)
    assert file.read_text() == "password\nopen sesame\n"
    assert [each.name for each in tmp_path.iterdir()] == ["secret.csv"]


@pytest.mark.parametrize(
    ("sql", "values"),
    [
        ("n + (SELECT max(n) FROM rows)", ["3", "4"]),
        ("(WITH q AS (SELECT max(n) AS m FROM rows) SELECT m FROM q)", ["2", "2"]),
        ("[x + 1 for x in [n]]", ["2", "3"]),
        ("(SELECT sum(i) FROM range(n + 1) t(i))", ["1", "3"]),
        ("upper(text) || CAST(n AS VARCHAR)", ["A1", "B2"]),
        ('"user"', ["x", "y"]),
        ("CASE WHEN text LIKE 'a%' THEN 'first' ELSE 'other' END", ["first", "other"]),
        ("regexp_extract(text, '[ab]')", ["a", "b"]),
    ],
)
def test_what_reads_the_rows_is_answered(rows: Query, sql: str, values: list[str]) -> None:
    assert rows.values(sql, "split.by")["value"].to_pylist() == values


@pytest.mark.parametrize(
    "endless",
    [
        "(SELECT count(*) FROM range(1000000) a, range(1000000) b)",
        "(WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r)",
    ],
)
def test_an_expression_without_end_is_stopped_with_a_line(monkeypatch: pytest.MonkeyPatch, endless: str) -> None:
    monkeypatch.setattr(query, "SECONDS", 0.3)
    asked = Query(Records(pa.table({"text": ["a"]})))
    with pytest.raises(RecipeError, match=r"^split.by: .* was stopped after 0 seconds$"):
        asked.values(endless, "split.by")
    assert asked.values("text", "split.by")["value"].to_pylist() == ["a"]


@pytest.mark.thorough
def test_a_function_that_hears_nothing_does_not_hold_the_command() -> None:
    program = (
        "import pyarrow as pa, time; from spunge.data import query; from spunge.data.rows import Records;"
        "from spunge.cli.terminal import fail; from spunge.errors import RecipeError;"
        "query.SECONDS, query.GRACE = 0.2, 0.2\n"
        "rows = query.Query(Records(pa.table({'text': ['a']})))\n"
        "deaf = \"levenshtein(repeat('a', 400000) || text, repeat('b', 400000))\"\n"
        "for _ in range(2):\n"
        "    try: rows.values(deaf, 'split.by')\n"
        "    except RecipeError as error: said = str(error)\n"
        "fail(said, 2)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("was stopped after 0 seconds\n")


def test_an_expression_beyond_the_memory_is_refused_and_nothing_goes_to_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(query, "memory", lambda: "40MB")
    monkeypatch.chdir(tmp_path)
    asked = Query(Records(pa.table({"text": ["a"]})))
    with pytest.raises(RecipeError, match=r"^split.by: .* needs more memory than there is$"):
        asked.values(
            "(SELECT count(DISTINCT CAST(i AS VARCHAR) || repeat('x', 90)) FROM range(3000000) t(i))", "split.by"
        )
    assert list(tmp_path.iterdir()) == []


SORTED = "row_number() OVER (ORDER BY text)"


@cache
def unsorted() -> pa.Table:
    return pa.table({"text": [f"{number * 7919 % 200_000:06} {'x' * 120}" for number in range(200_000)]})


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Records:
    """Rows that count as many, of which DuckDB may hold a part."""
    monkeypatch.setattr("spunge.data.keeping.IN_MEMORY", 1000)
    monkeypatch.setattr(query, "LITTLE", "40MB")
    monkeypatch.setattr(query, "THREADS", 1)
    return Records(unsorted())


def left() -> list[Path]:
    return [*(cache_folder() / "rows").glob("*.spill")]


def test_many_rows_are_sorted_on_the_disk_which_is_freed(many: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    monkeypatch.setattr(query, "memory", lambda: pytest.fail("more memory is taken"))
    monkeypatch.setattr(query, "give_back", lambda: seen.append(left()))
    asked = Query(many)
    lines = asked.values(SORTED, "split.by")
    assert lines["value"].to_pylist() == [str(number * 7919 % 200_000 + 1) for number in range(200_000)]
    assert any(seen)
    del asked
    assert left() == []


def test_what_the_disk_does_not_take_is_sorted_in_memory_or_refused(
    many: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "LITTLE", "12MB")
    monkeypatch.setattr(query, "SPILLED", 0)
    asked = Query(many)
    assert asked.values(SORTED, "split.by")["value"][0].as_py() == "1"
    monkeypatch.setattr(query, "memory", lambda: "12MB")
    with pytest.raises(RecipeError, match=r"^split.by: .* needs more memory than there is$"):
        Query(many).values(SORTED, "split.by")
    assert left() == []


def test_where_the_disk_takes_nothing_memory_does(
    many: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(query, "LITTLE", "12MB")
    monkeypatch.setattr(query, "spill_folder", lambda: tmp_path / "file" / "aside.spill")
    assert Query(many).values(SORTED, "split.by")["value"][0].as_py() == "1"


def test_what_a_killed_process_put_aside_is_removed_after_a_day(many: Records) -> None:
    for name, age in (("1-old.spill", 90_000), ("1-new.spill", 10)):
        folder = cache_folder() / "rows" / name
        folder.mkdir(parents=True)
        (folder / "duckdb_temp").write_text("rows")
        os.utime(folder, (time.time() - age,) * 2)
    Query(many)
    assert [folder.name for folder in left()] == ["1-new.spill"]


def test_sql_may_take_half_of_the_memory() -> None:
    if int(duckdb.__version__.partition(".")[0]) < 2:
        pytest.skip("before 2.0 DuckDB takes no percentage")
    with duckdb.connect(config={"memory_limit": "50%"}) as connection:
        (half,) = connection.execute("SELECT current_setting('memory_limit')").fetchall()[0]
    (number, unit), (expected, expected_unit) = query.memory().split(), half.split()
    assert unit == expected_unit
    assert float(number) == pytest.approx(float(expected), rel=0.02)
