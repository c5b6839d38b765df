"""The examples of CONTRIBUTING.md, run as they stand, all in one recipe."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import spunge
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.registry import ATTACKS, EVALUATORS, METHODS, RULES, SCORERS
from spunge.weights.delta import open_delta
from toys import ROOT, texts

EXAMPLES = dict(
    re.findall(
        r"`(\w+\.py)`:\n\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
)
NAMES: dict[str, tuple[Any, str]] = {
    "bounded.py": (METHODS, "BOUNDED"),
    "median.py": (RULES, "median"),
    "entropy.py": (EVALUATORS, "ENTROPY"),
    "noise.py": (ATTACKS, "NOISE"),
    "shouting.py": (SCORERS, "SHOUTING"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def test_there_is_one_example_of_each_kind_and_it_says_what_it_is(folder: Path) -> None:
    assert set(EXAMPLES) == set(NAMES)
    for file, (registry, name) in NAMES.items():
        value = registry.get(f"{folder / file}:{name}")
        assert value.summary.endswith(".")
        assert value.source


def test_the_examples_run_as_they_stand(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"topic": topic, "prompt": text} for topic in ("europe", "asia") for text in texts(topic, 4)]
    source = str(write_rows("prompts.jsonl", prompts))
    recipe = {
        **toy_recipe,
        "unlearn": {"method": "bounded.py:BOUNDED", "ceiling": 6.0, "steps": 6, "batch_size": 4, "learning_rate": 0.01},
        "merge": "median.py:median",
        "controls": [{"name": "own", "merge": {"rule": "median.py:median", "scale": 2.0}}],
        "evaluate": [
            {"kind": "entropy.py:ENTROPY", "name": "entropy", "source": source},
            {"kind": "audit", "of": "entropy", "attack": "noise.py:NOISE"},
            {
                "kind": "toxicity",
                "source": source,
                "scorer": "shouting.py:SHOUTING",
                "generation": {"max_new_tokens": 4},
            },
            {"kind": "perplexity", "source": toy_recipe["forget"]["source"]},
        ],
    }
    # Names of files are relative to where the command runs.
    monkeypatch.chdir(folder)
    loaded = load_recipe(recipe)
    monkeypatch.chdir("/")
    results = spunge.run(loaded, folder / "run")
    for topic in ("europe", "asia"):
        assert results.value(f"branch:{topic}", topic, "perplexity") > results.value("base", topic, "perplexity")
        entropy = results.value("merged", topic, "entropy")
        assert 0 < entropy < torch.log(torch.tensor(128.0))
        assert results.value("merged", topic, "entropy with noise") != entropy
        assert results.value("merged", topic, "toxic") == 0
    assert {row.attack for row in results.rows} == {None, f"{folder / 'noise.py'}:NOISE"}
    # The median of two branches is the lesser one, entry by entry.
    first, second = (open_delta(folder / "run" / "branches" / slug) for slug in ("asia", "europe"))
    name = next(iter(first.tensors))
    expected = torch.minimum(first.dense(name), second.dense(name))
    from spunge.weights.checkpoint import Checkpoint

    base, merged = (Checkpoint(Path(place)).read(name) for place in (loaded.model.path, folder / "run" / "merged"))
    torch.testing.assert_close(merged, base + expected)


def test_names_of_files_are_relative_to_the_recipe_that_names_them(
    toy_recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_recipe |= {
        "unlearn": "bounded.py:BOUNDED",
        "merge": {"rule": "median.py:median"},
        "controls": [{"name": "own", "merge": "median.py:median"}],
        "evaluate": [
            *toy_recipe["evaluate"],
            {"kind": "audit", "of": "choices", "attack": {"kind": "noise.py:NOISE", "share": 0.5}},
            {"kind": "toxicity", "scorer": "shouting.py:SHOUTING", "prompt": "text"},
        ],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(toy_recipe))
    monkeypatch.chdir("/")
    recipe: Any = load_recipe(file)
    assert recipe.unlearn.method == f"{folder}/bounded.py:BOUNDED"
    assert recipe.merge.rule == recipe.controls[0].merge.rule == f"{folder}/median.py:median"
    assert recipe.evaluate[-2].attack.kind == f"{folder}/noise.py:NOISE"
    assert recipe.evaluate[-2].attack.share == 0.5
    assert recipe.evaluate[-2].name == "NOISE choices"
    assert recipe.evaluate[-1].scorer.kind == f"{folder}/shouting.py:SHOUTING"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
