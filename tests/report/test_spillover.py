"""The matrix of parts and stages: whose change is whose, and what is certain."""

import math

import pytest

from spunge.report.scores import arranged
from spunge.report.spillover import spillover
from spunge.results import parse_results


def scores_of(content):
    return arranged(parse_results(content))


@pytest.fixture
def found(results, pair):
    """Europe's branch lowers Europe by 0.6 and Asia by 0.2; Asia's raises Europe by 0.02."""
    content = results()
    for row in content["rows"]:
        if row["metric"] == "accuracy":
            known = {("branch:p0", "Asia"): 0.7, ("branch:p1", "Europe"): 0.92}
            row["value"] = known.get((row["stage"], row["subject"]), row["value"])
    return pair(content)


def test_a_branch_on_another_part_is_spillover_and_on_its_own_is_not(found):
    (matrix,) = spillover(scores_of(found))
    assert [model.stage for model in matrix.models] == ["merged", "branch:p0", "branch:p1", "control:joint"]
    shown = {part: [(cell.kind, cell.value, cell.certain) for cell in cells] for part, _, cells in matrix.lines}
    assert shown == {
        "Europe": [
            ("merged", "−0.60", True),
            ("own", "−0.60", True),
            ("spill", "+0.02", False),
            ("control", "−0.60", True),
        ],
        "Asia": [
            ("merged", "−0.60", True),
            ("spill", "−0.20", True),
            ("own", "−0.60", True),
            ("control", "−0.60", True),
        ],
    }
    assert matrix.lines[0][2][2].interval == "[−0.08 +0.12]"
    assert matrix.lines[0][1] == "0.90"


def test_each_branch_has_its_mean_over_the_other_parts_and_how_many_are_certain(found):
    (matrix,) = spillover(scores_of(found))
    effects = [(e.model.name, e.own.value, e.others, e.certain, e.measured) for e in matrix.effects]
    assert effects == [("Europe", "−0.60", "−0.20", 1, 1), ("Asia", "−0.60", "+0.02", 0, 1)]


def test_the_mean_of_differences_is_over_the_other_parts_alone(results, pair):
    content = results(parts=["a", "b", "c"])
    values = {("branch:p0", "a"): 0.1, ("branch:p0", "b"): 0.5, ("branch:p0", "c"): 0.8}
    for row in content["rows"]:
        row["value"] = values.get((row["stage"], row["subject"]), row["value"])
    assert spillover(scores_of(pair(content)))[0].effects[0].others == "−0.25"  # of -0.4 and -0.1


def test_ratios_have_a_geometric_mean(results, row, pair):
    content = results(parts=["a", "b", "c"])
    for part, value in (("a", 10.0), ("b", 20.0), ("c", 5.0)):
        content["rows"] += [row("base", part, "perplexity", 10.0), row("branch:p0", part, "perplexity", value)]
    matrix = spillover(scores_of(pair(content)))[1]
    assert matrix.ratio
    assert matrix.effects[0].others == "×1.000"  # of 2 and 1/2


def test_a_ratio_of_infinity_has_no_mean(results, row, pair):
    content = results()
    content["rows"] += [row("base", part, "perplexity", 10.0) for part in ("Europe", "Asia")]
    content["rows"] += [row("branch:p0", part, "perplexity", math.inf) for part in ("Europe", "Asia")]
    assert spillover(scores_of(pair(content)))[1].effects[0].others == "–"


def test_without_differences_changes_are_shown_and_none_is_certain(results):
    content = results()
    del content["differences"]
    (matrix,) = spillover(scores_of(content))
    cells = [cell for _, _, cells in matrix.lines for cell in cells]
    assert {cell.value for cell in cells} == {"−0.60"}
    assert not any(cell.certain or cell.interval for cell in cells)


def test_one_part_alone_spills_nowhere(results):
    assert spillover(scores_of(results(parts=["Europe"]))) == []


def test_a_branch_that_was_not_judged_has_no_column(results):
    content = results()
    content["rows"] = [row for row in content["rows"] if row["stage"] != "branch:p1"]
    (matrix,) = spillover(scores_of(content))
    assert [effect.model.stage for effect in matrix.effects] == ["branch:p0"]
