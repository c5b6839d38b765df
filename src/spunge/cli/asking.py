"""What a person at the terminal is asked for: what a recipe needs and cannot be guessed. Elsewhere it is refused in one line."""

import sys
from collections.abc import Sequence

import typer

from spunge.cli.oneline import RECIPES, Line, asked_of
from spunge.cli.terminal import tell
from spunge.errors import RecipeError


def is_person() -> bool:
    """Whether somebody can answer: both what is asked and what is answered go through a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def completed(target: str, line: Line, overrides: Sequence[str]) -> tuple[str, Line]:
    """The model or recipe, and the options, with what a person adds. Raises RecipeError where nobody can be asked."""
    from spunge.recipe.loading import shipped_recipes

    shipped = {file.stem for file in shipped_recipes()}
    person, short = is_person(), not (target and line.forget)
    if not target:
        if not person:
            raise RecipeError("init: RECIPE|MODEL: missing; give a shipped recipe's name, or a model and --forget ROWS")
        target = _answer("Model (a folder or a Hub id), or a shipped recipe's name", "demo")
    if target in shipped or target.lower().endswith(RECIPES) or (not person and not line.forget):
        return target, line
    if not line.forget:
        line = line._replace(forget=_answer("Rows to forget (a file, a folder, or {hub: ID})"))
    if not person:
        return target, line
    line = _with_columns(target, line, overrides)
    if short:
        line = line._replace(
            retain=line.retain or _answer("Rows to keep (a file; neutral: paragraphs of Wikipedia)", "neutral"),
            method=line.method or _answer("Method (spunge list methods)", "npo"),
        )
    return target, line


def _with_columns(target: str, line: Line, overrides: Sequence[str]) -> Line:
    """The columns that cannot be guessed."""
    from spunge.run.proposal import what_is_open

    opened = what_is_open(asked_of(target, line, overrides))
    if opened.texts:
        tell(opened.texts)
        first = line.text or line.prompt or line.messages or _answer("Column of the texts, questions or conversations")
        if first in opened.nested:
            line = line._replace(messages=first)
        elif answers := _answer("Column of the answers to them (Enter: they are plain texts)", ""):
            line = line._replace(prompt=first, completion=answers)
        else:
            line = line._replace(text=first)
        opened = what_is_open(asked_of(target, line, overrides))
    if opened.attribute:
        tell(opened.attribute)
        line = line._replace(by=_answer("Column that names the parts (none: one part)", "none"))
    return line


def _answer(question: str, usual: str | None = None) -> str:
    """What the person types; Enter takes the usual answer. Raises RecipeError where nothing more comes."""
    try:
        answer = typer.prompt(question, default=usual, err=True, show_default=bool(usual))
    except typer.Abort:
        raise RecipeError(f"init: {question}: no answer came") from None
    return str(answer).strip()
