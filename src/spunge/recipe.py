"""The frame of a recipe: which model, which rows to forget, how to split, unlearn, merge and judge.

A method, merge rule or evaluator declares its own settings in its own file; this file finds them by name. Unknown keys
are refused with a suggestion, and every default is filled in, so that a dumped recipe runs again as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from spunge.registry import EVALUATORS, METHODS, RULES, RecipeError, Registry, suggestion

__all__ = ["Recipe", "RecipeError", "load_recipe"]

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Place:
    """Marks a setting whose texts are places: `Annotated[str, Place("model")]`. They are made absolute.

    model: a folder, or else a Hub id, which stays as it is. file: always a path. Also inside lists and mappings' values.
    """

    kind: Literal["model", "file"]


class Strict(BaseModel):
    """A block of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Strict):
    path: str = Field(description="Hub id, or a folder with a checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the model while it trains and is judged. auto: the checkpoint's on a GPU, the faster of "
        "float32 and bfloat16 (measured) on a CPU. What is written keeps the checkpoint's dtype.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    allow_pickle: bool = Field(False, description="Accept pickled weights (.bin), which can run code when read.")
    trust_remote_code: bool = Field(False, description="Run the Python code that the model's repository carries.")


class Source(Strict):
    """Where rows come from: files, or a dataset on the Hub."""

    path: str | None = Field(
        None, description="A .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or a glob."
    )
    hub: str | None = Field(None, description="A dataset's id on the Hub.")
    config: str | None = Field(None, description="The Hub dataset's configuration.")
    split: str = Field("train", description="The Hub dataset's split.")
    revision: str | None = Field(None, description="The Hub dataset's branch, tag or commit.")
    assign: dict[str, Scalar] = Field(
        default_factory=dict, description="Constant columns to add, such as {domain: bio}."
    )

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


def _listed(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_listed), Field(min_length=1)]


class Rows(Strict):
    """Rows of a source, and which of their columns are the text."""

    source: Sources | None = Field(
        None, description="File, folder, glob, {hub: ..}, or a list of them. Default: forget's."
    )
    text: str | None = Field(None, description="Column with plain text.")
    prompt: str | None = Field(None, description="Column with the prompt; the loss is on the completion alone.")
    completion: str | None = Field(None, description="Column with the completion.")
    messages: str | None = Field(None, description="Column with chat messages; the loss is on the last answer alone.")
    where: str | None = Field(None, description="SQL condition that a row must meet.")
    limit: int | None = Field(None, ge=1, description="At most so many rows, drawn at random by the seed.")

    @model_validator(mode="after")
    def _one_form(self) -> "Rows":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt + completion, messages")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column; empty when the recipe names none."""
        return {role: name for role in ("text", "prompt", "completion", "messages") if (name := getattr(self, role))}


class ForgetRows(Rows):
    source: Sources = Field(description="File, folder, glob, {hub: ..}, or a list of them.")
    refusal: str | None = Field(
        None, description="Column with the answer wanted in place of the completion (methods dpo and idk)."
    )

    @property
    def columns(self) -> dict[str, str]:
        return super().columns or {"text": "text"}


class Split(Strict):
    by: str = Field(description="The attribute: a column, or an SQL expression. A list puts a row into several parts.")
    values: list[Scalar] | dict[str, list[Scalar]] | None = Field(
        None, description="Values to make parts of, or {part: [values]}. Default: every value that occurs."
    )
    min_rows: int = Field(1, ge=1, description="Parts with fewer rows are dropped.")
    unassigned: Literal["drop", "keep", "error"] = Field(
        "drop", description="Rows whose value is in no part: drop them, keep them as a part of their own, or stop."
    )


class MethodSettings(Strict):
    method: str = Field(description="Name of the unlearning method (`spunge list methods`).")


class RuleSettings(Strict):
    rule: str = Field(description="Name of the merge rule (`spunge list rules`).")


class EvaluatorSettings(Strict):
    kind: str = Field(description="Name of the evaluator (`spunge list evaluators`).")
    name: str | None = Field(None, description="What to call this evaluation in files and logs. Default: its kind.")
    source: Sources | None = Field(
        None, description="File, folder, glob, {hub: ..}, or a list of them. Default: forget's."
    )
    where: str | None = Field(None, description="SQL condition that a row must meet.")
    limit: int | None = Field(
        None,
        ge=1,
        description="At most so many rows, drawn at random: the same ones whatever the seed, in every evaluation of the same rows.",
    )
    by: str | None = Field(
        None,
        description="Column or SQL expression that names each row's subject. Default: split.by where the rows have it.",
    )
    subject: str | None = Field(
        None,
        description="Name under which all rows together are reported. Default: `all` where the rows have no subjects.",
    )
    stages: list[str] | None = Field(
        None, description="Judge these alone, such as [base, merged, 'control:*', 'branch:*']. Default: every stage."
    )


SettingsT = TypeVar("SettingsT", bound=Strict)


def _named(registry: Registry, key: str, default: str | None) -> Any:
    """Turn {key: NAME, ...} into the settings class that the named object declares."""

    def build(value: Any) -> Any:
        if isinstance(value, str):
            value = {key: value}
        if not isinstance(value, Mapping):
            return value
        name = value.get(key, default)
        if not isinstance(name, str):
            raise RecipeError(f"{registry.setting}: missing; known: {', '.join(registry.names())}")
        settings: type[Strict] = registry.get(name).Settings
        return _validated(settings, {**value, key: name}, registry.setting.rpartition(".")[0])

    return BeforeValidator(build)


TRAININGS = ("joint", "random", "sequential")


class Control(Strict):
    """A baseline: what is trained, and how that becomes one model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Names its stage, control:NAME, and its folder.")
    train: Literal["parts", "joint", "random", "sequential"] = Field(
        "parts",
        description="parts: the run's own branches, merged otherwise. joint: the same method, samples and steps on all parts "
        "at once. random: the same samples split at random into parts of the same sizes, merged alike: is it the attribute "
        "that helps, or just splitting? sequential: one part after the other, each from the model that the one before left.",
    )
    merge: Annotated[SerializeAsAny[RuleSettings], _named(RULES, "rule", "ties")] | None = Field(
        None,
        description="How its deltas become one model. Default: as the recipe's merge; joint and sequential: as they are.",
    )

    @model_validator(mode="after")
    def _says_something_else(self) -> "Control":
        if self.train == "parts" and self.merge is None:
            raise ValueError("the run's own branches, merged as the recipe says, are `merged`; give merge")
        if self.name in TRAININGS and (self.train != self.name or (self.merge and self.train != "random")):
            raise ValueError(f"the name {self.name!r} is kept for {{train: {self.name}}} without a merge of its own")
        return self


def _controls(value: Any) -> Any:
    """`joint`, `random`, `sequential` and a merge rule's name are short for a control of that name."""
    if not isinstance(value, list):
        return value
    return [_control(item) if isinstance(item, str) else item for item in value]


def _control(name: str) -> dict[str, Any]:
    if name in TRAININGS:
        return {"name": name, "train": name}
    if name in RULES.names():
        return {"name": name, "train": "parts", "merge": {"rule": name}}
    raise RecipeError(f"controls: no control {name!r}{suggestion(name, [*TRAININGS, *RULES.names()])}")


class Published(Strict):
    """A figure of a paper, to stand beside the run's own."""

    stage: str = Field(description="base, merged, control:NAME or branch:SLUG.")
    subject: str = Field(description="The subject of the row in results.json.")
    metric: str = Field(description="The metric of the row in results.json.")
    value: float = Field(description="As printed, in the metric's unit: a share where the metric is one.")
    source: str = Field(description="Paper and table.")


class Recipe(Strict):
    model: ModelSettings = Field(description="The base model.")
    forget: ForgetRows = Field(description="The rows to forget.")
    split: Split | None = Field(None, description="Default: one part that holds every row.")
    retain: Rows | None = Field(None, description="Rows to keep behaving on, where the method needs them.")
    unlearn: Annotated[SerializeAsAny[MethodSettings], _named(METHODS, "method", None)] = Field(
        description="The unlearning method and its settings; each part is unlearned by it from the same base."
    )
    merge: Annotated[SerializeAsAny[RuleSettings], _named(RULES, "rule", "ties")] = Field(
        default_factory=lambda: {"rule": "ties"},
        validate_default=True,
        description="How the branches' deltas become one model.",
    )
    controls: Annotated[list[Control], BeforeValidator(_controls)] = Field(
        default=["joint"],
        validate_default=True,
        description="Baselines beside the merged model: joint, random, sequential, the name of a merge rule (the same branches, "
        "merged by it), or {name, train, merge}.",
    )
    evaluate: list[Annotated[SerializeAsAny[EvaluatorSettings], _named(EVALUATORS, "kind", None)]] = Field(
        default_factory=list,
        description="What the base, every branch, every control and the merged model are judged by.",
    )
    seed: int = Field(0, ge=0, description="Of all that is random; each part gets a seed of its own from it.")
    seeds: int = Field(
        1,
        ge=1,
        description="Train and judge everything so many times, with seed, seed + 1, ...; results are means over them.",
    )
    published: list[Published] = Field(
        default_factory=list, description="Figures of a paper that the report sets beside the run's own."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [evaluation_name(entry) for entry in self.evaluate]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluate: two evaluations are called {name!r}; give each a name of its own")
        known = set(names)
        for name, entry in zip(names, self.evaluate, strict=True):
            of = getattr(entry, "of", None)
            if of is not None and (of not in known or of == name):
                raise ValueError(f"evaluate.of: no other evaluation is called {of!r}{suggestion(of, known - {name})}")
        controls = [control.name for control in self.controls]
        for name in controls:
            if controls.count(name) > 1:
                raise ValueError(f"controls: two controls are called {name!r}; give each a name of its own")
        needs = METHODS.get(self.unlearn.method).needs_retain
        if (needs(self.unlearn) if callable(needs) else needs) and self.retain is None:
            raise ValueError(f"retain: missing, and unlearn.method {self.unlearn.method!r} needs it; add retain.source")
        return self


def evaluation_name(entry: EvaluatorSettings) -> str:
    return entry.name or entry.kind


def load_recipe(source: "str | Path | Mapping[str, Any]", overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, a shipped recipe's name, or a mapping, and apply `a.b=c` overrides.

    Relative paths in a file are relative to that file; in a mapping or an override, to the working directory. All are
    made absolute, and every default is filled in. Raises RecipeError with one line that names the setting.
    """
    if isinstance(source, Mapping):
        content: Any = yaml.safe_load(yaml.safe_dump(_plain(source)))
        folder = Path.cwd()
    else:
        file = recipe_file(str(source))
        folder = file.parent.resolve()
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: {str(file)!r} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"recipe: {str(source)!r} must be a mapping with model, forget and unlearn; see `spunge init demo`"
        )
    _anchor(content, folder)
    for override in overrides:
        path, value = _parse_override(override)
        _assign(content, path, value)
    _anchor(content, Path.cwd())
    return _validated(Recipe, content, "")


def recipe_file(name: str) -> Path:
    """The file of a recipe given by path or by a shipped recipe's name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"recipe: no file {name!r}, nor a shipped recipe of that name{suggestion(name, shipped)}")


def shipped_recipes() -> list[Path]:
    return sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default filled in; it loads to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set: {override!r} is not of the form a.b=value")
    try:
        return path.split("."), yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set: the value of {path!r} is not YAML: {text!r}; quote it") from None


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


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of files and folders in a recipe absolute."""
    model = content.get("model")
    if isinstance(model, str):
        content["model"] = model = {"path": model}
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = _absolute_model(model["path"], folder)
    evaluate = content.get("evaluate")
    evaluations = evaluate if isinstance(evaluate, list) else []
    for block in [content.get("forget"), content.get("retain"), *evaluations]:
        _anchor_source(block, folder)
    for registry, key, blocks in [
        (METHODS, "method", [content.get("unlearn")]),
        (RULES, "rule", [content.get("merge")]),
        (EVALUATORS, "kind", evaluations),
    ]:
        for block in blocks:
            if isinstance(block, dict) and isinstance(block.get(key), str):
                if ".py:" in block[key]:
                    block[key] = _absolute(block[key], folder)
                _anchor_places(block, registry, block[key], folder)


def _anchor_source(block: Any, folder: Path) -> None:
    if not isinstance(block, dict) or block.get("source") is None:
        return
    for item in block["source"] if isinstance(block["source"], list) else [block["source"]]:
        if isinstance(item, dict) and isinstance(item.get("path"), str):
            item["path"] = _absolute(item["path"], folder)
    if isinstance(block["source"], str):
        block["source"] = _absolute(block["source"], folder)
    elif isinstance(block["source"], list):
        block["source"] = [_absolute(item, folder) if isinstance(item, str) else item for item in block["source"]]


def _anchor_places(block: dict[str, Any], registry: Registry, name: str, folder: Path) -> None:
    """Make the settings absolute that the named object marks as places."""
    try:
        settings: type[Strict] = registry.get(name).Settings
    except RecipeError:
        return  # the validation that follows says so
    for key, info in settings.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, Place)]
        if marks and key in block:
            block[key] = _placed(block[key], _absolute_model if marks[0].kind == "model" else _absolute, folder)


def _placed(value: Any, absolute: Callable[[str, Path], str], folder: Path) -> Any:
    """The value with every text in it made absolute."""
    if isinstance(value, str):
        return absolute(value, folder)
    if isinstance(value, dict):
        return {key: _placed(item, absolute, folder) for key, item in value.items()}
    return [_placed(item, absolute, folder) for item in value] if isinstance(value, list) else value


def _absolute(path: str, folder: Path) -> str:
    return str(folder / Path(path).expanduser())


def _absolute_model(path: str, folder: Path) -> str:
    """A folder's absolute path; anything else is taken for a Hub id, unless it is spelled as a path."""
    place = folder / Path(path).expanduser()
    return str(place) if place.exists() or path.startswith((".", "/", "~")) else path


def _validated(settings: type[SettingsT], content: Any, prefix: str) -> SettingsT:
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explained(error, settings, prefix)) from None


def _explained(error: ValidationError, settings: type[Strict], prefix: str) -> str:
    """One error as one line: the setting, the value, the mend."""
    # A misspelt key comes before the key that is missing for it.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    kind, given = first["type"], first.get("input")
    steps, known = _walked(settings, first["loc"])
    name = ".".join([prefix, *steps] if prefix else steps)
    if kind == "extra_forbidden":
        return f"{name}: no such setting{suggestion(steps[-1], known)}"
    if kind == "missing":
        return f"{name}: missing; the recipe must give it"
    if kind == "value_error" and isinstance(first["ctx"]["error"], RecipeError):
        return str(first["ctx"]["error"])
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{name}: {message}" if name else message
    if kind == "model_type":
        return f"{name}: {_shown(given)}: it should be a mapping"
    if kind == "union_tag_invalid":
        return f"{name}.kind: {first['ctx']['tag']!r}: it should be one of {first['ctx']['expected_tags']}"
    return f"{name}: {_shown(given)}: {first['msg'].lower().replace('input should', 'it should')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walked(settings: type[Strict], place: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The settings on the way to an error, and the known keys of the block it is in.

    pydantic's own marks for the branch of a union that it tried are left out.
    """
    blocks: list[Any] = [settings]
    steps: list[str] = []
    for position, step in enumerate(place):
        inner = [block.model_fields[step].annotation for block in blocks if step in block.model_fields]
        if inner:
            steps.append(str(step))
            last = position == len(place) - 1
            blocks = blocks if last else [block for annotation in inner for block in _blocks_of(annotation)]
        elif isinstance(step, int) or (position == len(place) - 1 and not _is_mark(step)):
            steps.append(str(step))
        else:
            chosen = [b for b in blocks if step in (b.__name__, getattr(b.model_fields.get("kind"), "default", None))]
            blocks = chosen or blocks
    return steps, [name for block in blocks for name in block.model_fields]


def _is_mark(step: str) -> bool:
    return step in ("float", "int", "str", "bool") or "[" in step or "constrained" in step


def _blocks_of(annotation: Any) -> list[Any]:
    """The settings classes inside an annotation such as `Rows | None` or `list[Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for inner in getattr(annotation, "__args__", ()) for block in _blocks_of(inner)]
