"""RMU's layer and coefficient for a model that has no published ones: chosen by short trials (`layer: auto`).

The hidden states' norms are measured block by block. Then RMU runs for a few steps, on all parts in turn, at a few
depths, and at the best of them with a few coefficients (relative to the norm). Each trial is judged by how far it raised
the loss on forget texts and on retain texts, in nats a token, on rows it was not trained on where there are enough.

The rule: of the trials that raised the retain loss by at most MILD, the one that raised the forget loss most; where
every trial did more harm, the one that did least.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from spunge.data.arrays import dealt
from spunge.data.keeping import taken_apart
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.loading import Base
from spunge.unlearning.batches import Stream
from spunge.unlearning.method import Settled, Task
from spunge.unlearning.rmu.settings import Relative, RMUSettings, block_index
from spunge.unlearning.rmu.steering import steer
from spunge.unlearning.scored import outputs
from spunge.weights.overlay import applied

SHARES = (0.17, 0.23, 0.33, 0.45)  # of the depth
FACTORS = (2.0, 5.0, 10.0)  # times the norm
FIRST_FACTOR = 5.0  # while layers are compared
STEPS = 24
MILD = 0.1  # nats a token: a perplexity 1.1 times the base's
JUDGED = 32  # rows of each side that a trial is judged by


class Trial(NamedTuple):
    layer: int
    coefficient: float | Relative
    forget: float  # rise of the loss on forget rows, nats a token
    retain: float
    seconds: float


class Rows(NamedTuple):
    """What trials train on and what they are judged by."""

    parts: Mapping[str, Samples]
    retain: Samples
    judged_parts: list[Samples]
    judged_retain: list[Samples]


def tune(base: Base, parts: Mapping[str, Samples], retain: Samples, settings: RMUSettings, seed: int) -> Settled:
    """Choose what is `auto`. The same base, rows, settings and seed give the same choice."""
    rows = divided(parts, retain, seed)
    norms = hidden_norms(base, rows.judged_retain[0], settings)
    before = losses(base, rows, settings)

    def tried(layer: int, coefficient: float | Relative) -> Trial:
        started = time.perf_counter()
        forget, retain = rises(base, rows, chosen(settings, layer, coefficient), before, seed)
        return Trial(layer, coefficient, forget, retain, time.perf_counter() - started)

    given = settings.coefficient
    first = Relative(relative=FIRST_FACTOR) if isinstance(given, str) else given
    layers = list(SHARES) if isinstance(settings.layer, str) else [settings.layer]
    trials = [tried(layer, first) for layer in dict.fromkeys(block_index(share, base.depth) for share in layers)]
    if isinstance(given, str):
        layer = best(trials).layer
        trials += [tried(layer, Relative(relative=factor)) for factor in FACTORS if factor != FIRST_FACTOR]
    picked = best(trials)
    return Settled(
        chosen(settings, picked.layer, picked.coefficient),
        notes(picked, trials, norms, base.depth),
        record(trials, norms),
    )


def chosen(settings: RMUSettings, layer: int, coefficient: float | Relative) -> RMUSettings:
    return settings.model_copy(update={"layer": layer, "coefficient": coefficient})


def divided(parts: Mapping[str, Samples], retain: Samples, seed: int) -> Rows:
    """Keep JUDGED rows of each side apart; a part with too few of them is judged by rows that it trains on."""
    share = max(4, JUDGED // len(parts))
    forget = {value: held_out(samples, share, seed) for value, samples in parts.items()}
    trained, judged = held_out(retain, JUDGED, seed)
    return Rows(
        {value: pair[0] for value, pair in forget.items()}, trained, [pair[1] for pair in forget.values()], [judged]
    )


def held_out(samples: Samples, count: int, seed: int) -> tuple[Samples, Samples]:
    """Rows to train on and rows to judge by; the same rows where there are fewer than four times `count`."""
    judged, others = dealt(len(samples), [count], np.random.default_rng(seed))
    if len(samples) < 4 * count:
        return samples, Samples(taken_apart(samples.table, judged))
    return Samples(taken_apart(samples.table, others)), Samples(taken_apart(samples.table, judged))


def rises(base: Base, rows: Rows, settings: RMUSettings, before: tuple[float, float], seed: int) -> tuple[float, float]:
    """What a short joint run did to the loss on forget and retain rows; (0, infinity) when it went wrong."""
    short = settings.model_copy(
        update={
            "epochs": None,
            "steps": STEPS,
            "joint_steps": STEPS,
            "accumulation": 1,
            "min_cosine": None,
            "warmup": 0.0,
        }
    )
    seeds = {value: seed + place for place, value in enumerate(rows.parts)}
    try:
        branch = steer(Task(base, rows.parts, rows.retain, seeds, common=seed), short)
    except RecipeError:
        return 0.0, math.inf
    with applied(base.parameters, branch.changes):
        forget, retain = losses(base, rows, settings)
    return forget - before[0], retain - before[1]


def best(trials: Sequence[Trial]) -> Trial:
    mild = [each for each in trials if each.retain <= MILD]
    if mild:
        return max(mild, key=lambda each: each.forget)
    picked = min(trials, key=lambda each: each.retain)
    if picked.retain == math.inf:
        raise RecipeError("unlearn.layer: 'auto': every trial went wrong; lower unlearn.learning_rate or give a layer")
    return picked


def losses(base: Base, rows: Rows, settings: RMUSettings) -> tuple[float, float]:
    """Mean loss of the rows that judge, forget and retain, nats a token."""
    return _mean_loss(base, rows.judged_parts, settings), _mean_loss(base, rows.judged_retain, settings)


def _mean_loss(base: Base, rows: Sequence[Samples], settings: RMUSettings) -> float:
    total = count = 0.0
    for samples in rows:
        stream = Stream(samples, base, settings.batch_size, settings.max_length, 0)
        for start in range(0, len(samples), settings.batch_size):
            batch = stream.batch(range(start, min(start + settings.batch_size, len(samples))))
            with torch.no_grad(), base.autocast():
                judged = outputs(base.model, batch)
            total += float(judged.losses().double().sum())
            count += len(judged.labels)
    return total / max(count, 1.0)


class Norm(NamedTuple):
    """Median norm of the hidden states after a block."""

    block: int
    first: float  # of each text's first token, which many models use as a sink
    rest: float


def hidden_norms(base: Base, samples: Samples, settings: RMUSettings) -> list[Norm]:
    batch = Stream(samples, base, 8, settings.max_length, 0).batch(range(min(8, len(samples))))
    with torch.no_grad(), base.autocast():
        out = base.model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True, use_cache=False)
    later = batch.mask.bool()
    later[:, 0] = False
    norms = [states.float().norm(dim=-1) for states in out.hidden_states[1:]]
    return [Norm(block, float(n[:, 0].median()), float(n[later].median())) for block, n in enumerate(norms)]


def notes(picked: Trial, trials: Sequence[Trial], norms: Sequence[Norm], depth: int) -> dict[str, str]:
    """What was measured and picked, a line each."""
    there = norms[picked.layer]
    return {
        "measured": f"median norm after block {there.block}: {there.rest:.3g} (first token {there.first:.3g}); "
        f"{len(trials)} trials of {STEPS} steps",
        "picked": f"layer {picked.layer} of {depth}, coefficient {_shown(picked.coefficient)}: forget loss "
        f"{picked.forget:+.2f}, retain loss {picked.retain:+.3f} nats a token",
    }


def _shown(coefficient: float | Relative) -> str:
    return f"{coefficient.relative:g} x the norm" if isinstance(coefficient, Relative) else f"{coefficient:g}"


def record(trials: Sequence[Trial], norms: Sequence[Norm]) -> list[dict[str, Any]]:
    """The measurements for RUN/settled.json."""
    return [
        *({"block": n.block, "norm": round(n.rest, 4), "first_token": round(n.first, 4)} for n in norms),
        *(
            {
                "layer": each.layer,
                "coefficient": each.coefficient.model_dump()
                if isinstance(each.coefficient, Relative)
                else each.coefficient,
                "forget": round(each.forget, 4),
                "retain": round(each.retain, 4) if each.retain < math.inf else None,
                "seconds": round(each.seconds, 2),
            }
            for each in trials
        ),
    ]
