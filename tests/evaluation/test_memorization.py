"""Memorisation: against the model run on one text alone, greedy decoding token by token, and hand cases of the formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.chat import Conversation
from spunge.data.items import read_items
from spunge.data.samples import IGNORED
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Limits, Measure
from spunge.evaluation.memorization import MEMORIZATION, MemorizationSettings, answer_rows, encoded
from spunge.evaluation.reproduction import exact_memorization, extraction_strength
from spunge.evaluation.rouge import rouge_l
from spunge.evaluation.truth import among_options, log_truth_ratio, truth_measures
from spunge.recipe.schema import Recipe
from toys import texts

pytest.importorskip("rouge_score")
SHORT = {"max_new_tokens": 6}
PROMPTS, ANSWERS = texts("prompts", 4), [f" {text}" for text in texts("answers", 4)]
PAIRS = {"prompt": PROMPTS, "completion": ANSWERS, "end": ["auto"] * 4}
OTHERS = {"paraphrased": texts("same", 4), "perturbed": [texts(f"wrong{at}", at % 2 + 2) for at in range(4)]}
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def bench(folder: Path) -> Bench:
    return Bench("base", "model", folder, folder)


def values(base: Any, table: dict[str, Any], folder: Path, **settings: Any) -> dict[str, np.ndarray]:
    """Metric -> its value for each item."""
    known = {"generation": SHORT, **{role: role for role in OTHERS if role in table}, **settings}
    measures = MEMORIZATION.measure(base, MemorizationSettings.model_validate(known), pa.table(table), bench(folder))
    return {each.metric: each.numerator / each.denominator for each in measures}


def logits_alone(base: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits


def ids_of(base: Any, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in base.tokenizer(piece, add_special_tokens=False)["input_ids"]]


def mean_log(base: Any, prompt: list[int], answer: list[int]) -> float:
    logs = logits_alone(base, prompt + answer).log_softmax(-1)
    return float(np.mean([float(logs[len(prompt) + at - 1, token]) for at, token in enumerate(answer)]))


def shortest_prefix(base: Any, prompt: list[int], answer: list[int]) -> int:
    """After how many of its tokens the answer's others follow, by greedy decoding token by token."""
    for length in range(len(answer)):
        ids = prompt + answer[:length]
        while len(ids) < len(prompt) + len(answer):
            ids.append(int(logits_alone(base, ids)[-1].argmax()))
        if ids == prompt + answer:
            return length
    return len(answer)


@pytest.mark.parametrize(
    ("hits", "strength", "share"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.25, 0.75),
        ([1, 1, 1, 0], 0.0, 0.75),
        ([0], 0.0, 0.0),
        ([1], 1.0, 1.0),
    ],
)
def test_extraction_strength_is_what_follows_the_last_token_that_is_not_the_likeliest(
    hits: list[int], strength: float, share: float
) -> None:
    assert extraction_strength(np.array(hits, dtype=bool)) == strength
    assert exact_memorization(np.array(hits, dtype=bool)) == share


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_extraction_and_exact_memorization_are_those_of_greedy_decoding(
    load: Callable[..., Any], tmp_path: Path, architecture: str
) -> None:
    base = load(architecture)
    answers = []
    for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = ids_of(base, prompt, " ".join(answer.split()[: number + 1]))
        start = len(ids_of(base, prompt))
        for _ in range(3):  # the model's own words
            logits = logits_alone(base, ids)[-1]
            ids.append(int(logits[4:80].argmax()) + 4)
        answers.append(" " + base.tokenizer.decode(ids[start:]))
    found = values(base, {**PAIRS, "completion": answers}, tmp_path, metrics=["exact", "extraction"])
    for at, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        before, own = ids_of(base, prompt), ids_of(base, answer)
        likeliest = logits_alone(base, before + own).argmax(-1).tolist()[len(before) - 1 : -1]
        assert found["exact memorization"][at] == pytest.approx(np.mean(np.array(likeliest) == own))
        assert found["extraction strength"][at] == 1 - shortest_prefix(base, before, own) / len(own)
    assert found["extraction strength"].max() > 0


@pytest.mark.parametrize("score_end", [False, True])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_probability_options_and_truth_ratio_are_tofus(
    load: Callable[..., Any], tmp_path: Path, score_end: bool, mean: str
) -> None:
    base = load()
    metrics = ["probability", "options", "truth_ratio"]
    found = values(base, {**PAIRS, **OTHERS}, tmp_path, metrics=metrics, score_end=score_end, perturbed_mean=mean)
    end = [base.tokenizer.eos_token_id] if score_end else []
    for at in range(4):
        before = ids_of(base, PROMPTS[at])
        own, same, *wrong = (
            np.exp(mean_log(base, before, ids_of(base, text) + end))
            for text in (ANSWERS[at], OTHERS["paraphrased"][at], *OTHERS["perturbed"][at])
        )
        ratio = (np.mean(wrong) if mean == "arithmetic" else np.prod(wrong) ** (1 / len(wrong))) / same
        assert found["answer probability"][at] == pytest.approx(own, rel=1e-4)
        assert found["probability among options"][at] == pytest.approx(own / (own + sum(wrong)), rel=1e-4)
        assert np.exp(found["truth ratio"][at]) == pytest.approx(ratio, rel=1e-4)
        assert found["truth ratio, nearness to 1"][at] == pytest.approx(min(ratio, 1 / ratio), rel=1e-4)
        assert found["truth ratio, true over false"][at] == pytest.approx(max(0, 1 - ratio), abs=1e-4)


def test_a_plain_texts_probability_is_that_of_its_tokens(load: Callable[..., Any], tmp_path: Path) -> None:
    base, text = load(), "paris is a big city"
    found = values(base, {"text": [text]}, tmp_path, metrics=["probability"])
    first, *others = base.tokenizer(text)["input_ids"]
    assert found["answer probability"] == pytest.approx(np.exp(mean_log(base, [first], others)), rel=1e-5)


def test_without_a_paraphrase_the_answer_stands_for_it(load: Callable[..., Any], tmp_path: Path) -> None:
    table = {**PAIRS, "perturbed": OTHERS["perturbed"]}
    alone = values(load(), table, tmp_path, metrics=["truth_ratio"])
    itself = values(load(), {**table, "paraphrased": ANSWERS}, tmp_path, metrics=["truth_ratio"])
    assert alone["truth ratio"] == pytest.approx(itself["truth ratio"])


def test_unlikely_answers_give_finite_ratios_and_shares() -> None:
    wrong = np.array([-900.0, -1000.0])
    assert log_truth_ratio(-2000.0, wrong, "arithmetic") == pytest.approx(1100 - np.log(2))
    assert among_options(-900.0, wrong) == pytest.approx(0.5)
    for measure in truth_measures(np.array([1100.0, -1100.0])):
        assert np.isfinite(measure.numerator).all()


def conversations(variables: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(PROMPTS, ANSWERS, strict=True)
    rows = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
        for prompt, answer in pairs
    ]
    return {"conversation": [Conversation(row, **variables).to_json() for row in rows]}


@pytest.mark.parametrize(
    "table",
    [
        PAIRS,
        {**PAIRS, "end": [" . ."] * 4},
        {**PAIRS, "end": ["none"] * 4},
        conversations({}),
        conversations({"learn": "all", "end": "</s>"}),
        {"text": PROMPTS},
    ],
    ids=["end token", "own end", "no end", "end of turn", "named end of turn", "plain"],
)
def test_what_ends_an_answer_is_none_of_its_tokens(load: Callable[..., Any], table: dict[str, Any]) -> None:
    tokenizer = load().tokenizer
    tokenizer.chat_template = CHAT
    for text, answer in zip(
        encoded(answer_rows(pa.table(table)), tokenizer, 100), table.get("text", ANSWERS), strict=True
    ):
        assert tokenizer.decode([token for token in text.labels if token != IGNORED]) == answer.strip()


def test_the_end_of_a_turn_changes_no_measure_of_memorisation(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    base.tokenizer.chat_template = CHAT
    asked = [f"user : {prompt} </s> assistant :" for prompt in PROMPTS]
    plain = values(base, {**PAIRS, "prompt": asked}, tmp_path / "plain")
    turned = values(base, conversations({}), tmp_path / "turned")
    assert plain.keys() == turned.keys()
    for metric, own in plain.items():
        assert turned[metric] == pytest.approx(own, rel=1e-4), metric


def test_rouge_is_the_packages_of_what_greedy_decoding_writes(load: Callable[..., Any], tmp_path: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    base = load()
    # A prompt that ends in the space that belongs to the answer's first token goes on from the tokens before it.
    spaced = {**PAIRS, "prompt": [f"{text} " for text in PROMPTS], "completion": [text.strip() for text in ANSWERS]}
    found, again = values(base, PAIRS, tmp_path / "a"), values(base, spaced, tmp_path / "b")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for at, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = ids_of(base, prompt)
        for _ in range(SHORT["max_new_tokens"]):
            ids.append(int(logits_alone(base, ids)[-1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        written = base.tokenizer.decode(ids[len(ids_of(base, prompt)) :], skip_special_tokens=True)
        score = scorer.score(answer, written)["rougeL"]
        for values_ in (found, again):
            assert values_["ROUGE-L recall"][at] == pytest.approx(score.recall)
            assert values_["ROUGE-L F1"][at] == pytest.approx(score.fmeasure)


def test_verbatim_is_the_continuation_of_a_texts_first_tokens(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    ids = ids_of(base, PROMPTS[0])[:4]
    for _ in range(5):
        ids.append(int(logits_alone(base, ids)[-1][4:80].argmax()) + 4)
    known, other = base.tokenizer.decode(ids), " ".join([*PROMPTS[1].split()[:4], "zoo"])
    table = {"text": [known, other]}
    scored = values(base, table, tmp_path, metrics=["verbatim"], prefix=4)["verbatim ROUGE-L F1"]
    for at, text in enumerate(table["text"]):
        given = ids_of(base, text)
        own = list(given[:4])
        for _ in range(SHORT["max_new_tokens"]):
            own.append(int(logits_alone(base, own)[-1].argmax()))
        truth, said = (base.tokenizer.decode(each[4:], skip_special_tokens=True) for each in (given, own))
        assert scored[at] == pytest.approx(rouge_l("ascii", False, "")(truth, said).f1)


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [("巴黎是首都", "首都是巴黎", 0.4), ("Київ є столицею", "Київ", 1 / 3), ("the cat’s hat", "the cat s hat", 1.0)],
)
def test_words_of_any_script_are_words(reference: str, answer: str, recall: float) -> None:
    assert rouge_l("unicode", False, "")(reference, answer).recall == pytest.approx(recall)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": [""], "completion": ["paris"]}, {}, "row 0 has no token to score"),
    ({"text": ["paris"]}, {}, "row 0 has no token to score"),
    ({"text": ["paris is a city"]}, {}, "prefix: row 0 has 3 tokens"),
    ({"text": ["paris is a city"]}, {"metrics": ["rouge"]}, "rouge needs answers"),
    ({**PAIRS, "completion": [" it"] * 3 + [" ?"]}, {}, "row 3 has no word for ROUGE; filter"),
    ({**PAIRS, "completion": [" 巴黎"] * 4}, {}, "row 0 has no word for ROUGE; set words to unicode"),
    ({**PAIRS, "completion": [" it Київ столиця"] * 4}, {}, "row 0: ROUGE leaves out"),
    ({**PAIRS, "perturbed": [["a"], ["a"], [], ["a"]]}, {"perturbed": "w"}, "perturbed: row 2 has no wrong answer"),
    (
        {**PAIRS, "perturbed": [["a"], ["a", " "], ["a"], ["a"]]},
        {"perturbed": "w"},
        "perturbed: row 1: ' ' is no answer",
    ),
    ({**PAIRS, "perturbed": [[1], [2], [3], [4]]}, {"perturbed": "w"}, "perturbed: row 0: 1 is no answer"),
]


@pytest.mark.parametrize(("table", "settings", "message"), REFUSED)
def test_items_that_cannot_be_measured_are_refused_with_their_row(
    load: Callable[..., Any], table: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    given = MemorizationSettings.model_validate({"generation": SHORT, **settings})
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        MEMORIZATION.check_items(given, pa.table(table), Limits(load().tokenizer, 128, 128))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": []}, "an empty list"),
        ({"metrics": ["truth_ratio"]}, "perturbed: missing"),
        ({"generation": {"chat": True}}, "set forget.chat"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorizationSettings.model_validate(settings)


def read(recipe: dict[str, Any], **settings: Any) -> tuple[MemorizationSettings, pa.Table]:
    known = Recipe.model_validate(recipe)
    given = MemorizationSettings.model_validate({"generation": SHORT, "limit": 3, **settings})
    return given, read_items(known, given, MEMORIZATION.columns(given, known.forget.columns), "evaluate.0").table


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["forget10_perturbed", "real_authors_perturbed"])
def test_tofus_rows_are_measured(
    toy_recipe: dict[str, Any], load: Callable[..., Any], shared: Path, tmp_path: Path, chat: bool, name: str
) -> None:
    base = load(max_position_embeddings=1024)
    base.tokenizer.chat_template = CHAT
    source = str(shared / "tofu" / f"{name}.jsonl")
    paraphrased = {} if name.startswith("real") else {"paraphrased": "paraphrased_answer"}
    forget = {"source": source, "prompt": "question || ' '", "completion": "answer", "chat": chat}
    recipe = {**toy_recipe, "forget": forget, "split": None, "evaluate": []}
    settings, table = read(recipe, source=source, perturbed="perturbed_answer", **paraphrased)
    MEMORIZATION.check_items(settings, table, Limits(base.tokenizer, 128, 1024))
    measures: list[Measure] = MEMORIZATION.measure(base, settings, table, bench(tmp_path))
    assert [each.metric for each in measures][:4] == [
        "ROUGE-L recall",
        "ROUGE-L F1",
        "answer probability",
        "truth ratio",
    ]
    assert all(len(each.numerator) == 3 and np.isfinite(each.numerator).all() for each in measures)


def test_a_list_of_wrong_answers_may_be_json_text(load: Callable[..., Any], tmp_path: Path) -> None:
    listed = values(load(), {**PAIRS, **OTHERS}, tmp_path, metrics=["truth_ratio"])
    written = {**OTHERS, "perturbed": [json.dumps(each) for each in OTHERS["perturbed"]]}
    assert values(load(), {**PAIRS, **written}, tmp_path, metrics=["truth_ratio"])["truth ratio"] == pytest.approx(
        listed["truth ratio"]
    )


def test_a_chat_setting_that_has_no_say_is_not_told_as_what_it_was_measured_with() -> None:
    """Questions are put as forget's rows are, which the items hold."""
    assert MEMORIZATION.instrument is not None
    assert "chat" not in MEMORIZATION.instrument(MemorizationSettings())["generation"]
