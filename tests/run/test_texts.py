"""What a run keeps of texts: as much as the recipe says, and nothing once they are cleaned away. It stays done and whole."""

import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import spunge
from commands import call
from spunge.data import keeping
from spunge.errors import RecipeError
from spunge.files import alone
from spunge.recipe.loading import load_recipe
from spunge.run.stamps import Stamp, read_stamp, store_stamp
from spunge.run.status import status
from spunge.run.texts import clean_texts
from spunge.run.verify import verify
from toys import Told, rows

SECRET = "unmistakable"  # stands in every prompt


class Kept(NamedTuple):
    recipe: dict[str, Any]
    runs: dict[str, Path]  # what is kept -> a finished run
    caches: dict[str, Path]


PLUGIN = '''
import numpy as np
from spunge.evaluation.evaluator import Evaluator, Measure
from spunge.recipe.evaluating import EvaluatorSettings


class Settings(EvaluatorSettings):
    kind: str = "keeper"
    prompt: str = "prompt"


def measure(base, settings, items, bench):
    """Keeps its prompts in a file of its own."""
    folder = bench.folder / "deep"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anything.txt").write_text("\\n".join(items["prompt"].to_pylist()))
    bench.kept.add(folder / "anything.txt")
    return [Measure("kept", np.ones(len(items)), np.ones(len(items)), higher="known", subject=None)]


KEEPER = Evaluator(
    settings=Settings, source="", measure=measure, columns=lambda settings, forget: {"prompt": settings.prompt}
)
'''


@pytest.fixture(scope="module")
def kept(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("texts")

    def write(name: str, content: list[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(folder / name)

    prompts = write("prompts.jsonl", [{"prompt": f"{SECRET} the capital of {number}"} for number in range(30)])
    (folder / "keeper.py").write_text(PLUGIN)
    recipe = {
        "model": {"path": str(tiny("llama")), "dtype": "float32"},
        "forget": {"source": write("forget.jsonl", rows(["europe", "asia"], 6))},
        "split": {"by": "topic"},
        "retain": {"source": write("retain.jsonl", rows(["other"], 6))},
        "unlearn": {"method": "rmu", "layer": 2, "steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "evaluate": [
            {
                "kind": "toxicity",
                "source": prompts,
                "scorer": "alt-profanity-check",
                "generation": {"max_new_tokens": 2},
                "stages": ["base", "merged"],
                "by": "NULL",
            },
            {
                "kind": f"{folder / 'keeper.py'}:KEEPER",
                "name": "keeper",
                "source": prompts,
                "by": "NULL",
                "subject": "kept",
            },
        ],
        "controls": [],
        "seeds": 2,
    }
    runs, caches = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        for keep in ("all", "sample", "none"):
            caches[keep] = folder / f"cache-{keep}"
            patch.setenv("SPUNGE_CACHE", str(caches[keep]))
            runs[keep] = folder / keep
            spunge.run(load_recipe({**recipe, "keep_texts": keep}), runs[keep])
    return Kept(recipe, runs, caches)


@pytest.fixture
def copied(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """copied("all") -> a copy of that run, with a copy of its cache."""

    def copy(keep: str) -> Path:
        shutil.copytree(kept.caches[keep], tmp_path / "cache")
        monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache"))
        return Path(shutil.copytree(kept.runs[keep], tmp_path / "run"))

    return copy


def holding(folder: Path) -> list[str]:
    """The files in which a prompt stands, or completions do."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    marks = (SECRET.encode(), b'"texts": [', b'"text": "')
    return [file.name for file in files if any(mark in file.read_bytes() for mark in marks)]


def figures(folder: Path) -> Any:
    content = json.loads((folder / "results.json").read_text())
    return content["rows"], content["differences"]


@pytest.mark.thorough
def test_a_run_that_is_to_keep_none_holds_no_text_and_has_the_same_scores(kept: Kept) -> None:
    # Two files of each model that writes, the plugin's of every model, and the page, which shows them side by side.
    assert len(holding(kept.runs["all"])) == 3 * 3 + 4 + 1
    assert "report.html" in holding(kept.runs["all"])
    assert holding(kept.caches["all"])
    assert holding(kept.runs["none"]) == holding(kept.caches["none"]) == holding(kept.caches["sample"]) == []
    assert figures(kept.runs["none"]) == figures(kept.runs["sample"]) == figures(kept.runs["all"])


def test_prompts_stand_beside_their_completions(kept: Kept) -> None:
    for file in kept.runs["all"].rglob("texts-*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert {line["row"]: line["prompt"] for line in lines} == {
            row: f"{SECRET} the capital of {row}" for row in range(30)
        }


def test_a_sample_is_twenty_prompts_the_same_of_every_model(kept: Kept) -> None:
    files = sorted(kept.runs["sample"].rglob("texts-*.jsonl"))
    assert len(files) == 3  # the base and a merged model of each seed
    drawn = [[json.loads(line)["row"] for line in file.read_text().splitlines()] for file in files]
    assert {len(each) for each in drawn} == {20}
    assert {tuple(sorted(each)) for each in drawn} == {tuple(sorted(drawn[0]))}
    shown = set(
        map(int, re.findall(f"{SECRET} the capital of ([0-9]+)", (kept.runs["sample"] / "report.html").read_text()))
    )
    assert shown
    assert shown <= set(drawn[0])


@pytest.mark.thorough
@pytest.mark.parametrize("keep", ["sample", "none"])
def test_a_run_whose_texts_were_dropped_is_done_and_whole(kept: Kept, copied: Callable[[str], Path], keep: str) -> None:
    run = copied(keep)
    assert {stage.state for stage in status(run)} == {"done"}
    assert [stage.title for stage in status(run) if "texts were dropped" in stage.why]
    assert verify(run).problems == []
    told = Told()
    spunge.run(load_recipe({**kept.recipe, "keep_texts": keep}), run, told)
    assert told.judged == []


def test_cleaning_removes_every_text_here_and_in_the_cache_and_the_run_stays_done(
    kept: Kept, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copied("all")
    leftover = run / "evaluation" / "merged" / "texts-0123456789abcdef.jsonl"
    leftover.write_text(SECRET)
    (run / "report.png").write_text(f"a picture of {SECRET}")
    code, out, _ = call("clean", str(run), "--texts")
    assert (code, holding(run), holding(tmp_path / "cache")) == (0, [], [])
    assert out.startswith("removed 14 files with texts (")
    assert "those of 2 judgings of the base in the cache" in out
    assert {stage.state for stage in status(run)} == {"done"}
    checked = verify(run)
    assert checked.problems == []
    assert any("texts of" in note for note in checked.notes)
    told = Told()
    spunge.run(load_recipe(kept.recipe), run, told)
    assert told.judged == []
    assert figures(run) == figures(kept.runs["all"])
    assert holding(run) == []


def test_judging_otherwise_works_after_the_texts_are_gone(kept: Kept, copied: Callable[[str], Path]) -> None:
    run, told = copied("none"), Told()
    recipe = load_recipe({**kept.recipe, "keep_texts": "none"}, ["evaluate.0.threshold=0.25"])
    spunge.run(recipe, run, told)
    assert told.judged == ["judge base: toxicity", "judge merged: toxicity", "judge merged: toxicity (seed-1)"]
    assert holding(run) == []


def test_the_cache_gives_scores_without_texts_only_to_a_run_that_is_to_keep_none(
    kept: Kept, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    copied("none")
    for keep, expected in (("none", 0), ("all", 1)):
        recipe = load_recipe({**kept.recipe, "keep_texts": keep, "seeds": 1, "evaluate": kept.recipe["evaluate"][:1]})
        spunge.run(recipe, tmp_path / keep)
        assert len(list((tmp_path / keep / "evaluation" / "base").glob("texts-*"))) == expected


def test_a_run_that_is_at_work_is_not_cleaned(copied: Callable[[str], Path]) -> None:
    run = copied("all")
    with alone(run), pytest.raises(RecipeError, match="another process is at work"):
        clean_texts(run)


def test_cleaning_follows_no_name_of_a_file_to_the_outside(copied: Callable[[str], Path], tmp_path: Path) -> None:
    run, outside = copied("all"), tmp_path / "outside"
    outside.mkdir()
    (outside / "letter.txt").write_text("mine")
    (run / "cached-rows.json").write_text(json.dumps(["../../outside/letter", "*", 5]))
    stamp = read_stamp(run, next(each.stage for each in status(run) if each.stage.startswith("judge:base/")))
    assert stamp is not None
    hostile = Stamp("judge:base/x", "../../../outside".ljust(64, "/"), {}, {}, 0.0)
    store_stamp(run, hostile)
    clean_texts(run)
    assert (outside / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("path", ["../outside/letter.txt", "/etc/hostname", "a/../../b", "..", ""])
def test_a_stamp_that_names_a_file_outside_is_none(copied: Callable[[str], Path], path: str) -> None:
    run = copied("none")
    stamp = read_stamp(run, "merged")
    assert stamp is not None
    mark = next(iter(stamp.files.values()))
    store_stamp(run, Stamp("merged", stamp.key, stamp.inputs, {path: mark}, 0.0))
    assert read_stamp(run, "merged") is None


def test_what_is_kept_has_the_mode_that_the_umask_gives(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o077)
    try:
        recipe = {**kept.recipe, "seeds": 1, "evaluate": kept.recipe["evaluate"][:1], "keep_texts": "all"}
        spunge.run(load_recipe(recipe), tmp_path / "run")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    files += list((tmp_path / "run" / "evaluation").rglob("*.jsonl"))
    assert len(files) >= 4
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}


def test_without_a_word_on_what_to_remove_nothing_is_removed(copied: Callable[[str], Path]) -> None:
    run = copied("all")
    code, _, err = call("clean", str(run))
    assert (code, err) == (2, "spunge: clean: nothing to remove is named; give --texts or --taught\n")
    assert holding(run)


COMPARER = '''
import numpy as np
from spunge.evaluation.evaluator import Evaluator, Measure
from spunge.recipe.evaluating import EvaluatorSettings


class Settings(EvaluatorSettings):
    kind: str = "comparer"
    prompt: str = "prompt"


def measure(base, settings, items, bench):
    """Compares with what the base wrote."""
    answers = bench.base_folder / "texts-of-the-base.jsonl"
    if bench.stage == "base":
        answers.parent.mkdir(parents=True, exist_ok=True)
        answers.write_text("unmistakable")
        bench.kept.add(answers)
    assert answers.read_text() == "unmistakable"
    return [Measure("alike", np.ones(len(items)), np.ones(len(items)), higher="known")]


COMPARER = Evaluator(
    settings=Settings,
    source="",
    measure=measure,
    columns=lambda settings, forget: {"prompt": settings.prompt},
    compares_texts=True,
)
'''


@pytest.mark.thorough
@pytest.mark.parametrize("keep", ["sample", "none"])
def test_the_base_writes_again_where_another_model_is_to_be_compared_with_it(
    kept: Kept, tmp_path: Path, keep: str
) -> None:
    (tmp_path / "comparer.py").write_text(COMPARER)
    source = kept.recipe["evaluate"][0]["source"]
    evaluate = {"kind": f"{tmp_path / 'comparer.py'}:COMPARER", "name": "comparer", "source": source, "by": "NULL"}
    recipe = {**kept.recipe, "keep_texts": keep, "seeds": 1, "evaluate": [{**evaluate, "stages": ["base", "merged"]}]}
    run = tmp_path / "run"
    spunge.run(load_recipe(recipe), run)
    assert not list(run.rglob("texts-*"))
    told = Told()
    spunge.run(load_recipe(recipe, ["merge.density=0.3"]), run, told)
    assert told.judged == ["judge base: comparer", "judge merged: comparer"]
    assert any("its texts were dropped, and merged is compared with them" in line for line in told.lines)
    assert not list(run.rglob("texts-*"))
    assert {stage.state for stage in status(run)} == {"done"}
    # In a folder of its own too: what the shared cache has of the base is scores without texts.
    spunge.run(load_recipe(recipe), tmp_path / "other")
    assert {stage.state for stage in status(tmp_path / "other")} == {"done"}


FAILING = '''
from pathlib import Path
from spunge.evaluation.evaluator import Evaluator
from spunge.recipe.evaluating import EvaluatorSettings


class Settings(EvaluatorSettings):
    kind: str = "failing"


def measure(base, settings, items, bench):
    """Fails."""
    raise OSError("stopped")


FAILING = Evaluator(settings=Settings, source="", measure=measure, columns=lambda settings, forget: {"prompt": "prompt"})
'''


def test_a_run_that_was_stopped_keeps_the_texts_of_the_models_that_are_still_to_be_judged(
    kept: Kept, tmp_path: Path
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    toxicity = kept.recipe["evaluate"][0]
    failing = {
        "kind": f"{tmp_path / 'failing.py'}:FAILING",
        "name": "failing",
        "source": toxicity["source"],
        "by": "NULL",
    }
    recipe = {**kept.recipe, "keep_texts": "none", "seeds": 1}
    stopped = load_recipe({**recipe, "evaluate": [toxicity, {**failing, "stages": ["merged"]}]})
    with pytest.raises(OSError, match="stopped"):
        spunge.run(stopped, tmp_path / "run")
    folder = tmp_path / "run" / "evaluation"
    assert [len(list((folder / model).glob("texts-*"))) for model in ("base", "merged")] == [1, 1]
    told = Told()
    spunge.run(load_recipe({**recipe, "evaluate": [toxicity]}), tmp_path / "run", told)
    assert told.judged == []
    assert holding(tmp_path / "run") == []


@pytest.mark.parametrize(("keep", "cleaned"), [("all", False), ("all", True), ("sample", False), ("none", False)])
def test_copies_of_rows_in_the_cache_go_with_the_texts(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, cleaned: bool
) -> None:
    monkeypatch.setattr(keeping, "IN_MEMORY", 0)
    monkeypatch.setattr(keeping, "_recent", OrderedDict())
    monkeypatch.setattr(keeping, "_mapped_here", set())
    another = tmp_path.with_name(f"{tmp_path.name}-cache") / "rows" / f"{'ab' * 32}.arrow"
    another.parent.mkdir(parents=True)
    another.write_text("of another run")
    recipe = {**kept.recipe, "keep_texts": keep, "seeds": 1, "evaluate": kept.recipe["evaluate"][:1]}
    spunge.run(load_recipe(recipe), tmp_path / "run")
    if cleaned:
        assert clean_texts(tmp_path / "run").tables == 3
    tables = sorted(another.parent.glob("*.arrow"))
    assert another in tables
    assert len(tables) == (4 if keep == "all" and not cleaned else 1)
    assert (tmp_path / "run" / "cached-rows.json").exists() == (len(tables) > 1)
