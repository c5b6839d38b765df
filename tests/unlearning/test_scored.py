"""The places of a batch that are learned, and the losses there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spunge.unlearning.scored
from spunge.data.samples import IGNORED, Batch, Encoded, collate
from spunge.recipe.training import Everything, LoRA, Selected
from spunge.unlearning.ce_u import label_left_out
from spunge.unlearning.forms import FORMS
from spunge.unlearning.head import head_of
from spunge.unlearning.me_gd import unevenness
from spunge.unlearning.npo import negative_preference
from spunge.unlearning.outputs import divergence
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.scored import Scored, outputs, places_at_once, rows_alike, scored
from spunge.unlearning.trained import training
from spunge.unlearning.undial import adjusted_distillation
from spunge.unlearning.wga import weighted_ascent
from toys import SMALL


def test_losses_are_those_of_the_labelled_tokens_given_what_stands_before_them() -> None:
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, 3, IGNORED], [IGNORED, 5, IGNORED, 6]])
    found = scored(logits, Batch(labels, labels, labels))
    logs = logits.double().log_softmax(-1)
    expected = [-logs[0, 0, 2], -logs[0, 1, 3], -logs[1, 0, 5], -logs[1, 2, 6]]
    assert found.losses().tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)
    assert found.sums().tolist() == pytest.approx([float(sum(expected[:2])), float(sum(expected[2:]))], abs=1e-5)
    assert found.lengths().tolist() == [2, 2]


# In pieces, from what the output layer reads.

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "scaled": ("granite", {"logits_scaling": 3.0}),
    "scaled up": ("cohere", {"logit_scale": 0.25}),
    "squashed": ("gemma2", {"final_logit_softcapping": 5.0, "initializer_range": 0.5}),
    "with a bias": ("phi", {}),
    "a state-space model's": ("mamba", {"state_size": 4}),
}
TRAINED: dict[str, LoRA | Selected | Everything] = {
    "factors": LoRA(rank=2, dropout=0, targets="all-linear"),
    "factors of the output layer": LoRA(rank=2, dropout=0, targets=["lm_head"]),
    "the last block": Selected(match=["*.1.*weight"]),
    "all": Everything(),
}


def cases() -> list[tuple[str, str]]:
    """Every model with factors, every way on the plain one, and the ways in which a tied layer is trained."""
    ways = [("as it is", way) for way in TRAINED]
    return [*((kind, "factors") for kind in KINDS if kind != "as it is"), *ways, ("tied", "all"), ("squashed", "all")]


LOSSES: dict[str, Callable[[Scored, Any], Tensor]] = {
    "mean": lambda found, base: found.mean(),
    "sums": lambda found, base: negative_preference(found.sums(), base.sums() - 1, 0.5),
    "weighted": lambda found, base: weighted_ascent(found.losses(), 2.0),
    "divergence": lambda found, base: divergence(found, base.log_probabilities),
    "distillation": lambda found, base: adjusted_distillation(found, base.log_probabilities, 3.0),
    "label left out": lambda found, base: label_left_out(found),
    "entropy": lambda found, base: unevenness(found, "paper"),
}


@pytest.mark.parametrize(("kind", "way"), cases())
def test_losses_and_gradients_in_pieces_are_those_of_all_logits_at_once(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    monkeypatch.setattr(spunge.unlearning.scored, "token_losses", exact_losses)
    single = Tensor.float
    # All is float64 but the angles of positions, which some models work out in float32 whatever is asked.
    monkeypatch.setattr(Tensor, "float", lambda own: own if own.dtype == torch.float64 else single(own))
    name, changes = KINDS[kind]
    base = load(name, **{**SMALL, "head_dim": 8, "num_hidden_layers": 2, **changes})
    base.model.double()
    for buffer_name, buffer in base.model.named_buffers():
        if buffer_name.endswith("inv_freq"):
            buffer.data = single(buffer)
    batch = collate([Encoded([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]), Encoded([9, 10, 11], [9, 10, 11])])
    with torch.no_grad():
        before = scored(base.model(batch.ids, attention_mask=batch.mask).logits, batch)
    with training(base, TRAINED[way], 0) as trained:
        with torch.no_grad():
            for parameter in trained.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for loss in LOSSES.values():
            whole = loss(scored(trained.model(batch.ids, attention_mask=batch.mask).logits, batch), before)
            expected = torch.autograd.grad(whole, trained.parameters, allow_unused=True)
            monkeypatch.setitem(
                FORMS, "cpu", replace(FORMS["cpu"], piece=8 * 128 // (8 if way == "all" else 1), widths=0)
            )
            monkeypatch.setattr(spunge.unlearning.scored, "TRAINED", 1)
            found = outputs(trained.model, batch)
            assert found.states.shape == (5, 32)
            assert len(found.places()) > 1
            in_pieces = loss(found, base_outputs(trained, batch))
            gradients = torch.autograd.grad(in_pieces, trained.parameters, allow_unused=True)
            torch.testing.assert_close(in_pieces, whole, rtol=1e-9, atol=1e-12)
            for gradient, wanted in zip(gradients, expected, strict=True):
                assert (gradient is None) == (wanted is None)
                if wanted is not None:
                    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_a_trained_output_layer_computes_more_places_at_once() -> None:
    """Its pieces are computed twice: on a CPU logits of twice its weights' size are one piece."""
    cpu, cuda = FORMS["cpu"], FORMS["cuda"]
    assert places_at_once(cpu, 49_152, 576, False) == 2**24 // (4 * 49_152)
    assert places_at_once(cpu, 49_152, 576, True) == 2 * 576
    assert places_at_once(cpu, 1_000, 64, True) == 8 * 2**24 // 4_000
    assert places_at_once(cuda, 128_256, 2048, True) == 8 * 2**28 // (4 * 128_256)
    assert places_at_once(cpu, 2**30, 1, False) == 1


def test_no_tensor_of_all_places_and_the_whole_vocabulary_is_made(load: Callable[..., Any]) -> None:
    base = load(vocab_size=30_000)
    batch = collate([Encoded(list(range(5, 105)), list(range(5, 105)))] * 8)
    assert 5 * FORMS["cpu"].piece < 8 * 99 * 30_000 * 4
    with training(base, LoRA(rank=2), 0) as trained, Sizes() as sizes:
        (
            outputs(trained.model, batch).mean()
            + divergence(outputs(trained.model, batch), base_outputs(trained, batch).log_probabilities)
        ).backward()
    assert sizes.largest <= FORMS["cpu"].piece


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_of_about_one_length_are_computed_together_with_the_same_outputs(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    base = load(architecture)
    rows = [list(range(5, 5 + length)) for length in (3, 40, 4, 38, 5)]
    batch = collate([Encoded(row, [IGNORED, *row[1:]]) for row in rows])
    widths: list[int] = []
    base.model.get_input_embeddings().register_forward_hook(
        lambda _layer, given, _out: widths.append(given[0].shape[1])
    )
    found = []
    with training(base, Selected(match=["*.1.*weight"]), 0) as trained:
        for cost in (1000, 8):
            head_of(trained.model, batch)
            monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], call=cost))
            widths.clear()
            scores = outputs(trained.model, batch)
            found.append((scores, torch.autograd.grad(scores.sums().square().sum(), trained.parameters)))
            assert widths == ([40] if cost == 1000 else [40, 5])
            assert scores.labels.tolist() == [label for row in rows for label in row[1:]]
            assert torch.equal(base_outputs(trained, batch).rows, scores.rows)
    (whole, gradients), (grouped, others) = found
    torch.testing.assert_close(grouped.sums(), whole.sums(), rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, others, strict=True):
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()


def test_places_that_are_scored_in_the_padding_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], call=1))
    batch = collate([Encoded(list(range(5, 5 + length)), list(range(5, 5 + length))) for length in (20, 3)])
    assert rows_alike(batch) == [[0], [1]]
    assert rows_alike(batch._replace(labels=batch.ids)) == [[0, 1]]  # as SKU's code in mode reference
    assert rows_alike(batch._replace(mask=batch.mask.flip(1), labels=batch.labels.flip(1))) == [[0, 1]]  # on the left


def test_finding_out_what_follows_the_output_layer_leaves_the_random_numbers_to_come(load: Callable[..., Any]) -> None:
    base = load("gpt2")
    batch = collate([Encoded([5, 6, 7], [5, 6, 7])])
    base.model.train()
    before = torch.get_rng_state()
    assert head_of(base.model, batch) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert base.model.training


def test_a_model_that_makes_something_else_of_its_output_is_called_as_a_whole(load: Callable[..., Any]) -> None:
    base = load()
    batch = collate([Encoded([5, 6, 7], [5, 6, 7])])
    forward = base.model.forward

    def reversed_logits(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        out.logits = out.logits.flip(-1)
        return out

    base.model.forward = reversed_logits
    assert head_of(base.model, batch) is None
    logits = base.model(batch.ids, attention_mask=batch.mask).logits
    assert torch.equal(outputs(base.model, batch).losses(), scored(logits, batch).losses())


@pytest.mark.parametrize("call", [64, 1])  # in one group of rows, and in two
def test_the_scored_places_are_found_without_waiting_for_the_device(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], call=call))
    base = load()
    batch = collate([Encoded(list(range(5, 5 + length)), list(range(5, 5 + length))) for length in (20, 3)])
    groups = rows_alike(batch)
    assert len(groups) == (2 if call == 1 else 1)
    assert head_of(base.model, batch) is not None
    with training(base, LoRA(rank=2, targets="all-linear"), 0) as trained:
        with Waits() as calls:
            for rows in groups:
                length = max(batch.counted.reach[row] for row in rows)
                trained.model(input_ids=batch.ids[rows, :length], attention_mask=batch.mask[rows, :length])
        with Waits() as waits:
            outputs(trained.model, batch).mean().backward()
    assert waits.count == calls.count  # transformers' own look at the mask


def test_a_batch_with_other_labels_is_counted_anew() -> None:
    batch = collate([Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([5, 6], [5, 6])])
    assert (batch.learned, batch.counted.reach) == (3, (3, 2))
    assert batch.counted is batch.collated
    fewer = batch._replace(labels=torch.full_like(batch.labels, IGNORED), mask=batch.mask.clone())
    assert (fewer.learned, fewer.counted.reach) == (0, (3, 2))
    assert scored(torch.zeros(2, 3, 4), fewer).labels.numel() == 0
    longer = batch._replace(mask=torch.zeros_like(batch.mask))
    assert longer.counted.reach == (2, 1)  # the last that is scored is read by its place before
    assert Batch(batch.ids, batch.mask, batch.labels).counted.wanted.tolist() == batch.counted.wanted.tolist()


def test_logits_of_other_places_than_the_batchs_are_refused() -> None:
    batch = collate([Encoded([5, 6, 7], [5, 6, 7])])
    with pytest.raises(IndexError, match="of \\(1, 3\\) places"):
        scored(torch.zeros(1, 4, 9), batch)


class Waits(TorchDispatchMode):
    """How often something inside the block reads a number that is computed, or finds places by a mask."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that anything inside the block makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel() * each.element_size())
        return made


def exact_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
