"""The rules on small tensors, against peft's merge functions, mergekit's recorded results and closed forms."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from making import with_moments
from spunge.errors import RecipeError
from spunge.merging import rules
from spunge.merging.outcome import tally
from spunge.merging.rule import Chunk, Rule
from spunge.merging.tensors import merge_tensors
from spunge.merging.thresholds import facts_of
from spunge.registry import RULES

MERGEKIT = {
    name: torch.tensor(value)
    for name, value in json.loads((Path(__file__).parent / "mergekit.json").read_text()).items()
}
ALL = list(RULES.builtin)


def merged(name: str, deltas: Tensor, weights: Any = None, **values: Any) -> Tensor:
    rule: Rule = RULES.get(name)
    return merge_tensors(rule, deltas, rule.settings(rule=name, **values), weights, with_moments(name, deltas))


def deltas(k: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.formula("ties")
def test_ties_of_the_papers_figure():
    # Worked by hand: trim to 2 of 4 entries, elect by the sum, average those that agree.
    given = torch.tensor([[4.0, -1.0, 0.5, 3.0], [-1.0, 2.0, -0.5, 3.0], [2.0, 3.0, 0.1, -5.0]])
    # trimmed: [4, 0, 0, 3], [0, 2, 0, 3], [0, 3, 0, -5]; signs +, +, +, +; means 4, 2.5, 0, 3
    assert merged("ties", given, density=0.5).tolist() == [4.0, 2.5, 0.0, 3.0]


@pytest.mark.formula("ties")
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_ties_equals_pefts_ties(density):
    # PEFT multiplies by the weights before the trim, which changes nothing per branch, and divides by a count.
    given = deltas(4, 1000)
    expected = merge_utils.ties(list(given), torch.ones(4), density)
    torch.testing.assert_close(merged("ties", given, density=density), expected)


@pytest.mark.formula("task_arithmetic")
def test_task_arithmetic_equals_pefts():
    given, weights = deltas(3, 500), torch.tensor([0.5, 1.0, -0.25])
    expected = merge_utils.task_arithmetic(list(given), weights)
    torch.testing.assert_close(merged("task_arithmetic", given, weights.tolist()), expected)


@pytest.mark.formula("ties", "task_arithmetic", "breadcrumbs", "breadcrumbs_ties")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ties", {"density": 0.4}),
        ("task_arithmetic", {}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
        ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}),
    ],
)
def test_a_rule_equals_mergekits(name, values):
    result = merged(name, MERGEKIT["deltas"], MERGEKIT["weights"].tolist(), **values)
    torch.testing.assert_close(result, MERGEKIT[name])


@pytest.mark.formula("sce")
def test_sce_equals_mergekits():
    torch.testing.assert_close(merged("sce", MERGEKIT["deltas"], density=0.3), MERGEKIT["sce"])


@pytest.mark.formula("slerp")
def test_slerp_equals_mergekits():
    rule = rules.slerp
    given, chosen = MERGEKIT["deltas"][:2].reshape(2, -1), rule.settings(rule="slerp", t=0.3)
    chunk = Chunk(torch.ones(2), base=MERGEKIT["base"].reshape(-1))
    chunk = Chunk(chunk.weights, base=chunk.base, facts=facts_of(rule, given, chosen, chunk))
    torch.testing.assert_close(rule(given, chosen, chunk).reshape(6, 8), MERGEKIT["slerp"], atol=1e-6, rtol=1e-5)


def test_every_entry_at_the_threshold_is_kept():
    given = torch.tensor([[1.0, -1.0, 1.0, 0.5]])
    assert merged("ties", given, density=0.25).tolist() == [1.0, -1.0, 1.0, 0.0]


def test_a_sum_of_zero_elects_plus_or_the_majority():
    given = torch.tensor([[1.0, -3.0, -2.0], [-1.0, -1.0, -2.0]])
    assert merged("ties", given, density=1.0).tolist() == [1.0, -2.0, -2.0]
    assert merged("ties", given, density=1.0, tie="majority").tolist() == [-1.0, -2.0, -2.0]


def test_density_may_differ_between_branches():
    given = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    kept = rules.ties.trimmed(
        given,
        chosen := rules.TiesSettings(density=[0.25, 0.75]),
        Chunk(torch.ones(2), facts=facts_of(rules.ties, given, chosen, Chunk(torch.ones(2)))),
    )
    assert torch.count_nonzero(kept, dim=1).tolist() == [1, 3]


# Entry 0: one branch holds it alone. 1: all hold it. 2: one against two. 3: nobody.
HELD = torch.tensor([[4.0, 1.0, 3.0, 0.0], [0.0, 1.0, -1.0, 0.0], [0.0, 1.0, -1.0, 0.0]])


@pytest.mark.formula("ties_norm")
@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1, [4.0, 3.0, 3.0, 0.0]),
        (2, [4.0, 3.0**0.5, 3.0, 0.0]),
        (3, [4.0, 3.0 ** (1 / 3), 3.0, 0.0]),
        ("max", [4.0, 1.0, 3.0, 0.0]),
    ],
)
def test_a_norm_of_agreeing_branches_dilutes_nothing_that_one_holds_alone(power, expected):
    result = merged("ties_norm", HELD, density=1.0, power=power)
    torch.testing.assert_close(result, torch.tensor(expected))
    torch.testing.assert_close(merged("ties_norm", -HELD, density=1.0, power=power), -result)


def test_the_norm_of_power_1_is_the_sum_that_dare_ties_takes_and_a_high_one_is_the_largest_entry():
    given, weights = deltas(5, 1000), [1.0, 0.5, 2.0, 1.0, -1.0]
    added = merged("dare_ties", given, weights, density=1.0, normalize=False)
    torch.testing.assert_close(merged("ties_norm", given, weights, density=1.0, power=1), added)
    tiny = given * 1e-20  # whose 64th powers float32 doesn't hold
    largest = merged("ties_norm", tiny, weights, density=1.0, power="max")
    torch.testing.assert_close(merged("ties_norm", tiny, weights, density=1.0, power=64), largest, rtol=0.03, atol=0)


@pytest.mark.formula("ties_norm")
@pytest.mark.parametrize("tie", ["plus", "majority"])
def test_a_norm_trims_and_elects_as_ties_does(tie):
    given = deltas(4, 1000)
    signs = [torch.sign(merged(name, given, density=0.3, tie=tie)) for name in ("ties", "ties_norm")]
    assert torch.equal(*signs)


@pytest.mark.formula("consensus")
def test_consensus_keeps_only_what_all_agree_on():
    given = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -2.0, -3.0, 1.0]])
    assert merged("consensus", given).tolist() == [2.0, 0.0, -2.0, 0.0]


@pytest.mark.formula("average")
def test_average_is_numpys_weighted_average():
    given, weights = deltas(4, 300), [1, 2, 3, 4]
    expected = np.average(given.double().numpy(), axis=0, weights=weights)
    np.testing.assert_allclose(merged("average", given, weights).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.formula("weighted_sum")
def test_a_weighted_sum_is_the_sum_of_the_models_themselves():
    base, given, weights = deltas(1, 300, 5)[0], deltas(2, 300), [0.3, 0.5]
    rule = RULES.get("weighted_sum")
    merged_delta = rule(given, rule.settings(), Chunk(torch.tensor(weights), base=base))
    expected = sum(w * (base.double() + row.double()) for w, row in zip(weights, given, strict=True))
    torch.testing.assert_close((base + merged_delta).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "weights", "values", "said"),
    [
        ("slerp", [1.0, 2.0], {}, "reads no weights"),
        ("average", [1.0, -1.0], {}, "divides by their sum"),
        ("average", [0.1, 0.2, -0.3], {}, "divides by their sum"),
        ("consensus", [2.0, -2.0], {}, "divides by their sum"),
        ("dare_linear", [2.0, -2.0], {"normalize": True}, "divides by their sum"),
        ("sce", [1.0, -0.5], {}, "none below 0"),
        *((name, [0.0, 0.0], {}, "weight") for name in ALL),
        *((name, [1.0, float("inf")], {}, "finite") for name in ALL),
    ],
)
def test_weights_that_a_rule_cannot_use_are_refused(name, weights, values, said):
    with pytest.raises(RecipeError, match=said):
        merged(name, deltas(len(weights), 50), weights, **values)


READ = [name for name in ALL if RULES.get(name).weighting(RULES.get(name).settings(rule=name)) != "none"]


@pytest.mark.parametrize("name", READ)
def test_weights_change_what_a_rule_gives(name):
    base, given = deltas(1, 400, 9)[0], deltas(2, 400)
    rule: Rule = RULES.get(name)
    results = []
    for weights in ([1.0, 1.0], [0.25, 3.0]):
        own = with_moments(name, given) or []
        chunk = Chunk(torch.tensor(weights), columns=400, base=base, moments=own, norms=[1.0] * len(own))
        chosen = rule.settings(rule=name)
        results.append(rule(given, chosen, replace(chunk, facts=facts_of(rule, given, chosen, chunk))))
    assert not torch.equal(*results)


def test_weights_below_zero_turn_a_branch_round_in_the_count_of_conflicts():
    given = torch.tensor([[1.0, 1.0, -2.0, 0.0], [1.0, -1.0, -1.0, 1.0]])
    counts = {}
    for weights in ((1.0, 1.0), (1.0, -0.5), (1.0, 0.0)):
        entry = tally(given, given, given[0], torch.tensor(weights))
        counts[weights] = (entry.contested, entry.conflicts)
    assert counts == {(1.0, 1.0): (3, 1), (1.0, -0.5): (3, 2), (1.0, 0.0): (0, 0)}


RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


@pytest.mark.formula(*RANDOM)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_rule_is_the_papers_arithmetic_on_the_numbers_drawn(name, normalize):
    given, weights, density, epsilon = deltas(3, 200).numpy(), np.array([0.5, 1.0, 2.0]), 0.6, 0.2
    drawn = Chunk(torch.ones(3)).uniform(torch.zeros(3, 200), 7).numpy()
    share = np.full((3, 200), density)
    if name.startswith("della"):
        for row, sizes in enumerate(np.abs(given)):
            for rank, entry in enumerate(sorted(range(200), key=sizes.__getitem__)):
                share[row, entry] = density - epsilon + 2 * epsilon * rank / 199
    terms = np.where(drawn < share, given / share, 0.0) * weights[:, None]
    agree = np.ones_like(terms, dtype=bool)
    if not name.endswith("_linear"):
        agree = np.sign(terms) == np.where(terms.sum(0) >= 0, 1, -1)
    total = (terms * agree).sum(0)
    if normalize:
        by = (weights[:, None] * agree).sum(0)
        total = np.where(by > 0, total / np.where(by > 0, by, 1), 0.0)
    values = {"density": density, "normalize": normalize, "seed": 7}
    if name.startswith("della"):
        values["epsilon"] = epsilon
    found = merged(name, torch.from_numpy(given), weights.tolist(), **values)
    np.testing.assert_allclose(found.numpy(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_random_rules_keep_their_share_and_their_mean(name):
    given = torch.ones(1, 200, 1000)
    result = merged(name, given, density=0.3)
    assert float((result != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(result.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.formula("della")
def test_della_keeps_large_entries_oftener():
    given = torch.arange(1.0, 1001.0).repeat(200, 1).unsqueeze(0)
    kept = (merged("della", given, density=0.5, epsilon=0.2) != 0).float().mean(dim=0)
    assert float(kept[:100].mean()) == pytest.approx(0.32, abs=0.03)
    assert float(kept[-100:].mean()) == pytest.approx(0.68, abs=0.03)


def test_random_numbers_are_uniform_and_differ_between_branches_tensors_and_seeds():
    chunk = Chunk(torch.ones(2), seeds=(3, 4))
    numbers = chunk.uniform(torch.zeros(2, 100_000))
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
    assert abs(float(torch.corrcoef(numbers)[0, 1])) < 0.02
    again = chunk.uniform(torch.zeros(2, 100_000), seed=1)
    assert abs(float(torch.corrcoef(torch.stack([numbers[0], again[0]]))[0, 1])) < 0.02
    other = replace(chunk, name="another tensor").uniform(torch.zeros(2, 100_000))
    assert abs(float(torch.corrcoef(torch.stack([numbers[0], other[0]]))[0, 1])) < 0.02
    lagged = torch.stack([numbers[0][:-1], numbers[0][1:]])
    assert abs(float(torch.corrcoef(lagged)[0, 1])) < 0.02


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "average", "consensus", "breadcrumbs"])
def test_scale_multiplies_the_result(name):
    given = deltas(3, 200)
    torch.testing.assert_close(merged(name, given, scale=2.5), 2.5 * merged(name, given))


@given(st.permutations(range(4)), st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_ties_does_not_depend_on_the_branches_order(order, density):
    given = deltas(4, 200)
    torch.testing.assert_close(
        merged("ties", given[list(order)], density=density), merged("ties", given, density=density)
    )
