"""What RUN/results.json holds: typed rows, their reader, writer and JSON Schema. A run writes it, the report reads it.

    results = spunge.read_results("runs/demo")
    [row.value for row in results.rows if row.group == "forget"]

A number that JSON has no word for stands there as "NaN", "Infinity" or "-Infinity", as Protocol Buffers writes them. What
is not known of a row is left out of the file, and is None here.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from spunge.errors import RecipeError, redacted
from spunge.files import parse_json, write_text

FILE = "results.json"
SUBJECTS = "evaluation/subjects.json"  # in RUN, beside it: which items each evaluation's subjects have
SCHEMA: Final = 1
UNTAUGHT: Final = "untaught"  # the stage of the given model, where the base is what it was taught
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TOLD = {"missing": "missing", "tuple_type": "it should be a list", "dataclass_type": "it should be a mapping"}
ANEW = "`spunge run` into its folder writes it anew"


def _real(value: Any) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.60} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number too large") from None


def _score(value: Any) -> float:
    return math.nan if value is None else _real(value)


_NUMBER = WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]})
Real = Annotated[float, BeforeValidator(_real), _NUMBER]
Score = Annotated[float, BeforeValidator(_score), _NUMBER]  # null is read as NaN, which some programs write so
Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
SMALL_SAMPLE: Final = 10  # fewer items are called few, and their means get Student's t
FEWEST_CERTAIN: Final = (
    6  # items that can show a change by their signs alone: 2 * 0.5**5 is more than 0.05, 2 * 0.5**6 less
)
Kind = Literal["base", "reference", "model", "branch", "control", "merged", "other"]
Group = Literal["forget", "together", "keep", "worst"]
Wanted = Literal["up", "down", "near"]  # near: a value that lies as near as can be to a target
# What a higher value says: the model knows or can do what the items are about, does not, or is better or worse whatever
# the items are. None: none of these.
Higher = Literal["known", "unknown", "good", "bad"] | None

StageName = Annotated[
    str,
    Field(
        description="The judged model: base, untaught, reference:NAME, model:NAME, branch:SLUG, control:NAME or merged."
    ),
]
SubjectName = Annotated[
    str, Field(description="What the items are about: a part's value, a group of rows, a benchmark.")
]
MetricName = Annotated[
    str, Field(description="What was measured, in words; all that the words tell is a field of its own.")
]
Attacked = Annotated[str | None, Field(description="The metric that this one measures again, under an attack.")]
Low = Annotated[Real | None, Field(description="Lower end of the 95% interval.")]
High = Annotated[Real | None, Field(description="Upper end of the 95% interval.")]
ItemCount = Annotated[Count | None, Field(description="Items that it is measured on.")]
Direction = Annotated[
    Wanted | None,
    Field(
        description="Which way is good here: what is known should go `down` on what is to be forgotten and stay `up` on what is to "
        "be kept; `near`: the nearer to `target` the better. Left out where no way is, as on all rows together with those to keep "
        "among them."
    ),
]
Target = Annotated[
    Real | None,
    Field(
        description="What it should be `near`: 0.5 of an AUROC that tells members from others, where more and less give them away."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A value of the attribute, whose rows were to be forgotten."""

    value: Annotated[str, Field(description="The attribute's value.")]
    slug: Annotated[str, Field(description="Its folder's name in RUN/branches.")]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The scale that was set for a model so that a metric keeps a share of the base's."""

    evaluation: Annotated[str, Field(description="Half of whose items were for this.")]
    metric: Annotated[str, Field(description="What is kept.")]
    subject: Annotated[str, Field(description="On which of its subjects.")]
    keep: Annotated[Real, Field(description="The share of the base's that was asked for.")]
    scale: Annotated[Real, Field(description="The scale that the model has.")]
    reached: Annotated[Flag, Field(description="Whether it keeps so much, and a larger scale would not.")]
    bound: Annotated[
        Literal["low", "high"] | None,
        Field(
            description="Where it was not reached: `high`, the largest scale keeps more; `low`, the smallest that was tried less."
        ),
    ] = None
    share: Annotated[Score, Field(description="The share that is kept, on the items that it was set by.")]
    value: Annotated[Score, Field(description="The metric there.")]
    base: Annotated[Score, Field(description="The base's.")]
    n: Annotated[Count, Field(description="Items of the subject that it was set by.")]
    rows: Annotated[str, Field(description="Fingerprint of the items, of which none is judged.")]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How small models shift a larger one's logits: the sum is what was judged."""

    kind: Annotated[str, Field(description="offset, dexperts or gedi, as the recipe's `decode.kind`.")]
    model: Annotated[str, Field(description="The larger model, of which no weight changed: Hub id or folder.")]
    revision: Annotated[str | None, Field(description="Branch, tag or commit of it.")] = None
    alpha: Annotated[Real, Field(description="What the offset is multiplied by.")]
    merge: Annotated[
        Literal["sum", "mean", "ties"] | None,
        Field(
            description="How the offsets of several small models were merged, as logits; none where one small model gives the "
            "offset, whose weights are what the other fields tell."
        ),
    ] = None
    density: Annotated[Real | None, Field(description="Of ties: share of the vocabulary kept at a position.")] = None
    top_p: Annotated[Real | None, Field(description="Of dexperts: the larger model's nucleus.")] = None
    expert: Annotated[
        Literal["retain", "small"] | None,
        Field(
            description="Of dexperts: what the expert learned the rows to keep by, or that it is the small model as it is."
        ),
    ] = None
    through: Annotated[
        Literal["sum", "alone"] | None,
        Field(description="Of offset: whether the small model was trained through the larger one's logits, or alone."),
    ] = None
    rho: Annotated[
        Real | None,
        Field(description="Of gedi: the mass that the likeliest desired tokens keep; 1: no token is left out."),
    ] = None
    tau: Annotated[
        Real | None, Field(description="Of gedi: tokens that are desired with this probability are kept in any case.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was judged as a stage."""

    stage: StageName
    kind: Annotated[
        Kind,
        Field(description="What it is. reference, model: judged as it is; other: of another program's file."),
    ]
    name: Annotated[
        str, Field(description="A branch's part, a control's, reference's or model's name, else the stage.")
    ]
    base: Annotated[
        str | None, Field(description="The model that the recipe names as the base, or as this one: Hub id or folder.")
    ] = None
    revision: Annotated[str | None, Field(description="Branch, tag or commit of it.")] = None
    taught: Annotated[Count | None, Field(description="Rows that it was taught before all else.")] = None
    base_fingerprint: Annotated[
        str | None, Field(description="Of the weights of the stage `base`, which this model is made from.")
    ] = None
    train: Annotated[
        Literal["parts", "joint", "random", "sequential"] | None,
        Field(
            description="How the parts were unlearned: each from the base, all at once, dealt out at random, in a row."
        ),
    ] = None
    parts: Annotated[
        tuple[str, ...] | None,
        Field(description="What was unlearned, in that order; `random N` of rows dealt out at random."),
    ] = None
    method: Annotated[str | None, Field(description="The unlearning method.")] = None
    settings: Annotated[
        Mapping[str, Any] | None, Field(description="The method's, with what it chose itself (at the first seed).")
    ] = None
    rule: Annotated[str | None, Field(description="The merge rule; none where nothing was merged.")] = None
    density: Annotated[Real | None, Field(description="The rule's, where it is one number.")] = None
    scale: Annotated[Real | None, Field(description="The rule's.")] = None
    merge: Annotated[Mapping[str, Any] | None, Field(description="The rule's other settings.")] = None
    calibration: Annotated[
        tuple[Calibration, ...] | None,
        Field(description="How its scale was set, for each seed; `scale` is the first's."),
    ] = None
    decode: Annotated[
        Decoding | None,
        Field(description="How it shifts a larger model, which is then what was judged; none where weights changed."),
    ] = None
    seeds: Annotated[
        tuple[Count, ...] | None, Field(description="It was trained once with each; none where all share it.")
    ] = None

    @property
    def label(self) -> str:
        """As sentences call it."""
        if self.kind == "reference":
            return f"{self.name} reference" if self.stage != self.name else f"{self.name} model"
        return {"branch": f"branch {self.name}", "control": f"{self.name} control"}.get(self.kind, self.name)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The score of a model by a metric on a subject."""

    stage: StageName
    subject: SubjectName
    metric: MetricName
    value: Annotated[Score, Field(description="The score; with several seeds their mean.")]
    low: Low = None
    high: High = None
    n: ItemCount = None
    wanted: Direction = None
    target: Target = None
    chance: Annotated[Real | None, Field(description="What guessing gives.")] = None
    below_chance: Annotated[Flag | None, Field(description="Whether the whole interval lies below chance.")] = None
    spread: Annotated[
        Real | None, Field(description="Standard deviation over the seeds, of which there are several.")
    ] = None
    of: Attacked = None
    side: Annotated[Flag, Field(description="A check on another metric, to be told of only where it changed.")] = False
    evaluation: Annotated[str | None, Field(description="Name of the evaluation.")] = None
    group: Annotated[
        Group,
        Field(
            description="What the subject is: `forget`, a part to forget; `keep`, to be kept; `together`, all rows, with those "
            "to forget among them; `worst`, the worst of the evaluation's other subjects."
        ),
    ]
    worst_of: Annotated[str | None, Field(description="Of a worst subject: the name of all rows together.")] = None
    attack: Annotated[str | None, Field(description="The kind of attack that the model was under.")] = None
    label: Annotated[str | None, Field(description="What the recipe calls the attack.")] = None
    curve: Annotated[
        str | None,
        Field(description="The same for all metrics that are points of one curve: their name, N in place of `at`."),
    ] = None
    at: Annotated[Real | None, Field(description="Where on the curve.")] = None
    unit: Annotated[
        str | None, Field(description="What `at` counts: `steps`, 0 of which leave the model as it is, or `block`.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model against another by a metric on the same items, paired by item."""

    stage: StageName
    against: Annotated[str, Field(description="The stage that it is compared with.")]
    subject: SubjectName
    metric: MetricName
    kind: Annotated[
        Literal["difference", "ratio"],
        Field(description="stage - against; stage / against of metrics that are exponents."),
    ]
    value: Annotated[Score, Field(description="The difference, or the ratio.")]
    low: Low = None
    high: High = None
    n: ItemCount = None
    changed: Annotated[Count | None, Field(description="Items that were not measured the same at both stages.")] = None
    wanted: Annotated[Wanted | None, Field(description="As in the rows.")] = None
    target: Annotated[Real | None, Field(description="As in the rows.")] = None


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The share of what was forgotten for certain that an attack brings back."""

    stage: StageName
    subject: SubjectName
    metric: MetricName
    of: Attacked = None
    value: Annotated[Score, Field(description="(attacked - after) / (before - after): 0 nothing, 1 all of it.")]
    low: Low = None
    high: High = None
    n: ItemCount = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What some metrics were measured with. Runs are comparable where rows and instrument are the same."""

    name: Annotated[str, Field(description="As the recipe calls it.")]
    kind: Annotated[str, Field(description="The evaluator.")]
    metrics: Annotated[tuple[str, ...], Field(description="What it measured.")]
    overall: Annotated[str | None, Field(description="The subject of all rows, with those to forget among them.")] = (
        None
    )
    rows: Annotated[str, Field(description="Fingerprint of the items.")]
    settings: Annotated[
        Mapping[str, Any] | None,
        Field(description="The evaluator's settings, but for the names of columns and of rows."),
    ] = None
    instrument: Annotated[
        Mapping[str, Any] | None,
        Field(description="What it measures with beyond its settings, such as a scorer's revision."),
    ]
    remarks: Annotated[
        tuple[str, ...], Field(description="What to look at before its scores are believed, a sentence each.")
    ] = ()


@dataclass(frozen=True, kw_only=True)
class Point:
    """A metric after so many steps of a training."""

    step: Annotated[Count, Field(description="Optimizer steps; after 0 the model is what the training started from.")]
    value: Annotated[Score, Field(description="The score.")]
    low: Low = None
    high: High = None


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A metric that a model was measured by while it trained, on a few items."""

    training: Annotated[
        str, Field(description="branch:SLUG, control:NAME, or control:NAME/SLUG of one that is several.")
    ]
    name: Annotated[str, Field(description="The same as people read it.")]
    seed: Annotated[Count, Field(description="That it was trained with.")]
    evaluation: Annotated[str, Field(description="Name of the evaluation.")]
    metric: MetricName
    subject: Annotated[
        str, Field(description="What the items are about; `all parts` of a training that unlearns several.")
    ]
    wanted: Direction = None
    target: Target = None
    beside: Annotated[Flag, Field(description="Of what must be kept, beside the metric that is watched.")] = False
    n: Annotated[Count, Field(description="Items that it is measured on.")]
    rows: Annotated[str, Field(description="Fingerprint of the items.")]
    every: Annotated[Count, Field(description="Steps between two measurements.")]
    points: Annotated[tuple[Point, ...], Field(description="The curve.")]
    trained: Annotated[Count, Field(description="The last step.")]
    kept: Annotated[Count, Field(description="The step whose weights were saved: the last one, or the best.")]
    keep: Annotated[
        Literal["last", "best"],
        Field(description="Which step was to be kept. best: chosen by these curves, on items that are judged nowhere."),
    ]
    asked: Annotated[
        Real | None, Field(description="The share of the base's that the metric beside was to keep at the best step.")
    ] = None
    share: Annotated[Score | None, Field(description="The share that it keeps there.")] = None
    reached: Annotated[
        Flag | None, Field(description="Whether some step keeps so much; else the one that keeps most was saved.")
    ] = None
    seconds: Annotated[Real, Field(description="That all measurements of the training took.")]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A paper's figure, to stand beside the run's own."""

    stage: StageName
    subject: SubjectName
    metric: MetricName
    value: Annotated[Score, Field(description="As printed.")]
    source: Annotated[str, Field(description="Paper and table.")]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run."""

    schema: Annotated[Literal[1], Field(description="The format. It rises where a field gets another meaning.")] = (
        SCHEMA
    )
    spunge: Annotated[str | None, Field(description="The version that wrote it.")] = None
    attribute: Annotated[str | None, Field(description="Column or SQL expression that the rows were split by.")] = None
    parts: Annotated[tuple[Part, ...], Field(description="What was to be forgotten.")] = ()
    stages: Annotated[tuple[str, ...], Field(description="Every judged model.")] = ()
    models: Annotated[tuple[Model, ...], Field(description="Every judged model, and what it is.")] = ()
    versions: Annotated[Mapping[str, str], Field(description="Of what results may depend on.")] = field(
        default_factory=dict
    )
    device: Annotated[str | None, Field(description="Where the model was.")] = None
    dtype: Annotated[str | None, Field(description="Its arithmetic.")] = None
    seconds: Annotated[
        Real | None,
        Field(description="What all stages took that this run made, whenever; those taken from other runs took none."),
    ] = None
    peak_memory: Annotated[Count | None, Field(description="Bytes of the process at its peak.")] = None
    rows: Annotated[tuple[Row, ...], Field(description="The scores.")]
    differences: Annotated[
        tuple[Difference, ...],
        Field(description="Every model against the base, the merged one against controls and references."),
    ] = ()
    recovered: Annotated[tuple[Recovered, ...], Field(description="What attacks bring back.")] = ()
    evaluations: Annotated[tuple[Evaluation, ...], Field(description="What it was measured with.")] = ()
    watched: Annotated[tuple[Watched, ...], Field(description="Curves of the trainings that were watched.")] = ()
    published: Annotated[tuple[Published, ...], Field(description="A paper's figures.")] = ()
    seeds: Annotated[Count, Field(description="How often everything was trained and judged.")] = 1
    folder: SkipJsonSchema[Path] = Path()  # of the run; not in the file

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds, as JSON values."""
        names = [each.name for each in dataclasses.fields(self) if each.name != "folder"]
        return {name: json_value(vars(self)[name]) for name in names}

    def value(self, stage: str, subject: str, metric: str) -> float:
        """One score. Raises KeyError when it was not measured."""
        for row in self.rows:
            if (row.stage, row.subject, row.metric) == (stage, subject, metric):
                return row.value
        raise KeyError((stage, subject, metric))


def wanted(higher: Higher, forget: bool | None) -> Wanted | None:
    """Which way is good. `forget`: whether the items are to be forgotten (True) or kept; None: some of either.

    >>> wanted("known", True), wanted("known", False), wanted("known", None), wanted("bad", None)
    ('down', 'up', None, 'down')
    """
    if higher in ("good", "bad"):
        return "up" if higher == "good" else "down"
    if higher is None or forget is None:
        return None
    return "down" if (higher == "known") == forget else "up"


def merit(value: float, wanted: Wanted, target: float | None = None) -> float:
    """How good a value is: the greater the better.

    >>> merit(0.3, "up"), merit(0.3, "down"), merit(0.375, "near", 0.5), merit(0.625, "near", 0.5)
    (0.3, -0.3, -0.125, -0.125)
    """
    if wanted == "near":
        return -abs(value - (target or 0.0))
    return value if wanted == "up" else -value


def write_results(results: Results) -> None:
    """Write results.json into the run's folder. Raises RecipeError where that cannot be written."""
    write_text(results.folder / FILE, results_json(results))


def results_json(results: Results) -> str:
    """The text of results.json."""
    return redacted(json.dumps(results.content, indent=2, ensure_ascii=False)) + "\n"


def json_value(value: Any) -> Any:
    """As JSON values: a dataclass as a mapping without what is at its default, a number that is not finite as its name."""
    if is_dataclass(value):
        known = {each.name: vars(value)[each.name] for each in dataclasses.fields(value) if not _left_out(value, each)}
        return {name: json_value(inner) for name, inner in known.items()}
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def real(value: Any) -> Any:
    """A number that a file has as a name; anything else as it is."""
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _left_out(value: Any, of: dataclasses.Field[Any]) -> bool:
    return of.default is not MISSING and vars(value)[of.name] == of.default


def read_results(place: str | Path) -> Results:
    """Read a run's results; `place`: its folder, or the file. Files of older versions are read as well.

    Raises RecipeError where there are none, and where the file is damaged or holds something else.
    """
    file = Path(place) if os.path.isfile(place) else Path(place) / FILE
    try:
        content = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{str(place)!r} holds no {FILE}; give the folder of a finished run (spunge run)") from None
    except OSError as error:
        raise RecipeError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{str(file)!r} is damaged: it is not JSON ({error}); {ANEW}") from None
    return replace(parse_results(content, str(file)), folder=file.parent)


def parse_results(content: Any, file: str = FILE) -> Results:
    """The results that a JSON value holds. Raises RecipeError, with the file's name, where it does not hold any."""
    damaged = f"{file!r} is damaged, or holds something else than results"
    if not isinstance(content, dict) or "rows" not in content:
        raise RecipeError(f"{damaged}: it has no rows ({content!r:.40}); {ANEW}")
    if content.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(
            f"{file!r} has schema {content['schema']!r:.60}; this version of spunge reads {SCHEMA}; update it"
        )
    try:
        known = {key: value for key, value in content.items() if key != "folder"}
        known = known if "models" in known else _of_older_version(known)
        results = _reader().validate_python(_with_wanted(known))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        told = TOLD.get(first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "it should"))
        raise RecipeError(f"{damaged}: {'.'.join(map(str, first['loc']))}: {told}; {ANEW}") from None
    stages = [model.stage for model in results.models]
    if stages != list(results.stages):
        raise RecipeError(f"{damaged}: stages and models name different ones; {ANEW}")
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(results.rows):
        key = (row.stage, row.subject, row.metric)
        if key in seen:
            raise RecipeError(
                f"{damaged}: rows.{number}: {row.metric!r} on {row.subject!r} at {row.stage!r} again; {ANEW}"
            )
        if row.stage not in stages:
            raise RecipeError(f"{damaged}: rows.{number}: {row.stage!r} is none of its models; {ANEW}")
        seen.add(key)
    return results


@cache
def _reader() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of what this version writes."""
    schema: dict[str, Any] = _untitled(_reader().json_schema())
    optional = [
        told
        for each in schema["$defs"].values()
        for name, told in each["properties"].items()
        if name not in each["required"]
    ]
    for told in optional:  # what is at its default is left out of the file
        told.pop("default")
        if "anyOf" in told:
            told["anyOf"].remove({"type": "null"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "required": list(schema["properties"])}


def _untitled(schema: Any) -> Any:
    """Without pydantic's titles, which say the names again."""
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(each) for key, each in schema.items() if key != "title" or not isinstance(each, str)}


# ---- files of versions before `wanted`: `higher_is_better` says it of what is to be kept


def higher_of_older_version(metric: str, higher_is_better: bool) -> Higher:
    """What a higher value says, of a metric that a version before `wanted` wrote: it counted perplexity, whose good way depends
    on the rows, with toxicity, whose good way does not."""
    if higher_is_better:
        return "known"
    perplexity = "perplexity" in metric and not metric.startswith("completion perplexity")
    return "unknown" if perplexity else "bad"


def _with_wanted(content: Mapping[str, Any]) -> dict[str, Any]:
    """With `wanted` in the rows that say `higher_is_better` in its place. What is damaged stays as it is."""
    if not isinstance(content["rows"], list):
        return dict(content)
    forget = {"forget": True, "keep": False}
    rows = []
    for row in content["rows"]:
        if isinstance(row, Mapping) and "higher_is_better" in row and "wanted" not in row:
            metric, better = str(row.get("of") or row.get("metric")), row["higher_is_better"]
            group = forget.get(str(row.get("group")))
            way = wanted(higher_of_older_version(metric, better), group) if isinstance(better, bool) else better
            row = {**{key: value for key, value in row.items() if key != "higher_is_better"}, "wanted": way}
        rows.append(row)
    return {**content, "rows": rows}


# ---- files of versions before `models`: the names of stages, subjects and metrics carry what are fields today

NAMES = ("stage", "subject", "metric")


def _of_older_version(content: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that such a file lacks, read off its names. Rows alone suffice. What is damaged stays as it is."""
    if any(not isinstance(content.get(key, []), list) for key in ("rows", "parts", "stages", "evaluations")):
        return {**content, "models": []}
    rows = [dict(row) if isinstance(row, Mapping) else row for row in content["rows"]]
    named = [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in NAMES)]
    parts = {str(part.get("value")): str(part.get("slug")) for part in _mappings(content, "parts")}
    stages = list(content.get("stages", []))
    stages += [stage for stage in dict.fromkeys(row["stage"] for row in named) if stage not in stages]
    # Without an attribute the one part is called `all`, as are rows without subjects: nothing tells them apart.
    forgotten = set() if content.get("attribute") is None and parts.keys() <= {"all"} else set(parts)
    for metric in dict.fromkeys(row["metric"] for row in named):
        mine = [row for row in named if row["metric"] == metric]
        reporting = [entry for entry in _mappings(content, "evaluations") if metric in _list(entry, "metrics")]
        _group(mine, forgotten, {"all", *(str(entry.get("overall")) for entry in reporting)})
    _curves([row for row in named if isinstance(row.get("of"), str)])
    branches = {f"branch:{slug}": value for value, slug in parts.items()}
    models = [_model(stage, branches) for stage in stages if isinstance(stage, str)]
    return {**content, "rows": rows, "stages": stages, "models": models}


def _model(stage: str, parts: Mapping[str, str]) -> dict[str, str]:
    kind, _, name = stage.partition(":")
    if kind in ("branch", "control") and name:
        return {"stage": stage, "kind": kind, "name": parts.get(stage, name)}
    return {"stage": stage, "kind": stage if stage in ("base", "merged") else "other", "name": stage}


def _group(rows: Sequence[dict[str, Any]], forgotten: set[str], overall: set[str]) -> None:
    """Fill in the groups of one metric's subjects."""
    subjects = {row["subject"] for row in rows}
    for row in rows:
        subject = row["subject"]
        held = subject.removeprefix("worst of ") if subject != "worst" else "all"
        if subject in forgotten:
            row["group"] = "forget"
        elif subject in overall and (not forgotten or subjects & forgotten):
            row["group"] = "together"
        elif subject == "worst" or held in subjects - {subject}:
            row |= {"group": "worst", "worst_of": held}
        else:
            row["group"] = "keep"


def _curves(rows: Sequence[dict[str, Any]]) -> None:
    """Metrics that are called alike but for one number are a curve along it."""
    number = re.compile(r"\d+(?:\.\d+)?")
    families: dict[tuple[str, str], dict[str, list[re.Match[str]]]] = {}
    for row in rows:
        metric = row["metric"]
        alike = families.setdefault((row["of"], number.sub("#", metric)), {})
        alike[metric] = list(number.finditer(metric))
    points: dict[str, dict[str, Any]] = {}
    for family in families.values():
        columns = [{match.group() for match in column} for column in zip(*family.values(), strict=True)]
        differing = [column for column, numbers in enumerate(columns) if len(numbers) > 1]
        for metric, matches in family.items() if len(differing) == 1 else ():
            start, stop = matches[differing[0]].span()
            unit = {"unit": "steps"} if "step" in metric else {}
            points[metric] = {"curve": f"{metric[:start]}N{metric[stop:]}", "at": float(metric[start:stop]), **unit}
    for row in rows:
        row |= points.get(row["metric"], {})


def _mappings(content: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    yield from (value for value in _list(content, key) if isinstance(value, Mapping))


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    return value if isinstance(value := content.get(key), list) else []
