"""The command that searches a recipe's ranges."""

from pathlib import Path
from typing import Annotated

import typer

from spunge.cli.run import RecipeArgument
from spunge.cli.terminal import JsonOption, SetOption, loading, near, print_json, quiet, say, tell_carried


def tune(
    recipe: RecipeArgument,
    objectives: Annotated[
        list[str],
        typer.Option("--objectives", help="Two of EVALUATION/METRIC/SUBJECT, between them a comma; or given twice."),
    ],
    trials: Annotated[
        int, typer.Option("--trials", help="How many there should be in all, those of an earlier call among them.")
    ] = 0,
    judge: Annotated[
        list[str],
        typer.Option("--judge", help="A point's number, or all: judge it once on test items. May be repeated."),
    ] = [],  # noqa: B006
    overrides: SetOption = [],  # noqa: B006
    out: Annotated[str, typer.Option("--out", help="The search's folder. Default: runs/NAME-tune.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Search settings that are good by two objectives.

    The recipe has ranges in place of values: {low, high, log} or {choices: [..]}. Trials are judged on one half of the items,
    chosen points on the other. What the folder holds already is not done again.
    """
    with loading():
        from spunge.progress import Terminal
        from spunge.report.search import PAGE, search_text
        from spunge.run.folder import default_folder
        from spunge.run.tune import tune as tune_recipe

    watcher = Terminal()
    quiet()
    folder = Path(out or f"{default_folder(recipe)}-tune").resolve()
    tell_carried(recipe, overrides)
    try:
        search = tune_recipe(recipe, trials, objectives, folder, overrides, judge, seed, watcher)
    finally:
        watcher.close()
    if as_json:
        print_json(search.content)
        return
    say(search_text(search).rstrip("\n"))
    say(f"\npoints: {near(folder / 'points')}\nreport: {near(folder / PAGE)}")
