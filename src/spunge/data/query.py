"""SQL over rows: conditions and attributes, in a DuckDB connection that can reach neither files nor the network."""

from collections.abc import Mapping

import duckdb
import numpy as np
import pyarrow as pa

from spunge.errors import RecipeError, suggestion

ROW = "__row__"


class Query:
    """The rows of an Arrow table, open to SQL expressions over their columns."""

    def __init__(self, table: pa.Table) -> None:
        self.columns: list[str] = table.column_names
        self.rows: int = table.num_rows
        self._connection = duckdb.connect(
            config={
                "enable_external_access": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "python_enable_replacements": "false",
                "preserve_insertion_order": "true",
            }
        )
        self._connection.register("rows", table.append_column(ROW, pa.array(np.arange(table.num_rows, dtype=np.int64))))
        self._connection.execute("SET lock_configuration = true")

    def where(self, condition: str | None, setting: str) -> np.ndarray:
        """Row numbers that meet a condition, ascending. Raises RecipeError when it does not parse, names no column,
        or is met by no row."""
        if condition is None:
            return np.arange(self.rows)
        table = self._run(f"SELECT {ROW} FROM rows WHERE ({condition}\n) ORDER BY {ROW}", condition, setting)
        if not table.num_rows:
            raise RecipeError(f"{setting}: no row of {self.rows} meets {condition!r}")
        return np.asarray(table[ROW].to_numpy())

    def has(self, expression: str) -> bool:
        """Whether an expression can be evaluated on these rows."""
        try:
            self._run(f"SELECT ({expression}\n) FROM rows LIMIT 0", expression, "")
        except RecipeError:
            return False
        return True

    def project(self, columns: Mapping[str, str], rows: np.ndarray, setting: str) -> pa.Table:
        """The given rows with one column per role, each a column or SQL expression over the row."""
        for role, expression in columns.items():
            self._run(f"SELECT ({expression}\n) FROM rows LIMIT 0", expression, f"{setting}.{role}")
        fields = ", ".join(f'({expression}\n) AS "{role}"' for role, expression in columns.items())
        table = self._run(f"SELECT {fields} FROM rows ORDER BY {ROW}", ", ".join(columns.values()), setting)
        return table.take(pa.array(rows)).combine_chunks()

    def values(self, expression: str, setting: str) -> pa.Table:
        """Columns `__row__` and `value` (text): one line for each row, or one for each distinct item of a list.

        A row whose value is null, empty text, or an empty list has one line, with null.
        """
        probe = self._run(f"SELECT ({expression}\n) AS value FROM rows LIMIT 0", expression, setting)
        source = f"SELECT {ROW}, ({expression}\n) AS value FROM rows"
        if pa.types.is_list(probe["value"].type) or pa.types.is_large_list(probe["value"].type):
            source = (
                f"SELECT {ROW}, unnest(CASE WHEN len(value) > 0 THEN list_distinct(value) END) AS value FROM ({source}) "
                f"UNION ALL SELECT {ROW}, NULL FROM ({source}) WHERE coalesce(len(value), 0) = 0"
            )
        return self._run(
            f"SELECT {ROW}, nullif(trim(CAST(value AS VARCHAR)), '') AS value FROM ({source}) ORDER BY {ROW}, value",
            expression,
            setting,
        )

    def _run(self, sql: str, expression: str, setting: str) -> pa.Table:
        try:
            if len(self._connection.extract_statements(sql)) != 1:
                raise RecipeError(f"{setting}: {expression!r} is more than one expression")
            return self._connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise RecipeError(self._explained(error, expression, setting)) from None

    def _explained(self, error: duckdb.Error, expression: str, setting: str) -> str:
        first = str(error).strip().splitlines()[0]
        hint = ""
        if isinstance(error, duckdb.BinderException) and 'column "' in first:
            hint = suggestion(first.split('column "')[1].split('"')[0], self.columns)
        return f"{setting}: {expression!r} is no SQL expression over the rows: {first}{hint}"
