"""`spunge view --chat`: a prompt to some models of a run, whose answers are written into the page as they come.

The page has no script: the server sends it piece by piece. One question is answered at a time, and one run's models are in
memory. A question counts only if it comes from the server's own page: by its origin and by a secret that the page holds.
"""

import hmac
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import escape

from spunge.errors import RecipeError, one_line, printable
from spunge.view.pages import MOST_TOKENS, Refused, chat_page, plain

if TYPE_CHECKING:
    from spunge.run.asking import Asking

MOST_BYTES = 256 << 10  # of a question's form: 20,000 characters of any script
SAME_ORIGIN = "same-origin"


class Question(NamedTuple):
    prompt: str
    stages: tuple[str, ...]
    plain: bool
    max_new_tokens: int
    show: bool  # texts are shown, not blurred


def question(form: Mapping[str, Sequence[str]]) -> Question:
    """What a form asks. Raises Refused."""
    prompt = form.get("prompt", [""])[0].replace("\r\n", "\n")
    if not prompt.strip():
        raise Refused(HTTPStatus.BAD_REQUEST, "Write a prompt.")
    tokens = form.get("tokens", ["100"])[0]
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 6 and 1 <= int(tokens) <= MOST_TOKENS):
        raise Refused(HTTPStatus.BAD_REQUEST, f"Ask for 1 to {MOST_TOKENS} tokens.")
    if not (stages := tuple(dict.fromkeys(form.get("stage", [])))):
        raise Refused(HTTPStatus.BAD_REQUEST, "Choose a model.")
    return Question(prompt, stages, "plain" in form, int(tokens), "show" in form)


class Chat:
    """The models of the run that was asked last, and the secret of this server's pages."""

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(32)
        self._turn = threading.Lock()
        self._asking: Asking | None = None
        self._of: tuple[Path, int] | None = None  # which run, and as of when

    def is_own(self, origin: str | None, site: str | None, secret: str, own: Sequence[str]) -> bool:
        """Whether a question comes from one of this server's pages. own: its origins."""
        if origin not in own or site not in (None, SAME_ORIGIN):
            return False
        return hmac.compare_digest(secret.encode("utf-8", "replace"), self.secret.encode())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Raises Refused where another question is being answered."""
        if not self._turn.acquire(blocking=False):
            raise Refused(HTTPStatus.CONFLICT, "Another question is being answered; one is at a time.")
        try:
            yield
        finally:
            self._turn.release()

    def page(self, name: str, folder: Path) -> str:
        """The form."""
        with self.turn():
            asking = self._opened(folder)
            return "".join(chat_page(name, self.secret, asking.finished, asking.names))

    def tell(
        self, name: str, folder: Path, asked: Question, write: Callable[[str], None], begin: Callable[[], None]
    ) -> None:
        """Answer a question into a page: `begin` is called once it is sure that there will be one. Raises what `write` raises,
        RecipeError and Refused."""
        from spunge.evaluation.generation import GenerationSettings

        settings = GenerationSettings(chat=not asked.plain, max_new_tokens=asked.max_new_tokens)
        with self.turn():
            asking = self._opened(folder)
            models = [asking.model(stage) for stage in asked.stages]
            before, after = chat_page(name, self.secret, asking.finished, list(asked.stages), asked)
            begin()
            write(before)
            for model in models:
                kind = model.kind if model.kind in ("base", "control", "merged") else "branch"
                write(
                    f'<div class="side"><h3 class="{kind}"><bdi>{escape(printable(model.name))}</bdi></h3><p class="said"><bdi>'
                )
                failed = ""
                try:
                    answer = asking.answer(
                        model, asked.prompt, settings, lambda piece: write(str(escape(plain(piece))))
                    )
                    if not answer.strip():
                        write("<i>(nothing)</i>")
                except RecipeError as error:
                    failed = str(error)
                except OSError:
                    raise  # who asked has gone
                except Exception as error:  # else what is there so far would pass for the answer
                    failed = f"{type(error).__name__} while this was answered: the answer is not whole."
                write("</bdi></p>")
                if failed:
                    write(f'<p class="below">{escape(one_line(failed))}</p>')
                write("</div>\n")
            write(after)

    def _opened(self, folder: Path) -> "Asking":
        """The models of a run, none of which is loaded before it is asked."""
        from spunge.run.asking import Asking

        key = (folder, max((file.stat().st_mtime_ns for file in folder.glob("stamps/*")), default=0))
        if self._asking is None or self._of != key:
            self.close()
            self._asking, self._of = Asking(folder), key
        return self._asking

    def close(self) -> None:
        if self._asking is not None:
            self._asking.close()
        self._asking = self._of = None
