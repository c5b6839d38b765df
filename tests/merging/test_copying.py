"""Copies by the kernel: the source's bytes, at any place, and no room for what is a hole."""

import os
from pathlib import Path

import pytest

from spunge.merging.copying import copy_range

BLOCK = 1 << 16
DATA = b"spunge" * 1000


def with_holes(file: Path) -> bytes:
    """A hole, data, a hole, data, a hole."""
    with file.open("wb") as stream:
        for at in (3 * BLOCK, 9 * BLOCK + 5):
            stream.seek(at)
            stream.write(DATA)
        stream.truncate(16 * BLOCK)
    return file.read_bytes()


@pytest.mark.parametrize(("start", "to"), [(0, 0), (0, 12), (3 * BLOCK + 7, 7), (5 * BLOCK, 2 * BLOCK)])
@pytest.mark.parametrize("earlier", [b"", b"\xff" * 20 * BLOCK], ids=["new", "full of other bytes"])
def test_a_copy_has_the_sources_bytes_also_where_it_has_holes(
    earlier: bytes, start: int, to: int, tmp_path: Path
) -> None:
    held, size = with_holes(tmp_path / "source"), 20 * BLOCK
    (tmp_path / "target").write_bytes(earlier)
    os.truncate(tmp_path / "target", size)
    with (tmp_path / "source").open("rb") as reader, (tmp_path / "target").open("r+b") as writer:
        copy_range(reader.fileno(), writer.fileno(), start, len(held), to)
    around = earlier or bytes(size)
    piece = held[start:]
    assert (tmp_path / "target").read_bytes() == around[:to] + piece + around[to + len(piece) :]


def test_holes_take_no_room_in_a_copy(tmp_path: Path) -> None:
    held = with_holes(tmp_path / "source")
    if (room := (tmp_path / "source").stat().st_blocks * 512) >= len(held) // 2:
        pytest.skip("this file system has no holes")
    (tmp_path / "target").touch()
    os.truncate(tmp_path / "target", len(held))
    with (tmp_path / "source").open("rb") as reader, (tmp_path / "target").open("r+b") as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, len(held), 0)
        os.fsync(writer.fileno())
    assert (tmp_path / "target").read_bytes() == held
    assert (tmp_path / "target").stat().st_blocks * 512 <= 2 * room


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with_holes(tmp_path / "source")
    with (
        (tmp_path / "source").open("rb") as reader,
        (tmp_path / "target").open("w+b") as writer,
        pytest.raises(EOFError),
    ):
        copy_range(reader.fileno(), writer.fileno(), 0, 17 * BLOCK, 0)
