"""The rows and fields of results.json. What is not known of a row is left out of the file, and is None here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, Strict
from pydantic.json_schema import SkipJsonSchema

from spunge.results.directions import Wanted
from spunge.results.values import Real, Score, json_value

SCHEMA: Final = 1
UNTAUGHT: Final = "untaught"  # the stage of the given model, where the base is what it was taught
Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
SMALL_SAMPLE: Final = 10  # fewer items are called few, and their means get Student's t
FEWEST_CERTAIN: Final = (
    6  # items that can show a change by their signs alone: 2 * 0.5**5 is more than 0.05, 2 * 0.5**6 less
)
Kind = Literal["base", "reference", "model", "branch", "control", "merged", "other"]
Group = Literal["forget", "together", "keep", "worst"]
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
