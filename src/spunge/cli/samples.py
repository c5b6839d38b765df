"""`spunge split --show`: samples as the model is given them, with what the loss is on marked."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spunge.data.selection import Selection
from spunge.data.split import Parts
from spunge.errors import printable
from spunge.model.loading import load_tokenizer, positions_of
from spunge.recipe.model import ModelSettings
from spunge.recipe.schema import Recipe
from spunge.registry import METHODS
from spunge.unlearning.checking import WHOLE
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.showing import Shown, shown

OPEN, CLOSE = "[[", "]]"  # around what the loss is on, where there is no colour


def samples_of(
    recipe: Recipe, parts: Parts, retain: Selection | None, lesson: Selection | None, count: int
) -> list[Shown]:
    """The first samples of each part, of the retain rows, and of those that are taught. Loads the tokenizer, no weights."""
    settings = recipe.unlearn if isinstance(recipe.unlearn, TrainingSettings) else None
    tokenizer = load_tokenizer(recipe.model)
    packing = settings is not None and settings.packing
    positions = _positions(recipe.model)
    listed: list[Shown] = []
    for part in parts.parts:
        length = min(positions, settings.length_of(part.value) if settings else WHOLE)
        unlearn = recipe.unlearn
        read = {"": part.samples}
        if unlearn is not None:
            read = dict(METHODS.get(unlearn.method).given(part.samples, unlearn, tokenizer))
        for given, samples in read.items():
            listed += shown(samples, count, part.value, "forget", tokenizer, length, given=given, packing=packing)
    if retain is not None:
        length = min(positions, settings.length_of("retain") if settings else WHOLE)
        packed = packing and retain.samples.plain
        listed += shown(retain.samples, count, "retain", "retain", tokenizer, length, packing=packed)
    if lesson is not None and recipe.teach is not None:
        length = min(positions, recipe.teach.max_length)
        listed += shown(lesson.samples, count, "teach", "teach", tokenizer, length, packing=recipe.teach.packing)
    return listed


def _positions(model: ModelSettings) -> int:
    """Tokens that the model has learned positions for, where it is here to be asked."""
    folder = Path(os.path.expanduser(model.path))
    here = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    return (positions_of(folder, model) if here else None) or WHOLE


def print_samples(samples: list[Shown]) -> None:
    """In a terminal what the loss is on is set in reverse; elsewhere it stands in brackets."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for sample in samples:
        console.print(_titled(sample), style="bold" if console.is_terminal else None)
        console.print(_marked(sample, console.is_terminal))


def _titled(sample: Shown) -> str:
    name = f"part {printable(sample.part)}" if sample.of == "forget" else sample.of
    name += f", {sample.given}" if sample.given else ""
    row = "" if sample.row is None else f", row {sample.row}"
    learned = any(scored for _, scored in sample.pieces)
    size = f"{len(sample.ids)} tokens" + (f", cut from {sample.tokens}" if sample.tokens > len(sample.ids) else "")
    return f"\n{name}{row}: {size}; {'the loss is on the marked ones' if learned else 'none is learned'}"


def _marked(sample: Shown, coloured: bool) -> Any:
    from rich.text import Text

    pieces = [(printable(text, keep="\n"), scored) for text, scored in sample.pieces]
    if coloured:
        return Text.assemble(*((text, "reverse" if scored else "") for text, scored in pieces))
    return Text("".join(_bracketed(pieces)))


def _bracketed(pieces: list[tuple[str, bool]]) -> Iterator[str]:
    yield from (f"{OPEN}{text}{CLOSE}" if scored else text for text, scored in pieces)
