"""Which columns hold the texts, and which one names the parts, where nobody said: by the names that data sets give them."""

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spunge.data.arrays import blocks
from spunge.data.query import Query
from spunge.data.tables import taken
from spunge.errors import RecipeError

MESSAGES = ("messages", "conversations", "conversation")
TEXTS = ("text", "content", "document", "sentence", "passage", "article")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "answer", "response", "output")
ALPACA = ("instruction", "input", "output")  # whose `input` belongs to the prompt, and is often empty
ATTRIBUTES = (
    "topic",
    "category",
    "subject",
    "domain",
    "group",
    "target_group",
    "subset",
    "theme",
    "class",
    "label",
    "author",
)
ASIDE = ("split", "fold", "source", "lang", "language", "id")  # columns of few values that say nothing of the content
MOST, FEWEST = 20, 4  # values that a guessed attribute has, and rows that each has in the mean


def readings(query: Query) -> list[dict[str, str]]:
    """Role -> column or expression: every way to read the rows' texts that the usual names of columns allow."""
    there = {name: column for name in _names() if (column := query.column(name)) is not None and _holds(query, column)}
    ways = [{"messages": there[name]} for name in MESSAGES if name in there]
    ways += [{"text": there[name]} for name in TEXTS if name in there and _is_text(query, there[name])]
    if all(name in there and _is_text(query, there[name]) for name in ALPACA):
        return [*ways, _alpaca(query, *(there[name] for name in ALPACA))]
    pairs = product(PROMPTS, COMPLETIONS)
    ways += [{"prompt": there[one], "completion": there[two]} for one, two in pairs if {one, two} <= there.keys()]
    return list({tuple(way.items()): way for way in ways}.values())


def guessed_texts(query: Query, given: Mapping[str, str], block: str, options: str) -> dict[str, str]:
    """Role -> column: what is given, and what is missing of it where there is one sensible guess.

    block: the recipe's, for errors. options: what to give in place of a guess. Raises RecipeError where there is none, or more.
    """
    if given and ("prompt" in given) == ("completion" in given):
        return dict(given)
    if given:
        missing, names = ("completion", COMPLETIONS) if "prompt" in given else ("prompt", PROMPTS)
        known = {column for name in names if (column := query.column(name)) is not None and _is_text(query, column)}
        ways = [{**given, missing: column} for column in sorted(known - set(given.values()))]
        ways = [{role: way[role] for role in ("prompt", "completion")} for way in ways]
    else:
        ways = readings(query) or _only_text(query)
    if len(ways) == 1:
        return ways[0]
    there = f"columns: {', '.join(query.columns)}"
    if not ways:
        raise RecipeError(f"{block}: no column is called as texts are ({there}); give {options}")
    told = ", or ".join(reading_told(way) for way in ways[:3])
    raise RecipeError(f"{block}: the texts may be {told} ({there}); give {options}")


def guessed_attribute(query: Query, kept: np.ndarray, texts: Mapping[str, str]) -> str | None:
    """The column that names the parts; None where none looks like it. Raises RecipeError where several do."""
    used = {query.column(given) for given in texts.values()}
    made_of = [name for name in query.columns if any(quoted(name) in given for given in texts.values())]
    few = [name for name in query.columns if name not in used | {*made_of} and _parts(query, kept, name)]
    named = [name for name in few if name.strip().lower() in ATTRIBUTES]
    known = named or [name for name in few if name.strip().lower() not in ASIDE]
    if len(known) > 1:
        raise RecipeError(
            f"split.by: several columns may name the parts ({', '.join(known)}); give --by COLUMN, or --by none for one part"
        )
    return known[0] if known else None


def reading_told(way: Mapping[str, str]) -> str:
    """`prompt: question and completion: answer`, as a recipe has it."""
    return " and ".join(f"{role}: {given}" for role, given in way.items())


def quoted(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def _alpaca(query: Query, instruction: str, beside: str, output: str) -> dict[str, str]:
    """The prompt with what stands beside it, where any row has that."""
    chunks = query.records.table[beside].chunks
    if not any(pc.any(pc.not_equal(pc.utf8_trim_whitespace(chunk), "")).as_py() for chunk in chunks):
        return {"prompt": instruction, "completion": output}
    more = f"coalesce(chr(10) || nullif(trim({quoted(beside)}), ''), '')"
    return {"prompt": f"{quoted(instruction)} || {more}", "completion": output}


def _names() -> Iterator[str]:
    yield from dict.fromkeys((*MESSAGES, *TEXTS, *PROMPTS, *COMPLETIONS))


def _only_text(query: Query) -> list[dict[str, str]]:
    """The one column of the rows, where it holds text, whatever it is called."""
    return [{"text": name} for name in query.columns if len(query.columns) == 1 and _is_text(query, name)]


def _is_text(query: Query, column: str) -> bool:
    return bool(pa.types.is_string(query.records.table.schema.field(column).type))


def _holds(query: Query, column: str) -> bool:
    """Whether a column can hold texts or conversations."""
    return _is_text(query, column) or pa.types.is_nested(query.records.table.schema.field(column).type)


def _parts(query: Query, kept: np.ndarray, name: str) -> bool:
    """Whether a column has few values, all words, in every row, each in several rows."""
    if not _is_text(query, name):
        return False
    values: set[str | None] = set()
    for part in blocks(len(kept)):
        values |= {*pc.unique(taken(query.records.table.select([name]), kept[part])[name]).to_pylist()}
        if None in values or len(values) > MOST:
            return False
    if len(values) < 2 or len(kept) < FEWEST * len(values):
        return False
    return not any(_is_number(value) or not value.strip() for value in values if value is not None)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.strip().lower() in ("true", "false", "yes", "no")
    return True
