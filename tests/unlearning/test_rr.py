"""RR's terms against the hidden states that transformers itself gives, in float64 by hand."""

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task
from spunge.unlearning.rr import RRSettings, distance, layers_of, rerouted, squared_share
from toys import texts


def states_of(model: Any, ids: Tensor, mask: Tensor, depth: int) -> list[Tensor]:
    """After each block, from hooks on the model as transformers made it, without dropout."""
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    assert len(kept) == depth
    return [state.double() for state in kept]


@pytest.mark.formula("rr")
def test_both_terms_and_their_weights_are_the_papers(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, steps, at = load("llama"), 8, 3
    # The third row is long, so that what works on outputs alone would call the model for it apart.
    forget, retain = (
        Samples(pa.table({"text": [*texts(name, 2), " ".join(texts(name, 12))]})) for name in ("asia", "europe")
    )
    task = Task(base, {"part": forget}, retain, {"part": 1})
    settings = RRSettings(
        method="rr", layers=[0, -1], gamma=7, alpha=3, steps=steps, batch_size=3, trainable={"kind": "all"}
    )
    seen: dict[str, Any] = {}

    def run(loop: Loop) -> History:
        batches = [stream.batch([0, 1, 2]) for stream in loop.streams]
        depth = len(base.model.model.layers)
        before = [states_of(base.model, batch.ids, batch.mask, depth) for batch in batches]
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        after = [states_of(base.model, batch.ids, batch.mask, depth) for batch in batches]
        seen["by hand"] = [
            *by_hand(after[0], before[0], batches[0].mask, [0, depth - 1]),
            *zip(after[1], before[1], strict=True),
        ]
        seen["masks"] = batches[1].mask
        for number in range(at):  # the steps before, so that the session knows which it is at
            loop.next_loss(number)
        loss = loop.next_loss(at)
        seen["loss"], seen["terms"] = float(loss.total.detach()), loss.terms
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    monkeypatch.setattr(Loop, "backward", lambda loop, term: None)
    METHODS.get("rr").unlearn(task, settings)
    turned, *pairs = seen["by hand"]
    mask = seen["masks"].double()
    moved = sum(float((torch.sqrt(((a - b) ** 2).sum(-1)) * mask).sum()) for a, b in pairs)
    moved /= float(mask.sum()) * len(pairs)
    share = (at + 1) / (2 * steps)  # steps count from 1
    assert seen["terms"]["forget"] == pytest.approx((1 - share) * turned, rel=1e-4)
    assert seen["terms"]["retain"] == pytest.approx(moved, rel=1e-4)
    assert seen["loss"] == pytest.approx(7 * (1 - share) * turned + 3 * share * moved, rel=1e-4)


def by_hand(after: list[Tensor], before: list[Tensor], mask: Tensor, layers: list[int]) -> list[float]:
    total, count = 0.0, 0
    for layer in layers:
        for row, place in mask.nonzero().tolist():
            one, other = after[layer][row, place].tolist(), before[layer][row, place].tolist()
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
            total, count = total + max(0.0, dot / lengths), count + 1
    return [total / count]


def test_padding_counts_in_no_term() -> None:
    generator = torch.Generator().manual_seed(0)
    states, base = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = torch.where(mask.bool().unsqueeze(-1), states, torch.full_like(states, 99.0))
    for term in (rerouted, distance, squared_share):
        assert float(term([states], [base], mask)) == pytest.approx(float(term([other], [base], mask)))


def test_a_state_that_points_away_from_the_bases_costs_nothing_more() -> None:
    base = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    away = torch.tensor([[[-3.0, 0.0], [0.0, -1.0]]])
    mask = torch.ones(1, 2)
    assert float(rerouted([away], [base], mask)) == 0
    assert float(rerouted([base], [base], mask)) == pytest.approx(1)
    assert float(distance([away], [base], mask)) == pytest.approx((4 + 3) / 2)


def test_the_papers_layers_are_those_of_another_depth_at_the_same_share() -> None:
    assert layers_of(RRSettings(), 32) == [9, 19]  # hidden_states[10] and [20] of transformers
    assert layers_of(RRSettings(), 30) == [8, 18]
    assert layers_of(RRSettings(), 2) == [0]
    assert layers_of(RRSettings(layers=[-1]), 6) == [5]
    assert layers_of(RRSettings(layers=[5, -1]), 6) == [5]
    assert layers_of(RRSettings(), 1) == [0]
    with pytest.raises(RecipeError, match=r"unlearn\.layers: 6: the model has 6 blocks, 0 to 5"):
        layers_of(RRSettings(layers=[6]), 6)
