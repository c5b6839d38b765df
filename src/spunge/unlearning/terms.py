"""Anchored terms from an endpoint: a chat model is asked, passage by passage, for what only that text says, and for generic terms.

    unlearn:
      method: whp
      ask: {base_url: http://localhost:8000/v1, model: Qwen/Qwen2.5-7B-Instruct}

The texts to forget are sent to it. The authors asked GPT-4 for expressions unique to a passage and an alternative for each, as a
dictionary of Python (Eldan and Russinovich 2023, arXiv 2310.02238); the wording of our prompt is ours, and it asks for JSON. A
reply has to be one JSON object of texts by texts and nothing else. Of what it holds, a term that does not stand in its passage as
it is written is dropped, and so are a term or a generic one that is empty and a generic one that says its term.

Where passages disagree on a term, the generic one that most of them gave stands, of equals the one that came first in the rows.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from spunge.data.chat import Conversation
from spunge.data.samples import Samples
from spunge.endpoints.answers import Answers
from spunge.endpoints.client import Endpoint, Reply
from spunge.endpoints.settings import EndpointSettings, fields_of, request_of
from spunge.errors import RecipeError, one_line
from spunge.files import cache_folder, fingerprint, parse_json
from spunge.progress import Steps
from spunge.unlearning.anchors import SETTING as ANCHORS

SETTING = "unlearn.ask"
SHOWN = 60  # characters of a reply in an error
LETTERS_PER_TOKEN = 4
FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
PROMPT = (
    "Below is a passage of a text. List the expressions, names and entities in it that are unique to this text, so that one who "
    "knows the text could tell by them where the passage is from. For each, give an alternative expression that keeps the passage "
    "coherent and is unique to no text. Reply with one JSON object and nothing else: its keys are the expressions, spelled as in "
    'the passage, its values are the alternatives, such as {{"Hogwarts": "the academy"}}. Reply {{}} where there is none. '
    "The passage: {text}"
)

Terms = dict[str, str]  # term -> generic term


class AskSettings(EndpointSettings):
    prompt: str = Field(
        PROMPT, description="What is asked of each passage, which stands for {text}; {{ and }} stand for braces."
    )
    max_tokens: int = Field(1024, ge=1, description="Tokens of a reply. A model that reasons first needs more.")
    passage: int = Field(
        4000,
        ge=200,
        description="Characters of a passage. A row is one passage; a longer one is cut at spaces into several.",
    )
    unreadable: Literal["stop", "skip"] = Field(
        "stop",
        description="A reply that is no JSON object of texts. stop: the run stops there. skip: its passage gives no terms, as long "
        "as no more than half of the replies are such.",
    )

    @field_validator("prompt")
    @classmethod
    def _says_the_text(cls, prompt: str) -> str:
        if unknown := sorted(fields_of(prompt) - {"text"}):
            raise ValueError(f"no field {{{unknown[0]}}}; known: {{text}}; {{{{ and }}}} stand for braces")
        if "text" not in fields_of(prompt):
            raise ValueError("it never says {text}, so every passage would be asked alike")
        return prompt


class Found(NamedTuple):
    terms: Terms
    told: dict[str, Any]  # what became of the replies


def passages(parts: Mapping[str, Samples], length: int) -> list[str]:
    """What the rows say, each row in pieces of at most so many characters; each once, in the rows' order."""
    pieces = (piece for samples in parts.values() for text in _said(samples) for piece in _cut(text, length))
    return list(dict.fromkeys(pieces))


def _said(samples: Samples) -> Iterator[str]:
    """Each row's text, prompt and answer, or messages."""
    table = samples.table
    if samples.plain:
        yield from table["text"].to_pylist()
    elif "prompt" in table.column_names:
        pairs = zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True)
        yield from (f"{prompt}\n{completion}" for prompt, completion in pairs)
    else:
        for line in table["conversation"].to_pylist():
            yield "\n".join(message["content"] or "" for message in Conversation.from_json(line).messages)


def _cut(text: str, length: int) -> Iterator[str]:
    text = text.strip()
    while len(text) > length:
        at = max(text.rfind("\n", 0, length), text.rfind(" ", 0, length))
        at = at if at > 0 else length
        yield text[:at].strip()
        text = text[at:].strip()
    if text:
        yield text


class Asked:
    """The requests for some passages, and what was answered before."""

    def __init__(self, parts: Mapping[str, Samples], settings: AskSettings) -> None:
        self.settings = settings
        self.texts = passages(parts, settings.passage)
        self.bodies = [request_of(settings, text=text) for text in self.texts]
        self.keys = [fingerprint([body, settings.base_url]) for body in self.bodies]
        file = cache_folder() / "terms" / f"{fingerprint([settings.model, settings.base_url])[:32]}.jsonl"
        self.answers: Answers[Terms] = Answers(file, "terms", _terms)

    @property
    def missing(self) -> list[int]:
        """The passages that are still to be asked."""
        return [at for at, key in enumerate(self.keys) if key not in self.answers.known]


def sent(parts: Mapping[str, Samples], settings: AskSettings) -> str:
    """What a run would send, in a sentence; empty where all is answered."""
    asked = Asked(parts, settings)
    if not (missing := asked.missing):
        return ""
    characters = sum(len(asked.texts[at]) for at in missing)
    kept = f"; {len(asked.texts) - len(missing)} are answered already" if len(missing) < len(asked.texts) else ""
    return (
        f"{SETTING}: the texts to forget are sent to {settings.base_url!r}: {len(missing)} requests of a passage each, beside "
        f"tries, {characters} characters of text, about {characters // LETTERS_PER_TOKEN} tokens beside the prompt's{kept}"
    )


def inputs(parts: Mapping[str, Samples], settings: AskSettings) -> dict[str, Any]:
    """What the terms depend on."""
    names = {"base_url", "model", "prompt", "system", "max_tokens", "temperature", "request", "passage", "unreadable"}
    told = {f"{SETTING}.{name}": value for name, value in settings.model_dump(mode="json", include=names).items()}
    return {**told, "passages": fingerprint(passages(parts, settings.passage))}


def ask(parts: Mapping[str, Samples], settings: AskSettings, progress: Steps) -> Found:
    """Ask for the terms of all passages. Raises RecipeError where the endpoint fails, replies cannot be read, or no term came."""
    asked = Asked(parts, settings)
    missing, unread = asked.missing, []
    progress(0, len(missing))
    replies = Endpoint(settings, SETTING).ask([asked.bodies[at] for at in missing]) if missing else iter(())
    for done, (place, reply) in enumerate(replies, 1):
        if (terms := read_terms(reply)) is None:
            unread.append(reply)
        else:
            asked.answers.keep(asked.keys[missing[place]], terms)
        progress(done, len(missing))
    _refuse_unread(unread, len(missing), settings)
    pairs = [(text, asked.answers.known.get(key, {})) for text, key in zip(asked.texts, asked.keys, strict=True)]
    found = merged(pairs)
    if not found.terms:
        raise RecipeError(
            f"{SETTING}: {settings.model!r} gave no term for any of {len(pairs)} passages ({_counted(found.told['dropped'])}); "
            f"give another model, or {ANCHORS} in its place"
        )
    told = {"endpoint": settings.base_url, "model": settings.model, "passages": len(pairs), "unreadable": len(unread)}
    return Found(found.terms, told | found.told)


def _counted(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} dropped: {why}" for why, count in dropped.items()) or "none was dropped"


def _refuse_unread(unread: Sequence[Reply], asked: int, settings: AskSettings) -> None:
    if not unread:
        return
    first = "was cut at max_tokens" if unread[0].cut else repr(unread[0].text.strip()[:SHOWN])
    told = f"{len(unread)} of {asked} replies are no JSON object of texts by texts (first: {first})"
    if settings.unreadable == "stop" or 2 * len(unread) > asked:
        raise RecipeError(
            f"{SETTING}: {told}; {'what was read is kept: ' if len(unread) < asked else ''}mend prompt, model or max_tokens, or "
            "set unreadable to skip, and run again"
        )
    logging.getLogger("spunge").warning(one_line(f"{SETTING}: {told}; their passages give no terms"))


def read_terms(reply: Reply) -> Terms | None:
    """What a reply says; None where it is no JSON object of texts by texts alone, in a fence or not, or was cut."""
    text = reply.said
    if fenced := FENCED.fullmatch(text):
        text = fenced[1]
    try:
        return None if reply.cut else _terms(parse_json(text))
    except ValueError:
        return None


def _terms(content: object) -> Terms | None:
    if not isinstance(content, dict) or not all(isinstance(text, str) for pair in content.items() for text in pair):
        return None
    return content


def why_dropped(term: str, generic: str, passage: str) -> str | None:
    """Why a pair is of no use; None where it is."""
    if not re.search(r"\w", term) or not re.search(r"\w", generic):
        return "a term or a generic one is empty"
    if not stands(term, passage):
        return "the term does not stand in its passage"
    if stands(term.casefold(), generic.casefold()):
        return "the generic term says the term"
    return None


def stands(term: str, text: str) -> bool:
    """Whether a term stands in a text as it is written, and not inside a word."""
    return re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text) is not None


def merged(pairs: Sequence[tuple[str, Terms]]) -> Found:
    """The dictionary of all passages and their replies, in order."""
    votes: dict[str, Counter[str]] = {}
    dropped: Counter[str] = Counter()
    for passage, given in pairs:
        for spelled, said in given.items():
            term, generic = spelled.strip(), " ".join(said.split())
            if (why := why_dropped(term, generic, passage)) is not None:
                dropped[why] += 1
            else:
                votes.setdefault(term, Counter())[generic] += 1
    # Of equal counts max gives the first, and a Counter keeps the order in which its keys came.
    terms = {term: max(counts, key=lambda each: counts[each]) for term, counts in votes.items()}
    conflicts = {term: dict(counts) for term, counts in votes.items() if len(counts) > 1}
    return Found(terms, {"terms": len(terms), "dropped": dict(dropped), "conflicts": conflicts})


def standing(terms: Mapping[str, str], parts: Mapping[str, Samples]) -> Terms:
    """Those of the terms that stand in some rows."""
    said = "\0".join(text for samples in parts.values() for text in samples.words())
    return {term: generic for term, generic in terms.items() if term in said}
