"""Commands to begin with: what there is to choose from, a recipe to edit, what this machine has."""

from pathlib import Path
from typing import Annotated

import typer

from spunge.cli.oneline import (
    ByOption,
    CompletionOption,
    ControlOption,
    EpochsOption,
    ForgetOption,
    Line,
    MessagesOption,
    MethodOption,
    PromptOption,
    RetainOption,
    StepsOption,
    TextOption,
    WhereOption,
    means_model,
    written,
)
from spunge.cli.terminal import JsonOption, SetOption, print_json, quiet, say
from spunge.errors import RecipeError, suggestion


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, rules, evaluators, attacks, scorers, attributes, decode or recipes. Default: all."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List what a recipe can name, and the shipped recipes.

    All of them in a line each; methods, rules, evaluators ... alone with their settings.
    """
    from spunge.cli.listing import KINDS, listing, listing_text

    if what and what not in KINDS:
        raise RecipeError(f"list: nothing called {what!r}{suggestion(what, KINDS)}")
    entries = {kind: listing(kind) for kind in ([what] if what else KINDS)}
    if as_json:
        print_json(entries)
    else:
        say(listing_text(entries, settings=bool(what)))
        if not what:
            say(f"\nOne kind with its settings: spunge list KIND, of {', '.join(KINDS)}")


def init(
    name: Annotated[
        str,
        typer.Argument(metavar="RECIPE|MODEL", help="A shipped recipe's name (spunge list recipes), or a model."),
    ] = "",
    forget: ForgetOption = "",
    retain: RetainOption = "",
    text: TextOption = "",
    prompt: PromptOption = "",
    completion: CompletionOption = "",
    messages: MessagesOption = "",
    by: ByOption = "",
    where: WhereOption = "",
    method: MethodOption = "",
    epochs: EpochsOption = 0.0,
    steps: StepsOption = 0,
    control: ControlOption = [],  # noqa: B006
    overrides: SetOption = [],  # noqa: B006
    folder: Annotated[str, typer.Option("--to", help="Where to write it.")] = ".",
) -> None:
    """Write a recipe to edit, a shipped one or one for your rows.

    What is missing is asked for at a terminal, and refused elsewhere. Nothing is trained.
    """
    from spunge.cli.asking import completed

    line = Line(forget, retain, text, prompt, completion, messages, by, where, method, epochs, steps, control)
    name, line = completed(name, line, overrides)
    if not means_model(name, line):
        say(str(_copied(name, folder)))
        return
    quiet()
    say(str(written(name, line, overrides, to=folder).file))


def _copied(name: str, folder: str) -> Path:
    """A shipped recipe's copy, with its data."""
    import shutil

    from spunge.files import whole_folder, write_text
    from spunge.recipe.loading import shipped_recipes

    shipped = {file.stem: file for file in shipped_recipes()}
    if name not in shipped:
        raise RecipeError(f"init: no shipped recipe {name!r}{suggestion(name, shipped)}")
    target = Path(folder) / f"{name}.yaml"
    data = shipped[name].with_suffix("")
    for path in (target, target.with_suffix("")):
        if path.exists() and (path == target or data.is_dir()):
            raise RecipeError(f"init: {str(path)!r} exists already; give another folder with --to")
    if data.is_dir():
        with whole_folder(target.with_suffix(""), "--to") as aside:
            for file in data.iterdir():
                shutil.copyfile(file, aside / file.name)
    write_text(target, shipped[name].read_text(encoding="utf-8"), "--to")  # last: where a recipe is, its data are
    return target


def env(as_json: JsonOption = False) -> None:
    """Print versions and devices, for bug reports."""
    from spunge.cli.listing import environment

    versions = environment()
    if as_json:
        print_json(versions)
    else:
        say("\n".join(f"{name:16} {value}" for name, value in versions.items()))
