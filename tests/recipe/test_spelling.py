"""YAML as people mean it: what YAML 1.1 takes for something else stays what is written."""

from typing import Any

import pytest
import yaml

from spunge.recipe.spelling import read_foreign_yaml, read_yaml, write_yaml, yaml_fault


@pytest.mark.parametrize(
    "word",
    ["NO", "yes", "on", "Off", "12:30", "1:2:3.5", "007", "00", "2024-01-05", "2024-01-05 10:00:00", "1.2.3", "e5"],
)
def test_words_stay_words(word: str) -> None:
    assert read_yaml(f"a: [{word}]") == {"a": [word]}
    assert read_yaml(yaml.safe_dump({"a": word})) == {"a": word}, "what is dumped is read back"


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("1e5", 1e5),
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-1_000", -1000),
        ("0x10", 16),
        ("0b11", 3),
        ("+4", 4),
    ],
)
def test_numbers_are_numbers_in_every_spelling(word: str, number: float) -> None:
    value = read_yaml(f"a: {word}")["a"]
    assert value == number
    assert type(value) is type(number)


@pytest.mark.parametrize(
    "value", [True, False, None, 0, 7, -1.5, 1e300, 1e-7, float("inf"), "true", "1e5", "7", "", "a: b", "~", [], {}]
)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    assert read_yaml(write_yaml({"a": value})) == {"a": value}


def test_the_values_of_the_split_are_spelled_as_they_are_written() -> None:
    content = read_yaml(
        "seed: 1\nsplit: {by: x, values: {007: [007, 1.50, yes, true, 'a']}, min_rows: 2}\nvalues: [1.50]"
    )
    assert content["split"] == {"by": "x", "values": {"007": ["007", "1.50", "yes", "true", "a"]}, "min_rows": 2}
    assert content["values"] == [1.5]
    assert read_yaml("[1.50, 2]", spelled=True) == ["1.50", "2"]
    assert read_yaml("") is None


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 3),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "b", 4),
        ("- {a: 1}\n- {a: 1, a: 2}\n", "a", 2),
        ("split: {values: {x: [1], x: [2]}}\n", "x", 1),
        ('a: 1\n"a": 2\n', "a", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, key: str, line: int) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml(text)
    assert yaml_fault(caught.value) == f"line {line}: the key '{key}' stands twice"


def test_one_key_in_several_mappings_is_no_key_twice() -> None:
    assert read_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}\ne: *a\n") == {
        "a": {"b": 1},
        "c": {"b": 1, "d": 2},
        "e": {"b": 1},
    }


def test_a_tab_is_named_with_its_line() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml("a:\n\tb: 1\n")
    assert yaml_fault(caught.value).startswith("line 2: found character '\\t'")
    assert yaml_fault(caught.value).endswith("; indent by spaces, not by tabs")


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
)
MERGES = "\n".join(
    ["a0: &a0 {k: 1}"]
    + [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &a [*a]", "an alias stands for what it is in"),
        ("[" * 100_000, "nested too deeply"),
        ("a: !!set {b, c}", "the tag"),
        ("a: !!binary YQ==", "the tag"),
        ("a: !!timestamp 2024-99-99", "the tag"),
        ("a: !!python/object:os.system x", "the tag"),
        ("a: !!int b", "not what it should be"),
        ("a: !!bool b", "not what it should be"),
        ("a: " + "9" * 5000, "not what it should be"),
        ("a: 0b_", "not what it should be"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        (r'a: "\0"', "no character"),
        (r'a: "\ud800"', "no character"),
        ("a" * (1 << 20) + "b", "characters, more than"),
    ],
)
def test_what_no_recipe_holds_is_refused(text: str, told: str) -> None:
    with pytest.raises(yaml.YAMLError, match=told):
        read_yaml(text)


@pytest.mark.parametrize(
    "text", [BOMB, MERGES, "a: &a [*a]", "[" * 100_000, "!!int b", "!!timestamp 2024-99-99", "9" * 5000]
)
def test_yaml_of_others_ends_in_an_error_of_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_foreign_yaml(text)


def test_keys_are_text_as_they_are_spelled_and_merged_mappings_are_merged() -> None:
    assert read_yaml("{1: a, 1.0: b, true: c, ~: d}") == {"1": "a", "1.0": "b", "true": "c", "~": "d"}
    assert read_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}")["c"] == {"b": 1, "d": 2}
    assert read_yaml("a: &x 1\n*x : 2") == {"a": 1, "1": 2}, "a key's text leaves what it is an alias of as it is"
    assert read_yaml("delimiter: =") == {"delimiter": "="}
