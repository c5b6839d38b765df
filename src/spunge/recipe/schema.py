"""The frame of a recipe: which model, which rows to forget, how to split, unlearn, merge and judge.

A method, merge rule or evaluator declares its own settings in its own file; this file finds them by name. Unknown keys
are refused with a suggestion, and every default is filled in, so that a dumped recipe runs again as it is.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from spunge.errors import RecipeError, suggestion
from spunge.files import is_device
from spunge.recipe.aggregates import Aggregate, HarmonicMean, PrivLeak, RankTest, terms_of
from spunge.recipe.block import Strict
from spunge.recipe.training import DescentSettings, Everything, LoRA, Trainable
from spunge.registry import ATTRIBUTES, EVALUATORS, METHODS, RULES, Registry

Scalar = str | int | float | bool
NEUTRAL = "neutral"  # names the paragraphs of Wikipedia that come with the package, as a source
# What answer_end says in other spellings, which would be learned as texts.
MEANT_AS_END = {
    **dict.fromkeys(["auto", "eos", "eos_token", "true"], "auto"),
    **dict.fromkeys(["none", "null", "false"], "none"),
}


PackedIn = Literal["4bit", "8bit"]


class ModelSettings(Strict):
    path: str = Field(description="Hub id, or a folder with a checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the model while it trains and is judged. auto: the checkpoint's on a GPU, the faster of "
        "float32 and bfloat16 (measured) on a CPU; what is written in float32 is judged in float32.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    train_in: PackedIn | None = Field(
        None,
        description="Hold the weights in 4 bits (nf4) or 8 (int8) while LoRA is trained beside them; needs `spunge[quant]`. What "
        "is learned is added to the weights as they are, and these are judged. Default: as they are. See [memory](memory.md).",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Training computes the blocks again in its backward pass in place of holding what they computed: less memory, "
        "more time, the same losses. See [memory](memory.md).",
    )
    template: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as {enable_thinking: false}: in training, judging and generation alike.",
    )
    allow_pickle: bool = Field(False, description="Accept pickled weights (.bin), which can run code when read.")
    dequantize: bool = Field(
        False,
        description="Take the values of a quantised model (fp8, MXFP4, GGUF; compressed-tensors and bitsandbytes where their "
        "packages are installed) and write what comes of it unquantised.",
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that the model's repository carries.")


class Source(Strict):
    """Where rows come from: files, or a dataset on the Hub."""

    path: str | None = Field(
        None,
        description="A .jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather or .txt file (also packed: .gz, .zst, .bz2, .xz), a "
        "folder of them, or a glob; or `neutral`, the paragraphs of Wikipedia that come with the package.",
    )
    encoding: str | None = Field(
        None, description="Of text files, such as cp1252. Default: UTF-8, or as their byte order mark says."
    )
    delimiter: str | None = Field(None, description="Of CSV. Default: what parts the heading; a tab in .tsv.")
    hub: str | None = Field(None, description="A dataset's id on the Hub.")
    config: str | None = Field(None, description="The Hub dataset's configuration.")
    split: str = Field("train", description="The Hub dataset's split.")
    revision: str | None = Field(None, description="The Hub dataset's branch, tag or commit.")
    assign: dict[str, Scalar] = Field(
        default_factory=dict, description="Constant columns to add, such as {domain: bio}."
    )

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            "".encode(encoding or "utf-8")
        except LookupError:
            raise ValueError(f"no encoding {encoding!r}; such are utf-8, utf-16, cp1252, latin-1, shift_jis") from None
        return encoding

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"'):
            raise ValueError(f'{delimiter!r} is no delimiter; give one character (a tab is "\\t" in double quotes)')
        return delimiter

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
    text: str | None = Field(None, description="Column, or SQL expression, with plain text.")
    prompt: str | None = Field(
        None, description="Column, or SQL expression, with the prompt; the loss is on the completion alone."
    )
    completion: str | None = Field(None, description="Column, or SQL expression, with the completion.")
    messages: str | None = Field(
        None,
        description="Column, or SQL expression, with conversations; the loss is on the assistant's messages alone, see `learn`.",
    )
    chat: bool | None = Field(
        None,
        description="Put prompt and completion into the model's chat template, as a user's and an assistant's message. "
        "Default: no; retain and teach: as forget.",
    )
    learn: Literal["last", "all"] | None = Field(
        None,
        description="Which of a conversation's assistant messages are learned. Default: the last; retain and teach: as forget.",
    )
    answer_end: str | None = Field(
        None,
        description="What ends an answer and is learned with it, of prompts and conversations. auto: the chat template's end of "
        "turn, else the tokenizer's end token. none: nothing. Any other text: that text. Default: auto; retain and teach: as "
        "forget.",
    )
    where: str | None = Field(None, description="SQL condition that a row must meet.")
    limit: int | None = Field(None, ge=1, description="At most so many rows, drawn at random by the seed.")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        """`neutral` is short for its source; its text is in its own column, whatever forget's is called."""
        content = {"source": given} if given == NEUTRAL else given
        if (
            isinstance(content, dict)
            and content.get("source") == NEUTRAL
            and not {"text", "prompt", "messages"} & content.keys()
        ):
            return {**content, "text": "text"}
        return content

    @model_validator(mode="after")
    def _one_form(self) -> "Rows":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt + completion, messages")
        if self.chat is False and self.messages is not None:
            raise ValueError("chat: conversations always go through the chat template; leave it out")
        if self.chat and self.text is not None:
            raise ValueError(
                "chat: a plain text has no turns; give prompt and completion, or messages, or leave it out"
            )
        if self.answer_end == "":
            raise ValueError("answer_end: an empty text; give none, auto or the text that ends an answer")
        if self.answer_end is not None and self.answer_end.strip().lower() in MEANT_AS_END:
            end = MEANT_AS_END[self.answer_end.strip().lower()]
            if self.answer_end != end:
                raise ValueError(
                    f"answer_end: {self.answer_end!r} would be learned as a text; for what it says write {end}"
                )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column; empty when the recipe names none."""
        roles = {"text": self.text, "prompt": self.prompt, "completion": self.completion, "messages": self.messages}
        return {role: name for role, name in roles.items() if name}


class ForgetRows(Rows):
    source: Sources = Field(description="File, folder, glob, {hub: ..}, or a list of them.")
    refusal: str | None = Field(
        None,
        description="Column, or SQL expression, with the answer wanted in place of the completion (methods dpo and idk).",
    )

    @property
    def columns(self) -> dict[str, str]:
        return super().columns or {"text": "text"}


Dtype = Literal["base", "float32", "bfloat16", "float16"]


class TeachSettings(DescentSettings, Rows):
    """Fine-tuning before all else. Defaults as TOFU's (Maini et al. 2024, arXiv 2401.06121, section 3.1)."""

    trainable: Trainable = Field(default=Everything(), description="What is trained. Default: every tensor.")
    epochs: float | None = Field(5.0, gt=0, description="Passes over the rows. Give this or steps.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Rows a step.")
    learning_rate: float = Field(1e-5, gt=0, description="Of the optimizer.")
    weight_decay: float = Field(
        0.01, ge=0, description="Taken off the weights beside the step; with sgd and rmsprop, added to the gradient."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Of the learning rate, down to 0.")
    warmup: float = Field(
        0.2, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0: 1 of 5 epochs."
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    max_length: int = Field(512, ge=2, description="Tokens of a row; longer ones are cut.")
    dtype: Dtype = Field(
        "base",
        description="What the taught model is written in: the given model's own dtype, or another. Rounded as `merge.rounding: "
        "auto` has it.",
    )
    seed: int = Field(0, ge=0, description="Of the teaching alone: another seed of the recipe teaches nothing anew.")


STAGE_NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?$"  # also names a folder


class Reference(Strict):
    """A model that never saw the rows to forget, to compare with: what exact unlearning would give."""

    path: str | None = Field(
        None,
        description="Folder or Hub id of one that exists: a checkpoint, or an adapter of the base. Default: one is made by the "
        "same teaching on the taught rows without those to forget.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    minus: str | None = Field(
        None,
        description="SQL condition: the taught rows that it is not taught. Default: those with the very texts of a row to forget.",
    )
    name: str = Field("retrained", pattern=STAGE_NAME, max_length=60, description="Names its stage, reference:NAME.")

    @model_validator(mode="after")
    def _one_way(self) -> "Reference":
        if self.path is not None and self.minus is not None:
            raise ValueError("minus: a model that exists is not taught; leave out one of path and minus")
        if self.path is None and self.revision is not None:
            raise ValueError("revision: of what? give path, or leave it out")
        return self


def _referred(value: Any) -> Any:
    """`retrained` is short for one that is made."""
    if isinstance(value, str) and value != "retrained":
        raise ValueError(f"{value!r}: write retrained, or {{path: {value}}} for a model that exists")
    return {} if value == "retrained" else value


class JudgedModel(Strict):
    """A model that is judged as it is, beside the base."""

    name: str = Field(pattern=STAGE_NAME, max_length=60, description="Names its stage, model:NAME.")
    path: str = Field(description="Folder or Hub id: a checkpoint, or an adapter or delta of the base.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")


class AttributeSettings(Strict):
    kind: str = Field(description="Name of the attribute source (`spunge list attributes`).")


@dataclass(frozen=True)
class Named:
    """Turns NAME or {key: NAME, ...} into the settings class that the value of that name declares."""

    registry: Registry[Any]
    key: str
    default: str | None = None
    texts: bool = False  # a plain text is no name but a setting of its own kind, and stays

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str) and not self.texts:
            value = {self.key: value}
        if not isinstance(value, Mapping):
            return value
        name = value.get(self.key, self.default)
        if not isinstance(name, str):
            raise ValidationError.from_exception_data(self.key, [self._unnamed(value)])
        # What is wrong inside is told by pydantic with its whole path: unlearn.steps, evaluate.2.limit.
        return self.registry.get(name).settings.model_validate({**value, self.key: name})

    def chosen(self, value: Any) -> type[Strict] | None:
        """The settings class of what a value names; None where it names nothing."""
        if self.texts and isinstance(value, str):
            return None
        name = value.get(self.key, self.default) if isinstance(value, Mapping) else value
        try:
            return self.registry.get(name).settings if isinstance(name, str) else None
        except RecipeError:
            return None

    def _unnamed(self, value: Mapping[Any, Any]) -> InitErrorDetails:
        """What is wrong where there is no name: most often the key is misspelt."""
        if self.key in value:
            return {"type": "string_type", "loc": (self.key,), "input": value[self.key]}
        if near := difflib.get_close_matches(self.key, [str(key) for key in value], n=1):
            return {"type": "extra_forbidden", "loc": (near[0],), "input": None}
        known = PydanticCustomError("unnamed", "missing; known: {known}", {"known": ", ".join(self.registry.names())})
        return {"type": known, "loc": (self.key,), "input": None}


def named(registry: Registry[Any], key: str, default: str | None = None, texts: bool = False) -> BeforeValidator:
    """Marks a setting that names a value of a registry: `Annotated[SerializeAsAny[AttackSettings], named(ATTACKS, "kind")]`."""
    return BeforeValidator(Named(registry, key, default, texts))


def spelled_out(by: Any) -> Any:
    """{keywords: ..} as {kind: keywords, keywords: ..}, and what `sql` is told as the text that it is short for."""
    if not isinstance(by, Mapping):
        return by
    if "kind" not in by and len(names := [key for key in by if key in ATTRIBUTES.names()]) == 1:
        by = {"kind": names[0], **by}
    return by["sql"] if by.keys() == {"kind", "sql"} and by["kind"] == "sql" else by


class Split(Strict):
    by: Annotated[
        str | SerializeAsAny[AttributeSettings], named(ATTRIBUTES, "kind", texts=True), BeforeValidator(spelled_out)
    ] = Field(
        description="The attribute: the name of a column, whatever it looks like, or else an SQL expression; or {kind: NAME, ..}, "
        "another source of its values (`spunge list attributes`). A list puts a row into several parts."
    )
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
    dtype: Dtype = Field(
        "base",
        description="What the merged checkpoint is written in: the base's own dtype, or another. Branches and controls are judged "
        "as they would be written so. float32 holds the merge whole, in twice the disk of a 16-bit base.",
    )
    rounding: Literal["auto", "nearest", "stochastic"] = Field(
        "auto",
        description="How sums are rounded to a 16-bit dtype. nearest loses what is below half a step of it; stochastic goes up or "
        "down by a fixed draw, so that small changes survive in the mean over many entries; auto: nearest, or stochastic where "
        "nearest would lose more than a tenth of the change.",
    )


Half = Literal["validation", "test"]


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
    half: Half | None = Field(
        None,
        description="Measure one half of its items, each subject's in half: validation to choose settings by, test to judge them "
        "by. The same halves whatever the seed. `spunge tune` sets it. Default: all items.",
    )
    by: str | None = Field(
        None,
        description="Column or SQL expression that names each row's subject. Default: split.by where the rows have it.",
    )
    subject: str | None = Field(
        None,
        description="Name under which all rows together are reported. Default: `all` where the rows have no subjects.",
    )
    group: Literal["forget", "keep"] | None = Field(
        None,
        description="What its rows are: to forget, such as benchmark questions about it, or to be kept; it decides which way is "
        "good. Default: subjects that are values of the split are to be forgotten, others kept.",
    )
    stages: list[str] | None = Field(
        None, description="Judge these alone, such as [base, merged, 'control:*', 'branch:*']. Default: every stage."
    )


# Settings that say which items an evaluation has and what it is called: for these stands the items' own hash.
ITEM_SETTINGS = frozenset(EvaluatorSettings.model_fields) - {"kind"}


class AttackSettings(Strict):
    kind: str = Field(description="Name of the attack (`spunge list attacks`).")


TRAININGS = ("joint", "random", "sequential")


class Control(Strict):
    """A baseline: what is trained, and how that becomes one model."""

    name: str = Field(
        pattern=STAGE_NAME,
        max_length=60,
        description="Names its stage, control:NAME, and its folder.",
    )
    train: Literal["parts", "joint", "random", "sequential"] = Field(
        "parts",
        description="parts: the run's own branches, merged otherwise. joint: the same method, samples and steps on all parts "
        "at once. random: the same samples split at random into parts of the same sizes, merged alike: is it the attribute "
        "that helps, or just splitting? sequential: one part after the other, each from the model that the one before left.",
    )
    merge: Annotated[SerializeAsAny[RuleSettings], named(RULES, "rule", "ties")] | None = Field(
        None,
        description="How its deltas become one model. Default: as the recipe's merge; joint and sequential: as they are.",
    )

    @model_validator(mode="after")
    def _says_something_else(self) -> "Control":
        if self.train == "parts" and self.merge is None:
            raise ValueError("the run's own branches, merged as the recipe says, are `merged`; give merge")
        if is_device(self.name):
            raise ValueError(
                f"the name {self.name!r} is a device's on Windows, and can be no folder there; give another"
            )
        if self.name in TRAININGS and (self.train != self.name or (self.merge and self.train != "random")):
            raise ValueError(f"the name {self.name!r} is kept for {{train: {self.name}}} without a merge of its own")
        return self


def _controls(value: Any, info: ValidationInfo) -> Any:
    """`joint`, `random`, `sequential` and a merge rule's name are short for a control of that name. A merge of a control's own
    is written as the recipe's is, where it does not say otherwise: what is compared has one precision."""
    if not isinstance(value, list):
        return value
    merge = info.data.get("merge")
    written = {} if merge is None else {"dtype": merge.dtype, "rounding": merge.rounding}
    return [_written_as(_control(item) if isinstance(item, str) else item, written) for item in value]


def _written_as(control: Any, written: Mapping[str, Any]) -> Any:
    own = control.get("merge") if isinstance(control, Mapping) else None
    own = {"rule": own} if isinstance(own, str) else own
    return {**control, "merge": {**written, **own}} if isinstance(own, Mapping) else control


def _control(name: str) -> dict[str, Any]:
    if name in TRAININGS:
        return {"name": name, "train": name}
    if name in RULES.names():
        return {"name": name, "train": "parts", "merge": {"rule": name}}
    raise RecipeError(f"controls: no control {name!r}{suggestion(name, [*TRAININGS, *RULES.names()])}")


class Calibrate(Strict):
    """Set the scale of everything that unlearned so that a metric keeps a share of the base's."""

    evaluation: str = Field(
        description="Name of an evaluation. Half of its items, of each subject, are for this; the other half alone is judged."
    )
    metric: str = Field(description="A metric that it measures, such as perplexity.")
    subject: str | None = Field(
        None, description="What must be kept: one of its subjects. Default: its only one, or that of all rows."
    )
    keep: float = Field(
        0.95, gt=0, le=1, description="Share of the base's: value / base, or base / value where less is better."
    )
    max_scale: float = Field(4.0, gt=0, description="The largest scale.")
    tries: int = Field(8, ge=2, description="Scales that are tried for each model, at most.")
    tolerance: float = Field(
        0.005, ge=0, description="A scale that keeps so little more than the share is near enough."
    )
    seed: int = Field(0, ge=0, description="Of the halves.")


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
    reference: Annotated[Reference | None, BeforeValidator(_referred)] = Field(
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
    merge: Annotated[SerializeAsAny[RuleSettings], named(RULES, "rule", "ties")] = Field(
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
    calibrate: Calibrate | None = Field(
        None,
        description="Compare at equal cost: the merged model and every control get the largest scale at which a metric keeps its "
        "share of the base's. Default: `merge.scale`, and controls as they are.",
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
        for name, aggregate in self.aggregates.items():
            self._refuse_aggregate(name, aggregate, known)
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
        for name in controls:
            if controls.count(name) > 1:
                raise ValueError(f"controls: two controls are called {name!r}; give each a name of its own")
        if self.calibrate is not None:
            self._refuse_calibration(self.calibrate, dict(zip(names, self.evaluate, strict=True)))
        judged = [model.name for model in self.judge or ()]
        for name in judged:
            if judged.count(name) > 1:
                raise ValueError(f"judge: two models are called {name!r}; give each a name of its own")
        if self.retain is None and self.unlearn is not None:
            _refuse_without_retain(self.unlearn)
        if self.model.train_in is not None:
            _refuse_beside_packed(self)
        for entry in self.evaluate:
            EVALUATORS.get(entry.kind).check(entry, self)
        return self

    def _refuse_calibration(self, calibrate: Calibrate, evaluations: Mapping[str, EvaluatorSettings]) -> None:
        """Raises ValueError for a calibration by what cannot be measured at several scales, or of what has no scale."""
        entry = evaluations.get(calibrate.evaluation)
        if entry is None:
            known = suggestion(calibrate.evaluation, evaluations)
            raise ValueError(f"calibrate.evaluation: no evaluation is called {calibrate.evaluation!r}{known}")
        evaluator = EVALUATORS.get(entry.kind)
        if measured_again(entry) is not None or not evaluator.reads_rows or evaluator.compares_texts:
            why = "measures another one again" if measured_again(entry) else "brings items of its own"
            why = "compares with what the base wrote" if evaluator.compares_texts else why
            raise ValueError(f"calibrate.evaluation: {calibrate.evaluation!r} ({entry.kind}) {why}; name another")
        if self.unlearn is None:
            raise ValueError("calibrate: nothing is unlearned, and nothing has a scale; leave it out")
        merges = {"merge": self.merge} | {
            f"controls.{place}.merge": control.merge for place, control in enumerate(self.controls) if control.merge
        }
        for setting, merge in merges.items():
            if (scale := type(merge).model_fields.get("scale")) is None:
                raise ValueError(
                    f"{setting}.rule: {merge.rule!r} has no scale, which calibrate sets; take another rule"
                )
            if (given := vars(merge)["scale"]) != scale.default:
                raise ValueError(f"{setting}.scale: {given!r}: calibrate sets it; leave one of the two out")

    def _refuse_aggregate(
        self, name: str, aggregate: HarmonicMean | RankTest | PrivLeak, evaluations: set[str]
    ) -> None:
        """Raises ValueError for an aggregate of what is not there, or against what is no reference."""
        if name in evaluations or not name.strip():
            raise ValueError(f"aggregates: {name!r} is an evaluation's name, or none; give another")
        for term in terms_of(aggregate):
            if term.evaluation not in evaluations:
                raise ValueError(
                    f"aggregates.{name}: no evaluation is called {term.evaluation!r}{suggestion(term.evaluation, evaluations)}"
                )
        if isinstance(aggregate, HarmonicMean):
            return
        there = [] if self.reference is None else [f"reference:{self.reference.name}"]
        there += [f"model:{model.name}" for model in self.judge or ()]
        known = " or ".join(there) or "give reference: retrained, or reference.path"
        if aggregate.against == "base":
            raise ValueError(
                f"aggregates.{name}.against: the base knows what is to be forgotten, so that likeness to it is no forgetting; "
                f"compare with a model that never saw it ({known})"
            )
        if aggregate.against not in there:
            raise ValueError(
                f"aggregates.{name}.against: {aggregate.against!r} is no reference of this recipe; {known}"
            )


def _refuse_without_retain(unlearn: MethodSettings) -> None:
    """Raises ValueError where a method needs retain rows."""
    needs_retain = METHODS.get(unlearn.method).needs_retain
    if needs_retain(unlearn):
        alpha = "" if needs_retain(unlearn.model_copy(update={"alpha": 0.0})) else "set unlearn.alpha to 0, "
        raise ValueError(
            f"retain: missing, and unlearn.method {unlearn.method!r} needs it; give retain.source, write `retain: "
            f"neutral` (paragraphs of Wikipedia), {alpha}or take a method that needs none, such as tvn or ga"
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


def evaluation_name(entry: EvaluatorSettings) -> str:
    return entry.name or entry.kind


def measured_again(entry: EvaluatorSettings) -> str | None:
    """Name of the evaluation whose items an evaluation measures again, after an attack."""
    return EVALUATORS.get(entry.kind).of(entry)
