"""Audits in a recipe: what is written, what is refused, what relearning brings back, and that the model stays as it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import torch

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.attacks.relearning import RelearnSettings, chosen
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.audit import AUDIT, AuditSettings
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.perplexity import PERPLEXITY, PerplexitySettings
from spunge.evaluation.statistics import score
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.unlearning.finetuning import finetune
from toys import ROOT, texts

VALID = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "results.schema.json").read_text()))

FORGET = {"asia": Samples(pa.table({"text": texts("asia", 8)})), "europe": Samples(pa.table({"text": texts("eu", 8)}))}
RETAIN = Samples(pa.table({"text": texts("other", 20)}))
INNER = PerplexitySettings(name="forgotten")
BENCH = Bench(
    "merged",
    "model",
    Path(),
    Path(),
    forget=FORGET,
    retain=RETAIN,
    settings_of={"forgotten": INNER},
    finetune=finetune,
)
ITEMS = pa.table({"text": texts("eu", 8)})
TINY_STEPS = {"batch_size": 4, "learning_rate": 0.02}


def audit(attack: dict[str, Any], **settings: Any) -> AuditSettings:
    return AuditSettings.model_validate({"kind": "audit", "attack": attack, "of": "forgotten", **settings})


def values(measures: list[Measure]) -> dict[str, float]:
    return {measure.metric: score([measure], range(len(measure.numerator))).value for measure in measures}


def weights(base: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in base.model.named_parameters()}


def test_relearning_starts_from_the_plain_measurement_and_brings_the_forget_rows_back(load: Callable[..., Any]) -> None:
    base = load(initializer_range=0.3)  # as great as a trained model's: LoRA leaves the output head as it is
    before = weights(base)
    [plain] = PERPLEXITY.measure(base, INNER, ITEMS, BENCH)
    attack = {
        "kind": "relearn",
        "on": "forget",
        "samples": 16,
        "steps": [30, 0, 10],
        "batch_size": 8,
        "learning_rate": 0.02,
    }
    found = AUDIT.measure(base, audit(attack), ITEMS, BENCH)
    assert [measure.metric for measure in found] == [
        f"perplexity after relearning on 16 forget rows, {step} steps" for step in (0, 10, 30)
    ]
    assert {measure.of for measure in found} == {"perplexity"}
    assert found[0].numerator.tolist() == plain.numerator.tolist()
    none, some, many = values(found).values()
    assert none > 100  # of 128 words
    assert many < some < 10
    assert many < 1.5
    after = weights(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in base.model.parameters())
    assert not base.model.training


def test_relearning_on_few_steps_is_the_start_of_relearning_on_many(load: Callable[..., Any]) -> None:
    base = load()
    runs = [{"kind": "relearn", "on": "retain", "steps": steps, **TINY_STEPS} for steps in ([4], [2, 4, 6])]
    short, long = (AUDIT.measure(base, audit(attack), ITEMS, BENCH) for attack in runs)
    assert short[0].metric == long[1].metric == "perplexity after relearning on 20 retain rows, 4 steps"
    assert short[0].numerator.tolist() == long[1].numerator.tolist()


def test_relearned_forget_rows_come_evenly_from_the_parts() -> None:
    def drawn(count: int, seed: int = 0) -> list[str]:
        found: list[str] = (
            chosen(RelearnSettings(on="forget", samples=count), Target(INNER, ITEMS), replace(BENCH, seed=seed))
            .table["text"]
            .to_pylist()
        )
        return found

    asia, europe = ({*samples.table["text"].to_pylist()} for samples in FORGET.values())
    assert [len(asia & {*drawn(5)}), len(europe & {*drawn(5)})] == [3, 2]
    assert len(drawn(100)) == 16
    assert drawn(5) == drawn(5) != drawn(5, seed=1)
    assert len(drawn(1)) == 1


def test_relearning_needs_rows(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"add retain\.source, or set it to forget"):
        AUDIT.measure(load(), audit({"kind": "relearn"}), ITEMS, replace(BENCH, retain=None))


def test_texts_written_by_an_attacked_model_are_kept_apart(load: Callable[..., Any]) -> None:
    seen: list[str] = []

    def spy(base: Any, settings: Any, items: pa.Table, bench: Bench) -> list[Measure]:
        seen.append(bench.model)
        bench.progress(1, 2)
        return [Measure("share", np.ones(1), np.ones(1), "known")]

    done: list[tuple[int, int]] = []
    bench = replace(BENCH, progress=lambda at, total, note="": done.append((at, total)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spunge.evaluation.perplexity.PERPLEXITY", replace(PERPLEXITY, measure=spy))
        for attack in (
            {"kind": "relearn", "steps": [0, 1, 2]},
            {"kind": "relearn", "on": "forget", "steps": [1]},
            {"kind": "quantise", "bits": "int8"},
            {"kind": "quantise", "bits": "rtn4"},
        ):
            AUDIT.measure(load(), audit(attack), ITEMS, bench)
    assert seen[0] == "model", "before the first step it is the stage's own model"
    assert len(set(seen)) == 6
    assert done[:3] == [(1, 6), (3, 6), (5, 6)]


def test_a_measure_made_again_names_what_it_repeats() -> None:
    measure = Measure("toxic", np.ones(2), np.ones(2), "bad", worst=True, chance=0.5)
    target = Target(INNER, ITEMS)
    found = target.again(measure, "quantised to int8")
    assert (found.metric, found.of, found.worst, found.chance) == ("toxic quantised to int8", "toxic", False, 0.5)
    assert (found.curve, found.at, found.unit) == (None, None, None)
    named = replace(target, label="crushed {0}").again(measure, "quantised", ", {} levels", at=3, unit="levels")
    assert (named.metric, named.curve) == ("toxic crushed {0}, 3 levels", "toxic crushed {0}, N levels")
    assert (named.at, named.unit) == (3, "levels")


AUDITED = {"kind": "audit", "of": "choices"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "audit", "of": "choices"}, r"evaluate\.2\.attack: missing"),
        ({**AUDITED, "attack": "relaern"}, r"evaluate\.attack\.kind: no attack 'relaern'; did you mean 'relearn'"),
        (
            {**AUDITED, "attack": {"kind": "relearn", "stpes": [1]}},
            r"attack\.stpes: no such setting; did you mean 'steps'",
        ),
        (
            {**AUDITED, "attack": {"kind": "relearn", "steps": [-1]}},
            r"evaluate\.2\.attack\.steps.*greater than or equal",
        ),
        ({**AUDITED, "attack": {"kind": "quantise", "bits": "int3"}}, r"evaluate\.2\.attack\.bits: 'int3'"),
        ({**AUDITED, "attack": {"kind": "reword", "templates": ["no"]}}, r"templates.*put \{question\} where"),
        ({"kind": "audit", "attack": "relearn"}, r"evaluate\.of: missing; name the evaluation"),
        ({"kind": "audit", "attack": "relearn", "of": "choicse"}, r"did you mean 'choices'"),
        ({**AUDITED, "attack": "membership", "source": "x.jsonl"}, r"evaluate\.of: attack membership measures nothing"),
        ({"kind": "audit", "attack": "membership"}, r"evaluate\.source: missing; attack membership needs rows"),
        (
            {**AUDITED, "attack": "relearn", "limit": 3},
            r"evaluate\.limit: attack relearn reads no rows without a source",
        ),
        ({**AUDITED, "attack": {"kind": "relearn", "learning_rate": []}}, r"attack\.learning_rate"),
        ({**AUDITED, "attack": {"kind": "relearn", "optimizer": "adam"}}, r"attack\.optimizer: 'adam'"),
        ({**AUDITED, "attack": "probe", "source": "x.jsonl"}, r"evaluate\.source: attack probe has no use for it"),
        (
            {"kind": "audit", "attack": "membership", "where": "true", "by": "x"},
            r"evaluate\.by: attack membership has no",
        ),
    ],
)
def test_audits_that_make_no_sense_are_refused(toy_recipe: dict[str, Any], entry: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**toy_recipe, "evaluate": [*toy_recipe["evaluate"], entry]})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**AUDITED, "attack": "relearn"}], r"evaluate\.attack\.on: the recipe has no retain rows"),
        ([{**AUDITED, "attack": {"kind": "prefix", "shots": 1}}], r"attack\.shots: the recipe has no retain rows"),
        ([{**AUDITED, "of": "texts", "attack": "probe"}], "probe needs a 'choices' evaluation, and this is a 'perpl"),
        ([{**AUDITED, "of": "texts", "attack": "reword"}], "a 'perplexity' evaluation has no prompts to change"),
        ([{**AUDITED, "of": "texts", "attack": "prefix"}], "a 'perplexity' evaluation has no prompts to change"),
        ([{**AUDITED, "attack": "reword", "where": "true"}], r"evaluate\.where: attack reword reads no rows without"),
        (
            [{**AUDITED, "attack": "quantise", "name": "rough"}, {**AUDITED, "of": "rough", "attack": "quantise"}],
            "'rough' is an audit itself",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_is_trained(
    toy_recipe: dict[str, Any], entries: list[Any], message: str
) -> None:
    recipe = {**toy_recipe, "unlearn": {"method": "ga"}, "evaluate": [*toy_recipe["evaluate"], *entries]}
    recipe["evaluate"][1]["name"] = "texts"
    del recipe["retain"]
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_a_recipe_with_audits_is_written_out_and_read_back(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    attacks = ["relearn", {"kind": "probe", "block": 2}, {"kind": "probe", "block": [0.5, 1]}, {"kind": "quantise"}]
    audits = [{**AUDITED, "attack": attack} for attack in attacks]
    audits[2]["name"] = "deeper"
    recipe = load_recipe({**toy_recipe, "evaluate": [*toy_recipe["evaluate"], *audits]})
    assert [entry.name for entry in recipe.evaluate[2:]] == [
        "relearn choices",
        "probe choices",
        "deeper",
        "quantise choices",
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.fixture
def audited_recipe(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> dict[str, Any]:
    unseen = write_rows("unseen.jsonl", [{"text": text} for text in texts("unseen", 10)])
    judged = {"kind": "perplexity", "name": "forgotten", "source": toy_recipe["forget"]["source"]}
    audits = [
        {"of": "forgotten", "attack": {"kind": "relearn", "on": "forget", "steps": [0, 20], **TINY_STEPS}},
        {"of": "forgotten", "attack": {"kind": "quantise", "bits": "int8"}},
        {"of": "choices", "attack": {"kind": "prefix", "shots": 1}},
        {"of": "choices", "attack": "reword"},
        {"of": "choices", "attack": {"kind": "probe", "folds": 2}},
        {"of": "forgotten", "attack": {"kind": "lens", "block": 1}},
        {"of": "forgotten", "attack": {"kind": "ablate", "block": 1}},
        {"of": "choices", "attack": {"kind": "suffix", "steps": 1, "candidates": 2, "items": 1}},
        {"attack": "membership", "source": str(unseen)},
    ]
    return {
        **toy_recipe,
        "unlearn": {"method": "ga", "steps": 10, "batch_size": 4, "learning_rate": 0.02},
        "controls": [],
        # An audit may stand before what it is of.
        "evaluate": [{"kind": "audit", **audits[0]}, *toy_recipe["evaluate"], judged]
        + [{"kind": "audit", **each} for each in audits[1:]],
    }


@pytest.mark.thorough
def test_a_run_with_every_attack_says_how_much_comes_back(audited_recipe: dict[str, Any], tmp_path: Path) -> None:
    results = spunge.run(load_recipe(audited_recipe), tmp_path / "run")
    measured = {(row.stage, row.subject, row.metric): row for row in results.rows}
    settings = {each.name: each.settings for each in results.evaluations}
    assert settings["choices"] == {"description": "", "max_length": 2048, "normalize": "none", "orders": 1} | {
        "separator": " ",
        "style": "cloze",
        "answers_from": "auto",
    }
    assert settings["quantise forgotten"] == {
        "attack": {"kind": "quantise", "bits": "int8"},
        "of": "forgotten",
        "label": None,
    }
    VALID.validate(json.loads((tmp_path / "run" / "results.json").read_text()))
    by_metric = {row.metric: row for row in results.recovered if row.stage == "merged"}
    plain, start = "perplexity", "perplexity after relearning on 24 forget rows, 0 steps"
    end, rough = "perplexity after relearning on 24 forget rows, 20 steps", "perplexity quantised to int8"
    for stage in ("base", "merged"):
        assert measured[stage, "asia", start].value == measured[stage, "asia", plain].value
        assert measured[stage, "asia", rough].value != measured[stage, "asia", plain].value
        assert {subject for _, subject, metric in measured if metric == "min-20% AUROC"} == {"asia", "europe", "all"}
    assert by_metric[start].value == 0
    assert by_metric[end].value > 0.5, "twenty steps on the forget rows undo ten of gradient ascent"
    assert abs(by_metric[rough].value) < 0.2
    assert {row.of for row in by_metric.values()} <= {"perplexity", "accuracy"}
    assert (measured["merged", "asia", end].curve, measured["merged", "asia", end].unit) == (
        end[:-8] + "N steps",
        "steps",
    )
    attacks = {(row.metric, row.attack, row.of, row.at) for row in results.rows if row.subject == "asia"}
    assert {(plain, None, None, None), (start, "relearn", plain, 0), (end, "relearn", plain, 20)} <= attacks
    assert {(rough, "quantise", plain, None), ("min-20% AUROC", "membership", None, None)} <= attacks
    assert ("accuracy of a linear probe, block 2", "probe", "accuracy", 2) in attacks
    assert ("accuracy prefixed, best of 5", "prefix", None, None) in attacks
    metrics = {metric for _, _, metric in measured}
    assert {"perplexity by the logit lens, block 1", "perplexity without the direction of refusal"} <= metrics
    assert {
        "accuracy with a searched suffix",
        "accuracy prefixed, best of 5",
        "accuracy reworded",
        "accuracy of a linear probe, block 2",
    } <= metrics


@pytest.mark.thorough
def test_membership_is_measured_anew_when_the_forget_rows_change(
    audited_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**audited_recipe, "evaluate": audited_recipe["evaluate"][-1:]}
    counts = []
    for limit in (12, 6):
        recipe["forget"] = {**recipe["forget"], "limit": limit}
        results = spunge.run(load_recipe(recipe), tmp_path / f"run-{limit}")
        counts.append({row.n for row in results.rows if (row.stage, row.subject) == ("base", "asia")})
    assert counts == [{22}, {16}]
