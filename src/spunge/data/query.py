"""Columns by name and SQL over rows: conditions and attributes, in a DuckDB connection that reaches the rows alone (no files, no
network, no settings, no other tables, nothing that differs from one reading to the next), in bounded memory and some minutes.

What sorts or numbers few rows may take half of the machine's memory. Of many it is given little, and what does not fit into that
goes to a folder of the cache, which is bounded too and goes with the query; only where that fails it takes half.

One rule for columns, wherever a recipe names one: the name of an existing column is that column, whatever it looks like
(`group`, `bad answer`, `a.b`); a text with columns in braces that is no SQL is a template (`### Question: {question}`); anything
else is SQL. A condition (`where`) is always SQL.
"""

import difflib
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spunge.data.arrays import counted, joined
from spunge.data.filling import FIELD, pieces_of, text_sql
from spunge.data.keeping import spill_folder, spills, together
from spunge.data.mapping import give_back
from spunge.data.rows import Records
from spunge.errors import ASKING, RecipeError, suggestion
from spunge.files import parse_json

ROW = "__row__"
Kind = Literal["number", "truth", "text"]  # of an attribute's values
SECONDS = 600.0  # after which an expression is stopped
LITTLE = "512 MiB"  # of memory, in which many rows are sorted
THREADS = 4  # that share it
SPILLED = 4  # times the bytes of all rows that may lie on the disk for that
GRACE = 5.0  # more, in which what is stopped ends by itself; some functions look at nothing until they are through
LISTS = ("unnest", "range", "generate_series")  # functions that make a table and read nothing but their arguments
TELLING = re.compile(r"(pg|has|duckdb|current|pragma)_\w+|version|query|session_user|user|get_users|getenv|getvariable")
BATCH = 1 << 13  # rows of a piece of a result: a column of text takes 2 GB a piece at the most
CONSTANTS = ("null", "true", "false")  # words that are SQL where no column is called so
SESSION = {
    "user",
    "current_user",
    "session_user",
    "current_role",
    "current_schema",
    "current_catalog",
    "current_database",
}


@cache
def memory() -> str:
    """Half of the machine's memory, or of what its container may have: DuckDB's own limit is four fifths of it. DuckDB before 2.0
    takes no percentage."""
    with duckdb.connect() as connection:
        (limit,) = connection.execute("SELECT current_setting('memory_limit')").fetchall()[0]
    number, unit = limit.split()
    return f"{float(number) * 5 / 8:.2f} {unit}"


class Query:
    """The rows, open to columns' names and SQL expressions over them."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.columns: list[str] = records.table.column_names
        self.rows: int = records.table.num_rows
        self._sql_names = _sql_names(self.columns)
        self._stuck = False
        self._spills = spills(records.table)
        self._connection = self._connected()

    def _connected(self) -> duckdb.DuckDBPyConnection:
        table = self.records.table
        if self._spills:
            limits = {
                "memory_limit": LITTLE,
                "threads": str(min(THREADS, os.cpu_count() or 1)),
                "temp_directory": str(spill_folder()),
                "max_temp_directory_size": f"{(SPILLED * table.nbytes >> 20) + 1} MiB",
            }
        else:
            limits = {"memory_limit": memory(), "temp_directory": ""}
        connection = duckdb.connect(
            config={
                "enable_external_access": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "python_enable_replacements": "false",
                "preserve_insertion_order": "true",
                **limits,
            }
        )
        named = table.rename_columns([self._sql_names[name] for name in self.columns])
        connection.register("rows", named.append_column(ROW, pa.array(counted(self.rows))))
        # A time's text must not depend on where the machine stands.
        connection.execute("SET TimeZone = 'UTC'; SET lock_configuration = true")
        return connection

    def column(self, given: str) -> str | None:
        """The column that a recipe's text names, or None where it is SQL: by its exact name, by its name in double quotes as SQL
        has it, or, for a single word, whatever the spaces around it and the case and the Unicode form of its letters."""
        if given in self.columns:
            return given
        bare = given.strip()
        if quoted := re.fullmatch(r'"((?:[^"]|"")+)"', bare):
            bare = quoted[1].replace('""', '"')
        if bare in self.columns:
            return bare
        alike = [name for name in self.columns if _folded(name.strip()) == _folded(bare)]
        return alike[0] if len(alike) == 1 and re.fullmatch(r"\w+", _folded(bare)) else None

    def sql(self, given: str, setting: str) -> str:
        """The SQL of a column or an expression. Raises RecipeError for a single word that is no column."""
        name = self.column(given)
        if name is not None:
            return '"' + self._sql_names[name].replace('"', '""') + '"'
        if re.fullmatch(r"[^\W\d]\w*", given.strip()) and given.strip().lower() not in CONSTANTS:
            raise RecipeError(f"{setting}: no column {given!r}{suggestion(given, self.columns)}")
        if (literal := re.fullmatch(r"'([^']*)'", given.strip())) and literal[1] in self.columns:
            raise RecipeError(f"{setting}: {given} is a text in SQL; the column is named without quotes: {literal[1]}")
        return self._filled(given, setting) or f"({given}\n)"

    def _filled(self, given: str, setting: str) -> str | None:
        """The SQL of a template, or None for what is SQL itself. Raises RecipeError for a template that cannot be filled, and for
        SQL whose quotes make a plain text of a column in braces."""
        named = FIELD.findall(given)
        if not named:
            return None
        if not self._syntax_error(f"SELECT ({given}\n)"):
            if quoted := [name for name in named if name in self.columns]:
                raise RecipeError(
                    f"{setting}: {given!r} is SQL, and {{{quoted[0]}}} in its quotes is a plain text; write the template without "
                    "the quotes around it, or join the column by ||"
                )
            return None
        parts = []
        for text, name in pieces_of(given, setting):
            if name is None:
                parts.append(text_sql(text))
                continue
            column = self.column(name)
            if column is None:
                raise RecipeError(
                    f"{setting}: the template's {{{name}}} is no column{suggestion(name, self.columns)}; braces that are "
                    "text are doubled: {{ }}"
                )
            if pa.types.is_nested(self.records.table.schema.field(column).type):
                raise RecipeError(
                    f"{setting}: the template's {{{name}}} is a list or a mapping; give a column of texts"
                )
            value = f"CAST({self.sql(column, setting)} AS VARCHAR)"
            parts.append(f"CASE WHEN regexp_full_match({value}, '\\s*') THEN NULL ELSE {value} END")
        return f"({' || '.join(parts)})"  # null, as an empty text is, where one of the columns is empty

    def where(self, condition: str | None, setting: str) -> np.ndarray:
        """Row numbers that meet a condition, ascending. Raises RecipeError when it does not parse, names no column,
        or is met by no row."""
        if condition is None:
            return counted(self.rows)
        if not condition.strip():
            raise RecipeError(f"{setting}: an empty condition; leave it out")
        # Where no column is called so, SQL takes these words for the session's user and the like.
        words = set(re.findall(r"\w+(?!\w*\()", re.sub(r"'[^']*'|\"[^\"]*\"", "", condition.lower())))
        if strangers := sorted(words & SESSION - {name.lower() for name in self.columns}):
            raise RecipeError(f"{setting}: no column {strangers[0]!r}{suggestion(strangers[0], self.columns)}")
        table = self._by_rows(f"SELECT {ROW} FROM rows WHERE ({condition}\n)", ROW, condition, setting)
        if not table.num_rows:
            raise RecipeError(f"{setting}: no row of {self.rows} meets {condition!r}")
        return joined((chunk.to_numpy() for chunk in table[ROW].chunks), np.int64)

    def has(self, given: str) -> bool:
        """Whether these rows have a column, or an expression can be evaluated on them."""
        try:
            self._kind(given, "")
        except RecipeError:
            return False
        return True

    def project(self, columns: Mapping[str, str], prefix: str) -> pa.Table:
        """All rows with one column per role, each a column or SQL expression over the row. prefix: `forget.` or the like, which
        with the role names the setting."""
        picked: dict[str, pa.ChunkedArray] = {}
        for role, given in columns.items():
            name = self.column(given)
            if name is not None:
                picked[role] = self.records.table[name]
            else:
                self._kind(given, prefix + role)
                sql = f"SELECT {ROW}, {self.sql(given, prefix + role)} AS value FROM rows"
                picked[role] = self._by_rows(sql, ROW, given, prefix + role)["value"]
        return pa.table(picked)

    def values(self, given: str, setting: str) -> pa.Table:
        """Columns `__row__` and `value` (text): one line for each row, or one for each distinct item of a list.

        A row whose value is null, not a number, blank text, or an empty list has one line, with null. A value stays as it is
        written, with the spaces around it.
        """
        kind = self._kind(given, setting)
        source, value, inner = (
            f"SELECT {ROW}, {self.sql(given, setting)} AS value FROM rows",
            "CAST(value AS VARCHAR)",
            kind,
        )
        if pa.types.is_list(kind):
            inner = kind.value_type
            items = "list_sort(CAST(list_distinct(value) AS VARCHAR[]))"
            value = f"unnest(CASE WHEN coalesce(len(list_distinct(value)), 0) = 0 THEN [NULL] ELSE {items} END)"
        sql, order = f"SELECT {ROW}, {value} AS value FROM ({source})", f"{ROW}, value"
        return self._by_rows(sql, order, given, setting, partial(_without_blanks, numbers=pa.types.is_floating(inner)))

    def spelled_as(self, given: str, setting: str) -> Kind:
        """What the values of a column or an expression, or the items of its lists, are: numbers and truth values may be spelled in
        several ways."""
        kind = self._kind(given, setting)
        inner = kind.value_type if pa.types.is_list(kind) else kind
        if pa.types.is_boolean(inner):
            return "truth"
        numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
        return "number" if any(is_such(inner) for is_such in numbers) else "text"

    def _kind(self, given: str, setting: str) -> pa.DataType:
        """The type of a column or an expression. Raises RecipeError where it is neither, or more than one."""
        types = self._run(f"SELECT {self.sql(given, setting)} AS value FROM rows LIMIT 0", given, setting).schema.types
        if len(types) != 1:
            raise RecipeError(f"{setting}: {given!r} is more than one expression")
        return types[0]

    def _by_rows(
        self, sql: str, order: str, given: str, setting: str, each: Callable[[pa.Table], pa.Table] | None = None
    ) -> pa.Table:
        """What DuckDB says, a column of it being the rows' numbers, which ascend. each: what is made of every piece of it."""
        table = self._run(sql, given, setting, each)
        if _ascends(table[ROW]):
            return table
        # An expression that numbers rows in another order leaves them in that. Sorting takes memory for all of them.
        return self._run(f"SELECT * FROM ({sql}) ORDER BY {order}", given, setting, each)

    def _run(self, sql: str, given: str, setting: str, each: Callable[[pa.Table], pa.Table] | None = None) -> pa.Table:
        try:
            if self._stuck:
                raise TimeoutError
            if len(self._connection.extract_statements(sql)) != 1:
                raise RecipeError(f"{setting}: {given!r} is more than one expression")
            if beyond := self._beyond_rows(sql):
                raise RecipeError(f"{setting}: {given!r} {beyond}")
            try:
                return self._answer(sql, each or _as_it_is)
            except (duckdb.OutOfMemoryException, duckdb.IOException, MemoryError):
                if not self._spills:
                    raise
                # An aggregate, such as a list of all values, can't be put aside, and nothing can where the disk is full.
                self._spills = False
                self._connection.close()
                self._connection = self._connected()
                return self._answer(sql, each or _as_it_is)
        except (duckdb.OutOfMemoryException, MemoryError):
            raise RecipeError(f"{setting}: {given!r} needs more memory than there is") from None
        except (duckdb.InterruptException, TimeoutError):
            raise RecipeError(f"{setting}: {given!r} was stopped after {SECONDS:.0f} seconds") from None
        except duckdb.Error as error:
            raise RecipeError(self._explained(error, given, setting)) from None

    def _parsed(self, sql: str) -> Any:
        """The tree of DuckDB's own parser."""
        [[text]] = self._connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
        return parse_json(text)

    def _syntax_error(self, sql: str) -> bool:
        tree = self._parsed(sql)
        return bool(tree["error"]) and tree["error_type"] == "parser"

    def _beyond_rows(self, sql: str) -> str:
        """What an expression asks for beside the rows, if anything."""
        tree = self._parsed(sql)
        if tree["error"]:  # what does not parse is explained where it is run
            return "" if tree["error_type"] == "parser" else "is no expression"
        nodes = list(_nodes(tree))
        own = {entry["key"].lower() for node in nodes for entry in (node.get("cte_map") or {}).get("map", ())}
        for node in nodes:
            if table := _table(node, {"rows", *own}):
                return f"asks for {table}; an expression reads the row and nothing else"
            if node.get("sample"):
                return "gives other values each time, by its sample"
            if node.get("class") == "FUNCTION" and not node.get("is_operator"):
                name = node["function_name"].lower()
                if TELLING.fullmatch(name):
                    return f"asks for {name}(); an expression reads the row and nothing else"
                if name in _changing():
                    return f"gives other values each time, by {name}; a share at random is hash(text) % 10 = 0"
        return ""

    def _answer(self, sql: str, each: Callable[[pa.Table], pa.Table]) -> pa.Table:
        """What DuckDB says. It runs in a thread of its own, since one of its functions may not hear that it is to stop.

        Raises TimeoutError, after which this connection answers nothing more.
        """
        answers: list[pa.Table] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(together(map(each, _pieces(self._connection.sql(sql)))))
            except BaseException as error:
                errors.append(error)

        asking = threading.Thread(target=ask, name=ASKING, daemon=True)
        asking.start()
        try:
            asking.join(SECONDS)
        finally:
            if asking.is_alive():
                self._connection.interrupt()
                asking.join(GRACE)
                self._stuck = asking.is_alive()
        if self._stuck:
            raise TimeoutError
        if errors:
            raise errors[0]
        return answers[0]

    def _explained(self, error: duckdb.Error, given: str, setting: str) -> str:
        first = str(error).strip().splitlines()[0].rstrip(".")
        return (
            f"{setting}: {given!r} is no column, and no SQL expression over the rows: {first}{self._mend(first, given)}"
        )

    def _mend(self, message: str, given: str) -> str:
        """What would work, where that can be told."""
        if missing := re.search(r'column "(.+?)"', message):
            if f'"{missing[1]}"' in given:
                return f"; a text stands in single quotes: '{missing[1]}'; columns: {', '.join(self.columns)}"
            alike = [name for name in self.columns if name.lower() == missing[1].lower()]
            if len(alike) > 1:
                return f"; SQL does not tell {' from '.join(map(repr, alike))}; rename one"
            return suggestion(missing[1], self.columns)
        if "explicit cast" in message or "explicit type casts" in message:
            return "; a column of text is compared as a number by CAST(name AS DOUBLE)"
        words = [name for name in self.columns if name and re.search(rf"(?<![\w\"]){re.escape(name)}(?![\w\"])", given)]
        if unquoted := [name for name in words if not re.fullmatch(r"[^\W\d]\w*", name) or _is_keyword(name)]:
            return f'; write the column {unquoted[0]!r} in double quotes: "{unquoted[0]}"'
        near = difflib.get_close_matches(given, self.columns, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""


def _pieces(answer: duckdb.DuckDBPyRelation) -> Iterator[pa.Table]:
    """What DuckDB says, as it says it. Raises its errors, which come through Arrow as others."""
    reader = answer.to_arrow_reader(BATCH)
    yield reader.schema.empty_table()
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (OSError, pa.ArrowException) as error:
            kinds = {
                "Out of Memory": duckdb.OutOfMemoryException,
                "INTERRUPT": duckdb.InterruptException,
                "IO": duckdb.IOException,
            }
            kind = next((kind for start, kind in kinds.items() if str(error).startswith(start)), duckdb.Error)
            raise kind(str(error)) from None
        give_back()
        yield pa.table(batch)


def _as_it_is(table: pa.Table) -> pa.Table:
    return table


def _without_blanks(lines: pa.Table, numbers: bool) -> pa.Table:
    """Values with null for what is blank. numbers: they are such, and what is no number is missing too."""
    blank = pc.equal(pc.utf8_trim_whitespace(lines["value"]), "")
    if numbers:
        blank = pc.or_(blank, pc.equal(lines["value"], "nan"))
    return lines.set_column(1, "value", pc.if_else(blank, pa.scalar(None, pa.string()), lines["value"]))


def _ascends(column: pa.ChunkedArray) -> bool:
    last = -1
    for chunk in column.chunks:
        numbers = chunk.to_numpy()
        if len(numbers) and (numbers[0] < last or (numbers[1:] < numbers[:-1]).any()):
            return False
        last = numbers[-1] if len(numbers) else last
    return True


@cache
def _keywords() -> frozenset[str]:
    return _words("SELECT keyword_name FROM duckdb_keywords()")


@cache
def _changing() -> frozenset[str]:
    """Functions whose value is another each time or each day."""
    told = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    return _words(told)


def _words(sql: str) -> frozenset[str]:
    with duckdb.connect() as connection:
        return frozenset(word for (word,) in connection.execute(sql).fetchall())


def _is_keyword(name: str) -> bool:
    return name.lower() in _keywords()


def _table(node: dict[str, Any], known: set[str]) -> str:
    """The table that a node of the parsed expression reads, unless it is known."""
    match node.get("type"):
        case "TABLE_FUNCTION" if (name := node["function"]["function_name"]).lower() not in LISTS:
            return f"the table {name}()"
        case "BASE_TABLE" if node["schema_name"] or node["catalog_name"] or node["table_name"].lower() not in known:
            return f"the table {node['table_name']!r}"
        case "SHOW_REF":
            return "what tables there are"
    return ""


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree of mappings and lists. Not by recursion: an expression may be nested deeply."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()


def _sql_names(columns: list[str]) -> dict[str, str]:
    """The name in SQL of each column: its own, or another where SQL would not tell it from others or cannot name it."""
    lowered = [name.lower() for name in columns]
    result = {}
    for number, (name, lower) in enumerate(zip(columns, lowered, strict=True)):
        plain = name and lowered.count(lower) == 1 and lower != ROW and "\0" not in name
        result[name] = name if plain else f"\x01{number}"
    return result
