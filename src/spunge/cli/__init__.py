"""The `spunge` command: one function per subcommand. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 2 the recipe or the call is wrong (one line that names the setting, the value and the mend); 1 else.
Heavy imports are inside the functions, so that `spunge --help` is quick.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from spunge.errors import RecipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make an open-weight language model forget, part by part, and prove what was forgotten and what was kept.",
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or a shipped recipe's name (spunge list recipes).")
]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting: a.b=value. May be repeated.")]
OutOption = Annotated[str, typer.Option("--out", help="The run's folder. Default: runs/NAME, after the recipe.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def run(recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = "", as_json: JsonOption = False) -> None:  # noqa: B006
    """Split, unlearn each part, merge, judge and report. What the run's folder holds already is not done again."""
    with _loading():
        from spunge.progress import Terminal
        from spunge.recipe.loading import load_recipe
        from spunge.run.pipeline import default_folder
        from spunge.run.pipeline import run as run_recipe

    watcher = Terminal()
    _quiet()
    try:
        results = run_recipe(load_recipe(recipe, overrides), out or default_folder(recipe), watcher)
    finally:
        watcher.close()
    if as_json:
        _print_json(results.content)
        return
    _print_scores(results.content)
    typer.echo(f"\nmodel:  {_near(results.folder / 'merged')}\nreport: {_near(results.folder / 'report.html')}")


@app.command()
def plan(recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = "", as_json: JsonOption = False) -> None:  # noqa: B006
    """Say what a run would do, what is done already, and about how much memory, disk and time it takes. Loads no weights."""
    from spunge.recipe.loading import load_recipe
    from spunge.run.pipeline import default_folder
    from spunge.run.plan import plan as plan_recipe
    from spunge.run.plan import plan_text

    _quiet()
    planned = plan_recipe(load_recipe(recipe, overrides), out or default_folder(recipe))
    if as_json:
        _print_json(planned.to_json())
    else:
        typer.echo(plan_text(planned))


@app.command()
def split(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
    """Show the parts with their sizes, and which rows were dropped and why. Trains nothing and writes nothing."""
    from spunge.data.selection import select_retain, split_content
    from spunge.data.split import split_rows
    from spunge.recipe.loading import load_recipe
    from spunge.report.wording import aligned, name, shortened

    _quiet()
    loaded = load_recipe(recipe, overrides)
    parts = split_rows(loaded)
    content = split_content(parts, select_retain(loaded, parts))
    if as_json:
        _print_json(content)
        return
    lines = [["part", "rows", "empty", "selected", "folder"]]
    for part in parts.parts:
        sizes = [str(part.rows), str(part.empty), str(len(part.samples))]
        lines.append([shortened(name(part.value), 60), *sizes, part.slug])
    typer.echo(aligned(lines))
    typer.echo(f"{parts.total} rows read; {parts.filtered} left out by forget.where; {parts.unassigned} in no part")
    for value, reason in parts.dropped.items():
        typer.echo(f"dropped {shortened(name(value), 60)}: {reason}")
    for note in content["notes"]:
        typer.echo(f"note: {note}")


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")], as_json: JsonOption = False
) -> None:
    """Write RUN/report.html anew; print the scores, what they say, and the paper's figures beside the run's own."""
    from spunge.report.comparison import results_of
    from spunge.report.page import write_page
    from spunge.report.text import report_text

    results = results_of(Path(folder))
    page = write_page(Path(folder))
    if as_json:
        _print_json(results)
        return
    _print_scores(results)
    typer.echo(f"\n{report_text(results)}\nreport: {_near(page)}")


@app.command()
def compare(
    folders: Annotated[list[str], typer.Argument(metavar="RUN RUN [...]", help="Two or more runs' folders.")],
    stage: Annotated[
        str, typer.Option("--stage", help="base, merged, branch:SLUG or control:NAME. Default: merged.")
    ] = "merged",
    as_json: JsonOption = False,
) -> None:
    """Set several runs' scores beside each other. Refused where scorers, thresholds or items differ."""
    from spunge.report.comparison import compare as compare_runs

    found = compare_runs([Path(folder) for folder in folders], stage)
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo(found.text(), nl=False)


@app.command()
def probe(
    model: Annotated[str, typer.Option("--model", help="Whose hidden states are read: a folder or Hub id.")],
    rows: Annotated[str, typer.Option("--rows", help="Labelled rows: a file, a folder or a glob.")],
    label: Annotated[str, typer.Option("--label", help="SQL condition, true for what is to be scored high.")],
    out: Annotated[str, typer.Option("--out", help="The folder to write; name it as an evaluation's scorer.")],
    text: Annotated[str, typer.Option("--text", help="Column or SQL expression: the text.")] = "text",
    where: Annotated[str | None, typer.Option("--where", help="SQL condition that a row must meet.")] = None,
    forget: Annotated[str, typer.Option("--forget", help="A recipe, whose forget and retain rows are refused.")] = "",
    block: Annotated[list[int], typer.Option("--block", help="Block to read. Repeat. Default: at 0.4 and 2/3.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many rows, drawn at random.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens of a text; longer ones are cut.")] = 128,
    as_json: JsonOption = False,
) -> None:
    """Train a scorer of your own on labelled rows: logistic regression on a frozen model's hidden states."""
    with _loading():
        from spunge.evaluation.scorers.training import train_probe

    _quiet()
    found = train_probe(
        model,
        rows,
        text,
        label,
        out,
        where=where,
        blocks=block or None,
        limit=limit,
        max_length=max_length,
        forget=forget or None,
    )
    if as_json:
        _print_json(found.description)
        return
    told = found.description
    typer.echo(f"{told['rows']} rows, {told['positive']} of them positive; blocks {told['blocks']}")
    typer.echo(f"AUROC {told['auroc']:.3f} out of fold ({told['folds']} folds)\nscorer: {_near(found.folder)}")


@app.command()
def merge(
    out: Annotated[str, typer.Option("--out", help="The folder to write.")],
    base: Annotated[str, typer.Option("--base", help="The model the others were made from: a folder or Hub id.")] = "",
    model: Annotated[
        list[str], typer.Option("--model", help="A delta, checkpoint or LoRA adapter: a folder or Hub id. Repeat.")
    ] = [],  # noqa: B006
    weight: Annotated[list[float], typer.Option("--weight", help="One per model, in their order. Default: 1.")] = [],  # noqa: B006
    rule: Annotated[str, typer.Option("--rule", help="Merge rule (spunge list rules). Default: ties.")] = "",
    density: Annotated[float | None, typer.Option("--density", help="Share of entries kept per model.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="λ: the merged change is multiplied by this.")] = None,
    scope: Annotated[str, typer.Option("--scope", help="What the density counts over: changed, model or tensor.")] = "",
    settings: Annotated[list[str], typer.Option("--set", help="Another setting of the rule: name=value. Repeat.")] = [],  # noqa: B006
    mergekit: Annotated[str, typer.Option("--mergekit", help="A mergekit configuration, in place of the above.")] = "",
    as_adapter: Annotated[int | None, typer.Option("--as-adapter", help="Write a LoRA adapter of this rank.")] = None,
    as_delta: Annotated[
        bool, typer.Option("--as-delta", help="Write a sparse delta, which is exact and small.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge deltas, checkpoints and LoRA adapters into a base. An interrupted merge goes on where it stopped."""
    with _loading():
        from spunge.merging.command import merge_command, parsed_settings, summary

    given = {"density": density, "scale": scale, "scope": scope or None}
    merged = merge_command(
        Path(out),
        base or None,
        model,
        rule=rule or None,
        settings={key: value for key, value in given.items() if value is not None} | parsed_settings(settings),
        weights=weight or None,
        mergekit=Path(mergekit) if mergekit else None,
        as_adapter=as_adapter,
        as_delta=as_delta,
        progress=_percent if sys.stderr.isatty() else None,
    )
    if as_json:
        _print_json(merged.to_json())
        return
    typer.echo("\n".join([*summary(merged), _near(merged.out)]))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, rules, evaluators or recipes. Default: all of them.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the unlearning methods, merge rules and evaluators with their settings, and the shipped recipes."""
    from spunge.cli.listing import KINDS, listing, listing_text
    from spunge.errors import suggestion

    if what and what not in KINDS:
        raise RecipeError(f"list: nothing called {what!r}{suggestion(what, KINDS)}")
    found = {kind: listing(kind) for kind in ([what] if what else KINDS)}
    if as_json:
        _print_json(found)
    else:
        typer.echo(listing_text(found))


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name (spunge list recipes).")] = "demo",
    folder: Annotated[str, typer.Option("--to", help="Where to copy it.")] = ".",
) -> None:
    """Copy a shipped recipe, with its data, for you to edit."""
    from spunge.errors import suggestion
    from spunge.recipe.loading import shipped_recipes

    shipped = {file.stem: file for file in shipped_recipes()}
    if name not in shipped:
        raise RecipeError(f"init: no shipped recipe {name!r}{suggestion(name, shipped)}")
    target = Path(folder) / f"{name}.yaml"
    data = shipped[name].with_suffix("")
    for place in (target, target.with_suffix("")):
        if place.exists() and (place == target or data.is_dir()):
            raise RecipeError(f"init: {str(place)!r} exists already; give another folder with --to")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped[name], target)
        if data.is_dir():
            shutil.copytree(data, target.with_suffix(""), ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise RecipeError(
            f"init: cannot write {str(target)!r} ({error.strerror}); give another folder with --to"
        ) from error
    typer.echo(str(target))


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Print versions and devices, for bug reports."""
    from spunge.cli.listing import environment

    found = environment()
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(f"{name:16} {value}" for name, value in found.items()))


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    typer.echo(metadata.version("spunge"))


def main() -> None:
    """Run the command and turn what went wrong into an exit code."""
    try:
        app(standalone_mode=False)
    except RecipeError as error:
        _fail(str(error), 2)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; the same command goes on from the last finished stage", 1)
    except Exception as error:
        # click's own errors about the call, such as an unknown option, carry an exit code and a message.
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        if os.environ.get("SPUNGE_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (SPUNGE_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"spunge: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _percent(done: int, total: int) -> None:
    """A counter on stderr that overwrites itself."""
    typer.echo(f"\rmerging {done / max(1, total):4.0%}" + ("\n" if done == total else ""), err=True, nl=False)


@contextmanager
def _loading() -> Iterator[None]:
    """Import large libraries without the garbage collector, which finds nothing in them and costs up to a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _quiet() -> None:
    """Keep other libraries' progress bars and advice off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_scores(results: Mapping[str, Any]) -> None:
    """As wide as the terminal allows; whole and plain where the output is none."""
    from spunge.report.table import results_table, results_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(results_table(results))
    else:
        typer.echo(results_text(results))


def _near(path: Path) -> str:
    """A path as a person would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
