"""The pages of `spunge view`, as HTML. Everything from a run is escaped; no page has a script."""

import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Template

from spunge.errors import RecipeError, printable, redacted
from spunge.progress import clock
from spunge.report.compared import comparison_page
from spunge.report.comparison import compare
from spunge.report.page import environment
from spunge.report.table import results_text
from spunge.report.text import report_text
from spunge.view.runs import Listed, Reader, progress_of

REPORT = "report.html"
FILES = {
    REPORT: "text/html",
    **dict.fromkeys(("results.json", "recipe.yaml", "split.json", "merge.json"), "text/plain"),
}
MOST_TOKENS = 500  # of an answer in a chat
AGAIN = 3  # seconds after which a page of a running run is loaded anew
PAIRED = "differences paired by item are shown by `spunge view --pair`, and by `spunge compare`: they read the rows"


class Refused(Exception):  # noqa: N818 - an answer, no error
    """A request that is not answered as it was asked."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def list_page(root: Path, reader: Reader, asked: Mapping[str, str]) -> str:
    """The runs, filtered by words and by state."""
    words, state = asked.get("q", ""), asked.get("state", "")
    runs = list(reader.every(root))
    shown = [run for run in runs if _wanted(run, words.lower().split(), state)]
    running = any(run.state == "running" for run in shown)
    return _page(
        "list.html", root=root.name or str(root), runs=shown, count=len(runs), q=words, state=state, running=running
    )


def _wanted(run: Listed, words: Sequence[str], state: str) -> bool:
    text = " ".join((run.name, run.model, run.made_by, run.said, run.state)).lower()
    return (not state or run.state == state) and all(word in text for word in words)


def run_page(run: Listed, reader: Reader, chat: bool = False) -> str:
    """One run: how far it is, what its numbers say, its files."""
    table = said = ""
    if not run.wrong and (run.folder / "results.json").exists():
        try:
            results = reader.results(run.folder)
            table, said = results_text(results), report_text(results)
        except RecipeError:
            pass  # it changed since; `wrong` says so the next time
    files = [name for name in FILES if (run.folder / name).is_file() and not (run.folder / name).is_symlink()]
    return _page(
        "run.html",
        run=run,
        progress=progress_of(run.folder),
        table=table,
        said=said,
        files=files,
        page=REPORT,
        chat=chat_address(run.name) if chat else "",
    )


def compare_page(folders: Sequence[Path], stage: str, pair: bool = False) -> str:
    """Runs beside each other. pair: by item too, for which the first run's recipe is followed to its rows.

    Raises RecipeError where they are not comparable.
    """
    compared = compare(folders, stage or "merged")
    if not pair:
        return comparison_page(compared._replace(remarks=(PAIRED,)))
    from spunge.run.pairing import with_pairs

    return comparison_page(with_pairs(compared))


def chat_page(
    name: str, secret: str, finished: Sequence[str], chosen: Sequence[str], asked: Any = None
) -> tuple[str, str]:
    """The page of a chat, cut where the answers come; asked: the question that is answered there."""
    cut = secrets.token_hex(16)
    told = {"run": name, "finished": finished, "chosen": chosen, "asked": asked, "most": MOST_TOKENS, "cut": cut}
    told["prompt"] = plain(asked.prompt) if asked else ""
    page = _template("chat.html").render(secret=secret, address=address, chat_address=chat_address, **told)
    before, _, after = page.partition(f"{cut}\n")
    return before, after


def told_page(heading: str, message: str) -> str:
    """Why there is nothing else to see."""
    return _page("told.html", heading=heading, message=message)


def _page(file: str, **values: Any) -> str:
    return redacted(_template(file).render(again=AGAIN, address=address, ago=ago, clock=clock, **values))


@cache
def _template(file: str) -> Template:
    return environment().from_string(resources.files("spunge.view").joinpath(file).read_text("utf-8"))


def address(run: str, file: str = "") -> str:
    """Where a run's page, or a file of it, is."""
    return f"/runs/{quote(run)}/{quote(file)}"


def chat_address(run: str) -> str:
    return f"/chat/{quote(run)}/"


def ago(when: float) -> str:
    """`3 min ago`."""
    seconds = max(0.0, time.time() - when)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def plain(text: str) -> str:
    """A file's text without what a browser or a terminal would obey."""
    return printable(text, keep="\n\t")
