"""TAR's loss and its first-order gradient, beside an attack written out by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import Batch, Samples
from spunge.registry import METHODS
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task
from spunge.unlearning.tar import TARSettings, drawn
from toys import texts


def logs_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(n, v) log-probabilities and (n,) tokens of all scored places, by transformers alone."""
    logs = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].log_softmax(-1)
    wanted = batch.labels[:, 1:] != -100
    return logs[wanted], batch.labels[:, 1:][wanted]


def nll(model: Any, batch: Batch) -> Tensor:
    logs, tokens = logs_of(model, batch)
    return -logs[torch.arange(len(tokens)), tokens].mean()


@pytest.mark.formula("tar")
@pytest.mark.parametrize("withstand", ["entropy", "nll"])
def test_the_gradient_is_the_mean_of_those_at_the_attacked_weights(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, withstand: str
) -> None:
    base, seen = load("llama"), dict[str, Any]()
    parts = {"part": Samples(pa.table({"text": texts("asia", 7)}))}
    settings = TARSettings(
        withstand=withstand,
        attack={"steps": 2, "learning_rate": 0.01},
        alpha=0,
        batch_size=2,
        trainable={"kind": "all"},
    )

    def run(loop: Loop) -> History:
        forget = loop.streams[0]
        hand = copy.deepcopy(base.model)
        before = [parameter.detach().clone() for parameter in loop.parameters]
        loss = loop.next_loss(0)
        loss.total.backward()
        seen["loss"], seen["gradient"] = loss.terms["forget"], [parameter.grad for parameter in loop.parameters]
        seen["put back"] = all(torch.equal(p.detach(), old) for p, old in zip(loop.parameters, before, strict=True))
        assert float(loss.total.detach()) == pytest.approx(4 * loss.terms["forget"])
        first = forget._drawn_rows[0]
        batch = forget.batch(first)._replace(drawn=tuple(first))
        attacks = drawn(forget, batch, 2, 1)
        assert all(not set(rows) & set(first) and len(set(rows)) == 2 for rows in attacks)
        seen["by hand"] = by_hand(hand, [forget.batch(rows) for rows in attacks], batch, withstand)
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    METHODS.get("tar").unlearn(Task(base, parts, None, {"part": 1}), settings)
    value, gradients = seen["by hand"]
    assert seen["put back"]
    assert seen["loss"] == pytest.approx(value, rel=1e-5)
    for mine, expected in zip(seen["gradient"], gradients, strict=True):
        torch.testing.assert_close(mine, 4 * expected, rtol=2e-3, atol=2e-5)


def by_hand(model: Any, attacks: list[Batch], batch: Batch, withstand: str) -> tuple[float, list[Tensor]]:
    model.eval().requires_grad_(True)
    parameters = list(dict(model.named_parameters()).values())
    adversary = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0)
    value, total = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for attack in attacks:
        model.zero_grad()
        nll(model, attack).backward()
        adversary.step()
        if withstand == "nll":
            loss = -nll(model, batch)
        else:
            logs, _ = logs_of(model, batch)
            loss = (logs.exp() * (logs + torch.tensor(logs.shape[-1]).log())).sum(-1).mean()
        value += float(loss) / len(attacks)
        for each, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            each += gradient / len(attacks)
    return value, total


@pytest.mark.formula("tar")
def test_the_retain_term_is_the_nll_and_the_mean_distance_of_all_blocks_states(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = load("llama"), dict[str, Any]()
    rows = Samples(pa.table({"text": [" ".join(["the dog runs in the city"] * 15), "one two three"]}))
    settings = TARSettings(gamma=0, alpha=0.5, attack={"steps": 1}, batch_size=2, trainable={"kind": "all"})

    def states(batch: Batch) -> list[Tensor]:
        kept: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda m, a, out: kept.append(out)) for b in base.model.model.layers]
        base.model(input_ids=batch.ids, attention_mask=batch.mask)
        for hook in hooks:
            hook.remove()
        return [state[0] if isinstance(state, tuple) else state for state in kept]

    def run(loop: Loop) -> History:
        held = loop.streams[1].batch([0, 1])
        with torch.no_grad():
            before = states(held)
            for parameter in loop.parameters:
                parameter += 0.02 * torch.ones_like(parameter)
            after = states(held)
            far = [(a - b).square().sum(-1).sqrt()[held.mask.bool()].mean() for a, b in zip(after, before, strict=True)]
            seen["by hand"] = 0.5 * float(nll(base.model, held) + sum(far) / len(far))
        monkeypatch.setattr(Loop, "backward", lambda loop, term: None)
        seen["loss"] = float(loop.next_loss(0).total.detach())
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    METHODS.get("tar").unlearn(Task(base, {"part": rows}, rows, {"part": 1}), settings)
    assert seen["loss"] == pytest.approx(seen["by hand"], rel=1e-4)


def test_weights_in_another_dtype_are_those_of_the_attack(load: Callable[..., Any]) -> None:
    """Autocast keeps what it made of a weight; the attack's losses must not be those of the weights before it."""
    from dataclasses import replace

    base = load("llama")
    low = replace(base, model=base.model.bfloat16(), dtype=torch.bfloat16)
    rows = Samples(pa.table({"text": texts("asia", 4)}))

    def loss(rate: float) -> float:
        settings = TARSettings(
            steps=1, batch_size=2, alpha=0, trainable={"kind": "all"}, attack={"steps": 1, "learning_rate": rate}
        )
        return METHODS.get("tar").unlearn(Task(low, {"part": rows}, None, {"part": 1}), settings).losses["forget"]

    assert abs(loss(0.05) - loss(1e-9)) > 1e-3
