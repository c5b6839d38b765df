"""Commands on a recipe: run it, say what a run would do, show its parts."""

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
from spunge.cli.terminal import (
    JsonOption,
    SetOption,
    loading,
    near,
    print_json,
    print_scores,
    quiet,
    say,
    tell_carried,
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or a shipped recipe's name (spunge list recipes).")
]
OutOption = Annotated[str, typer.Option("--out", help="The run's folder. Default: runs/NAME, after the recipe.")]


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]
RunsArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a search's.")]


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe's YAML file, or a shipped one's name (spunge list recipes); with --forget, a model's folder or Hub id.",
        ),
    ],
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
    out: OutOption = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Make finished trainings in that folder again that no longer fit.")
    ] = False,
    others: Annotated[
        list[str],
        typer.Option(
            "--from", help="A run's folder: what it holds that would be made alike is taken. May be repeated."
        ),
    ] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Split, unlearn each part, merge, judge and report. What the run's folder holds already is not done again.

    Without a recipe: spunge run MODEL --forget bad.csv --retain good.csv. What is not said is guessed, the guess is told, and the
    recipe is written for you to edit.
    """
    with loading():
        from spunge.progress import Terminal
        from spunge.recipe.loading import load_recipe
        from spunge.report.text import short_text
        from spunge.run.folder import default_folder
        from spunge.run.pipeline import run as run_recipe

    watcher = Terminal()
    quiet()
    line = Line(forget, retain, text, prompt, completion, messages, by, where, method, epochs, steps, control)
    if means_model(recipe, line):
        proposed = written(recipe, line, overrides, out)
        loaded, folder = proposed.recipe, proposed.folder
    else:
        loaded, folder = load_recipe(recipe, overrides), Path(out or default_folder(recipe))
        tell_carried(recipe, overrides)
    try:
        results = run_recipe(loaded, folder, watcher, replace, others)
    finally:
        watcher.close()
    if as_json:
        print_json(results.content)
        return
    print_scores(results)
    say(f"\n{short_text(results)}")
    if loaded.decode is None:
        say(f"model:  {near(results.folder / 'merged')}")
    else:
        shown = near(results.folder)
        say(f"model:  the large one, shifted: `spunge export {shown} --out FOLDER` writes what was judged")
    say(f"report: {near(results.folder / 'report.html')}")


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    out: OutOption = "",
    device: Annotated[
        str, typer.Option("--device", help="auto: the one at hand. cpu, or a card such as h100, a100-40, rtx4090.")
    ] = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Take a few steps on the real model, and scale what is planned by them.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Plan what does not fit into the device's memory too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would do and about what it would take.

    What is done already is told; memory, disk and time are estimates, from shapes alone. What does not fit into the device's
    memory is refused, with the setting that would make it fit. Loads no weights without --measure.
    """
    from spunge.errors import RecipeError
    from spunge.recipe.loading import load_recipe
    from spunge.run.folder import default_folder
    from spunge.run.plan import plan as plan_recipe
    from spunge.run.plan import plan_text

    quiet()
    loaded = load_recipe(recipe, overrides)
    tell_carried(recipe, overrides)
    planned = plan_recipe(loaded, out or default_folder(recipe), device, measure)
    if planned.refused and not anyway:
        raise RecipeError(planned.refused[0])
    if as_json:
        print_json(planned.to_json())
    else:
        say(plan_text(planned))


def status(folder: RunArgument, as_json: JsonOption = False) -> None:
    """Say of each stage of a run whether it is done.

    Or stale (and which input changed), damaged or missing; with its time and size.
    """
    from spunge.report.wording import aligned
    from spunge.run.status import status as status_of
    from spunge.run.status import status_rows

    quiet()
    stages = status_of(folder)
    if as_json:
        print_json([stage.to_json() for stage in stages])
    else:
        say(aligned([["state", "stage", "time", "size", "why"], *status_rows(stages)]).rstrip("\n"))


def verify(folder: RunsArgument, as_json: JsonOption = False) -> None:
    """Check a run's files and its merged model.

    Every file against its checksum; the merged model against base + merge of the stored deltas. Exits 1 where something is
    not as the run wrote it.
    """
    with loading():
        from spunge.files import shown_size
        from spunge.progress import Terminal
        from spunge.run.verify import verify as verify_run

    quiet()
    watcher = Terminal()
    try:
        checked = verify_run(folder, watcher)
    finally:
        watcher.close()
    if as_json:
        print_json(checked.to_json())
    else:
        for line in checked.problems:
            say(line)
        for line in checked.notes:
            say(f"note: {line}")
        say(
            f"{checked.stages} stages, {checked.files} files ({shown_size(checked.nbytes)}), {checked.tensors} tensors of merged "
            f"models: {'whole' if not checked.problems else f'{len(checked.problems)} problems'}"
        )
    if checked.problems:
        raise typer.Exit(1)


def clean(
    folder: RunsArgument,
    texts: Annotated[
        bool, typer.Option("--texts", help="Prompts and completions of the run, and the cache's copies of its rows.")
    ] = False,
    taught: Annotated[
        bool, typer.Option("--taught", help="The cache's copies of the models that the run taught; the run's own stay.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what a finished run keeps beside its results.

    With --texts prompts and completions, here and in the shared cache; with --taught the cache's taught models. Scores and models
    of the run stay.
    """
    from spunge.errors import RecipeError

    if not texts and not taught:
        raise RecipeError("clean: nothing to remove is named; give --texts or --taught")
    from spunge.files import shown_size
    from spunge.run.teach import clean_taught
    from spunge.run.texts import clean_texts

    quiet()
    models = {"folder": folder, "models": clean_taught(folder)} if taught else {}
    removed = clean_texts(folder) if texts else None
    if as_json:
        print_json({**models, **(removed.to_json() if removed else {})})
        return
    if models:
        say(f"removed {models['models']} taught models from the cache")
    if removed:
        say(
            f"removed {removed.files} files with texts ({shown_size(removed.nbytes)}), those of {removed.cached} judgings of the "
            f"base in the cache, and {removed.tables} copies of rows in the cache"
        )


def split(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    show: Annotated[
        int, typer.Option("--show", min=0, help="Show so many samples of each part as the model is given them.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show the parts and what of their rows is learned.

    With sizes, and which rows were dropped and why. Writes nothing.
    """
    from spunge.data.selection import select_decoupled, select_lesson, select_retain, split_content
    from spunge.data.split import split_rows
    from spunge.recipe.loading import load_recipe
    from spunge.report.wording import aligned, name, shortened

    quiet()
    loaded = load_recipe(recipe, overrides)
    parts = split_rows(loaded)
    retain = select_retain(loaded, parts)
    lesson = select_lesson(loaded)
    content = split_content(parts, retain, lesson, decoupled=select_decoupled(loaded, parts))
    samples = []
    if show:
        from spunge.cli.samples import print_samples, samples_of

        samples = samples_of(loaded, parts, retain, lesson, show)
    if as_json:
        extra = {"samples": [sample.to_json() for sample in samples]} if show else {}
        print_json({**content, "form": parts.parts[0].samples.form, **extra})
        return
    lines = [["part", "rows", "empty", "selected", "folder"]]
    for part in parts.parts:
        sizes = [str(part.rows), str(part.empty), str(len(part.samples))]
        lines.append([shortened(name(part.value), 60), *sizes, part.slug])
    say(aligned(lines))
    say(f"{parts.total} rows read; {parts.filtered} left out by forget.where; {parts.unassigned} in no part")
    for value, reason in parts.dropped.items():
        say(f"dropped {shortened(name(value), 60)}: {reason}")
    if lesson is not None:
        say(f"taught before: {len(lesson.samples)} rows")
    for note in content["notes"]:
        say(f"note: {note}")
    say(f"rows: {parts.parts[0].samples.form}")
    if show:
        print_samples(samples)
