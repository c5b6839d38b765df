"""The table of a terminal and the plain text of a pipe."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from spunge.report.table import results_table, results_text
from spunge.report.wording import number, shortened, signed
from spunge.results import parse_results


def text_of(content):
    return results_text(parse_results(content))


def printed(results, columns, **options):
    file = io.StringIO()
    Console(file=file, width=columns, **options).print(results_table(parse_results(results), columns))
    return file.getvalue()


def test_the_text_holds_every_number_under_its_stage(results):
    lines = text_of(results()).splitlines()
    assert lines[0].split() == [
        "metric",
        "subject",
        "wanted",
        "base",
        "branch:p0",
        "branch:p1",
        "control:joint",
        "merged",
    ]
    cells = re.split(" {2,}", lines[1])
    assert cells == ["accuracy", "Europe", "down", "0.90 [0.80 1.00]", *["0.30 [0.20 0.40]"] * 4]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["accuracy", "Europe", "down"],
        ["accuracy", "Asia", "down"],
        ["accuracy", "Africa", "up"],
        ["accuracy", "facts", "up"],
        ["perplexity", "text", "down"],
    ]
    assert "12.60 [12.10 13.10]" in lines[-1]


def test_the_text_has_no_escape_codes_and_no_trailing_space(results):
    text = text_of(results(parts=["\x1b[31mred", "b"]))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_small_samples_are_called_that_below_the_table(results):
    found = results(parts=[f"part {index}" for index in range(9)])
    for row in found["rows"]:
        if row["subject"].startswith("part"):
            row["n"] = 5
    text = text_of(found)
    assert text.endswith("there is none. Of fewer than 6 none is called certain.\n")
    assert "note: Small samples, of fewer than 10 items: accuracy on part 0 (5), accuracy on part 1 (5)" in text
    assert "part 5 (5) and 3 more." in text
    assert "Small samples" in printed(found, 120)
    assert "Small samples" not in text_of(results()) + printed(results(), 120)


def test_a_missing_cell_is_a_dash(results):
    found = results()
    found["rows"] = [row for row in found["rows"] if (row["stage"], row["subject"]) != ("merged", "Asia")]
    line = next(line for line in text_of(found).splitlines() if " Asia " in line)
    assert line.endswith("–")


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
@pytest.mark.parametrize("parts", [2, 13])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(results, columns, parts):
    text = printed(results(parts=[f"group {index}" for index in range(parts)]), columns)
    assert max(map(cell_len, text.splitlines())) <= columns
    assert "…" not in text
    assert len(re.findall(r" 0\.90 ", text)) == parts


def test_a_wide_terminal_shows_intervals_of_base_control_and_merged(results):
    line = next(line for line in printed(results(), 160).splitlines() if "Europe" in line and "0.90" in line)
    assert line.count("[") == 3


def test_a_terminal_says_of_each_group_which_way_is_wanted(results):
    lines = [line.strip() for line in printed(results(), 80).splitlines()]
    assert [line for line in lines if "wanted" in line] == [
        "to forget, wanted: lower",
        "to keep, wanted: higher",
        "wanted: lower",  # of perplexity, which is of one group
    ]


def test_a_narrow_terminal_folds_the_branches_into_one_column(results):
    text = printed(results(parts=[f"group {index}" for index in range(13)]), 80)
    assert "own" in text
    assert "group 12" in text


def test_a_very_narrow_terminal_shows_base_and_merged_with_no_number_cut(results):
    for columns in (40, 30):
        lines = printed(results(), columns).splitlines()
        assert max(map(cell_len, lines)) <= columns
        assert sum(line.split()[-2:] == ["0.90", "0.30"] for line in lines) == 2


def test_markup_in_a_value_is_shown_as_text(results):
    text = printed(results(parts=["[bold red]x[/]", "[/b]"]), 120, color_system="truecolor", force_terminal=True)
    assert "[bold red]x[/]" in text
    assert "[/b]" in text


def test_long_and_wide_values_are_cut_in_the_middle(results):
    assert shortened("a" * 50 + "b" * 50, 10) == "aaaaaa…bbb"
    assert cell_len(shortened("日本語の長い値" * 9, 20)) <= 20
    assert max(map(cell_len, printed(results(parts=["z" * 400, "日本語" * 100]), 80).splitlines())) <= 80


def test_results_without_rows_give_an_empty_table():
    assert text_of({"rows": []}).split() == ["metric", "subject", "wanted"]
    assert "↓" not in printed({"rows": []}, 80)
    assert "metric" in printed({"rows": []}, 80)


def test_results_read_from_json_with_nulls_are_taken_as_missing(results):
    found = json.loads(json.dumps(results()))
    found["rows"][0] |= {"value": None}
    found["rows"][1] |= {"low": None, "high": None, "n": None}
    line = text_of(found).splitlines()[1]
    assert "0.30" in line
    assert line.count("[") == 3


def test_parts_come_before_everything_else_whatever_the_order_of_the_rows(results):
    found = results()
    found["rows"] = list(reversed(found["rows"]))
    subjects = [line.split()[1] for line in text_of(found).splitlines()[1:]]
    assert subjects[1:3] == ["Europe", "Asia"]


def test_what_is_below_chance_is_marked_and_the_mark_explained(results):
    found = results()
    next(row for row in found["rows"] if row["stage"] == "merged")["below_chance"] = True
    assert text_of(found).splitlines()[1].endswith("0.30 [0.20 0.40] below chance")
    text = printed(found, 120)
    assert text.count("0.30↓") == 1
    assert "↓ below chance" in text
    assert "↓" not in printed(results(), 120)


def test_several_seeds_show_their_spread(results):
    found = results() | {"seeds": 3}
    next(row for row in found["rows"] if row["stage"] == "merged")["spread"] = 0.04
    assert text_of(found).splitlines()[1].endswith("0.30 [0.20 0.40] ±0.04")
    text = printed(found, 160)
    assert "0.30 [0.20 0.40] ±0.04" in text
    assert "means over 3 seeds" in text


def test_the_worst_subject_stands_last_in_a_group_of_its_own(results, row):
    found = results()
    found["rows"] = [row("merged", "worst", "accuracy", 0.2), *found["rows"]]
    subjects = [line.split()[1] for line in text_of(found).splitlines()[1:] if line.startswith("accuracy")]
    assert subjects == ["Europe", "Asia", "Africa", "facts", "worst"]
    assert "worst of them" in printed(found, 120)


def test_attacks_come_after_what_the_models_are_by_themselves(attacked):
    lines = text_of(attacked()).splitlines()
    assert [line.split("  ")[0] for line in lines[5:]] == [
        "perplexity",
        *["accuracy after relearning 5 steps"] * 2,
        *["accuracy after relearning 50 steps"] * 2,
    ]


def test_the_first_control_stays_where_not_all_of_them_fit(results, row):
    found = results()
    for name in ("random", "sequential", "average"):
        found["stages"].insert(-1, f"control:{name}")
        found["rows"].append(row(f"control:{name}", "Europe", "accuracy", 0.5))
    assert "sequential" in printed(found, 100)
    narrow = printed(found, 60)
    assert "joint" in narrow
    assert "sequential" not in narrow
    assert max(map(cell_len, narrow.splitlines())) <= 60


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("inf"), "inf"),
        (12.126, "12.13"),
        (345.67, "345.7"),
        (12345.6, "12346"),
        (1.5e7, "1.50e+07"),
        (0.0, "0.00"),
    ],
)
def test_numbers_have_the_digits_that_count(value, shown):
    assert number(value) == shown


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert signed(-0.001, share=True) == "0.00"
    assert signed(-0.25, share=True) == "−0.25"
