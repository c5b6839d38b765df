"""docs/methods/, a page for each method, and the tables of methods and merge rules in docs/methods.md and docs/merging.md.

They are made of the registered values, of the docstrings of the modules that these stand in, and of the tests' marks:
`python scripts/check_docs.py --write`. A test that holds a formula is marked `@pytest.mark.formula("npo")`.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from reference import link, with_shared

from spunge.cli.listing import settings_of
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.recipe.training import LoRA
from spunge.registry import METHODS, RULES
from spunge.unlearning.calls import Call
from spunge.unlearning.method import Method

ROOT = Path(__file__).parent.parent
DEPTH = 32  # blocks of the model that costs are told of: a 7B Llama's
ROWS = 1000  # to forget and to retain, for what is trained before
PLAIN = Samples(pa.table({"text": ["a text", "another", "a third"]}))
ANSWERED = Samples(pa.table({"prompt": ["a?", "b?", "c?"], "completion": [" d", " e", " f"]}))
REFUSING = Samples(ANSWERED.table.append_column("refusal", pa.array([" g", " h", " i"])))
LENGTH = ("epochs", "steps", "batch_size", "optimizer", "learning_rate", "schedule")  # of a training, told in a line
Marks = dict[str, list[str]]  # name of a method or rule -> tests, as pytest names them


def method_pages() -> dict[str, str]:
    """Each page's name under docs/ and its Markdown."""
    tests = formula_tests(ROOT / "tests")
    return {f"methods/{name}.md": page(name, METHODS.get(name), tests.get(name, [])) for name in METHODS.builtin}


def page(name: str, method: Method[Any], tests: list[str]) -> str:
    required = [key for key, told in settings_of(method.settings).items() if told["default"] == "(required)"]
    asked = "".join(f", {key}: .." for key in required)
    lines = [
        f"# {name}",
        "",
        "Generated from the code by `python scripts/check_docs.py --write`; do not edit.",
        "",
        f"{method.summary} Source: {linked(method.source)}. In a recipe:",
        "",
        "```yaml",
        f"unlearn: {{method: {name}{asked}}}",
        "```",
        "",
    ]
    if not required:
        lines += [f"Or for one run: `spunge run RECIPE --set unlearn.method={name}`.", ""]
    lines += [f"What all methods share: [unlearning methods](../methods.md).{more(name)}", ""]
    sections = {
        "Formula": [inspect.getdoc(importlib.import_module(METHODS.builtin[name].partition(":")[0])) or ""],
        "What is trained": trained(method),
        "Settings": settings(name, method),
        "Rows": rows(method),
        "What a step costs": cost(method),
        "Where it runs": limits(method),
        "Tests": ["These hold the formula; each can be run as `pytest NAME`:", "", *(f"- `{test}`" for test in tests)],
    }
    for title, text in sections.items():
        lines += [f"## {title}", "", *text, ""]
    return "\n".join(lines).rstrip() + "\n"


def more(name: str) -> str:
    """Links to the other pages on a method."""
    pages = {f"{name}.md": "how to set it", f"benchmarks/{name}.md": "measured"}
    return "".join(
        f" [{text.capitalize()}](../{file})." for file, text in pages.items() if (ROOT / "docs" / file).exists()
    )


def linked(source: str) -> str:
    """A source with its arXiv numbers as links."""
    return re.sub(r"arXiv[ :](\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def settled(method: Method[Any]) -> Any:
    """The method's settings where a recipe gives none."""
    return method.settings()


def trained(method: Method[Any]) -> list[str]:
    if not method.trains:
        return ["Nothing."]
    told, default = settings_of(method.settings), settled(method).trainable
    what = "" if default is None else f"`trainable: {written_as(default.model_dump(mode='json'))}`."
    given = ", ".join(
        f"`{key}: {written_as(told[key]['default'])}`" for key in LENGTH if told[key]["default"] is not None
    )
    return [what or told["trainable"]["description"], "", f"Of each part, unless the recipe says otherwise: {given}."]


def written_as(value: Any) -> str:
    """A default as YAML has it on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written_as(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(written_as, value))}]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, float)
        else f"{value:g}"
    )


def settings(name: str, method: Method[Any]) -> list[str]:
    """The method's own settings, and where the others stand; links of the reference lead to its page."""
    lines = [line.replace("](#", "](../recipe.md#") for line in with_shared(method.settings, "method")]
    section = link(f"unlearn.method: {name}", "the recipe reference").replace("](#", "](../recipe.md#")
    return [*lines, "", f"All settings: {section}."]


def rows(method: Method[Any]) -> list[str]:
    if not method.trains:
        return ["None are read."]
    table = ["| rows to forget | rows to retain | taken |", "|---|---|---|"]
    for forget, given in (("texts", PLAIN), ("prompts and answers", ANSWERED)):
        told = {
            retain: taken(method, given, rows) for retain, rows in (("texts", PLAIN), ("prompts and answers", ANSWERED))
        }
        alike = {"any": told["texts"]} if len(set(told.values())) == 1 else told
        table += [f"| {forget} | {retain} | {each} |" for retain, each in alike.items()]
    return [*table, "", f"Conversations are prompts and answers too. Retain rows: {retain_rows(method)}."]


def taken(method: Method[Any], forget: Samples, retain: Samples) -> str:
    """Whether the method can be trained on such rows, and what it says where it cannot."""
    said = refusal(method, forget, retain)
    if said and not forget.plain and not refusal(method, REFUSING, retain):
        return "yes, with the column `forget.refusal`"
    return f"no: {said}" if said else "yes"


def refusal(method: Method[Any], forget: Samples, retain: Samples) -> str:
    """What the method says of rows that it cannot be trained on; empty where it can."""
    try:
        method.refuse({"part": forget}, retain, settled(method))
    except RecipeError as error:
        return str(error)
    return ""


def retain_rows(method: Method[Any]) -> str:
    """Whether a recipe must have them."""
    chosen = settled(method)
    if not method.needs_retain(chosen):
        return "not needed"
    without = "alpha" in dict(chosen) and not method.needs_retain(chosen.model_copy(update={"alpha": 0.0}))
    return "needed, but for `alpha: 0`" if without else "needed"


def cost(method: Method[Any]) -> list[str]:
    if not method.trains:
        return ["Nothing is trained."]
    groups = method.calls(settled(method), DEPTH)
    passes = [
        (call, call.samples * (DEPTH if call.blocks is None else call.blocks) / DEPTH)
        for group in groups
        for call in group
    ]
    forward = sum(share for _, share in passes)
    backward = sum(share for call, share in passes if call.gradient)
    return [
        f"For each row of a batch, with the defaults and {DEPTH} blocks: {forward:.3g} forward and {backward:.3g} backward passes "
        "of the whole model, in this order. The calls on a line are held in memory together; `spunge plan` tells the memory.",
        "",
        *(
            f"- {line}"
            for line in counted("; ".join(counted(map(call_told, group), "{each}, {count} times")) for group in groups)
        ),
        *copied(method),
    ]


def copied(method: Method[Any]) -> list[str]:
    """That copies of the base are trained before the first step."""
    steps = method.copying(settled(method), {"": ROWS}, ROWS)
    told = f"Before the first step copies of the base are trained: {steps} steps for {ROWS} rows to forget and {ROWS} to retain."
    return ["", told] if steps else []


def counted(told: Iterable[str], words: str = "{count} times: {each}") -> list[str]:
    """Texts, those that follow one another and are equal as one, in these words."""
    texts = [(each, len(list(same))) for each, same in groupby(told)]
    return [words.format(each=each, count=count) if count > 1 else each for each, count in texts]


def call_told(call: Call) -> str:
    """A call of the model in words."""
    size = f"{call.samples} rows for each row" if call.samples > 1 else "rows"
    marks = [
        "" if call.gradient else "without a gradient",
        "" if call.blocks is None else f"{call.blocks} blocks, no output layer",
        "each text once, then kept" if call.once else "",
        "all tokens' probabilities" if call.beside else "",
    ]
    return f"{size} to {call.of}" + "".join(f", {mark}" for mark in marks if mark)


def limits(method: Method[Any]) -> list[str]:
    """What the values say of several processes, packed weights and parts of a model."""
    if not method.trains:
        return ["Nothing is trained, so each place of a recipe is served."]
    chosen, fields = settled(method), method.settings.model_fields
    lora = isinstance(chosen.trainable, LoRA)
    told = [
        f"- One model over several processes (`execution: {{kind: sharded}}`): {'yes' if method.shares else 'no, it is refused'}"
        f"{', but for `stop`' if method.shares and 'stop' in fields else ''}.",
        f"- Beside weights in 4 or 8 bits (`model.train_in`): {'yes' if lora else 'with `trainable: {kind: lora}`'}"
        f"{', but for settings that are `auto`' if method.settle else ''}.",
        f"- Around its loss: SAM (`optimizer: {{sam: 0.01}}`){', GRU (`gru: 0.8`)' if rectifies(method) else '; not GRU (`gru`)'}.",
    ]
    if method.last_block is not None and (last := method.last_block(chosen, DEPTH)) is not None:
        told.append(f"- Of {DEPTH} blocks the first {last + 1} are loaded to train, without the output layer.")
    return told


def rectifies(method: Method[Any]) -> bool:
    """Whether GRU's setting is taken."""
    try:
        method.settings(gru=0.8, alpha=1.0)
    except ValidationError:
        return False
    return True


def methods_table() -> list[str]:
    """The methods, a row each."""
    table = ["| name | what it does | rows to forget | retain rows | sharded | source |", "|---|---|---|---|---|---|"]
    for name in METHODS.builtin:
        method = METHODS.get(name)
        read, kept = "none", "not needed"
        if method.trains:
            plain = [retained for retained in (PLAIN, ANSWERED) if not refusal(method, PLAIN, retained)]
            read, kept = "texts or answers" if plain else "answers", retain_rows(method)
        shared = "yes" if method.shares or not method.trains else "no"
        table.append(
            f"| [`{name}`](methods/{name}.md) | {method.summary} | {read} | {kept} | {shared} | {linked(method.source)} |"
        )
    return table


def rules_table() -> list[str]:
    """The merge rules, a row each, and the tests that hold their arithmetic."""
    tests = formula_tests(ROOT / "tests")
    table = ["| rule | what it does | source |", "|---|---|---|"]
    told = ["", "### Tests of the rules", ""]
    for name in RULES.builtin:
        value = RULES.get(name)
        section = link(f"merge.rule: {name}", f"`{name}`").replace("](#", "](recipe.md#")
        table.append(f"| {section} | {value.summary} | {linked(value.source)} |")
        told.append(f"- `{name}`: {', '.join(f'`{test}`' for test in tests.get(name, []))}")
    return table + told


def with_table(text: str, table: list[str]) -> str:
    """A page with the part between its two marks made anew."""
    begin, end = "<!-- made by scripts/check_docs.py --write -->\n", "<!-- as far as here -->"
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + "\n".join(table) + "\n\n" + end + rest.partition(end)[2]


def formula_tests(folder: Path) -> Marks:
    """The tests that are marked as holding a formula, by the names in their marks."""
    marked: Marks = {}
    for file in sorted(folder.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.formula" not in text:
            continue
        tree = ast.parse(text)
        for test in tree.body:
            if isinstance(test, ast.FunctionDef):
                for name in marks(test, tree):
                    marked.setdefault(name, []).append(f"{file.relative_to(folder.parent).as_posix()}::{test.name}")
    return marked


def marks(test: ast.FunctionDef, tree: ast.Module) -> Iterator[str]:
    """Names in a test's marks: texts, and *NAME for the keys or items of what the module calls so."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.formula":
            for argument in mark.args:
                yield from named(argument, tree)


def named(node: ast.expr | None, tree: ast.Module) -> list[str]:
    """The texts that an expression stands for. Raises ValueError where that cannot be read off the file."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Starred):
        return named(node.value, tree)
    if isinstance(node, ast.Dict):
        return [name for key in node.keys for name in named(key, tree)]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [name for item in node.elts for name in named(item, tree)]
    if isinstance(node, ast.Name):
        for given in tree.body:
            target = (
                given.target
                if isinstance(given, ast.AnnAssign)
                else given.targets[0]
                if isinstance(given, ast.Assign)
                else None
            )
            if isinstance(target, ast.Name) and target.id == node.id and isinstance(given, ast.Assign | ast.AnnAssign):
                return named(given.value, tree)
    raise ValueError(f"pytest.mark.formula: {ast.unparse(node) if node else node} cannot be read off the file")


def untested_formulas(tests: Marks) -> list[str]:
    """Methods and rules of which no test is marked, and marks of what is neither."""
    names = {"method": set(METHODS.builtin), "rule": set(RULES.builtin)}
    missing = [
        f'tests/: no test is marked @pytest.mark.formula("{name}"), which {noun} {name} needs'
        for noun, each in names.items()
        for name in sorted(each - set(tests))
    ]
    unknown = sorted(set(tests) - names["method"] - names["rule"])
    return missing + [
        f"tests/: {tests[name][0]} is marked with {name!r}, which is no method or rule" for name in unknown
    ]
