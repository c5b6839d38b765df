"""What every merge rule promises."""

import pytest
import torch
from torch import Tensor

from making import delta_source, noise, read, weights, with_moments, write_all_moments, write_checkpoint
from spunge.merging.engine import merge
from spunge.merging.tensors import merge_tensors
from spunge.registry import RULES


def deltas(k: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed))


def merged(name: str, given: Tensor, **values: object) -> Tensor:
    rule = RULES.get(name)
    return merge_tensors(rule, given, rule.settings(rule=name, **values), moments=with_moments(name, given))


def taken(name: str) -> int:
    """Branches that the rule takes: two where it can."""
    most = RULES.get(name).branches[1]
    return 2 if most is None else min(2, most)


@pytest.mark.parametrize("name", RULES.builtin)
def test_a_rule_gives_one_finite_value_per_entry_and_leaves_its_input_alone(name):
    given = deltas(taken(name), 64).reshape(-1, 8, 8)
    before = given.clone()
    result = merged(name, given)
    assert result.shape == (8, 8)
    assert bool(torch.isfinite(result).all())
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    "name", ["ties", "average", "task_arithmetic", "dare_linear", "dare_ties", "della", "breadcrumbs"]
)
def test_one_branch_in_full_is_returned_as_it_is(name):
    given = deltas(1, 500).reshape(1, 20, 25)
    values = {"density": 1.0} if "density" in RULES.get(name).settings.model_fields else {}
    assert torch.equal(merged(name, given, **values), given[0])


@pytest.mark.parametrize("name", RULES.builtin)
def test_branches_that_changed_nothing_merge_to_nothing(name):
    assert torch.equal(merged(name, torch.zeros(taken(name), 8, 8)), torch.zeros(8, 8))


@pytest.mark.parametrize("name", RULES.builtin)
def test_the_same_seed_merges_the_same_however_the_work_is_cut(name, tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    changes = [
        {"a.weight": noise(seed, 24, 32, size=0.01), "b.weight": noise(seed + 1, 32, 24, size=0.01)} for seed in (3, 5)
    ]
    changes = changes[: taken(name)]
    sources = [delta_source(tmp_path / str(number), base, change) for number, change in enumerate(changes)]
    for number, source in enumerate(sources):
        write_all_moments(name, source, {tensor: changes[0][tensor].shape for tensor in changes[0]}, number)
    settings = RULES.get(name).settings(rule=name)
    shares = [0.5, 0.5] if RULES.get(name).every_tensor else None  # of whole models, which then keep their size
    torch.manual_seed(1)
    merge(base, sources, settings, tmp_path / "whole", weights=shares, threads=1)
    torch.manual_seed(2)
    merge(base, sources, settings, tmp_path / "cut", weights=shares, threads=2, chunk=97, compiled=False)
    whole, cut = read(tmp_path / "whole"), read(tmp_path / "cut")
    assert all(torch.equal(whole[tensor], cut[tensor]) for tensor in whole)
    assert not torch.equal(whole["a.weight"], weights()["a.weight"])
    assert torch.equal(whole["norm.weight"], weights()["norm.weight"])
