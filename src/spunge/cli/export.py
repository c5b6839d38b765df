"""`spunge export`: what a run unlearned while a model decodes, as a folder for those who serve the model."""

from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, quiet, say


def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, of a recipe with decode.")],
    out: Annotated[str, typer.Option("--out", help="The folder to write.")],
    stage: Annotated[
        str, typer.Option("--stage", help="A model: merged (default), branch:SLUG, control:NAME.")
    ] = "merged",
    as_json: JsonOption = False,
) -> None:
    """Write what shifts a larger model as it decodes."""
    with loading():
        from spunge.run.exporting import export as written

    quiet()
    there = written(folder, out, stage)
    if as_json:
        print_json({"out": str(there)})
        return
    say(near(there))
