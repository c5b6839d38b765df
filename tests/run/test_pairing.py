"""Two runs, item by item."""

import json
import shutil
from pathlib import Path

import pytest

from spunge.report.comparison import compare
from spunge.results import read_results
from spunge.run.pairing import with_pairs

FIELDS = ("subject", "metric", "kind", "value", "low", "high", "n", "changed", "wanted")


@pytest.fixture
def two(finished: Path, tmp_path: Path) -> list[Path]:
    """The second run's merged model is the first one's base, as far as its measurements tell."""
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    for file in (other / "evaluation" / "base").glob("*.json"):
        shutil.copy(file, other / "evaluation" / "merged" / file.name)
    return [other, finished]


def test_two_runs_are_paired_by_item_as_two_stages_of_one_are(two: list[Path]) -> None:
    paired = with_pairs(compare(two))
    assert paired.notes() == []
    own = [row for row in read_results(two[1]).differences if (row.stage, row.against) == ("merged", "base")]
    assert own
    assert {tuple(vars(each.difference)[name] for name in FIELDS) for each in paired.paired} == {
        tuple(vars(row)[name] for name in FIELDS) for row in own
    }
    assert {each.run for each in paired.paired} == {1}


def test_a_run_without_its_items_is_not_paired_and_that_is_said(two: list[Path]) -> None:
    shutil.rmtree(two[1] / "evaluation" / "merged")
    paired = with_pairs(compare(two))
    assert paired.paired == ()
    [note] = paired.notes()
    assert note.startswith("'run' is not paired by item: ")
    assert "is missing" in note


@pytest.mark.parametrize("cut", [True, False])
def test_items_that_are_not_those_of_the_rows_now_are_not_paired(two: list[Path], cut: bool) -> None:
    if cut:  # a file of fewer items
        for file in (two[1] / "evaluation" / "merged").glob("*.json"):
            content = json.loads(file.read_text())
            for measure in content["measures"]:
                measure |= {name: measure[name][:-1] for name in ("numerator", "denominator")}
            file.write_text(json.dumps(content))
    else:  # results of other rows than the recipe's are now
        for run in two:
            content = json.loads((run / "results.json").read_text())
            for each in content["evaluations"]:
                each["rows"] = "0" * 12
            (run / "results.json").write_text(json.dumps(content))
    paired = with_pairs(compare(two))
    assert paired.paired == ()
    assert ("items, and its file holds" if cut else "are not what its rows are now") in paired.notes()[0]


def test_where_the_recipe_is_gone_nothing_is_paired_and_the_scores_stand(two: list[Path]) -> None:
    (two[0] / "recipe.yaml").unlink()
    paired = with_pairs(compare(two))
    assert paired.paired == ()
    assert paired.notes()[0].startswith("nothing is paired by item: ")
    assert list(paired.lines())
