"""Commands on finished runs: report one, compare several."""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, print_scores, quiet, say, tell
from spunge.errors import RecipeError

if TYPE_CHECKING:
    from spunge.results import Results


class Form(str, Enum):
    """What a report is given as."""

    html = "html"
    md = "md"
    csv = "csv"
    json = "json"
    png = "png"


def report(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    form: Annotated[
        Form | None,
        typer.Option(
            "--format",
            help="csv: a line a score, for pandas or a spreadsheet; md: Markdown; json: results.json; html: where the page is; "
            "png: the page as a picture beside it, drawn by a Chromium that is installed.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a run's scores and what they say; write its page anew.

    The page is RUN/report.html. A paper's figures that the recipe names stand beside the run's own.
    """
    from spunge.report.export import csv_text, markdown_text
    from spunge.report.picture import HIGHEST, picture
    from spunge.results import FILE, read_results, run_folder
    from spunge.run.texts import write_page_anew

    if os.path.isfile(folder) and run_folder(folder) == Path(folder):
        raise RecipeError(
            f"report: {folder!r} is not a run's {FILE}, and the page would be another's; give a run's folder"
        )
    _tell_doubts([folder])
    results = read_results(folder)
    page = write_page_anew(results.folder)
    if as_json or form is Form.json:
        print_json(results.content)
    elif form is Form.png:
        drawn = page.with_suffix(".png")
        height = picture(page, drawn)
        if height > HIGHEST:
            tell(
                f"note: the page is {height} pixels high; the picture has all of it, at {HIGHEST / height:.0%} of its size"
            )
        say(near(drawn))
    elif form is Form.html:
        say(near(page))
    elif form is not None:
        say((csv_text if form is Form.csv else markdown_text)(results).rstrip("\n"))
    else:
        _print_report(results, page)


def _print_report(results: "Results", page: Path) -> None:
    """The table, what the numbers say, and where the page is."""
    from spunge.report.text import report_text

    print_scores(results)
    say(f"\n{report_text(results)}\nreport: {near(page)}")


class Table(str, Enum):
    """What a comparison is printed as."""

    csv = "csv"


def compare(
    folders: Annotated[list[str], typer.Argument(metavar="RUN RUN [...]", help="Two or more runs' folders.")],
    stage: Annotated[
        str, typer.Option("--stage", help="base, merged, branch:SLUG or control:NAME. Default: merged.")
    ] = "merged",
    html: Annotated[
        str, typer.Option("--html", help="Write the comparison to this file too, as a page that opens offline.")
    ] = "",
    form: Annotated[
        Table | None, typer.Option("--format", help="csv: a line a score, for pandas or a spreadsheet.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set several runs' scores beside each other.

    With the base's, differences paired by item, what differs between the recipes, and which models no other one beats. Refused
    where the base, scorers, thresholds or items differ.
    """
    from spunge.report.compared import comparison_csv, comparison_text, write_comparison
    from spunge.report.comparison import compare as compare_runs

    _tell_doubts(folders)
    comparison = compare_runs([Path(folder) for folder in folders], stage)
    with loading():
        from spunge.run.pairing import with_pairs

    quiet()
    comparison = with_pairs(comparison)
    if html:
        write_comparison(comparison, Path(html))
    if as_json:
        print_json(comparison.to_json())
    elif form is not None:
        say(comparison_csv(comparison).rstrip("\n"))
    else:
        say(comparison_text(comparison).rstrip("\n"))
    if html:
        tell(f"page: {near(Path(html))}")


def _tell_doubts(folders: list[str]) -> None:
    """Say of results that are not of what lies in the run's folder now. Raises RecipeError where they are not as it wrote them."""
    from spunge.run.stamps import doubts

    for folder in folders:
        if told := doubts(folder):
            tell(f"warning: {folder}: {told}")
