"""Models of texts and images: their language tower is unlearned with texts, and nothing else of them changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from making import read
from picked import few
from spunge.errors import RecipeError
from spunge.model.loading import load_base
from spunge.recipe.model import ModelSettings
from spunge.unlearning.targets import find_targets
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta, write_delta
from toys import SEEING, texts

EYES = ("vision", "visual", "projector", "connector")  # what the other parts are called


def is_language(name: str) -> bool:
    return not any(word in name for word in EYES)


def recipe_of(toy_recipe: dict[str, Any], folder: Path, **unlearn: Any) -> dict[str, Any]:
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 0.01, **unlearn}
    return {
        **toy_recipe,
        "model": {**toy_recipe["model"], "path": str(folder), "part": "language"},
        "unlearn": settings,
    }


@pytest.mark.parametrize("kind", few(SEEING, 0, 3))
def test_the_merged_folder_is_the_whole_model_with_another_language_tower(
    seeing: Callable[..., Path], toy_recipe: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    import transformers

    folder = seeing(kind)
    trainable = {"kind": "all"}
    results = spunge.run(
        recipe_of(toy_recipe, folder, method="graddiff", trainable=trainable, weight_decay=0.1, gru=0.8),
        tmp_path / "run",
    )
    merged = tmp_path / "run" / "merged"
    before, after = read(folder), read(merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(map(is_language, changed))
    for branch in (tmp_path / "run" / "branches").iterdir():
        assert all(map(is_language, open_delta(branch).tensors))
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        assert (merged / file).read_bytes() == (folder / file).read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == [SEEING[kind][0]]
    model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert type(model).__name__ == SEEING[kind][0]
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert {row.stage for row in results.rows} >= {"base", "merged"}


def test_a_tensor_outside_the_language_tower_is_not_trained(
    seeing: Callable[..., Path], toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainables = (
        {"kind": "tensors", "match": ["*multi_modal_projector*"]},
        {"kind": "lora", "targets": ["out_proj"]},  # a layer of the vision tower alone
    )
    for trainable in trainables:
        recipe = recipe_of(toy_recipe, seeing(), method="npo", trainable=trainable)
        with pytest.raises(RecipeError, match="of the language part"):
            spunge.run(recipe, tmp_path / "run", replace=True)


def test_a_brought_branch_that_changes_the_projector_is_refused(
    seeing: Callable[..., Path], toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder = seeing()
    name = next(name for name in read(folder) if "projector" in name)
    change = {name: torch.ones_like(read(folder)[name])}
    write_delta(tmp_path / "delta", change, {"base": Checkpoint(folder).fingerprint()})
    brought = {"method": "precomputed", "branches": {"all": str(tmp_path / "delta")}}
    recipe = {**recipe_of(toy_recipe, folder), "unlearn": brought, "split": None, "controls": []}
    with pytest.raises(RecipeError, match=f"model.part: language: .* changes '{name}'"):
        spunge.run(recipe, tmp_path / "run")
    del recipe["model"]["part"]
    spunge.run(recipe, tmp_path / "free")


def test_a_language_model_by_itself_is_all_language(tiny: Callable[..., Path]) -> None:

    base = load_base(tiny("llama"), ModelSettings(path=str(tiny("llama")), part="language"))
    assert base.trainable(base.names) == list(base.names)


def test_layers_that_the_vision_tower_has_too_are_adapted_in_the_language_tower_alone(
    seeing: Callable[..., Path],
) -> None:
    folder, parts = seeing(), []
    for part in ("language", None):
        base = load_base(folder, ModelSettings(path=str(folder), part=part))
        parts.append(find_targets(base, ["q_proj"], 0.0).layers)
    assert len(parts[0]) == 4
    assert all("language_model" in path for path in parts[0])
    assert len(parts[1]) == 5


@pytest.mark.parametrize("block", ["forget", "retain", "evaluate"])
def test_rows_with_images_are_refused_before_training_as_they_would_be_texts_alone(
    seeing: Callable[..., Path], toy_recipe: dict[str, Any], block: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"topic": "animals", "text": text, "image": f"{number}.png"} for number, text in enumerate(texts("seen", 6))
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = recipe_of(toy_recipe, seeing(), method="graddiff")
    if block == "evaluate":
        recipe["evaluate"] = [{"kind": "perplexity", "source": str(rows)}]
    else:
        recipe[block] = {"source": str(rows)}
    with pytest.raises(RecipeError, match=f"^{block}.*: the column 'image' holds what the model would see"):
        spunge.run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    if block == "forget":  # a model that sees nothing
        recipe["model"] = toy_recipe["model"]
        spunge.run({**recipe, "evaluate": []}, tmp_path / "blind")


@pytest.mark.parametrize("block", ["forget", "evaluate"])
def test_a_text_with_the_token_of_an_image_is_refused(
    seeing: Callable[..., Path], toy_recipe: dict[str, Any], tmp_path: Path, block: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(seeing(), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    word = next(word for word, number in tokenizer["model"]["vocab"].items() if number == 20)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 20, "image_token_index": 20}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"topic": "a", "text": text}) + "\n" for text in ("the city is old", f"a {word} is new"))
    )
    recipe = {**recipe_of(toy_recipe, folder, method="ga"), "retain": None, "controls": []}
    recipe["forget"] = {"source": str(rows), "where": "text LIKE 'the%'" if block == "evaluate" else None}
    recipe["evaluate"] = [{"kind": "perplexity", "source": str(rows), "by": "NULL"}]
    with pytest.raises(RecipeError, match=rf"row 2 holds '{word}', in whose place the model puts what it sees"):
        spunge.run(recipe, tmp_path / "run")
