"""Links and names that lead out of a folder: nothing outside is written, removed or taken over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spunge
from commands import call
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.weights.folder import copied


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    from toys import rows

    folder = tmp_path_factory.mktemp("links")
    for name, topics in (("forget", ["europe", "asia"]), ("retain", ["other"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(topics, 6)))
    recipe = {
        "model": {"path": str(tiny("llama")), "dtype": "float32"},
        "forget": {"source": str(folder / "forget.jsonl")},
        "split": {"by": "topic"},
        "retain": {"source": str(folder / "retain.jsonl")},
        "unlearn": {"method": "rmu", "layer": 2, "steps": 1, "batch_size": 4, "learning_rate": 0.01},
        "controls": [],
        "evaluate": [{"kind": "perplexity", "by": "topic"}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUNGE_CACHE", str(folder / "cache"))
        spunge.run(load_recipe(recipe), folder / "run")
    return recipe, folder / "run"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "letter.part").write_text("mine")
    (folder / "model.safetensors").write_text("mine")
    return folder


def untouched(outside: Path) -> bool:
    return {file.name: file.read_text() for file in outside.iterdir()} == {
        "letter.part": "mine",
        "model.safetensors": "mine",
    }


PLANTED = [
    "branches",
    "branches/europe",
    "evaluation",
    "evaluation/base",
    "merged",
    "stamps",
    "seeds",
    "base",
    "new/deep",
]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("command", ["run", "clean"])
def test_a_planted_link_to_a_folder_outside_is_refused_by_name(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, outside: Path, name: str, command: str
) -> None:
    recipe, run = finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = {
        "run": ["run", str(tmp_path / "recipe.yaml"), "--out", str(run)],
        "clean": ["clean", str(run), "--texts"],
    }
    ended = call(*arguments[command])
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    if not (command == "clean" and name == "stamps"):
        assert "is a link that leads out of the folder" in ended.stderr
    assert untouched(outside)


@pytest.mark.parametrize(
    "name",
    ["branches/europe/log.jsonl", "results.json", "recipe.yaml", ".lock", "merged/config.json", "stamps/merged.json"],
)
def test_a_planted_link_to_a_file_outside_is_not_written_through(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, outside: Path, name: str
) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "letter.part")
    with pytest.raises(RecipeError, match="is a link that leads out of the folder"):
        spunge.run(load_recipe(finished[0], ["unlearn.steps=2"]), run)
    assert untouched(outside)


def test_links_inside_a_run_and_a_run_behind_a_link_are_no_matter(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    (run / "latest").symlink_to("merged")
    (tmp_path / "link").symlink_to(run)
    results = spunge.run(load_recipe(finished[0]), tmp_path / "link")
    assert results.folder == run
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["out", "beside"])
def test_a_merge_writes_through_no_link(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, outside: Path, kind: str
) -> None:
    recipe, run = finished
    out = tmp_path / "merged"
    (out if kind == "out" else tmp_path / ".merged.merging").symlink_to(outside)
    deltas = [argument for part in ("europe", "asia") for argument in ("--model", str(run / "branches" / part))]
    ended = call("merge", "--base", recipe["model"]["path"], *deltas, "--out", str(out))
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
    assert untouched(outside)


def test_a_model_whose_files_are_links_is_copied_as_files(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    base, run = Path(finished[0]["model"]["path"]), finished[1]
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    delta = run / "branches" / "europe"
    ended = call("merge", "--base", str(snapshot), "--model", str(delta), "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink()]
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    "module", ["a/../../x.Model", "/x.Model", "../x.Model", "..x.Model", "a\\b.Model", "x\0.Model", "x/y.Model"]
)
def test_code_that_a_models_configuration_names_outside_is_not_copied(tmp_path: Path, module: str) -> None:
    folder = tmp_path / "deep" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": module}}))
    for stray in (tmp_path / "x.py", tmp_path / "deep" / "x.py"):
        stray.write_text("secret = 1")
    assert [str(name) for name in copied(folder, tmp_path / "out")] == ["config.json"]


def test_a_model_whose_code_imports_from_outside_takes_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "mine.Model"}}))
    (folder / "mine.py").write_text("import ./../x\nfrom .../x import y\nfrom .other import z\n")
    (folder / "other.py").write_text("z = 1")
    (tmp_path / "x.py").write_text("secret = 1")
    assert {str(name) for name in copied(folder, tmp_path / "out")} == {"config.json", "mine.py", "other.py"}
