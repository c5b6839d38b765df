"""What endpoints answered, by what was asked: kept in the cache folder as it comes, so that nothing is asked twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from spunge.errors import RecipeError
from spunge.files import append_text, parse_json, sealed, unsealed

T = TypeVar("T")


class Answers(Generic[T]):
    """The answers in a file of lines, each by a fingerprint of what was asked."""

    def __init__(self, file: Path, name: str, read: Callable[[object], T | None]) -> None:
        """name: what a line calls its answer. read: the answer in a line, None where it is none. A damaged line is left out."""
        self._file, self._name = file, name
        self.known: dict[str, T] = {}
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                content = unsealed(parse_json(line)) or {}
            except ValueError:
                continue
            key, answer = content.get("asked"), read(content.get(name))
            if isinstance(key, str) and answer is not None:
                self.known[key] = answer

    def keep(self, key: str, answer: T) -> None:
        """Know an answer, and write it down. Where the cache cannot be written, nothing is kept."""
        self.known[key] = answer
        try:
            append_text(self._file, json.dumps(sealed({"asked": key, self._name: answer})) + "\n")
        except RecipeError:
            return
