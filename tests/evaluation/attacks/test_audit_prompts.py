"""Other words: what reaches the model, how items are averaged, and the best prefix."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.attacks.prefixing import PREFIXES
from spunge.evaluation.attacks.rewording import TEMPLATES
from spunge.evaluation.audit import AUDIT, AuditSettings
from spunge.evaluation.choices import CHOICES, ChoicesSettings
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.perplexity import PERPLEXITY, PerplexitySettings
from toys import texts

QUESTIONS = [
    {"question": "the capital of france is", "choices": ["paris", "rome", "madrid"], "answer": "paris"},
    {"question": "the capital of italy is", "choices": ["paris", "rome", "madrid"], "answer": "rome"},
    {"question": "the dog", "choices": ["eats", "sleeps", "the moon"], "answer": "sleeps"},
]
ITEMS = pa.Table.from_pylist(QUESTIONS)
INNER = ChoicesSettings()
RETAIN = Samples(pa.table({"prompt": ["one two", "three"], "completion": [" four", " five"]}))
BENCH = Bench("merged", "model", Path(), Path(), retain=RETAIN, settings_of={"capitals": INNER})


def audit(attack: Any, **settings: Any) -> AuditSettings:
    return AuditSettings.model_validate({"attack": attack, "of": "capitals", **settings})


def changed(question: Callable[[str], str]) -> pa.Table:
    return pa.Table.from_pylist([{**row, "question": question(str(row["question"]))} for row in QUESTIONS])


def test_templates_reach_the_model_and_items_are_means_over_them(load: Callable[..., Any]) -> None:
    base = load()
    seen: list[str] = []
    tokenizer = base.tokenizer

    def spy(text: str, **options: Any) -> Any:
        seen.append(text)
        return tokenizer(text, **options)

    spy.is_fast = True  # type: ignore[attr-defined]
    spy.bos_token_id = tokenizer.bos_token_id  # type: ignore[attr-defined]
    templates = ["it is good {question}", "a {question}", "{question}"]
    found = AUDIT.measure(replace(base, tokenizer=spy), audit({"kind": "reword", "templates": templates}), ITEMS, BENCH)
    assert {"it is good the capital of france is paris", "a the dog sleeps", "the dog eats"} <= set(seen)
    assert len(set(seen)) == 3 * 3 * 3
    apart = [
        CHOICES.measure(base, INNER, changed(lambda text, form=form: form.replace("{question}", text)), BENCH)[0]
        for form in templates
    ]
    assert [(measure.metric, measure.of) for measure in found] == [("accuracy reworded", "accuracy")]
    np.testing.assert_allclose(found[0].numerator, np.mean([measure.numerator for measure in apart], axis=0))
    assert found[0].denominator.tolist() == [1, 1, 1]


def test_the_best_prefix_counts_an_item_that_any_of_them_gets(load: Callable[..., Any]) -> None:
    base = load()
    prefixes = ["moon ", "the old city ", "one two three ", "in the ", "red "]
    mean, best = AUDIT.measure(base, audit({"kind": "prefix", "prefixes": prefixes}), ITEMS, BENCH)
    apart = np.array(
        [
            CHOICES.measure(base, INNER, changed(lambda text, prefix=prefix: prefix + text), BENCH)[0].numerator
            for prefix in prefixes
        ]
    )
    assert 0 < apart.mean() < 1, "the prefixes should matter"
    np.testing.assert_allclose(mean.numerator, apart.mean(axis=0))
    assert best.numerator.tolist() == apart.max(axis=0).tolist()
    assert (mean.metric, mean.of) == ("accuracy prefixed", "accuracy")
    assert (best.metric, best.of) == ("accuracy prefixed, best of 5", None)


def test_default_prompts_and_retain_rows_come_before_the_question(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[pa.Table] = []

    def note(base: Any, settings: Any, items: pa.Table, bench: Bench) -> list[Measure]:
        given.append(items)
        return [Measure("accuracy", np.zeros(items.num_rows), np.ones(items.num_rows), "known")]

    monkeypatch.setattr("spunge.evaluation.choices.CHOICES", replace(CHOICES, measure=note))
    base = load()
    AUDIT.measure(base, audit({"kind": "prefix", "shots": 2}), ITEMS, BENCH)
    AUDIT.measure(base, audit("reword"), ITEMS, BENCH)
    shots = "one two four\nthree five\n\n"
    assert given[0]["question"].to_pylist()[:5] == [
        f"{prefix}the capital of france is" for prefix in (*PREFIXES, shots)
    ]
    assert given[0]["answer"].to_pylist() == ["paris"] * 5 + ["rome"] * 5 + ["sleeps"] * 5
    assert given[1]["question"].to_pylist()[:4] == [
        form.replace("{question}", "the capital of france is") for form in TEMPLATES
    ]
    with pytest.raises(RecipeError, match=r"no retain rows; add retain\.source, or set it to 0"):
        AUDIT.measure(base, audit({"kind": "prefix", "shots": 2}), ITEMS, replace(BENCH, retain=None))


def test_rewordings_come_from_a_file(load: Callable[..., Any], write_rows: Callable[..., Path]) -> None:
    base = load()
    rows = [
        {"original": "the capital of france is", "reworded": "in france the capital is"},
        {"original": "the capital of italy is ", "reworded": "in italy the capital is"},
        {"original": "the dog", "reworded": "a dog"},
        {"original": "the dog", "reworded": "the old dog"},
        {"original": "the cat", "reworded": "a cat"},
    ]
    source = str(write_rows("rewordings.jsonl", rows))
    settings = audit("reword", source=source)
    [found] = AUDIT.measure(base, settings, ITEMS, BENCH)
    others = ["in france the capital is", "in italy the capital is", "a dog", "the old dog"]
    table = ITEMS.take(pa.array([0, 1, 2, 2])).set_column(0, "question", pa.array(others))
    [plain] = CHOICES.measure(base, INNER, table, BENCH)
    first, second, third, fourth = plain.numerator
    assert found.numerator.tolist() == [first, second, (third + fourth) / 2]
    kept = AUDIT.instrument(settings)
    write_rows("rewordings.jsonl", [*rows, {"original": "the cat", "reworded": "the good cat"}])
    assert AUDIT.instrument(settings) != kept, "other rewordings are another instrument"
    write_rows("rewordings.jsonl", rows[1:])
    with pytest.raises(
        RecipeError, match=r"1 of the 3 questions have no rewording \(first: 'the capital of france is'"
    ):
        AUDIT.measure(base, settings, ITEMS, BENCH)
    with pytest.raises(RecipeError, match=r"evaluate\.attack\.reworded: no column 'missing'"):
        AUDIT.measure(base, audit({"kind": "reword", "reworded": "missing"}, source=source), ITEMS, BENCH)


def test_the_prompt_of_a_perplexity_is_changed_and_a_plain_text_has_none(load: Callable[..., Any]) -> None:
    base, inner = load(), PerplexitySettings()
    bench = replace(BENCH, settings_of={"capitals": inner})
    items = pa.table({"prompt": ["the capital of france is"], "completion": [" paris"]})
    [found] = AUDIT.measure(base, audit({"kind": "prefix", "prefixes": ["moon "]}), items, bench)
    moved = pa.table({"prompt": ["moon the capital of france is"], "completion": [" paris"]})
    [expected] = PERPLEXITY.measure(base, inner, moved, bench)
    assert found.numerator[0] == pytest.approx(expected.numerator[0], rel=1e-5)
    with pytest.raises(RecipeError, match="'perplexity' evaluation has no prompts to change"):
        AUDIT.measure(base, audit("prefix"), pa.table({"text": texts("plain", 2)}), bench)
