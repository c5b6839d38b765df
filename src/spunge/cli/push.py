"""`spunge push`: a merged model to the Hub, with a card that has its scores."""

from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, print_json, quiet, say


def push(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one that `spunge merge` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="On the Hub: OWNER/NAME.")],
    send: Annotated[
        bool, typer.Option("--send", help="Send it. Without this, it is only said what would be sent.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public. Default: private.")] = False,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Send results.json too.")] = True,
    card: Annotated[bool, typer.Option("--card", help="Print the model card and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send a merged model to the Hub.

    Says what would be sent, unless --send is given. The card holds the merged model's scores, the names of the parts, the settings
    and the limits of what was done; no rows, no texts and no paths are sent.
    """
    with loading():
        from spunge.files import shown_size
        from spunge.run.publishing import CARD, package
        from spunge.run.publishing import send as send_package

    quiet()
    what = package(folder, repository, scores)
    if card:
        own = what.files.get(CARD, b"")
        say((own if isinstance(own, bytes) else own.read_bytes()).decode().rstrip("\n"))
        return
    address = send_package(what, public) if send else None
    total = sum(what.sizes.values())
    if as_json:
        print_json(
            {
                "repository": repository,
                "files": list(what.files),
                "bytes": total,
                "sent": send,
                "commit": address,
            }
        )
        return
    for name, size in what.sizes.items():
        say(f"{shown_size(size):>10}  {name}")
    if what.names:
        say(f"the card and the scores name {len(what.names)} parts: {', '.join(what.names)}")
    if address is not None:
        say(f"sent: {address}")
    else:
        where = f"{repository}, {'public' if public else 'private'} if it is new"
        say(f"{shown_size(total)} would be sent to {where}; --send sends it")
