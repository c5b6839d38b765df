"""`spunge view`, asked over a real socket: what it shows, and all that it refuses."""

import http.client
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from spunge.errors import RecipeError
from spunge.view import server as serving_module
from spunge.view.runs import progress_of
from spunge.view.server import Server, serving

HOSTILE = "<img src=x onerror=alert(1)>&\"'"
SECRET = "what lies outside"


def content(forget: float = 0.3, base: str = "a" * 32, subject: str = "europe", method: str = "npo") -> dict[str, Any]:
    """results.json of a run that forgets one part."""
    about = {"method": method, "rule": "ties", "scale": 1.0, "base": "tiny/base", "base_fingerprint": base}
    models = [{"stage": stage, "kind": stage, "name": stage, **about} for stage in ("base", "merged")]
    rows = [
        {"stage": stage, "subject": of, "metric": "accuracy", "value": value, "n": 40, "group": group, "wanted": way}
        for of, group, way in ((subject, "forget", "down"), ("facts", "keep", "up"))
        for stage, value in (("base", 0.9), ("merged", forget if group == "forget" else 0.85))
    ]
    evaluations = [{"name": "quiz", "kind": "choices", "metrics": ["accuracy"], "rows": "r1", "instrument": None}]
    return {"schema": 1, "stages": ["base", "merged"], "models": models, "rows": rows, "evaluations": evaluations}


def write(root: Path, name: str, results: dict[str, Any] | None = None) -> Path:
    run = root / name
    (run / "stamps").mkdir(parents=True)
    (run / "recipe.yaml").write_text(
        f"model: {{path: tiny/base}}\nunlearn: {{method: npo}}\nname: {json.dumps(name)}\n"
    )
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
        (run / "report.html").write_text("<!doctype html><script>alert(1)</script>")
    return run


def at_work(run: Path, pid: int, host: str = "") -> None:
    stage = {
        "title": f"unlearn {HOSTILE}",
        "done": 3,
        "total": 12,
        "note": f"loss {HOSTILE}",
        "seconds": 7.0,
        "left": 21.0,
    }
    told = {"schema": 1, "host": host or socket.gethostname(), "pid": pid, "begun": time.time(), "written": time.time()}
    told |= {"finished": 2, "count": 9, "left": 75.0, "stages": [stage], "waiting": [f"judge {HOSTILE}"]}
    (run / "progress.json").write_text(json.dumps(told))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write(folder, "one", content())
    write(folder, "deep/two", content(0.5))
    write(folder, "begun")
    (tmp_path / "outside.json").write_text(SECRET)
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Got(tuple[int, str, dict[str, str]]):
    @property
    def status(self) -> int:
        return self[0]

    @property
    def text(self) -> str:
        return self[1]

    @property
    def headers(self) -> dict[str, str]:
        return self[2]


@pytest.fixture
def get(server: Server) -> Callable[..., Got]:
    """get("/path", method="POST", host="...") -> status, text, headers; the path goes out as it stands."""

    def ask(path: str, method: str = "GET", host: str | None = "", **headers: str) -> Got:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
        connection.putrequest(method, path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return Got((answer.status, text, {name.lower(): value for name, value in answer.getheaders()}))

    return ask


def test_all_runs_are_listed_whatever_their_depth_and_each_says_its_state(get: Callable[..., Got], root: Path) -> None:
    at_work(root / "begun", os.getpid())
    page = get("/")
    assert page.status == 200
    for name, state in (("one", "finished"), ("deep/two", "finished"), ("begun", "running")):
        assert f'<bdi>{name}</bdi></a> <span class="state {state}">{state}</span>' in page.text
    assert "npo, ties, scale 1" in page.text
    assert "3 of 3 runs" in page.text


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("q=two", ["deep/two"]),
        ("q=NPO+one", ["one"]),
        ("state=begun", ["begun"]),
        ("q=zzz", []),
        ("q=two&state=begun", []),
    ],
)
def test_the_list_is_filtered_by_words_and_by_state(get: Callable[..., Got], query: str, shown: list[str]) -> None:
    text = get(f"/?{query}").text
    assert [name for name in ("begun", "deep/two", "one") if f"<bdi>{name}</bdi>" in text] == shown


def test_a_run_shows_what_its_numbers_say_and_its_files(get: Callable[..., Got]) -> None:
    page = get("/runs/deep/two/")
    assert "metric    subject  wanted" in page.text
    assert '<a href="/runs/deep/two/report.html">Report</a>' in page.text
    assert 'http-equiv="refresh"' not in page.text
    assert json.loads(get("/runs/deep/two/results.json").text) == content(0.5)


def test_a_run_that_is_under_way_shows_how_far_it_is_and_the_page_loads_itself_anew(
    get: Callable[..., Got], root: Path
) -> None:
    at_work(root / "begun", os.getpid())
    page = get("/runs/begun/")
    assert "2 of 9 stages done, about 1:15 left" in page.text
    assert 'value="0.25"' in page.text
    assert '<meta http-equiv="refresh"' in page.text


def test_one_whose_process_is_gone_is_stopped_and_another_machines_is_believed(
    get: Callable[..., Got], root: Path
) -> None:
    gone = 2**22 + 1  # more than Linux gives
    at_work(root / "begun", gone)
    assert '<span class="state stopped">' in get("/").text
    assert "goes on from what is finished" in get("/runs/begun/").text
    at_work(root / "begun", gone, "another machine")
    assert '<span class="state running">' in get("/").text


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"schema": 1}', "[" * 5000, '{"schema": 1, "host": "", "pid": "x"}']
)
def test_a_damaged_file_of_progress_is_no_progress(get: Callable[..., Got], root: Path, text: str) -> None:
    (root / "begun" / "progress.json").write_text(text)
    assert get("/runs/begun/").status == 200
    assert '<span class="state stopped">' in get("/").text


def test_no_value_in_a_file_of_progress_reaches_the_pages_but_numbers_that_can_be_told(root: Path) -> None:
    file = root / "begun" / "progress.json"
    at_work(root / "begun", os.getpid())
    told = json.loads(file.read_text())
    stage = told["stages"][0]
    for value in (None, "x", [], {}, True, -1, math.inf, math.nan, 10**400):
        odd = [{**told, name: value} for name in told] + [
            {**told, "stages": [{**stage, name: value}]} for name in stage
        ]
        for content in odd:
            file.write_text(json.dumps(content))
            if (progress := progress_of(root / "begun")) is None:
                continue
            numbers = [progress.finished, progress.expected, progress.left, progress.begun, progress.written]
            for one in progress.stages:
                numbers += [one[name] for name in ("done", "total", "seconds", "left", "share")]
                assert isinstance(one["title"], str)
                assert isinstance(one["note"], str)
            assert all(number is None or isinstance(number, int) or math.isfinite(number) for number in numbers), (
                content
            )


def test_a_page_that_fails_in_whatever_way_is_answered(
    get: Callable[..., Got], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "list_page", lambda *_: 1 / 0)
    got = get("/")
    assert got.status == 500
    assert "ZeroDivisionError while this page was made" in got.text


def test_runs_are_compared_and_those_of_another_base_are_refused_with_the_reason(
    get: Callable[..., Got], root: Path
) -> None:
    page = get("/compare?run=one&run=deep/two")
    assert page.status == 200
    assert "2 runs compared" in page.text
    write(root, "other", content(base="b" * 32))
    refused = get("/compare?run=one&run=other")
    assert refused.status == 422
    assert "start from other bases" in refused.text
    assert get("/compare?run=one").status == 422
    assert get("/compare?run=one&run=nowhere").status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_nothing_but_reading_is_allowed(get: Callable[..., Got], method: str) -> None:
    for path in ("/", "/runs/one/", "/runs/one/results.json"):
        got = get(path, method)
        assert (got.status, got.headers["allow"]) == (405, "GET, HEAD")


def test_head_gives_the_headers_alone(get: Callable[..., Got]) -> None:
    whole, head = get("/runs/one/results.json"), get("/runs/one/results.json", "HEAD")
    assert (head.status, head.text) == (200, "")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.text.encode()))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil:{port}", None]
)
@pytest.mark.parametrize("path", ["/", "/runs/one/results.json"])
def test_another_name_that_leads_here_is_refused(
    get: Callable[..., Got], server: Server, host: str | None, path: str
) -> None:
    named = host.format(port=server.server_address[1]) if host else host
    got = get(path, host=named)
    assert got.status == 421
    assert "accuracy" not in got.text
    assert get(path, host=f"localhost:{server.server_address[1]}").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../outside.json",
        "/runs/one/../../outside.json",
        "/runs/one/%2e%2e/%2e%2e/outside.json",
        "/runs/one/..%2f..%2foutside.json",
        "/runs/%2e%2e/outside.json",
        "/runs//{outside}",
        "/runs/{outside}",
        "/runs/one/stamps",
        "/runs/one/.lock",
        "/runs/./",
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/runs/one/results.json%00.html",
        "/runs/one/results.json/",
        "/compare?run=../x&run={outside}",
    ],
)
def test_no_path_leads_out_of_the_folder(get: Callable[..., Got], root: Path, path: str) -> None:
    got = get(path.format(outside=root.parent / "outside.json"))
    assert got.status == 404
    assert SECRET not in got.text
    assert "root:" not in got.text


@pytest.mark.parametrize("file", ["results.json", "report.html", "recipe.yaml", "split.json", "progress.json"])
def test_a_file_that_is_a_link_is_not_followed(get: Callable[..., Got], root: Path, file: str) -> None:
    (root / "one" / file).unlink(missing_ok=True)
    (root / "one" / file).symlink_to(root.parent / "outside.json")
    assert get(f"/runs/one/{file}").status == 404
    for path in ("/", "/runs/one/", "/compare?run=one&run=deep/two"):
        assert SECRET not in get(path).text


def test_a_folder_that_is_a_link_is_no_run(get: Callable[..., Got], root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "run", content())
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    (root / "above").symlink_to(tmp_path / "elsewhere")
    assert "linked" not in get("/").text
    for path in ("/runs/linked/", "/runs/linked/results.json", "/runs/above/run/"):
        assert get(path).status == 404


def test_what_stands_in_runs_is_shown_as_text(get: Callable[..., Got], root: Path) -> None:
    name = HOSTILE.replace("/", "")
    write(root, name, content(subject=HOSTILE, method=HOSTILE))
    at_work(write(root, f"{name} 2"), os.getpid())
    assert get(f"/?q={quote(HOSTILE)}").status == 200
    own = quote(name)
    pages = ("/", f"/?q={own}", f"/runs/{own}/", f"/runs/{own}%202/", f"/compare?run={own}&run=one", f"/runs/{own}x/")
    for path in pages:
        text = get(path).text
        assert "<img" not in text
        assert "onerror=alert" not in text or "&lt;img" in text


def test_every_answer_forbids_scripts_and_frames(get: Callable[..., Got]) -> None:
    for path, method in (
        ("/", "GET"),
        ("/runs/one/", "GET"),
        ("/runs/one/report.html", "GET"),
        ("/none", "GET"),
        ("/", "POST"),
    ):
        got = get(path, method)
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script" not in policy
        assert "frame-ancestors 'none'" in policy
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["cross-origin-resource-policy"] == "same-origin"
        assert got.headers["cache-control"] == "no-store"
    assert "sandbox" in get("/runs/one/report.html").headers["content-security-policy"]
    assert get("/runs/one/recipe.yaml").headers["content-type"] == "text/plain; charset=utf-8"


def test_damaged_results_are_told_in_the_list_and_hurt_no_other_run(get: Callable[..., Got], root: Path) -> None:
    (root / "one" / "results.json").write_text('{"rows": 3}')
    page = get("/")
    assert "is damaged, or holds something else" in page.text
    assert 'value="one" aria-label="compare one" disabled' in page.text
    assert 'value="deep/two" aria-label="compare deep/two">' in page.text
    assert "<bdi>deep/two</bdi>" in page.text
    assert get("/runs/one/").status == 200


def test_results_that_change_are_read_anew(get: Callable[..., Got], root: Path) -> None:
    assert "0.30" in get("/runs/one/").text
    (root / "one" / "results.json").write_text(json.dumps(content(0.125)))
    assert "0.12" in get("/runs/one/").text


def test_only_this_machine_is_listened_to_and_what_cannot_be_is_refused(server: Server, root: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with (
        pytest.raises(RecipeError, match=r"--port: \d+ cannot be listened on"),
        serving(root, server.server_address[1]),
    ):
        pass
    with pytest.raises(RecipeError, match="is no folder"), serving(root / "nowhere"):
        pass


def test_nothing_in_the_folder_changes(get: Callable[..., Got], root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    for path in ("/", "/runs/one/", "/runs/begun/", "/compare?run=one&run=deep/two", "/runs/one/report.html"):
        assert get(path).status == 200
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before
