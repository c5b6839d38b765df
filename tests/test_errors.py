"""What people see of an error is one line that a terminal shows and does not obey."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spunge.errors import one_line, printable

# All characters, those among them more often that something obeys.
OBEYED = st.sampled_from("\x00\x07\x08\x0b\r\x1b\x7f\x85\x9b\u061c\u2028\u2029\u202e\u2066\ufffe\ud800")
HOSTILE = st.text(st.characters() | OBEYED, max_size=30)


def obeyed(text: str) -> list[str]:
    """Controls, separators of lines and paragraphs, halves of characters, and all that turns the direction of writing."""
    turning = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    marks = "\u200e\u200f\u061c"
    return [
        character
        for character in text
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in turning
        or character in marks
    ]


@given(HOSTILE)
def test_nothing_printable_is_obeyed_and_what_is_harmless_stays(text: str) -> None:
    shown = printable(text)
    assert obeyed(shown) == []
    assert printable(shown) == shown
    harmless = [character for character in text if not obeyed(character) and character not in "\ufffe\uffff"]
    assert [character for character in shown if character not in "\N{REPLACEMENT CHARACTER} "] == [
        character for character in harmless if character not in "\N{REPLACEMENT CHARACTER} "
    ]


@given(HOSTILE)
def test_an_error_is_one_line_without_anything_that_is_obeyed(text: str) -> None:
    assert obeyed(one_line(text)) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\x1b[31mb", "a\N{REPLACEMENT CHARACTER}[31mb"),
        ("\x9b2Jx", "\N{REPLACEMENT CHARACTER}2Jx"),
        ("one\ntwo\tthree", "one two three"),
        ("\u202eevil", "evil"),
        (":a: [b]", ":a: [b]"),
        (12, "12"),
    ],
)
def test_what_is_obeyed_becomes_a_mark_and_the_rest_stays(value: object, shown: str) -> None:
    assert printable(value) == shown


def test_characters_to_keep_are_kept() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("length", [10, 150, 400])
def test_of_a_message_with_a_long_path_the_reason_and_the_files_name_are_told(length: int) -> None:
    reason = (
        "is quantised (fp8, says its config.json) in a way that transformers itself does not read; give the folder of "
    )
    said = one_line(
        f"model.path: '/{'deep/' * length}models/llama' {reason}'/{'deep/' * length}models/llama-float16' in its place"
    )
    assert len(said) < 300
    assert reason in said
    assert "models/llama' " in said
    assert "models/llama-float16' in its place" in said
