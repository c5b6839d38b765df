"""What was found out is found once, and anew where it may be otherwise."""

import os
import time
from pathlib import Path

import pytest

from spunge.files import cache_folder
from spunge.model import recalled as module
from spunge.model.recalled import recalled


def counted() -> tuple[list[int], object]:
    calls: list[int] = []

    def find() -> int:
        calls.append(len(calls))
        return len(calls)

    return calls, find


def kept_file() -> Path:
    [file] = (cache_folder() / "shapes").iterdir()
    return file


def test_what_was_found_is_given_again_and_for_something_else_found_anew() -> None:
    calls, find = counted()
    assert [recalled(["a", 1], find), recalled(["a", 1], find)] == [1, 1]
    assert recalled(["a", 2], find) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["damaged", "old", "other code", "nothing found", "not writable"])
def test_what_may_be_otherwise_is_found_anew(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, find = counted()
    if change == "not writable":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "file"))
    if change == "nothing found":
        assert [recalled("a", lambda: None), recalled("a", find)] == [None, 1]
        return
    recalled("a", find)
    if change == "damaged":
        kept_file().write_text(kept_file().read_text().replace('"value": 1', '"value": 7'))
    elif change == "old":
        then = time.time() - 31 * 86400
        os.utime(kept_file(), (then, then))
    elif change == "other code":
        monkeypatch.setattr(module, "_code", lambda: ["torch 9"])
    assert recalled("a", find) == 2
    assert len(calls) == 2
