"""A recipe with remarks reads back as what was written, and is never written over once a person changed it."""

from pathlib import Path
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.remarked import remarked, write_remarked
from spunge.recipe.spelling import read_yaml

SHARED: dict[str, Any] = {"limit": 3}
CONTENT: dict[str, Any] = {
    "model": {"path": "1e3"},
    "split": {"by": "NO"},
    "evaluate": [{"kind": "a", "g": SHARED}, {"kind": "b", "g": SHARED}],
}


def test_it_reads_back_as_it_was_without_aliases_and_with_its_remarks_as_comments() -> None:
    text = remarked(CONTENT, {"split": "two\x1b lines\nof it: yes"}, "title")
    assert read_yaml(text) == CONTENT
    assert "&id" not in text
    assert "\x1b" not in text
    assert "\n# of it: yes\nsplit:" in text


def test_what_a_person_changed_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    first, second = (remarked({"seed": seed}, {}, "title") for seed in (1, 2))
    write_remarked(file, first, "--out")
    write_remarked(file, second, "--out")
    assert file.read_text() == second
    file.write_text(second.replace("seed: 2", "seed: 3"))
    with pytest.raises(RecipeError, match=r"--out: .* is there already, and not as spunge wrote it"):
        write_remarked(file, first, "--out")
    assert "seed: 3" in file.read_text()
