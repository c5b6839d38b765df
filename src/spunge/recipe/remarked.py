"""A recipe as a short file with remarks, for a person to edit; and whether one did."""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, printable
from spunge.files import write_text
from spunge.recipe.spelling import write_yaml

UNTOUCHED = "# As spunge wrote it: "  # begins the last line, with the checksum of all before it


def remarked(content: Mapping[str, Any], remarks: Mapping[str, str], title: str) -> str:
    """YAML of a recipe, each block under the remark on it."""
    lines = _comment(title)
    for name, block in content.items():
        lines += ["", *_comment(remarks.get(name, ""))]
        lines += write_yaml({name: json.loads(json.dumps(block))}, width=110, default_flow_style=None).splitlines()
    text = "\n".join(lines) + "\n"
    return f"{text}\n{UNTOUCHED}{_checksum(text)}\n"


def write_remarked(file: Path, text: str, setting: str) -> None:
    """Write such a text. One that a person changed is never written over: raises RecipeError."""
    if file.exists():
        try:
            there = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            there = ""
        if there != text and not _untouched(there):
            raise RecipeError(
                f"{setting}: {str(file)!r} is there already, and not as spunge wrote it; run it (spunge run {file}), or give "
                "another --out"
            )
    write_text(file, text, setting)


def _untouched(text: str) -> bool:
    before, mark, checksum = text.rpartition(f"\n{UNTOUCHED}")
    return bool(mark) and checksum.strip() == _checksum(before)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for part in text.splitlines() for line in textwrap.wrap(printable(part), 110)]
