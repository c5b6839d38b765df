"""The page in a browser: what it filters, what it blurs until it is asked, its colours by night, and that it runs nothing.

Needs the packages of the group `browser` and a Chromium that is installed; skipped without.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spunge.report.page import write_page

pytestmark = pytest.mark.thorough
HOSTILE = "</p></style><script>document.title='ran'</script><img src=http://e.example/x onerror=alert(1)> \x1b[31m =1+1"


@pytest.fixture
def opened(browser: Any, tmp_path: Path, write_run: Callable[..., Path]) -> Iterator[Any]:
    """The page of a run whose models wrote on 24 prompts about three groups; merged and base differ on every other one."""
    run = write_run(tmp_path / "run")
    for stage in ("base", "control-joint", "merged"):
        folder = run / "evaluation" / stage
        folder.mkdir(parents=True)
        changed = "other words" if stage == "merged" else "the same"
        lines = [
            {"row": row, "prompt": f"{row} {HOSTILE}", "texts": [f"{changed if row % 2 else 'the same'} {HOSTILE}"]}
            for row in range(24)
        ]
        (folder / "texts-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
        told = {"stage": stage.replace("-", ":"), "evaluation": "quiz", "text_files": ["texts-0.jsonl"], "measures": []}
        (folder / "0123456789ab.json").write_text(json.dumps(told))
    groups = {f"group {at}{HOSTILE}": list(range(at, 24, 3)) for at in range(3)}
    (run / "evaluation" / "subjects.json").write_text(json.dumps({"quiz": groups}))
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(write_page(run).resolve().as_uri())
    yield page
    context.close()


def seen(page: Any) -> int:
    return sum(each.is_visible() for each in page.query_selector_all("article.answer"))


def blurred(page: Any) -> int:
    style = "each => getComputedStyle(each).filter != 'none'"
    return sum(each.evaluate(style) for each in page.query_selector_all(".said bdi"))


def test_prompts_are_filtered_by_group_and_by_what_changed_most(opened: Any) -> None:
    every = seen(opened)
    assert every > 12
    opened.check("#group-1")
    of_group = seen(opened)
    assert 0 < of_group < every
    opened.check("#pick-most")
    assert 0 < seen(opened) < of_group
    opened.check("#group-all")
    opened.check("#pick-all")
    assert seen(opened) == every


def test_texts_are_blurred_until_one_or_all_are_asked_for(opened: Any) -> None:
    every = blurred(opened)
    assert every == len(opened.query_selector_all(".said bdi")) > 0
    opened.check("#show-0")
    assert blurred(opened) == every - 4  # the prompt and what three models wrote
    opened.uncheck("#show-0")
    opened.focus("#show-texts")
    opened.keyboard.press("Space")
    assert blurred(opened) == 0


def test_colours_turn_by_night_and_ink_stands_out_from_paper(opened: Any) -> None:
    def lightness(of: str) -> float:
        colour = opened.evaluate(f"getComputedStyle(document.body).{of}")
        return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    assert lightness("backgroundColor") > lightness("color") + 400
    opened.emulate_media(color_scheme="dark")
    assert lightness("backgroundColor") < lightness("color") - 400


def test_nothing_runs_nothing_is_fetched_and_a_phone_scrolls_only_down(opened: Any) -> None:
    assert "ran" not in opened.title().split()
    assert [url for url in opened.asked if not url.startswith("file:")] == []
    assert opened.evaluate("document.documentElement.scrollWidth") == 390


def test_on_paper_texts_stay_blurred(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert blurred(opened) == len(opened.query_selector_all(".said bdi"))


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_on_the_page(opened: Any, axe: Callable[..., str], colours: str, width: int) -> None:
    opened.emulate_media(color_scheme=colours)
    opened.set_viewport_size({"width": width, "height": 900})
    opened.check("#show-texts")
    assert axe(opened) == ""
