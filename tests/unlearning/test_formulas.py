"""Every loss against a closed form in plain floats, on a model small enough to write down: a table of five letters."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import IGNORED, Batch, Encoded, Samples, Text, collate
from spunge.model.loading import Base
from spunge.recipe.training import Everything, LoRA, Selected
from spunge.registry import METHODS
from spunge.unlearning.ce_u import label_left_out
from spunge.unlearning.dpo import preference
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.me_gd import unevenness
from spunge.unlearning.method import Task
from spunge.unlearning.npo import negative_preference
from spunge.unlearning.outputs import divergence
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.satimp import saturated_ascent
from spunge.unlearning.scored import outputs, scored
from spunge.unlearning.simnpo import simple_preference
from spunge.unlearning.sku import Answers
from spunge.unlearning.trained import training
from spunge.unlearning.undial import adjusted_distillation
from spunge.unlearning.wga import weighted_ascent
from toys import texts

Table = list[list[float]]  # row: the letter that was read, column: the logit of the letter that follows
LETTERS = "abcde"  # "a" is id 0, which is also what batches are padded with
generator = torch.Generator().manual_seed(5)
BASE: Table = (2 * torch.randn(5, 5, generator=generator)).tolist()
TRAINED: Table = (torch.tensor(BASE) + torch.randn(5, 5, generator=generator)).tolist()
PLAIN = [("", "abcd"), ("", "ce"), ("", "bbdac")]
ANSWERED = [("ab", "cd"), ("e", "abc"), ("cdaab", "e")]
RETAIN = [("", "eda"), ("", "cabbe"), ("", "dd")]


class Letters:
    """A tokenizer of one token a letter."""

    is_fast = False
    chat_template = None
    bos_token_id = None
    eos_token_id = 4

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}


class Bigram(torch.nn.Module):
    """Logits that depend on the last letter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.tensor(BASE), freeze=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))

    def get_output_embeddings(self) -> None:
        return None


def letters() -> Base:
    names = {"table.weight": ("table.weight",)}
    return Base(Bigram().eval(), Letters(), Path(), torch.device("cpu"), torch.float32, names, 1)


def samples(rows: Sequence[tuple[str, str]]) -> Samples:
    if not any(prompt for prompt, _ in rows):
        return Samples(pa.table({"text": [completion for _, completion in rows]}))
    prompts, answers = zip(*rows, strict=True)
    return Samples(pa.table({"prompt": prompts, "completion": answers, "refusal": ["dbe"] * len(rows)}))


class Found(NamedTuple):
    loss: float
    terms: dict[str, float]
    gradient: Table


@pytest.fixture
def first_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """The first loss of a method, as its own code feeds it, at the weights TRAINED of a model whose base is BASE."""

    def find(
        method: str, forget: Sequence[tuple[str, str]], retain: Sequence[tuple[str, str]] = RETAIN, **changes: Any
    ) -> Found:
        seen: list[Found] = []

        def run(loop: Loop) -> History:
            [table] = loop.parameters
            with torch.no_grad():
                table.copy_(torch.tensor(TRAINED))
            loss = loop.next_loss(0)
            loss.total.backward()
            assert table.grad is not None
            seen.append(Found(float(loss.total.detach()), dict(loss.terms), table.grad.tolist()))
            return History(1, {}, None, {})

        monkeypatch.setattr(Loop, "run", run)
        task = Task(letters(), {"part": samples(forget)}, samples(retain), {"part": 1})
        settings = {"method": method, "trainable": {"kind": "all"}, "batch_size": 8, "steps": 1, **changes}
        METHODS.get(method).unlearn(task, METHODS.get(method).settings(**settings))
        return seen[-1]  # after what a method trains ahead

    return find


# The closed forms. Nothing of torch below.


def logs(table: Table, letter: str) -> list[float]:
    row = table[LETTERS.index(letter)]
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def places(row: tuple[str, str]) -> list[tuple[str, int]]:
    """The letter read and the id to come, for each letter of the answer that has one before it."""
    prompt, completion = row
    whole = prompt + completion
    return [(whole[i - 1], LETTERS.index(whole[i])) for i in range(max(1, len(prompt)), len(whole))]


def nlls(table: Table, row: tuple[str, str]) -> list[float]:
    return [-logs(table, read)[label] for read, label in places(row)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def token_mean(table: Table, rows: Sequence[tuple[str, str]]) -> float:
    return mean([loss for row in rows for loss in nlls(table, row)])


def log_sigmoid(value: float) -> float:
    return -math.log(1 + math.exp(-value))


def kl(table: Table, row: tuple[str, str]) -> list[float]:
    """KL(base || table) at each place."""
    found = []
    for read, _ in places(row):
        before, after = logs(BASE, read), logs(table, read)
        found.append(sum(math.exp(b) * (b - a) for b, a in zip(before, after, strict=True)))
    return found


def ga(table: Table, rows: list[tuple[str, str]]) -> float:
    return -token_mean(table, rows)


def npo(table: Table, rows: list[tuple[str, str]], beta: float = 0.1) -> float:
    gains = [sum(nlls(table, row)) - sum(nlls(BASE, row)) for row in rows]
    return mean([-(2 / beta) * log_sigmoid(beta * gain) for gain in gains])


def simnpo(table: Table, rows: list[tuple[str, str]], beta: float = 4.5, delta: float = 0.0) -> float:
    return mean([-(2 / beta) * log_sigmoid(beta * (mean(nlls(table, row)) - delta)) for row in rows])


def answering(rows: list[tuple[str, str]], answer: str) -> list[tuple[str, str]]:
    return [(prompt, answer) for prompt, _ in rows]


def dpo(table: Table, rows: list[tuple[str, str]], beta: float = 0.1) -> float:
    losses = []
    for win, lose in zip(answering(rows, "dbe"), rows, strict=True):
        gain = sum(nlls(BASE, win)) - sum(nlls(table, win)) - (sum(nlls(BASE, lose)) - sum(nlls(table, lose)))
        losses.append(-(2 / beta) * log_sigmoid(beta * gain))
    return mean(losses)


def idk(table: Table, rows: list[tuple[str, str]]) -> float:
    return token_mean(table, answering(rows, "dbe"))


def undial(table: Table, rows: list[tuple[str, str]], beta: float = 10.0) -> float:
    losses = []
    for read, label in (place for row in rows for place in places(row)):
        row = list(BASE[LETTERS.index(read)])
        row[label] -= beta
        total = sum(math.exp(value) for value in row)
        losses.append(-sum(math.exp(value) / total * log for value, log in zip(row, logs(table, read), strict=True)))
    return mean(losses)


def wga(table: Table, rows: list[tuple[str, str]], beta: float = 1.0) -> float:
    """With the weights those of TRAINED, whatever the table: they are constants in the gradient."""
    weights = [math.exp(-loss) ** beta for row in rows for loss in nlls(TRAINED, row)]
    losses = [loss for row in rows for loss in nlls(table, row)]
    return -mean([weight * loss for weight, loss in zip(weights, losses, strict=True)])


def slopes(function: Callable[[Table], float]) -> Table:
    """The gradient at TRAINED, by central differences."""
    found = [[0.0] * 5 for _ in LETTERS]
    for i in range(5):
        for j in range(5):
            ends = []
            for step in (1e-5, -1e-5):
                table = copy.deepcopy(TRAINED)
                table[i][j] += step
                ends.append(function(table))
            found[i][j] = (ends[0] - ends[1]) / 2e-5
    return found


def assert_same(found: Found, forget: Callable[[Table], float], total: Callable[[Table], float]) -> None:
    assert found.terms["forget"] == pytest.approx(forget(TRAINED), rel=1e-5)
    assert found.loss == pytest.approx(total(TRAINED), rel=1e-5)
    for mine, expected in zip(found.gradient, slopes(total), strict=True):
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-6)


def satimp(table: Table, rows: list[tuple[str, str]], beta1: float = 5.0, beta2: float = 1.0) -> float:
    """With the weights those of TRAINED, as for `wga`."""
    sure = [math.exp(-loss) for row in rows for loss in nlls(TRAINED, row)]
    losses = [loss for row in rows for loss in nlls(table, row)]
    return -mean([p**beta1 * (1 - p) ** beta2 * loss for p, loss in zip(sure, losses, strict=True)])


def ce_u(table: Table, rows: list[tuple[str, str]]) -> float:
    """With the target that of TRAINED, whatever the table."""
    losses = []
    for read, label in (place for row in rows for place in places(row)):
        others = [math.exp(log) * (number != label) for number, log in enumerate(logs(TRAINED, read))]
        losses.append(-sum(p / sum(others) * log for p, log in zip(others, logs(table, read), strict=True)))
    return mean(losses)


def me_gd(table: Table, rows: list[tuple[str, str]], mode: str = "paper") -> float:
    losses = []
    for read, _ in (place for row in rows for place in places(row)):
        found = logs(table, read)
        toward_model = sum(math.exp(log) * (log - math.log(1 / 5)) for log in found)
        losses.append(toward_model if mode == "paper" else sum((math.log(1 / 5) - log) / 5 for log in found))
    return mean(losses)


def preserved(table: Table, rows: Sequence[tuple[str, str]], beta: float = 0.1) -> float:
    """IDK+AP's retain term."""
    pairs = zip(rows, answering(list(rows), "dbe"), strict=True)
    apart = [sum(nlls(table, refusal)) - sum(nlls(table, answer)) for answer, refusal in pairs]
    return -mean([log_sigmoid(beta * each) / beta for each in apart])


FORMULAS: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {
    "graddiff": (ga, {}),
    "npo": (npo, {"beta": 0.3}),
    "simnpo": (simnpo, {"beta": 2.0, "delta": 0.7}),
    "undial": (undial, {"beta": 3.0}),
    "wga": (wga, {"beta": 2.0}),
    "dpo": (dpo, {"beta": 0.3}),
    "idk": (idk, {}),
    "satimp": (satimp, {"beta1": 2.0, "beta2": 0.5}),
    "ce_u": (ce_u, {}),
    "me_gd": (me_gd, {"mode": "code"}),
    "altpo": (dpo, {"beta": 0.3}),
}
REFUSALS = {name: {"refusals": ["dbe"]} for name in ("dpo", "idk", "idk_ap")}


@pytest.mark.formula(*FORMULAS)
@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (method, rows)
        for method in FORMULAS
        for rows in (PLAIN, ANSWERED)
        if rows is ANSWERED or method not in {*REFUSALS, "altpo"}
    ],
    ids=lambda value: value if isinstance(value, str) else "texts" if value is PLAIN else "prompts",
)
def test_value_and_gradient_are_those_of_the_formula(
    first_loss: Callable[..., Found], method: str, rows: list[tuple[str, str]], retain_loss: str
) -> None:
    formula, own = FORMULAS[method]
    changes = {**own, **REFUSALS.get(method, {}), "gamma": 0.6, "alpha": 0.3, "retain_loss": retain_loss}
    for reference in ("live", "stored"):
        found = first_loss(method, rows, **changes, reference=reference)

        def kept(table: Table) -> float:
            if retain_loss == "kl":
                return mean([value for row in RETAIN for value in kl(table, row)])
            return token_mean(table, RETAIN)

        assert_same(
            found,
            lambda table: formula(table, rows, **own),
            lambda table: 0.6 * formula(table, rows, **own) + 0.3 * kept(table),
        )
        assert found.terms["retain"] == pytest.approx(kept(TRAINED), rel=1e-5)


@pytest.mark.formula("ga")
@pytest.mark.parametrize("rows", [PLAIN, ANSWERED], ids=["texts", "prompts"])
def test_gradient_ascent_is_the_negated_mean_over_tokens(
    first_loss: Callable[..., Found], rows: list[tuple[str, str]]
) -> None:
    found = first_loss("ga", rows)
    assert_same(found, lambda table: ga(table, rows), lambda table: ga(table, rows))
    assert set(found.terms) == {"forget"}


@pytest.mark.parametrize("method", FORMULAS)
def test_the_defaults_are_the_published_numbers(first_loss: Callable[..., Found], method: str) -> None:
    formula, _ = FORMULAS[method]
    found = first_loss(method, ANSWERED, **REFUSALS.get(method, {}))
    gamma = {"simnpo": 0.125, "me_gd": 0.1}.get(method, 1.0)
    alpha = {"satimp": 0.1, "ce_u": 0.0}.get(method, 1.0)
    assert found.terms["forget"] == pytest.approx(formula(TRAINED, ANSWERED), rel=1e-5)
    total = gamma * formula(TRAINED, ANSWERED) + alpha * token_mean(TRAINED, RETAIN)
    assert found.loss == pytest.approx(total, rel=1e-5)


@pytest.mark.formula("me_gd")
def test_maximum_entropy_has_the_papers_gradient_by_default(first_loss: Callable[..., Found]) -> None:
    found = first_loss("me_gd", ANSWERED, gamma=0.6, alpha=0)
    assert_same(found, lambda table: me_gd(table, ANSWERED), lambda table: 0.6 * me_gd(table, ANSWERED))


@pytest.mark.formula("idk_ap")
def test_idk_aps_retain_term_prefers_the_retain_prompts_answers(first_loss: Callable[..., Found]) -> None:
    kept = [("ea", "db"), ("b", "caad"), ("dce", "a")]

    def total(table: Table) -> float:
        return 0.6 * idk(table, ANSWERED) + 0.3 * preserved(table, kept, 0.7)

    found = first_loss("idk_ap", ANSWERED, kept, **REFUSALS["idk_ap"], beta=0.7, gamma=0.6, alpha=0.3)
    assert_same(found, lambda table: idk(table, ANSWERED), total)
    assert found.terms["retain"] == pytest.approx(preserved(TRAINED, kept, 0.7), rel=1e-5)


@pytest.mark.formula("llmu")
def test_llmus_terms_are_those_of_the_paper(first_loss: Callable[..., Found]) -> None:
    kept = [("ea", "db"), ("b", "caad")]

    def forget(table: Table) -> float:
        # The one answer that there is to draw is drawn k times.
        return -0.5 * sample_mean(table, ANSWERED) + 0.7 * sample_mean(table, answering(ANSWERED, "dbe"))

    def total(table: Table) -> float:
        return 0.6 * forget(table) + 0.3 * mean([value for row in kept for value in kl(table, row)])

    changes = {"random": 0.7, "answers": 3, "gamma": 0.6, "alpha": 0.3}
    for row in kept, [(prompt, "dbe") for prompt, _ in kept]:
        own = {"random_answers": ["dbe"]} if row is kept else {}
        found = first_loss("llmu", ANSWERED, kept if row is kept else row, **changes, **own)
        assert found.terms["forget"] == pytest.approx(forget(TRAINED), rel=1e-5)
        if row is kept:
            assert_same(found, forget, total)


@pytest.mark.formula("eul")
@pytest.mark.parametrize("reference", ["live", "stored"])
def test_euls_terms_are_those_of_the_paper(first_loss: Callable[..., Found], reference: str) -> None:
    def forget(table: Table) -> float:
        apart = mean([value for row in ANSWERED for value in kl(table, row)])
        return -apart - 0.7 * token_mean(table, ANSWERED)

    def retain(table: Table) -> float:
        return mean([value for row in RETAIN for value in kl(table, row)]) + 0.4 * token_mean(table, RETAIN)

    changes = {"language": 0.7, "task": 0.4, "gamma": 0.6, "alpha": 0.3, "reference": reference}
    found = first_loss("eul", ANSWERED, **changes)
    assert_same(found, forget, lambda table: 0.6 * forget(table) + 0.3 * retain(table))
    assert found.terms["retain"] == pytest.approx(retain(TRAINED), rel=1e-5)


@pytest.mark.formula("whp")
@pytest.mark.parametrize("rows", [PLAIN, ANSWERED], ids=["texts", "prompts"])
def test_whps_tokens_are_those_that_did_not_rise_in_the_reinforced_copy(
    first_loss: Callable[..., Found], rows: list[tuple[str, str]]
) -> None:
    """The copy's weights are TRAINED here, as all that a loop trains."""

    def total(table: Table) -> float:
        losses = []
        for read, _ in (place for row in rows for place in places(row)):
            before, after = BASE[LETTERS.index(read)], TRAINED[LETTERS.index(read)]
            generic = [b - 3.0 * max(0.0, a - b) for b, a in zip(before, after, strict=True)]
            losses.append(-logs(table, read)[generic.index(max(generic))])
        return mean(losses)

    found = first_loss("whp", rows, alpha=3.0)
    assert found.loss == pytest.approx(total(TRAINED), rel=1e-5)
    for mine, expected in zip(found.gradient, slopes(total), strict=True):
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-6)


def flatness(table: Table, rows: Sequence[tuple[str, str]]) -> float:
    return mean(
        [
            (max(table[LETTERS.index(read)]) - mean(table[LETTERS.index(read)])) ** 2
            for row in rows
            for read, _ in places(row)
        ]
    )


@pytest.mark.formula("pdu")
def test_pdus_first_step_weighs_its_two_terms_by_gamma_and_alpha(first_loss: Callable[..., Found]) -> None:
    found = first_loss("pdu", PLAIN, gamma=0.6, alpha=0.3)
    assert_same(
        found,
        lambda table: flatness(table, PLAIN),
        lambda table: 0.6 * flatness(table, PLAIN) + 0.3 * token_mean(table, RETAIN),
    )


@pytest.mark.formula("pdu")
@pytest.mark.parametrize(("accumulation", "size"), [(1, 3), (3, 1)])
def test_pdus_multiplier_follows_how_far_the_retain_loss_is_above_its_bound(
    monkeypatch: pytest.MonkeyPatch, accumulation: int, size: int
) -> None:
    """Step by step, as a dual ascent on the bound of the base's own loss, not below 0; batches of a step count as one."""
    terms: list[dict[str, float]] = []
    worse = [[-value for value in row] for row in BASE]

    def run(loop: Loop) -> History:
        [table] = loop.parameters
        for step, values in enumerate((worse, BASE, TRAINED, TRAINED)):
            with torch.no_grad():
                table.copy_(torch.tensor(values))
            terms.append(dict(loop.next_loss(step * accumulation).terms))
            for micro in range(1, accumulation):
                assert loop.next_loss(step * accumulation + micro).terms["multiplier"] == terms[-1]["multiplier"]
        return History(4, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    settings = METHODS.get("pdu").settings(
        trainable={"kind": "all"},
        batch_size=size,
        accumulation=accumulation,
        steps=4,
        alpha=0.4,
        dual_rate=2.0,
        tolerance=0.2,
    )
    METHODS.get("pdu").unlearn(Task(letters(), {"part": samples(PLAIN)}, samples(RETAIN), {"part": 1}), settings)
    above = [token_mean(table, RETAIN) - 1.2 * token_mean(BASE, RETAIN) for table in (worse, BASE, TRAINED)]
    expected = [0.4]
    for each in above:
        expected.append(max(0.0, expected[-1] + 2.0 * each))
    assert above[0] > 0 > above[2]
    assert [each["multiplier"] for each in terms] == pytest.approx(expected, rel=1e-5)


@pytest.mark.formula("npo")
def test_npo_becomes_gradient_ascent_as_beta_falls(first_loss: Callable[..., Found]) -> None:
    def ascent(table: Table) -> float:
        return -mean([sum(nlls(table, row)) for row in PLAIN])

    expected = [value for row in slopes(ascent) for value in row]
    apart = []
    for beta in (1.0, 0.1, 1e-3):
        gradient = [value for row in first_loss("npo", PLAIN, beta=beta, alpha=0).gradient for value in row]
        apart.append(max(abs(mine - other) for mine, other in zip(gradient, expected, strict=True)))
    assert apart[0] > 5 * apart[1] > 25 * apart[2]
    assert apart[2] < 1e-3


def test_a_text_without_a_token_to_score_adds_none(first_loss: Callable[..., Found]) -> None:
    for method in ("ga", "undial", "wga", "satimp", "ce_u", "me_gd"):
        with_it, without = (first_loss(method, [*PLAIN, *extra], alpha=0) for extra in ([("", "d")], []))
        assert with_it.loss == pytest.approx(without.loss, rel=1e-6)
    for method in ("npo", "simnpo"):
        found = first_loss(method, [*PLAIN, ("", "d")], alpha=0)
        assert math.isfinite(found.loss)
        assert all(math.isfinite(value) for row in found.gradient for value in row)


# SKU.


def sample_mean(table: Table, rows: Sequence[tuple[str, str]]) -> float:
    return mean([mean(nlls(table, row)) for row in rows])


@pytest.mark.formula("sku")
@pytest.mark.parametrize("cap", [100.0, 0.2])
def test_skus_three_terms_are_those_of_the_paper(first_loss: Callable[..., Found], cap: float) -> None:
    # With two prompts the answer of another prompt is the other one, k times.
    rows = [("ab", "cd"), ("cdaab", "e")]
    swapped = [("ab", "e"), ("cdaab", "cd")]

    def terms(table: Table) -> dict[str, float]:
        divergences = [value for row in RETAIN for value in kl(table, row)]
        assert max(divergences) > 0.25
        assert min(divergences) < 0.15
        return {
            "guided": sample_mean(table, rows),
            "random": sample_mean(table, swapped),
            "preserve": -mean([min(value, cap) for value in divergences]),
        }

    def total(table: Table) -> float:
        found = terms(table)
        return 0.5 * found["guided"] + 0.7 * found["random"] + 0.9 * found["preserve"]

    found = first_loss("sku", rows, random=0.7, preserve=0.9, answers=3, max_divergence=cap)
    assert found.terms == pytest.approx(terms(TRAINED), rel=1e-5)
    assert found.loss == pytest.approx(total(TRAINED), rel=1e-5)
    for mine, expected in zip(found.gradient, slopes(total), strict=True):
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.formula("sku")
def test_skus_random_answers_are_other_prompts_own(first_loss: Callable[..., Found]) -> None:
    tokenizer = Letters()
    given = [Text(*row) for row in [*ANSWERED, ("dde", "cd")]]
    rows = samples([*ANSWERED, ("dde", "cd")])

    def mixer() -> Answers:
        return Answers(rows, rows.answers(), [64] * 4, tokenizer, settings, 1)

    settings = METHODS.get("sku").settings(answers=4)
    batch = Batch(torch.zeros(4, 1), torch.ones(4, 1), torch.zeros(4, 1), (0, 1, 2, 3))
    drawn = [mixer().mismatched(batch, turn) for turn in range(20)]
    other = {text.completion for text in given}
    for mixed in drawn:
        assert mixed.ids.shape[0] == 4 * 4
        for place in range(16):
            own = given[place // 4]
            read = "".join(LETTERS[i] for i in mixed.ids[place, : int(mixed.mask[place].sum())])
            learned = "".join(LETTERS[i] for i in mixed.labels[place] if i != IGNORED)
            assert read == own.prompt + learned
            assert learned in other - {own.completion}
    assert len({mixed.ids.numpy().tobytes() for mixed in drawn}) > 1
    again = mixer().mismatched(batch, 3)
    assert torch.equal(again.ids, drawn[3].ids)


# The small functions, and the batches that reach them.


def test_the_small_functions_are_their_formulas() -> None:
    first, second, beta = [0.4, 3.0, 700.0], [1.1, 2.5, 5.0], 0.7
    a, b = torch.tensor(first), torch.tensor(second)
    expected = mean([-(2 / beta) * log_sigmoid(beta * (x - y)) for x, y in zip(first, second, strict=True)])
    assert float(negative_preference(a, b, beta)) == pytest.approx(expected, rel=1e-5)
    assert float(preference(a, b, beta)) == pytest.approx(expected, rel=1e-5)
    margin = mean([-(2 / beta) * log_sigmoid(beta * (x - 0.3)) for x in first])
    assert float(simple_preference(a, beta, 0.3)) == pytest.approx(margin, rel=1e-5)
    weighted = -mean([math.exp(-x) ** beta * x for x in first])
    assert float(weighted_ascent(a, beta)) == pytest.approx(weighted, rel=1e-5)
    # Far from the base the log of the sigmoid must not overflow.
    assert float(negative_preference(torch.tensor([0.0]), torch.tensor([1e4]), 1.0)) == pytest.approx(2e4)


def coded() -> Batch:
    """A prompt, a text alone and a text of one token: ids, and the labels of those to learn."""
    rows = [Encoded([0, 1, 2, 3], [IGNORED, IGNORED, 2, 3]), Encoded([4, 1, 3], [4, 1, 3]), Encoded([2], [2])]
    return collate(rows)


def test_only_answers_are_scored_each_by_the_place_before_it() -> None:
    batch = coded()
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    found = scored(logits, batch)
    wanted = [(0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 3)]  # row, place, the label that follows
    assert found.labels.tolist() == [label for _, _, label in wanted]
    assert found.rows.tolist() == [row for row, _, _ in wanted]
    assert found.logits_of(found.states).tolist() == [logits[row, place].tolist() for row, place, _ in wanted]
    losses = []
    for row, place, label in wanted:
        values = logits[row, place].tolist()
        losses.append(math.log(sum(math.exp(value) for value in values)) - values[label])
    assert found.losses().tolist() == pytest.approx(losses, rel=1e-5)
    assert found.mean().item() == pytest.approx(mean(losses), rel=1e-5)
    assert found.sums().tolist() == pytest.approx([losses[0] + losses[1], losses[2] + losses[3], 0.0], rel=1e-5)
    assert found.lengths().tolist() == [2, 2, 1]


def test_prompts_and_padding_have_no_gradient_in_any_loss() -> None:
    batch = coded()
    base = torch.randn(4, 5).log_softmax(-1)
    for loss in (
        lambda found: found.mean(),
        lambda found: found.sums().square().sum(),
        lambda found: negative_preference(found.sums(), torch.zeros(3), 0.5),
        lambda found: simple_preference(found.sums() / found.lengths(), 2.0, 0.0),
        lambda found: weighted_ascent(found.losses(), 1.0),
        lambda found: adjusted_distillation(found, base.__getitem__, 2.0),
        lambda found: divergence(found, base.__getitem__),
        lambda found: saturated_ascent(found.losses(), 2.0, 0.5),
        lambda found: label_left_out(found),
        lambda found: unevenness(found, "paper"),
        lambda found: unevenness(found, "code"),
    ):
        logits = torch.randn(3, 4, 5, requires_grad=True)
        loss(scored(logits, batch)).backward()
        assert logits.grad is not None
        reached = {(row, place) for row, place in logits.grad.abs().sum(-1).nonzero().tolist()}
        assert reached == {(0, 1), (0, 2), (1, 0), (1, 1)}


def test_the_label_of_what_is_ignored_is_never_an_index() -> None:
    # -100 as an index would take the last columns but 99 of a vocabulary of 128, and would push one of them down.
    logits = torch.randn(1, 3, 128)
    found = scored(logits, collate([Encoded([5, 6, 7], [IGNORED, IGNORED, 7])]))
    assert found.labels.tolist() == [7]
    base = torch.zeros(1, 128).log_softmax(-1)
    pushed = [1 / 128] * 128
    pushed[7] = 0.0
    expected = -sum(
        p / sum(pushed) * log for p, log in zip(pushed, found.log_probabilities(slice(0, 1))[0].tolist(), strict=True)
    )
    assert float(adjusted_distillation(found, base.__getitem__, 1000.0)) == pytest.approx(expected, rel=1e-5)


# The reference.


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.2, "targets": "all-linear"},
    "tensors": {"kind": "tensors", "match": ["*.1.*weight"]},
    "all": {"kind": "all"},
}


def answers(topic: str, count: int) -> Samples:
    completions = [f" {text}" for text in texts(f"{topic}, answers", count)]
    return Samples(pa.table({"prompt": texts(topic, count), "completion": completions}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["npo", "dpo", "undial", "graddiff", "idk"])
def test_a_stored_reference_is_the_live_one(load: Callable[..., Any], method: str, way: str, tmp_path: Path) -> None:
    base, logs = load("gpt2"), []  # with dropout of its own
    retain = Samples(pa.table({"text": texts("other", 9)}))
    for reference in ("live", "stored"):
        log = tmp_path / f"{reference}.jsonl"
        task = Task(base, {"part": answers("part", 10)}, retain, {"part": 1}, log)
        settings = METHODS.get(method).settings(
            method=method,
            reference=reference,
            retain_loss="kl",
            retain_order="with_replacement",
            trainable=WAYS[way],
            steps=5,
            batch_size=4,
            retain_batch_size=6,
            learning_rate=3e-3,
        )
        METHODS.get(method).unlearn(task, settings)
        logs.append([json.loads(line) for line in log.open()])
    for live, stored in zip(*logs, strict=True):
        assert stored["forget"] == pytest.approx(live["forget"], rel=1e-3)
        assert stored["retain"] == pytest.approx(live["retain"], rel=1e-3, abs=1e-6)
    # The reference is of use: the divergence from it has grown, and is no longer nothing.
    assert logs[0][-1]["retain"] > 1e-4


@pytest.mark.parametrize(
    "what", [LoRA(rank=4, dropout=0.3, targets="all-linear"), Selected(match=["*.1.*"]), Everything()]
)
def test_the_reference_is_the_untouched_base_whatever_the_state_of_training(
    load: Callable[..., Any], what: LoRA | Selected | Everything
) -> None:
    base = load("gpt2")
    assert base.model.config.resid_pdrop > 0
    batch = collate([Encoded([5, 6, 7, 8], [5, 6, 7, 8]), Encoded([9, 10], [9, 10])])
    with torch.no_grad():
        expected = outputs(base.model, batch).log_probabilities(slice(None))
    with training(base, what, 1) as trained:
        for mode in (True, False):
            trained.model.train(mode)
            with torch.no_grad():
                for parameter in trained.parameters:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            found = base_outputs(trained, batch).log_probabilities(slice(None))
            assert torch.equal(found, expected)
            assert not found.requires_grad
            assert all(module.training == mode for module in trained.model.modules())
            mine = outputs(trained.model, batch).log_probabilities(slice(None))
            assert (mine - expected).abs().max() > 0.01
            # The weights in training are there again, and their gradient too.
            mine.square().mean().backward()
            assert all(parameter.grad is not None for parameter in trained.parameters)


# Against trl.


@pytest.mark.formula("dpo")
def test_dpo_is_trls_times_two_over_beta(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base, beta = load(), 0.3
    untouched, policy = copy.deepcopy(base.model), copy.deepcopy(base.model).requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    refusal, rows = "the old moon sleeps", answers("part", 5)
    found: dict[str, Any] = {}

    def run(loop: Loop) -> History:
        with torch.no_grad():
            for parameter, value in zip(loop.parameters, policy.parameters(), strict=True):
                parameter.copy_(value)
        loss = loop.next_loss(0).total
        loss.backward()
        found["loss"] = float(loss.detach())
        found["gradients"] = [parameter.grad for parameter in loop.parameters]
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    settings = METHODS.get("dpo").settings(
        beta=beta, alpha=0, refusals=[refusal], trainable={"kind": "all"}, steps=1, batch_size=8
    )
    METHODS.get("dpo").unlearn(Task(base, {"part": rows}, None, {"part": 1}), settings)

    def ids(text: str) -> list[int]:
        return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = list(zip(rows.table["prompt"].to_pylist(), rows.table["completion"].to_pylist(), strict=True))
    both = [(ids(prompt), ids(f" {refusal}")) for prompt, _ in pairs] + [
        (ids(prompt), ids(end)) for prompt, end in pairs
    ]
    width = max(len(prompt) + len(end) for prompt, end in both)
    padding = [width - len(prompt) - len(end) for prompt, end in both]
    inputs = {
        "input_ids": [[*prompt, *end, *[0] * pad] for (prompt, end), pad in zip(both, padding, strict=True)],
        "attention_mask": [[1] * (width - pad) + [0] * pad for pad in padding],
        "completion_mask": [
            [0] * len(prompt) + [1] * len(end) + [0] * pad for (prompt, end), pad in zip(both, padding, strict=True)
        ],
    }
    trainer = DPOTrainer(
        model=policy,
        ref_model=untouched,
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["the"], "chosen": [" moon"], "rejected": [" sun"]}),
        args=DPOConfig(str(tmp_path), beta=beta, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False),
    )
    loss = trainer.compute_loss(trainer.model, {name: torch.tensor(value) for name, value in inputs.items()})
    loss.backward()
    assert found["loss"] * beta / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, parameter in zip(found["gradients"], policy.parameters(), strict=True):
        torch.testing.assert_close(mine * beta / 2, parameter.grad, rtol=1e-3, atol=1e-6)
