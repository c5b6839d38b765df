"""The references that are made of the code, docs/recipe.md and docs/results-json.md: `python scripts/check_docs.py --write`."""

import dataclasses
import functools
import inspect
import json
import re
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from spunge.cli.listing import (
    NAMING,
    REGISTRIES,
    block_name,
    blocks_of,
    listing,
    reads_text,
    settings_of,
)
from spunge.recipe.aggregates import HarmonicMean, PrivLeak, RankTest
from spunge.recipe.block import Strict
from spunge.recipe.calibration import Calibrate
from spunge.recipe.decoding import DExperts, GeDi, Offset
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.merging import Control, RuleSettings
from spunge.recipe.model import ModelSettings
from spunge.recipe.reference import JudgedModel, Reference
from spunge.recipe.rows import ForgetRows, Rows, Source
from spunge.recipe.schema import Published, Recipe
from spunge.recipe.split import Split
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import DescentSettings
from spunge.recipe.watching import Beside, Watch
from spunge.results import NOT_FINITE, json_schema
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.outputs import OutputSettings
from spunge.unlearning.refusals import RefusalSettings

BLOCKS: dict[str, type[Strict]] = {
    "model": ModelSettings,
    "teach": TeachSettings,
    "forget": ForgetRows,
    "source (of forget, retain and evaluate)": Source,
    "split": Split,
    "retain": Rows,
    "decode": Offset,
    "decode: dexperts": DExperts,
    "decode: gedi": GeDi,
    "reference": Reference,
    "judge (each)": JudgedModel,
    "controls (each)": Control,
    "calibrate": Calibrate,
    "watch": Watch,
    "watch.beside": Beside,
    "aggregates (each): harmonic_mean": HarmonicMean,
    "aggregates (each): ks": RankTest,
    "aggregates (each): privleak": PrivLeak,
    "published (each)": Published,
}
# Settings that several values share stand once, under these titles; a value's own table has what is new or differs.
SHARED: dict[type[Strict], str] = {
    DescentSettings: "teach and unlearn: every training",
    TrainingSettings: "unlearn: every method that trains",
    OutputSettings: "unlearn: every method on the model's outputs",
    RefusalSettings: "unlearn: every method that teaches refusals",
    RuleSettings: "merge: every rule",
    EvaluatorSettings: "evaluate: every evaluator",
}
NAMES = "What can be named"
SIGNS = {Gt: ">", Ge: "≥", Lt: "<", Le: "≤"}
KEYS = {
    "methods": "unlearn.method",
    "rules": "merge.rule",
    "evaluators": "evaluate.kind",
    "attacks": "evaluate.attack",
    "scorers": "evaluate.scorer",
    "attributes": "split.by",
    "executors": "execution",
    "trackers": "track",
}


def reference() -> str:
    """The recipe reference as Markdown."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from the code by `python scripts/check_docs.py --write`; do not edit.",
        "",
        "A recipe is a YAML file. Unknown keys are refused; `--set a.b=value` overrides any key; `RUN/recipe.yaml` holds the",
        "recipe with every default filled in. Relative paths are relative to the recipe's file, in `--set` to the working",
        "directory.",
        "",
        "| block | what |",
        "|---|---|",
    ]
    lines += [f"| {linked(name, info)} | {info.description or ''} |" for name, info in Recipe.model_fields.items()]
    lines += ["", f"## {NAMES}", "", "| setting | names |", "|---|---|"]
    for kind, key in KEYS.items():
        names = [link(f"{key}: {name}", name) for name in REGISTRIES[kind].names()]
        lines.append(f"| `{key}` | {', '.join(names)} |")
    for title, block in BLOCKS.items():
        lines += ["", f"## {title}", "", *with_shared(block, "")]
    told: set[type[Strict]] = set()
    for kind, key in KEYS.items():
        for entry in listing(kind):
            block = REGISTRIES[kind].get(entry["name"]).settings
            for base in shared_by(block):
                if base not in told:
                    told.add(base)
                    lines += ["", f"## {SHARED[base]}", "", *with_shared(base, NAMING[kind])]
            lines += ["", f"## {key}: {entry['name']}", "", *described(entry), *with_shared(block, NAMING[kind])]
    for block in inner_titles():
        lines += ["", f"## {inner_titles()[block]}", "", *inner_section(block)]
    return "\n".join(lines) + "\n"


def linked(name: str, info: FieldInfo) -> str:
    """A block of the recipe, as a link to its section."""
    sections = {
        **dict.fromkeys(("merge", "unlearn", "evaluate", "execution"), NAMES),
        **{title: title for title in BLOCKS},
    }
    held = [section_of(block) for block in blocks_of(info)]
    title = sections.get(name) or next(iter(held), None)
    return link(title, f"`{name}`") if title else f"`{name}`"


def link(title: str, text: str) -> str:
    return f"[{text}](#{anchor(title)})"


@functools.cache
def inner_titles() -> dict[type[Strict], str]:
    """The blocks that are neither in BLOCKS nor a registry's, and their headings: what holds them, what tells them apart."""
    holders: dict[type[Strict], set[str]] = {}
    registered = [REGISTRIES[kind].get(name).settings for kind in KEYS for name in REGISTRIES[kind].names()]
    for block in [*BLOCKS.values(), *registered]:
        gather(block, holders)
    return {block: f"{', '.join(sorted(names))}: `{block_name(block)}`" for block, names in holders.items()}


def section_of(block: type[Strict]) -> str:
    """The heading of a block that a setting may hold."""
    return next((title for title, each in BLOCKS.items() if each is block), None) or inner_titles()[block]


RESULTS_HEAD = """# results.json

Generated from the code by `python scripts/check_docs.py --write`; do not edit. The same as a JSON Schema:
[results.schema.json](results.schema.json).

`RUN/results.json` holds what a run measured. In Python, `spunge.run` returns it and `spunge.read_results` reads it; each object
below is a frozen dataclass of `spunge.results`:

```python
results = spunge.read_results("runs/demo")
results.value("merged", "Europe", "accuracy")
[row.value for row in results.rows if row.stage == "merged" and row.group == "forget"]
```

Every model says what made it: base, method and its settings, merge rule, density, scale, seeds. So runs stack into one table, here
with pandas (which comes with datasets):

```python
import pandas as pd


def table(folder):
    results = spunge.read_results(folder)
    rows, models = (pd.DataFrame([vars(each) for each in some]) for some in (results.rows, results.models))
    return rows.merge(models, on="stage").assign(run=str(folder))


runs = pd.concat([table("runs/ties"), table("runs/average")])
runs[(runs.kind == "merged") & (runs.group == "forget")].pivot_table("value", ["metric", "subject"], ["rule", "scale"])
```

- The file is valid JSON. A number that JSON has no word for is one of the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, as in
  Protocol Buffers' JSON; Python's `float` and JavaScript's `Number` take them. A bare `NaN`, which earlier versions wrote, and a
  score that is null are read as NaN.
- What is not known of a row or of a model is left out of it.
- What a row is about stands in its fields. Names are for people: nothing has to be read out of a metric's, subject's or stage's.
- Files of earlier versions, which have no `models`, are read: there the names say it, as they did then.
- A file that was cut off or changed, or is of something else, is refused in one line with its name and the place in it.

Fields that earlier versions did not have: `models`, of which `base` to `seeds` are younger than the rest; of rows `wanted`,
`evaluation`, `group`, `worst_of`, `attack`, `label`, `curve`, `at` and `unit`; of differences `wanted` and `changed`; of
evaluations `settings`; and `watched`. `higher_is_better` of rows and differences is gone: it was wrong of what is to be forgotten,
and `wanted` says which way is good row by row. Where an earlier file has it, it is read as `wanted`. No metric or subject is called
otherwise.
"""


def results_reference() -> str:
    """What results.json holds, as Markdown."""
    schema = json_schema()
    lines = [RESULTS_HEAD, *fields_table(schema)]
    for name, definition in schema["$defs"].items():
        lines += ["", f"## {name}", "", definition["description"], "", *fields_table(definition)]
    return "\n".join(lines) + "\n"


def fields_table(definition: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {schema_type(told)} | {'always' if name in definition['required'] else 'if known'} | {told['description']} |"
        for name, told in definition["properties"].items()
    ]
    return ["| field | type | written | what |", "|---|---|---|---|", *rows]


def schema_type(told: dict[str, Any]) -> str:
    """A property's type in a word or two."""
    if "$ref" in told:
        name = told["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in told:
        return " or ".join(schema_type(each) for each in told["anyOf"] if each != {"enum": list(NOT_FINITE)})
    if "enum" in told:
        return ", ".join(f"`{value}`" for value in told["enum"])
    if "const" in told:
        return f"`{told['const']}`"
    if told["type"] == "array":
        return f"list of {schema_type(told['items'])}"
    return {"object": "mapping", "boolean": "true or false"}.get(told["type"], str(told["type"]))


def described(entry: dict[str, Any]) -> list[str]:
    source = f" Source: {entry['source']}." if entry["source"] else ""
    reads = f" {reads_text(entry)}" if "reads" in entry else ""
    return [f"{entry['summary']}{source}{reads}", ""]


def shared_by(block: type[Strict]) -> list[type[Strict]]:
    """The shared blocks that a block builds on, the most general first."""
    return [base for base in reversed(block.__mro__) if base in SHARED and base is not block]


def with_shared(block: type[Strict], naming: str) -> list[str]:
    """A pointer to the settings that stand elsewhere, and the table of those that are new or differ."""
    bases = shared_by(block)
    above = settings_of(bases[-1]) if bases else {}
    described = {name: setting for name, setting in settings_of(block).items() if name != naming}
    own = [name for name, setting in described.items() if above.get(name) != setting]
    pointers = [link(SHARED[base], SHARED[base].partition(": ")[2]) for base in bases[-1:]]
    lines = [f"It takes what {pointer} takes{', and:' if own else '.'}" for pointer in pointers]
    if not own:
        return lines or ["No settings."]
    return [*lines, *([""] if lines else []), *table(block, own)]


def anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def gather(block: type[Strict], inner: dict[type[Strict], set[str]]) -> None:
    """Note the blocks inside a block, with the settings that hold them."""
    for name, info in block.model_fields.items():
        for each in blocks_of(info):
            if each not in BLOCKS.values():
                inner.setdefault(each, set()).add(name)
                gather(each, inner)


def inner_section(block: type[Strict]) -> list[str]:
    """What a block inside another is, and its table."""
    own = [name for name in block.model_fields if name != "kind"]
    told = [(inspect.getdoc(block) or "").partition("\n")[0], ""] if block.__doc__ else []
    return [*told, *(table(block, own) if own else ["No settings."])]


def table(block: type[Strict], names: list[str]) -> list[str]:
    """Some of a block's settings, a row each."""
    settings = settings_of(block)
    rows = [
        f"| `{name}` | {kind_of(block.model_fields[name], settings[name])} | {cell(settings[name]['default'])} "
        f"| {settings[name]['description']} |"
        for name in names
    ]
    return ["| setting | type | default | what |", "|---|---|---|---|", *rows]


def kind_of(info: FieldInfo, setting: dict[str, Any]) -> str:
    """A setting's type, its bounds, and links to what it may hold."""
    kind = cell(setting["type"])
    if "NAME" in setting["type"]:
        kind += f", of {link(NAMES, 'these')}"
    held = [link(section_of(block), f"`{block_name(block)}`") for block in blocks_of(info)]
    bounds = [f"{SIGNS[type(mark)]} {dataclasses.astuple(mark)[0]}" for mark in info.metadata if type(mark) in SIGNS]
    return ", ".join([kind, *bounds]) + (f": {', '.join(held)}" if held else "")


def cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")
