"""What a run needs of the disk is asked for before it is made: with the number needed and what is there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import spunge
from spunge.errors import RecipeError
from spunge.files import require_space
from spunge.run.costs import DELTA, STATE
from spunge.run.plan import plan


class Usage(NamedTuple):
    free: int


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """disk(free): every disk has so many bytes free, and no file shares another's blocks."""

    def has(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))
        monkeypatch.setattr("spunge.merging.copying.clone", lambda source, target: False)

    return has


def test_the_number_needed_and_what_is_there_are_said(disk: Callable[[int], None], tmp_path: Path) -> None:
    disk(1_500_000)
    require_space(tmp_path / "not" / "there" / "yet", 1_500_000, "the model")
    with pytest.raises(RecipeError) as caught:
        require_space(tmp_path / "not" / "there" / "yet", 2.5e9, "the model")
    told = f"--out: the model takes 2.5 GB, and the disk that holds {str(tmp_path)!r} has 1.5 MB free; free some space or give "
    assert str(caught.value) == told + "another folder"


@pytest.mark.thorough
def test_a_run_that_does_not_fit_is_refused_before_anything_is_trained_and_goes_on_once_there_is_room(
    toy_recipe: dict[str, Any], tmp_path: Path, disk: Callable[[int], None]
) -> None:
    needed = plan(toy_recipe, tmp_path / "run").disk
    assert needed is not None
    entries = 32 * 48  # of one block's down_proj, which RMU trains by default
    assert needed > 3 * DELTA * entries
    disk(needed - 1)
    with pytest.raises(
        RecipeError, match=r"^--out: what is still to be made takes .* kB, and the disk that holds .* has"
    ):
        spunge.run(toy_recipe, tmp_path / "run")
    assert not list(tmp_path.rglob("*.safetensors"))
    disk(needed + 10 * STATE * entries)
    spunge.run(toy_recipe, tmp_path / "run")


def test_what_is_there_already_needs_no_room(
    toy_recipe: dict[str, Any], finished: Path, disk: Callable[[int], None]
) -> None:
    disk(0)
    spunge.run(toy_recipe, finished)
    (finished / "stamps" / "results.json").unlink()
    spunge.run(toy_recipe, finished)


def test_outputs_of_the_base_that_do_not_fit_are_refused_before_they_are_written(
    toy_recipe: dict[str, Any], tmp_path: Path, disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    npo = {"method": "npo", "steps": 1, "reference": "stored", "retain_loss": "kl"}
    for place in ("pipeline", "schedule"):
        monkeypatch.setattr(f"spunge.run.{place}.refuse_full", lambda begun, stages, what: None)
    disk(1000)
    with pytest.raises(RecipeError, match=r"^unlearn.reference: stored: a file of the base's outputs takes .* kB"):
        spunge.run({**toy_recipe, "unlearn": npo, "evaluate": []}, tmp_path / "run")
