"""What the models of a run answer to a prompt, one beside the other: base, controls, branches, merged."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spunge.errors import RecipeError, one_line
from spunge.evaluation.generation import GenerationSettings, streamed
from spunge.progress import SILENT
from spunge.run.models import Model
from spunge.run.session import Session
from spunge.run.stages.building import build
from spunge.run.status import run_recipe

USUAL = ("base", "control:joint", "merged")


class Asking:
    """The models of a run's folder that can be asked. Nothing is written."""

    def __init__(self, folder: str | Path, stages: Sequence[str] = ()) -> None:
        """stages: names of models, such as base, control:joint, branch:SLUG, merged; by default those of USUAL that are finished.
        Raises RecipeError where one is not there or not finished."""
        folder = Path(folder).resolve()
        run = build(run_recipe(folder), folder)
        self._every = {model.name: model for model in run.seeds[0].models}
        self.finished = [
            name
            for name, model in self._every.items()
            if name in run.graph.stages
            and run.graph.state(name).done
            and (model.expert is None or run.graph.state(model.expert.name).done)
        ]
        chosen = list(dict.fromkeys(stages)) or [name for name in USUAL if name in self.finished]
        self.models: list[Model] = [self.model(name) for name in chosen]
        if not chosen:
            raise RecipeError(f"{str(folder)!r} holds no finished model; give `spunge run` again to go on")
        self._session = Session(run.base, SILENT)

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    def model(self, name: str) -> Model:
        """Raises RecipeError where it is not there or not finished."""
        if name not in self.finished:
            what = "is not finished" if name in self._every else "is no model of this run"
            raise RecipeError(one_line(f"--stage: {name!r} {what}; finished are {', '.join(self.finished) or 'none'}"))
        return self._every[name]

    def answer(
        self, model: Model, prompt: str, settings: GenerationSettings, hear: Callable[[str], None] = lambda _: None
    ) -> str:
        """What a model writes after a prompt, told to `hear` piece by piece. `chat` holds where there is a chat template."""
        base = self._session.show(None if model.name == "base" else model)
        if settings.chat and not base.tokenizer.chat_template:
            settings = settings.model_copy(update={"chat": False})
        return streamed(base, prompt, settings, hear)

    def close(self) -> None:
        self._session.close()
