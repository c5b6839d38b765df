"""Teaching before unlearning: the taught model is the base of all that follows, made once, kept, checked and resumed."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from commands import call
from picked import few
from spunge.errors import RecipeError
from spunge.model.loading import load_base
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.run.status import status
from spunge.run.verify import verify
from spunge.unlearning.method import Task
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from toys import Told

TEACH = {"steps": 6, "learning_rate": 0.01, "batch_size": 8, "warmup": 0.0}


@pytest.fixture
def lesson(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that teaches the very rows that it makes forget, and judges their perplexity."""
    source = toy_recipe["forget"]["source"]
    toy_recipe["unlearn"]["steps"] = 1
    toy_recipe |= {"teach": TEACH, "controls": [], "evaluate": [{"kind": "perplexity", "source": source}]}
    return toy_recipe


def run(recipe: dict[str, Any], out: Path, *overrides: str, replace: bool = False) -> tuple[Any, list[str]]:
    told = Told()
    results = spunge.run(load_recipe(recipe, overrides), out, told, replace)
    made = [line for line in told.lines if line.split(" ")[0] in ("teach", "unlearn", "merge", "judge")]
    return results, made


@pytest.fixture(scope="module")
def _taught() -> dict[str, Path]:
    """Runs of this module's recipes, by name."""
    return {}


@pytest.fixture
def taught(
    lesson: dict[str, Any], _taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Path:
    """The folder of a finished run of `lesson`: a copy."""
    if not _taught:
        _taught["run"] = tmp_path_factory.mktemp("taught") / "run"
        run(lesson, _taught["run"])
    return Path(shutil.copytree(_taught["run"], tmp_path / "run"))


def test_what_is_taught_is_the_base_of_all_that_follows(lesson: dict[str, Any], taught: Path) -> None:
    results = spunge.read_results(taught)
    assert results.content["stages"] == ["base", "untaught", "branch:asia", "branch:europe", "merged"]
    assert results.value("base", "asia", "perplexity") < 0.8 * results.value("untaught", "asia", "perplexity")
    given, base, merged = map(Checkpoint, (Path(lesson["model"]["path"]), taught / "taught", taught / "merged"))
    assert open_delta(taught / "branches" / "asia").info["base"] == base.fingerprint()
    name = "model.embed_tokens.weight"  # which RMU leaves alone
    assert torch.equal(base.read(name), merged.read(name))
    assert not torch.equal(base.read(name), given.read(name))
    pairs = {(row["stage"], row["against"]) for row in results.content["differences"]}
    assert ("base", "untaught") in pairs
    checked = verify(taught)
    assert (checked.problems, checked.tensors) == ([], len(merged.tensors))
    assert run(lesson, taught)[1] == []
    page = (taught / "report.html").read_text()
    assert "the base against the untaught model" in page
    assert "Taught" in page
    card = (taught / "merged" / "README.md").read_text()
    assert "after it was taught 24 rows" in card


@pytest.mark.parametrize("trainable", [{"kind": "all"}, {"kind": "lora", "rank": 4, "dropout": 0}])
def test_teaching_is_plain_fine_tuning(
    lesson: dict[str, Any], tmp_path: Path, trainable: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    """The oracle: torch's own AdamW on transformers' own loss, one step on all rows as one batch (LoRA: its B starts at 0)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teach = {"steps": 1, "learning_rate": 0.01, "warmup": 0, "weight_decay": 0.1, "max_grad_norm": None}
    lesson["teach"] = {**teach, "trainable": trainable, "limit": 1}
    lesson |= {"evaluate": [], "unlearn": {**lesson["unlearn"], "steps": 1}}
    run(lesson, tmp_path / "run")
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "taught")
    if trainable["kind"] == "lora":
        before = Checkpoint(tiny("llama"))
        after = Checkpoint(tmp_path / "run" / "taught")
        changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
        assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(4) for p in "qv"}
        return
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    [row] = spunge.data.selection.select_lesson(load_recipe(lesson)).samples.table["text"].to_pylist()
    ids = tokenizer(row, return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer.step()
    wanted = dict(model.named_parameters())
    for name, value in taught.named_parameters():
        # Adam's first step is a sign, which for a gradient of about 0 is rounding's.
        close = torch.isclose(value, wanted[name], atol=1e-5)
        assert close.float().mean() > 0.99, name


@pytest.mark.thorough
def test_a_second_recipe_takes_what_was_taught_from_the_cache_and_never_a_damaged_one(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    lesson |= {"evaluate": [], "split": {"by": "topic", "values": ["asia"]}}
    _, made = run(lesson, tmp_path / "one")
    assert made[:2] == ["teach the base", "unlearn branch:asia"]
    told = Told()
    spunge.run(load_recipe(lesson, ["unlearn.alpha=7", "seed=9"]), tmp_path / "two", told)
    assert told.lines[told.lines.index("teach the base") + 1] == "from the cache"
    first, second = (Checkpoint(tmp_path / name / "taught").fingerprint() for name in ("one", "two"))
    assert first == second
    [kept] = (tmp_path.with_name(f"{tmp_path.name}-cache") / "taught").glob("*/model.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.unlink()
    kept.write_bytes(content)
    told = Told()
    spunge.run(load_recipe(lesson, ["unlearn.alpha=5"]), tmp_path / "three", told)
    assert told.lines[told.lines.index("teach the base") + 1] == "6 steps"
    assert Checkpoint(tmp_path / "three" / "taught").fingerprint() == first


@pytest.mark.parametrize("edit", few(["teach.learning_rate=0.02", "teach.where=\"topic = 'asia'\"", "teach.seed=1"]))
def test_other_teaching_makes_everything_again_and_only_with_replace(
    lesson: dict[str, Any], taught: Path, edit: str
) -> None:
    edited = load_recipe(lesson, [edit])
    with pytest.raises(RecipeError, match=r"holds finished trainings that no longer fit \(taught: .* give --replace"):
        spunge.run(edited, taught)
    planned = spunge.plan(edited, taught)
    assert [stage.stage for stage in planned.stages if stage.done] == ["untaught"]
    assert any("--replace" in note for note in planned.notes)
    if "rate" in edit:
        _, made = run(lesson, taught, edit, "evaluate=[]", replace=True)
        assert made == ["teach the base", "unlearn branch:asia", "unlearn branch:europe", "merge"]


def test_a_taught_model_that_is_lost_comes_back_and_nothing_else_is_made_again(
    lesson: dict[str, Any], taught: Path
) -> None:
    shutil.rmtree(taught / "taught")
    states = {stage.stage: stage.state for stage in status(taught)}
    assert (states["taught"], states["branch:asia"]) == ("damaged", "unknown")
    assert run(lesson, taught)[1] == ["teach the base"]


def test_a_teaching_that_was_killed_goes_on_where_it_was(
    lesson: dict[str, Any], taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson["evaluate"] = []
    monkeypatch.setattr("spunge.run.teach.Task", partial(Task, save_seconds=0.0))

    class Killed(Told):
        def step(self, done: int, total: int, note: str = "") -> None:
            if self.lines[-1] == "teach the base" and done == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spunge.run(load_recipe(lesson), tmp_path / "killed", Killed())
    assert list((tmp_path / "killed" / "teaching" / "taught").glob("state-*.pt"))
    run(lesson, tmp_path / "killed")
    logged = (tmp_path / "killed" / "teaching" / "taught" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    first, second = (Checkpoint(folder / "taught").fingerprint() for folder in (taught, tmp_path / "killed"))
    assert first == second
    left = {file.name for file in (tmp_path / "killed" / "teaching").rglob("*")}
    assert left == {"taught", "log.jsonl"}


def test_the_caches_copies_of_taught_models_go_when_asked(lesson: dict[str, Any], tmp_path: Path) -> None:
    run(lesson, tmp_path / "run", "evaluate=[]", "teach.steps=1")
    kept = tmp_path.with_name(f"{tmp_path.name}-cache") / "taught"
    assert len(list(kept.glob("*/model.safetensors"))) == 1
    ended = call("clean", str(tmp_path / "run"), "--taught")
    assert (ended.returncode, ended.stdout) == (0, "removed 1 taught models from the cache\n")
    assert list(kept.glob("*/model.safetensors")) == []
    assert run(lesson, tmp_path / "run", "evaluate=[]", "teach.steps=1")[1] == []
    ended = call("clean", str(tmp_path), "--taught")
    assert ended.returncode == 2
    assert "is no run's folder" in ended.stderr


@pytest.mark.thorough
def test_several_seeds_share_one_teaching(lesson: dict[str, Any], tmp_path: Path) -> None:
    results, made = run(lesson, tmp_path / "run", "seeds=2", "split.values=[asia]")
    assert made.count("teach the base") == 1
    assert sum(line.startswith("judge untaught") for line in made) == 1
    assert results.content["seeds"] == 2
    assert verify(tmp_path / "run").problems == []


def test_what_is_taught_is_written_in_the_dtype_that_is_asked_for(
    lesson: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    lesson["model"] = {"path": str(tiny("llama", torch.bfloat16))}
    run(lesson, tmp_path / "run", "teach.dtype=float32", "evaluate=[]", "split.values=[asia]")
    for name in ("taught", "merged"):
        checkpoint = Checkpoint(tmp_path / "run" / name)
        assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float32}
    planned = spunge.plan(load_recipe(lesson, ["teach.dtype=float32", "evaluate=[]"]), tmp_path / "other")
    assert planned.disk is not None
    assert planned.disk > 2 * Checkpoint(tmp_path / "run" / "taught").nbytes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("teach.text=txt", "teach.text: no column 'txt'; did you mean 'text'"),
        ("teach.where=\"topic = 'nowhere'\"", "teach.where: no row of 24 meets"),
        ("teach.packing=true", "teach.packing: prompts and completions are not packed"),
        ("teach.steps=0", "teach.steps: 0"),
        ("teach.trainable=lora", r"teach.trainable"),
        ("teach.trainable={kind: tensors, match: ['*nothing*']}", "teach.trainable.match: no parameter matches"),
        ("teach.learning_rate=1e30", r"teach.learning_rate: 1e\+30"),
        ("teach.learning_rate=1e-30", "teach"),
    ],
)
def test_a_teaching_that_cannot_be_is_one_line_that_names_its_setting(
    lesson: dict[str, Any], tmp_path: Path, edit: str, message: str
) -> None:
    if "packing" in edit:
        lesson["teach"] = {**TEACH, "prompt": "'the '", "completion": "text"}
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.run(load_recipe(lesson, [edit, "evaluate=[]"]), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "taught").exists()


def test_rows_that_the_method_cannot_be_trained_on_are_refused_before_a_base_is_taught(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    lesson["unlearn"] = {"method": "idk", "steps": 1}
    told = Told()
    with pytest.raises(RecipeError, match=r"^forget: method 'idk' answers prompts, and the rows are plain texts"):
        spunge.run(load_recipe(lesson), tmp_path / "run", told)
    assert not [*(tmp_path / "run").rglob("*.safetensors")]


def test_a_taught_model_loads_like_any_other(taught: Path, tmp_path: Path) -> None:
    folder = taught / "taught"
    base = load_base(folder, ModelSettings(path=str(folder), dtype="float32"))
    assert base.tokenizer("the capital")["input_ids"]
    told = json.loads((folder / "teaching.json").read_text())
    assert (told["rows"], told["steps"]) == (24, 6)
    assert "taught" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "teaching.json").read_text()
