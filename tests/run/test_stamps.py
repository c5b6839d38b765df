"""A stamp vouches for files only where it is whole, whoever wrote it."""

from pathlib import Path
from typing import Any

import pytest

from spunge.files import sealed, write_json
from spunge.run.stamps import read_stamp, stamp_file

WHOLE: dict[str, Any] = {
    "format": 1,
    "stage": "merged",
    "key": "0" * 64,
    "inputs": {"model": "x"},
    "files": {"merge.json": {"size": 3, "xxh3": "0" * 32, "byproduct": False}},
    "seconds": 1.5,
    "dropped": ["texts.jsonl"],
}


def written(folder: Path, **changes: Any) -> Path:
    content = {key: value for key, value in {**WHOLE, **changes}.items() if value != "left out"}
    write_json(stamp_file(folder, "merged"), sealed(content))
    return folder


def test_a_whole_stamp_is_read(tmp_path: Path) -> None:
    stamp = read_stamp(written(tmp_path), "merged")
    assert stamp is not None
    assert (stamp.key, stamp.size, stamp.dropped) == ("0" * 64, 3, ("texts.jsonl",))


@pytest.mark.parametrize(
    "changes",
    [
        *({key: "left out"} for key in ("stage", "key", "inputs", "files", "seconds")),
        {"stage": "base"},
        {"key": 14},
        {"files": ""},
        {"files": {"a": 1}},
        {"files": {"a": {"size": "%s", "xxh3": "0", "byproduct": False}}},
        {"files": {"a": {"size": -1, "xxh3": "0", "byproduct": False}}},
        {"files": {"../a": {"size": 1, "xxh3": "0", "byproduct": False}}},
        {"seconds": [1.5]},
        {"seconds": "["},
        {"dropped": 3},
    ],
)
def test_a_stamp_of_something_else_vouches_for_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_stamp(written(tmp_path, **changes), "merged") is None
