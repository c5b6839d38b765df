"""`spunge view`: a server of this machine alone, that only shows.

It listens on the loopback address, answers GET and HEAD whose Host header names it (another name that was made to lead here is
refused), gives out nothing but its own pages and the named files of runs of one folder, and follows no link. Its pages have no
script, and a policy that forbids them: a report that was written by somebody else runs nothing either. With `chat` it answers
questions to the models of runs too, that its own pages post.
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
from spunge.view.chatting import MOST_BYTES, Chat, question
from spunge.view.pages import FILES, Refused, compare_page, list_page, plain, run_page, told_page
from spunge.view.runs import Reader, listed

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
MOST = 64 << 20  # bytes of a file that is given out
MOST_RUNS = 12  # that are compared at once
TIMEOUT = 20  # seconds that a request may take to come in
CHAT = r"/chat/(.+)/"
OWN_PAGES = "same-origin"  # a browser says where a question comes from to its own origin alone
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Answer(NamedTuple):
    body: bytes
    kind: str = "text/html"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = POLICY
    referrer: str = "no-referrer"


class Server(ThreadingHTTPServer):
    """root: the folder whose runs are shown. chat: the models of runs can be asked. pair: comparisons pair items."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"

    def __init__(self, root: Path, port: int, chat: bool = False, pair: bool = False) -> None:
        self.root, self.reader = root.resolve(), Reader()
        self.chat, self.pair = Chat() if chat else None, pair
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
        if self.chat is not None and (match := re.fullmatch(CHAT, path, re.DOTALL)):
            name = match.group(1)
            return _html(self.chat.page(name, self.folder_of(name)), referrer=OWN_PAGES)
        if match := re.fullmatch(r"/runs/(.+)/([^/]*)", path, re.DOTALL):
            return self._of_run(*match.groups())
        raise Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _of_run(self, name: str, file: str) -> Answer:
        """A run is one that is listed, and a file one that runs have: nothing is looked up by what was asked."""
        folder = self.folder_of(name)
        if not file:
            return _html(run_page(self.reader.run(name, folder), self.reader, self.chat is not None))
        if file not in FILES:
            raise Refused(HTTPStatus.NOT_FOUND, "A run has no such file here.")
        content = _read(folder / file)
        if FILES[file] == "text/html":  # written by whoever made the run: it may be anything
            return Answer(content, policy=f"{POLICY}; sandbox allow-top-navigation-by-user-activation")
        return Answer(plain(redacted(content.decode(errors="replace"))).encode(), "text/plain")

    def folder_of(self, name: str) -> Path:
        folder = listed(self.root).get(name)
        if folder is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such run.")
        return folder

    def _compared(self, names: list[str], stage: str) -> Answer:
        if len(names) > MOST_RUNS:
            raise Refused(HTTPStatus.BAD_REQUEST, f"Compare at most {MOST_RUNS} runs at once.")
        folders = [self.folder_of(name) for name in names]
        if any((folder / file).is_symlink() for folder in folders for file in FILES):
            raise Refused(HTTPStatus.FORBIDDEN, "A file of these runs is a link, which is not followed.")
        return _html(compare_page(folders, stage, self.pair))


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

    def do_POST(self) -> None:
        """A question, the one thing that is posted."""
        begun = False

        def begin() -> None:
            nonlocal begun
            begun = True
            self._head(_html("", referrer=OWN_PAGES), None)

        def write(text: str) -> None:
            self.wfile.write(text.encode("utf-8", "replace"))
            self.wfile.flush()

        try:
            self._refuse_host()
            chat, match = self.server.chat, re.fullmatch(CHAT, unquote(self.path, errors="replace"), re.DOTALL)
            if chat is None or match is None:
                self.send_error(HTTPStatus.NOT_IMPLEMENTED)
                return
            form = self._form(chat)
            name = match.group(1)
            chat.tell(name, self.server.folder_of(name), question(form), write, begin)
        except OSError:
            return  # who asked has gone
        except Refused as refused:
            refusal = _html(told_page(refused.status.phrase, str(refused)), refused.status)
        except RecipeError as error:
            refusal = _html(told_page("This cannot be asked", str(error)), HTTPStatus.UNPROCESSABLE_ENTITY)
        except Exception as error:
            said = f"{type(error).__name__} while this was answered."
            refusal = _html(told_page("This cannot be answered", said), HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            return
        if not begun:
            self._give(refusal)

    def _form(self, chat: Chat) -> dict[str, list[str]]:
        """What a form of this server's own page holds. Raises Refused for any other."""
        kind, length = self.headers.get_content_type(), self.headers.get("Content-Length", "")
        if kind != "application/x-www-form-urlencoded" or not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.BAD_REQUEST, "This is no form.")
        if len(length) > 9 or int(length) > MOST_BYTES:
            self._pass_over(int(length) if len(length) < 9 else 0)
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The prompt is too long.")
        content = self.rfile.read(int(length)).decode("ascii", "replace")
        form = parse_qs(content, keep_blank_values=True, errors="replace", max_num_fields=200)
        own = [f"http://{name}:{self.server.server_address[1]}" for name in NAMES]
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if not chat.is_own(origin, site, form.get("secret", [""])[0], own):
            raise Refused(HTTPStatus.FORBIDDEN, "A question comes from this server's own page; open the chat anew.")
        return form

    def _pass_over(self, length: int) -> None:
        """Read what is too long: one whose sending is cut off does not hear why."""
        while length > 0 and (piece := self.rfile.read(min(length, MOST_BYTES))):
            length -= len(piece)

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
            self._head(answer, len(answer.body))
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    def _head(self, answer: Answer, length: int | None) -> None:
        """length: None where it ends when the connection does."""
        self.send_response(answer.status)
        self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", answer.policy)
        self.send_header("Referrer-Policy", answer.referrer)
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass  # what was looked at is nobody's matter


def _html(text: str, status: HTTPStatus = HTTPStatus.OK, referrer: str = "no-referrer") -> Answer:
    return Answer(text.encode("utf-8", "replace"), status=status, referrer=referrer)


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
def serving(root: str | Path, port: int = 0, chat: bool = False, pair: bool = False) -> Iterator[Server]:
    """A server over the runs of a folder, closed at the block's end; port 0: any that is free.

    Raises RecipeError where there is no such folder, and where the port is taken.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise RecipeError(f"view: {str(root)!r} is no folder; give one that holds runs, such as runs")
    try:
        server = Server(folder, port, chat, pair)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--port: {port} cannot be listened on ({printable(error)}); give another") from None
    try:
        yield server
    finally:
        server.server_close()
        if server.chat is not None:
            server.chat.close()
