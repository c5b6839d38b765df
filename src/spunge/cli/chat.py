"""Talk to the models of a run: one prompt, every model's answer beside the others'."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, print_json, quiet, say, say_on
from spunge.errors import RecipeError, printable

if TYPE_CHECKING:
    from spunge.evaluation.generation import GenerationSettings
    from spunge.run.asking import Asking

NARROW = 36  # columns of a terminal that an answer needs beside others


def chat(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    stages: Annotated[
        list[str],
        typer.Option(
            "--stage",
            help="A model: base, merged, branch:SLUG, control:NAME. May be repeated. Default: base, joint, merged.",
        ),
    ] = [],  # noqa: B006
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", help="Answer this and end. May be repeated. Default: what is typed, line by line."),
    ] = [],  # noqa: B006
    plain: Annotated[
        bool, typer.Option("--plain", help="Prompts as they are, not in the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens of an answer, at most.")] = 100,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of sampling. Default: greedy, the likeliest token each time.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling; needs --temperature.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Ask a run's models, one beside the other.

    Every prompt stands alone: nothing of earlier ones is remembered. Nothing is written to the run's folder.
    """
    with loading():
        from spunge.run.asking import Asking

    quiet()
    settings = generation(plain, max_new_tokens, temperature, seed)
    asking = Asking(folder, stages)
    try:
        for prompt in prompts or typed():
            if as_json:
                answers = {model.name: asking.answer(model, prompt, settings) for model in asking.models}
                print_json({"prompt": prompt, "answers": answers})
            elif sys.stdout.isatty():
                side_by_side(asking, prompt, settings)
            else:
                below_each_other(asking, prompt, settings)
    finally:
        asking.close()


def generation(plain: bool, max_new_tokens: int, temperature: float | None, seed: int) -> "GenerationSettings":
    from spunge.evaluation.generation import GenerationSettings
    from spunge.recipe.explanation import validated

    given = {"chat": not plain, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    try:
        return validated(GenerationSettings, given)
    except RecipeError as error:
        name, colon, why = str(error).partition(":")
        raise RecipeError(f"--{name.replace('_', '-')}{colon}{why}") from None


def typed() -> Iterator[str]:
    """Prompts, a line each, until the input ends; a person is asked for each."""
    asked = sys.stdin.isatty()
    while True:
        if asked:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def below_each_other(asking: "Asking", prompt: str, settings: "GenerationSettings") -> None:
    """Each answer under its model's name, written as it comes."""
    say(f"> {printable(prompt)}")
    for model in asking.models:
        say_on(f"{printable(model.name)}: ")
        asking.answer(model, prompt, settings, say_on)
        say("")


def side_by_side(asking: "Asking", prompt: str, settings: "GenerationSettings") -> None:
    """A column for each model, filled as the answers come; one below the other where the terminal is narrow."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console(emoji=False)
    if console.width < NARROW * len(asking.models):
        below_each_other(asking, prompt, settings)
        return
    answers = dict.fromkeys(asking.names, "")

    def table() -> Table:
        shown = Table(expand=True)
        for name in asking.names:
            shown.add_column(Text(printable(name)))
        shown.add_row(*(Text(printable(answer, keep="\n")) for answer in answers.values()))
        return shown

    with Live(table(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for model in asking.models:

            def hear(text: str, name: str = model.name) -> None:
                answers[name] += text
                live.update(table(), refresh=True)

            asking.answer(model, prompt, settings, hear)
