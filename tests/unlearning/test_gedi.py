"""GeDi's loss beside the definition, and the codes that it refuses."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning.gedi import GeDiSettings, class_losses, codes_of
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task
from toys import texts

CODES = {"desired": "the new moon", "undesired": "dog"}
FULL = {"kind": "all"}


@pytest.mark.formula("gedi")
def test_a_class_loss_by_hand() -> None:
    # NLL 2 after the own code and 3 after the other, scale 0.5: P(own) = e^-1 / (e^-1 + e^-1.5) = 0.62246.
    settings = GeDiSettings(weight=0.6, scale=0.5)
    expected = 0.6 * 2.0 + 0.4 * 0.474077  # -log 0.62246
    assert class_losses(torch.tensor([[2.0, 3.0]]), 0, settings).item() == pytest.approx(expected, abs=1e-5)
    assert class_losses(torch.tensor([[3.0, 2.0]]), 1, settings).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.formula("gedi")
def test_the_loss_is_that_of_whole_rows_after_their_own_code_and_of_telling_the_codes_apart(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = load("llama"), GeDiSettings(**CODES, scale=3.0, batch_size=3, retain_batch_size=2, trainable=FULL)
    asked = texts("asia", 3)
    forget = Samples(pa.table({"prompt": asked, "completion": [" moon"] * 3}))
    retain, seen = texts("europe", 2), {}

    def nll(text: str, code: str) -> Tensor:
        """Mean over the tokens of a text, by transformers alone in float64."""
        ids, before = (base.tokenizer(each, add_special_tokens=each == text)["input_ids"] for each in (text, code))
        with torch.no_grad():
            logs = base.model(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
        return -sum(logs[len(before) - 1 + at, token] for at, token in enumerate(ids)) / len(ids)

    def run(loop: Loop) -> History:
        base.model.eval()
        loop.pieces = 1
        seen["loss"] = float(loop.next_loss(0).total.detach())
        seen["gradient"] = sum(float(each.grad.abs().sum()) for each in loop.parameters if each.grad is not None)
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    task = Task(base, {"part": forget}, Samples(pa.table({"text": retain})), {"part": 1})
    METHODS.get("gedi").unlearn(task, settings)

    def mean(rows: list[str], own: int) -> float:
        told = []
        for row in rows:
            each = [nll(row, code) for code in (CODES["desired"], CODES["undesired"])]
            told.append(0.8 * each[own] - 0.2 * (-3.0 * torch.stack(each)).log_softmax(-1)[own])
        return float(sum(told)) / len(told)

    expected = 0.5 * mean([f"{text} moon" for text in asked], 1) + 0.5 * mean(retain, 0)
    assert seen["loss"] == pytest.approx(expected, rel=1e-5)
    assert seen["gradient"] > 0


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"desired": "moon", "undesired": "moon"}, "unlearn.desired: 'moon' has the tokens of unlearn.undesired"),
        ({"undesired": "漢"}, "unlearn.undesired: '漢' has no token that the tokenizer knows"),
    ],
)
def test_codes_that_cannot_be_told_apart_are_refused(
    load: Callable[..., Any], codes: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        codes_of(GeDiSettings(**CODES | codes), load().tokenizer)
