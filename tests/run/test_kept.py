"""What scales are calibrated by: which items, and that no other ones are taken for them."""

from pathlib import Path
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.run.kept import Kept, kept_of
from spunge.run.stages.building import build, lineups

BY = "CASE WHEN length(text) % 2 = 0 THEN 'even' ELSE 'odd' END"
SWAPPED = "CASE WHEN length(text) % 2 = 0 THEN 'odd' ELSE 'even' END"


@pytest.fixture
def several(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Calibrated by an evaluation of two subjects and all rows together."""
    source = toy_recipe["retain"]["source"]
    kept = {"kind": "perplexity", "name": "kept", "text": "text", "source": source, "by": BY, "subject": "every"}
    return toy_recipe | {"evaluate": [kept], "calibrate": {"evaluation": "kept", "metric": "perplexity"}}


def kept(content: dict[str, Any], folder: Path, *edits: str) -> Kept:
    [line] = lineups(load_recipe(content, list(edits)), folder)
    found = kept_of(line.inputs.base)
    assert found is not None
    return found


def test_where_no_subject_is_named_all_rows_are_meant(several: dict[str, Any], tmp_path: Path) -> None:
    meant = kept(several, tmp_path)
    assert (meant.subject, meant.n) == ("every", meant.items[0].table.num_rows)
    named = kept(several, tmp_path, "calibrate.subject=odd")
    assert (named.subject, 0 < named.n < meant.n) == ("odd", True)


@pytest.mark.parametrize(
    "edits",
    [
        (["calibrate.subject=odd"], ["calibrate.subject=odd", f"evaluate.0.by={SWAPPED}"]),
        ([], ["calibrate.subject=odd"]),
        (["model.dtype=auto"], ["model.dtype=auto", "merge.dtype=float32"]),
    ],
    ids=["the subject has other items", "another subject", "judged in another dtype"],
)
def test_what_is_measured_otherwise_has_another_key(
    several: dict[str, Any], tmp_path: Path, edits: tuple[list[str], list[str]]
) -> None:
    several["merge"] = several.get("merge", {"rule": "ties"}) | {"dtype": "bfloat16"}
    before, after = (
        build(load_recipe(several, each), tmp_path).graph.stages["calibrate:base"].inputs() for each in edits
    )
    assert before["items"] == after["items"]
    assert before != after


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["evaluate.0.group=forget"], "calibrate.subject: 'every' of 'kept' is to be forgotten, all or in part"),
        (["evaluate.0.source=FORGET", "evaluate.0.by=topic"], "'every' of 'kept' is to be forgotten, all or in part"),
        (["evaluate.0.source=FORGET", "calibrate.subject=odd"], "'odd' of 'kept' is to be forgotten"),
        (
            ["aggregates={a: {kind: harmonic_mean, of: [ODD, {evaluation: kept, metric: x, subject: evry}]}}", "MEAN"],
            "aggregates.a: evaluation 'kept' has no subject 'evry'; did you mean 'every'",
        ),
    ],
)
def test_what_is_not_to_be_kept_is_refused_in_a_line(
    several: dict[str, Any], tmp_path: Path, edits: list[str], message: str
) -> None:
    odd = "{evaluation: kept, metric: x, subject: odd}"
    told = {"FORGET": several["forget"]["source"], "MEAN": "calibrate={aggregate: a}", "ODD": odd}
    for word, stands in told.items():
        edits = [edit.replace(word, stands) for edit in edits]
    with pytest.raises(RecipeError, match=message):
        build(load_recipe(several, edits), tmp_path)
