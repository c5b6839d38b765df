"""Check the docs against the code: the references are generated, links lead somewhere, examples compile.

python scripts/check_docs.py            # check; exit 1 and say what is stale
python scripts/check_docs.py --write    # write the generated files anew
"""

import ast
import functools
import json
import re
import sys
from collections import Counter
from pathlib import Path

from method_pages import formula_tests, method_pages, methods_table, rules_table, untested_formulas, with_table
from reference import anchor, reference, results_reference

from spunge.results import json_schema

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def broken_links(file: Path) -> list[str]:
    """Links to files that are not there, and to headings that are in no file."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    problems = []
    for target, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        to = file.parent / target if target else file
        if not to.exists():
            problems.append(f"{file.name}: link to {target!r} leads nowhere")
        elif heading and heading not in anchors(to):
            problems.append(f"{file.name}: link to {target}#{heading}: no such heading")
    return problems


@functools.cache
def anchors(file: Path) -> list[str]:
    return anchors_of(file.read_text(encoding="utf-8"))


def anchors_of(text: str) -> list[str]:
    """The anchors of Markdown, as a forge names them: of equal headings all but the first are numbered."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    before: Counter[str] = Counter()
    named = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        name = anchor(heading)
        named.append(f"{name}-{before[name]}" if before[name] else name)
        before[name] += 1
    return named


def broken_examples(file: Path) -> list[str]:
    found = []
    for block in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
        try:
            ast.parse(block)
        except SyntaxError as error:
            found.append(f"{file.name}: example does not parse: {error}")
    return found


def pages_in_no_list(docs: Path, listed: str) -> list[str]:
    """Pages of docs/ that the site's list of pages leaves out: `make site` refuses them."""
    pages = [file.relative_to(docs).as_posix() for file in sorted(docs.rglob("*.md"))]
    return [
        f"mkdocs.yml: docs/{page} has no line under nav"
        for page in pages
        if not re.search(rf"(?m)[-:] {page}$", listed)
    ]


def unexplained_dependencies() -> list[str]:
    """Dependencies of pyproject.toml without a line in docs/dependencies.md, and lines of what is none."""
    # Not from the installed package, which may be of an earlier pyproject.toml.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project[project.index("\ndependencies = [") : project.index("\n[project.scripts]")]
    names = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)[^"\n]*"', listed)} - {"spunge"}
    rows = re.findall(r"^\| ([\w-]+) \|", (DOCS / "dependencies.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    explained = {name.lower() for name in rows} - {"package"}
    return [f"docs/dependencies.md: {name} is not in it, or is no dependency" for name in sorted(names ^ explained)]


def generated_files() -> dict[str, str]:
    """Files under docs/ that are made of the code, and pages that hold a table that is: name -> content."""
    tables = {"methods.md": methods_table(), "merging.md": rules_table()}
    return {
        "recipe.md": reference(),
        "results-json.md": results_reference(),
        "results.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        **method_pages(),
        **{name: with_table((DOCS / name).read_text(encoding="utf-8"), table) for name, table in tables.items()},
    }


def main() -> None:
    generated = generated_files()
    left = [file for file in sorted((DOCS / "methods").glob("*.md")) if f"methods/{file.name}" not in generated]
    if "--write" in sys.argv:
        (DOCS / "methods").mkdir(exist_ok=True)
        for name, text in generated.items():
            (DOCS / name).write_text(text, encoding="utf-8")
        for file in left:
            file.unlink()
    problems = untested_formulas(formula_tests(ROOT / "tests"))
    problems += [
        f"docs/methods/{file.name} is of no method: run python scripts/check_docs.py --write"
        for file in left
        if file.exists()
    ]
    for name, text in generated.items():
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text:
            problems.append(f"docs/{name} is stale: run python scripts/check_docs.py --write")
    for file in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        problems += broken_links(file) + broken_examples(file)
    problems += pages_in_no_list(DOCS, (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    problems += unexplained_dependencies()
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
