"""Hostile text in whatever a run shows stays text: in the page, its figures, the model card and results.json. No CSV is written."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt

from spunge.merging.card import merge_card
from spunge.merging.outcome import MergeReport, SourceReport
from spunge.report.page import page
from spunge.results import read_results, write_results

TEXTS = {
    "html": "</style></svg></pre><script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": "\" onload=\"alert(1)\" '><a href='javascript:alert(1)'>x</a>",
    "template": "{{ 7 * 7 }}{% raw %}${7*7}#{7*7}",
    "entities": "&lt;script&gt;&#60;&amp;]]><![CDATA[<!--",
    "markdown": "[x](javascript:alert(1)) ![y](http://e.example/z) **b** `c` | d |\n\n---\n# head\n<https://e.example> ~~~\n```",
    "yaml": "x\n---\nlicense: mine\n- !!python/object/apply:os.system [ls]\n'\"",
    "formula": "=cmd|' /C calc'!A0",
    "orders": "\x1b[31m\x1b]0;t\x07\x9b2J\r\x08\x00\u202e\u2066\u2028\ud800\ufffe",
}
# What names of the schema's own hold, and what ties files to each other.
FIXED = {
    "kind",
    "stage",
    "stages",
    "against",
    "slug",
    "sha256",
    "group",
    "schema",
    "transform",
    "path",
    "key",
    "fingerprint",
}


def hostile(value: Any, text: str, name: str = "") -> Any:
    """The value with the text after every free text in it."""
    if isinstance(value, str):
        return value if name in FIXED else f"{value} {text}"
    if isinstance(value, Mapping):
        named = ("versions", "instrument", "dropped", "tensors", "notes")
        return {(f"{key} {text}" if name in named else key): hostile(inner, text, key) for key, inner in value.items()}
    return [hostile(inner, text, name) for inner in value] if isinstance(value, list) else value


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the text outside of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn(html: str) -> list[str]:
    """The figures of a page, with those inside them."""
    figures, depth, start = [], 0, 0
    for mark in re.finditer(r"<svg\b|</svg>", html):
        start = mark.start() if depth == 0 else start
        depth += 1 if mark[0] == "<svg" else -1
        if depth == 0:
            figures.append(html[start : mark.end()])
    return figures


def shape(html: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(attributes)) for tag, attributes in Tags(html).tags]


@pytest.fixture
def hostile_run(write_run: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        run = write_run(tmp_path / "run")
        for file in [run / "results.json", run / "split.json", run / "merge.json", *run.rglob("delta.json")]:
            content = json.loads(file.read_text())
            file.write_text(json.dumps(hostile(content, text)))
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump(hostile(recipe, text, "recipe")))
        return run

    return write


@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_the_page_adds_no_tag_and_no_attribute(
    hostile_run: Callable[[str], Path], write_run: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    html = page(hostile_run(TEXTS[kind]))
    plain = page(hostile_run("plain"))
    told = Tags(html)
    tags = {tag for tag, _ in told.tags}
    assert tags == {tag for tag, _ in Tags(plain).tags}
    assert not tags & {"script", "img", "iframe", "object", "form"}
    assert [attributes for tag, attributes in told.tags if tag == "a"] == [
        attributes for tag, attributes in Tags(plain).tags if tag == "a"
    ]
    assert set(shape(html)) <= set(shape(plain)) | {("text", ("x", "y", "class")), ("tspan", ())}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\u2067\u2028\ud800\ufffe]", html)
    assert "49" not in told.text or kind != "template"


def written(run: Path, text: str) -> Path:
    """With what models wrote on prompts about a group, all of it the text."""
    [evaluation, *_] = json.loads((run / "results.json").read_text())["evaluations"]
    for stage in ("base", "control-joint", "merged"):
        folder = run / "evaluation" / stage
        folder.mkdir(parents=True)
        lines = [json.dumps({"row": row, "prompt": text, "texts": [f"{stage} {text}", text]}) for row in range(2)]
        (folder / "texts-0.jsonl").write_text("\n".join(lines))
        measure = {"metric": text, "numerator": [1.0, 0.0], "denominator": [1.0, 0.0]}
        told = {"stage": stage.replace("-", ":"), "evaluation": evaluation["name"], "text_files": ["texts-0.jsonl"]}
        (folder / "0123456789ab.json").write_text(json.dumps({**told, "measures": [measure]}))
    subjects = {evaluation["name"]: {text: [0], "another": [1]}}
    (run / "evaluation" / "subjects.json").write_text(json.dumps(subjects))
    return run


@pytest.mark.parametrize("kind", TEXTS)
def test_what_models_wrote_is_text_whatever_they_wrote(hostile_run: Callable[[str], Path], kind: str) -> None:
    html = page(written(hostile_run(TEXTS[kind]), TEXTS[kind]))
    shutil.rmtree(hostile_run("plain") / "evaluation")
    plain = page(written(hostile_run("plain"), "plain"))
    assert html.count('<article class="answer') == plain.count('<article class="answer') == 2
    assert {tag for tag, _ in Tags(html).tags} == {tag for tag, _ in Tags(plain).tags}
    assert set(shape(html)) <= set(shape(plain)) | {("text", ("x", "y", "class")), ("tspan", ())}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\u2067\u2028\ud800\ufffe]", html)
    assert not [attributes for tag, attributes in Tags(html).tags if any(name.startswith("on") for name in attributes)]


@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_a_figure_is_its_text(hostile_run: Callable[[str], Path], kind: str) -> None:
    figures = drawn(page(hostile_run(TEXTS[kind])))
    assert len(figures) >= 2
    for figure in figures:
        elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(figure).iter()}
        assert elements <= {"svg", "g", "path", "line", "rect", "text", "title", "desc", "tspan", "circle", "use"}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_the_model_card_is_neither_markup_nor_metadata(tmp_path: Path, kind: str) -> None:
    text = TEXTS[kind]
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"_name_or_path": text}))
    told = f"---\nlicense: {json.dumps(text)}\ninference: {json.dumps(text)}\n---\n{text}"
    (base / "README.md").write_bytes(told.encode("utf-8", "replace"))
    sources = [SourceReport(label=f"a {text}", fingerprint="ef" * 32, weight=1.0)]
    report = MergeReport(
        rule="ties",
        settings={"density": 0.2},
        base=f"b {text}",
        sources=sources,
        tensors={},
        cosine=[],
        notes=[f"n {text}"],
    )
    card = merge_card(report, base)
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    loaded = yaml.safe_load(head)
    assert set(loaded) == {"base_model", "library_name", "tags", "license"}
    assert loaded["base_model"] == ["base"]
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").parse(body)
    inner = [inside.type for token in tokens for inside in token.children or []]
    assert not {"html_block", "hr", "code_block"} & {token.type for token in tokens}
    assert not {"html_inline", "link_open", "image", "strong_open", "em_open"} & set(inner)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert [token.type for token in tokens].count("td_open") == 4
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\ud800\ufffe]", card)


@pytest.mark.parametrize("kind", sorted(TEXTS.keys() - {"orders"}))  # a file holds no lone surrogate
def test_results_hold_text_as_json_and_give_it_back(hostile_run: Callable[[str], Path], kind: str) -> None:
    run = hostile_run(TEXTS[kind])
    results = read_results(run)
    write_results(results)
    assert read_results(run).rows == results.rows
    assert TEXTS[kind] in results.rows[0].subject


def test_no_table_of_cells_is_written_whose_cells_a_spreadsheet_would_run() -> None:
    root = Path(__file__).parent.parent.parent / "src" / "spunge"
    # Whose cells test_export.py looks at, and what makes its cells by the same function.
    looked_at = {root / "report" / "export.py", root / "report" / "compared.py"}
    for file in set(root.rglob("*.py")) - looked_at:
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        }
        assert not [name for name in called if re.search(r"(csv\.\w*writer|to_csv|write_csv|to_excel)$", name)], file
