"""The command that shows a folder of runs in a browser."""

from typing import Annotated

import typer

from spunge.cli.terminal import quiet, say


def view(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="A folder of runs. Default: runs.")] = "runs",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8642,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The models of runs can be asked too: loads the one that is asked into memory."),
    ] = False,
    pair: Annotated[
        bool, typer.Option("--pair", help="Comparisons pair the runs' items, as `spunge compare` does: reads the rows.")
    ] = False,
) -> None:
    """Show the runs of a folder in a browser.

    What they found, how far those are that still run, several beside each other. For this machine alone, and to look at: it
    changes nothing. Ctrl-C ends it.
    """
    from spunge.view.server import serving

    if chat or pair:
        quiet()
    with serving(folder, port, chat, pair) as server:
        say(f"{server.address} shows {server.root}; Ctrl-C ends it")
        server.serve_forever()
