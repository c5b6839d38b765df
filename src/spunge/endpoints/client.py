"""An OpenAI-compatible endpoint: one chat completion after the other or several at once, with retries, a pace and a budget.

What goes wrong is a RecipeError of one line. The key comes from the environment, and stands in no error, log or file.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2 as httpx

from spunge.endpoints.settings import EndpointSettings
from spunge.errors import HIDDEN, RecipeError, conceal
from spunge.files import parse_json

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses that may pass
FIRST_WAIT = 1.0  # seconds before the first retry where the endpoint says nothing of it; then twice as long each time
LONGEST_WAIT = 120.0  # seconds before a retry; an endpoint that asks for more is given up
LARGEST = 1 << 20  # bytes of a reply
SECRET = 8  # characters of a key; a shorter one, such as EMPTY, stands for none
SHOWN = 120  # characters of what an endpoint says
MENDS = {401: "the key (key_env)", 403: "the key (key_env)", 404: "base_url or model"}
THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


class Reply(NamedTuple):
    text: str
    cut: bool  # it ended at max_tokens, in the middle
    tokens: int | None  # of request and reply, as the endpoint counts them

    @property
    def said(self) -> str:
        """The text without the thoughts that some models write first."""
        return THINKING.sub("", self.text)


class _PassingError(Exception):
    """What may be gone after a while. `wait`: seconds that the endpoint asks for."""

    def __init__(self, told: str, wait: float | None = None) -> None:
        super().__init__(told)
        self.wait = wait


class Endpoint:
    """Counts the calls and tokens of all that is asked through it. Its methods may be called by one thread at a time."""

    def __init__(self, settings: EndpointSettings, setting: str) -> None:
        """setting: the recipe's block, for errors. Raises RecipeError where the environment lacks the key."""
        self._settings, self._setting = settings, setting
        self._key = key_of(settings.key_env, setting)
        self._lock = threading.Lock()
        self._next = 0.0  # when the next call may begin
        self._stop = threading.Event()  # one of the requests has failed for good
        self.calls = self.tokens = self.answered = 0

    def ask(self, bodies: Sequence[Mapping[str, Any]], retries: int | None = None) -> Iterator[tuple[int, Reply]]:
        """The index and the reply of each request, as they come. Raises RecipeError where one fails for good; the replies that
        were still on their way are given first."""
        most = self._settings.retries if retries is None else retries
        self._stop.clear()
        # A proxy has no way to this machine itself.
        here = urlsplit(self._settings.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        client = httpx.Client(timeout=self._settings.timeout, trust_env=not here, headers=self._headers())
        failed: Exception | None = None
        with client, ThreadPoolExecutor(min(self._settings.parallel, max(1, len(bodies)))) as pool:
            waiting = {pool.submit(self._asked, client, body, most): at for at, body in enumerate(bodies)}
            try:
                for each in as_completed(waiting):
                    if each.cancelled():
                        continue
                    if (error := each.exception()) is None:
                        yield waiting[each], each.result()
                    elif failed is None and isinstance(error, Exception):
                        failed = error
                        self._stop.set()
                        for other in waiting:
                            other.cancel()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        if failed is not None:
            raise failed

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _asked(self, client: httpx.Client, body: Mapping[str, Any], retries: int) -> Reply:
        told = ""
        for attempt in range(retries + 1):
            self._enter()
            try:
                reply = self._called(client, body)
            except _PassingError as error:
                told, wait = str(error), FIRST_WAIT * 2**attempt if error.wait is None else error.wait
                if wait > LONGEST_WAIT:
                    raise self._given_up(f"{told}, and asks to wait {wait:.0f} s") from None
                if attempt < retries and not self._stop.is_set():
                    self._stop.wait(wait)
                    continue
                break
            self._count(reply)
            return reply
        raise self._given_up(told) from None

    def _given_up(self, told: str) -> RecipeError:
        kept = "what it answered is kept: " if self.answered else ""
        return RecipeError(
            f"{self._setting}.base_url: {self._settings.base_url!r} {told}; {kept}start it or mend the address, and run again"
        )

    def _enter(self) -> None:
        """Wait for the pace, and count the call. Raises RecipeError where the budget is spent."""
        settings = self._settings
        with self._lock:
            if settings.max_calls is not None and self.calls >= settings.max_calls:
                raise self._spent("max_calls", settings.max_calls, "calls")
            if settings.max_total_tokens is not None and self.tokens >= settings.max_total_tokens:
                raise self._spent("max_total_tokens", settings.max_total_tokens, "tokens")
            self.calls += 1
            now = time.monotonic()
            begin = max(now, self._next)
            if settings.per_minute is not None:
                self._next = begin + 60 / settings.per_minute
        if begin > now:
            self._stop.wait(begin - now)

    def _count(self, reply: Reply) -> None:
        if reply.tokens is None and self._settings.max_total_tokens is not None:
            raise RecipeError(
                f"{self._setting}.max_total_tokens: {self._settings.base_url!r} does not say how many tokens it took; give "
                "max_calls in its place"
            )
        with self._lock:
            self.tokens += reply.tokens or 0
            self.answered += 1

    def _called(self, client: httpx.Client, body: Mapping[str, Any]) -> Reply:
        deadline = time.monotonic() + self._settings.timeout
        content = bytearray()
        try:
            with client.stream(
                "POST", f"{self._settings.base_url.rstrip('/')}/chat/completions", json=body
            ) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise _PassingError(f"did not answer within {self._settings.timeout:g} s (timeout)")
                    if len(content) > LARGEST:
                        raise self._given_up(f"answers with more than {LARGEST >> 20} MiB")
        except httpx.TimeoutException:
            raise _PassingError(f"did not answer within {self._settings.timeout:g} s (timeout)") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise self._given_up("is no address of a server") from None
        except httpx.HTTPError as error:
            raise _PassingError(f"cannot be reached ({str(error)[:SHOWN] or type(error).__name__})") from None
        if response.status_code in AGAIN:
            wait = _seconds(response.headers.get("retry-after"))
            raise _PassingError(f"answers {response.status_code}{self._said(bytes(content))}", wait)
        if response.status_code != 200:
            raise RecipeError(
                f"{self._setting}: {self._settings.base_url!r} answers {response.status_code}{self._said(bytes(content))}; mend "
                f"{MENDS.get(response.status_code, 'its settings')}"
            )
        return _reply(bytes(content), self._settings.base_url, self._setting)

    def _spent(self, name: str, most: int, what: str) -> RecipeError:
        return RecipeError(
            f"{self._setting}.{name}: {most} {what} are spent and some answers are still to come"
            f"{'; those that came are kept' if self.answered else ''}: raise it and run again"
        )

    def _said(self, content: bytes) -> str:
        """What an endpoint says of an error, without the key, which some repeat."""
        try:
            told = parse_json(content)
            error = told.get("error", told) if isinstance(told, dict) else told
            message = error.get("message", "") if isinstance(error, dict) else error
        except ValueError:
            message = content[: 4 * SHOWN].decode("utf-8", "replace")
        text = str(message).replace(self._key, HIDDEN) if self._key else str(message)
        return f" ({text[:SHOWN]})" if text else ""


def key_of(variable: str | None, setting: str) -> str | None:
    """The key in a variable of the environment. Raises RecipeError, without it, where it is missing or cannot be sent."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RecipeError(f"{setting}.key_env: the environment has no {variable}; set it, or leave key_env out")
    if len(key) >= SECRET:
        conceal(key)
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise RecipeError(f"{setting}.key_env: what {variable} holds is no key: it has spaces or other characters")
    return key


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; a date, or nothing, is None."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None


def _reply(content: bytes, base_url: str, setting: str) -> Reply:
    try:
        told = parse_json(content)
        choice = told["choices"][0]
        text = choice["message"]["content"]
        usage = told.get("usage")
    except (ValueError, LookupError, TypeError):
        shown = content[:SHOWN].decode("utf-8", "replace")
        raise RecipeError(
            f"{setting}.base_url: {base_url!r} answers with no chat completion ({shown!r}); give the address of an "
            "OpenAI-compatible endpoint, such as http://localhost:8000/v1"
        ) from None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    tokens = total if isinstance(total, int) and not isinstance(total, bool) and total >= 0 else None
    return Reply(text if isinstance(text, str) else "", choice.get("finish_reason") == "length", tokens)
