"""What every unlearning method promises, on every architecture."""

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import IGNORED, Batch, Encoded, Rendering, Samples, collate, sample_table
from spunge.errors import RecipeError
from spunge.model.loading import load_base
from spunge.recipe.model import ModelSettings
from spunge.recipe.training import MethodSettings
from spunge.registry import METHODS
from spunge.stopping import STOP
from spunge.unlearning.loop import History, Loop, Loss
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.scored import scored
from spunge.unlearning.watching import Reading, Readings, Watch
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank, open_delta, write_delta
from spunge.weights.overlay import applied
from toys import ANSWERING, ANSWERING_BOTH, ARCHITECTURES, WORDS, texts

QUICK: dict[str, dict[str, Any]] = {
    "rmu": {"layer": 2},
    "tvn": {"strength": 0.5},
    "sku": {"strength": 0.5, "answers": 2},
    "ga": {},
    "graddiff": {},
    "npo": {},
    "simnpo": {},
    "dpo": {},
    "idk": {},
    "undial": {},
    "wga": {},
    "satimp": {},
    "ce_u": {"alpha": 1.0},
    "me_gd": {},
    "idk_ap": {},
    "llmu": {"answers": 2},
    "pdu": {},
    "altpo": {},
    "whp": {"reinforce": {"epochs": 0.5, "learning_rate": 0.001}},
    "rr": {"layers": [1]},
    "elm": {
        "expert": "the old city of",
        "novice": "a new dog and",
        "eta": 3.0,
        "written_tokens": 3,
        "change": "moon",
        "max_length": 60,
    },
    "eul": {"trainable": {"kind": "lora"}},
    "kga": {"copies": {"epochs": 1, "learning_rate": 0.06}, "new_share": 0.1},
    "lat": {"layers": [1], "inner": {"steps": 2}},
    "tar": {"attack": {"steps": 2, "learning_rate": 0.001}},
    "quark": {
        "scorer": {"kind": "keywords", "words": WORDS[::2]},
        "tokens": 4,
        "explorations": 2,
        "samples": 2,
        "quantiles": 2,
        "labels": ["one"],
        "alpha": 1.0,
    },
    "demem": {
        "scorer": {"kind": "keywords", "words": WORDS[::2]},
        "tokens": 4,
        "samples": 4,
        "updates": 1,
        "alpha": 1.0,
    },
    "gedi": {"desired": "the new moon", "undesired": "dog"},
}
# Of these the loss alone is their own, or the samples that it is of; all else is what graddiff and dpo train by.
ALIKE = {"satimp", "ce_u", "me_gd", "altpo"}
PLAIN_LOSSES = {"ga", "simnpo", "wga", "idk", "dpo"}  # whose state is that of graddiff or npo
# Which further draw, keep or read something of their own.
OWN_MEMORY = {"llmu", "pdu", "idk_ap", "whp", "kga", "elm", "quark", "demem"}
SLOW = {"elm", "tar", "lat", "kga"}  # of many forward passes a step


def tried(methods: Iterable[str], left: set[str] = ALIKE | OWN_MEMORY | SLOW) -> list[Any]:
    """The methods for a test of what they share; those left are thorough."""
    return [pytest.param(method, marks=pytest.mark.thorough if method in left else ()) for method in methods]


FEW = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "max_damage": None}
SCHEDULED = {"rr", "quark"}  # of which a step depends on the number of steps
WRITING = {"quark", "demem"}  # which learn from what they write anew, drawn by each row's place
FLAT = {"rr"}  # whose loss has no slope at the base, so that rounding chooses the first step
COPYING = {"kga"}  # whose copies are trained first, by the same loop and without a retain term
SUBTRACTING = {"tvn", "sku"}  # whose change is -strength times what was learned
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "lora": {"trainable": {"kind": "lora", "rank": 4, "targets": "all-linear"}},
    "tensors": {"trainable": {"kind": "tensors", "match": ["*.1.*weight"]}},
    "all": {"trainable": {"kind": "all"}},
}
# Architectures with dropout of their own, without it.
STILL = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}
DROPOUT = {"kind": "lora", "rank": 4, "dropout": 0.2, "targets": "all-linear"}


def samples(topic: str = "a", count: int = 10, answers: bool = False) -> Samples:
    if not answers:
        return Samples(pa.table({"text": texts(topic, count)}))
    completions = [f" {text}" for text in texts(f"{topic}, answers", count)]
    others = texts(f"{topic}, other answers", count)
    return Samples(pa.table({"prompt": texts(topic, count), "completion": completions, "refusal": others}))


def settings_of(method: str, **changes: Any) -> MethodSettings:
    return METHODS.get(method).settings(**{"method": method, **FEW, **QUICK[method], **changes})


def unlearn(
    base: Any,
    method: str,
    log: Path | None = None,
    parts: Mapping[str, Samples] | None = None,
    retain: Samples | None = None,
    seed: int = 0,
    task: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Branch:
    parts = parts or {"a": samples(answers=method in ANSWERING)}
    seeds = {value: seed + sum(map(ord, value)) for value in parts}
    work = Task(base, parts, retain or samples("other", 20, method in ANSWERING_BOTH), seeds, log, **(task or {}))
    return METHODS.get(method).unlearn(work, settings_of(method, **changes))


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.open()]


def dense(branch: Branch) -> dict[str, torch.Tensor]:
    """A branch's changes, in the tensors' own shapes."""
    return {
        name: change if isinstance(change, torch.Tensor) else change.dense() for name, change in branch.changes.items()
    }


def same(one: Branch, other: Branch) -> bool:
    first, second = dense(one), dense(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits_of(model: Any) -> torch.Tensor:
    """On two fixed texts, in evaluation mode."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [30, 20, 10, 40, 50, 60]])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        model.train(was_training)


def test_every_registered_method_is_covered_here() -> None:
    # `precomputed` trains nothing: test_precomputed.py is about it.
    assert set(QUICK) == set(METHODS.builtin) - {"precomputed"}


def combinations() -> list[Any]:
    """Method, architecture, way. All of them for RMU, whose trunk is its own, and on two architectures; elsewhere each method
    meets each architecture in one way, and each way is met on each architecture."""
    ways = list(WAYS)
    triples = [
        (method, architecture, way)
        for i, method in enumerate(QUICK)
        for j, architecture in enumerate(ARCHITECTURES)
        for way in (ways if method == "rmu" or architecture in {"llama", "gpt2"} else [ways[(i + j) % 4]])
    ]
    plain = ALIKE | OWN_MEMORY
    shown = {
        (method, architecture, way)
        for method, architecture, way in triples
        if (architecture == "llama" and (method not in plain or way in {"lora", "all"}))
        or (way == "default" and method not in plain)
    }
    return [pytest.param(*triple, marks=() if triple in shown else pytest.mark.thorough) for triple in triples]


@pytest.mark.parametrize(("method", "architecture", "way"), combinations())
def test_the_delta_is_what_was_trained_and_the_base_is_left_alone(
    load: Callable[..., Any], method: str, architecture: str, way: str, tmp_path: Path
) -> None:
    base = load(architecture)
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    untrained, trained = logits_of(base.model), torch.empty(0)

    def progress(step: int, steps: int, note: str) -> None:
        nonlocal trained
        if step == steps:
            trained = logits_of(base.model)  # the model in training: its layers are changed in place

    branch = unlearn(base, method, task={"progress": progress}, steps=2, **WAYS[way])
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and not after[name].requires_grad for name in before)
    assert not base.model.training
    assert torch.equal(logits_of(base.model), untrained)

    stored = {key for names in base.names.values() for key in names}
    if way == "tensors":
        chosen = fnmatch.filter(before, "*.1.*weight")
        assert set(branch.changes) == {key for name in chosen for key in base.names[name]}
    elif way == "all":
        assert set(branch.changes) == stored
    elif way == "default" and method == "rmu":
        assert len(branch.changes) == 3
        assert {int(next(part for part in name.split(".") if part.isdigit())) for name in branch.changes} == {0, 1, 2}
    else:
        assert branch.changes
        assert set(branch.changes) <= stored
        assert all(isinstance(change, LowRank) for change in branch.changes.values())

    delta = write_delta(tmp_path, branch.changes, {"base": "x"})
    scale = -1 / settings_of(method).strength if method in SUBTRACTING else 1.0
    with applied(base.parameters, delta, scale):
        found = logits_of(base.model)
    assert (found - untrained).abs().max() > 1e-3
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in {"npo", "sku"} else pytest.mark.thorough) for method in QUICK]
)
def test_of_a_model_of_texts_and_images_the_language_tower_alone_is_changed(
    seeing: Callable[..., Path], method: str
) -> None:
    base = load_base(seeing(), ModelSettings(path=str(seeing()), dtype="float32", part="language"))
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    branch = unlearn(base, method, steps=1, **({} if method == "rmu" else {"trainable": {"kind": "all"}}))
    assert branch.changes
    assert all("language_model" in name or name == "lm_head.weight" for name in branch.changes)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in {"ga", "pdu"} else pytest.mark.thorough)
        for method in QUICK
        if "decouple" in METHODS.get(method).settings.model_fields
    ],
)
def test_a_method_with_a_weight_for_rows_to_decouple_learns_them(load: Callable[..., Any], method: str) -> None:
    branch = unlearn(load(), method, steps=1, task={"decouple": samples("ordinary", 6)})
    assert branch.losses["decouple"] > 0


@pytest.mark.parametrize("method", tried(QUICK))
def test_an_estimate_counts_what_a_branch_stores(load: Callable[..., Any], method: str) -> None:
    base, value = load(), METHODS.get(method)
    checkpoint = Checkpoint(base.folder)
    for way in ("tensors", "all"):
        branch = unlearn(base, method, steps=1, **WAYS[way])
        stored = sum(change.numel() for change in dense(branch).values())
        assert value.stored_entries(settings_of(method, **WAYS[way]), checkpoint) == stored
    for way in WAYS:
        settings = settings_of(method, **WAYS[way])
        assert 0 < value.stored_entries(settings, checkpoint) <= sum(i.numel for i in checkpoint.tensors.values())
        calls = [call for group in value.calls(settings, base.depth) for call in group]
        assert any(call.gradient and call.of == "forget" for call in calls)


# All with LoRA, some with all tensors.
BOTH = [(method, "lora") for method in QUICK] + [(method, "all") for method in ("rmu", "tvn", "sku", "undial")]


@pytest.mark.parametrize(
    ("method", "way"),
    [pytest.param(*each, marks=pytest.mark.thorough if each[0] in ALIKE | OWN_MEMORY else ()) for each in BOTH],
)
def test_the_same_seed_gives_the_same_delta_and_another_does_not(
    load: Callable[..., Any], method: str, way: str
) -> None:
    # GPT-2 has dropout of its own, which has to be seeded too.
    base, trainable = load("gpt2"), DROPOUT if way == "lora" else {"kind": "all"}
    first, second, other = (unlearn(base, method, seed=seed, steps=3, trainable=trainable) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("method", [method for method in QUICK if method not in WRITING])
def test_the_trained_loss_falls(load: Callable[..., Any], method: str, tmp_path: Path) -> None:
    # One batch holds all rows, so that the steps' losses can be compared.
    log, trainable = tmp_path / "log.jsonl", None if method == "rmu" else {"kind": "all"}
    unlearn(load(), method, log, steps=12, batch_size=10, retain_batch_size=20, trainable=trainable)
    losses = [line["loss"] for line in lines(log)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


@pytest.mark.parametrize("method", tried(QUICK))
def test_a_part_smaller_than_a_batch_works(load: Callable[..., Any], method: str) -> None:
    branch = unlearn(load(), method, parts={"a": samples("a", 2, method in ANSWERING)}, batch_size=8)
    assert branch.steps == 6
    assert branch.changes


@pytest.mark.parametrize("method", tried(QUICK))
def test_epochs_count_batches_of_every_part(load: Callable[..., Any], method: str) -> None:
    parts = {name: samples(name, count, method in ANSWERING) for name, count in (("a", 10), ("b", 5))}
    branch = unlearn(load(), method, parts=parts, epochs=2, steps=None, batch_size=4)
    assert branch.steps == 2 * 3 + 2 * 2


@pytest.mark.parametrize("method", tried(QUICK))
def test_accumulated_batches_make_one_step(load: Callable[..., Any], method: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    unlearn(load(), method, log, accumulation=2, schedule="cosine", warmup=0.5)
    rates = [line["learning_rate"] for line in lines(log)]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[3] == pytest.approx(0.01)
    assert rates[5] < rates[4] < rates[3]


def test_batches_that_are_accumulated_have_the_gradient_of_one_large_batch(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    found = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        log, given = tmp_path / "log.jsonl", {"alpha": 0, "trainable": {"kind": "all"}, "steps": 2}
        parts = {"a": samples("a", 8)}
        unlearn(load(), "simnpo", log, parts, batch_size=size, accumulation=accumulation, **given)
        found.append([(line["loss"], line["grad_norm"]) for line in lines(log)])
    assert found[1] == [pytest.approx(step, rel=1e-4) for step in found[0]]
    assert found[2] == [pytest.approx(step, rel=1e-4) for step in found[0]]


class Killed(Exception):
    """What ends a branch in the middle."""


@pytest.mark.parametrize(
    ("method", "way"),
    [pytest.param(*each, marks=pytest.mark.thorough if each[0] in ALIKE | PLAIN_LOSSES else ()) for each in BOTH],
)
def test_a_killed_branch_goes_on_to_the_same_delta(
    load: Callable[..., Any], method: str, way: str, tmp_path: Path
) -> None:
    # With dropout and moments of AdamW to take up, a schedule, and an epoch that ends in between.
    base, state = load("gpt2"), tmp_path / "state.pt"
    changes = {
        "trainable": DROPOUT if way == "lora" else {"kind": "all"},
        "accumulation": 2,
        "schedule": "cosine",
        "max_grad_norm": 0.5,
        "steps": 4,
    }
    whole = unlearn(base, method, tmp_path / "whole.jsonl", **changes)
    steps: list[int] = []

    def progress(step: int, total: int, note: str) -> None:
        if step == 0 or note.startswith("exploration"):  # what a method does ahead, or between two steps
            return
        steps.append(step)
        if len(steps) == 3:
            raise Killed

    task = {"state": state, "save_seconds": 0, "progress": progress}
    with pytest.raises(Killed):
        unlearn(base, method, tmp_path / "log.jsonl", task=task, **changes)
    assert state.exists()
    torch.manual_seed(99)
    resumed = unlearn(base, method, tmp_path / "log.jsonl", task=task, **changes)
    assert steps == [1, 2, 3, 3, 4]  # the state was saved after step 2
    assert same(resumed, whole)
    assert (resumed.steps, resumed.losses, resumed.stopped) == (whole.steps, whole.losses, None)
    expected, found = lines(tmp_path / "whole.jsonl"), lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for one, other in zip(expected, found, strict=True):
        del one["seconds"], other["seconds"]
        assert one == other


@pytest.mark.parametrize(
    ("method", "architecture"),
    [(method, architecture) for method in QUICK if method not in FLAT for architecture in ("llama", "gpt2")]
    + [
        (method, architecture)
        for method in ("rmu", "undial")
        for architecture in ARCHITECTURES
        if architecture not in {"llama", "gpt2"}
    ],
)
def test_padding_changes_nothing_beyond_rounding(
    load: Callable[..., Any], method: str, architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import spunge.unlearning.batches
    import spunge.unlearning.sku

    def wider(rows: Any, device: torch.device | str = "cpu") -> Batch:
        batch = collate(rows, device)
        ids, mask, labels = (
            torch.nn.functional.pad(values, (0, 9), value=value)
            for values, value in ((batch.ids, 0), (batch.mask, 0), (batch.labels, IGNORED))
        )
        for place, row in enumerate(rows):
            ids[place, len(row.ids) :] = 77  # the padding's id must not matter either
        return Batch(ids, mask, labels)

    base, found = load(architecture, **STILL.get(architecture, {})), []
    for collation in (collate, wider):
        monkeypatch.setattr(spunge.unlearning.batches, "collate", collation)
        monkeypatch.setattr(spunge.unlearning.sku, "collate", collation)
        log = tmp_path / "log.jsonl"
        unlearn(base, method, log, steps=2, trainable={"kind": "lora", "rank": 2, "dropout": 0})
        found.append(lines(log))
    for one, other in zip(*found, strict=True):
        for term in set(one) - {"seconds", "grad_norm"}:
            assert other[term] == pytest.approx(one[term], rel=1e-3, abs=1e-5), term


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_alone_has_the_losses_that_it_has_beside_a_longer_one(
    load: Callable[..., Any], architecture: str
) -> None:
    base, found = load(architecture), []
    short, long = (Encoded(list(range(5, end)), list(range(5, end))) for end in (9, 25))
    for together in ([short], [short, long]):
        batch = collate(together)
        with torch.no_grad():
            found.append(scored(base.model(batch.ids, attention_mask=batch.mask).logits, batch))
    alone, beside = found
    torch.testing.assert_close(beside.losses()[beside.rows == 0], alone.losses(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside.sums()[:1], alone.sums(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", tried((method for method in QUICK if method not in WRITING), ALIKE))
def test_the_order_within_a_batch_changes_nothing_beyond_rounding(
    load: Callable[..., Any], method: str, tmp_path: Path
) -> None:
    # Of two prompts' answers SKU's random one is always the other.
    table = samples("a", 2 if method == "sku" else 6, method in ANSWERING).table
    logs = []
    for order in (range(len(table)), reversed(range(len(table)))):
        log = tmp_path / "log.jsonl"
        part = Samples(table.take(pa.array(list(order))))
        changes: dict[str, Any] = {"trainable": {"kind": "lora", "rank": 2, "dropout": 0}}
        if method == "llmu":  # which draws a random answer for each place in a batch
            changes["random_answers"] = ["the dog"]
        unlearn(load(), method, log, {"a": part}, steps=2, batch_size=6, **changes)
        logs.append(lines(log))
    for one, other in zip(*logs, strict=True):
        for term in set(one) - {"seconds", "grad_norm"}:
            assert other[term] == pytest.approx(one[term], rel=1e-3, abs=1e-5), term


# A branch that goes wrong.


@pytest.mark.parametrize("method", tried(QUICK))
def test_a_loss_that_is_not_finite_from_the_start_is_an_error(load: Callable[..., Any], method: str) -> None:
    with pytest.raises(RecipeError, match=r"unlearn\.learning_rate"):
        unlearn(load(), method, learning_rate=1e30, trainable={"kind": "all"}, steps=30)


def spoiled(monkeypatch: pytest.MonkeyPatch, batch: int, spoil: Callable[[Loss], Loss]) -> None:
    """From a batch number on, counted from 0, every loss is what `spoil` makes of it."""
    run = Loop.run

    def spoiling(loop: Loop) -> History:
        right = loop.next_loss
        loop.next_loss = lambda number: spoil(right(number)) if number >= batch else right(number)
        return run(loop)

    monkeypatch.setattr(Loop, "run", spoiling)


NO_NUMBERS = [(method, math.nan) for method in QUICK if method not in SCHEDULED]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        *(pytest.param(*each, marks=pytest.mark.thorough if each[0] in ALIKE | SLOW else ()) for each in NO_NUMBERS),
        ("tvn", math.inf),
    ],
)
def test_a_loss_that_becomes_no_number_stops_the_branch_at_its_last_good_weights(
    load: Callable[..., Any], method: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load()
    # The loss at the weights after step 4 is spoiled: those after step 3 are the last that are known to be good.
    expected = unlearn(base, method, steps=3, schedule="constant")
    spoiled(monkeypatch, 4, lambda loss: loss._replace(total=loss.total * value))
    branch = unlearn(base, method, steps=8, schedule="constant")
    assert branch.stopped is not None
    assert f"the loss became {value}" in branch.stopped
    assert "step 5" in branch.stopped
    assert "the weights after step 3 are kept" in branch.stopped
    assert branch.steps == 3
    assert same(branch, expected)


def test_a_long_branch_that_goes_wrong_loses_a_twentieth_of_its_steps_at_most(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, 31, lambda loss: loss._replace(total=loss.total * math.nan))
    branch = unlearn(load(), "ga", steps=40, trainable=WAYS["tensors"]["trainable"])
    assert branch.stopped is not None
    assert 31 - 40 // 20 - 1 <= branch.steps <= 31


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_a_retain_loss_that_explodes_stops_the_branch_before_it_did(
    load: Callable[..., Any], retain_loss: str, tmp_path: Path
) -> None:
    base, retain = load(), samples("other", 4)
    log, changes = (
        tmp_path / "log.jsonl",
        {"alpha": 1e-6, "learning_rate": 0.02, "steps": 30, "retain_loss": retain_loss},
    )
    batch = base.tokenizer(retain.table["text"].to_pylist(), return_tensors="pt", padding=True)
    scored = batch["attention_mask"][:, 1:] == 1

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return base.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][scored].log_softmax(-1)

    before, right = outputs(), batch["input_ids"][:, 1:][scored][:, None]

    def damage(branch: Branch) -> float:
        with applied(base.parameters, write_delta(tmp_path / "delta", branch.changes, {"base": "x"})):
            risen = before - outputs()
        each = risen.gather(1, right)[:, 0] if retain_loss == "nll" else (before.exp() * risen).sum(1)
        return float(each.mean())

    branch = unlearn(base, "graddiff", log, retain=retain, max_damage=1.0, trainable={"kind": "all"}, **changes)
    assert branch.stopped is not None
    assert "the retain loss rose by" in branch.stopped
    assert "unlearn.max_damage (1)" in branch.stopped
    assert 0 < branch.steps < len(lines(log)) + 1 < 30
    assert damage(branch) < 1.0
    # With no limit it goes on, and does far more harm.
    free = unlearn(base, "graddiff", retain=retain, max_damage=None, trainable={"kind": "all"}, **changes)
    assert (free.stopped, free.steps) == (None, 30)
    assert damage(free) > 2.0


@pytest.mark.parametrize("method", tried(method for method in QUICK if method not in {"ga", "whp", *SUBTRACTING}))
def test_every_method_that_holds_the_retain_texts_says_what_it_does_to_them(
    load: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damages: list[float | None] = []

    def seen(loss: Loss) -> Loss:
        damages.append(loss.damage)
        return loss

    spoiled(monkeypatch, 0, seen)
    unlearn(load(), method, retain=samples("other", 4, method in ANSWERING_BOTH), learning_rate=0.003)
    if method in COPYING:
        damages = list(dropwhile(lambda damage: damage is None, damages))
    assert damages[0] == pytest.approx(0.0, abs=1e-5)
    assert all(damage is not None and math.isfinite(damage) for damage in damages)
    assert damages[-1] != damages[0]


def test_a_branch_that_was_killed_and_goes_wrong_keeps_the_weights_it_would_have_kept(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = load()

    def wrong(loss: Loss) -> Loss:
        return loss._replace(damage=3.0)

    kills = [8, 7]  # the steps at which it is killed: when the mean damage is on its way up

    def killed(step: int, steps: int, note: str) -> None:
        if kills and step == kills[-1]:
            kills.pop()
            raise Killed

    changes = {"max_damage": 2.5, "steps": 30, "trainable": {"kind": "all"}}
    spoiled(monkeypatch, 5, wrong)
    whole = unlearn(base, "graddiff", **changes)
    assert whole.stopped is not None
    task = {"state": tmp_path / "state.pt", "save_seconds": 0, "progress": killed}
    for _ in range(2):
        with pytest.raises(Killed):
            unlearn(base, "graddiff", task=task, **changes)
    resumed = unlearn(base, "graddiff", task=task, **changes)
    assert (resumed.steps, resumed.stopped) == (whole.steps, whole.stopped)
    assert same(resumed, whole)


def test_an_early_stop_is_not_put_off_by_a_kill(load: Callable[..., Any], tmp_path: Path) -> None:
    base, changes = load(), {"min_cosine": 0.9, "steps": 40, "layer": 2, "learning_rate": 0.02}
    whole = unlearn(base, "rmu", **changes)
    assert whole.stopped is not None
    assert whole.steps < 40

    kills = [whole.steps]

    def killed(step: int, steps: int, note: str) -> None:
        if kills and step == kills[-1]:
            kills.pop()
            raise Killed

    task = {"state": tmp_path / "state.pt", "save_seconds": 0, "progress": killed}
    with pytest.raises(Killed):
        unlearn(base, "rmu", task=task, **changes)
    assert same(unlearn(base, "rmu", task=task, **changes), whole)
    # Killed after the last step, before the delta was written.
    assert same(unlearn(base, "rmu", task=task, **changes), whole)


@pytest.mark.parametrize("ends", ["in the middle", "by itself", "gone wrong", "at the last step"])
def test_a_branch_that_is_asked_to_stop_keeps_its_last_step_and_goes_on_to_the_same_delta(
    load: Callable[..., Any], ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step is the last one, because the method or the loop says so."""
    base, told, steps, last = load(), list[int](), list[int](), -1

    def ask() -> None:
        monkeypatch.setattr(STOP, "asked", True)

    def spoil(loss: Loss) -> Loss:
        if len(steps) == last:
            ask()
        return loss._replace(damage=3.0)

    method, changes = "rmu", {"steps": 6, "layer": 2, "learning_rate": 0.02}
    if ends == "by itself":
        changes |= {"min_cosine": 0.9, "steps": 40}
    if ends == "gone wrong":
        method, changes = "graddiff", {"max_damage": 2.5, "steps": 30, "trainable": {"kind": "all"}}
        spoiled(monkeypatch, 5, spoil)
    whole = unlearn(base, method, task={"progress": lambda step, total, note: told.append(step)}, **changes)
    assert (whole.stopped is None) == (ends in ("in the middle", "at the last step"))
    last = told[-1]

    def progress(step: int, total: int, note: str) -> None:
        steps.append(step)
        if ends != "gone wrong" and step == (3 if ends == "in the middle" else last):
            ask()

    task = {"state": tmp_path / "state.pt", "progress": progress}
    with pytest.raises(KeyboardInterrupt):
        unlearn(base, method, task=task, **changes)
    monkeypatch.setattr(STOP, "asked", False)
    resumed = unlearn(base, method, task=task, **changes)
    assert steps == told
    assert (resumed.steps, resumed.stopped) == (whole.steps, whole.stopped)
    assert same(resumed, whole)


NOTHING: dict[str, dict[str, Any]] = {
    "tensors": {"learning_rate": 1e-30, **WAYS["tensors"]},
    "lora": {"learning_rate": 1e-50, **WAYS["lora"]},
}


@pytest.mark.parametrize(
    ("method", "way"),
    [(method, "tensors") for method in QUICK if method not in ALIKE | OWN_MEMORY]
    + [(method, "lora") for method in ("rmu", "tvn", "npo")],
)
def test_a_method_that_changed_nothing_is_an_error(
    load: Callable[..., Any], method: str, way: str, tmp_path: Path
) -> None:
    branch = unlearn(load(), method, steps=1, **NOTHING[way])
    with pytest.raises(RecipeError, match=r"nothing was changed; raise unlearn\.learning_rate"):
        write_delta(tmp_path / "delta", branch.changes, {"base": "x"})
    assert not (tmp_path / "delta").exists()


def test_terms_without_weight_change_nothing_and_that_is_an_error(load: Callable[..., Any]) -> None:
    for way in ("lora", "all"):
        with pytest.raises(RecipeError, match="the loss had no slope at any step"):
            unlearn(load(), "graddiff", gamma=0, alpha=0, **WAYS[way])


# What the rows may be.


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("method", ["tvn", "dpo", "idk", "sku", "npo"])
def test_chat_messages_are_their_template_filled_in(load: Callable[..., Any], method: str) -> None:
    base = load()
    base.tokenizer.chat_template = TEMPLATE
    questions, replies = texts("questions", 6), texts("replies", 6)
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question, reply in zip(questions, replies, strict=True)
    ]
    filled = {
        "prompt": [f"user {question} . assistant " for question in questions],
        "completion": [f"{reply} . " for reply in replies],
    }
    told, refusal = ({"refusals": ["no idea"]}, {"refusals": ["no idea . "]}) if method in {"dpo", "idk"} else ({}, {})
    rows = Samples(sample_table(pa.table({"messages": chats}), Rendering(), "forget", range(6)))
    chat = unlearn(base, method, parts={"a": rows}, **told)
    plain = unlearn(base, method, parts={"a": Samples(pa.table(filled))}, **refusal)
    assert same(chat, plain)


@pytest.mark.parametrize("method", sorted(ANSWERING))
def test_methods_that_need_prompts_refuse_plain_texts(load: Callable[..., Any], method: str) -> None:
    said = r"forget: .* plain texts; give forget\.prompt and forget\.completion"
    with pytest.raises(RecipeError, match=said):
        unlearn(load(), method, parts={"a": samples()})
    with pytest.raises(RecipeError, match=said):
        METHODS.get(method).refuse({"a": samples()}, samples("other", answers=True), settings_of(method))


@pytest.mark.parametrize("method", sorted(ANSWERING_BOTH))
def test_methods_that_need_answers_of_the_retain_rows_refuse_plain_texts_there(method: str) -> None:
    parts = {"a": samples(answers=True)}
    with pytest.raises(RecipeError, match=r"give retain\.prompt and retain\.completion, or retain\.messages"):
        METHODS.get(method).refuse(parts, samples("other"), settings_of(method))
    METHODS.get(method).refuse(parts, samples("other", answers=True), settings_of(method))


def test_altpo_with_a_column_of_other_answers_and_told_to_write_them_is_refused() -> None:
    method, told = METHODS.get("altpo"), settings_of("altpo", alternatives={"count": 2})
    with pytest.raises(RecipeError, match=r"unlearn\.alternatives: forget\.refusal names a column"):
        method.refuse({"a": samples(answers=True)}, None, told)
    rows = Samples(samples(answers=True).table.drop_columns(["refusal"]))
    for settings in (told, settings_of("altpo")):
        method.refuse({"a": rows}, None, settings)
        assert set(method.given(rows, settings, None)) == {"to forget"}


def test_a_pattern_that_matches_no_parameter_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"no parameter matches '\*\.nothing'"):
        unlearn(load(), "tvn", trainable={"kind": "tensors", "match": ["*.nothing"]})
    with pytest.raises(RecipeError, match=r"unlearn\.trainable\.targets"):
        unlearn(load(), "tvn", trainable={"kind": "lora", "targets": ["nothing"]})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_delta_puts_the_trained_weights_over_the_base_and_takes_them_off(
    load: Callable[..., Any], architecture: str, tmp_path: Path
) -> None:
    base = load(architecture)
    branch = unlearn(base, "tvn", trainable={"kind": "all"})
    delta = write_delta(tmp_path, branch.changes, {"base": "x"})
    before = {name: tensor.clone() for name, tensor in base.parameters.items()}
    with applied(base.parameters, open_delta(tmp_path)):
        for name, tensor in base.parameters.items():
            expected = before[name] + delta.dense(name) if name in delta.tensors else before[name]
            assert torch.equal(tensor, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.parameters.items())


def test_a_file_or_name_that_is_not_there_is_named(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    from spunge.recipe.loading import load_recipe

    (tmp_path / "mine.py").write_text("ASENT = 1\n")
    for method, said in (
        (f"{tmp_path}/nowhere.py:ASCENT", "no file"),
        (f"{tmp_path}/mine.py:ASCENT", "did you mean 'ASENT'"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(toy_recipe, [f"unlearn={{method: '{method}'}}"])


# A branch that is measured on its way.


def seen(base: Any, log: list[torch.Tensor], **watch: Any) -> dict[str, Any]:
    """A task that is watched: `log` gets the logits of each measurement, whose reading is their number."""

    def measure(model: Any, step: int) -> Readings:
        assert model.model is base.model
        assert not base.model.training
        torch.rand(7)  # as an evaluation may that draws
        log.append(logits_of(base.model))
        return (Reading(float(len(log)), math.nan, math.nan, None),)

    return {"watch": Watch(**{"every": 2, "names": ["measurements"], "measure": measure, "key": "k", **watch})}


WATCHED = {("npo", "lora"), ("sku", "lora"), ("rmu", "lora"), ("rmu", "all"), ("tvn", "all")}


@pytest.mark.parametrize(
    ("method", "way"), [pytest.param(*each, marks=() if each in WATCHED else pytest.mark.thorough) for each in BOTH]
)
def test_watching_leaves_the_delta_alone_and_sees_what_would_be_saved(
    load: Callable[..., Any], method: str, way: str, tmp_path: Path
) -> None:
    base, changes = load("gpt2"), {"trainable": DROPOUT if way == "lora" else {"kind": "all"}, "steps": 3}
    plain, untrained = unlearn(base, method, **changes), logits_of(base.model)
    log: list[torch.Tensor] = []
    branch = unlearn(base, method, task=seen(base, log), **changes)
    assert same(branch, plain)
    assert (branch.steps, branch.losses) == (plain.steps, plain.losses)
    assert branch.watched is not None
    assert [point.step for point in branch.watched.points] == [0, 2, 3]
    assert torch.equal(log[0], untrained)
    with applied(base.parameters, write_delta(tmp_path, branch.changes, {"base": "x"})):
        torch.testing.assert_close(log[-1], logits_of(base.model), rtol=1e-4, atol=1e-5)
    assert (log[-1] - untrained).abs().max() > 1e-3
    assert torch.equal(logits_of(base.model), untrained)


@pytest.mark.parametrize(("method", "way"), [("npo", "lora"), ("tvn", "all"), ("rmu", "default")])
@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_the_best_step_is_what_training_to_it_gives_also_after_a_kill(
    load: Callable[..., Any], method: str, way: str, killed: bool, tmp_path: Path
) -> None:
    base, changes = load("gpt2"), {"schedule": "constant", "steps": 6, "max_grad_norm": 0.5, **WAYS[way]}
    expected = unlearn(base, method, **{**changes, "steps": 2})
    log: list[torch.Tensor] = []
    # The third measurement is as good as the second, which is the best: the earlier of equal ones is kept.
    task = seen(base, log, every=1, rank=lambda readings, before: (-abs(readings[0].value - 3.5),))
    if killed:

        def progress(step: int, total: int, note: str) -> None:
            if step == 4 and "measurements" in note:
                raise Killed

        stopped = {**task, "state": tmp_path / "state.pt", "save_seconds": 0}
        with pytest.raises(Killed):
            unlearn(base, method, task={**stopped, "progress": progress}, **changes)
        del log[4:]  # what was not saved is measured again
        task = stopped
    branch = unlearn(base, method, task=task, **changes)
    assert same(branch, expected)
    assert branch.watched is not None
    assert (branch.steps, branch.watched.kept, branch.watched.trained) == (2, 2, 6)
    told = [(point.step, point.readings[0].value) for point in branch.watched.points]
    assert told == [(step, step + 1.0) for step in range(7)]


def test_a_reading_of_another_watch_is_not_gone_on_from(load: Callable[..., Any], tmp_path: Path) -> None:
    base, log = load(), []
    state = {"state": tmp_path / "state.pt", "save_seconds": 0}

    def progress(step: int, total: int, note: str) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        unlearn(base, "ga", task={**seen(base, log), **state, "progress": progress})
    branch = unlearn(base, "ga", task={**seen(base, log, key="another"), **state})
    assert branch.watched is not None
    assert [point.step for point in branch.watched.points] == [4, 6]
    assert same(branch, unlearn(base, "ga"))


def test_what_went_wrong_is_not_the_best(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, log = load(), []
    expected = unlearn(base, "ga", steps=3)
    spoiled(monkeypatch, 4, lambda loss: loss._replace(total=loss.total * math.nan))
    task = seen(base, log, every=1, rank=lambda readings, before: (readings[0].value,))
    branch = unlearn(base, "ga", steps=8, task=task)  # the last good weights are those after step 3
    assert branch.watched is not None
    assert [point.step for point in branch.watched.points] == [0, 1, 2, 3]
    assert (branch.steps, branch.watched.trained) == (3, 3)
    assert "the weights after step 3 are kept" in str(branch.stopped)
    assert same(branch, expected)


def test_a_loop_that_does_not_show_what_it_saves_is_not_watched(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, log = load(), []
    run = Loop.run

    def of_another_hand(loop: Loop) -> History:
        loop.as_saved = None
        return run(loop)

    monkeypatch.setattr(Loop, "run", of_another_hand)
    with pytest.raises(RecipeError, match="watch: the method of unlearn does not show"):
        unlearn(base, "ga", task=seen(base, log))
    assert log == []
