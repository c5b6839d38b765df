"""Settings of one method that an override hands to another are told."""

from pathlib import Path

import pytest
import yaml

from commands import call
from spunge.recipe.carried import carried_told

UNLEARN = {
    "method": "npo",
    "epochs": 3,
    "learning_rate": 0.002,
    "batch_size": 4,
    "trainable": {"kind": "lora", "rank": 16},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    content = {
        "model": "org/model",
        "forget": {"source": "rows.jsonl", "text": "text"},
        "retain": "neutral",
        "unlearn": UNLEARN,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["unlearn.method=rmu"], ["learning_rate 0.002 (its own: 0.001)", "trainable lora"]),
        (["unlearn.method=rmu", "unlearn.learning_rate=1e-4"], ["trainable lora"]),
        (["unlearn.method=simnpo", "unlearn.trainable=null"], ["learning_rate 0.002"]),
    ],
)
def test_what_stays_is_told_with_the_methods_own(recipe: str, overrides: list[str], told: list[str]) -> None:
    line = carried_told(recipe, overrides)
    assert "is run with what the recipe says for npo: " in line
    assert all(each in line for each in told)
    assert [name for name in ("learning_rate", "trainable") if f"{name} " in line] == [each.split()[0] for each in told]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["unlearn.method=npo"],
        ["unlearn.learning_rate=1e-4"],
        ["unlearn={method: rmu}"],
        [f"unlearn.{name}={value}" for name, value in {**UNLEARN, "method": "rmu"}.items()],
    ],
)
def test_nothing_is_told_where_nothing_stays_unsaid(recipe: str, overrides: list[str]) -> None:
    assert carried_told(recipe, overrides) == ""


def test_what_is_the_methods_own_anyway_is_not_told(recipe: str) -> None:
    from spunge.registry import METHODS

    own = METHODS.get("rmu").settings.model_fields["batch_size"].default
    Path(recipe).write_text(Path(recipe).read_text().replace("batch_size: 4", f"batch_size: {own}"))
    assert "batch_size" not in carried_told(recipe, ["unlearn.method=rmu"])


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_commands_tell_it_before_they_begin(recipe: str, command: str, tmp_path: Path) -> None:
    ended = call(command, recipe, "--set", "unlearn.method=rmu", cwd=tmp_path)
    assert ended.returncode == 2  # the model is none of this machine
    assert "unlearn: rmu is run with what the recipe says for npo: " in ended.stderr
