"""`spunge run MODEL --forget ROWS`: from a model and rows to a judged model and a recipe that says how."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from commands import call
from toys import texts


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [f"{text}?,{text},{topic}" for topic in ("asia", "europe") for text in texts(topic, 5)]
    (tmp_path / "bad.csv").write_text("\n".join(["question,answer,topic", *lines]) + "\n")
    kept = [{"question": f"{text}?", "answer": text} for text in texts("other", 20)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return tmp_path


def test_one_line_gives_a_judged_model_and_the_recipe_that_goes_on_with_it(
    rows: Path, tiny: Callable[..., Path]
) -> None:
    options = ["--forget", "bad.csv", "--retain", "good.jsonl", "--steps", "1", "--set", "model.dtype=float32"]
    for quick in ("0.generation.max_new_tokens=2", "1.generation.max_new_tokens=2", "2.limit=2"):
        options += ["--set", f"evaluate.{quick}"]
    ended = call("run", str(tiny("llama")), *options, "--out", "runs/mine", cwd=rows)
    assert ended.returncode == 0, ended.stderr
    assert "forget: prompt: question and completion: answer (guessed" in ended.stderr
    assert "split: by topic (guessed" in ended.stderr
    results = json.loads((rows / "runs" / "mine" / "results.json").read_text())["rows"]
    judged = {(row["stage"], row["subject"], row["metric"]) for row in results}
    for stage in ("base", "branch:asia", "control:joint", "merged"):
        for subject in ("asia", "europe", "rows to keep"):
            assert (stage, subject, "answer probability") in judged
        assert (stage, "plain text", "perplexity") in judged
    recipe = yaml.safe_load((rows / "mine.yaml").read_text())
    assert recipe["unlearn"]["steps"] == 1
    again = call("run", "mine.yaml", cwd=rows)
    assert again.returncode == 0, again.stderr
    assert "unlearn" not in again.stderr
    assert json.loads((rows / "runs" / "mine" / "results.json").read_text())["rows"] == results


@pytest.mark.parametrize(
    ("call_with", "said"),
    [
        (["demo", "--forget", "bad.csv"], "--forget: 'demo' is a recipe"),
        (["mine.yaml", "--forget", "bad.csv"], "--forget: 'mine.yaml' is a recipe"),
        (
            ["tofu-small", "--forget", "bad.csv"],
            "is a shipped recipe and a folder here; for the folder write ./tofu-small",
        ),
        (
            ["org/model"],
            "recipe: no file 'org/model', nor a shipped recipe of that name; of a model give --forget ROWS too",
        ),
        (["demo", "--by", "topic"], "--by: goes with --forget ROWS"),
        (["model"], "recipe: 'model' is a folder; to unlearn with the model in it, give --forget ROWS"),
        (["model", "--forget", "none.csv"], "forget.source: no such file"),
        (["model", "--forget", "bad.csv", "--method", "npoo"], "unlearn.method: no method 'npoo'; did you mean 'npo'?"),
        (["model", "--forget", "bad.csv", "--text", "nope"], "forget.text: no column 'nope'"),
        (["model", "--forget", "bad.csv", "--steps", "1", "--epochs", "1"], "give either epochs or steps"),
        (["nowhere", "--forget", "bad.csv"], "model.path: 'nowhere' cannot be fetched from the Hub"),
    ],
)
def test_what_is_open_or_wrong_is_refused_in_one_line_and_nothing_is_written(
    rows: Path, tiny: Callable[..., Path], call_with: list[str], said: str
) -> None:
    (rows / "model").symlink_to(tiny("llama"))
    (rows / "tofu-small").mkdir()
    before = {file.name for file in rows.iterdir()}
    ended = call("run", *call_with, cwd=rows)
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
    assert {file.name for file in rows.iterdir()} - {"spunge-cache"} == before
