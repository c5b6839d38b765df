"""Rows of prompt and completion as tokens: what is learned, how an answer ends, and what is cut."""

from typing import Any

import pyarrow as pa
import pytest

from spunge.data.samples import IGNORED, PROMPT_SHARE, Rendering, Samples, Text, encode, encode_apart, sample_table
from spunge.data.split import rendering_of
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.unlearning.batches import packed
from templates import CHATML, LLAMA_3, byte_tokenizer, said


def pair(prompt: str = "ask", completion: str = " tell", **settings: Any) -> Samples:
    table = pa.table({"prompt": [prompt], "completion": [completion]})
    return Samples(sample_table(table, Rendering(**settings), "forget", [7]))


def read(samples: Samples, tokenizer: Any, length: int = 64) -> tuple[str, str]:
    """Everything, and what of it is learned."""
    sample = encode(samples.texts([0], tokenizer)[0], tokenizer, length)
    return tokenizer.decode(sample.ids), tokenizer.decode([label for label in sample.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("bos", "closes", "end", "whole", "learned"),
    [
        (False, False, "auto", "ask tell</s>", " tell</s>"),
        (True, False, "auto", "<s>ask tell</s>", " tell</s>"),
        (False, True, "auto", "ask tell</s>", " tell</s>"),  # not twice
        (True, True, "auto", "<s>ask tell</s>", " tell</s>"),
        (False, False, "none", "ask tell", " tell"),
        (False, True, "none", "ask tell</s>", " tell"),
        (False, False, "\n###", "ask tell\n###", " tell\n###"),
    ],
)
def test_an_answer_ends_as_the_setting_says(bos: bool, closes: bool, end: str, whole: str, learned: str) -> None:
    assert read(pair(end=end), byte_tokenizer(bos=bos, closes=closes)) == (whole, learned)


@pytest.mark.parametrize("completion", [" tell</s>", " tell"])
def test_an_end_that_the_row_holds_itself_is_not_doubled(completion: str) -> None:
    assert read(pair(completion=completion), byte_tokenizer()) == ("ask tell</s>", " tell</s>")


def test_without_an_end_token_none_is_learned() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert read(pair(), tokenizer) == ("ask tell", " tell")


def test_plain_texts_are_read_as_the_tokenizer_reads_them() -> None:
    for bos, closes in ((False, False), (True, False), (True, True)):
        tokenizer = byte_tokenizer(bos=bos, closes=closes)
        text = encode(Samples(pa.table({"text": ["a text"]})).texts([0], tokenizer)[0], tokenizer, 64)
        assert text.ids == tokenizer("a text")["input_ids"]
        assert tokenizer.decode([label for label in text.labels if label != IGNORED]) == "a text"


def test_a_long_prompt_loses_its_start_but_not_the_start_token() -> None:
    whole, learned = read(pair("0123456789"), byte_tokenizer(bos=True), 10)
    assert (whole, learned) == ("<s>789 tell</s>", " tell</s>")
    whole, _ = read(pair("0123456789"), byte_tokenizer(), 10)
    assert whole == "6789 tell</s>"


def test_a_long_answer_leaves_half_to_its_prompt_where_that_needs_it() -> None:
    tokenizer = byte_tokenizer(bos=True)

    def cut(prompt: str, completion: str) -> str:
        text = pair(prompt, completion).texts([0], tokenizer)[0]
        return str(tokenizer.decode(encode(text, tokenizer, 12, PROMPT_SHARE).ids))

    assert cut("0123456789", "abcdefghijkl") == "<s>56789abcdef"
    assert cut("012", "abcdefghijkl") == "<s>012abcdefgh"
    assert cut("0123456789", "abc") == "<s>3456789abc</s>"
    assert cut("", "abcdefghijklmn") == "<s>abcdefghijk"


def test_an_answer_that_is_cut_does_not_end() -> None:
    for closes in (False, True):
        assert read(pair("ask", " a long answer"), byte_tokenizer(closes=closes), 8) == ("k a long", " a long")


def test_through_the_template_a_prompt_is_the_users_and_the_space_between_is_no_ones() -> None:
    for tokenizer, whole in (
        (byte_tokenizer(LLAMA_3, bos=True), LLAMA_3),
        (byte_tokenizer(CHATML), CHATML),
    ):
        expected = tokenizer.apply_chat_template(said("ask", "tell"), tokenize=False)
        end = "<|eot_id|>" if whole is LLAMA_3 else "<|im_end|>"
        assert read(pair("ask ", " tell", chat=True), tokenizer, 999) == (expected, f"tell{end}")


def test_a_tokenizer_without_offsets_reads_the_same() -> None:
    class Slow:
        """One that cannot say where a token's characters are."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.eos_token_id, self.bos_token_id = inner.eos_token_id, inner.bos_token_id

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    for bos, closes in ((False, False), (True, False), (True, True)):
        fast = byte_tokenizer(bos=bos, closes=closes)
        for text in (Text("ask", " tell", ends=True), Text("ask", " tell it all", unscored=[(1, 5)], templated=True)):
            assert encode(text, Slow(fast), 64) == encode(text, fast, 64)


@pytest.mark.parametrize(
    ("blocks", "forget", "retain"),
    [
        ({}, Rendering(), Rendering()),
        (
            {"forget": {"chat": True, "answer_end": "none"}},
            Rendering(True, "last", "none"),
            Rendering(True, "last", "none"),
        ),
        (
            {"forget": {"chat": True}, "retain": {"chat": False, "learn": "all"}},
            Rendering(True),
            Rendering(False, "all"),
        ),
        (
            {"model": {"template": {"enable_thinking": False}}},
            Rendering(variables={"enable_thinking": False}),
            Rendering(variables={"enable_thinking": False}),
        ),
    ],
)
def test_what_retain_does_not_say_is_forgets(
    toy_recipe: dict[str, Any], blocks: dict[str, Any], forget: Rendering, retain: Rendering
) -> None:
    columns = {"prompt": "q", "completion": "a"}
    toy_recipe["forget"] |= columns
    toy_recipe["retain"] |= columns
    for name, block in blocks.items():
        toy_recipe[name] |= block
    recipe = load_recipe(toy_recipe)
    assert rendering_of(recipe, recipe.forget) == forget
    assert recipe.retain is not None
    assert rendering_of(recipe, recipe.retain) == retain


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ({"text": "text", "chat": True}, "a plain text has no turns"),
        ({"messages": "m", "chat": False}, "conversations always go through the chat template"),
        ({"prompt": "q", "completion": "a", "answer_end": ""}, "answer_end: an empty text"),
        ({"messages": "m", "learn": "first"}, "learn"),
    ],
)
def test_settings_that_say_nothing_are_refused(toy_recipe: dict[str, Any], block: dict[str, Any], wanted: str) -> None:
    toy_recipe["forget"] |= block
    with pytest.raises(RecipeError, match=wanted):
        load_recipe(toy_recipe)


def test_another_way_to_end_is_another_sample() -> None:
    prints = {pair(end=end).sha256 for end in ("auto", "none", "\n")} | {pair(chat=True).sha256}
    assert len(prints) == 4


def test_answers_can_be_put_in_place_of_others() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert read(pair().answered([" no"]), tokenizer) == ("ask no</s>", " no</s>")
    talk = pa.table({"messages": pa.array([said("q1", "a1", "q2", "a2")])})
    every = Samples(sample_table(talk, Rendering(learn="all"), "forget", [0]))
    whole, learned = read(every.answered(["no"]), tokenizer, 999)
    assert "a1" not in whole
    assert learned == "no<|im_end|>no<|im_end|>"
    whole, learned = read(every.answered(["no"], learn="last"), tokenizer, 999)
    assert "a1" in whole
    assert learned == "no<|im_end|>"
    assert every.answers() == [{"role": "assistant", "content": "a2"}]


def test_words_are_what_the_rows_say_without_the_template() -> None:
    assert pair().words() == ["ask", " tell"]
    assert pair(chat=True).words() == ["ask", "tell"]


@pytest.mark.parametrize("form", ["text", "prompt"])
def test_a_text_that_begins_with_the_start_token_gets_no_second_one(form: str) -> None:
    """As texts do that a chat template wrote before."""
    tokenizer = byte_tokenizer(bos=True)
    rows = (
        {"text": ["<s>ask tell"]}
        if form == "text"
        else {"prompt": ["<s>ask"], "completion": [" tell"], "end": ["none"]}
    )
    text = Samples(pa.table(rows)).texts([0], tokenizer)[0]
    for coded in (
        encode(text, tokenizer, 64),
        encode_apart(text, tokenizer, 64) if text.prompt else encode(text, tokenizer, 64),
    ):
        assert coded.ids == tokenizer("ask tell")["input_ids"]
        assert tokenizer.decode([label for label in coded.labels[1:] if label != IGNORED]) == (
            "ask tell" if form == "text" else " tell"
        )
    if form == "text":
        assert packed(Samples(pa.table(rows)), tokenizer, 64)[0].ids == [*tokenizer("ask tell")["input_ids"], 257]


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("Auto", "auto"),
        ("eos", "auto"),
        ("eos_token", "auto"),
        ("true", "auto"),
        ("None", "none"),
        ("NONE", "none"),
        ("false", "none"),
    ],
)
def test_a_word_that_means_an_end_is_not_learned_as_one(written: str, end: str) -> None:
    forget = {"source": "x.jsonl", "prompt": "p", "completion": "c", "answer_end": written}
    with pytest.raises(
        RecipeError, match=f"answer_end: '{written}' would be learned as a text; for what it says write {end}"
    ):
        load_recipe({"model": {"path": "m"}, "forget": forget, "unlearn": {"method": "tvn"}})
