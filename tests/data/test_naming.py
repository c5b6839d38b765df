"""Values become names of folders that stay inside, are legal everywhere and never meet, whatever a value holds."""

import unicodedata
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spunge.data import naming
from spunge.data.naming import hashed, slug, slugs
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.files import is_device, is_inside
from spunge.recipe.loading import load_recipe
from spunge.run.folder import default_folder

ODD = [
    "",
    ".",
    "..",
    "../../x",
    "/etc",
    "~",
    "a/b",
    "A/B",
    "a b",
    "a-b",
    "a_b",
    "Europe",
    "europe",
    "EUROPE",
    "con",
    "NUL.txt",
]
ODD += [
    "aux ",
    "com1",
    "lpt9.",
    "end.",
    "end ",
    "\0",
    "\x1b[2J",
    "\u202eabc",
    "x" * 400,
    "x" * 401,
    "\ud800",
    "C:",
    "a:b",
]
ODD += [
    unicodedata.normalize("NFC", "\u00e9t\u00e9"),
    unicodedata.normalize("NFD", "\u00e9t\u00e9"),
    "ete",
    "\u212a",
    "k",
    "K",
]
ODD += [
    "\u0131",
    "i",
    "\ufb01",
    "fi",
    "\u00df",
    "ss",
    "*",
    "?",
    "-",
    "--",
    "\U0001f600",
    ".lock",
    ".part",
    "a" * 40,
    "a" * 41,
]
ODD += [hashed("!x"), hashed("a/b"), hashed("\0"), hashed(hashed("!x")), hashed("!x", 32)]

texts = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=60),
    st.text("aAbB ._-/\\:\u0301\u00e1\u00c1", max_size=8),
    st.sampled_from(ODD).map(hashed),
)


def check(names: dict[str, str]) -> None:
    folded = [unicodedata.normalize("NFKC", name).casefold() for name in names.values()]
    assert len(set(folded)) == len(names)
    for name in names.values():
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-"), name
        assert 0 < len(name) <= 57
        assert not PureWindowsPath(name).is_reserved()
        assert is_inside(name)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, max_size=12, unique=True))
def test_names_never_meet_and_never_leave_the_folder(values: list[str]) -> None:
    check(slugs(values))
    check({value: slug(value) for value in values})


def test_odd_values_all_together() -> None:
    values = list(dict.fromkeys(ODD))
    check(slugs(values))
    check({value: slug(value) for value in values})


def test_plain_values_keep_their_names() -> None:
    assert slugs(["Europe", "physical disability"]) == {
        "Europe": "europe",
        "physical disability": "physical-disability",
    }
    assert [slug(name) for name in ("piqa", "arc_easy", "a-b")] == ["piqa", "arc_easy", "a-b"]


def test_values_whose_short_hashes_are_equal_get_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        naming, "hashed", lambda value, digits=8: "x-00000000" if digits == 8 else hashed(value, digits)
    )
    names = slugs(["!a", "!b", "plain"])
    assert names["plain"] == "plain"
    assert len(set(names.values())) == 3


def test_a_split_by_hostile_values_has_a_folder_of_its_own_for_each_part(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    values = [value for value in dict.fromkeys(ODD) if value.strip() and value != "\ud800"]
    toy_recipe["forget"]["source"] = str(
        write_rows("odd.jsonl", [{"text": "paris is in france", "topic": value} for value in values])
    )
    for part in split_rows(load_recipe(toy_recipe)).parts:
        folder = tmp_path / "branches" / part.slug
        folder.mkdir(parents=True)
        assert folder.resolve().parent == tmp_path / "branches"


@pytest.mark.parametrize(
    "name", ["..", "a/b", "a.", "a ", "CON", "con", "nul.x", "com1", "x" * 61, "", "\u00e9", "a\n", "-a"]
)
def test_a_control_is_called_nothing_that_is_no_folder(toy_recipe: dict[str, Any], name: str) -> None:
    toy_recipe["controls"] = [{"name": name, "train": "joint"}]
    with pytest.raises(RecipeError, match=r"^controls"):
        load_recipe(toy_recipe)


@pytest.mark.parametrize("recipe", ["..yaml", "...yaml", "x/ .yaml", "..", "."])
def test_the_default_folder_is_below_runs(recipe: str) -> None:
    assert default_folder(recipe) == Path("runs/run")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model.safetensors", True),
        ("a/b.json", True),
        ("a/./b", True),
        ("..a", True),
        ("../a", False),
        ("a/../../b", False),
        ("/a", False),
        ("\\a", False),
        ("a\\..\\b", False),
        ("C:\\a", False),
        ("C:a", False),
        (".", False),
        ("..", False),
        ("", False),
        ("a\0b", False),
        (5, False),
        (None, False),
    ],
)
def test_a_name_in_a_file_leads_into_its_folder_or_is_refused(name: object, inside: bool) -> None:
    assert is_inside(name) == inside


def test_devices_of_windows_are_known_whatever_their_ending() -> None:
    assert all(map(is_device, ["con", "CON", "nul.txt", "aux .x", "com9", "lpt0"]))
    assert not any(map(is_device, ["console", "com", "com10", "null", "a.con"]))
