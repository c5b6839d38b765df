"""A recipe for a model and rows: what it guesses, how it trains by size, and what it judges by."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spunge.data.selection import select_rows
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.rows import Rows
from spunge.registry import METHODS
from spunge.run.proposal import Asked, Proposal, _set_training, propose
from toys import texts


@pytest.fixture
def asked(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Proposal]:
    """asked(by="topic") -> what is proposed for a tiny Llama and questions on two topics."""
    monkeypatch.chdir(tmp_path)
    for name, topics in {"bad": ["asia", "europe"], "good": ["other"]}.items():
        rows = [
            {"topic": topic, "question": text, "answer": f" {text[::-1]}"}
            for topic in topics
            for text in texts(topic, 25)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **more: propose(Asked(**{"model": str(tiny("llama")), "forget": "bad.jsonl", **more}))


def test_columns_and_the_attribute_are_guessed_and_said(asked: Callable[..., Proposal]) -> None:
    proposal = asked(retain="good.jsonl")
    assert proposal.content["forget"] == {"source": "bad.jsonl", "prompt": "question", "completion": "answer"}
    assert proposal.content["split"] == {"by": "topic"}
    assert proposal.content["controls"] == ["joint"]
    assert [line.partition(":")[0] for line in proposal.said] == ["forget", "split", "retain", "unlearn"]


def test_rows_to_keep_that_are_judged_are_none_of_those_that_are_trained_on(asked: Callable[..., Proposal]) -> None:
    recipe = asked(retain="good.jsonl").recipe
    assert recipe.retain is not None
    trained, judged = (
        select_rows(Rows(source=recipe.retain.source, text="question", where=where), recipe, "retain").numbers.tolist()
        for where in (recipe.retain.where, recipe.evaluate[1].where)
    )
    assert sorted(trained + judged) == list(range(25))
    assert len(judged) == 5
    assert recipe.evaluate[1].source == recipe.retain.source


@pytest.mark.parametrize(("repeated", "told"), [(0, ""), (1, "; 1 of them"), (5, "; 5 of them")])
def test_held_out_rows_that_are_trained_on_all_the_same_are_counted(
    asked: Callable[..., Proposal], repeated: int, told: str
) -> None:
    lines = Path("good.jsonl").read_text().splitlines()
    for held in range(0, 5 * repeated, 5):
        lines[held + 1] = lines[held]
    Path("good.jsonl").write_text("\n".join(lines))
    said = next(line for line in asked(retain="good.jsonl").said if line.startswith("retain:"))
    wanted = f"{told} stand among the trained rows too: leave out rows that repeat others" if told else ""
    assert said == f"retain: 5 of the 25 rows are held out of the training, to be judged by{wanted}"


def test_the_method_and_its_settings_are_said_as_they_will_run(asked: Callable[..., Proposal]) -> None:
    proposal = asked(length={"steps": 3}, overrides=["unlearn.learning_rate=0.5"])
    unlearn = proposal.content["unlearn"]
    assert proposal.said[-1].startswith("unlearn: npo; 3 steps, batch_size 8, learning_rate 0.5, LoRA of rank 16 (for ")
    assert (unlearn["steps"], unlearn["learning_rate"], unlearn["trainable"]["rank"]) == (3, 0.5, 16)


def test_without_rows_to_keep_a_method_that_needs_them_has_wikipedia(asked: Callable[..., Proposal]) -> None:
    proposal = asked()
    assert proposal.recipe.retain is not None
    assert proposal.recipe.retain.source is not None
    assert proposal.recipe.retain.source[0].path == "neutral"
    assert any("paragraphs of Wikipedia" in line for line in proposal.said)
    assert asked(overrides=["unlearn.alpha=0"]).recipe.retain is None


def test_one_part_is_added_as_it_is_without_a_control(asked: Callable[..., Proposal]) -> None:
    content = asked(by="none").content
    assert (content.get("split"), content["merge"], content["controls"]) == (None, {"rule": "task_arithmetic"}, [])


def test_what_is_said_stands_and_overrides_come_last(asked: Callable[..., Proposal]) -> None:
    overrides = ["unlearn.learning_rate=3e-4", "evaluate.0.limit=7", "forget.chat=false", "seed=5"]
    content = asked(length={"steps": 4}, overrides=overrides, controls=["random"]).content
    assert content["unlearn"]["steps"] == 4
    assert "epochs" not in content["unlearn"]
    assert content["unlearn"]["learning_rate"] == 3e-4
    assert (content["evaluate"][0]["limit"], content["forget"]["chat"], content["seed"]) == (7, False, 5)
    assert content["controls"] == ["random"]


def test_a_break_is_put_between_words_that_would_touch(asked: Callable[..., Proposal], tmp_path: Path) -> None:
    rows = [{"question": f"{text}?", "answer": text} for text in texts("asia", 8)]
    (tmp_path / "touching.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    proposal = asked(forget="touching.jsonl")
    table = split_rows(proposal.recipe).parts[0].samples.table
    assert all(prompt.endswith("?\n") for prompt in table["prompt"].to_pylist())


def test_plain_texts_are_judged_by_perplexity_and_extraction(asked: Callable[..., Proposal]) -> None:
    kinds = [(entry.name, entry.kind) for entry in asked(texts={"text": "question"}).recipe.evaluate]
    assert kinds == [("forget", "memorization"), ("forget texts", "perplexity"), ("keep", "perplexity")]


def test_a_configuration_without_weights_is_proposed_for_by_its_shapes(
    asked: Callable[..., Proposal], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    whole = asked(by="topic")
    described = tmp_path / "described"
    described.mkdir()
    shutil.copyfile(tiny("llama") / "config.json", described / "config.json")
    with pytest.raises(RecipeError, match=re.escape(str(described))):
        asked(by="topic", model=str(described))  # without a tokenizer no length is known
    for file in tiny("llama").glob("*token*"):
        shutil.copyfile(file, described / file.name)
    proposed = asked(by="topic", model=str(described))
    assert proposed.content["model"].pop("path") == str(described)
    assert {**proposed.content, "model": {}} == {**whole.content, "model": {}}
    assert proposed.remarks == whole.remarks


@pytest.mark.parametrize("method", [name for name, value in METHODS.items() if value.trains and name != "dpo"])
@pytest.mark.parametrize("entries", [1e8, 7e9])
def test_every_method_has_settings_that_it_takes_at_every_size(method: str, entries: float) -> None:
    content: dict[str, Any] = {"model": {}, "unlearn": {"method": method}}
    settings = METHODS.get(method).settings
    _set_training(content, settings, int(entries), [40, 400])
    made = settings.model_validate(content["unlearn"])
    assert made.model_dump()["learning_rate"] == content["unlearn"]["learning_rate"]
    assert content["model"].get("checkpoint_activations", False) == (entries > 3e9)
    assert {"epochs", "steps"} & content["unlearn"].keys()


def test_samples_are_cut_where_nearly_all_rows_end(asked: Callable[..., Proposal], tmp_path: Path) -> None:
    for name, words in (("short", 40), ("long", 900), ("longest", 5000)):
        (tmp_path / f"{name}.jsonl").write_text(20 * (json.dumps({"text": words * "sun "}) + "\n"))
    made = [asked(forget=f"{name}.jsonl").content["unlearn"]["max_length"] for name in ("short", "long", "longest")]
    assert made == [128, 1024, 1024]
    assert asked(overrides=["unlearn.max_length=64"]).content["unlearn"]["max_length"] == 64


def test_without_the_package_for_rouge_answers_are_judged_by_the_other_measures(
    asked: Callable[..., Proposal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.run.proposal.find_spec", lambda name: None)
    proposal = asked()
    assert proposal.content["evaluate"][0]["metrics"] == ["probability", "extraction"]
    assert any("pip install 'spunge[judge]'" in line for line in proposal.said)


def test_parts_may_be_made_without_labels(asked: Callable[..., Proposal]) -> None:
    proposal = asked(by={"clusters": 2})
    assert proposal.content["split"] == {"by": {"clusters": 2}}
    assert len(split_rows(proposal.recipe).parts) == 2
    assert proposal.content["controls"] == ["joint"]


def test_a_method_that_an_override_names_is_proposed_as_the_option_proposes_it(asked: Callable[..., Proposal]) -> None:
    named, overridden = asked(method="rmu"), asked(overrides=["unlearn.method=rmu"])
    assert overridden.content == named.content
    assert overridden.said == named.said
    assert named.content["unlearn"]["learning_rate"] != asked().content["unlearn"]["learning_rate"]


def test_rows_to_keep_are_those_that_the_overriding_method_needs(asked: Callable[..., Proposal]) -> None:
    assert asked().recipe.retain is not None
    assert asked(overrides=["unlearn.method=ga"]).recipe.retain is None


def test_settings_of_training_as_a_whole_are_refused_beside_options(asked: Callable[..., Proposal]) -> None:
    with pytest.raises(RecipeError, match="its settings are given one by one"):
        asked(length={"steps": 3}, overrides=["unlearn={method: rmu}"])


def test_branches_made_before_are_refused(asked: Callable[..., Proposal]) -> None:
    with pytest.raises(RecipeError, match="--method: 'precomputed' brings branches of its own"):
        asked(method="precomputed")
    with pytest.raises(RecipeError, match="--method: 'precomputed' brings branches of its own"):
        asked(overrides=["unlearn.method=precomputed"])
