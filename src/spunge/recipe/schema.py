"""The frame of a recipe: which model, which rows to forget, how to split, unlearn, merge and judge.

A method, merge rule or evaluator declares its own settings in its own file; this file finds them by name. Unknown keys
are refused with a suggestion, and every default is filled in, so that a dumped recipe runs again as it is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from spunge.errors import suggestion
from spunge.recipe.aggregates import Aggregate, refuse_aggregate
from spunge.recipe.block import Strict
from spunge.recipe.calibration import Calibrate, refuse_calibration
from spunge.recipe.decoding import Decode, decoding, refuse_classes_alone, refuse_decode
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name, measured_again, refuse_stages
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.merging import Control, RuleSettings, controls_of
from spunge.recipe.model import ModelSettings
from spunge.recipe.named import named
from spunge.recipe.reference import JudgedModel, Reference, referred
from spunge.recipe.rows import NEUTRAL, ForgetRows, Rows
from spunge.recipe.split import Split
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.tracking import TrackSettings
from spunge.recipe.training import LoRA, MethodSettings
from spunge.recipe.watching import Watch, refuse_watch
from spunge.registry import EVALUATORS, EXECUTORS, METHODS, RULES, TRACKERS


class Published(Strict):
    """A figure of a paper, to stand beside the run's own."""

    stage: str = Field(description="base, merged, control:NAME or branch:SLUG.")
    subject: str = Field(description="The subject of the row in results.json.")
    metric: str = Field(description="The metric of the row in results.json.")
    value: float = Field(description="As printed, in the metric's unit: a share where the metric is one.")
    source: str = Field(description="Paper and table.")


def _retained(value: Any) -> Any:
    """Raises ValueError for words that are no file but mean something."""
    word = value.strip().lower() if isinstance(value, str) else ""
    if word == NEUTRAL != value:
        raise ValueError(f"{value!r}: write {NEUTRAL}")
    if word in ("none", "null", "false", "no"):
        raise ValueError(f"{value!r}: write null, or leave it out")
    return value


class Recipe(Strict):
    model: ModelSettings = Field(description="The base model.")
    teach: TeachSettings | None = Field(
        None,
        description="Fine-tune the model on rows before all else: what comes of it is the base, and the given model is judged as "
        "`untaught`. Once for all seeds, and for all recipes that teach the same.",
    )
    forget: ForgetRows | None = Field(
        None, description="The rows to forget. Default: none, where the recipe unlearns nothing."
    )
    split: Split | None = Field(None, description="Default: one part that holds every row.")
    retain: Annotated[Rows | None, BeforeValidator(_retained)] = Field(
        None, description="Rows to keep behaving on, where the method needs them; `neutral`: paragraphs of Wikipedia."
    )
    decouple: Rows | None = Field(
        None,
        description="Prompts like those to forget, in a harmless setting, each with its ordinary answer: these are learned beside "
        "forgetting and keeping (SafeEraser's prompt-decouple loss, weight `unlearn.decouple`). Default: none. See "
        "[around any loss](methods.md#around-any-loss).",
    )
    reference: Annotated[Reference | None, BeforeValidator(referred)] = Field(
        None,
        description="`retrained`: the same teaching without the rows to forget, judged beside the base and the merged model; or "
        "{path: ..} for a model that exists.",
    )
    judge: list[JudgedModel] | None = Field(
        None,
        description="Models that are judged as they are, beside the rest. With it, also empty, unlearn may be left out: `spunge "
        "judge` runs such recipes.",
    )
    unlearn: Annotated[SerializeAsAny[MethodSettings], named(METHODS, "method")] | None = Field(
        None,
        description="The unlearning method and its settings; each part is unlearned by it from the same base. Default: none, where "
        "the recipe only judges.",
    )
    decode: Annotated[Annotated[Decode, Field(discriminator="kind")] | None, BeforeValidator(decoding)] = Field(
        None,
        description="Unlearn while a larger model decodes: `model` is a small one, what it unlearned shifts the larger one's "
        "logits, and that is judged. No weight of the larger one changes. Default: the model itself is changed. See "
        "[decoding](decoding.md).",
    )
    merge: Annotated[SerializeAsAny[RuleSettings], named(RULES, "rule", "ties")] = Field(
        default_factory=lambda: {"rule": "ties"},
        validate_default=True,
        description="How the branches' deltas become one model.",
    )
    controls: Annotated[list[Control], BeforeValidator(controls_of)] = Field(
        default=["joint"],
        validate_default=True,
        description="Baselines beside the merged model: joint, random, sequential, the name of a merge rule (the same branches, "
        "merged by it), or {name, train, merge}.",
    )
    calibrate: Calibrate | None = Field(
        None,
        description="Compare at equal cost: the merged model and every control get the largest scale at which a metric keeps its "
        "share of the base's. Default: `merge.scale`, and controls as they are.",
    )
    watch: Watch | None = Field(
        None,
        description="Measure every branch and control while it trains, and keep its best step where that is asked for. Default: "
        "nothing is measured before the judging. See [watching](methods.md#while-it-trains-watch).",
    )
    evaluate: list[Annotated[SerializeAsAny[EvaluatorSettings], named(EVALUATORS, "kind")]] = Field(
        default_factory=list,
        description="What the base, every branch, every control and the merged model are judged by.",
    )
    aggregates: dict[str, Aggregate] = Field(
        default_factory=dict,
        description="Name: what is made of several evaluations or of one beside a reference, such as TOFU's model utility and "
        "forget quality, MUSE's PrivLeak.",
    )
    seed: int = Field(0, ge=0, description="Of all that is random; each part gets a seed of its own from it.")
    seeds: int = Field(
        1,
        ge=1,
        description="Train and judge everything so many times, with seed, seed + 1, ...; results are means over them.",
    )
    keep_texts: Literal["all", "sample", "none"] = Field(
        "all",
        description="Prompts and completions that the run's folder and the shared cache hold once a model is judged. all: judging "
        "by another scorer writes nothing anew. sample: 20 prompts of each file, to look at, and no copies of rows in the cache. "
        "none: none; scores stay. See [reliability](reliability.md#secrets-and-texts).",
    )
    execution: Annotated[SerializeAsAny[ExecutionSettings], named(EXECUTORS, "kind", "here")] = Field(
        default_factory=lambda: {"kind": "here"},
        validate_default=True,
        description="Where the stages are made: here, one after the other; by several processes; on a Ray cluster. No result "
        "depends on it. See [scale](scale.md).",
    )
    track: Annotated[SerializeAsAny[TrackSettings] | None, named(TRACKERS, "kind")] = Field(
        None,
        description="Who is told losses and scores beside the run's folder: tensorboard, wandb, mlflow, trackio, each an extra. "
        "Default: nobody. No result depends on it. See [seeing runs](seeing.md#told-to-others-track).",
    )
    published: list[Published] = Field(
        default_factory=list, description="Figures of a paper that the report sets beside the run's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, content: Any) -> Any:
        """A recipe that names models to judge may unlearn nothing; then there is nothing to compare a merge with."""
        if not isinstance(content, Mapping) or content.get("judge") is None or content.get("unlearn") is not None:
            return content
        return {"controls": [], **content}

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column of the rows to forget, which other rows have too where nothing says otherwise."""
        return self.forget.columns if self.forget is not None else {"text": "text"}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.unlearn is None and self.judge is None:
            raise ValueError("unlearn: missing; the recipe must give it")
        if self.unlearn is None and self.controls:
            raise ValueError(
                "controls: nothing is unlearned, and there is nothing to control; leave them out, or give unlearn"
            )
        if self.forget is None and (self.unlearn is not None or self.split is not None):
            raise ValueError("forget: missing; the recipe must give it")
        names = [evaluation_name(entry) for entry in self.evaluate]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluate: two evaluations are called {name!r}; give each a name of its own")
        known = set(names)
        for name, entry in zip(names, self.evaluate, strict=True):
            of = measured_again(entry)
            if of is not None and (of not in known or of == name):
                raise ValueError(f"evaluate.of: no other evaluation is called {of!r}{suggestion(of, known - {name})}")
            if entry.half is not None and of is not None:
                raise ValueError(f"evaluate.half: the items of {name!r} are those of {of!r}; set it there")
            if entry.half is not None and not EVALUATORS.get(entry.kind).reads_rows:
                raise ValueError(f"evaluate.half: {name!r} brings items of its own, which are not halved; leave it out")
        there = [] if self.reference is None else [f"reference:{self.reference.name}"]
        there += [f"model:{model.name}" for model in self.judge or ()]
        for name, aggregate in self.aggregates.items():
            refuse_aggregate(name, aggregate, known, there)
        if (reference := self.reference) is not None and reference.path is None:
            if self.teach is None:
                raise ValueError(
                    "reference: retrained is the same teaching without the rows to forget, and the recipe teaches nothing; "
                    "give teach, or reference.path"
                )
            if self.forget is None:
                raise ValueError("forget: missing; `reference: retrained` is the teaching without these rows")
            if self.seeds > 1 and self.forget.limit is not None:
                raise ValueError(
                    "reference: with forget.limit each of several seeds forgets other rows, and no one reference fits them; "
                    "leave forget.limit out, or set seeds to 1"
                )
        controls = [control.name for control in self.controls]
        stages = ["base", *(["untaught"] if self.teach else []), *there, "merged"]
        stages += [f"control:{name}" for name in controls]
        for entry in self.evaluate:
            refuse_stages(entry, stages)
        for name in controls:
            if controls.count(name) > 1:
                raise ValueError(f"controls: two controls are called {name!r}; give each a name of its own")
        if self.calibrate is not None:
            evaluations = dict(zip(names, self.evaluate, strict=True))
            refuse_calibration(self.calibrate, evaluations, self.aggregates, self.unlearn, self.merge, self.controls)
        if self.watch is not None:
            refuse_watch(self.watch, dict(zip(names, self.evaluate, strict=True)), self.unlearn)
        refuse_classes_alone(self)
        if self.decode is not None:
            refuse_decode(self.decode, self)
            if self.model.device_map is not None:
                raise ValueError(
                    "model.device_map: beside decode the large model's logits are shifted by small ones, all on one device; leave "
                    "one of the two out"
                )
        judged = [model.name for model in self.judge or ()]
        for name in judged:
            if judged.count(name) > 1:
                raise ValueError(f"judge: two models are called {name!r}; give each a name of its own")
        if self.retain is None and self.unlearn is not None:
            _refuse_without_retain(self.unlearn)
        if self.decouple is not None:
            _refuse_decouple(self, self.decouple)
        if self.model.train_in is not None:
            _refuse_beside_packed(self)
        if self.model.unlearning_layers is not None:
            _refuse_beside_layers(self)
        for entry in self.evaluate:
            EVALUATORS.get(entry.kind).check(entry, self)
            if self.model.device_map is not None:
                _refuse_whole(entry)
        return self


def _refuse_without_retain(unlearn: MethodSettings) -> None:
    """Raises ValueError where a method needs retain rows."""
    needs_retain = METHODS.get(unlearn.method).needs_retain
    if needs_retain(unlearn):
        alpha = "" if needs_retain(unlearn.model_copy(update={"alpha": 0.0})) else "set unlearn.alpha to 0, "
        raise ValueError(
            f"retain: missing, and unlearn.method {unlearn.method!r} needs it; give retain.source, write `retain: "
            f"neutral` (paragraphs of Wikipedia), {alpha}or take a method that needs none, such as tvn or ga"
        )


def _refuse_decouple(recipe: Recipe, rows: Rows) -> None:
    """Raises ValueError where nothing would learn the rows, or they are every row to forget."""
    unlearn = recipe.unlearn
    if unlearn is None or "decouple" not in dict(unlearn):
        method = "nothing is unlearned" if unlearn is None else f"unlearn.method {unlearn.method!r} has no such term"
        raise ValueError(f"decouple: {method}; leave it out, or take a method on outputs, such as npo")
    if rows.source is None and rows.where is None:
        raise ValueError("decouple.source: missing; without it and decouple.where these would be the rows to forget")


def can_be_spread(recipe: Recipe) -> bool:
    """Whether its models can be judged on several devices (model.device_map)."""
    return recipe.decode is None and not any(map(_asks_whole, recipe.evaluate))


def _asks_whole(entry: EvaluatorSettings) -> str | None:
    """What of an evaluation needs a model's weights on one device."""
    generation = dict(entry).get("generation")
    written = "engine vllm" if generation is not None and dict(generation).get("engine") == "vllm" else ""
    return EVALUATORS.get(entry.kind).whole(entry) or written or None


def _refuse_whole(entry: EvaluatorSettings) -> None:
    """Raises ValueError for an evaluation that a model on several devices cannot be judged by."""
    if asks := _asks_whole(entry):
        raise ValueError(
            f"model.device_map: {evaluation_name(entry)!r} ({asks}) needs the weights whole on one device; leave one of the two out"
        )


def _refuse_beside_layers(recipe: Recipe) -> None:
    """Raises ValueError for what does not know a model with unlearning layers."""
    said = "model.unlearning_layers:"
    if recipe.unlearn is None:
        raise ValueError(f"{said} nothing is unlearned, and they would add nothing; leave them out")
    if recipe.decode is not None:
        raise ValueError(
            f"{said} beside decode the weights of small models are exported without them; leave one of the two out"
        )
    if recipe.teach is not None:
        raise ValueError(
            f"{said} beside teach they would be taught too; teach by a run of its own, and give its RUN/taught as model.path"
        )
    if recipe.model.train_in is not None:
        raise ValueError(f"{said} they are trained whole, and train_in packs them; leave one of the two out")
    for entry in recipe.evaluate:
        generation = dict(entry).get("generation")
        if generation is not None and dict(generation).get("engine") == "vllm":
            raise ValueError(
                f"{said} vllm does not know them ({evaluation_name(entry)!r}); leave generation.engine out"
            )


def _refuse_beside_packed(recipe: Recipe) -> None:
    """Raises ValueError for what cannot be trained beside weights that are packed."""
    said, unlearn = f"model.train_in: {recipe.model.train_in}:", recipe.unlearn
    trained: dict[str, Strict | None] = {"teach": recipe.teach}
    if unlearn is not None and METHODS.get(unlearn.method).trains:
        trained["unlearn"] = unlearn
        if METHODS.get(unlearn.method).settle is not None and (open_ := [key for key, v in unlearn if v == "auto"]):
            raise ValueError(
                f"{said} unlearn.{open_[0]}: auto is chosen by trials on weights that are not packed; give it a value"
            )
    for setting, block in trained.items():
        if block is not None and not isinstance(dict(block).get("trainable"), LoRA):
            raise ValueError(
                f"{said} LoRA alone can be trained beside packed weights; set {setting}.trainable to {{kind: lora}}, or leave "
                "train_in out"
            )
    if any(control.train == "sequential" for control in recipe.controls):
        raise ValueError(
            f"{said} the control sequential changes the weights that it goes on from, and packed ones cannot be changed; leave "
            "one of the two out"
        )
