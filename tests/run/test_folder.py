"""Whose a run's folder is, also where the run was killed before it said so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import spunge
from spunge.errors import RecipeError, one_line
from spunge.run import folder as owning
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


LONG = "a-model-whose-name-is-long/" * 8


@pytest.mark.parametrize("folder", ["run", "a-folder-whose-name-is-long/" * 6 + "run"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": LONG + "b"}, ["model.path was ...", "is-long/a' and is now ...", "is-long/b'. It holds"]),
        ({"source": ["x" * 300, "y" * 300]}, ["forget.source was ['rows.jsonl'] and is now ['xxx"]),
        (
            {"model": LONG + "b", "source": ["other.jsonl"]},
            ["model.path was ...", " (another setting differs too). It holds"],
        ),
    ],
)
def test_what_another_recipe_made_is_refused_in_whole_sentences_however_long_its_values(
    folder: str, changes: dict[str, Any], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(model: str, source: list[str]) -> dict[str, Any]:
        return {"model.path": model, "model.revision": None, "forget.source": source, "split.by": "topic"}

    before = {"model": LONG + "a", "source": ["rows.jsonl"]}
    stamp = SimpleNamespace(stage="branch:asia", files=["branches/asia/delta.json"], inputs=known(**before))
    monkeypatch.setattr(owning, "read_stamp", lambda *_: stamp)
    monkeypatch.setattr(owning, "stamps_in", lambda _: [stamp])
    monkeypatch.setattr(owning, "faults", lambda *_, **__: [])
    monkeypatch.setattr(owning, "identity", lambda _: known(**{**before, **changes}))
    with pytest.raises(RecipeError) as refused:
        owning.refuse_replacing(tmp_path / folder, cast(Any, None))
    message = one_line(str(refused.value))
    assert message == str(refused.value)  # nothing of it is cut
    assert all(part in message for part in told), message
    assert message.endswith(
        "It holds 1 finished training; give another folder, or --replace to make again what no longer fits"
    )
