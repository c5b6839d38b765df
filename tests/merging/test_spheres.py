"""Merges along spheres, against mergekit's recorded results and closed forms."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spunge.merging.rule import Chunk, Rule
from spunge.merging.spheres import mean_direction
from spunge.merging.thresholds import facts_of
from spunge.registry import RULES

MERGEKIT = {
    name: torch.tensor(value)
    for name, value in json.loads((Path(__file__).parent / "mergekit.json").read_text()).items()
}


def merged(name: str, deltas: Tensor, base: Tensor | None = None, weights: Any = None, **values: Any) -> Tensor:
    rule: Rule = RULES.get(name)
    chosen = rule.settings(rule=name, **values)
    flat = deltas.reshape(len(deltas), -1)
    given = torch.ones(len(deltas)) if weights is None else torch.tensor(weights)
    own = None if base is None else base.reshape(-1)
    chunk = Chunk(given, columns=deltas.shape[-1], shape=tuple(deltas.shape[1:]), base=own)
    chunk = Chunk(given, columns=chunk.columns, shape=chunk.shape, base=own, facts=facts_of(rule, flat, chosen, chunk))
    return rule(flat, chosen, chunk).reshape(deltas.shape[1:])


@pytest.mark.formula("karcher", "multislerp", "nuslerp", "model_stock", "nearswap")
@pytest.mark.parametrize(
    ("recorded", "name", "count", "values"),
    [
        ("karcher", "karcher", 3, {}),
        ("karcher of deltas", "karcher", 3, {"of": "deltas"}),
        ("multislerp", "multislerp", 3, {}),
        ("nuslerp", "nuslerp", 2, {}),
        ("nuslerp by row", "nuslerp", 2, {"by": "row"}),
        ("nuslerp of models", "nuslerp", 2, {"of": "models"}),
        ("model_stock", "model_stock", 3, {}),
        ("model_stock by row", "model_stock", 3, {"by": "row"}),
        ("nearswap", "nearswap", 1, {"t": 0.3}),
    ],
)
def test_a_rule_equals_mergekits(recorded, name, count, values):
    weights = MERGEKIT["weights"].tolist()[:count]
    result = merged(name, MERGEKIT["deltas"][:count], MERGEKIT["base"], weights, **values)
    torch.testing.assert_close(result, MERGEKIT[recorded], atol=2e-6, rtol=1e-5)


@pytest.mark.formula("karcher")
def test_the_mean_of_three_directions_is_where_the_pulls_of_all_cancel():
    units = torch.nn.functional.normalize(
        torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    shares = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mean = mean_direction(units @ units.T, shares, 1000, 1e-12) @ units
    angles = torch.arccos(units @ mean)
    pull = (shares * angles / torch.sin(angles)).unsqueeze(1) * (units - (units @ mean).unsqueeze(1) * mean)
    assert float(mean.norm()) == pytest.approx(1)
    assert float(pull.sum(0).norm()) < 1e-9


@pytest.mark.formula("nuslerp")
def test_two_equal_shares_meet_half_way_and_keep_their_length():
    ends = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    half = [math.sqrt(2.0), math.sqrt(2.0)]
    for name in ("karcher", "multislerp", "nuslerp"):
        assert merged(name, ends, of="deltas").flatten().tolist() == pytest.approx(half), name


@pytest.mark.parametrize("name", ["karcher", "multislerp", "nuslerp"])
def test_a_branch_that_changed_nothing_and_one_that_cancels_another_give_finite_values(name):
    delta = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(3))
    for other in (torch.zeros_like(delta), -delta):
        assert bool(torch.isfinite(merged(name, torch.cat([delta, other]), of="deltas")).all())


@pytest.mark.parametrize(
    ("name", "by"), [("karcher", {}), ("multislerp", {}), ("nuslerp", {}), ("nuslerp", {"by": "row"})]
)
def test_what_rounding_leaves_of_branches_that_cancel_is_no_direction(name, by):
    base, delta = (torch.randn(30, 40, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    model, opposite = base + delta / 20, base - delta / 20
    pair = torch.stack([model - base, opposite - base])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    result = merged(name, pair, of="deltas", **by)
    torch.testing.assert_close(merged(name, pair[..., order], of="deltas", **by), result[:, order])
    assert float(result.norm()) <= float(pair[0].norm()) * 1.001


def test_model_stock_keeps_branches_that_agree_and_returns_to_the_base_where_they_do_not():
    one = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    across = torch.tensor([[0.0, 3.0, 0.0, 1.0]])
    torch.testing.assert_close(merged("model_stock", torch.stack([one, one])), one)
    assert merged("model_stock", torch.stack([one, across])).tolist() == [[0.0] * 4]
    # cosine 1/2, so 2 * 1/2 / (1 + 1/2) = 2/3 of the mean
    sixty = torch.tensor([[[1.0, 0.0]], [[0.5, math.sqrt(3) / 2]]])
    torch.testing.assert_close(merged("model_stock", sixty), sixty.mean(0) * 2 / 3)


def test_nearswap_goes_no_further_than_t():
    given = torch.tensor([[[0.05, -0.05, 2.0, -3.0, 0.0]]])
    assert merged("nearswap", given, t=0.1).flatten().tolist() == pytest.approx([0.05, -0.05, 0.1, -0.1, 0.0])


@pytest.mark.formula("arcee_fusion")
def test_arcee_fusion_takes_mergekits_entries_but_for_one_at_the_threshold():
    # Of 48 entries mergekit's quartiles are the 11th, 23rd and 35th from below, ours one higher each.
    result = merged("arcee_fusion", MERGEKIT["deltas"][:1], MERGEKIT["base"])
    recorded = MERGEKIT["arcee_fusion"]
    differs = ~torch.isclose(result, recorded, atol=1e-5)
    assert int(differs.sum()) == 1
    assert float(result[differs]) == 0
    assert int((result != 0).sum()) == 7


def test_arcee_fusion_takes_entries_whole_or_not_at_all_and_few_of_them():
    generator = torch.Generator().manual_seed(1)
    base, delta = torch.randn(40, 50, generator=generator), torch.randn(1, 40, 50, generator=generator)
    result = merged("arcee_fusion", delta, base)
    taken = result != 0
    assert torch.equal(result[taken], delta[0][taken])
    assert 0.01 < float(taken.float().mean()) < 0.3
