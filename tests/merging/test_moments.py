"""Rules that weigh branches by their second moments, against closed forms in float64 and the authors' arithmetic."""

import pytest
import torch
from torch import Tensor

from making import with_moments
from spunge.merging.tensors import merge_tensors
from spunge.registry import RULES


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(
    name: str, deltas: Tensor, moments: list[Tensor], weights: list[float] | None = None, **values: object
) -> Tensor:
    rule = RULES.get(name)
    return merge_tensors(rule, deltas, rule.settings(rule=name, **values), weights, moments)


def gram(rows: int, size: int, seed: int) -> Tensor:
    inputs = drawn(rows, size, seed=seed)
    return inputs.T @ inputs / rows


@pytest.mark.formula("fisher")
def test_fisher_is_the_authors_average_of_whole_models_less_the_base():
    # mmatena/model_merging, merging.py: coefficients over the norms, diagonals at the floor or above, sum(c F theta) / sum(c F).
    base, deltas = drawn(6, 5, seed=9).double(), drawn(3, 6, 5)
    moments = [drawn(6, 5, seed=20 + place).square() * 10.0**-place for place in range(3)]
    weights, floor = [0.2, 0.5, 0.3], 0.05
    shares = [c * own.double().clamp(min=floor) / own.double().norm() for c, own in zip(weights, moments, strict=True)]
    models = [base + delta.double() for delta in deltas]
    expected = sum(s * m for s, m in zip(shares, models, strict=True)) / sum(shares) - base
    result = merged("fisher", deltas, moments, weights, floor=floor)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_fisher_takes_each_entry_from_the_branch_that_alone_has_a_moment_there_and_the_mean_where_none_has():
    deltas = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 9.0]])
    moments = [torch.tensor([1e-30, 0.0, 0.0]), torch.tensor([0.0, 1e-12, 0.0])]
    assert merged("fisher", deltas, moments, normalize=False).tolist() == [1.0, 6.0, 6.0]
    assert merged("fisher", deltas, moments, [1.0, 3.0], scale=2.0).tolist() == [2.0, 12.0, 15.0]


@pytest.mark.formula("regmean")
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_regmean_is_the_authors_closed_form_of_whole_models_less_the_base(alpha):
    # bloomberg/dataless-model-merging, avg_merger.py: (sum G)^-1 sum G W^T, with what is off the diagonal times alpha.
    base, deltas = drawn(7, 5, seed=9).double(), drawn(2, 7, 5)
    moments, weights = [gram(40, 5, 3), gram(40, 5, 4)], [1.0, 2.5]
    diagonal = torch.eye(5, dtype=torch.float64)
    own = [w * (alpha + (1 - alpha) * diagonal) * each.double() for w, each in zip(weights, moments, strict=True)]
    total = sum(g @ (base + delta.double()).T for g, delta in zip(own, deltas, strict=True))
    expected = (torch.inverse(sum(own)) @ total).T - base
    result = merged("regmean", deltas, moments, weights, alpha=alpha)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.formula("regmean")
def test_regmean_gives_outputs_that_no_other_weight_brings_nearer_to_the_branches():
    deltas, inputs = drawn(2, 4, 6).double(), [drawn(30, 6, seed=5).double(), drawn(30, 6, seed=6).double()]
    result = merged("regmean", deltas.float(), [(x.T @ x / 30).float() for x in inputs], alpha=1.0).double()
    weight = result.clone().requires_grad_()
    loss = sum(((x @ (weight - d).T) ** 2).sum() for x, d in zip(inputs, deltas, strict=True))
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-4 * float(loss.detach())


def test_regmean_is_the_mean_where_no_branchs_inputs_go_and_exact_where_one_alone_goes():
    # Inputs of the first branch lie in dimension 0, of the second in 1, of none in 2.
    deltas = drawn(2, 4, 3)
    moments = [torch.diag(torch.tensor([2.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 1e-3, 0.0]))]
    result = merged("regmean", deltas, moments, alpha=1.0)
    torch.testing.assert_close(result[:, 0], deltas[0, :, 0])
    torch.testing.assert_close(result[:, 1], deltas[1, :, 1])
    torch.testing.assert_close(result[:, 2], deltas[:, :, 2].mean(0))


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_moments_that_are_alike_give_the_mean_and_none_is_an_error(name):
    deltas = drawn(3, 6, 4)
    own = gram(20, 4, 1) if name == "regmean" else drawn(6, 4, seed=1).square()
    torch.testing.assert_close(merged(name, deltas, [own] * 3), deltas.mean(0))
    with pytest.raises(ValueError, match="moments"):
        merge_tensors(RULES.get(name), deltas, RULES.get(name).settings(rule=name))
    with pytest.raises(ValueError, match="moments"):
        merge_tensors(RULES.get("ties"), deltas, RULES.get("ties").settings(), moments=[own] * 3)


def test_a_rule_without_moments_gets_none():
    assert with_moments("ties", drawn(2, 4, 4)) is None
