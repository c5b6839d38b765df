"""Commands on judging: judge models as they are, train a scorer of your own."""

from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, print_scores, quiet, say


def judge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [...]", help="Folders or Hub ids of checkpoints, adapters or deltas.")
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", help="A recipe, whose evaluations, rows and parts are taken.")
    ] = "",
    evaluate: Annotated[
        list[str],
        typer.Option(
            "--evaluate", help="An evaluation, such as '{kind: perplexity, source: rows.jsonl}'. May be repeated."
        ),
    ] = [],  # noqa: B006
    base: Annotated[
        str, typer.Option("--base", help="What the others are compared with. Default: the first, or an adapter's own.")
    ] = "",
    overrides: Annotated[
        list[str], typer.Option("--set", help="Override a setting of the recipe: a.b=value. May be repeated.")
    ] = [],  # noqa: B006
    out: Annotated[
        str, typer.Option("--out", help="The run's folder. Default: runs/judge-NAME, after the model.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Judge models as they are, side by side. Nothing is trained.

    The same stages, files and page as a run has, without branches. What the folder holds already is not done again.
    """
    with loading():
        from spunge.progress import Terminal
        from spunge.recipe.loading import read_block
        from spunge.run.judgement import default_folder, judging_recipe
        from spunge.run.pipeline import run as run_recipe

    watcher = Terminal()
    quiet()
    try:
        blocks = [read_block(text, "--evaluate") for text in evaluate]
        chosen = judging_recipe(models, recipe or None, blocks, base or None, overrides)
        results = run_recipe(chosen, out or default_folder(models), watcher)
    finally:
        watcher.close()
    if as_json:
        print_json(results.content)
        return
    print_scores(results)
    say("")
    for name, path in [
        ("base", chosen.model.path),
        *((f"model:{each.name}", each.path) for each in chosen.judge or ()),
    ]:
        say(f"{name}: {path}")
    say(f"report: {near(results.folder / 'report.html')}")


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
    """Train a scorer of your own on labelled rows.

    It is a logistic regression on a frozen model's hidden states.
    """
    with loading():
        from spunge.evaluation.scorers.training import train_probe

    quiet()
    trained = train_probe(
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
        print_json(trained.description)
        return
    told = trained.description
    say(f"{told['rows']} rows, {told['positive']} of them positive; blocks {told['blocks']}")
    say(f"AUROC {told['auroc']:.3f} out of fold ({told['folds']} folds)\nscorer: {near(trained.folder)}")
