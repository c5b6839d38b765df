"""Files as text: unpacked by the ending of their name, decoded as UTF-8 or as their byte order mark or the recipe says."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, TextIO, cast

import pyarrow as pa

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD = 4096
# How files begin that are something else than their name says, and what to do about it.
SIGNS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "it is Git LFS's pointer to the file, not the file; run git lfs pull",
    ),
    (b"\x1f\x8b", "it is packed by gzip; call it NAME.gz, after its own ending"),
    (b"\x28\xb5\x2f\xfd", "it is packed by zstd; call it NAME.zst, after its own ending"),
    (b"BZh91AY&SY", "it is packed by bzip2; call it NAME.bz2, after its own ending"),
    (b"\xfd7zXZ\0", "it is packed by xz; call it NAME.xz, after its own ending"),
    (b"PK\x03\x04", "it is a zip archive or an Excel file; unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "it is an old Excel file; save the sheet as CSV"),
    (b"PAR1", "it is a Parquet file; call it NAME.parquet"),
    (b"ARROW1", "it is an Arrow file; call it NAME.arrow"),
    (b"FEA1", "it is Feather's first format, which is no longer read; write it anew with pyarrow or pandas"),
)
DAMAGES = (EOFError, OSError, lzma.LZMAError, zlib.error)  # what unpacking and reading raise


class UnreadableError(ValueError):
    """Why a file cannot be read: in a few words, with the row where there is one, without the file and the setting."""


def open_bytes(file: Path) -> BinaryIO:
    """The file's content, unpacked where its name ends in .gz, .zst, .bz2 or .xz."""
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file, "rb"))
        case ".bz2":
            return cast(BinaryIO, bz2.open(file, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(file, "rb"))
        case ".zst":
            return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def refuse_foreign(file: Path, own: tuple[bytes, ...]) -> None:
    """Raises UnreadableError for a file that is something else than its name says, and what cannot be unpacked. own: the
    beginnings that it may have."""
    try:
        with open_bytes(file) as stream:
            head = stream.read(HEAD)
    except DAMAGES as error:
        raise UnreadableError(" ".join(str(error).split()) or "it is cut short") from None
    for sign, told in SIGNS:
        if head.startswith(sign) and sign not in own:
            raise UnreadableError(told)


@contextmanager
def open_text(file: Path, encoding: str | None, newline: str | None) -> Iterator[TextIO]:
    """The file's text. newline: as `open` takes it. Raises UnreadableError for content that is not what it should be."""
    try:
        with open_bytes(file) as stream:
            decoder = _encoding(stream, encoding)
            with io.TextIOWrapper(cast(IO[bytes], stream), encoding=decoder, newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise UnreadableError(_undecodable(file, encoding or "utf-8", error)) from None
    except (
        UnicodeError
    ) as error:  # of codecs whose errors are no UnicodeDecodeError, which ones depends on Python's version
        raise UnreadableError(f"it is not {encoding} ({error}); give the source its encoding") from None
    except DAMAGES as error:
        raise UnreadableError(" ".join(str(error).split()) or "it is cut short") from None


def _encoding(stream: BinaryIO, given: str | None) -> str:
    """What a byte order mark says; else the given one, or UTF-8. Raises UnreadableError where the two do not agree."""
    head: bytes = cast(io.BufferedReader, stream).peek(HEAD)[:HEAD]
    family = codecs.lookup(given).name[:6] if given else None  # utf-8, utf-16, utf-32, with -sig, -le or -be behind
    for mark, name in MARKS:
        if head.startswith(mark) and family in (None, name[:6], name.removesuffix("-sig")):
            return name
        if head.startswith(mark) and given and not codecs.lookup(given).name.startswith("utf"):
            raise UnreadableError(
                f"its byte order mark says {name.removesuffix('-sig')}, not {given}; leave the encoding out"
            )
    if given and head and codecs.lookup(given).name in ("utf-16", "utf-32"):
        raise UnreadableError(
            f"it is not {given} (no byte order mark); give the source its encoding, such as {given}-le"
        )
    if given:
        return given
    # Letters of UTF-16 without a mark are valid UTF-8 with a NUL beside each.
    if head.count(0) > len(head) // 4:
        raise UnreadableError("it looks like UTF-16 without a byte order mark; give the source an encoding: utf-16-le")
    return "utf-8"


def _undecodable(file: Path, encoding: str, error: UnicodeDecodeError) -> str:
    """The line and the byte that cannot be decoded, as near as they can be told."""
    if codecs.lookup(encoding).name == "utf-8":
        with suppress(*DAMAGES), open_bytes(file) as stream:  # of a packed file that is damaged further on
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as here:
                    return (
                        f"line {number}: byte 0x{here.object[here.start]:02x} is not UTF-8; save the file as UTF-8, or give "
                        "the source its encoding, such as {path: .., encoding: cp1252}"
                    )
    return f"it is not {encoding} ({error.reason}); give the source its encoding"
