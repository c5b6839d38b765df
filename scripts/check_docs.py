"""Check the docs against the code: the references are generated, links lead somewhere, examples compile.

python scripts/check_docs.py            # check; exit 1 and say what is stale
python scripts/check_docs.py --write    # write the generated files anew
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from spunge.cli.listing import listing, settings_of
from spunge.evaluation.generation import GenerationSettings
from spunge.recipe.schema import Control, ForgetRows, ModelSettings, Published, Recipe, Rows, Source, Split
from spunge.results import json_schema

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCKS: dict[str, Any] = {
    "model": ModelSettings,
    "forget": ForgetRows,
    "source (of forget, retain and evaluate)": Source,
    "split": Split,
    "retain": Rows,
    "controls (each)": Control,
    "published (each)": Published,
    "generation (of toxicity, harm, fluency and similarity)": GenerationSettings,
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
        lines += ["", f"## {title}", "", *table(settings_of(block))]
    for kind, key in (("methods", "unlearn.method"), ("rules", "merge.rule"), ("evaluators", "evaluate.kind")):
        for entry in listing(kind):
            source = f" {entry['source']}." if entry["source"] else ""
            lines += [
                "",
                f"## {key}: {entry['name']}",
                "",
                f"{entry['summary']}{source}",
                "",
                *table(entry["settings"]),
            ]
    return "\n".join(lines) + "\n"


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


def main() -> None:
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    generated = {"recipe.md": reference(), "results.schema.json": schema}
    if "--write" in sys.argv:
        for name, text in generated.items():
            (DOCS / name).write_text(text, encoding="utf-8")
    problems = []
    for name, text in generated.items():
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text:
            problems.append(f"docs/{name} is stale: run python scripts/check_docs.py --write")
    for file in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]:
        problems += broken_links(file) + broken_examples(file)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
