"""Read a recipe: from YAML, a shipped name or a mapping, with `a.b=c` overrides and with every path made absolute."""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from spunge.errors import RecipeError, redacted, suggestion
from spunge.recipe.block import Place
from spunge.recipe.explanation import validated
from spunge.recipe.named import Named
from spunge.recipe.ranges import ranges_in
from spunge.recipe.rows import NEUTRAL
from spunge.recipe.schema import Recipe
from spunge.recipe.spelling import read_yaml, write_yaml, yaml_fault, yaml_text
from spunge.recipe.split import spelled_out
from spunge.registry import ATTRIBUTES, EVALUATORS, METHODS, RULES, Registry


@dataclass(frozen=True)
class Draft:
    """A recipe's content before it is validated. `folder`: what relative paths in it are relative to."""

    content: dict[str, Any]
    folder: Path


def load_recipe(source: "str | Path | Mapping[str, Any]", overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, a shipped recipe's name, or a mapping, and apply `a.b=c` overrides.

    Relative paths in a file are relative to that file; in a mapping or an override, to the working directory. All are
    made absolute, and every default is filled in. Raises RecipeError with one line that names the setting.
    """
    draft = read_draft(source, overrides)
    try:
        return finished(draft)
    except RecipeError:
        if searched := ranges_in(draft.content):
            name = searched[0].name
            raise RecipeError(
                f"{name}: a range, which `spunge tune` searches; here give one value (--set {name}=..)"
            ) from None
        raise


def read_draft(source: "str | Path | Mapping[str, Any]", overrides: Iterable[str] = ()) -> Draft:
    """A recipe's content with overrides, its paths made absolute. Raises RecipeError for what is no mapping."""
    if isinstance(source, Mapping):
        content: Any = _copied(source)
        folder = Path.cwd()
    else:
        file = recipe_file(str(source))
        folder = file.parent.resolve()
        try:
            content = read_yaml(yaml_text(file))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise RecipeError(f"recipe: {str(file)!r} is not UTF-8 (line {line}); save it as UTF-8") from None
        except OSError as error:
            raise RecipeError(f"recipe: {str(file)!r} cannot be read ({error.strerror})") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: {str(file)!r} is not YAML ({yaml_fault(error)})") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"recipe: {str(source)!r} must be a mapping with model, forget and unlearn; see `spunge init demo`"
        )
    _anchor(content, folder)
    apply_overrides(content, overrides)
    _anchor(content, Path.cwd())
    return Draft(content, folder)


def finished(draft: Draft) -> Recipe:
    """The recipe of a draft, every default filled in. Raises RecipeError with one line that names the setting."""
    content = copy.deepcopy(draft.content)
    _anchor(content, draft.folder)  # what was put in place of a range may be a path
    _refuse_unwritable(content)
    return validated(Recipe, content)


def recipe_file(name: str) -> Path:
    """The file of a recipe given by path or by a shipped recipe's name."""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"recipe: no file {name!r}, nor a shipped recipe of that name{suggestion(name, shipped)}")


def shipped_recipes() -> list[Path]:
    return sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default filled in; it loads to an equal recipe, to be run here and told to nobody."""
    return write_yaml(recipe.model_dump(mode="json", exclude={"execution", "track"}), width=120)


def _copied(content: Mapping[str, Any]) -> Any:
    """A mapping as its file would be read."""
    try:
        return read_yaml(write_yaml(_plain(content)))
    except RecursionError:
        raise RecipeError("recipe: the mapping is nested too deeply, or holds itself") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: the mapping holds something that is no setting ({yaml_fault(error)})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_block(text: str, option: str) -> dict[str, Any]:
    """A block of settings that an option gives as YAML. Raises RecipeError."""
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{option}: {text!r} is not YAML ({yaml_fault(error)}); quote it") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{option}: {text!r} is no mapping, such as {{kind: perplexity, source: rows.jsonl}}")
    return content


def apply_overrides(content: Any, overrides: Iterable[str]) -> None:
    """Set what each `a.b=value` names in a mapping of mappings and lists; values are YAML. Raises RecipeError."""
    for override in overrides:
        path, value = _parse_override(override)
        _assign(content, path, value)


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set: {override!r} is not of the form a.b=value")
    try:
        steps = path.strip().split(".")
        return steps, read_yaml(text, spelled=steps[:2] == ["split", "values"])
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set: the value of {path!r} is not YAML: {text!r} ({yaml_fault(error)}); quote it"
        ) from None


def _assign(content: Any, path: list[str], value: Any) -> None:
    """Set content[path] = value; a number in the path is a list's index."""
    at, shown = content, "recipe"
    for step, following in zip(path, [*path[1:], None], strict=True):
        shown = f"{shown}.{step}"
        key: Any = step
        if isinstance(at, list):
            if not step.isdigit() or int(step) >= len(at):
                raise RecipeError(f"--set: {'.'.join(path)!r}: {step!r} is no index into a list of {len(at)}")
            key = int(step)
        elif not isinstance(at, dict):
            raise RecipeError(f"--set: {'.'.join(path)!r}: there are no settings below a plain value at {shown!r}")
        if following is None:
            at[key] = value
        else:
            if isinstance(at, dict) and at.get(key) is None:
                at[key] = {}
            at = at[key]


def _refuse_unwritable(content: dict[str, Any]) -> None:
    """Raises RecipeError for a token or key anywhere in a recipe, which stands in files of the run, and for numbers that JSON has
    no word for."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                waiting += [(name or "recipe", key), (f"{name}.{key}".lstrip("."), inner)]
        elif isinstance(value, list):
            waiting += [(f"{name}.{number}", inner) for number, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{name}: {value!r}: it should be a finite number")
        elif isinstance(value, str) and redacted(value) != value:
            raise RecipeError(
                f"{name}: holds a token or key, which the run would write into its files; leave it out: libraries read theirs "
                "from the environment, such as HF_TOKEN"
            )


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of files and folders in a recipe absolute."""
    model = content.get("model")
    if isinstance(model, str):
        content["model"] = model = {"path": model}
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = _absolute_model(model["path"], folder)
    if isinstance(content.get("decode"), str):
        content["decode"] = {"path": content["decode"]}
    judged = content.get("judge")
    for block in [content.get("reference"), content.get("decode"), *(judged if isinstance(judged, list) else [])]:
        if isinstance(block, dict) and isinstance(block.get("path"), str):
            block["path"] = _absolute_model(block["path"], folder)
    evaluate = content.get("evaluate")
    evaluations = evaluate if isinstance(evaluate, list) else []
    for block in [*(content.get(name) for name in ("teach", "forget", "retain", "decouple")), *evaluations]:
        _anchor_source(block, folder)
    if isinstance(evaluate, list):
        content["evaluate"] = [_anchored(block, EVALUATORS, "kind", folder) for block in evaluate]
    controls = content.get("controls")
    merges = [content, *(each for each in (controls if isinstance(controls, list) else []) if isinstance(each, dict))]
    named: list[tuple[dict[str, Any], str, Registry[Any], str]] = [
        (content, "unlearn", METHODS, "method"),
        *((block, "merge", RULES, "rule") for block in merges),
    ]
    split = content.get("split")
    if isinstance(split, dict) and isinstance(by := spelled_out(split.get("by")), dict):
        split["by"] = by
        named.append((split, "by", ATTRIBUTES, "kind"))
    for block, setting, registry, key in named:
        if setting in block:
            block[setting] = _anchored(block[setting], registry, key, folder)


def _anchor_source(block: Any, folder: Path) -> None:
    if not isinstance(block, dict) or block.get("source") is None:
        return
    for item in block["source"] if isinstance(block["source"], list) else [block["source"]]:
        if isinstance(item, dict) and isinstance(item.get("path"), str):
            item["path"] = _absolute_source(item["path"], folder)
    if isinstance(block["source"], str):
        block["source"] = _absolute_source(block["source"], folder)
    elif isinstance(block["source"], list):
        block["source"] = [
            _absolute_source(item, folder) if isinstance(item, str) else item for item in block["source"]
        ]


def _anchored(block: Any, registry: Registry[Any], key: str, folder: Path) -> Any:
    """A block that names a value, with every path in it made absolute: of the value's own file, those that its settings mark
    as places, and those of the blocks inside."""
    if isinstance(block, str):
        return _absolute(block, folder) if ".py:" in block else block
    if not isinstance(block, dict) or not isinstance(block.get(key), str):
        return block
    block[key] = name = _anchored(block[key], registry, key, folder)
    try:
        settings = registry.get(name).settings
    except RecipeError:
        return block  # the validation that follows says so
    for setting, info in settings.model_fields.items():
        marks = marks_of(info, block[setting]) if setting in block else []
        names = any(isinstance(mark, BeforeValidator) and isinstance(mark.func, Named) for mark in marks)
        for mark in marks:
            # A block that names a value says itself which of its settings are places.
            if isinstance(mark, Place) and not (names and isinstance(block[setting], dict)):
                place = _absolute_model if mark.kind == "model" else _absolute
                block[setting] = _placed(block[setting], place, folder)
            elif isinstance(mark, BeforeValidator) and isinstance(mark.func, Named):
                block[setting] = _anchored(block[setting], mark.func.registry, mark.func.key, folder)
    return block


def marks_of(info: FieldInfo, value: Any) -> list[Any]:
    """What marks a setting that holds a value: its own marks, and those inside, as in
    `Annotated[str, mark] | None`. Marks of texts are of no other value."""
    choices = [get_args(each) for each in get_args(info.annotation) if get_origin(each) is Annotated]
    inner = [mark for what, *marks in choices if what is not str or isinstance(value, str) for mark in marks]
    return [*info.metadata, *inner]


def _placed(value: Any, absolute: Callable[[str, Path], str], folder: Path) -> Any:
    """The value with every text in it made absolute."""
    if isinstance(value, str):
        return absolute(value, folder)
    if isinstance(value, dict):
        return {key: _placed(item, absolute, folder) for key, item in value.items()}
    return [_placed(item, absolute, folder) for item in value] if isinstance(value, list) else value


def _absolute(path: str, folder: Path) -> str:
    return str(folder / Path(os.path.expanduser(path)))


def _absolute_source(path: str, folder: Path) -> str:
    """A file's absolute path; the name of rows that come with the package stays, where no file is called so."""
    if "://" in path:
        return path  # refused where files are looked for
    return path if path == NEUTRAL and not os.path.exists(folder / path) else _absolute(path, folder)


def _absolute_model(path: str, folder: Path) -> str:
    """A folder's absolute path; anything else is taken for a Hub id, unless it is spelled as a path or is a value's file."""
    place = folder / Path(os.path.expanduser(path))
    return str(place) if os.path.exists(place) or path.startswith((".", "/", "~")) or ".py:" in path else path
