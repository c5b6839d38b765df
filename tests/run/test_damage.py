"""A finished run's folder with one file damaged: made again to the same, or told by name. `status` and `verify` say it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import spunge
from spunge.recipe.loading import load_recipe
from spunge.run.stamps import read_stamp
from spunge.run.status import status
from spunge.run.verify import verify
from toys import Told, rows

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x41]) + data[len(data) // 2 + 1 :],
    "null": lambda data: b"null",
    "deleted": lambda data: data,
    "folder": lambda data: data,
}


class Finished(NamedTuple):
    recipe: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with two branches, a control, choices, perplexity and completions."""
    folder = tmp_path_factory.mktemp("damage")

    def write(name: str, content: list[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(folder / name)

    questions = [
        {"topic": "asia", "question": "the capital is", "choices": ["paris", "rome"], "answer": at} for at in (0, 1)
    ]
    recipe = {
        "model": {"path": str(tiny("llama")), "dtype": "float32"},
        "forget": {"source": write("forget.jsonl", rows(["europe", "asia"], 6))},
        "split": {"by": "topic"},
        "retain": {"source": write("retain.jsonl", rows(["other"], 6))},
        "unlearn": {"method": "rmu", "layer": 2, "steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "merge": {"rule": "ties", "density": 0.5},
        "evaluate": [
            {"kind": "choices", "source": write("questions.jsonl", questions)},
            {
                "kind": "toxicity",
                "source": write("prompts.jsonl", [{"prompt": "the capital of"}] * 2),
                "scorer": "alt-profanity-check",
                "generation": {"max_new_tokens": 3},
                "stages": ["base", "merged"],
                "by": "NULL",
            },
        ],
    }
    spunge.run(load_recipe(recipe), folder / "run")
    return Finished(recipe, folder / "run")


def figures(folder: Path) -> Any:
    content = json.loads((folder / "results.json").read_text())
    return content["rows"], content["differences"]


def weights(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("branches/*/delta.safetensors"), *folder.glob("merged/*.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def files_of(folder: Path) -> list[str]:
    """Every file of a run, of the two branches one; without the list of cached tables, which only the run that read them has."""
    listed = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return [name for name in listed if name not in (".lock", "cached-rows.json") and "europe" not in name]


FILES = 41  # of that run; the number is needed before there is a run


def damaged_cases() -> list[Any]:
    """Each file by its number, with the damages in turn, so that the files of a kind meet all of them."""
    kinds = list(DAMAGES)
    pairs = [(number, kinds[number % len(kinds)]) for number in range(FILES)]
    return [pytest.param(*pair, marks=pytest.mark.thorough if pair[0] % 4 else ()) for pair in pairs]


@pytest.mark.parametrize(("number", "damage"), damaged_cases())
def test_a_damaged_file_is_made_again_to_the_same_or_told_by_name(
    finished: Finished, tmp_path: Path, number: int, damage: str
) -> None:
    files = files_of(finished.folder)
    assert len(files) == FILES
    name, run = files[number], tmp_path / "run"
    shutil.copytree(finished.folder, run)
    file = run / name
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "deleted":
        file.write_bytes(DAMAGES[damage](data))
    told = Told()
    spunge.run(load_recipe(finished.recipe), run, told)
    assert figures(run) == figures(finished.folder)
    assert weights(run) == weights(finished.folder)
    healed = file.is_file() and (name.startswith("stamps/") or "time" in name or file.read_bytes() == data)
    assert healed or any(Path(name).name in line for line in told.lines) or name.endswith((".html", "results.json"))
    assert not verify(run).problems


def test_verify_names_every_damaged_file_and_a_whole_run_has_none(finished: Finished, tmp_path: Path) -> None:
    checked = verify(finished.folder)
    assert (checked.problems, checked.notes) == ([], [])
    assert checked.tensors == 39  # of a Llama of 4 blocks
    assert checked.files > 15
    for name in ("branches/asia/delta.json", "merged/config.json", "results.json", "stamps/branch/asia.json"):
        run = tmp_path / name.replace("/", "-")
        shutil.copytree(finished.folder, run)
        (run / name).write_bytes((run / name).read_bytes()[:-3])
        assert any(name in problem for problem in verify(run).problems), name


@pytest.mark.parametrize("last", ["results", "page"])
def test_verify_says_that_a_run_whose_last_stages_are_not_made_is_not_finished(
    finished: Finished, tmp_path: Path, last: str
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (run / "stamps" / f"{last}.json").unlink()
    assert f"stamps/{last}.json is missing: the run is not finished" in verify(run).problems


def test_verify_compares_with_the_recipes_base_whatever_lies_beside_the_run(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(finished.folder, run)
    for other in (tmp_path / "base", tmp_path / "taught", run.parent / "base", run / "base", run / "taught"):
        other.mkdir()
    checked = verify(run)
    assert (checked.problems, checked.notes, checked.tensors) == ([], [], 39)


def test_verify_sees_a_merged_model_that_is_not_the_merge_of_its_deltas(finished: Finished, tmp_path: Path) -> None:
    """The checksums are right and the merge is not: as if the merge itself had been wrong."""
    import dataclasses

    from safetensors.torch import load_file, save_file

    from spunge.run.stamps import marks_of, store_stamp

    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    file = run / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] + 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    stamp = read_stamp(run, "merged")
    assert stamp is not None
    store_stamp(run, dataclasses.replace(stamp, files=marks_of(run, [run / path for path in stamp.files])))
    assert verify(run).problems == [f"merged: tensor {name!r} is not base + merge of the deltas"]


def test_status_says_what_is_done_stale_and_missing(finished: Finished, tmp_path: Path) -> None:
    assert {stage.state for stage in status(finished.folder)} == {"done"}
    assert all(stage.seconds is not None and stage.size for stage in status(finished.folder))
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    text = (run / "recipe.yaml").read_text().replace("density: 0.5", "density: 0.25")
    (run / "recipe.yaml").write_text(text)
    shutil.rmtree(run / "stamps" / "control")
    listed = {stage.stage: (stage.state, stage.why) for stage in status(run)}
    assert listed["branch:asia"] == ("done", "")
    assert listed["merged"] == ("stale", "merge.density was 0.5, is 0.25")
    assert listed["control:joint"] == ("missing", "")


@pytest.mark.thorough
def test_another_recipe_needs_replace_only_where_finished_trainings_would_go(
    finished: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = {**finished.recipe, "evaluate": [], "controls": []}
    with pytest.raises(spunge.RecipeError):
        spunge.run(load_recipe(recipe, ["split.by=topics"]), run)
    spunge.run(load_recipe(recipe), run)  # mended, into the same folder
    other = load_recipe(recipe, ["split.by=upper(topic)"])
    with pytest.raises(spunge.RecipeError, match=r"split\.by was 'topic' and is now 'upper\(topic\)'.*--replace"):
        spunge.run(other, run)
    spunge.run(other, run, replace=True)
    assert json.loads((run / "split.json").read_text())["attribute"] == "upper(topic)"
    shutil.rmtree(run / "branches")
    spunge.run(load_recipe(recipe), run)  # nothing finished is lost
