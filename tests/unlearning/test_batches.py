"""Which samples reach a method, in what order and how long: each setting of it does what it says."""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from spunge.data.samples import IGNORED, Batch, Samples
from spunge.data.tables import repeated
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.batches import Stream, packed
from spunge.unlearning.lengths import Lengths, Run
from spunge.unlearning.method import Branch, Task
from toys import texts

RETAIN = Samples(pa.table({"text": texts("other", 20)}))
Drawn = list[tuple[Samples, Batch]]


def samples(topic: str, count: int = 10) -> Samples:
    return Samples(pa.table({"text": texts(topic, count)}))


def answers(topic: str, count: int = 10) -> Samples:
    return Samples(pa.table({"prompt": texts(topic, count), "completion": [f" {text}" for text in texts("b", count)]}))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Every batch that a method draws, with the samples it is of, in order."""
    seen: Drawn = []
    draw = Stream.__next__

    def recorded(stream: Stream) -> Batch:
        seen.append((stream.samples, draw(stream)))
        return seen[-1][1]

    monkeypatch.setattr(Stream, "__next__", recorded)
    return seen


def unlearn(base: Any, method: str = "graddiff", parts: dict[str, Samples] | None = None, **changes: Any) -> Branch:
    parts = parts or {"a": samples("a")}
    given = {"steps": 6, "batch_size": 4, "trainable": {"kind": "tensors", "match": ["*.1.mlp.*weight"]}, **changes}
    settings = METHODS.get(method).settings(method=method, **given)
    task = Task(base, parts, RETAIN, {value: sum(map(ord, value)) for value in parts})
    return METHODS.get(method).unlearn(task, settings)


def retained(drawn: Drawn) -> list[Batch]:
    return [batch for given, batch in drawn if given is RETAIN]


def forgotten(drawn: Drawn) -> list[Batch]:
    return [batch for given, batch in drawn if given is not RETAIN]


def lengths(batches: Sequence[Batch]) -> list[int]:
    return [int(length) for batch in batches for length in batch.mask.sum(1)]


@pytest.mark.parametrize("method", ["graddiff", "tvn", "rmu", "npo"])
def test_joint_steps_are_the_joint_controls_alone(load: Callable[..., Any], method: str) -> None:
    both = {"a": samples("a", 8), "b": samples("b", 4), "c": samples("c", 4)}
    base = load()
    assert unlearn(base, method, both).steps == 3 * 6
    assert unlearn(base, method, both, joint_steps=7).steps == 7
    assert unlearn(base, method, {"a": both["a"]}, joint_steps=7).steps == 6
    assert unlearn(base, method, both, steps=None, epochs=1, joint_steps=2).steps == 2


def test_joint_steps_are_shared_out_among_the_parts(load: Callable[..., Any], drawn: Drawn) -> None:
    both = {"a": samples("a", 8), "b": samples("b", 4)}
    unlearn(load(), "rmu", both, joint_steps=5, layer=2, trainable=None)
    turns = ["a" if given is both["a"] else "b" for given, _ in drawn if given is not RETAIN]
    assert len(turns) == 5
    assert sorted(turns) in (["a", "a", "b", "b", "b"], ["a", "a", "a", "b", "b"])
    assert turns[0] != turns[1]


@pytest.mark.parametrize("method", ["graddiff", "rmu", "undial"])
def test_the_greatest_length_is_the_parts_own(load: Callable[..., Any], method: str, drawn: Drawn) -> None:
    base, parts = load(), {"a": samples("a"), "b": samples("b")}
    free = max(lengths([Stream(given, base, 20, 256, 0).batch(range(10)) for given in parts.values()]))
    assert free > 9
    ends = {"a": 3, "retain": 5}
    for value, part in parts.items():
        drawn.clear()
        unlearn(base, method, {value: part}, max_length=9, max_lengths=ends)
        assert max(lengths(forgotten(drawn))) == ends.get(value, 9)
        assert max(lengths(retained(drawn))) == 5
    drawn.clear()
    unlearn(base, method, parts, max_length=9, max_lengths=ends)
    found = lengths(forgotten(drawn))
    assert max(found) == 9
    if method == "rmu":  # whose joint control alternates the parts
        each = [max(lengths([batch])) for given, batch in drawn if given is parts["a"]]
        assert each
        assert set(each) == {3}
    else:  # the others shuffle all rows together: those of part a are the first ten
        cut = [
            int(batch.mask[place].sum())
            for batch in forgotten(drawn)
            for place, row in enumerate(batch.rows)
            if row < 10
        ]
        assert cut
        assert set(cut) == {3}


@pytest.mark.parametrize("method", ["dpo", "idk", "sku"])
def test_answers_put_in_place_of_a_parts_own_are_as_long_at_most(
    load: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spunge.unlearning.batches
    import spunge.unlearning.sku

    widths: list[int] = []
    for module in (spunge.unlearning.batches, spunge.unlearning.sku):
        collate = module.collate

        def recorded(coded: Any, *rest: Any, collate: Any = collate) -> Batch:
            widths.extend(len(one.ids) for one in coded)
            return collate(coded, *rest)

        monkeypatch.setattr(module, "collate", recorded)
    base = load()
    unlearn(base, method, {"a": answers("a")}, max_lengths={"a": 6, "retain": 6})
    assert max(widths) == 6
    unlearn(base, method, {"a": answers("a")})
    assert max(widths) > 6


def test_retain_batches_have_a_size_of_their_own(load: Callable[..., Any], drawn: Drawn) -> None:
    unlearn(load())
    assert {len(batch.rows) for batch in retained(drawn)} == {4}
    drawn.clear()
    unlearn(load(), retain_batch_size=7)
    assert [len(batch.rows) for batch in retained(drawn)] == [7, 7, 6, 7, 7, 6]
    assert {len(batch.rows) for batch in forgotten(drawn)} == {4, 2}


def test_retain_rows_are_drawn_in_the_order_that_is_asked_for(load: Callable[..., Any], drawn: Drawn) -> None:
    orders: dict[str, list[int]] = {}
    for order in ("shuffled", "in_order", "with_replacement"):
        drawn.clear()
        unlearn(load(), retain_order=order, steps=10)
        orders[order] = [row for batch in retained(drawn) for row in batch.rows]
    everything = list(range(20))
    assert orders["in_order"] == 2 * everything
    first, second = orders["shuffled"][:20], orders["shuffled"][20:]
    assert sorted(first) == sorted(second) == everything
    assert everything != first != second
    assert sorted(orders["with_replacement"][:20]) != everything
    assert set(orders["with_replacement"]) <= set(everything)


def test_packed_sequences_hold_every_text_whole_and_no_padding_but_in_the_last(
    load: Callable[..., Any], drawn: Drawn
) -> None:
    base, part = load(), samples("a", 12)
    unlearn(base, parts={"a": part}, packing=True, max_length=16, steps=10, batch_size=3)
    for given, batches in ((part, forgotten(drawn)), (RETAIN, retained(drawn))):
        expected: list[int] = []
        for text in given.table["text"].to_pylist():
            expected += [*base.tokenizer(text)["input_ids"], base.tokenizer.eos_token_id]
        sequences: dict[int, list[int]] = {}
        for batch in batches:
            for row, ids, mask, labels in zip(batch.rows, batch.ids, batch.mask, batch.labels, strict=True):
                count = int(mask.sum())
                assert labels[:count].tolist() == ids[:count].tolist()
                assert (labels[count:] == IGNORED).all()
                sequences[row] = ids[:count].tolist()
        assert sorted(sequences) == list(range(-(-len(expected) // 16)))
        assert {len(ids) for row, ids in sequences.items() if row < max(sequences)} == {16}
        assert [token for row in sorted(sequences) for token in sequences[row]] == expected
    drawn.clear()
    unlearn(base, parts={"a": part}, max_length=16)
    assert any(length < 16 for length in lengths(forgotten(drawn)))


def test_packing_needs_steps_and_plain_texts(load: Callable[..., Any]) -> None:
    with pytest.raises(ValidationError, match="give steps in place of epochs"):
        METHODS.get("graddiff").settings(packing=True)
    with pytest.raises(RecipeError, match=r"unlearn\.packing: prompts and completions are not packed"):
        unlearn(load(), parts={"a": answers("a")}, packing=True)


def test_packing_leaves_retain_prompts_as_they_are(load: Callable[..., Any], drawn: Drawn) -> None:
    base, kept = load(), answers("c", 6)
    settings = METHODS.get("graddiff").settings(packing=True, steps=3, batch_size=2, max_length=16)
    METHODS.get("graddiff").unlearn(Task(base, {"a": samples("a")}, kept, {"a": 1}), settings)
    prompts = [batch for given, batch in drawn if given is kept]
    assert len(prompts) == 3
    assert all((batch.labels == IGNORED).any() for batch in prompts)


def test_a_stream_that_skips_gives_what_it_would_have_given(load: Callable[..., Any]) -> None:
    base = load()
    for order in ("shuffled", "in_order", "with_replacement"):
        first, second = (Stream(RETAIN, base, 3, 64, 7, order=order) for _ in range(2))
        rows = [next(first).rows for _ in range(10)]
        second.skip(6)
        assert [next(second).rows for _ in range(4)] == rows[6:]
        assert first.drawn == second.drawn == 10


def test_lengths_are_those_of_a_list_of_one_for_each_sample() -> None:
    lengths, listed = Lengths([Run(8, 2), Run(5, 0), Run(64, 3)]), [8, 8, 64, 64, 64]
    assert [*lengths] == listed
    assert [lengths[place] for place in range(-5, 5)] == listed + listed
    assert lengths[1:4] == listed[1:4]
    assert (len(lengths), lengths.longest) == (5, 64)
    with pytest.raises(IndexError):
        lengths[5]


def test_a_stream_of_many_samples_holds_nothing_for_each(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and lengths: of sixteen times as many samples it takes no more memory."""
    monkeypatch.setattr("spunge.data.arrays.IN_MEMORY", 1 << 16)
    monkeypatch.setattr("spunge.data.arrays.AT_ONCE", 1 << 13)
    base, taken = load(), []
    for count in (1 << 17, 1 << 21):
        many = Samples(pa.table({"text": repeated(pa.scalar("a b"), count)}))
        tracemalloc.start()
        stream = Stream(many, base, 4, Lengths([Run(16, count - 9), Run(8, 9)]), 0)
        assert len(next(stream).rows) == 4
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert taken[1] < 1.2 * taken[0] < 1 << 21


def test_packed_sequences_lie_in_a_file_and_are_the_same(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load()
    for length in (1, 7, 16):
        expected = [*packed(RETAIN, base.tokenizer, length)]
        every = [token for each in expected for token in each.ids]
        assert [each.ids for each in expected] == [every[at : at + length] for at in range(0, len(every), length)]
        assert all(1 < len(each.ids) <= length and each.labels == each.ids for each in expected)
        with monkeypatch.context() as patched:
            patched.setattr("spunge.data.arrays.IN_MEMORY", 0)
            assert [*packed(RETAIN, base.tokenizer, length)] == expected
