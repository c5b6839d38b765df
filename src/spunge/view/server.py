"""`spunge view`: a server of this machine alone, that only shows.

It listens on the loopback address, answers GET and HEAD whose Host header names it (another name that was made to lead here is
refused), gives out nothing but its own pages and the named files of runs of one folder, and follows no link. Its pages have no
script, and a policy that forbids them: a report that was written by somebody else runs nothing either.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from spunge.errors import RecipeError, printable, redacted
from spunge.view.pages import FILES, compare_page, list_page, plain, run_page, told_page
from spunge.view.runs import Reader, listed

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
MOST = 64 << 20  # bytes of a file that is given out
MOST_RUNS = 12  # that are compared at once
TIMEOUT = 20  # seconds that a request may take to come in
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Answer(NamedTuple):
    body: bytes
    kind: str = "text/html"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = POLICY


class Refused(Exception):  # noqa: N818 - an answer, no error
    """A request that is not answered as it was asked."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """root: the folder whose runs are shown."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.reader = root.resolve(), Reader()
        super().__init__((LOOPBACK, port), Handler)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def answer(self, target: str) -> Answer:
        """What a path and its query ask for. Raises Refused."""
        parts = urlsplit(target)
        path, query = unquote(parts.path, errors="replace"), parse_qs(parts.query, errors="replace", max_num_fields=100)
        if path == "/":
            asked = {name: values[0] for name, values in query.items()}
            return _html(list_page(self.root, self.reader, asked))
        if path == "/compare":
            return self._compared(query.get("run", []), query.get("stage", ["merged"])[0])
        if match := re.fullmatch(r"/runs/(.+)/([^/]*)", path, re.DOTALL):
            return self._of_run(*match.groups())
        raise Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _of_run(self, name: str, file: str) -> Answer:
        """A run is one that is listed, and a file one that runs have: nothing is looked up by what was asked."""
        folder = self._folder(name)
        if not file:
            return _html(run_page(self.reader.run(name, folder), self.reader))
        if file not in FILES:
            raise Refused(HTTPStatus.NOT_FOUND, "A run has no such file here.")
        content = _read(folder / file)
        if FILES[file] == "text/html":  # written by whoever made the run: it may be anything
            return Answer(content, policy=f"{POLICY}; sandbox allow-top-navigation-by-user-activation")
        return Answer(plain(redacted(content.decode(errors="replace"))).encode(), "text/plain")

    def _folder(self, name: str) -> Path:
        folder = listed(self.root).get(name)
        if folder is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such run.")
        return folder

    def _compared(self, names: list[str], stage: str) -> Answer:
        if len(names) > MOST_RUNS:
            raise Refused(HTTPStatus.BAD_REQUEST, f"Compare at most {MOST_RUNS} runs at once.")
        folders = [self._folder(name) for name in names]
        if any((folder / file).is_symlink() for folder in folders for file in FILES):
            raise Refused(HTTPStatus.FORBIDDEN, "A file of these runs is a link, which is not followed.")
        return _html(compare_page(folders, stage))


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "spunge", ""
    timeout = TIMEOUT

    def do_GET(self) -> None:
        try:
            self._refuse_host()
            answer = self.server.answer(self.path)
        except Refused as refused:
            answer = _html(told_page(refused.status.phrase, str(refused)), refused.status)
        except RecipeError as error:
            answer = _html(told_page("This cannot be shown", str(error)), HTTPStatus.UNPROCESSABLE_ENTITY)
        except Exception as error:  # a page that cannot be made is said to be so, whatever the reason
            said = f"{type(error).__name__} while this page was made."
            answer = _html(told_page("This cannot be shown", said), HTTPStatus.INTERNAL_SERVER_ERROR)
        self._give(answer)

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class says of a request that it cannot read, and of a method that is not above: here every other one."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._give(_html(told_page(status.phrase, "Here runs are only shown."), status))

    def _refuse_host(self) -> None:
        """A page of another site whose name leads to this machine must not read what is here (DNS rebinding)."""
        port = self.server.server_address[1]
        if self.headers.get_all("Host", []) not in [[f"{name}:{port}"] for name in NAMES]:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"Ask for http://{LOOPBACK}:{port}/ by that name.")

    def _give(self, answer: Answer) -> None:
        with suppress(OSError):  # who asked has gone
            self.send_response(answer.status)
            self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Content-Security-Policy", answer.policy)
            if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
                self.send_header("Allow", "GET, HEAD")
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass  # what was looked at is nobody's matter


def _html(text: str, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(text.encode("utf-8", "replace"), status=status)


def _read(file: Path) -> bytes:
    """A plain file's content. Raises Refused for a link and for whatever else is not one."""
    flags = os.O_RDONLY if sys.platform == "win32" else os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        if file.is_symlink() or not file.is_file():
            raise Refused(HTTPStatus.NOT_FOUND, "The run has no such file.")
        with open(os.open(file, flags), "rb") as opened:
            content = opened.read(MOST + 1)
    except OSError as error:
        raise Refused(HTTPStatus.NOT_FOUND, f"The file cannot be read ({error.strerror}).") from None
    if len(content) > MOST:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The file is too large to be shown here.")
    return content


@contextmanager
def serving(root: str | Path, port: int = 0) -> Iterator[Server]:
    """A server over the runs of a folder, closed at the block's end; port 0: any that is free.

    Raises RecipeError where there is no such folder, and where the port is taken.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise RecipeError(f"view: {str(root)!r} is no folder; give one that holds runs, such as runs")
    try:
        server = Server(folder, port)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--port: {port} cannot be listened on ({printable(error)}); give another") from None
    try:
        yield server
    finally:
        server.server_close()
