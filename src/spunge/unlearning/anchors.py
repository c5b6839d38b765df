"""Anchored terms: what only the texts to forget say, and a generic term for each (arXiv 2310.02238, section 2.2).

A text's anchored terms are replaced by generic ones; what a model foretells there is brought back to the places of the text as it
was. Terms are looked for in tokens, as a term is written after a space, at a text's start and after a bracket; the longest one
first, and never inside a word.

    Harry went  to  Hog warts and Harry         the text
    Jon   went  to  a school  and Jon           its translation

A place foretells the token behind it by the last token of the translation that stands before that token's. Inside a term there is
no such token, and those places are not learned. Nor is a term's second occurrence in a text: before it a text would say one
name, and then the model would learn another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spunge.errors import RecipeError

SETTING = "unlearn.anchors"


class Term(NamedTuple):
    """One way in which a term is written."""

    name: str
    ids: tuple[int, ...]
    generic: tuple[int, ...]


class Place(NamedTuple):
    """Where a token's generic prediction comes from."""

    at: int | None  # the place of the translation that foretells it; None: it is not learned
    spoken: tuple[int, ...]  # first tokens of the generic terms that stand for terms before it


class Translated(NamedTuple):
    ids: list[int]
    places: list[Place]  # of each token of the text
    terms: frozenset[str]  # that stand in it


def read_anchors(given: Mapping[str, str] | str | None) -> dict[str, str]:
    """Term -> generic term, as the recipe or a YAML or JSON file has them. Raises RecipeError for what is no such mapping."""
    content: Any = given or {}
    if isinstance(given, str):
        try:
            content = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{SETTING}: {given!r} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(content, Mapping) or not all(isinstance(text, str) for pair in content.items() for text in pair):
        raise RecipeError(f"{SETTING}: {given!r} must hold texts by texts, such as Hogwarts: a school; quote numbers")
    anchors = {term.strip(): generic.strip() for term, generic in content.items()}
    for term, generic in anchors.items():
        if not term or not generic:
            raise RecipeError(f"{SETTING}: {term!r}: {generic!r}: neither may be empty")
        if term == generic:
            raise RecipeError(f"{SETTING}: {term!r} stands for itself; give another term, or leave it out")
    if given is not None and not anchors:
        raise RecipeError(f"{SETTING}: there are no terms; give some, or leave it out")
    return anchors


def terms_of(anchors: Mapping[str, str], tokenizer: Any) -> list[Term]:
    """Every way in which the terms are written, the longest first."""
    terms: dict[tuple[int, ...], Term] = {}
    for name, generic in anchors.items():
        for before in ("", " ", "("):
            ids, others = _written(name, before, tokenizer), _written(generic, before, tokenizer)
            if ids and others:
                terms.setdefault(ids, Term(name, ids, others))
    return sorted(terms.values(), key=lambda term: -len(term.ids))


def _written(text: str, before: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of a text that follows a space or a bracket; none where it has no tokens of its own there."""
    ids = tuple(tokenizer(before + text, add_special_tokens=False)["input_ids"])
    if before != "(":
        return ids
    bracket = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
    return ids[len(bracket) :] if ids[: len(bracket)] == bracket else ()


def translated(ids: Sequence[int], terms: Sequence[Term], tokenizer: Any) -> Translated:
    """A text with its terms replaced, and where the prediction of each of its tokens comes from."""
    replaced: list[int] = []
    places: list[Place] = []
    seen: dict[str, tuple[int, ...]] = {}  # terms before -> first tokens of what stands for them
    at = 0
    while at < len(ids):
        spoken = tuple(sorted({token for tokens in seen.values() for token in tokens}))
        term = _term_at(ids, at, terms, tokenizer)
        own, put = (ids[at : at + 1], ids[at : at + 1]) if term is None else (term.ids, term.generic)
        again = term is not None and term.name in seen
        first = None if again or not replaced else len(replaced) - 1
        places += [Place(first, spoken), *[Place(None, spoken)] * (len(own) - 1)]
        replaced += put
        if term is not None:
            seen[term.name] = tuple(sorted({other.generic[0] for other in terms if other.name == term.name}))
        at += len(own)
    return Translated(replaced, places, frozenset(seen))


def _term_at(ids: Sequence[int], at: int, terms: Sequence[Term], tokenizer: Any) -> Term | None:
    for term in terms:
        stop = at + len(term.ids)
        if tuple(ids[at:stop]) != term.ids:
            continue
        if at > 0 and _goes_on(ids[at - 1], ids[at], tokenizer):
            continue
        if stop < len(ids) and _goes_on(ids[stop - 1], ids[stop], tokenizer):
            continue
        return term
    return None


def _goes_on(one: int, other: int, tokenizer: Any) -> bool:
    """Whether a token goes on with the word that the one before it ends with."""
    before: str = tokenizer.decode([one], clean_up_tokenization_spaces=False)
    both: str = tokenizer.decode([one, other], clean_up_tokenization_spaces=False)
    if one in tokenizer.all_special_ids or not both.startswith(before):
        return False
    return before[-1:].isalnum() and both[len(before) :][:1].isalnum()
