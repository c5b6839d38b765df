"""A chat template that goes on and on is stopped and refused in one line; one that does not is left alone."""

import os
import threading
import time

import pytest

from spunge.data import bounds
from spunge.data.bounds import bounded, holds_power
from spunge.data.chat import Conversation
from spunge.data.template import Template, render
from spunge.errors import RecipeError
from templates import CHATML, byte_tokenizer, said

TALK = Conversation(said("the question", "the reply"))
FOR_EVER = "{%- for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
LARGE = "{%- set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
WRITING = (
    "{%- for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}{% endfor %}"
)


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 0.3)
    monkeypatch.setattr(bounds, "GROWTH", 2**26)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(
    ("program", "reason"),
    [(FOR_EVER, "after 0.3 seconds"), (LARGE, "0.0625 GiB of memory"), (WRITING, "0.0625 GiB of memory")],
)
@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_goes_on_is_stopped_and_the_next_one_renders(
    program: str, reason: str, marked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "memory" in reason:
        monkeypatch.setattr(bounds, "SECONDS", 60.0)
    began = time.monotonic()
    with pytest.raises(RecipeError, match=f"^forget: row 3: the model's chat template .*it was stopped .*({reason})"):
        render(TALK, Template(byte_tokenizer(program + marked + CHATML), {}, "forget"), "forget: row 3")
    assert time.monotonic() - began < 20  # once, not for each form of a conversation that a template may take
    assert "the reply" in render(TALK, Template(byte_tokenizer(CHATML), {}, "forget"), "forget").text
    time.sleep(2 * bounds.EVERY)  # in which nothing may be raised here


@pytest.mark.parametrize(
    "power", ["{{ 9**9**9 }}", "{% set x = 9 ** 9 %}", "{{ '}}' ** 2 }}", "{%- if 2**2 %}{% endif %}"]
)
def test_a_template_that_takes_a_power_is_refused(power: str) -> None:
    with pytest.raises(RecipeError, match=r"^forget: the model's chat template takes a power \(\*\*\)"):
        Template(byte_tokenizer(power + CHATML), {}, "forget")


@pytest.mark.parametrize("plain", ["**bold**", "{# 2 ** 2 #}", "{{ '**' }}", "{{ 2 * 2 }}"])
def test_stars_that_are_no_power_are_left_alone(plain: str) -> None:
    assert not holds_power(plain)


def test_a_thread_that_renders_in_time_is_left_alone_and_the_one_beside_it_stopped(low: None) -> None:
    ended: list[object] = []

    def goes_on() -> None:
        try:
            bounded(lambda: [None for _ in iter(int, 1)])
        except bounds.BeyondBoundsError as error:
            ended.append(str(error))

    beside = threading.Thread(target=goes_on)
    beside.start()
    while beside.is_alive():
        assert bounded(lambda: sum(range(1000))) == 499500
    assert ended == ["it was stopped after 0.3 seconds"] or "GiB" in str(ended[0])


def test_the_thread_that_looks_ends_by_itself_and_is_there_again(low: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "IDLE", 0.0)
    bounded(int)
    first = bounds._watch
    first.join(5)
    assert not first.is_alive()
    with pytest.raises(bounds.BeyondBoundsError):
        bounded(lambda: [None for _ in iter(int, 1)])


def test_a_fork_has_a_thread_of_its_own(low: None) -> None:
    bounded(int)
    child = os.fork()
    if not child:
        try:
            bounded(lambda: [None for _ in iter(int, 1)])
        except bounds.BeyondBoundsError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
