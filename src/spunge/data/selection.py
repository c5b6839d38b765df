"""The retain rows: selected like the forget rows, and set beside them, as a row that is both is unlearned and held at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from spunge.data.arrays import among, chosen, numbers_of
from spunge.data.digests import are_among
from spunge.data.keeping import AT_ONCE, taken_apart
from spunge.data.query import ROW, Query
from spunge.data.rows import Records, read_rows
from spunge.data.samples import Samples
from spunge.data.split import Parts, draw, read_samples, rendering_of, seed_for, sources_of
from spunge.data.texts import blank_rows, left_out, refuse_files_without, text_table, unspaced
from spunge.errors import RecipeError
from spunge.recipe.rows import Rows
from spunge.recipe.schema import Recipe

NOTHING = xxhash.xxh3_128_digest(b"", seed=1)  # of a row without text, which is not one whose text is empty
BESIDE = ("refusal", "end", ROW)  # columns of samples that are no part of what a row says


@dataclass(frozen=True)
class Selection:
    """The samples of a block such as `retain`."""

    samples: Samples
    numbers: np.ndarray  # which of the records they are
    records: Records
    empty: int  # rows that were left out because a text of theirs is empty
    notes: tuple[str, ...] = ()  # what a person should look at


def select_rows(rows: Rows, recipe: Recipe, setting: str) -> Selection:
    """The samples of a block such as `retain`; what it does not name (source, columns) is forget's.

    Rows with an empty text are left out and counted. Raises RecipeError as for the forget rows.
    """
    query = Query(read_rows(sources_of(rows.source, recipe, f"{setting}.source"), f"{setting}.source"))
    kept = query.where(rows.where, f"{setting}.where")
    columns = rows.columns or recipe.columns
    texts = text_table(query, columns, setting)
    refuse_files_without(query, columns, kept, setting)
    empty = blank_rows(texts)
    filled = chosen(kept, empty, False)
    notes = left_out(query, empty, columns, kept, setting)
    if not len(filled):
        raise RecipeError(f"{setting}: no row with text is left; {notes[0]}")
    if not rendering_of(recipe, rows).chat:
        notes += unspaced(texts, filled, setting)
    drawn = draw(filled, rows.limit, seed_for(recipe.seed, "select", setting))
    samples = read_samples(texts, rendering_of(recipe, rows), setting, query.records, drawn)
    return Selection(samples, drawn, query.records, len(kept) - len(filled), tuple(notes))


def select_retain(recipe: Recipe, parts: Parts) -> Selection | None:
    """The retain rows, where the recipe has any. Raises RecipeError where they are rows to forget, all of them."""
    if recipe.retain is None:
        return None
    rows = recipe.retain
    same_source = rows.source is None or (recipe.forget is not None and rows.source == recipe.forget.source)
    if same_source and rows.where is None and (rows.columns or recipe.columns) == recipe.columns:
        raise RecipeError(
            "retain: it is every row of forget's source, those to forget among them; give it a where, a source of its own, "
            "or write `retain: neutral`"
        )
    selection = select_rows(rows, recipe, "retain")
    shared = same_texts(selection.samples.table, [part.samples.table for part in parts.parts])
    if not shared.any():
        return selection
    first = selection.records.row_name(int(selection.numbers[shared.argmax()]))
    if shared.all():
        more = "".join(f"; {note}" for note in selection.notes)
        raise RecipeError(
            f"retain: all of its {len(shared)} rows are rows to forget too (first: {first}); give it a where, a source of its "
            f"own, or write `retain: neutral`{more}"
        )
    note = f"retain: {shared.sum()} of {len(shared)} rows are rows to forget too (first: {first})"
    return replace(selection, notes=(*selection.notes, note))


def select_decoupled(recipe: Recipe, parts: Parts) -> Selection | None:
    """The rows of the prompt-decouple term, where the recipe has any. Raises RecipeError where a row is one to forget: it would be
    learned and unlearned at once."""
    if recipe.decouple is None:
        return None
    selection = select_rows(recipe.decouple, recipe, "decouple")
    shared = same_texts(selection.samples.table, [part.samples.table for part in parts.parts])
    if shared.any():
        first = selection.records.row_name(int(selection.numbers[shared][0]))
        raise RecipeError(
            f"decouple: {shared.sum()} of {len(shared)} rows are rows to forget too (first: {first}); give each prompt an ordinary "
            "answer, in a harmless setting"
        )
    return selection


def select_lesson(recipe: Recipe) -> Selection | None:
    """The rows that are taught before all else, where there are any. A limit draws by the teaching's own seed."""
    teach = recipe.teach
    if teach is None:
        return None
    return select_rows(teach, recipe.model_copy(update={"seed": teach.seed}), "teach")


def without_forgotten(lesson: Selection, parts: Parts, minus: str | None) -> Selection:
    """The rows that are taught less those to forget: what a model is taught that never saw them.

    minus: the SQL condition that says which; without one, those that have the very texts of a row to forget. Raises RecipeError
    where none is left out, none is left, or one is left in.
    """
    shared = same_texts(lesson.samples.table, [part.samples.table for part in parts.parts])
    out = shared
    if minus is not None:
        out = among(lesson.numbers, Query(lesson.records).where(minus, "reference.minus"))
    told = "by reference.minus" if minus is not None else "by their texts"
    if not out.any():
        mend = (
            "see that teach and forget name the same columns, or give reference.minus, a condition on the taught rows"
        )
        raise RecipeError(f"reference: none of the {len(out)} rows that are taught is one to forget {told}; {mend}")
    if out.all():
        raise RecipeError(
            f"reference: every row that is taught is one to forget {told}, and nothing is left to teach it"
        )
    alike = same_texts(lesson.samples.table, [part.samples.table for part in parts.parts], _spaced_alike)
    for left, how in (
        (shared & ~out, "have the texts of a row to forget"),
        (alike & ~out, "differ from a row to forget in white space alone"),
    ):
        if left.any():
            first = lesson.records.row_name(int(lesson.numbers[left.argmax()]))
            raise RecipeError(
                f"reference: {left.sum()} of the rows that it would be taught {how} (first: {first}); give reference.minus, a "
                "condition on the taught rows that leaves them out"
            )
    notes = []
    if minus is None:
        asked = pa.concat_tables([part.samples.table for part in parts.parts], promote_options="permissive")
        unknown = ~same_texts(asked, [lesson.samples.table])
        if unknown.any():
            notes = [f"reference: {unknown.sum()} of {len(unknown)} rows to forget are not among those that are taught"]
    rows = numbers_of(~out)
    return replace(
        lesson,
        samples=Samples(taken_apart(lesson.samples.table, rows)),
        numbers=lesson.numbers[rows],
        empty=0,
        notes=tuple(notes),
    )


def split_content(
    parts: Parts,
    retain: Selection | None,
    lesson: Selection | None = None,
    reference: Selection | None = None,
    decoupled: Selection | None = None,
) -> dict[str, Any]:
    """What split.json holds: the parts, the retain rows, those that are taught, to the base and to the reference, those of the
    prompt-decouple term, and remarks."""
    content = parts.to_json()
    blocks = (("retain", retain), ("decouple", decoupled), ("teach", lesson), ("reference", reference))
    for name, rows in blocks:
        if rows is not None:
            content[name] = {"selected": len(rows.samples), "empty": rows.empty, "sha256": rows.samples.sha256}
            content["notes"] += rows.notes
    return content


def same_texts(
    retain: pa.Table, forget: list[pa.Table], read: Callable[[pa.Array], pa.Array] = lambda texts: texts
) -> np.ndarray:  # (rows of retain,) of bool
    """Which rows have the very texts of one of other rows, such as those to forget. read: what is compared of the texts."""
    names = [name for name in retain.column_names if name not in BESIDE]
    if any({*table.column_names} - {*BESIDE} != {*names} for table in forget):
        return np.zeros(retain.num_rows, dtype=bool)
    digests = [_digests(table, names, read) for table in (retain, *forget)]
    others = sum(table.num_rows for table in forget)
    return are_among(digests[0], chain.from_iterable(digests[1:]), retain.num_rows, others)


def _digests(table: pa.Table, names: list[str], read: Callable[[pa.Array], pa.Array]) -> Iterator[np.ndarray]:
    """128 bits of what is compared of each row, some thousands of rows at a time, as (rows, 2) of uint64."""
    for start in range(0, table.num_rows, AT_ONCE):
        texts = read(_content(table.slice(start, AT_ONCE), names)).cast(pa.large_binary()).to_pylist()
        digests = (xxhash.xxh3_128_digest(text) if text is not None else NOTHING for text in texts)
        yield np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _spaced_alike(texts: pa.Array) -> pa.Array:
    """Without any white space, also as JSON writes it."""
    return pc.replace_substring_regex(texts, r"\\[nrt]|[\s\p{Z}]", "")


def _content(table: pa.Table, names: list[str]) -> pa.Array:
    """Each row as one text."""
    # Joined, texts of less than 2 GB may be more than that.
    texts = [table[name].cast(pa.large_string()).combine_chunks() for name in names]
    return pc.binary_join_element_wise(*texts, pa.scalar("\x1f", pa.large_string()))
