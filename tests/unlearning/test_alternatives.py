"""The other answers that the base writes for AltPO, beside the same drawn by hand, one forward pass a token."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from spunge.data.chat import Conversation
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning import alternatives as module
from spunge.unlearning.alternatives import Alternatives, alternatives, asking, questions
from spunge.unlearning.altpo import AltPOSettings
from spunge.unlearning.batches import Stream
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task

QUESTIONS = ["the capital of france is", "the old dog"]
ANSWERS = [" paris", " runs in the city"]
ROWS = range(len(QUESTIONS))
HOW = Alternatives(count=2, seed=5, tokens=4, ask="one {question} two {answer} three", begin=" four")


def asked(base: Any, state: Path | None = None) -> Task:
    rows = Samples(pa.table({"prompt": QUESTIONS, "completion": ANSWERS}))
    return Task(base, {"a": rows}, None, {"a": 3}, state=state)


def by_hand(base: Any, text: str, number: int, temperature: float) -> str:
    ids = base.tokenizer(text)["input_ids"]
    noise, own = np.random.default_rng([5, number, zlib.crc32(str(ids).encode())]), list[int]()
    for _ in range(4):
        with torch.no_grad():
            logs = base.model(input_ids=torch.tensor([[*ids, *own]])).logits[0, -1].double().log_softmax(-1)
        if temperature:
            logs = logs / temperature + torch.from_numpy(noise.gumbel(size=(1, len(logs))))[0]
        own.append(int(logs.argmax()))
        if own[-1] == base.tokenizer.eos_token_id:
            break
    return str(base.tokenizer.decode(own, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_base_writes_draws_from_its_distribution_at_the_temperature(
    load: Callable[..., Any], temperature: float
) -> None:
    base, count = load("llama"), 2 if temperature else 1
    how = HOW.model_copy(update={"temperature": temperature, "count": count})
    task = asked(base)
    found = alternatives(task, task.parts["a"], how, count, "altpo", ROWS)
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        text = f"one {question} two{answer} three four"
        assert [each[row] for each in found] == [by_hand(base, text, number, temperature) for number in range(count)]
    if count > 1:
        assert found[0] != found[1]


def test_what_was_written_is_kept_and_written_on_after_half_a_line(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calls, draw = load("llama"), list[int](), module.written

    def counted(task: Task, how: Alternatives, ids: list[int], number: int) -> str:
        calls.append(number)
        return draw(task, how, ids, number)

    monkeypatch.setattr(module, "written", counted)
    task = asked(base, tmp_path / "state.pt")
    found = alternatives(task, task.parts["a"], HOW, 2, "altpo", ROWS)
    [file] = tmp_path.iterdir()
    whole, made = file.read_bytes(), len(calls)
    assert alternatives(task, task.parts["a"], HOW, 2, "altpo", ROWS) == found
    assert len(calls) == made
    file.write_bytes(whole[:-5])  # of the last answer
    assert alternatives(task, task.parts["a"], HOW, 2, "altpo", ROWS) == found
    assert (len(calls), file.read_bytes()) == (made + 1, whole)
    other = HOW.model_copy(update={"seed": 6})
    assert alternatives(task, task.parts["a"], other, 2, "altpo", ROWS) != found


def test_each_pass_takes_the_next_answer_and_the_joint_control_has_the_same(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = load("llama"), list[tuple[int, str]]()
    monkeypatch.setattr(module, "written", lambda _task, _how, ids, number: f"{'moon' if number else 'sun'} {len(ids)}")
    batch = Stream.batch

    def watched(stream: Any, rows: Any) -> Any:
        seen.extend((row, text.completion) for row, text in zip(rows, stream.samples.texts(rows, None), strict=True))
        return batch(stream, rows)

    monkeypatch.setattr(Stream, "batch", watched)

    def run(loop: Loop) -> History:
        for number in range(loop.steps):
            loop.next_loss(number)
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    task = asked(base)
    for seeds in ({"a": 3}, {"a": 4}):
        seen.clear()
        settings = AltPOSettings(alternatives=HOW, batch_size=1, epochs=3, alpha=0)
        METHODS.get("altpo").unlearn(replace(task, seeds=seeds), settings)
        written = [(row, text.split()[0]) for row, text in seen if text not in ANSWERS]
        assert [text for _, text in written] == ["sun"] * 2 + ["moon"] * 2 + ["sun"] * 2
        assert {row for row, _ in written[:2]} == {row for row, _ in written[2:4]} == {0, 1}


def test_no_more_answers_are_written_than_there_are_passes(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []

    def noted(_task: Task, _how: Alternatives, _ids: list[int], number: int) -> str:
        numbers.append(number)
        return "moon"

    monkeypatch.setattr(module, "written", noted)
    monkeypatch.setattr(Loop, "run", lambda loop: History(1, {}, None, {}))
    METHODS.get("altpo").unlearn(asked(load("llama")), AltPOSettings(batch_size=1, epochs=1, alpha=0))
    assert numbers == [0, 0]


@pytest.mark.parametrize("text", ["", "paris"], ids=["nothing", "the answer"])
def test_a_base_that_writes_no_other_answer_is_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(module, "written", lambda *_: text)
    task = asked(load("llama"))
    with pytest.raises(RecipeError, match=r"unlearn\.alternatives: row 0: in 10 draws"):
        alternatives(task, task.parts["a"], HOW, 1, "altpo", ROWS)


def test_an_answer_that_leaves_the_model_no_positions_is_refused(load: Callable[..., Any]) -> None:
    task = asked(load("gpt2"))
    with pytest.raises(RecipeError, match=r"unlearn\.alternatives\.tokens: 200: .* set it to \d+ or lower"):
        alternatives(task, task.parts["a"], Alternatives(ask=HOW.ask), 1, "altpo", ROWS)


def test_a_conversation_is_asked_about_by_its_last_question_through_the_chat_template(
    load: Callable[..., Any],
) -> None:
    said = [("user", "dog"), ("assistant", "cat"), ("user", "the sun {answer}"), ("assistant", "moon")]
    talk = Conversation([{"role": role, "content": text} for role, text in said])
    rows = Samples(pa.table({"conversation": [talk.to_json()]}))
    tokenizer = load("llama").tokenizer
    assert questions(rows, "altpo", tokenizer) == [("the sun {answer}", "moon")]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}|{% endif %}"
    )
    texts = list[str]()

    class Heard(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **given: Any) -> Any:
            texts.append(text)
            return super().__call__(text, **given)

    tokenizer.__class__ = Heard
    asking(tokenizer, HOW, "the sun {answer}", "moon", "here")
    assert texts == ["<one the sun {answer} two moon three>| four"]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"temperature": 0}, "at 0 all answers"), ({"ask": "say {answer}"}, "{question} is missing")],
    ids=["no draws", "no question"],
)
def test_settings_that_cannot_give_other_answers_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Alternatives(**given)
