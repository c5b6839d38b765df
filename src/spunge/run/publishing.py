"""A run's merged model, or a folder that `spunge merge` wrote, for the Hub: which files go there, and the sending of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, one_line, redacted
from spunge.report.card import base_name, run_card
from spunge.results import Results, read_results, results_json
from spunge.run.stages.building import build
from spunge.run.status import run_recipe

CARD = "README.md"
SCORES = "results.json"


@dataclass(frozen=True)
class Package:
    """What is to be sent. files: name in the repository -> its file here, or its content."""

    repository: str
    files: dict[str, Path | bytes]
    names: tuple[str, ...]  # of the parts, which stand in the card and in the scores

    @property
    def sizes(self) -> dict[str, int]:  # name in the repository -> bytes
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def package(folder: str | Path, repository: str, scores: bool = True) -> Package:
    """The files of a run's merged model, with a card that has its scores, and results.json without this machine's paths; of a
    folder that `spunge merge` wrote, all of it. Raises RecipeError where there is nothing whole to send."""
    folder = Path(folder).resolve()
    if (folder / "recipe.yaml").is_file():
        return _of_run(folder, repository, scores)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(
            f"{str(folder)!r} is no run's folder, and holds no model; give one that `spunge run` or `merge` wrote"
        )
    files: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): file for file in _inside(folder)}
    return Package(repository, files, ())


def _of_run(folder: Path, repository: str, scores: bool) -> Package:
    recipe = run_recipe(folder)
    if recipe.decode is not None:
        raise RecipeError(
            f"{str(folder)!r} unlearned while decoding, and a small model alone has not the scores of its run; `spunge export` "
            "writes all that a server needs"
        )
    run = build(recipe, folder)
    if "merged" not in run.graph.stages or not (state := run.graph.state("merged")).done:
        why = f" ({state.why or state.kind})" if "merged" in run.graph.stages else ""
        raise RecipeError(f"{str(folder)!r} holds no finished merged model{why}; give `spunge run` again to go on")
    results = read_results(folder)
    base = run.base.untaught if run.base.untaught.is_dir() else None
    merged = folder / "merged"
    files: dict[str, Path | bytes] = {file.relative_to(merged).as_posix(): file for file in _inside(merged)}
    files[CARD] = redacted(run_card(results, base, repository)).encode()
    if scores:
        files[SCORES] = results_json(without_paths(results, base)).encode()
    return Package(repository, files, tuple(part.value for part in results.parts))


def _inside(folder: Path) -> list[Path]:
    """Every file of a model's folder, those of this program's own bookkeeping left out."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def without_paths(results: Results, base: Path | None) -> Results:
    """Results for others to read: models by their Hub ids or the names of their folders."""
    models = tuple(
        replace(model, base=None if model.base is None else base_name(model, base if model.kind == "base" else None))
        for model in results.models
    )
    return replace(results, models=models)


def send(what: Package, public: bool) -> str:
    """Create the repository, private where it is new and not `public`, and add the files in one commit; its address.

    The Hub's token is huggingface_hub's own. Raises RecipeError where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api: Any = HfApi()
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in what.files.items()]
    try:
        api.create_repo(what.repository, private=not public, exist_ok=True)
        made = api.create_commit(what.repository, added, commit_message="Model unlearned and merged by spunge")
    except HFValidationError as error:
        raise RecipeError(one_line(f"REPO: {what.repository!r} is no name of a repository ({error})")) from None
    except LocalTokenNotFoundError:
        raise RecipeError("REPO: no token for the Hub; give `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise RecipeError("REPO: HF_HUB_OFFLINE is set; unset it to send") from None
    except HfHubHTTPError as error:
        raise RecipeError(one_line(f"REPO: the Hub refused {what.repository!r}: {error}")) from None
    except OSError as error:
        raise RecipeError(one_line(f"REPO: the Hub cannot be reached ({error})")) from None
    return str(made.commit_url)
