"""What does not fit is told with a setting, and with that setting it fits."""

import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.recipe.training import Everything, LoRA
from spunge.run.graph import Cost
from spunge.run.planning.devices import CARDS, Spread, device_of, spread_over
from spunge.run.planning.estimate import CONTEXT, PROCESS, STATES, Beside, Estimator, Taken
from spunge.run.planning.fitting import unfit, unjudged
from spunge.run.planning.skeleton import Skeleton, Texts
from spunge.run.planning.steps import Rows, Steps
from spunge.unlearning.calls import FORGET, Call, Writing
from toys import SMALL


def estimator_of(gpu: bool = False) -> Estimator:
    from transformers import LlamaConfig

    skeleton = Skeleton(LlamaConfig(**SMALL), torch.bfloat16, gpu=gpu)
    return Estimator(skeleton, skeleton, replace(CARDS["h100"], gpu=gpu), None)


def steps_of(what: Any, batch: int = 64) -> Steps:
    rows = Rows([Samples(pa.table({"text": pa.array([], pa.string())}))], [64], batch, packed=True)
    return Steps(1, 1, [(FORGET,)], what, "adamw", {"forget": rows}, keeps_good=True, keeps_best=False)


def with_memory(estimator: Estimator, nbytes: float) -> Estimator:
    return estimator.altered(device=replace(estimator.device, memory=round(nbytes)))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("best", [False, True])
def test_what_is_trained_in_full_has_its_value_gradient_state_and_kept_copies(optimizer: Any, best: bool) -> None:
    estimator = estimator_of()
    entries = estimator.skeleton.entries()
    steps = replace(steps_of(Everything()), optimizer=optimizer, keeps_best=best)
    copies = 4 + 4 + 4 + (8 if best else 0) + STATES[steps.optimizer]
    assert estimator.resident(steps) == pytest.approx(2 * entries + copies * entries)


def test_8_bit_moments_take_longer_on_a_cpu_and_less_of_a_gpus_bandwidth() -> None:
    for gpu, longer in ((False, True), (True, False)):
        estimator = estimator_of(gpu)
        plain, packed = (
            estimator.training(replace(steps_of(Everything(), 1), optimizer=optimizer)).seconds
            for optimizer in ("adamw", "adamw_8bit")
        )
        assert (packed > plain) == longer


def test_copies_that_are_trained_first_are_counted() -> None:
    estimator, steps = estimator_of(), steps_of(LoRA(), 2)
    alone = estimator.stage(Cost(steps=steps))
    both = estimator.stage(Cost(steps=steps, copying=replace(steps, count=3)))
    assert both.seconds == pytest.approx(4 * alone.seconds)
    assert both.memory == alone.memory


def test_what_the_base_writes_takes_a_call_a_token_and_those_that_read_anew() -> None:
    estimator = estimator_of()
    plain = estimator.writing_first(Writing(3, 5))
    again = estimator.writing_first(Writing(3, 5, again=2, read=1))
    one = estimator.follow(estimator.skeleton, None, Call(gradient=False), Texts(1, 1, 1)).seconds(estimator.device)
    assert plain.seconds == pytest.approx(15 * one)
    assert again.seconds == pytest.approx(15 * 3 * one, rel=0.05)
    cost = Cost(steps=steps_of(LoRA(), 2), first=[Writing(3, 5)])
    assert estimator.stage(cost).seconds == pytest.approx(estimator.stage(replace(cost, first=())).seconds + 15 * one)


@pytest.mark.parametrize(
    ("asked", "devices", "room"),
    [("auto", 1, math.inf), ({0: "1KiB", 1: "2KiB"}, 2, 2048), (None, None, None)],
)
def test_a_model_that_is_judged_on_several_devices_takes_a_share_of_each(asked: Any, devices: Any, room: Any) -> None:
    estimator = estimator_of(gpu=True)
    spread = spread_over(asked, estimator.device)
    assert spread == (None if devices is None else Spread(devices, room))
    weights, laid = estimator.judged_weights(), replace(estimator, spread=spread)
    expected = weights if spread is None else min(weights / devices, room)
    assert laid.judging(100.0) == estimator.floor + 100.0 + expected
    assert spread_over(asked, replace(estimator.device, gpu=False)) is None


def test_what_the_devices_do_not_hold_of_a_judged_model_stays_in_the_machines_memory() -> None:
    estimator = estimator_of(gpu=True)
    small = with_memory(replace(estimator, spread=Spread(2, math.inf)), (estimator.floor + 2000) / 0.95)
    assert small.judging(100.0) == pytest.approx(estimator.floor + 2000, abs=1)


def test_small_models_that_shift_logits_are_counted_with_their_weights_and_the_offsets() -> None:
    estimator = estimator_of()

    def with_beside(models: int, offsets: int, nucleus: bool = False) -> float:
        return replace(estimator, beside=Beside(estimator.skeleton, models, 1, offsets, nucleus)).reading(256).memory

    logits = SMALL["vocab_size"] * 256
    weights = estimator.judged_weights()
    # float32 values of a logit: an offset more while they are summed; the order (int64) and its float32 value of a nucleus
    assert with_beside(3, 2) - with_beside(2, 1) == pytest.approx(weights + 4 * logits)
    assert with_beside(2, 1, nucleus=True) - with_beside(2, 1) == pytest.approx(12 * logits)


def test_weights_in_4_bits_are_a_quarter_of_16_and_the_rest_stays() -> None:
    estimator = estimator_of()
    packed = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    saved = estimator.weights() - estimator.altered(train_in="4bit").weights()
    assert saved == pytest.approx((2 - 0.52) * packed)


# Bytes that are short of what is needed, None: no more there than one sample takes -> the setting that is named.
@pytest.mark.parametrize(
    ("what", "short", "named"),
    [
        (LoRA(), 1000, "model.checkpoint_activations"),
        pytest.param(Everything(), 1000, "model.checkpoint_activations", marks=pytest.mark.thorough),
        pytest.param(LoRA(), None, "unlearn.batch_size", marks=pytest.mark.thorough),
    ],
)
def test_the_setting_that_is_named_makes_it_fit(what: Any, short: int | None, named: str) -> None:
    estimator, steps = estimator_of(), steps_of(what)
    needed = estimator.training(steps).memory
    least = estimator.training(steps_of(what, 1)).memory
    small = with_memory(estimator, ((needed - short) if short else least + 1000) / 0.95)
    told = unfit("branch:asia", small, steps, needed)
    assert told is not None
    assert told.refused
    assert told.line.startswith(f"{named}: branch:asia takes about ")
    assert "set" in told.line
    if short:
        mended = small.altered(skeleton=replace(small.skeleton, recomputed=True)).training(steps).memory
        assert unfit("branch:asia", small, steps, mended) is None


def test_a_batch_that_a_gpu_takes_in_pieces_is_no_refusal() -> None:
    estimator, steps = estimator_of(gpu=True), steps_of(LoRA())
    needed, half = estimator.training(steps).memory, estimator.training(steps_of(LoRA(), 32)).memory
    told = unfit("branch:asia", with_memory(estimator, (half + 1000) / 0.95), steps, needed)
    assert told is not None
    assert not told.refused
    assert "in 2 pieces" in told.line


def test_judging_that_does_not_fit_goes_in_pieces_then_spread_and_is_else_refused() -> None:
    estimator = estimator_of(gpu=True)

    def judged(size: Estimator) -> float:
        return max(size.reading(1e6).memory, size.writing(1e4).memory)

    whole, half = judged(estimator), judged(estimator.altered(pieces=2))
    least = judged(estimator.altered(pieces=16))
    assert whole > half > least
    assert unjudged("judge base: kept", with_memory(estimator, whole / 0.9), whole, judged) is None
    told = unjudged("judge base: kept", with_memory(estimator, (half + 1000) / 0.95), whole, judged)
    assert told is not None
    assert not told.refused
    assert told.line.startswith("judge base: kept takes about ")
    assert "in 2 pieces" in told.line

    small = with_memory(estimator, (least - 1000) / 0.95)
    told = unjudged("judge base: kept", small, whole, lambda size: whole if size.spread is None else least - 2000, True)
    assert told is not None
    assert told.refused
    assert told.line.startswith("model.device_map: judge base: kept takes about ")
    assert "set it to auto" in told.line
    told = unjudged("judge base: kept", small, whole, judged)
    assert told is not None
    assert told.refused
    assert told.line.startswith("model.path: ")


@pytest.mark.thorough
def test_what_no_setting_makes_fit_is_told_so() -> None:
    steps = steps_of(LoRA())
    estimator = with_memory(estimator_of(gpu=True), CONTEXT)
    told = unfit("branch:asia", estimator, steps, estimator.training(steps).memory)
    assert told is not None
    assert "whatever is set" in told.line


def test_what_the_weights_alone_do_not_leave_room_for_is_refused_without_following_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimator, steps = estimator_of(), steps_of(LoRA())
    needed = estimator.training(steps).memory
    crowded = with_memory(estimator, PROCESS)
    monkeypatch.setattr("spunge.run.planning.estimate._followed", lambda *_: pytest.fail("followed"))
    monkeypatch.setattr("spunge.run.planning.estimate.read_traced", lambda *_: pytest.fail("recalled"))
    told = unfit("branch:asia", crowded, steps, needed)
    assert told is not None
    assert told.refused


def test_a_device_that_is_not_known_is_refused_with_those_that_are() -> None:
    from spunge.errors import RecipeError

    with pytest.raises(RecipeError, match=r"^--device: 'h10' is not known.*rtx4090"):
        device_of("h10", torch.device("cpu"))


@pytest.mark.parametrize(("what", "outside"), [(LoRA(), 2), (Everything(), 8)])
def test_a_process_of_a_sharded_training_holds_its_share_a_block_twice_and_what_is_in_no_block(
    what: Any, outside: int
) -> None:
    estimator, steps = estimator_of(gpu=True), steps_of(what)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    beside = estimator.skeleton.entries() - 4 * block
    whole = block * (4 if isinstance(what, LoRA) else 4 + 2 + 4) + beside * outside
    assert estimator.gathered(steps) == 0
    for count in (2, 4):
        shares = estimator.altered(processes=count)
        assert shares.gathered(steps) == pytest.approx(whole)
        # The rows of a batch are shared out: what is left of one process's peak are the activations of its own rows.
        alone = estimator.training(steps_of(what, 64 // count)).memory
        saved = estimator.resident(steps) * (1 - 1 / count)
        assert shares.training(steps).memory == pytest.approx(alone - saved + whole, rel=0.02)


@pytest.mark.parametrize(("shares", "named"), [(True, "execution.kind"), (False, "model.path")])
def test_sharding_is_named_where_nothing_else_fits_and_the_method_can_be_shared_out(
    monkeypatch: pytest.MonkeyPatch, shares: bool, named: str
) -> None:
    estimator, steps = estimator_of(gpu=True), steps_of(LoRA(), 1)
    # Every setting takes as much; each device more halves it.
    monkeypatch.setattr(Estimator, "training", lambda self, steps: Taken(1.0, 4000 / self.processes + 100))
    monkeypatch.setattr(Estimator, "before_calls", lambda self, steps: 0.0)
    told = unfit("branch:asia", with_memory(estimator, 1200 / 0.95), steps, 4100, shares=shares)
    assert told is not None
    assert told.refused
    assert told.line.startswith(f"{named}: branch:asia takes about ")
    assert ("set it to sharded, on 4 of these devices" in told.line) == shares
