"""`spunge run MODEL --forget ROWS`: a model and rows in place of a recipe, which is then proposed and written to be edited."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from spunge.cli.terminal import tell
from spunge.errors import RecipeError, suggestion

if TYPE_CHECKING:
    from spunge.recipe.schema import Recipe
    from spunge.run.proposal import Asked

RECIPES = (".yaml", ".yml")
ForgetOption = Annotated[
    str,
    typer.Option(
        "--forget",
        metavar="ROWS",
        help="Rows to forget, in place of a recipe: a file, a folder, a glob, neutral, or {hub: ID}. MODEL is then a model.",
    ),
]
RetainOption = Annotated[
    str, typer.Option("--retain", metavar="ROWS", help="With --forget: rows to keep behaving on. Default: neutral.")
]
TextOption = Annotated[str, typer.Option("--text", metavar="COLUMN", help="With --forget: the column of plain texts.")]
PromptOption = Annotated[str, typer.Option("--prompt", metavar="COLUMN", help="With --forget: of questions.")]
CompletionOption = Annotated[str, typer.Option("--completion", metavar="COLUMN", help="With --forget: of answers.")]
MessagesOption = Annotated[str, typer.Option("--messages", metavar="COLUMN", help="With --forget: of conversations.")]
ByOption = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="COLUMN",
        help="With --forget: the column that names the parts, {clusters: 4} or the like, or none.",
    ),
]
WhereOption = Annotated[str, typer.Option("--where", metavar="SQL", help="With --forget: which rows.")]
MethodOption = Annotated[str, typer.Option("--method", help="With --forget: the unlearning method. Default: npo.")]
EpochsOption = Annotated[
    float,
    typer.Option(
        "--epochs",
        min=0,
        show_default=False,
        help="With --forget: passes over each part's rows. Default: 1 to 10, for about 50 steps.",
    ),
]
StepsOption = Annotated[
    int,
    typer.Option(
        "--steps", min=0, show_default=False, help="With --forget: training steps of each part, in place of --epochs."
    ),
]
ControlOption = Annotated[
    list[str],
    typer.Option("--control", help="With --forget: joint, random, sequential, a rule, or none. May be repeated."),
]


class Line(NamedTuple):
    """What the options say."""

    forget: str
    retain: str = ""
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: str = ""
    by: str = ""
    where: str = ""
    method: str = ""
    epochs: float = 0.0
    steps: int = 0
    control: Sequence[str] = ()


class Written(NamedTuple):
    """The recipe of a line, and its file."""

    recipe: "Recipe"
    file: Path
    folder: Path  # of the run


def means_model(target: str, line: Line) -> bool:
    """Whether the call names a model, with --forget, in place of a recipe. Raises RecipeError where that is open."""
    from spunge.recipe.loading import shipped_recipes

    given = [name for name, value in line._asdict().items() if value]
    folder = os.path.isdir(os.path.expanduser(target))
    names = {file.stem for file in shipped_recipes()}
    shipped = target in names
    if not line.forget:
        if given:
            raise RecipeError(
                f"--{given[0]}: goes with --forget ROWS; what a recipe says is changed by --set a.b=value"
            )
        if folder and not shipped:
            raise RecipeError(f"recipe: {target!r} is a folder; to unlearn with the model in it, give --forget ROWS")
        if not (shipped or os.path.isfile(os.path.expanduser(target)) or target.lower().endswith(RECIPES)):
            near = suggestion(target, names)
            meant = near if near.startswith("; did") else "; of a model give --forget ROWS too"
            raise RecipeError(f"recipe: no file {target!r}, nor a shipped recipe of that name{meant}")
        return False
    if folder and shipped:
        raise RecipeError(f"model: {target!r} is a shipped recipe and a folder here; for the folder write ./{target}")
    if shipped or target.lower().endswith(RECIPES):
        raise RecipeError(
            f"--forget: {target!r} is a recipe, which says what is forgotten; leave --forget out, or give a model"
        )
    return True


def asked_of(target: str, line: Line, overrides: Sequence[str]) -> "Asked":
    """What the options say, as a proposal is told it."""
    from spunge.run.proposal import Asked

    said = line._asdict()
    return Asked(
        model=target,
        forget=_block(line.forget, "--forget"),
        texts={role: said[role] for role in ("text", "prompt", "completion", "messages") if said[role]},
        where=line.where or None,
        by=_block(line.by, "--by") or None,
        retain=_block(line.retain, "--retain") or None,
        length={name: said[name] for name in ("epochs", "steps") if said[name]},
        controls=[name for name in line.control if name != "none"] if line.control else None,
        overrides=overrides,
        **({"method": line.method} if line.method else {}),
    )


def written(target: str, line: Line, overrides: Sequence[str], out: str = "", to: str = ".") -> Written:
    """Propose a recipe for the line, write it into the folder `to`, and say what was guessed.

    It is named after the run's folder, so that `spunge run NAME.yaml` goes on with that run.
    """
    from spunge.recipe.loading import read_draft
    from spunge.recipe.remarked import remarked, write_remarked
    from spunge.run.folder import require_own
    from spunge.run.proposal import propose

    folder = Path(out or Path("runs") / _name(target, line.forget))
    require_own(folder.resolve())
    proposal = propose(asked_of(target, line, overrides))
    # Elsewhere the paths in it, which are relative to here, would be others.
    content = proposal.content if Path(to).resolve() == Path.cwd() else read_draft(proposal.content).content
    file = Path(to) / f"{folder.resolve().name}.yaml"
    usual = folder == Path("runs") / file.stem
    again = shlex.join(["spunge", "run", str(file), *([] if usual else ["--out", str(folder)])])
    title = f"Proposed by spunge for {target}. Edit it, and run it:\n  {again}"
    write_remarked(file, remarked(content, proposal.remarks, title), "--to" if to != "." else "--out")
    for told in proposal.said:
        tell(told)
    tell(f"recipe: {file} (edit it, and run it by: {again})")
    return Written(proposal.recipe, file, folder)


def _block(value: str, option: str) -> Any:
    """A text, or what {..} or [..] says as YAML."""
    from spunge.recipe.loading import read_block

    return read_block(value, option) if value.lstrip().startswith("{") else value


def _name(model: str, forget: str) -> str:
    """After the model and the rows: smollm2-135m-bad."""
    stems = (Path(re.split(r"[@:]", model)[0].rstrip("/")).name, Path(forget.rstrip("/}")).name.partition(".")[0])
    plain = (re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-._") for stem in stems)
    return "-".join(part[:40] for part in plain if part) or "run"
