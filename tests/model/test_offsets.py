"""A large model's logits, shifted by small ones: the papers' arithmetic, and what each model reads of a batch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from picked import few
from spunge.model.offsets import Classes, OffsetProcessor, Offsets, Pair, Shift, merged, nucleus, shifted
from spunge.model.reading import reading_of

# Rotary and learned positions, positions that a model counts itself, vocabularies padded to another size.
KINDS = [("llama", "gpt2"), ("gpt2", "llama"), ("opt", "gpt2"), ("llama", "opt"), ("qwen2", "qwen2")]
PAD = 0
PROMPTS = [[1, 9, 8, 7, 30], [1, 12], [1, 40, 41, 22]]


class Trio:
    """A large model, a small one, and two changed copies of the small one."""

    def __init__(self, tiny: Callable[..., Path], large: str, small: str) -> None:
        width = "n_embd" if large == "gpt2" else "hidden_size"
        extra = {"word_embed_proj_dim": 48} if large == "opt" else {}
        torch.manual_seed(5)
        self.large = AutoModelForCausalLM.from_pretrained(tiny(large, vocab_size=136, **{width: 48}, **extra)).eval()
        self.small = AutoModelForCausalLM.from_pretrained(tiny(small)).eval()
        self.changed = [copy.deepcopy(self.small) for _ in range(2)]
        for number, model in enumerate((self.large, self.small, *self.changed)):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)

    def offsets(self, shift: Shift) -> Offsets:
        return Offsets([Pair(model, self.small) for model in self.changed], shift)

    def next_logits(self, ids: list[int], shift: Shift) -> Tensor:
        """Of one text, by each model alone, without padding or caches: the definition."""
        large, small, *changed = (
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            for model in (self.large, self.small, *self.changed)
        )
        offset = sum(each - small for each in changed) / (2 if shift.merge == "mean" else 1)
        return torch.cat([large[:128] + shift.alpha * offset[:128], large[128:]])

    def continued(self, ids: list[int], count: int, shift: Shift) -> list[int]:
        written: list[int] = []
        for _ in range(count):
            written.append(int(self.next_logits(ids + written, shift).argmax()))
        return written


@pytest.fixture(scope="module")
def trio(tiny: Callable[..., Path]) -> Callable[..., Trio]:
    made: dict[tuple[str, str], Trio] = {}
    return lambda large, small: made.setdefault((large, small), Trio(tiny, large, small))


def left_padded() -> tuple[Tensor, Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(each)) + each for each in PROMPTS])
    return ids, torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in PROMPTS])


SHIFT = Shift(alpha=0.7)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


@pytest.mark.parametrize(("large", "small"), few(KINDS, 0, 2))
@torch.no_grad()
def test_a_padded_batch_written_with_caches_is_what_each_model_alone_says_without(
    trio: Callable[..., Trio], large: str, small: str
) -> None:
    models = trio(large, small)
    expected = [models.continued(each, 6, SHIFT) for each in PROMPTS]
    ids, mask = left_padded()
    hook = models.offsets(SHIFT).attach(models.large)
    try:
        written = models.large.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    finally:
        hook.remove()
    assert written[:, ids.shape[1] :].tolist() == expected
    plain = models.large.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert plain.tolist() != written.tolist()


@pytest.mark.parametrize(("large", "small"), few(KINDS, 0, 3))
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_the_processor_writes_what_the_shifted_model_writes(
    trio: Callable[..., Trio], large: str, small: str, beams: int
) -> None:
    models, (ids, mask) = trio(large, small), left_padded()
    offsets = models.offsets(SHIFT)
    options = {**GREEDY, "num_beams": beams}
    hook = offsets.attach(models.large)
    by_hook = models.large.generate(input_ids=ids, attention_mask=mask, **options)
    without_cache = models.large.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    hook.remove()
    processor = OffsetProcessor(offsets, mask)
    processed = models.large.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **options)
    assert by_hook.tolist() == without_cache.tolist() == processed.tolist()


@pytest.mark.parametrize("merge", ["sum", "mean"])
@torch.no_grad()
def test_every_position_of_a_text_has_the_shifted_logits(trio: Callable[..., Trio], merge: Any) -> None:
    models, shift = trio("llama", "gpt2"), Shift(alpha=1.3, merge=merge)
    longest = PROMPTS[0]
    ids = torch.tensor([longest, PROMPTS[1] + [PAD] * 3])
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    hook = models.offsets(shift).attach(models.large)
    logits = models.large(input_ids=ids, attention_mask=mask, use_cache=False).logits
    positional = models.large(ids).logits
    hook.remove()
    for count in range(1, 6):
        expected = models.next_logits(longest[:count], shift)
        torch.testing.assert_close(logits[0, count - 1].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 1].double(), models.next_logits(PROMPTS[1], shift), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(positional[0], logits[0])


@torch.no_grad()
def test_rows_chosen_and_copies_of_a_cache_reach_the_small_models_keys_too(trio: Callable[..., Trio]) -> None:
    models = trio("llama", "gpt2")
    hook = models.offsets(SHIFT).attach(models.large)
    cache = models.large(torch.tensor([[1, 9, 8], [1, 5, 6]]), use_cache=True).past_key_values
    turned = copy.deepcopy(cache)
    turned.batch_select_indices(torch.tensor([1, 1, 0]))
    positions = torch.full((3, 1), 3)
    out = models.large(torch.tensor([[7], [4], [7]]), past_key_values=turned, position_ids=positions).logits[:, -1]
    again = models.large(torch.tensor([[7], [7]]), past_key_values=cache, position_ids=positions[:2]).logits[:, -1]
    hook.remove()
    for row, ids in zip(out, [[1, 5, 6, 7], [1, 5, 6, 4], [1, 9, 8, 7]], strict=True):
        torch.testing.assert_close(row.double(), models.next_logits(ids, SHIFT), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, out[[2, 0]])


@torch.no_grad()
def test_what_the_small_models_have_not_read_is_refused(trio: Callable[..., Trio]) -> None:
    models = trio("llama", "gpt2")
    begun = models.large(torch.tensor([[1, 9]]), use_cache=True).past_key_values
    hook = models.offsets(SHIFT).attach(models.large)
    try:
        with pytest.raises(RuntimeError, match="holds tokens that the small models have not read"):
            models.large(torch.tensor([[7]]), past_key_values=begun)
        with pytest.raises(ValueError, match="gives no loss"):
            models.large(torch.tensor([[7]]), labels=torch.tensor([[7]]))
        with pytest.raises(ValueError, match="takes input_ids"):
            models.large(inputs_embeds=torch.zeros(1, 2, 48))
    finally:
        hook.remove()
    assert type(begun) is DynamicCache


def test_a_nucleus_hides_no_model_that_reads_in_order(load: Callable[..., Any]) -> None:
    large, small, changed = load("llama"), load("gpt2"), load("gpt2")
    shift = Shift(top_p=0.2)
    plain = reading_of(large)
    offsets = Offsets([Pair(changed.model, small.model)], shift)
    hook = offsets.attach(large.model)
    try:
        assert reading_of(replace(large, beside=tuple(offsets.models))) == plain
    finally:
        hook.remove()
    assert plain.shared


def test_logits_and_log_probabilities_give_the_same_distribution() -> None:
    large, up, down = torch.randn(3, 5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = Shift(alpha=1.7)
    by_logits = shifted(large, (up - down)[None], shift).softmax(-1)
    by_logs = shifted(large.log_softmax(-1), (up.log_softmax(-1) - down.log_softmax(-1))[None], shift).softmax(-1)
    torch.testing.assert_close(by_logits, by_logs)
    # The paper's product of experts: p_large * (p_unlearned / p_small) ** alpha, normalised.
    product = large.softmax(-1) * (up.softmax(-1) / down.softmax(-1)) ** 1.7
    torch.testing.assert_close(by_logits.double(), product / product.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def dexperts(base: np.ndarray, expert: np.ndarray, anti: np.ndarray, alpha: float, p: float) -> np.ndarray:
    """One position as generation/dexperts_generation.py of alisawuffles/DExperts computes it: the base's nucleus, the token that
    crosses p kept, and the difference added to it."""
    order = np.argsort(-base, kind="stable")
    probabilities = np.exp(base[order] - base.max())
    reached = np.cumsum(probabilities / probabilities.sum()) > p
    removed = np.concatenate([[False], reached[:-1]])
    filtered = base.copy()
    filtered[order[removed]] = -np.inf
    return filtered + alpha * (expert - anti)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dexperts_is_the_authors_arithmetic(p: float) -> None:
    base, expert, anti = np.random.default_rng(1).normal(size=(3, 40)) * 2
    ours = shifted(torch.tensor(base), torch.tensor(expert - anti)[None], Shift(alpha=2.0, top_p=p))
    expected = dexperts(base, expert, anti, 2.0, p)
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_nucleus_of_everything_keeps_every_token() -> None:
    logits = torch.tensor([0.0, -200.0, 3.0])
    assert torch.equal(nucleus(logits, 1.0), logits)


def test_ties_of_offsets_trims_elects_and_averages_at_each_position() -> None:
    offsets = torch.tensor(
        [[[4.0, -3.0, 0.5, 1.0], [0.0, 0.0, 9.0, 1.0]], [[-1.0, -5.0, 0.1, 2.0], [1.0, 2.0, -8.0, 0.0]]]
    )
    # By hand, half of four entries kept: position 0 has (4, -3, 0, 0) and (0, -5, 0, 2), position 1 (0, 0, 9, 1) and (0, 2, -8, 0).
    expected = torch.tensor([[4.0, -4.0, 0.0, 2.0], [0.0, 2.0, 9.0, 1.0]])
    torch.testing.assert_close(merged(offsets, Shift(merge="ties", density=0.5)), expected)


def test_what_one_vocabulary_has_beyond_the_other_is_left_as_it_is() -> None:
    large, offsets = torch.ones(2, 6), torch.ones(1, 2, 4)
    assert shifted(large, offsets, Shift(alpha=2.0)).tolist() == [[3.0] * 4 + [1.0] * 2] * 2
    assert shifted(large[:, :3], offsets, Shift(alpha=2.0)).tolist() == [[3.0] * 3] * 2


class Conditional:
    """A large model, and class-conditional ones."""

    CODES = ((50, 51), (60,))

    def __init__(self, tiny: Callable[..., Path], large: str, small: str) -> None:
        plain = Trio(tiny, large, small)
        self.large, self.changed = plain.large, plain.changed

    def offsets(self, shift: Shift) -> Offsets:
        return Offsets([Classes(model, *self.CODES) for model in self.changed], shift)

    def next_logits(self, ids: list[int], shift: Shift) -> Tensor:
        """Of one text, by the paper's formula in float64: Bayes' rule on the likelihood of the text with each next token."""
        assert shift.scale is not None
        offset = torch.zeros(128, dtype=torch.float64)
        for model in self.changed:
            joint = []
            for code in self.CODES:
                logits = model(input_ids=torch.tensor([[*code, *ids]]), use_cache=False).logits[0].double()
                logs = logits[len(code) - 1 :].log_softmax(-1)
                read = sum(float(logs[at, token]) for at, token in enumerate(ids))
                joint.append((read + logs[-1]) / (len(ids) + 1))
            desired, undesired = ((shift.scale * each).exp() for each in joint)
            offset += (desired / (desired + undesired)).log() / (2 if shift.merge == "mean" else 1)
        large = self.large(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        return large + shift.alpha * torch.cat([offset, offset.min().expand(len(large) - 128)])

    def continued(self, ids: list[int], count: int, shift: Shift) -> list[int]:
        written: list[int] = []
        for _ in range(count):
            written.append(int(self.next_logits(ids + written, shift).argmax()))
        return written


@pytest.fixture(scope="module")
def conditional(tiny: Callable[..., Path]) -> Callable[..., Conditional]:
    made: dict[tuple[str, str], Conditional] = {}
    return lambda large, small: made.setdefault((large, small), Conditional(tiny, large, small))


BAYES = Shift(alpha=30.0, merge="mean", scale=1.5)


@pytest.mark.parametrize(("large", "small"), few(KINDS, 0))
@torch.no_grad()
def test_gedi_writes_by_bayes_rule_with_caches_beams_and_padding(
    conditional: Callable[..., Conditional], large: str, small: str
) -> None:
    models, (ids, mask) = conditional(large, small), left_padded()
    expected = [models.continued(each, 6, BAYES) for each in PROMPTS]
    plain = models.large.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    offsets = models.offsets(BAYES)
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams}
        hook = offsets.attach(models.large)
        written = models.large.generate(input_ids=ids, attention_mask=mask, **options)
        uncached = models.large.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        hook.remove()
        processor = OffsetProcessor(offsets, mask)
        processed = models.large.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **options)
        assert written.tolist() == uncached.tolist() == processed.tolist()
        if beams == 1:
            assert written[:, ids.shape[1] :].tolist() == expected
    assert plain.tolist() != written.tolist()


@torch.no_grad()
def test_every_position_of_a_text_has_gedis_logits_also_in_parts(conditional: Callable[..., Conditional]) -> None:
    models, longest = conditional("llama", "gpt2"), PROMPTS[0]
    ids, mask = torch.tensor([longest, PROMPTS[1] + [PAD] * 3]), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    hook = models.offsets(BAYES).attach(models.large)
    logits = models.large(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = models.large(torch.tensor([longest[:3], PROMPTS[2][:3]]), use_cache=True).past_key_values
    turned = copy.deepcopy(cache)
    turned.batch_select_indices(torch.tensor([1, 0, 0]))
    places = torch.arange(3, 5).expand(3, -1)
    new = torch.tensor([[22, 9], longest[3:], longest[3:]])
    parts = models.large(new, past_key_values=turned, position_ids=places).logits
    cache.crop(-1)
    with pytest.raises(RuntimeError, match="taken out of a cache"):
        models.large(torch.tensor([[7], [7]]), past_key_values=cache)
    hook.remove()
    for count in range(1, 6):
        expected = models.next_logits(longest[:count], BAYES)
        torch.testing.assert_close(logits[0, count - 1].double(), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(logits[1, 1].double(), models.next_logits(PROMPTS[1], BAYES), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(parts[1], logits[0, 3:], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(parts[2], parts[1])
    torch.testing.assert_close(parts[0, 1].double(), models.next_logits([*PROMPTS[2], 9], BAYES), atol=1e-3, rtol=1e-4)


def gedi_filter(logits: np.ndarray, desired: np.ndarray, filter_p: float, target_p: float) -> np.ndarray:
    """One position as modeling_utils.py of salesforce/GeDi leaves tokens out, from those that are least likely of the class."""
    order = np.argsort(desired, kind="stable")
    p = np.exp(logits - logits.max())
    removed = (np.cumsum((p / p.sum())[order]) < filter_p) & (desired[order] < np.log(target_p))
    kept = logits.copy()
    kept[order[removed]] = -np.inf
    return kept


@pytest.mark.parametrize(("rho", "tau"), [(0.2, 0.8), (0.7, 0.4)])
def test_gedis_filter_is_the_authors(rho: float, tau: float) -> None:
    random = np.random.default_rng(3)
    large, desired = random.normal(size=40) * 2, np.log(random.uniform(0.1, 0.95, size=40))
    ours = shifted(torch.tensor(large), torch.tensor(desired)[None], Shift(alpha=2.0, scale=1.0, rho=rho, tau=tau))
    expected = gedi_filter(large + 2.0 * desired, desired, 1 - rho, tau)
    assert 0 < np.isneginf(expected).sum() < 40
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_gedi_by_hand_one_token_that_the_undesired_class_says_more_often_falls() -> None:
    # Three tokens, as likely to the large model; the desired class says them with 1/2, 1/4, 1/4, the other with 1/4, 1/4, 1/2.
    # P(desired): 2/3, 1/2, 1/3. With omega 2 the tokens are as 4/9 : 1/4 : 1/9.
    desired = torch.tensor([0.5, 0.25, 0.25]).log()
    undesired = torch.tensor([0.25, 0.25, 0.5]).log()
    offset = torch.nn.functional.logsigmoid(desired - undesired)
    weights = shifted(torch.zeros(3), offset[None], Shift(alpha=2.0, scale=1.0)).softmax(-1)
    total = 4 / 9 + 1 / 4 + 1 / 9
    torch.testing.assert_close(weights, torch.tensor([4 / 9, 1 / 4, 1 / 9]) / total)
