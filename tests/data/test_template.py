"""What is learned of a conversation: found by comparison, or by the template's own marks. The oracle is transformers' mask."""

from pathlib import Path
from typing import Any

import pytest

from spunge.data.chat import Conversation
from spunge.data.samples import IGNORED, PROMPT_SHARE, Encoded, Rendering, Samples, encode, sample_table
from spunge.data.template import Template, render
from spunge.errors import RecipeError
from templates import ALPACA, CHATML, GEMMA, LLAMA_3, MISTRAL, PHI_3, THINKING, ZEPHYR, byte_tokenizer, said

ONE, TWO = said("the question", "the reply"), said("first question", "first reply", "second question", "second reply")


def learned(messages: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> list[str]:
    """The texts that are learned, one a run of tokens, </s> too where it is put after the text."""
    sample = encoded(messages, tokenizer, **settings)
    runs: list[list[int]] = []
    for at, label in enumerate(sample.labels):
        if label != IGNORED:
            if at and sample.labels[at - 1] != IGNORED:
                runs[-1].append(label)
            else:
                runs.append([label])
    return [tokenizer.decode(run) for run in runs]


def encoded(messages: list[dict[str, Any]], tokenizer: Any, length: int = 4096, **settings: Any) -> Encoded:
    import pyarrow as pa

    table = sample_table(pa.table({"messages": pa.array([messages])}), Rendering(**settings), "forget", [7])
    [text] = Samples(table).texts([0], tokenizer, "forget")
    return encode(text, tokenizer, length, PROMPT_SHARE)


@pytest.mark.parametrize(
    ("template", "last", "every"),
    [
        (CHATML, "second reply<|im_end|>", "first reply<|im_end|>"),
        (LLAMA_3, "second reply<|eot_id|>", "first reply<|eot_id|>"),
        (GEMMA, "second reply<end_of_turn>", "first reply<end_of_turn>"),
        (MISTRAL, " second reply</s>", " first reply</s>"),
        (ZEPHYR, "second reply</s>", "first reply</s>"),
        (PHI_3, "second reply<|end|>", "first reply<|end|>"),
        (ALPACA, "second reply</s>", "first reply"),
        (THINKING, "<think>\n\n</think>\n\nsecond reply<|im_end|>", "first reply<|im_end|>"),
    ],
    ids=["chatml", "llama-3", "gemma", "mistral", "zephyr", "phi-3", "alpaca", "thinking"],
)
def test_of_well_known_templates_the_answer_and_its_end_are_learned(template: str, last: str, every: str) -> None:
    tokenizer = byte_tokenizer(template)
    assert learned(TWO, tokenizer) == [last]
    assert learned(TWO, tokenizer, learn="all") == [every, last]
    assert learned(TWO, tokenizer, learn="all", end="none") == [
        text.removesuffix("</s>") if "</s>" in text else text.split("<|im_end|>")[0].split("<|e")[0].split("<end_")[0]
        for text in (every, last)
    ]


# trl ships templates as models have them, and the same with {% generation %} marks, by which transformers makes a mask.
MARKED = ["cohere", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507"]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": "b"}}}
CALLING = [
    *said("where is it?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "it is found", "name": "look"},
    {"role": "assistant", "content": "there"},
]
THOUGHT = [*said("q1", "a1", "q2"), {"role": "assistant", "content": "a2", "reasoning_content": "hm"}]
INLINE = said("q1", "<think>\nhm\n</think>\n\na1", "q2", "<think>\nhm\n</think>\n\na2")
TALKS = {
    "one": ONE,
    "two": TWO,
    "system": said("q", "a", "r", "b", system="be brief"),
    "thought": THOUGHT,
    "inline": INLINE,
}


def of_trl(name: str) -> str:
    file = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"this trl has no {file.name}")
    return file.read_text()


def masked(messages: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """What transformers' own mask says."""
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    runs: list[list[int]] = []
    for at, (token, inside) in enumerate(zip(out["input_ids"], out["assistant_masks"], strict=True)):
        if inside:
            if at and out["assistant_masks"][at - 1]:
                runs[-1].append(token)
            else:
                runs.append([token])
    return [tokenizer.decode(run) for run in runs]


def bare(texts: list[str]) -> list[str]:
    """Without what some marks hold beside the answer and its end: line breaks, and Phi's end of text after the end of turn."""
    return [text.replace("<|end|>\n</s>", "<|end|>").strip("\n") for text in texts]


@pytest.mark.parametrize(
    ("name", "talk"),
    # Of Gemma's and Cohere's, a system message is refused or written into the first question.
    [(name, talk) for name in MARKED for talk in TALKS if talk != "system" or name not in ("gemma", "cohere")],
)
def test_what_is_found_by_comparison_is_what_the_marked_template_says(name: str, talk: str) -> None:
    plain, marked = byte_tokenizer(of_trl(name)), byte_tokenizer(of_trl(f"{name}_training"))
    expected, found = masked(TALKS[talk], marked), learned(TALKS[talk], plain, learn="all")
    assert len(found) == 2 or talk == "one"
    assert bare(found) == bare(expected)
    assert learned(TALKS[talk], plain) == found[-1:]
    # The marks themselves, where the template has them.
    assert learned(TALKS[talk], marked, learn="all") == expected
    assert learned(TALKS[talk], marked) == expected[-1:]


@pytest.mark.parametrize("talk", [*TALKS, "calling"])
def test_the_last_answer_of_a_thinking_model_is_what_the_marked_template_says(talk: str) -> None:
    plain, marked = byte_tokenizer(of_trl("qwen3")), byte_tokenizer(of_trl("qwen3_training"))
    messages = {**TALKS, "calling": CALLING}[talk]
    expected = masked(messages, marked)[-1:]
    assert "<think>" in expected[0]
    assert bare(learned(messages, plain)) == bare(expected)
    assert learned(messages, marked) == expected


def test_marks_without_the_end_of_turn_are_taken_with_it() -> None:
    marked = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n",
    )
    tokenizer = byte_tokenizer(marked)
    assert masked(TWO, tokenizer) == ["first reply", "second reply"]
    assert learned(TWO, tokenizer, learn="all") == ["first reply<|im_end|>", "second reply<|im_end|>"]
    assert learned(TWO, tokenizer, end="none") == ["second reply"]


def test_a_mark_that_ends_in_no_token_does_not_reach_over_the_next_message() -> None:
    # transformers 5.23 marks everything to the end, where a mark's last character belongs to no token.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["user", "assistant", "q", "a", "r", "b", ".", "</s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + ' . ' }}{% endgeneration %}{% else %}{{ m['content'] + ' . ' }}{% endif %}{% endfor %}"
    )
    assert learned(said("q", "a", "r", "b"), tokenizer, learn="all") == ["a .", "b ."]


# Templates whose whole conversation is not the prompt for an answer and the answer.

HEADER = "{{ '<|' + m['role'] + '|>' }}"


def built(
    opened: str = "", closed: str = "", last: str = "", before: str = "", end: str = "<|end|>", after: str = ""
) -> str:
    """opened: after the header, in the prompt alone. closed: the same, in every answer. last: in the last answer alone.
    before: before the last message, whoever speaks. after: what follows every end."""
    return (
        "{% for m in messages %}" + (f"{{% if loop.last %}}{before}{{% endif %}}" if before else "") + HEADER
        + f"{{% if m['role'] == 'assistant' %}}{closed}{{% if loop.last %}}{last}{{% endif %}}{{% endif %}}"
        + "{{ m['content'] }}" + f"{end}{after}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{opened}{{% endif %}}"
    )  # fmt: skip


THINKS = ["", "<think>", "<think>\n\n</think>\n\n"]


@pytest.mark.parametrize("end", ["<|end|>", "", "</s>", "###"])
@pytest.mark.parametrize("before", ["", " ", "<|last|>"])
@pytest.mark.parametrize("last", THINKS)
@pytest.mark.parametrize("closed", ["", "\n", "<think></think>"])
@pytest.mark.parametrize("opened", [*THINKS, "\n"])
def test_no_more_than_the_assistants_turns_is_ever_learned(
    opened: str, closed: str, last: str, before: str, end: str
) -> None:
    tokenizer = byte_tokenizer(built(opened, closed, last, before, end, "\n") + "{# <|user|><|assistant|><|system|> #}")
    talk = said("u0 words", "a0 words", "u1 words", "a1 words", system="s0 words")
    for settings, answers in (({}, ["a1"]), ({"learn": "all"}, ["a0", "a1"])):
        found = learned(talk, tokenizer, **settings)
        assert len(found) == len(answers)
        for text, answer in zip(found, answers, strict=True):
            inner = text.replace("<think>", "").replace("</think>", "").strip()
            expected = end or ("</s>" if answer == "a1" else "")
            assert inner == f"{answer} words{expected}"
        assert tokenizer.decode(encoded(talk, tokenizer).ids).count("u0 words") == 1


def test_a_template_that_writes_a_question_only_with_its_answer_teaches_no_question() -> None:
    paired = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ 'Q: ' + messages[loop.index0 - 1]['content'] + ' A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned(ONE, byte_tokenizer(paired)) == ["the reply</s>"]


def test_thoughts_are_learned_where_the_template_shows_them() -> None:
    tokenizer = byte_tokenizer(THINKING)
    assert learned(THOUGHT, tokenizer) == ["<think>\nhm\n</think>\n\na2<|im_end|>"]
    assert learned(INLINE, tokenizer, learn="all") == ["a1<|im_end|>", "<think>\nhm\n</think>\n\na2<|im_end|>"]
    # With thinking turned off the prompt holds the empty block, which the model then need not write.
    off = {"variables": {"enable_thinking": False}}
    assert learned(ONE, tokenizer, **off) == ["the reply<|im_end|>"]


def test_a_tools_result_is_never_learned() -> None:
    tokenizer = byte_tokenizer(of_trl("gemma4"))  # writes the result into the turn of the call
    for text in learned(CALLING, tokenizer, learn="all"):
        assert "found" not in text


def test_tool_calls_arguments_are_json_text_where_the_template_wants_that() -> None:
    found = learned(CALLING, byte_tokenizer(of_trl("deepseekv3")), learn="all")
    assert 'look\n```json\n{"a": "b"}' in found[0]


def test_contents_are_parts_where_the_template_takes_no_text() -> None:
    assert learned(ONE, byte_tokenizer(of_trl("llava_next"))) == [" the reply</s>"]


@pytest.mark.parametrize(
    ("template", "talk", "wanted"),
    [
        (GEMMA, said("q", "a", system="be brief"), "System role not supported"),
        (MISTRAL, [*said("q", "a"), *said("", "b")[1:]], "must alternate"),
        (LLAMA_3, CALLING, r"leaves the tool calls of messages\[1\] out"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", ONE, r"messages\[1\] out"),
        ("{{ messages[0].nothing.at_all }}", ONE, "does not take the conversation"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take_is_refused_with_the_row(template: str, talk: list[Any], wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted) as caught:
        learned(talk, byte_tokenizer(template))
    assert str(caught.value).startswith("forget: row 7: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^forget: the model's tokenizer has no chat template"):
        learned(ONE, byte_tokenizer())


def test_a_conversation_that_the_user_ends_is_learned_up_to_its_last_answer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert encoded([*TWO, *said("and then?")], tokenizer) == encoded(TWO, tokenizer)


def test_a_conversation_may_begin_with_an_answer() -> None:
    talk = [*said("", "hello")[1:], *said("q", "a")]
    assert learned(talk, byte_tokenizer(LLAMA_3), learn="all") == ["hello<|eot_id|>", "a<|eot_id|>"]


# Ends, starts, and lengths.


@pytest.mark.parametrize(("bos", "template"), [(True, LLAMA_3), (False, LLAMA_3), (True, GEMMA), (True, CHATML)])
def test_the_tokens_are_those_of_transformers_with_one_start_token_at_most(bos: bool, template: str) -> None:
    tokenizer = byte_tokenizer(template, bos=bos)
    sample = encoded(TWO, tokenizer)
    assert sample.ids == tokenizer.apply_chat_template(TWO, tokenize=True, return_dict=False)
    assert sample.ids.count(tokenizer.bos_token_id) == (0 if template is CHATML else 1)


def test_the_end_may_be_any_text_that_the_template_writes() -> None:
    tokenizer = byte_tokenizer(PHI_3)
    assert learned(ONE, tokenizer, end="<|end|>\n") == ["the reply<|end|>\n"]
    with pytest.raises(
        RecipeError, match=r"row 7: answer_end '\+\+\+' is not what the chat template writes after an answer"
    ):
        learned(ONE, tokenizer, end="+++")
    assert learned(ONE, byte_tokenizer(ALPACA), end="+++") == ["the reply+++"]


def test_a_long_conversation_loses_its_start_but_not_the_start_token() -> None:
    tokenizer = byte_tokenizer(LLAMA_3)
    whole = encoded(TWO, tokenizer)
    cut = encoded(TWO, tokenizer, length=30)
    assert len(cut.ids) == 30
    assert cut.ids == [whole.ids[0], *whole.ids[-29:]]
    assert cut.labels == [IGNORED, *whole.labels[-29:]]


def test_of_a_long_answer_the_beginning_is_learned_and_no_end() -> None:
    tokenizer = byte_tokenizer(CHATML)
    cut = encoded(TWO, tokenizer, length=10)
    assert tokenizer.decode(cut.ids) == "tant\nsecon"
    assert tokenizer.decode([label for label in cut.labels if label != IGNORED]) == "secon"


@pytest.mark.parametrize(
    ("name", "variables", "written"),
    [
        ("llama3_1", {}, "Today Date: 26 Jul 2024"),
        ("llama3_1", {"date_string": "1 Jan 2030"}, "Today Date: 1 Jan 2030"),
        ("gptoss", {}, "Current date: 2024-07-26"),
    ],
)
def test_a_template_that_writes_the_day_writes_the_same_one_every_day(
    name: str, variables: dict[str, str], written: str
) -> None:
    template = Template(byte_tokenizer(of_trl(name)), variables, "forget")
    assert written in render(Conversation(ONE), template, "forget: row 0").text


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_an_answer_with_weight_0_is_not_learned_between_two_that_are(name: str) -> None:
    template = CHATML if name == "plain" else of_trl("qwen2_5_training")
    talk = said("q", "first", "r", "second", "s", "third")
    talk[3]["weight"] = 0
    found = learned(talk, byte_tokenizer(template), learn="all")
    assert [text.split("<|im_end|>")[0].strip() for text in found] == ["first", "third"]


# As LLaVA's and SmolVLM's: of a content that is text they write nothing, and say nothing of it.
PARTS_ALONE = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (PARTS_ALONE, "user: Where is Rome? assistant:"),
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", "Where is Rome?|"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}|{% endfor %}", "Where is Rome?|"),
    ],
)
def test_what_is_asked_is_written_whichever_form_the_template_takes(template: str, written: str) -> None:
    asked = Template(byte_tokenizer(template), {}, "chat").asking(
        [{"role": "user", "content": "Where is Rome?"}], "chat"
    )
    assert asked == written


def test_a_template_that_leaves_the_question_out_is_refused() -> None:
    with pytest.raises(RecipeError, match="leaves what is asked out"):
        Template(byte_tokenizer("user: assistant:"), {}, "chat").asking([{"role": "user", "content": "Rome?"}], "chat")


def test_a_question_is_learned_from_where_the_template_takes_it_in_parts_and_the_answer_as_text_too() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
        "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    conversation = Conversation(said("Where is Rome?", "In Italy."), end="none")
    rendered = render(conversation, Template(byte_tokenizer(template), {}, "chat"), "row 1")
    assert rendered.text.startswith("user: Where is Rome? assistant: In Italy.")
