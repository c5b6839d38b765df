"""A run's model as one file for other programs."""

from pathlib import Path
from typing import NamedTuple

from spunge.errors import RecipeError, one_line
from spunge.run.models import Model
from spunge.run.stages.building import build
from spunge.run.status import run_recipe
from spunge.weights.gguf_model import TYPES, opened, write_gguf
from spunge.weights.gguf_model import Model as Opened


class Exported(NamedTuple):
    """The file, the type of its values and what it takes, in bytes."""

    file: Path
    type: str
    bytes: int


def export_gguf(
    folder: str | Path, file: str | Path | None = None, stage: str = "merged", kind: str = "auto"
) -> Exported:
    """Write a run's model as a GGUF file; without `file`, in this folder, by the run's name, the model's and the type.

    Raises RecipeError where there is no such finished model, where the file is there, and for a model that is not written.
    """
    if kind not in TYPES:
        raise RecipeError(one_line(f"--type: {kind!r} is none of {', '.join(TYPES)}"))
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RecipeError("--gguf: needs the package gguf; pip install 'spunge[gguf]'") from None
    folder = Path(folder).resolve()
    recipe = run_recipe(folder)
    if recipe.decode is not None:
        raise RecipeError(
            "--gguf: the run unlearned while a larger model decodes, which a GGUF file cannot hold; leave --gguf out"
        )
    run = build(recipe, folder)
    models = {model.name: model for model in run.seeds[0].models}
    done = [name for name in models if name in run.graph.stages and run.graph.state(name).done]
    if stage not in done:
        what = "is not finished" if stage in models else "is no model of this run"
        raise RecipeError(one_line(f"--stage: {stage!r} {what}; finished are {', '.join(done) or 'none'}"))
    model = _opened(models[stage], run.base.folder)
    own = model.kind if kind == "auto" else kind
    name = f"{folder.name}-{stage.replace(':', '-').replace('/', '-')}"
    target = Path(file or f"{name}-{own}.gguf")
    if target.exists():
        raise RecipeError(one_line(f"--out: {str(target)!r} is there; give another, or remove it"))
    write_gguf(target, model, own, name)
    return Exported(target, own, target.stat().st_size)


def _opened(model: Model, base: Path) -> Opened:
    """The model of a stage. What has no files of its own is laid together in memory, as judging does."""
    if model.name == "base":
        return opened(base, {})
    if (own := model.by_itself or model.folder) is not None:
        return opened(own, {})
    return opened(base, dict(model.values(base)))
