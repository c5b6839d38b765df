"""Which stages a recipe asks for: the graph of a run, for every seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spunge.data.selection import split_content
from spunge.files import fingerprint, write_json, write_text
from spunge.recipe.loading import dump_recipe
from spunge.recipe.schema import Recipe
from spunge.results import SUBJECTS
from spunge.run.folder import identity
from spunge.run.graph import Graph, Made, Stage
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.judge import Judging, evaluation_folder
from spunge.run.models import Lineup, lineup
from spunge.run.outcome import write_report, write_scores
from spunge.run.session import Session
from spunge.run.stages.base import add_base
from spunge.run.stages.judging import add_judgings
from spunge.run.stages.models import add_base_calibration, add_calibrations, add_models
from spunge.run.stages.moments import add_moments
from spunge.run.stages.naming import RunGraph, inside, mark_of, titled
from spunge.run.stages.training import add_asking, add_trainings
from spunge.run.teach import TEACH
from spunge.run.train import asking_of


@dataclass(frozen=True)
class Run:
    """A recipe's stages in its folder. `base`, `seeds`: what they are made from; `judgings`: of each seed."""

    recipe: Recipe
    graph: RunGraph
    base: BaseInputs
    seeds: Sequence[Lineup]
    judgings: Sequence[Sequence[Judging]]
    written: bool  # whether the merged model becomes a checkpoint

    @property
    def makes_base(self) -> tuple[str, ...]:
        """The stages that make the files of the base."""
        return tuple(name for name in ("conversion", TEACH) if name in self.graph.stages)

    @property
    def asks(self) -> tuple[str, ...]:
        """The stages that ask others."""
        if self.recipe.unlearn is None:
            return ()
        pairs = ((mark_of(number, line), asking_of(line.inputs.unlearn)) for number, line in enumerate(self.seeds))
        return tuple(f"{mark}{asking.name}" for mark, asking in pairs if asking is not None)


def lineups(recipe: Recipe, folder: Path, written: bool = True) -> list[Lineup]:
    """What is trained and judged, for each seed: the first in RUN itself, the others in RUN/seeds/SEED. written: the merged model
    is."""
    base = BaseInputs(recipe, folder)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    recipes = [recipe, *(recipe.model_copy(update={"seed": seed, "seeds": 1}) for seed in seeds[1:])]
    folders = [folder, *(folder / "seeds" / str(seed) for seed in seeds[1:])]
    return [lineup(SeedInputs(each, base), own, written) for each, own in zip(recipes, folders, strict=True)]


def build(recipe: Recipe, folder: Path, written: bool = True) -> Run:
    """The graph of a recipe in its folder. Reads and splits the rows. Raises RecipeError where they are wrong. written: the merged
    model becomes a checkpoint."""
    graph: RunGraph = Graph(folder)
    seeds = lineups(recipe, folder, written)
    base = seeds[0].inputs.base
    for number, line in enumerate(seeds):
        add_asking(graph, line, mark_of(number, line))
    add_base(graph, seeds[0].inputs)
    judgings: list[list[Judging]] = []
    against = add_base_calibration(graph, seeds[0])
    for number, line in enumerate(seeds):
        mark = mark_of(number, line)
        _add_recipe(graph, line, mark)
        add_trainings(graph, line, mark)
        add_moments(graph, line, mark)
        add_calibrations(graph, line, mark, against)
        add_models(graph, line, mark)
        judgings.append(add_judgings(graph, line, mark, evaluation_folder(folder, "base")))
    made = [stage.name for stage in graph.stages.values() if stage.make is not None]
    about = recipe.model_dump(mode="json", include={"published", "evaluate", "aggregates"})
    graph.add(
        Stage(
            "results",
            "results",
            needs=tuple(made),
            inputs=lambda: {"recipe": fingerprint(about)},
            files=("results.json", SUBJECTS),
            make=lambda session: write_scores(recipe, graph, seeds, judgings, session.used),
            light=True,
            own=True,
        )
    )
    graph.add(
        Stage(
            "page",
            "page",
            needs=("results",),
            files=("report.html",),
            make=lambda session: write_report(folder),
            light=True,
            own=True,
        )
    )
    return Run(recipe, graph, base, seeds, judgings, written)


def _add_recipe(graph: RunGraph, line: Lineup, mark: str) -> None:
    """recipe.yaml and split.json, which say what the run is."""
    inputs = line.inputs
    text, split = (
        dump_recipe(inputs.recipe),
        split_content(inputs.parts, inputs.retained, inputs.base.lesson, inputs.reference, inputs.decoupled),
    )
    files = [line.folder / "recipe.yaml", line.folder / "split.json"]

    def write(session: Session) -> Made:
        write_text(files[0], text)
        write_json(files[1], split)
        return Made(files)

    graph.add(
        Stage(
            f"{mark}recipe",
            titled("recipe and split", mark),
            inputs=lambda: {**identity(line.inputs.recipe), "recipe": fingerprint(text), "split": fingerprint(split)},
            files=tuple(inside(graph, files)),
            make=write,
            light=True,
        )
    )
