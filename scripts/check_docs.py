"""Check the docs against the code: the references are generated, links lead somewhere, examples compile.

python scripts/check_docs.py            # check; exit 1 and say what is stale
python scripts/check_docs.py --write    # write the generated files anew
"""

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

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

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCKS: dict[str, type[Strict]] = {
    "model": ModelSettings,
    "teach": TeachSettings,
    "forget": ForgetRows,
    "source (of forget, retain and evaluate)": Source,
    "split": Split,
    "retain": Rows,
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
    lines += [f"| `{name}` | {info.description or ''} |" for name, info in Recipe.model_fields.items()]
    for title, block in BLOCKS.items():
        lines += ["", f"## {title}", "", *with_shared(block, "")]
    told: set[type[Strict]] = set()
    inner: dict[type[Strict], set[str]] = {}
    for kind, key in KEYS.items():
        for entry in listing(kind):
            block = REGISTRIES[kind].get(entry["name"]).settings
            gather(block, inner)
            for base in shared_by(block):
                if base not in told:
                    told.add(base)
                    lines += ["", f"## {SHARED[base]}", "", *with_shared(base, NAMING[kind])]
            lines += ["", f"## {key}: {entry['name']}", "", *described(entry), *with_shared(block, NAMING[kind])]
    return "\n".join([*lines, *inner_blocks(inner)]) + "\n"


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
    own = {name: setting for name, setting in described.items() if above.get(name) != setting}
    pointers = [f"[{SHARED[base].partition(': ')[2]}](#{anchor(SHARED[base])})" for base in bases[-1:]]
    lines = [f"It takes what {pointer} takes{', and:' if own else '.'}" for pointer in pointers]
    if not own:
        return lines or ["No settings."]
    return [*lines, *([""] if lines else []), *table(own)]


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


def inner_blocks(inner: dict[type[Strict], set[str]]) -> list[str]:
    """A section for each block that a setting may hold."""
    lines: list[str] = []
    for block, holders in inner.items():
        lines += ["", f"## {', '.join(sorted(holders))}: `{block_name(block)}`", ""]
        lines += [(inspect.getdoc(block) or "").partition("\n")[0], ""] if block.__doc__ else []
        own = {name: setting for name, setting in settings_of(block).items() if name != "kind"}
        lines += table(own) if own else ["No settings."]
    return lines


def table(settings: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        f"| `{name}` | {cell(setting['type'])} | {cell(setting['default'])} | {setting['description']} |"
        for name, setting in settings.items()
    ]
    return ["| setting | type | default | what |", "|---|---|---|---|", *rows]


def cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def broken_links(file: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    return [f"{file.name}: link to {target!r} leads nowhere" for target in local if not (file.parent / target).exists()]


def broken_examples(file: Path) -> list[str]:
    found = []
    for block in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
        try:
            ast.parse(block)
        except SyntaxError as error:
            found.append(f"{file.name}: example does not parse: {error}")
    return found


def unexplained_dependencies() -> list[str]:
    """Dependencies of pyproject.toml without a line in docs/dependencies.md, and lines of what is none."""
    # Not from the installed package, which may be of an earlier pyproject.toml.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project[project.index("\ndependencies = [") : project.index("\n[project.scripts]")]
    names = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)[^"\n]*"', listed)} - {"spunge"}
    rows = re.findall(r"^\| ([\w-]+) \|", (DOCS / "dependencies.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    explained = {name.lower() for name in rows} - {"package"}
    return [f"docs/dependencies.md: {name} is not in it, or is no dependency" for name in sorted(names ^ explained)]


def main() -> None:
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    generated = {"recipe.md": reference(), "results-json.md": results_reference(), "results.schema.json": schema}
    if "--write" in sys.argv:
        for name, text in generated.items():
            (DOCS / name).write_text(text, encoding="utf-8")
    problems = []
    for name, text in generated.items():
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text:
            problems.append(f"docs/{name} is stale: run python scripts/check_docs.py --write")
    for file in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        problems += broken_links(file) + broken_examples(file)
    problems += unexplained_dependencies()
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
