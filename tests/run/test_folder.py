"""Whose a run's folder is, also where the run was killed before it said so."""

from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import RecipeError
from spunge.run.folder import claimed

LEFT = ["recipe.yaml.0a1b2c3d.part", "cached-rows.json", "cached-rows.json.0a1b2c3d.part", ".base.part", "base"]


@pytest.mark.parametrize("left", LEFT)
def test_a_run_that_was_killed_before_its_recipe_was_written_goes_on_in_its_folder(
    toy_recipe: dict[str, Any], tmp_path: Path, left: str
) -> None:
    run = tmp_path / "run"
    with claimed(run):
        pass
    file = run / left
    file.write_text("[]") if file.suffix else file.mkdir()
    toy_recipe |= {"evaluate": [], "controls": [], "unlearn": toy_recipe["unlearn"] | {"steps": 1}}
    spunge.run(toy_recipe, run)
    assert (run / "results.json").exists()
    assert not list(run.rglob("*.part"))


def test_a_folder_with_files_of_something_else_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="exists and is no run's folder"):
        claimed(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
