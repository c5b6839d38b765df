"""A probe finds what was planted and nothing else; membership inference against hand and a model that knows its rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples, Text, encode
from spunge.errors import RecipeError
from spunge.evaluation.attacks.hidden import PROBE, ProbeSettings, block_numbers, centred, out_of_fold
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.audit import AUDIT, AuditSettings
from spunge.evaluation.choices import ChoicesSettings
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.likelihood import likelihoods, token_logs
from spunge.evaluation.membership_scores import min_k
from spunge.evaluation.perplexity import PerplexitySettings
from spunge.evaluation.statistics import score
from spunge.progress import SILENT
from spunge.unlearning.finetuning import finetune
from toys import WORDS, texts

ITEMS, CANDIDATES = 80, 4


def accuracy(scores: np.ndarray, answers: np.ndarray) -> float:
    return float((scores.reshape(ITEMS, CANDIDATES).argmax(axis=1) == answers).mean())


def test_a_probe_finds_a_planted_direction_and_none_in_noise() -> None:
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(ITEMS), CANDIDATES)
    noise = generator.normal(size=(len(owners), 32))
    noise += 20 * generator.normal(size=(ITEMS, 32))[owners]  # what an item's candidates share says nothing
    answers = generator.integers(0, CANDIDATES, ITEMS)
    right = np.tile(np.arange(CANDIDATES), ITEMS) == answers[owners]
    planted = noise + 4 * right[:, None] * np.eye(32)[5]
    attack = ProbeSettings(strength=1.0)
    assert accuracy(out_of_fold(centred(planted, owners), right, owners, attack, 0), answers) > 0.9
    # The 99.9% range of 80 guesses at one in four.
    assert 0.09 < accuracy(out_of_fold(centred(noise, owners), right, owners, attack, 0), answers) < 0.42


def test_a_probe_never_sees_an_item_that_it_is_asked_about() -> None:
    """Each item marks right and wrong in a dimension of its own, by opposite signs: which is which is known from its other
    candidates alone. A probe that has seen none of them is right half the time."""
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(1)
    owners = np.repeat(np.arange(ITEMS), CANDIDATES)
    answers = generator.integers(0, CANDIDATES, ITEMS)
    right = np.tile(np.arange(CANDIDATES), ITEMS) == answers[owners]
    signs = generator.choice([-1, 1], ITEMS)[owners]
    states = 0.1 * generator.normal(size=(len(owners), ITEMS))
    states[np.arange(len(owners)), owners] += signs * np.where(right, 3, -1)
    assert 0.3 < accuracy(out_of_fold(states, right, owners, ProbeSettings(), 0), answers) < 0.7


def planted_items(words: bool) -> pa.Table:
    """Questions whose right candidate holds a number (or, without `words`, any of the candidates at random)."""
    generator = np.random.default_rng(0)
    numbers = "one two three four five six seven eight nine ten".split()
    plain = [word for word in WORDS if word not in numbers]
    rows = []
    for _ in range(60):
        choices = [" ".join(generator.choice(plain, 2)) for _ in range(3)]
        answer = int(generator.integers(0, 3))
        if words:
            choices[answer] = " ".join(generator.choice(numbers, 2))
        question = " ".join(generator.choice(plain, 3))
        rows.append({"question": question, "choices": choices, "answer": str(answer)})
    return pa.Table.from_pylist(rows)


def test_a_probe_reads_answers_as_the_evaluation_does(load: Callable[..., Any]) -> None:
    pytest.importorskip("sklearn")
    base, rows = load(), planted_items(True).to_pylist()
    inner, attack = ChoicesSettings(), ProbeSettings(folds=3)
    spelled = [
        [row["choices"][int(row["answer"])] for row in rows],  # the candidate itself
        ["ABC"[int(row["answer"])] for row in rows],
        [str(int(row["answer"]) + 1) for row in rows],  # labels from 1, which all rows together tell
    ]
    measured = []
    for answers in spelled:
        items = pa.Table.from_pylist([{**row, "answer": each} for row, each in zip(rows, answers, strict=True)])
        [measure] = PROBE.run(base, attack, Target(inner, items), Bench("base", "", Path(), Path()))
        measured.append(measure.numerator.tolist())
    assert measured[0] == measured[1] == measured[2]


@pytest.mark.parametrize(("words", "low", "high"), [(True, 0.8, 1.0), (False, 0.1, 0.6)])
def test_hidden_states_tell_right_from_wrong_where_the_words_do(
    load: Callable[..., Any], words: bool, low: float, high: float
) -> None:
    pytest.importorskip("sklearn")
    bench = Bench("merged", "", Path(), Path(), settings_of={"inner": ChoicesSettings()})
    settings = AuditSettings.model_validate({"attack": {"kind": "probe", "block": [1, 0.75]}, "of": "inner"})
    found = AUDIT.measure(load(), settings, planted_items(words), bench)
    assert [(measure.metric, measure.of) for measure in found] == [
        (f"accuracy of a linear probe, block {block}", "accuracy") for block in (1, 3)
    ]
    for measure in found:
        assert measure.chance == pytest.approx(1 / 3)
        assert low <= score([measure], range(60)).value <= high


def test_blocks_are_numbers_or_shares_of_the_depth() -> None:
    assert [block_numbers(given, 12) for given in (0.5, 0.0, 1.0, 7, [0.5, 6, 1])] == [[6], [0], [11], [7], [1, 6]]
    with pytest.raises(RecipeError, match="blocks are 0 to 11"):
        block_numbers(12, 12)


def test_a_probe_needs_candidates_and_enough_of_them(load: Callable[..., Any]) -> None:
    bench = Bench("merged", "", Path(), Path(), settings_of={"a": PerplexitySettings(), "b": ChoicesSettings()})
    for of, table, message in (
        ("a", pa.table({"text": texts("plain", 3)}), "needs a 'choices' evaluation, and this is a 'perplexity' one"),
        ("b", planted_items(True).slice(0, 4), "5 folds of 4 items"),
    ):
        with pytest.raises(RecipeError, match=message):
            AUDIT.measure(load(), AuditSettings.model_validate({"attack": "probe", "of": of}), table, bench)


def test_min_k_is_the_mean_of_the_least_likely_tokens() -> None:
    logs = np.log([0.5, 0.1, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7, 0.6, 0.05])
    assert min_k(logs, 20) == pytest.approx((np.log(0.05) + np.log(0.1)) / 2)
    assert min_k(logs, 29) == min_k(logs, 20)  # int(2.9) tokens, as in the authors' code
    assert min_k(logs, 1) == pytest.approx(np.log(0.05))
    assert min_k(logs, 100) == pytest.approx(logs.mean())
    assert np.isnan(min_k(np.zeros(0), 20))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_token_log_probabilities_are_the_models_own(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    given = [Text("", text) for text in texts("plain", 7)] + [Text("the capital of", " france is paris")]
    coded = [encode(text, base.tokenizer, 64) for text in given]
    found = token_logs(base, coded, SILENT.step)
    sums = likelihoods(base, coded, SILENT.step)
    assert [(each.log, each.tokens) for each in sums] == [(float(each.sum()), len(each)) for each in found]
    for text, each, logs in zip(given, coded, found, strict=True):
        ids = torch.tensor([each.ids])
        with torch.no_grad():
            expected = base.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        first = 2 if text.prompt else 0  # the prompt's three tokens are not scored
        np.testing.assert_allclose(logs, expected[first:].numpy(), rtol=1e-4)


def membership(**settings: Any) -> AuditSettings:
    return AuditSettings.model_validate({"attack": {"kind": "membership", **settings}, "where": "true"})


def test_rows_that_a_model_has_learned_are_told_from_unseen_ones(load: Callable[..., Any]) -> None:
    base = load(initializer_range=0.3)
    parts = {name: Samples(pa.table({"text": texts(name, 12)})) for name in ("asia", "europe")}
    bench = Bench("merged", "", Path(), Path(), forget=parts, finetune=finetune)
    unseen = pa.table({"text": texts("unseen", 15)})
    before = {measure.subject: measure for measure in AUDIT.measure(base, membership(), unseen, bench)}
    after: dict[str | None, Any] = {}

    def learned(step: int) -> None:
        after.update({m.subject: m for m in AUDIT.measure(base, membership(), unseen, bench)})

    everything = Samples(pa.concat_tables([samples.table for samples in parts.values()]))
    finetune(base, everything, pauses=[30], pause=learned, batch_size=8, learning_rate=0.02, max_length=64, seed=0)
    assert list(before) == list(after) == ["asia", "europe", "all"]
    for subject, count in (("asia", 12), ("europe", 12), ("all", 24)):
        assert (before[subject].combine, before[subject].chance) == ("auroc", 0.5)
        assert int(before[subject].denominator.sum()) == count
        assert len(before[subject].denominator) == count + 15
        value, found = (score([each[subject]], range(count + 15)).value for each in (before, after))
        assert 0.2 < value < 0.8
        assert found > 0.9


def test_membership_does_not_score_what_ends_an_answer(load: Callable[..., Any]) -> None:
    base, found = load(), []
    for end in ("auto", "none"):
        seen, unseen = (
            pa.table({"prompt": texts(name, 5), "completion": texts(f"{name} a", 5), "end": [end] * 5})
            for name in ("b", "c")
        )
        bench = Bench("merged", "", Path(), Path(), forget={"asia": Samples(seen)})
        found += AUDIT.measure(base, membership(), unseen, bench)
    np.testing.assert_array_equal(found[0].numerator, found[1].numerator)


def test_membership_draws_rows_and_leaves_out_texts_with_nothing_to_score(load: Callable[..., Any]) -> None:
    part = Samples(pa.table({"text": [*texts("asia", 12), "dog"]}))
    bench = Bench("merged", "", Path(), Path(), forget={"asia": part})
    unseen = pa.table({"text": [*texts("unseen", 5), "cat"]})
    [every] = AUDIT.measure(load(), membership(), unseen, bench)
    assert (every.denominator.sum(), len(every.denominator)) == (12, 17)
    [few] = AUDIT.measure(load(), membership(rows=4, k=50.0), unseen, bench)
    assert few.metric == "min-50% AUROC"
    assert len(few.denominator) - 5 in (3, 4)
    with pytest.raises(RecipeError, match="no text of 'the unseen rows' has a token to score"):
        AUDIT.measure(load(), membership(), pa.table({"text": ["cat"]}), bench)


def test_unseen_rows_have_the_forget_rows_columns_unless_told_otherwise() -> None:
    assert AUDIT.columns(membership(), {"text": "body"}) == {"text": "body"}
    assert AUDIT.columns(membership(text="upper(body)"), {"text": "text"}) == {"text": "upper(body)"}
    with pytest.raises(RecipeError, match="either text, or prompt and completion"):
        AUDIT.columns(membership(prompt="q"), {"text": "text"})
