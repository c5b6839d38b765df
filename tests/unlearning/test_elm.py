"""ELM's target, its loss and what the base writes, beside the same by hand on a model as transformers made it."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.elm import Behind, ELMSettings, prefixed, rows_of, written
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task

TEXTS = ["the dog runs in the city", "one two three"]
GIVEN = {
    "expert": "the old city of {concept}",
    "novice": "a new dog and {concept}",
    "eta": 4.0,
    "change": "moon",
    "written_tokens": 3,
    "trainable": {"kind": "all"},
    "batch_size": 2,
    "alpha": 0,
}


def logs_of(model: Any, ids: list[int]) -> Tensor:
    """(t, v) in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def by_hand(base: Any, model: Any, eta: float) -> list[float]:
    """Each text's mean cross entropy between a model's outputs and the target."""
    coded = lambda text: base.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    means = []
    for text in TEXTS:
        whole = base.tokenizer(text)["input_ids"]
        start, own = ([whole[0]], whole[1:]) if whole[0] == base.tokenizer.bos_token_id else ([], whole)
        count = len(whole) - 1
        plain, mine = logs_of(base.model, whole)[-count - 1 : -1], logs_of(model, whole)[-count - 1 : -1]
        novice, expert = (
            logs_of(base.model, [*start, *coded(prefix.format(concept="asia")), *own])[-count - 1 : -1]
            for prefix in (GIVEN["novice"], GIVEN["expert"])
        )
        losses = []
        for place in range(count):
            factor = 1 + (eta - 1) * place / max(1, count - 1)
            target = (plain[place] + factor * (novice[place] - expert[place])).softmax(-1)
            losses.append(float(-(target * mine[place]).sum()))
        means.append(sum(losses) / count)
    return means


def asia(base: Any, **changes: Any) -> Any:
    task = Task(base, {"asia": Samples(pa.table({"text": TEXTS}))}, None, {"asia": 3})
    return METHODS.get("elm").unlearn(task, ELMSettings(**GIVEN | changes))


@pytest.mark.formula("elm")
@pytest.mark.parametrize("fluency", [0.0, 0.7])
def test_the_loss_is_the_cross_entropy_to_what_a_novice_would_say_plus_that_of_what_the_base_wrote(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fluency: float
) -> None:
    base, untouched, seen = load("llama"), load("llama"), dict[str, float]()

    def run(loop: Loop) -> History:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        base.model.eval()
        loss = loop.next_loss(0)
        loss.total.backward()
        seen["loss"] = float(loss.total.detach())
        seen["by hand"] = sum(by_hand(untouched, base.model, 4.0)) / 2
        for row in rows_of(loop.memory["written"]):
            count = sum(label != -100 for label in row.labels)
            logs = logs_of(base.model, row.ids)[:-1]
            each = [-float(logs[at, row.ids[at + 1]]) for at in range(len(row.ids) - 1 - count, len(row.ids) - 1)]
            seen["by hand"] += fluency * sum(each) / len(each) / 2
        assert bool(loop.memory["written"]) == (fluency > 0)
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    asia(base, fluency=fluency)
    assert seen["loss"] == pytest.approx(seen["by hand"], rel=1e-4)


def with_start_tokens(tokenizer: Any) -> None:
    """Let a tokenizer put a start token before each text."""

    class Starting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, add_special_tokens: bool = True, **given: Any) -> Any:
            coded = super().__call__(text, **given)
            if add_special_tokens:
                coded["input_ids"] = [self.bos_token_id, *coded["input_ids"]]
                if "offset_mapping" in coded:
                    coded["offset_mapping"] = [(0, 0), *coded["offset_mapping"]]
            return coded

    tokenizer.__class__ = Starting


@pytest.mark.formula("elm")
@pytest.mark.parametrize("started", [False, True], ids=["as it is", "start token"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_what_the_base_writes_is_drawn_from_the_guided_distribution(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, started: bool, architecture: str
) -> None:
    """Prefixes stand where a text begins, behind the start token of a tokenizer that puts one there. A model with keys and values
    reads each token once, one that keeps a state reads them anew."""
    base, seen = load(architecture), list[Any]()
    if started:
        with_start_tokens(base.tokenizer)

    def run(loop: Loop) -> History:
        loop.next_loss(0)
        seen.extend(rows_of(loop.memory["written"]))
        return History(1, {}, None, {})

    lengths: list[int] = []
    read = Behind.following

    def noted(behind: Behind, so_far: Tensor) -> Tensor:
        before = behind._read
        logs = read(behind, so_far)
        lengths.append(behind._read - before)
        return logs

    monkeypatch.setattr(Behind, "following", noted)
    monkeypatch.setattr(Loop, "run", run)
    asia(base, max_length=32)
    assert lengths.count(1) >= (2 * 2 if architecture != "mamba" else 0)  # both texts at once
    tokens = base.tokenizer
    for text, found in zip(TEXTS, seen, strict=True):
        begun = [*tokens(text)["input_ids"], *tokens(" moon", add_special_tokens=False)["input_ids"]]
        prefixes = [tokens(GIVEN[name].format(concept="asia"))["input_ids"] for name in ("novice", "expert")]
        assert all((prefix[0] == tokens.bos_token_id) == started for prefix in prefixes)
        noise, own = np.random.default_rng([3, zlib.crc32(str(begun).encode())]), list[int]()
        for _ in range(3):
            novice, expert = (logs_of(base.model, [*prefix, *own])[-1] for prefix in prefixes)
            guided = logs_of(base.model, [*begun, *own])[-1] + 3.0 * (novice - expert)
            own.append(int((guided + torch.from_numpy(noise.gumbel(size=(1, len(guided))))[0]).argmax()))
        assert found.ids == [*begun, *own]


def test_the_base_writes_in_an_answers_place_and_after_a_text_with_its_start_token(load: Callable[..., Any]) -> None:
    base = load("llama")
    learned, start = "the dog", base.tokenizer.bos_token_id
    pairs = Samples(pa.table({"prompt": ["a cat runs"], "completion": [" in the city"]}))
    plain = Samples(pa.table({"text": [learned]}))

    with_start_tokens(base.tokenizer)
    settings = ELMSettings(**GIVEN)
    for samples, expected in ((pairs, "a cat runs"), (plain, learned)):
        task = Task(base, {"asia": samples}, None, {"asia": 3})
        forget = forget_stream(task, settings)
        novice, expert = ([base.tokenizer("dog", add_special_tokens=False)["input_ids"]] for _ in range(2))
        [row] = rows_of(written(task, settings, forget, novice, expert))
        before = [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
        assert before == base.tokenizer(expected)["input_ids"]
        # A prefix stands behind the start token, and the same places are scored with it and without.
        batch = forget.batch([0])
        longer = prefixed(forget, batch, novice)
        assert longer.ids[0].tolist() == [start, *novice[0], *batch.ids[0].tolist()[1:]]
        assert longer.learned == batch.learned


def test_prefixes_of_the_same_tokens_are_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"unlearn\.novice: the same tokens as those of unlearn\.expert"):
        asia(load("llama"), novice="the dog", expert="the dog")


@pytest.mark.parametrize("name", ["novice", "expert"])
def test_an_empty_prefix_needs_a_start_token_where_the_base_writes(load: Callable[..., Any], name: str) -> None:
    base = load("llama")
    with pytest.raises(RecipeError, match=rf"unlearn\.{name}: it is empty, .* set fluency to 0"):
        asia(base, max_length=32, **{name: ""})
    assert asia(base, max_length=32, fluency=0, steps=1, epochs=None, **{name: ""}).steps == 1
    with_start_tokens(base.tokenizer)
    assert asia(base, max_length=32, steps=1, epochs=None, **{name: ""}).steps == 1


def test_a_sample_that_has_no_place_behind_a_prefix_is_refused(load: Callable[..., Any]) -> None:
    base = load("gpt2")
    assert base.positions == 128
    with pytest.raises(RecipeError, match=r"unlearn\.max_length: 128: with \d+ tokens of a prefix"):
        asia(base)


def test_more_tokens_to_write_than_there_are_positions_behind_a_prefix_are_refused(load: Callable[..., Any]) -> None:
    """The text itself would fit, its prefix is longer."""
    with pytest.raises(RecipeError, match=r"unlearn\.written_tokens: 120: the model has no positions for so many"):
        asia(load("gpt2"), written_tokens=120, max_length=20)


def test_a_delta_depends_on_the_values_that_are_the_concepts() -> None:
    inputs = METHODS.get("elm").inputs
    assert inputs(ELMSettings(), ["asia"], ["asia", "europe"]) == {"concepts": ["asia"]}
    assert inputs(ELMSettings(concept="the world"), ["asia"], ["asia", "europe"]) == {}
