"""Second moments of tiny models, against gradients and inputs that are written out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, jacrev

from experts import build_experts
from spunge.data.samples import IGNORED, Encoded
from spunge.merging.measuring import gradient_moments, input_moments
from spunge.model.loading import Base, load_base
from spunge.progress import SILENT
from spunge.recipe.model import ModelSettings

ROWS = [Encoded([5, 9, 12, 7], [IGNORED, 9, 12, 7]), Encoded([8, 3, 11], [IGNORED, IGNORED, 11])]


def base_of(folder: Path) -> Base:
    return load_base(folder, ModelSettings(path=str(folder), dtype="float32", device="cpu"))


def logits_of(base: Base, row: Encoded, name: str, value: torch.Tensor) -> Any:
    """The scores of a row's learned places, with another value of one of the model's parameters."""
    ids = torch.tensor([row.ids])
    scores = functional_call(base.model, {name: value}, (ids,)).logits[0, :-1].log_softmax(-1)
    return scores[torch.tensor(row.labels[1:]) != IGNORED]


def learned(row: Encoded) -> list[int]:
    return [label for label in row.labels[1:] if label != IGNORED]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_own_labels_give_the_mean_of_the_rows_squared_gradients(tiny: Callable[..., Path], architecture: str) -> None:
    base = base_of(tiny(architecture))
    # A matrix of a block, and the embedding, which GPT-2 ties to its output layer: its gradient is of both.
    parts = ("1.mlp.down_proj.weight", "embed_tokens.weight", "h.1.mlp.c_proj.weight", "wte.weight")
    chosen = {name: stored[0] for name, stored in base.names.items() if name.endswith(parts)}
    taken = gradient_moments(base, ROWS, set(chosen.values()), "own", 0, SILENT.step)
    assert set(taken.tensors) == set(chosen.values())
    own = dict(base.model.state_dict())
    for name, stored in chosen.items():
        rows = []
        for row in ROWS:
            value = own[name].detach().clone().requires_grad_()
            scores = logits_of(base, row, name, value)
            scores[range(len(scores)), learned(row)].sum().backward()
            rows.append(value.grad.square())
        torch.testing.assert_close(taken.tensors[stored], sum(rows) / len(rows), rtol=1e-4, atol=1e-10)
    total = torch.cat([each.double().flatten() for each in taken.tensors.values()]).norm()
    assert taken.info["norm"] == pytest.approx(float(total))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_sampled_labels_approach_fishers_own_diagonal(tiny: Callable[..., Path]) -> None:
    # One learned place: the expectation over the vocabulary is exact, sum_y p(y) (d log p(y))^2.
    base = base_of(tiny("llama"))
    name, row = "model.norm.weight", ROWS[1]
    [stored] = base.names[name]
    value = base.model.get_parameter(name).detach().clone()
    every = jacrev(lambda each: logits_of(base, row, name, each)[0])(value)
    exact = (logits_of(base, row, name, value)[0].exp().unsqueeze(1) * every.square()).sum(0).detach()
    taken = gradient_moments(base, [row] * 300, {stored}, "sampled", 1, SILENT.step).tensors[stored]
    assert float((taken - exact).norm() / exact.norm()) < 0.25
    again = gradient_moments(base, [row] * 20, {stored}, "sampled", 1, SILENT.step).tensors[stored]
    same = gradient_moments(base, [row] * 20, {stored}, "sampled", 1, SILENT.step).tensors[stored]
    other = gradient_moments(base, [row] * 20, {stored}, "sampled", 2, SILENT.step).tensors[stored]
    assert torch.equal(again, same)
    assert not torch.equal(again, other)


def inputs_by_hand(base: Base, layer: str) -> torch.Tensor:
    """(tokens, inputs) of a layer over the rows."""
    kept: list[torch.Tensor] = []
    hook = base.model.get_submodule(layer).register_forward_hook(lambda _m, given, _o: kept.append(given[0][0]))
    for row in ROWS:
        base.model(torch.tensor([row.ids]))
    hook.remove()
    return torch.cat(kept).detach().double()


@pytest.mark.parametrize(
    ("architecture", "layer", "axis"),
    [("llama", "model.layers.1.mlp.down_proj", 1), ("gpt2", "transformer.h.1.mlp.c_proj", 0)],
)
def test_inputs_moments_are_their_mean_product_over_all_tokens(
    tiny: Callable[..., Path], architecture: str, layer: str, axis: int
) -> None:
    base = base_of(tiny(architecture))
    stored = {name: each for name, names in base.names.items() for each in names}
    taken = input_moments(base, ROWS, set(stored.values()), SILENT.step)
    name, inputs = stored[f"{layer}.weight"], inputs_by_hand(base, layer)
    assert len(inputs) == taken.info["tokens"] == 7
    torch.testing.assert_close(taken.tensors[name].double(), inputs.T @ inputs / 7, rtol=1e-4, atol=1e-7)
    assert taken.info["axes"][name] == axis
    # Every other tensor is told: norms and embeddings, and GPT-2's tied output layer.
    apart = [each for each in taken.info["averaged"] if "norm" not in each and "ln_" not in each and "bias" not in each]
    assert {each.rpartition(".")[0].rpartition(".")[2] for each in apart} <= {"embed_tokens", "wte", "wpe"}
    assert set(taken.tensors) | set(taken.info["averaged"]) == set(stored.values())
    assert taken.info["silent"] == []


def test_experts_that_lie_in_one_parameter_are_told_to_be_averaged(tmp_path: Path, tokenizer_folder: Path) -> None:
    base = base_of(build_experts("mixtral", tmp_path / "m", tokenizer_folder))
    names = {each for stored in base.names.values() for each in stored}
    taken = input_moments(base, ROWS, names, SILENT.step)
    experts = {name for name in names if ".experts." in name}
    assert experts
    assert experts <= set(taken.info["averaged"])
    assert any("q_proj" in name for name in taken.tensors)
