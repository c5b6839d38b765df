"""A probe of one's own: its numbers, what it refuses, and that it judges a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import spunge
from spunge.cli import app
from spunge.data.samples import Text, encode
from spunge.errors import RecipeError
from spunge.evaluation.scorers.probe import fit, load_probe, pooled_states, text_states
from spunge.evaluation.scorers.training import train_probe
from spunge.recipe.loading import load_recipe
from toys import ARCHITECTURES, texts


def labelled(topic: str, count: int = 40) -> list[dict[str, Any]]:
    """Statements that are bad where they hold the word `dog`."""
    found = []
    for number, text in enumerate(texts(topic, count)):
        words = [word for word in text.split() if word != "dog"]
        bad = number % 2 == 0
        found.append({"text": " ".join([*words, "dog", "dog"] if bad else words), "bad": bad, "number": number})
    return found


@pytest.fixture
def trained(tiny: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path) -> Any:
    rows = write_rows("labelled.jsonl", labelled("probe"))
    return train_probe(str(tiny("llama")), rows, "text", "bad", tmp_path / "probe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_the_means_of_the_models_own(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    coded = [encode(Text("", text), base.tokenizer, 32) for text in texts("states", 5)]
    found = pooled_states(base, coded, [1, 2])
    for row, text in zip(found, coded, strict=True):
        with torch.no_grad():
            states = base.model(input_ids=torch.tensor([text.ids]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[2][0].mean(dim=0), states[3][0].mean(dim=0)])
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_probabilities_are_scikit_learns_without_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    states = generator.normal(size=(60, 4)) * [1, 10, 0.1, 1] + 3
    labels = (states[:, 0] + generator.normal(size=60) > 3).astype(int)
    fitted = fit(states, labels)
    scaled = (states - states.mean(axis=0)) / (states.std(axis=0) + 1e-6)
    model = LogisticRegression(C=fitted.strength, max_iter=500).fit(scaled, labels)
    np.testing.assert_allclose(fitted.probabilities(states), model.predict_proba(scaled)[:, 1], rtol=1e-6)
    assert 0.7 < fitted.auroc < 1


def test_labels_without_a_pattern_give_an_auroc_near_a_half() -> None:
    generator = np.random.default_rng(0)
    assert 0.3 < fit(generator.normal(size=(200, 3)), generator.integers(0, 2, 200)).auroc < 0.7


def test_a_probe_tells_what_it_learned_on_texts_it_never_saw(trained: Any) -> None:
    assert trained.description["auroc"] > 0.9
    assert (trained.description["rows"], trained.description["positive"]) == (40, 20)
    probe = load_probe(str(trained.folder))
    fresh = labelled("fresh")
    scores = probe.probabilities([row["text"] for row in fresh])
    assert np.mean((scores >= 0.5) == [row["bad"] for row in fresh]) > 0.9
    assert probe.probabilities(["", "the dog"]).shape == (2,)


def test_a_saved_probe_is_the_fitted_one(trained: Any, load: Callable[..., Any]) -> None:
    probe = load_probe(str(trained.folder))
    rows = labelled("probe")
    states = text_states(load("llama"), [row["text"] for row in rows], probe.blocks, probe.max_length)
    again = fit(states, np.array([row["bad"] for row in rows], dtype=int))
    np.testing.assert_allclose(again.probabilities(states), probe.fitted.probabilities(states), rtol=1e-5)


def test_rows_that_a_recipe_trains_on_are_refused(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = labelled("probe")
    file = write_rows("labelled.jsonl", rows)
    forget = write_rows("mixed.jsonl", [{"topic": "europe", "text": f" {row['text']} "} for row in rows[:3]])
    given = {**toy_recipe, "forget": {"source": str(forget)}}
    with pytest.raises(RecipeError, match="3 of the rows are trained on"):
        train_probe(str(tiny("llama")), file, "text", "bad", tmp_path / "p", forget=load_recipe(given))
    train_probe(str(tiny("llama")), file, "text", "bad", tmp_path / "p", where="number > 2", forget=load_recipe(given))


@pytest.mark.thorough
def test_a_probe_judges_a_run_but_never_rows_it_knows(
    toy_recipe: dict[str, Any], trained: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = write_rows("prompts.jsonl", [{"topic": "europe", "prompt": text} for text in texts("prompts", 4)])
    entry = {"kind": "toxicity", "scorer": str(trained.folder), "generation": {"max_new_tokens": 4}, "by": "NULL"}
    results = spunge.run(load_recipe({**toy_recipe, "evaluate": [{**entry, "source": str(prompts)}]}), tmp_path / "run")
    assert 0 <= results.value("merged", "all", "toxic") <= 1
    assert results.content["evaluations"][0]["instrument"]["auroc"] == trained.description["auroc"]
    known = write_rows("known.jsonl", [{"topic": "europe", "prompt": row["text"]} for row in labelled("probe")[:2]])
    with pytest.raises(RecipeError, match="trained on 2 of the prompts"):
        spunge.run(load_recipe({**toy_recipe, "evaluate": [{**entry, "source": str(known)}]}), tmp_path / "other")


def test_a_probe_of_another_models_weights_is_refused(trained: Any) -> None:
    file = trained.folder / "probe.json"
    file.write_text(file.read_text().replace(trained.description["weights"], "0" * 64))
    with pytest.raises(RecipeError, match="not the model that the probe"):
        load_probe(str(trained.folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "number < 3"}, "3 rows meet 'number < 3'"),
        ({"label": "bda"}, "bda"),
        ({"blocks": [9]}, "blocks 0 to 3"),
    ],
)
def test_what_cannot_be_trained_is_said(
    tiny: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"text": "text", "label": "bad", **changes}
    with pytest.raises(RecipeError, match=message):
        train_probe(str(tiny("llama")), write_rows("l.jsonl", labelled("probe")), out=tmp_path / "p", **given)


def test_a_folder_with_something_else_in_it_is_left_alone(
    tiny: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "letter.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is no probe"):
        train_probe(str(tiny("llama")), write_rows("l.jsonl", labelled("probe")), "text", "bad", tmp_path / "p")


def test_the_command_trains_a_probe(tiny: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows("labelled.jsonl", labelled("probe"))
    given = ["--model", str(tiny("llama")), "--rows", str(rows), "--label", "bad", "--block", "1", "--json"]
    found = CliRunner().invoke(app, ["probe", *given, "--out", str(tmp_path / "p")])
    assert found.exit_code == 0, found.output
    described = json.loads(found.stdout)
    assert (described["blocks"], described["rows"]) == ([1], 40)
    assert load_probe(str(tmp_path / "p")).blocks == (1,)
