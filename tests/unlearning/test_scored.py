"""The places of a batch that are learned, and the losses there."""

import pytest
import torch

from spunge.data.samples import IGNORED, Batch
from spunge.unlearning.scored import scored


def test_losses_are_those_of_the_labelled_tokens_given_what_stands_before_them() -> None:
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, 3, IGNORED], [IGNORED, 5, IGNORED, 6]])
    found = scored(logits, Batch(labels, labels, labels))
    logs = logits.double().log_softmax(-1)
    expected = [-logs[0, 0, 2], -logs[0, 1, 3], -logs[1, 0, 5], -logs[1, 2, 6]]
    assert found.losses().tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)
    assert found.sums().tolist() == pytest.approx([float(sum(expected[:2])), float(sum(expected[2:]))], abs=1e-5)
    assert found.lengths().tolist() == [2, 2]
