"""When ascent ends: memorisation accuracy and extraction likelihood against their definitions, on a model that counts."""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import IGNORED, Encoded, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.batches import Stream
from spunge.unlearning.forgotten import ForgettingStop, extracted, measured, memorised, overlap
from spunge.unlearning.method import Branch, Task
from toys import texts

FORGET = Samples(pa.table({"text": texts("a", 6)}))
OTHER = Samples(pa.table({"text": texts("other", 6)}))


@pytest.mark.parametrize(
    ("written", "true", "n", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 2, 1.0),
        ([1, 2, 9, 1, 2], [5, 1, 2, 3], 2, 0.5),  # 12, 29, 91, 12: the first and the last stand there
        ([1, 2, 3], [3, 2, 1], 1, 1.0),
        ([1], [1, 2], 2, 0.0),
    ],
)
def test_overlap_is_the_share_of_what_was_written_that_stands_there(
    written: list[int], true: list[int], n: int, expected: float
) -> None:
    assert overlap(written, true, n) == expected


class Counting:
    """Writes the number after the last one, but for `blank`, after which it writes 0."""

    device = torch.device("cpu")

    def __init__(self, blank: int) -> None:
        self.blank = blank

    def after(self, last: int) -> int:
        return 0 if last == self.blank else last + 1

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.nn.functional.one_hot(torch.tensor([[self.after(i) for i in input_ids[0].tolist()]]), 40)
        return type("Out", (), {"logits": logits.float()})

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        ids = input_ids[0].tolist()
        for _ in range(max_new_tokens):
            ids.append(self.after(ids[-1]))
        return torch.tensor([ids])


def sample(ids: Sequence[int], prompt: int = 0) -> Encoded:
    return Encoded(list(ids), [IGNORED] * prompt + list(ids[prompt:]))


def test_what_a_model_holds_of_a_sequence_is_counted_as_defined() -> None:
    text = sample(range(10, 18))  # T = 8
    assert memorised(Counting(blank=99), text) == 1.0
    assert extracted(Counting(blank=99), text, 3) == 1.0
    broken = Counting(blank=13)  # after 13 it writes 0 1 2 3 ..
    assert memorised(broken, text) == pytest.approx(6 / 7)
    # After 1 token: 11 12 13 0 1 2 3, of whose five 3-grams one stands there; after 2: 12 13 0 1 2 3; after 3: 13 0 1 2 3; after
    # 4: 0 1 2 3; after 5: 15 16 17, the whole rest.
    assert extracted(broken, text, 3) == pytest.approx((1 / 5 + 0 + 0 + 0 + 1) / 5)


def test_of_an_answer_its_tokens_alone_are_counted_and_a_short_one_has_no_extraction_likelihood() -> None:
    answer = sample(range(10, 18), prompt=4)
    assert memorised(Counting(blank=11), answer) == 1.0
    assert memorised(Counting(blank=14), answer) == pytest.approx(3 / 4)
    assert extracted(Counting(blank=11), answer, 3) == 1.0
    assert extracted(Counting(blank=11), answer, 4) is None


def written_by(base: Any) -> Samples:
    """What the base itself writes after some words, so that it holds it."""
    said = []
    for word in ("the", "moon", "river"):
        given = torch.tensor([base.tokenizer(word)["input_ids"]])
        ids = base.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
        said.append(base.tokenizer.decode(ids[0], skip_special_tokens=True))
    return Samples(pa.table({"text": said}))


def unlearned(
    base: Any, forget: Samples = FORGET, retain: Samples | None = OTHER, progress: Any = lambda *_: None, **changes: Any
) -> Branch:
    given = {"steps": 40, "batch_size": 6, "learning_rate": 5e-4, "trainable": {"kind": "all"}, **changes}
    task = Task(base, {"a": forget}, retain, {"a": 1}, progress=progress)
    return METHODS.get("ga").unlearn(task, METHODS.get("ga").settings(**given))


def test_ascent_ends_at_the_first_look_at_which_the_samples_count_as_forgotten(load: Callable[..., Any]) -> None:
    base = load()
    forget = written_by(base)
    task, found = Task(base, {"a": forget}, None, {"a": 1}), list[float]()

    def accuracy() -> float:
        return measured(task, Stream(forget, base, 6, 256, 1), ForgettingStop(n=2), 0.0).accuracy

    limit = accuracy() / 2
    assert limit > 0.2
    stop = {"accuracy": limit, "extraction": 1.0, "n": 2, "every": 1}
    branch = unlearned(base, forget, stop=stop, learning_rate=1e-4)
    assert branch.stopped is not None
    assert "memorisation accuracy" in branch.stopped
    assert 1 < branch.steps < 40
    plain = unlearned(
        base, forget, progress=lambda *_: found.append(accuracy()), steps=branch.steps, learning_rate=1e-4
    )
    assert all(torch.equal(plain.changes[name], change) for name, change in branch.changes.items())
    assert found[-1] <= limit < min(found[:-1])


def test_the_limits_are_the_bases_on_retain_rows_where_none_are_given(load: Callable[..., Any]) -> None:
    base = load()
    # The forget rows themselves as unseen ones: a step so small changes nothing that the base holds of them.
    branch = unlearned(base, retain=FORGET, stop={"n": 2, "every": 1}, learning_rate=1e-6, steps=2)
    assert branch.steps == 1
    with pytest.raises(RecipeError, match=r"unlearn\.stop: there are no retain rows .* give unlearn\.stop\.accuracy"):
        unlearned(base, retain=None, stop={})
    assert unlearned(base, retain=None, stop={"accuracy": 1.0, "extraction": 1.0, "every": 3}).steps == 3


def test_retain_rows_too_short_for_a_limit_are_refused_where_forget_rows_are_not(load: Callable[..., Any]) -> None:
    """A limit that is no number would end ascent by the accuracy alone."""
    base, short = load(), Samples(pa.table({"text": ["the dog"] * 3}))
    with pytest.raises(RecipeError, match=r"^unlearn\.stop\.n: 4: .* lower it, or give unlearn\.stop\.extraction"):
        unlearned(base, retain=short, stop={"n": 4, "accuracy": 1.0})
    given = {"n": 4, "accuracy": 1.0, "extraction": 1.0, "every": 1}
    assert unlearned(base, retain=short, stop=given).steps == 1
    # Where neither side has any, the accuracy alone is what there is to tell by.
    branch = unlearned(base, forget=short, retain=short, stop={"n": 4, "accuracy": 1.0, "every": 1})
    assert branch.stopped is not None
    assert "extraction" not in branch.stopped


def test_a_checkpoints_own_way_of_writing_is_not_asked(load: Callable[..., Any]) -> None:
    base = load()
    stop, task = ForgettingStop(n=2), Task(base, {"a": FORGET}, None, {"a": 1})
    plain = measured(task, Stream(FORGET, base, 6, 256, 1), stop)
    config = base.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.eos_token_id = (
        True,
        5.0,
        9.0,
        list(range(100)),
    )
    assert measured(task, Stream(FORGET, base, 6, 256, 1), stop) == plain
    assert base.model.generation_config is config
