"""`spunge view` in a browser: filtering, comparing, progress that moves, a chat; and axe-core on each page.

Needs the packages of the group `browser` and a Chromium that is installed; skipped without.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spunge.view.server import serving

pytestmark = pytest.mark.thorough


class Answers:
    """Models whose answers are known."""

    def __init__(self, folder: Path) -> None:
        self.names = self.finished = ["base", "merged"]

    def model(self, name: str) -> Any:
        return SimpleNamespace(name=name, kind=name)

    def answer(self, model: Any, prompt: str, settings: Any, hear: Callable[[str], None]) -> str:
        hear(f"{model.name} heard <b>{prompt}</b>")
        return "said"

    def close(self) -> None:
        pass


def content(forgotten: float) -> dict[str, Any]:
    """results.json of a run that forgets one part."""
    about = {"method": "npo", "rule": "ties", "scale": 1.0, "base": "tiny/base", "base_fingerprint": "a" * 32}
    models = [{"stage": stage, "kind": stage, "name": stage, **about} for stage in ("base", "merged")]
    rows = [
        {"stage": stage, "subject": of, "metric": "accuracy", "value": value, "n": 40, "group": group, "wanted": way}
        for of, group, way in (("europe", "forget", "down"), ("facts", "keep", "up"))
        for stage, value in (("base", 0.9), ("merged", forgotten if group == "forget" else 0.85))
    ]
    evaluations = [{"name": "quiz", "kind": "choices", "metrics": ["accuracy"], "rows": "r1", "instrument": None}]
    return {"schema": 1, "stages": ["base", "merged"], "models": models, "rows": rows, "evaluations": evaluations}


def work(run: Path, done: int) -> None:
    """The run is under way by this process, and has done so many of 12 steps."""
    stage = {"title": "unlearn europe", "done": done, "total": 12, "note": "loss 1.5", "seconds": 7.0, "left": 21.0}
    now = time.time()
    told = {"schema": 1, "host": socket.gethostname(), "pid": os.getpid(), "begun": now, "written": now}
    told |= {"finished": 2, "count": 9, "left": 75.0, "stages": [stage], "waiting": ["judge merged"]}
    (run / "progress.json").write_text(json.dumps(told))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two finished runs, the first with its page, and one under way."""
    folder = tmp_path / "runs"
    for name, forgotten in (("one", 0.3), ("two", 0.5), ("working", None)):
        (folder / name / "stamps").mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text("model: {path: tiny/base}\nunlearn: {method: npo}\n")
        if forgotten is not None:
            (folder / name / "results.json").write_text(json.dumps(content(forgotten)))
    work(folder / "working", 3)
    return folder


@pytest.fixture
def address(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("spunge.run.asking.Asking", Answers)
    with serving(root, chat=True) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server.address.rstrip("/")
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    yield context.new_page()
    context.close()


def test_a_list_is_filtered_and_two_runs_are_ticked_and_compared(page: Any, address: str) -> None:
    page.goto(address)
    assert page.locator("li.run").count() == 3
    page.select_option("select[name=state]", "finished")
    page.click("text=Filter")
    assert page.locator("li.run").count() == 2
    page.check("input[value=one]")
    page.check("input[value=two]")
    page.click("main button")
    assert page.inner_text("h1") == "2 runs compared"
    cells = page.locator("tr", has_text="europe").first.inner_text()
    assert "0.3" in cells
    assert "0.5" in cells


def test_a_page_of_a_run_under_way_shows_what_its_file_says_later_by_itself(
    page: Any, address: str, root: Path
) -> None:
    page.goto(f"{address}/runs/working/")
    assert page.locator("td", has_text="3/12").count() == 1
    work(root / "working", 9)
    page.wait_for_selector("td:has-text('9/12')", timeout=10_000)
    assert page.get_attribute("progress", "value") == "0.75"


def test_a_question_is_answered_by_both_models_blurred_until_they_are_asked_for(page: Any, address: str) -> None:
    page.goto(f"{address}/runs/one/")
    page.click("text=Chat with its models")
    page.fill("textarea", "why?")
    page.click("text=Ask")
    page.wait_for_load_state()
    said = page.locator(".side .said bdi")
    assert said.all_text_contents() == ["base heard <b>why?</b>", "merged heard <b>why?</b>"]
    filters = "each => each.map(one => getComputedStyle(one).filter)"
    assert all("blur" in each for each in said.evaluate_all(filters))
    page.check("#show-texts")
    assert said.evaluate_all(filters) == ["none", "none"]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_on_any_page(
    browser: Any, axe: Callable[..., str], address: str, monkeypatch: pytest.MonkeyPatch, colours: str, width: int
) -> None:
    monkeypatch.setattr("spunge.view.pages.AGAIN", 600)  # no page may be loaded anew while axe reads it
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours)
    page, wrong = context.new_page(), {}
    for path in ("/", "/runs/one/", "/runs/working/", "/compare?run=one&run=two", "/chat/one/"):
        page.goto(f"{address}{path}")
        if path.startswith("/chat/"):
            page.fill("textarea", "why?")
            page.check("#show-texts")
            page.click("text=Ask")
            page.locator(".side").nth(1).wait_for()
        wrong[path] = axe(page)
    context.close()
    assert wrong == dict.fromkeys(wrong, "")
