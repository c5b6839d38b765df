"""Scores for other programs: pandas reads every number, a spreadsheet runs no formula, Markdown shows no markup of data."""

import io

import pandas as pd
import pytest

from spunge.report.export import csv_text, markdown_text
from spunge.results import parse_results


def test_pandas_reads_every_score_with_what_made_its_model(results):
    known = parse_results(results())
    table = pd.read_csv(io.StringIO(csv_text(known)))
    assert list(table["value"]) == pytest.approx([row.value for row in known.rows])
    assert list(table["stage"]) == [row.stage for row in known.rows]
    assert list(table["low"]) == pytest.approx([row.low for row in known.rows])
    assert table["n"].dtype == "int64"
    models = {model.stage: model for model in known.models}
    assert list(table["model_name"]) == [models[row.stage].name for row in known.rows]


@pytest.mark.parametrize("part", ["=1+1", "+SUM(A1)", "-2", "@x", "\t=1", 'a,"b"\n=c'])
def test_no_cell_is_a_formula_and_no_value_breaks_a_line(part, results):
    known = parse_results(results(parts=(part, "Asia")))
    table = pd.read_csv(io.StringIO(csv_text(known)), keep_default_na=False)
    assert len(table) == len(known.rows)
    assert not any(str(cell).startswith(("=", "+", "@", "-", "\t")) for cell in table["subject"])
    assert any(part.split("\n")[0].strip() in str(cell) for cell in table["subject"])


def test_markdown_has_a_table_that_holds_whatever_the_names_are(results):
    text = markdown_text(parse_results(results(parts=("a|b", "<b>*x*</b>"))))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a\\|b" in text
    assert "\\<b\\>\\*x\\*\\</b\\>" in text
    assert "0.30 [0.20 0.40]" in text
