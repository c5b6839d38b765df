"""`spunge view --chat`: what is asked is answered into the page as it comes; a question that is not the page's own is refused."""

import http.client
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest

from spunge.view.server import Server, serving

HOSTILE = "</bdi><script>alert(1)</script>\x1b[31m&"
NAME = "branch:</bdi><script>alert(1)</script>&"


class Answers:
    """Models whose answers are known, and which wait before their last word until they may say it."""

    may = threading.Event()
    loaded = 0
    closed = 0

    def __init__(self, folder: Path) -> None:
        type(self).loaded += 1
        self.names = ["base", "merged"]
        self.finished = ["base", NAME, "merged"]

    def model(self, name: str) -> Any:
        from spunge.errors import RecipeError

        if name not in self.finished:
            raise RecipeError(f"--stage: {name!r} is no model of this run")
        return SimpleNamespace(name=name, kind=name.partition(":")[0])

    def answer(self, model: Any, prompt: str, settings: Any, hear: Callable[[str], None]) -> str:
        hear(f"{model.name} heard {prompt} {settings.chat} {settings.max_new_tokens} ")
        assert self.may.wait(20)
        hear("\x1b<end>")
        return "<end>"

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("spunge.run.asking.Asking", Answers)
    Answers.loaded, Answers.closed, Answers.may = 0, 0, threading.Event()
    Answers.may.set()
    for name in ("one", "two"):
        (tmp_path / name / "stamps").mkdir(parents=True)
    yield from served(tmp_path, chat=True)


def served(root: Path, chat: bool, pair: bool = False) -> Iterator[Server]:
    with serving(root, chat=chat, pair=pair) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Talk:
    """A browser with one server."""

    def __init__(self, server: Server) -> None:
        self.port = server.server_address[1]

    def get(self, path: str) -> tuple[int, str, dict[str, str]]:
        return self.read(self.send("GET", path, None, {}))

    def send(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = {
            "Host": f"127.0.0.1:{self.port}",
            "Origin": f"http://127.0.0.1:{self.port}",
            "Sec-Fetch-Site": "same-origin",
        }
        own |= {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
        sent = {name: value for name, value in {**own, **headers}.items() if value}
        connection.request(method, path, body, sent)
        return connection.getresponse()

    def read(self, answer: http.client.HTTPResponse) -> tuple[int, str, dict[str, str]]:
        return answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}

    def ask(self, run: str = "one", headers: dict[str, str] | None = None, **form: Any) -> http.client.HTTPResponse:
        secret = re.search(r'name="secret" value="([^"]+)"', self.get(f"/chat/{run}/")[1])
        assert secret is not None
        told = {"secret": secret[1], "prompt": "hello", "stage": ["base", "merged"], "tokens": "7", **form}
        return self.send("POST", f"/chat/{run}/", urlencode(told, doseq=True), headers or {})


def test_answers_stand_side_by_side_as_text_and_blurred(server: Server) -> None:
    status, page, headers = Talk(server).read(Talk(server).ask(prompt=HOSTILE, stage=["base", NAME]))
    assert status == 200
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count('<div class="side">') == 2
    assert page.count("&lt;/bdi&gt;&lt;script&gt;") >= 4  # in the form, two answers, a model's name
    assert page.count("&lt;end&gt;") == 2
    assert " True 7 " in page
    assert 'id="show-texts" name="show" value="1">' in page
    assert page.rstrip().endswith("</html>")
    assert "script" not in headers["content-security-policy"]
    assert headers["referrer-policy"] == "same-origin"  # else a browser would not say where a question comes from


def test_what_was_asked_stands_in_the_form_again(server: Server) -> None:
    page = Talk(server).read(Talk(server).ask(prompt="a\r\nb", stage="merged", show="1", plain="1"))[1]
    assert "\na\nb</textarea>" in page
    assert 'value="merged" checked' in page
    assert 'value="base" checked' not in page
    assert 'name="show" value="1" checked' in page
    assert "False 7" in page


def test_words_come_as_they_are_written_and_one_question_is_answered_at_a_time(server: Server) -> None:
    Answers.may.clear()
    talk = Talk(server)
    form = talk.get("/chat/one/")[1]
    answer = talk.ask()
    seen = b""
    while b"base heard hello" not in seen:
        seen += answer.read1(4096)
    assert b"&lt;end&gt;" not in seen
    secret = re.search(r'name="secret" value="([^"]+)"', form)
    assert secret is not None
    told = urlencode({"secret": secret[1], "prompt": "me too", "stage": "base", "tokens": "7"})
    status, page, _ = talk.read(talk.send("POST", "/chat/one/", told, {}))
    assert status == 409
    assert "one is at a time" in page
    Answers.may.set()
    assert b"merged heard hello" in answer.read()


def test_one_runs_models_are_in_memory(server: Server) -> None:
    talk = Talk(server)
    for run in ("one", "one", "two"):
        assert talk.read(talk.ask(run))[0] == 200
    assert (Answers.loaded, Answers.closed) == (2, 1)


@pytest.mark.parametrize(
    ("headers", "form", "status"),
    [
        ({"Origin": "http://elsewhere.example"}, {}, 403),
        ({"Origin": "null"}, {}, 403),
        ({"Origin": ""}, {}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, {}, 403),
        ({"Sec-Fetch-Site": "same-site"}, {}, 403),
        ({}, {"secret": "guessed"}, 403),
        ({}, {"secret": "größe"}, 403),
        ({"Host": "elsewhere.example"}, {}, 421),
        ({"Content-Type": "text/plain"}, {}, 400),
        ({}, {"prompt": " \n"}, 400),
        ({}, {"tokens": "501"}, 400),
        ({}, {"tokens": "²"}, 400),
        ({}, {"stage": []}, 400),
        ({}, {"stage": "branch:none"}, 422),
        ({}, {"prompt": "x" * 2_000_000}, 413),
    ],
)
def test_a_question_that_is_not_the_pages_own_or_asks_for_too_much_is_refused(
    headers: dict[str, str], form: dict[str, Any], status: int, server: Server
) -> None:
    got, page, _ = Talk(server).read(Talk(server).ask(headers=headers, **form))
    assert got == status
    assert "heard" not in page


def test_a_prompt_of_any_script_that_the_form_takes_is_answered(server: Server) -> None:
    status, page, _ = Talk(server).read(Talk(server).ask(prompt="日" * 20_000))
    assert status == 200
    assert "base heard 日日日" in page


def test_an_answer_that_breaks_off_is_told_and_the_other_models_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Answers.answer

    def answer(self: Answers, model: Any, prompt: str, settings: Any, hear: Callable[[str], None]) -> str:
        if model.name == "base":
            hear("the answer is")
            raise RuntimeError("a path of this machine")
        return whole(self, model, prompt, settings, hear)

    monkeypatch.setattr(Answers, "answer", answer)
    status, page, _ = Talk(server).read(Talk(server).ask())
    assert status == 200
    assert (
        'the answer is</bdi></p><p class="below">RuntimeError while this was answered: the answer is not whole' in page
    )
    assert "a path of this machine" not in page
    assert "merged heard hello" in page
    assert page.rstrip().endswith("</html>")


def test_without_the_option_nothing_is_posted_and_no_page_leads_there(tmp_path: Path) -> None:
    (tmp_path / "one" / "stamps").mkdir(parents=True)
    for server in served(tmp_path, chat=False):
        talk = Talk(server)
        assert talk.get("/chat/one/")[0] == 404
        assert "/chat/" not in talk.get("/runs/one/")[1]
        status, _, headers = talk.read(talk.send("POST", "/chat/one/", "prompt=a", {}))
        assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_page_of_a_run_leads_to_its_chat_and_a_run_that_is_not_listed_has_none(server: Server) -> None:
    assert 'href="/chat/one/"' in Talk(server).get("/runs/one/")[1]
    assert Talk(server).get("/chat/three/")[0] == 404


def test_a_finished_runs_models_answer_and_its_folder_stays_as_it_was(finished: Path) -> None:
    from spunge.evaluation.generation import GenerationSettings
    from spunge.run.asking import Asking

    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    asking = Asking(finished)
    said = [asking.answer(model, "tokyo", GenerationSettings(max_new_tokens=7)) for model in asking.models]
    asking.close()
    for server in served(finished.parent, chat=True):
        page = Talk(server).read(Talk(server).ask(finished.name, prompt="tokyo", stage=asking.names))[1]
    texts = re.findall(r'<p class="said"><bdi>(.*?)</bdi>', page, re.DOTALL)
    assert [text.strip() for text in texts] == [text.strip() for text in said]
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_a_comparison_pairs_items_where_that_is_asked_for(finished: Path) -> None:
    shutil.copytree(finished, finished.parent / "again")
    rows: list[int] = []
    for pair in (False, True):
        for server in served(finished.parent, chat=False, pair=pair):
            page = Talk(server).get(f"/compare?run={finished.name}&run=again")[1]
        assert ("shown by `spunge view --pair`" in page) is not pair
        assert ("aired by item" in page) is True
        assert ("nothing is paired by item" in page) is False
        rows.append(page.count("<tr"))
    assert rows[1] > rows[0]
