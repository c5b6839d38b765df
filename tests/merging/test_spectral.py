"""Merges of singular vectors, on matrices whose decomposition is known."""

import pytest
import torch
from torch import Tensor

from spunge.merging.tensors import merge_tensors
from spunge.registry import RULES


def merged(name: str, deltas: Tensor, weights: list[float] | None = None, **values: object) -> Tensor:
    rule = RULES.get(name)
    return merge_tensors(rule, deltas, rule.settings(rule=name, **values), weights)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def authors_tsv(matrices: list[Tensor]) -> Tensor:
    """Algorithm 1 of arXiv:2412.00081 on full-rank matrices, step by step in float64."""
    count = len(matrices)
    kept = min(matrices[0].shape) // count
    parts = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
    left = torch.cat([u[:, :kept] for u, _, _ in parts], dim=1)
    values = torch.cat([s[:kept] for _, s, _ in parts])
    right = torch.cat([v[:kept] for _, _, v in parts], dim=0)
    p, _, q = torch.linalg.svd(left, full_matrices=False)
    r, _, t = torch.linalg.svd(right, full_matrices=False)
    return torch.linalg.multi_dot([p, q, torch.diag(values), r, t]).float()


@pytest.mark.formula("tsv")
@pytest.mark.parametrize("shape", [(12, 8), (6, 15)])
def test_tsv_is_the_papers_algorithm(shape):
    given = drawn(3, *shape)
    torch.testing.assert_close(merged("tsv", given), authors_tsv(list(given)))


def test_tsv_adds_branches_whose_directions_are_orthogonal_already():
    first, second = torch.zeros(4, 6), torch.zeros(4, 6)
    first[0, 0], first[1, 1] = 3.0, 2.0
    second[2, 2], second[3, 3] = 5.0, 1.0
    torch.testing.assert_close(merged("tsv", torch.stack([first, second])), first + second)


@pytest.mark.formula("iso_c")
def test_iso_gives_every_direction_of_the_sum_the_mean_singular_value():
    given = drawn(3, 6, 9, seed=2)
    before = torch.linalg.svdvals(given.double().sum(0))
    after = torch.linalg.svdvals(merged("iso_c", given, scale=2.0).double())
    torch.testing.assert_close(after, torch.full_like(after, 2 * float(before.mean())), rtol=1e-5, atol=1e-6)
    known = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    assert merged("iso_c", known).tolist() == [[pytest.approx([3, 0, 0]), pytest.approx([0, 3, 0])]][0]


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_directions_that_no_branch_has_stay_empty(name):
    # As of LoRA: rank 2 of 8. What a routine returns for singular values of 0 must not enter.
    factors = drawn(2, 8, 2, seed=4), drawn(2, 2, 10, seed=5)
    result = merged(name, factors[0] @ factors[1])
    assert int(torch.linalg.matrix_rank(result.double(), rtol=1e-5)) == 4
    columns = torch.linalg.qr(torch.cat([*factors[0]], dim=1).double()).Q
    inside = columns @ (columns.T @ result.double())
    torch.testing.assert_close(inside, result.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_vectors_get_the_mean_and_stacked_experts_are_matrices_of_their_own(name):
    vectors = drawn(3, 7)
    torch.testing.assert_close(merged(name, vectors), vectors.mean(0))
    experts = drawn(2, 4, 5, 6)
    each = torch.stack([merged(name, experts[:, number]) for number in range(4)])
    torch.testing.assert_close(merged(name, experts), each)


def test_a_weight_multiplies_its_branchs_singular_values():
    given = drawn(2, 6, 6)
    scaled = torch.stack([given[0] * 3, given[1]])
    torch.testing.assert_close(merged("tsv", given, [3.0, 1.0]), merged("tsv", scaled))


@pytest.mark.parametrize("shape", [(12, 8), (6, 15), (5, 5)])
def test_tsv_of_branches_that_share_their_directions_has_no_others(shape):
    # Two equal branches span what one does; whatever a routine returns for the directions that are missing must not enter.
    given = drawn(*shape)
    torch.testing.assert_close(merged("tsv", torch.stack([given, given]), share=1.0), given)
    known = torch.zeros(2, *shape)
    known[0, 0, 0], known[0, 1, 1], known[1, 0, 0], known[1, 2, 2] = 3.0, 2.0, 5.0, 1.0
    expected = torch.zeros(*shape)
    expected[0, 0], expected[1, 1], expected[2, 2] = 4.0, 2.0, 1.0
    torch.testing.assert_close(merged("tsv", known, share=1.0), expected)
