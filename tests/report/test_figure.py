"""The chart: well-formed, and every mark where its number says."""

import math
from xml.etree import ElementTree

import pytest

from spunge.report.axis import axis_for
from spunge.report.figure import figure, legend
from spunge.report.scores import arranged
from spunge.results import parse_results


def scores_of(content):
    return arranged(parse_results(content))


SVG = "{http://www.w3.org/2000/svg}"


def drawn(results, metric=0):
    scores = scores_of(results)
    return ElementTree.fromstring(figure(scores.metrics[metric], scores, "chart"))


def whiskers(root, kind):
    return [
        (line.get("x1"), line.get("x2")) for line in root.iter(f"{SVG}line") if line.get("class") == f"whisker {kind}"
    ]


def marks(root, kind):
    return [
        mark.get("x") for mark in root.iter(f"{SVG}svg") if mark.find(f"{SVG}path[@class='mark {kind}']") is not None
    ]


def test_shares_stand_at_their_own_percentage(results):
    root = drawn(results())
    # Europe, Asia: 0.9 +- 0.1 in the base, 0.3 +- 0.1 merged; Africa, facts: 0.8 and 0.75.
    assert whiskers(root, "base") == [("80.00%", "100.00%")] * 2 + [("70.00%", "90.00%")] * 2
    assert whiskers(root, "merged") == [("20.00%", "40.00%")] * 2 + [("65.00%", "85.00%")] * 2
    assert marks(root, "merged") == ["30.00%", "30.00%", "75.00%", "75.00%"]


def test_a_logarithmic_axis_puts_ten_in_the_middle_of_one_and_a_hundred(results, row):
    rows = [row("base", "text", "perplexity", 1.0, 0.0), row("merged", "text", "perplexity", 10.0, 0.0, high=100.0)]
    root = drawn(results() | {"rows": rows})
    assert marks(root, "base") == ["0.00%"]
    assert whiskers(root, "merged") == [("50.00%", "100.00%")]


def test_a_linear_axis_begins_and_ends_at_round_numbers(results):
    axis = axis_for([11.5, 12.0, 13.1], share=False)
    assert (axis.low, axis.high) == (11.5, 13.5)
    assert axis.ticks == (11.5, 12.0, 12.5, 13.0, 13.5)
    assert axis.place(12.0) == pytest.approx(25.0)


@pytest.mark.parametrize(
    "values", [[], [5.0], [0.0], [-3.0, 2.0], [1.0, 1e12], [1e-9, 1e308], [2.0, math.inf], [1e-320, 1.0], [0.0, 0.04]]
)
def test_any_numbers_have_an_axis_with_a_few_ticks_inside_it(values):
    axis = axis_for([value for value in values if math.isfinite(value)], share=False)
    assert 1 <= len(axis.ticks) <= 9
    for value in [*axis.ticks, *values]:
        assert 0 <= axis.place(value) <= 100


def test_names_with_markup_and_control_characters_leave_the_drawing_well_formed(results):
    names = ["<script>&'\"\x00\x1b", "]]>" + "w" * 400, "\ud800", "\uffff"]
    text = "".join(drawn(results(parts=names)).itertext())
    assert "<script>&'\"" in text


def test_the_drawing_has_a_role_a_title_and_a_description(results):
    root = drawn(results())
    assert root.get("role") == "img"
    named = {element.get("id") for element in root if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert set(root.get("aria-labelledby").split()) == named


def test_a_missing_cell_has_no_mark(results):
    found = results()
    found["rows"] = [row for row in found["rows"] if (row["stage"], row["subject"]) != ("merged", "Asia")]
    assert len(marks(drawn(found), "merged")) == 3


def test_what_has_no_finite_value_stands_on_the_edge_and_says_so(results, row):
    rows = [row("base", "text", "perplexity", 12.0), row("merged", "text", "perplexity", math.inf, low=None, high=None)]
    root = drawn(results() | {"rows": rows})
    assert marks(root, "merged") == ["100.00%"]
    assert "beyond the axis" in "".join(root.itertext())


def test_only_the_branch_of_a_part_is_drawn_as_its_own(results):
    root = drawn(results())
    assert len(marks(root, "own")) == 2
    assert len(marks(root, "branch")) == 2 + 2 * 2  # the other branch on each part, both on what is kept


def test_every_stage_is_in_the_legend_once_with_a_shape_of_its_own(results):
    keys = legend(scores_of(results()))
    assert [key.label for key in keys] == ["base", "branch of this part", "other branches", "joint control", "merged"]
    assert len({key.shape for key in keys}) == len(keys)


def test_up_to_four_controls_have_a_shape_each_and_a_stage_that_was_not_judged_has_none(results, row):
    found = results()
    names = ("joint", "random", "sequential", "average")
    found["rows"] += [row(f"control:{name}", "Asia", "accuracy", 0.5) for name in names[1:]]
    scores = scores_of(found)
    keys = legend(scores, scores.metrics[0])
    assert [key.label for key in keys if "control" in key.label] == [f"{name} control" for name in names]
    assert len({key.path for key in keys}) == len(keys)
    assert [key.label for key in legend(scores, scores.metrics[1]) if "control" in key.label] == ["joint control"]
    assert int(drawn(found, 0).get("height")) > int(drawn(results(), 0).get("height"))
    assert drawn(found, 1).get("height") == drawn(results(), 1).get("height")


def test_chance_is_a_line_of_its_own(results):
    found = results()
    assert not [line for line in drawn(found).iter(f"{SVG}line") if line.get("class") == "chance"]
    for row in found["rows"]:
        row |= {"chance": 0.25} if row["metric"] == "accuracy" else {}
    lines = [line.get("x1") for line in drawn(found).iter(f"{SVG}line") if line.get("class") == "chance"]
    assert lines == ["25.00%"]
