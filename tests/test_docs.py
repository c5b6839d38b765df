"""The docs against the code: every setting stands in the reference, and a link that leads nowhere is found."""

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.cli.listing import REGISTRIES as BY_KIND
from spunge.recipe.loading import load_recipe
from spunge.recipe.schema import Recipe
from spunge.registry import METHODS, RULES, Registry
from spunge.unlearning.refusals import RefusalSettings
from toys import ROOT, Told

REGISTRIES = tuple(BY_KIND.values())
NAMING = {"kind", "method", "rule"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """script("check_docs") -> the module of scripts/check_docs.py."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


@pytest.fixture(scope="module")
def reference() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return str(importlib.import_module("reference").reference())


def tables(text: str) -> dict[str, set[str]]:
    """Heading -> the settings in the table below it."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {
        each.partition("\n")[0]: set(re.findall(r"^\| `(\w+)` \|", each, flags=re.MULTILINE)) - NAMING
        for each in sections
    }


def nested(model: Any) -> list[set[str]]:
    """The settings of each block inside a block, as pydantic's own schema has them."""
    blocks = model.model_json_schema(mode="validation").get("$defs", {}).values()
    return [set(block["properties"]) - NAMING for block in blocks if "properties" in block]


def test_every_block_that_a_recipe_may_hold_has_a_table_with_all_of_its_settings(reference: str) -> None:
    found = tables(reference)
    models = [Recipe, *(registry.get(name).settings for registry in REGISTRIES for name in registry.names())]
    missing = [settings for model in models for settings in nested(model) if settings and not whole(settings, found)]
    assert missing == []


def whole(settings: set[str], found: dict[str, set[str]]) -> bool:
    """Whether some section has all of these: its own, and those that it says another section has."""
    shared = set().union(*(names for title, names in found.items() if "every " in title))
    return any(settings - names <= shared and names <= settings for names in found.values() if names)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.setting)
def test_everything_that_can_be_named_has_a_section_that_the_list_of_names_links_to(
    script: Any, reference: str, registry: Registry[Any]
) -> None:
    headings = script("check_docs").anchors_of(reference)
    for name in registry.names():
        links = re.findall(rf"\[{re.escape(name)}\]\(#([^)]+)\)", reference)
        assert links
        assert set(links) <= set(headings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a](other.md)", "leads nowhere"),
        ("[a](page.md#nowhere)", "no such heading"),
        ("[a](#nowhere)", "no such heading"),
        ("[a](page.md#a-part-of-it-1)", ""),
        ("[a](#of-x-y)\n## `of`: {x, y}", ""),
        ("[a](https://example.com/page#part)", ""),
        ("```python\nrows[0](absent)\n# nowhere\n```", ""),
        ("```python\n# nowhere\n```\n[a](#nowhere)", "no such heading"),
    ],
)
def test_a_link_to_a_page_or_heading_that_is_not_there_is_found(
    script: Any, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "page.md").write_text("# Page\n\n## A part, of it!\n\n## A part of it\n", encoding="utf-8")
    (tmp_path / "tried.md").write_text(text, encoding="utf-8")
    problems = script("check_docs").broken_links(tmp_path / "tried.md")
    assert [told in problem for problem in problems] == [True] * bool(told)


def test_a_page_that_the_site_does_not_list_is_found(script: Any, tmp_path: Path) -> None:
    (tmp_path / "how-to").mkdir()
    for page in ("one.md", "how-to/two.md", "two.md"):
        (tmp_path / page).touch()
    problems = script("check_docs").pages_in_no_list(
        tmp_path, "nav:\n  - Limits: one.md\n  - How:\n    - how-to/two.md\n"
    )
    assert problems == ["mkdocs.yml: docs/two.md has no line under nav"]


def test_the_reference_names_the_setting_of_every_registry_that_spunge_list_knows(script: Any) -> None:
    assert set(script("reference").KEYS) == set(BY_KIND)


MARKED = """
import pytest

EACH: dict[str, int] = {"npo": 1, "ga": 2}
RULES = ["ties"]


@pytest.mark.formula(*EACH, "lat")
@pytest.mark.parametrize("name", EACH)
def test_one(name): ...


@pytest.mark.formula(*RULES)
def test_two(): ...


def test_three(): ...
"""


def test_the_tests_of_a_formula_are_read_off_their_marks(script: Any, tmp_path: Path) -> None:
    (tmp_path / "tests" / "inner").mkdir(parents=True)
    (tmp_path / "tests" / "inner" / "test_file.py").write_text(MARKED, encoding="utf-8")
    one, two = "tests/inner/test_file.py::test_one", "tests/inner/test_file.py::test_two"
    assert script("method_pages").formula_tests(tmp_path / "tests") == {
        "npo": [one],
        "ga": [one],
        "lat": [one],
        "ties": [two],
    }


def test_a_mark_that_cannot_be_read_off_its_file_is_an_error(script: Any, tmp_path: Path) -> None:
    (tmp_path / "test_file.py").write_text(
        "@pytest.mark.formula(*elsewhere())\ndef test_one(): ...\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="elsewhere"):
        script("method_pages").formula_tests(tmp_path)


def test_a_method_or_rule_without_a_test_of_its_formula_is_found(script: Any) -> None:
    pages = script("method_pages")
    tests = pages.formula_tests(ROOT / "tests")
    assert pages.untested_formulas(tests) == []
    found = pages.untested_formulas(
        {name: of for name, of in tests.items() if name not in ("npo", "ties")} | {"nop": ["a"]}
    )
    assert all(name in told for name, told in zip(('"npo"', '"ties"', "'nop'"), found, strict=True))


@pytest.fixture
def page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]
) -> Callable[[str], list[list[str]]]:
    """page("requests") -> the stages that begin under each `spunge run` of a how-to page, given in a folder with the page's recipe
    and some of the demo's rows, to a toy model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for file in (ROOT / "src/spunge/recipes/demo").glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "demo" / file.name).write_text(
            "".join(lines[:: 20 if file.stem == "forget" else 60]), encoding="utf-8"
        )

    def given(name: str) -> list[list[str]]:
        text = (ROOT / f"docs/how-to/{name}.md").read_text(encoding="utf-8")
        [recipe] = re.findall(rf"^```yaml\n# {name}\.yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        (tmp_path / f"{name}.yaml").write_text(recipe, encoding="utf-8")
        heard = []
        for line in re.findall(rf"^    spunge run ({name}\.yaml .*)", text, flags=re.MULTILINE):
            file, *options = shlex.split(line)
            told = dict(zip(options[::2], options[1::2], strict=True))
            overrides = [f"model.path={tiny('llama')}", "unlearn.layer=1", "unlearn.steps=2"]
            loaded = load_recipe(file, [*overrides, *([told["--set"]] if "--set" in told else [])])
            watcher = Told()
            spunge.run(loaded, tmp_path / told["--out"], watcher=watcher)
            heard.append(watcher.lines)
        return heard

    return given


@pytest.mark.thorough  # three whole runs
def test_the_page_on_requests_trains_what_is_new_alone(page: Callable[[str], list[list[str]]]) -> None:
    trained = [[line for line in lines if line.startswith("unlearn")] for lines in page("requests")]
    assert trained == [["unlearn branch:europe"], ["unlearn branch:asia"], []]


def test_the_page_on_rows_without_labels_has_a_recipe_that_runs(
    page: Callable[[str], list[list[str]]], tmp_path: Path
) -> None:
    page("no-labels")
    split = json.loads((tmp_path / "runs/no-labels/split.json").read_text())
    assert {part["value"] for part in split["parts"]} == {"north", "gulf"}


def test_the_readme_counts_and_names_what_the_registries_have() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    [(methods, named)] = re.findall(
        r"(\d+) \[methods\]\([^)]*\) come with it: (.*?), and branches that other tools made", text
    )
    [rules] = re.findall(r"on its own, with (\d+) rules\.", text)
    [architectures] = re.findall(r"\[(\d+) architectures\]", text)
    assert int(methods) == len(METHODS.builtin)
    names = {re.sub(r"\W", "", name).lower() for name in named.split(", ")}
    assert names == {re.sub(r"_", "", name) for name in METHODS.builtin} - {"precomputed"}
    assert int(rules) == len(RULES.builtin)
    assert f"on {architectures} everything" in (ROOT / "docs/architectures.md").read_text(encoding="utf-8")


def test_every_method_has_a_page_with_its_settings_and_its_tests(script: Any) -> None:
    pages = script("method_pages").method_pages()
    methods = BY_KIND["methods"]
    for name in methods.builtin:
        text = pages[f"methods/{name}.md"]
        own = set(methods.get(name).settings.model_fields) - set(RefusalSettings.model_fields)
        assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) >= own
        assert "::test_" in text.partition("## Tests")[2]


def test_the_first_page_leads_to_every_other() -> None:
    docs = ROOT / "docs"
    linked = set(re.findall(r"\]\(([^)#]+\.md)", (docs / "index.md").read_text(encoding="utf-8")))
    pages = {file.relative_to(docs).as_posix() for file in docs.rglob("*.md") if file.parent.name != "methods"}
    assert pages - linked == {"index.md"}
