"""Multiple choice by letters, in several orders, with its chance level; candidates that share more than the prompt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Text
from spunge.errors import RecipeError
from spunge.evaluation.candidates import Question, alike, candidate_likelihoods, shared
from spunge.evaluation.choices import CHOICES, ChoicesSettings, answer_index, answers_of, normalised, questions
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.likelihood import Likelihood
from spunge.evaluation.statistics import score
from spunge.recipe.loading import load_recipe
from toys import ARCHITECTURES, WORDS, texts

BENCH = Bench("base", "", Path(), Path())
ROWS = [
    {"question": text, "choices": texts(text, 4), "answer": at % 4, "subject": "x"}
    for at, text in enumerate(texts("asked", 12))
]


def by_definition(base: Any, prompt: str, letters: list[str]) -> int:
    """The letter with the highest probability after the prompt, from the model's full logits."""
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = base.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    return int(np.argmax([float(logs[base.tokenizer(f" {letter}")["input_ids"][-1]]) for letter in letters]))


@pytest.fixture
def lettered(load: Callable[..., Any]) -> Any:
    """A tiny model whose tokenizer knows capital letters, each as one token."""
    base = load()
    base.tokenizer.add_tokens(list("ABCD"))
    base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    return base


def test_the_letter_prompt_is_the_one_of_mmlu_and_wmdp() -> None:
    description = "The following are multiple choice questions (with answers) about biology.\n\n"
    settings = ChoicesSettings(style="letter", description=description)
    row = {"question": " What runs? ", "choices": ["dog", "tree", "bread", "moon"], "answer": 2}
    [asked] = questions(row, 0, settings)
    assert asked.prompt == f"{description}What runs?\nA. dog\nB. tree\nC. bread\nD. moon\nAnswer:"
    assert (asked.candidates, asked.answer) == (["A", "B", "C", "D"], 2)


def test_the_letter_prompt_is_that_of_the_harness() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")
    jinja2 = pytest.importorskip("jinja2")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    row = {"question": "What runs? ", "choices": ["dog", "tree", "bread", "moon"], "answer": 3}
    for name in ("wmdp/_default_template_yaml", "mmlu/default/_default_template_yaml"):
        config = yaml.safe_load((tasks / name).read_text())
        [asked] = questions(row, 0, ChoicesSettings(style="letter"))
        assert asked.prompt == jinja2.Template(config["doc_to_text"]).render(**row)
        assert asked.candidates == config["doc_to_choice"]


def test_letters_are_chosen_by_the_definition(lettered: Any) -> None:
    expected = []
    for row in ROWS:
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
        prompt = "\n".join([row["question"], *lines, "Answer:"])
        expected.append(float(by_definition(lettered, prompt, list("ABCD")) == row["answer"]))
    [measure] = CHOICES.measure(lettered, ChoicesSettings(style="letter"), pa.Table.from_pylist(ROWS), BENCH)
    assert measure.numerator.tolist() == expected
    assert 0 < sum(expected) < len(ROWS)


def test_a_question_in_all_orders_counts_as_the_mean_of_its_rotations(lettered: Any) -> None:
    settings = ChoicesSettings(style="letter")
    turned = []
    for shift in range(4):
        rows = [
            {**row, "choices": row["choices"][shift:] + row["choices"][:shift], "answer": (row["answer"] - shift) % 4}
            for row in ROWS
        ]
        turned.append(CHOICES.measure(lettered, settings, pa.Table.from_pylist(rows), BENCH)[0].numerator)
    for orders, counted in ((2, 2), (4, 4), (9, 4)):
        many = ChoicesSettings(style="letter", orders=orders)
        [measure] = CHOICES.measure(lettered, many, pa.Table.from_pylist(ROWS), BENCH)
        assert measure.numerator.tolist() == pytest.approx(np.mean(turned[:counted], axis=0).tolist())


def test_a_model_that_always_says_one_letter_is_at_chance_in_all_orders(lettered: Any) -> None:
    letter = lettered.tokenizer(" B")["input_ids"][-1]
    head = lettered.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[letter] = 1e4
    settings = ChoicesSettings(style="letter", orders=4)
    [measure] = CHOICES.measure(lettered, settings, pa.Table.from_pylist(ROWS), BENCH)
    assert measure.numerator.tolist() == [0.25] * len(ROWS)


def test_chance_is_the_mean_share_that_guessing_gets_and_what_lies_below_is_flagged(load: Callable[..., Any]) -> None:
    rows = [{**row, "choices": row["choices"][:2], "answer": 0} for row in ROWS[:6]] + [
        {**row, "answer": 0} for row in ROWS[6:]
    ]
    [measure] = CHOICES.measure(load(), ChoicesSettings(), pa.Table.from_pylist(rows), BENCH)
    assert measure.chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    measure.numerator[:] = 0
    assert score([measure], range(12)).below_chance is True


def test_a_cloze_in_several_orders_is_refused(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["evaluate"][0]["orders"] = 2
    with pytest.raises(RecipeError, match="orders: a cloze does not show its options"):
        load_recipe(toy_recipe)
    options = [str(number) for number in range(27)]
    with pytest.raises(RecipeError, match="27 options, more than there are letters"):
        questions({"question": "q", "choices": options, "answer": 0}, 0, ChoicesSettings(style="letter"))


def test_a_description_comes_before_every_cloze(load: Callable[..., Any]) -> None:
    base = load()
    plain = [{**row, "question": f"the sun and {row['question']}"} for row in ROWS]
    expected = CHOICES.measure(base, ChoicesSettings(), pa.Table.from_pylist(plain), BENCH)[0].numerator
    given = ChoicesSettings(description="the sun and ")
    assert CHOICES.measure(base, given, pa.Table.from_pylist(ROWS), BENCH)[0].numerator.tolist() == expected.tolist()


def test_answers_and_candidates_may_be_arrays() -> None:
    choices = np.array(["red", "green", "blue"])
    for answer in (np.int64(2), np.array(2), np.array([2]), [2], np.str_("blue"), ["blue"], np.array(["C"]), (2,)):
        assert answer_index(answer, choices, 0) == 2
    assert answer_index(1, ("red", "green"), 0) == 1
    for answer in ([1, 2], [], np.array([0, 1])):
        with pytest.raises(RecipeError, match="none of its 3 candidates"):
            answer_index(answer, choices, 0)


def test_questions_in_the_hubs_form_are_judged_from_a_file(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    import spunge

    block = {"kind": "choices", "source": str(write_rows("wmdp.jsonl", ROWS)), "style": "letter", "by": "subject"}
    toy_recipe["evaluate"], toy_recipe["controls"] = [block], []
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {(row["subject"], row["metric"], row["chance"]) for row in rows} == {("x", "accuracy", 0.25)}


# ---- what candidates share


def test_the_shared_part_is_the_prompt_and_the_candidates_common_beginning() -> None:
    found = shared(Question([1, 2], [[5, 6, 7], [5, 6, 8, 9], [5, 6]]))
    assert found == ([1, 2, 5, 6], 2, [[7], [8, 9], []])
    assert found.following == 1
    assert shared(Question([1], [[5], [5]])) == ([1, 5], 1, [[], []])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_that_begin_alike_have_their_likelihoods_by_the_definition(
    load: Callable[..., Any], architecture: str
) -> None:
    base = load(architecture)
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(4, 4 + len(WORDS), (count,), generator=generator).tolist()

    asked = []
    for count in range(1, 8):
        begin = ids(count % 4)
        asked.append(Question(ids(count), [[*begin, *ids(1 + count)], [*begin, *ids(1)], [*begin, *ids(3)]]))
    same = ids(3)
    asked.append(Question(ids(2), [same, [*same, *ids(2)], same]))
    found = candidate_likelihoods(base, asked, lambda done, total: None)
    for question, likelihoods in zip(asked, found, strict=True):
        for candidate, likelihood in zip(question.candidates, likelihoods, strict=True):
            whole = torch.tensor([question.prompt + candidate])
            with torch.no_grad():
                logs = base.model(input_ids=whole).logits[0].log_softmax(-1)
            start = len(question.prompt)
            expected = sum(float(logs[at - 1, whole[0, at]]) for at in range(start, whole.shape[1]))
            assert likelihood.tokens == len(candidate)
            assert likelihood.log == pytest.approx(expected, rel=1e-4)


def test_batches_hold_every_row_once_within_the_budget_and_with_little_padding() -> None:
    sizes = torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    extras = [size // 3 for size in sizes]
    groups = list(alike(sizes, 1000, 128, extras))
    assert sorted(row for group in groups for row in group) == list(range(200))
    for group in groups:
        padded, filled = len(group) * max(sizes[row] for row in group), sum(sizes[row] for row in group)
        assert padded + sum(extras[row] for row in group) <= 1000
        assert padded <= 128 or padded - filled <= 0.2 * padded
    assert list(alike([7, 2000], 10, 128)) == [[1], [0]]
    assert list(alike([], 10, 128)) == []


FOUR = ["red", "green", "blue", "yellow"]


@pytest.mark.parametrize(
    ("answers", "given", "expected"),
    [
        ([1, 2, 3, 4], "auto", [0, 1, 2, 3]),  # a 4 of four is no index
        (["1", "2", "3", "4"], "auto", [0, 1, 2, 3]),
        ([1, 2, 3], "auto", [1, 2, 3]),
        ([1, 2, 3], 1, [0, 1, 2]),
        ([1.0, 2.0], 1, [0, 1]),
        ([0, 3, 1], "auto", [0, 3, 1]),
        ([" A ", "b"], "auto", [0, 1]),
        ([[2], ["3"]], 1, [1, 2]),
    ],
)
def test_numbers_count_from_what_the_rows_or_the_recipe_say(
    answers: list[Any], given: Any, expected: list[int]
) -> None:
    rows = [{"choices": FOUR, "answer": answer} for answer in answers]
    assert answers_of(rows, ChoicesSettings(answers_from=given)) == expected


@pytest.mark.parametrize(
    ("choices", "answers", "wanted"),
    [
        (FOUR, [1, 2, 3] * 7, "row 0: 1 may count the candidates from 0 or from 1, and no row tells"),
        ([3, 2, 1, 0], [1, 0], "row 0: 1 may be a candidate itself or its number"),
        (["3", "2", "1", "0"], [1, 0], None),  # a number is no text
        ([0, 1, 2, 3], [1, 0], None),  # either way the same
    ],
)
def test_numbers_that_may_mean_two_things_are_refused(
    choices: list[Any], answers: list[int], wanted: str | None
) -> None:
    rows = [{"choices": choices, "answer": answer} for answer in answers]
    if wanted is None:
        assert answers_of(rows, ChoicesSettings()) == answers
        return
    with pytest.raises(RecipeError, match=f"{wanted}.*; set evaluate.answers_from to 0 or 1"):
        answers_of(rows, ChoicesSettings())
    assert answers_of(rows, ChoicesSettings(answers_from=0)) == answers


@pytest.mark.parametrize(
    ("choices", "answer", "wanted"),
    [
        (FOUR, "RED", "'red' differs by case or spaces alone"),
        (FOUR, "(B)", r"a letter stands alone: trim\(answer, '\(\). '\) gives 'B'"),
        (["no", "yes"], True, r"a truth value is a number by CAST\(answer AS INTEGER\)"),
        ({"text": FOUR, "label": list("ABCD")}, "A", "write choices.text for the column `choices`"),
        ({"A": "x", "B": "y"}, "A", r"write \[choices.A, choices.B\] for the column `choices`"),
    ],
)
def test_what_is_no_candidate_is_refused_with_what_to_write(choices: Any, answer: Any, wanted: str) -> None:
    with pytest.raises(RecipeError, match=f"row 7.*{wanted}"):
        answer_index(answer, choices, 7)


@pytest.mark.parametrize("write", [json.dumps, str])
def test_candidates_may_be_a_list_in_a_text(load: Callable[..., Any], write: Callable[[Any], str]) -> None:
    base, settings = load(), ChoicesSettings()
    asked = [{**row, "choices": write(row["choices"])} for row in ROWS]
    [listed], [written] = (CHOICES.measure(base, settings, pa.Table.from_pylist(rows), BENCH) for rows in (ROWS, asked))
    assert written.numerator.tolist() == listed.numerator.tolist()


def test_a_candidate_that_stands_twice_is_right_in_either_place(load: Callable[..., Any]) -> None:
    base = load()
    rows = [{"question": row["question"], "choices": [row["choices"][0]] * 3, "answer": 1} for row in ROWS]
    [measure] = CHOICES.measure(base, ChoicesSettings(), pa.Table.from_pylist(rows), BENCH)
    assert measure.numerator.tolist() == [1.0] * len(ROWS)
    assert measure.chance == 1.0


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "9" * 5000 + "]", "[{[]: 1}]"])
def test_a_text_that_no_parser_takes_is_no_list_of_candidates(text: str) -> None:
    with pytest.raises(RecipeError, match="no list of two candidates"):
        answer_index("a", text, 1)


@pytest.mark.parametrize(("normalize", "best"), [(None, 0), ("none", 0), ("characters", 1), ("tokens", 2)])
def test_the_default_is_the_harnesses_acc_and_characters_its_acc_norm(normalize: str | None, best: int) -> None:
    """acc: the greatest log-likelihood; acc_norm: of log-likelihood over the choice's length in characters."""
    texts, logs, tokens = ["ab", "abcdefghij", "abc"], [-2.0, -4.0, -2.4], [1, 3, 4]
    settings = ChoicesSettings(**({} if normalize is None else {"normalize": normalize}))  # type: ignore[arg-type]
    scores = [
        normalised(Text("", " " + text), Likelihood(log, count), settings)
        for text, log, count in zip(texts, logs, tokens, strict=True)
    ]
    assert int(np.argmax(scores)) == best
