"""LAT's shifts and its loss, beside the adversary written out by hand on a model as transformers made it."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Batch, Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.lat import LATSettings, attacked, layers_of, projected
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task

LONG = " ".join(["the dog runs in the city"] * 15)  # beside a short one, rows that are called apart elsewhere
PAIRS = {"prompt": ["the capital of", "a"], "completion": [" france is paris", " dog and a cat"]}


def by_hand(model: Any, batch: Batch, layer: int, settings: LATSettings) -> float:
    """-log(1 - p), mean over the learned tokens, with the shifts that Adam finds, sample by sample, in float64."""
    model = model.double()
    values: list[Tensor] = []
    for row in range(len(batch.ids)):
        length = int(batch.mask[row].sum())
        ids, labels = batch.ids[row : row + 1, :length], batch.labels[row, 1:length]
        prompt = (batch.labels[row, :length] == IGNORED).double()
        where = prompt if prompt.any() else torch.ones(length).double()
        shift = torch.zeros(1, length, model.config.hidden_size, dtype=torch.float64)
        first, second = torch.zeros_like(shift), torch.zeros_like(shift)

        def logs(given: Tensor, ids: Tensor = ids) -> Tensor:
            def add(module: Any, inputs: Any, out: Any) -> Any:
                return out + given if isinstance(out, Tensor) else (out[0] + given, *out[1:])

            hook = model.model.layers[layer].register_forward_hook(add)
            try:
                return model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            finally:
                hook.remove()

        wanted = labels != IGNORED
        for step in range(1, settings.inner.steps + 1):
            given = shift.clone().requires_grad_(True)
            loss = -logs(given)[wanted, labels[wanted]].mean()
            (gradient,) = torch.autograd.grad(loss, given)
            gradient = gradient * where[None, :, None]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            sizes = (second / (1 - 0.999**step)).sqrt() + 1e-8
            shift = shift - settings.inner.learning_rate * first / (1 - 0.9**step) / sizes
            length_of = (shift**2).sum(-1, keepdim=True).sqrt()
            shift = torch.where(length_of > settings.epsilon, shift * settings.epsilon / length_of, shift)
        with torch.no_grad():
            values += list(-torch.log1p(-logs(shift)[wanted, labels[wanted]].exp()))
    return float(torch.stack(values).mean())


@pytest.mark.formula("lat")
@pytest.mark.parametrize("rows", [PAIRS, {"text": [LONG, "one two three"]}], ids=["prompts", "texts of two lengths"])
def test_the_loss_is_taken_at_the_adversarys_shifts(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[str]]
) -> None:
    base, seen = load("llama"), dict[str, float]()
    settings = LATSettings(
        layers=[1], epsilon=0.11, inner={"steps": 3, "learning_rate": 0.01}, alpha=0, trainable={"kind": "all"}
    )

    def run(loop: Loop) -> History:
        loss = loop.next_loss(0)
        loss.total.backward()
        seen["loss"], seen["gradient"] = loss.terms["forget"], float(sum(p.grad.abs().sum() for p in loop.parameters))
        seen["by hand"] = by_hand(load("llama").model, loop.streams[0].batch([0, 1]), 1, settings)
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    METHODS.get("lat").unlearn(Task(base, {"part": Samples(pa.table(rows))}, None, {"part": 1}), settings)
    assert seen["gradient"] > 0
    assert seen["loss"] == pytest.approx(seen["by hand"], rel=1e-4)


@pytest.mark.formula("lat")
def test_a_shift_is_no_longer_than_epsilon_at_each_token() -> None:
    given = torch.tensor([[[3.0, 4.0], [0.3, 0.4]], [[0.0, 0.0], [0.0, -2.0]]])
    expected = torch.tensor([[[0.6, 0.8], [0.3, 0.4]], [[0.0, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(projected(given, 1.0), expected)


def test_prompts_alone_are_shifted_where_a_sample_has_one() -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[IGNORED, 1, 1, IGNORED], [1, 1, IGNORED, IGNORED]])
    assert attacked(Batch(ids, mask, labels), plain=False).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    # The start token of a plain text is not learned either, and is no prompt.
    assert attacked(Batch(ids, mask, labels), plain=True).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_the_papers_block_is_that_of_another_depth_at_the_same_share() -> None:
    assert layers_of(LATSettings(), 32) == [8]
    assert layers_of(LATSettings(), 1) == [0]
    assert layers_of(LATSettings(layers=[-1, 3]), 4) == [3]
    with pytest.raises(RecipeError, match=r"unlearn\.layers: 4: the model has 4 blocks, 0 to 3"):
        layers_of(LATSettings(layers=[4]), 4)


@pytest.mark.parametrize("trainable", [{"kind": "lora", "dropout": 0}, {"kind": "all"}], ids=["lora", "all"])
def test_blocks_that_are_computed_again_give_the_same_delta(
    load: Callable[..., Any], trainable: dict[str, Any]
) -> None:
    """The shifts are off the model by the time of the backward pass."""
    from dataclasses import replace

    def first(again: bool) -> dict[str, Tensor]:
        base = replace(load("llama"), checkpoint_activations=again)
        settings = LATSettings(steps=2, batch_size=2, inner={"steps": 2}, learning_rate=0.01, trainable=trainable)
        rows = Samples(pa.table(PAIRS))
        branch = METHODS.get("lat").unlearn(Task(base, {"part": rows}, rows, {"part": 1}), settings)
        return {k: v if isinstance(v, Tensor) else v.dense() for k, v in branch.changes.items()}

    whole, again = first(False), first(True)
    for name, change in whole.items():
        torch.testing.assert_close(again[name], change, rtol=1e-4, atol=1e-6)
