"""Quark and DeMem beside their formulas by hand, on what the model writes itself."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spunge.data.samples import Samples, collate
from spunge.errors import RecipeError
from spunge.model.reading import Reading
from spunge.registry import METHODS
from spunge.stopping import STOP
from spunge.unlearning import drawing, rollouts
from spunge.unlearning.demem import DeMemSettings, advantages, clipped
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.quark import QuarkSettings, labelled, levels, losses, starts_of
from spunge.unlearning.rollouts import Rollout, asked_of, encoded, kept, rollouts_of, writer_of
from spunge.unlearning.scored import outputs
from toys import WORDS, texts

PLAIN = Samples(pa.table({"text": texts("policy", 6)}))
ASKED = Samples(pa.table({"prompt": ["the dog runs", "one two"], "completion": [" in the city", " three four"]}))
GOOD = WORDS[::2]  # words whose presence is scored, for rewards that differ
QUARK = {
    "scorer": {"kind": "keywords", "words": GOOD},
    "tokens": 4,
    "explorations": 2,
    "quantiles": 3,
    "samples": 2,
    "labels": ["one", "two"],
}
GIVEN: dict[str, dict[str, Any]] = {"quark": QUARK, "demem": {"tokens": 4, "samples": 3, "updates": 2}}


def task_of(base: Any, samples: Samples = PLAIN, **more: Any) -> Task:
    return Task(base, {"a": samples}, None, {"a": 3}, **more)


def settings_of(method: str, **changes: Any) -> Any:
    few = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "trainable": {"kind": "all"}}
    return METHODS.get(method).settings(**few | GIVEN[method] | changes)


def logs_of(model: Any, ids: Sequence[int]) -> Tensor:
    """(t, v) in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)


def moved(loop: Loop) -> None:
    """The weights are no longer the base's."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in loop.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.formula("quark")
def test_the_levels_are_the_sorted_rewards_cut_in_equal_parts_and_the_rest_is_of_the_last() -> None:
    assert levels([0.1, 0.9, 0.5, 0.7, 0.3, 0.2, 0.8], 3) == [2, 0, 1, 1, 2, 2, 0]
    assert levels([0.5] * 4, 2) == [0, 0, 1, 1]
    assert levels([0.2, 0.4], 2) == [1, 0]


@pytest.mark.formula("quark")
def test_quarks_loss_is_the_nll_plus_the_divergence_to_the_base_less_the_entropy(load: Callable[..., Any]) -> None:
    base, other = load("llama"), load("llama")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    prompt, label, tokens = [5, 6, 7], [30, 31], [8, 9, 10]
    told = labelled(prompt, label, None)
    plain, own = (collate([encoded(ids, tokens)], base.device) for ids in (prompt, told))
    found = losses(outputs(other.model, own), outputs(base.model, plain), 0.3, 0.2).tolist()
    p, p_0 = logs_of(other.model, told + tokens)[4:7], logs_of(base.model, prompt + tokens)[2:5]
    for place, token in enumerate(tokens):
        nll, entropy = -float(p[place, token]), -float((p[place].exp() * p[place]).sum())
        divergence = float((p[place].exp() * (p[place] - p_0[place])).sum())
        assert found[place] == pytest.approx(nll + 0.3 * divergence - 0.2 * entropy, rel=1e-4)


def test_a_label_stands_behind_the_start_token() -> None:
    assert labelled([1, 5, 6], [9], 1) == [1, 9, 5, 6]
    assert labelled([5, 6], [9], 1) == labelled([5, 6], [9], None) == [9, 5, 6]
    assert labelled([1, 5, 6], [], 1) == [1, 5, 6]


def test_explorations_are_spread_evenly_and_begin_before_the_first_step() -> None:
    assert starts_of(10, 4) == {0: 0, 2: 1, 5: 2, 7: 3}
    assert starts_of(2, 4) == {0: 0, 1: 1}


@pytest.mark.formula("demem")
def test_an_advantage_is_the_reward_less_the_mean_of_the_prompts_others() -> None:
    found = advantages(torch.tensor([[1.0, 0.4, 0.1], [0.5, 0.5, 0.5]], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([0.75, -0.15, -0.6, 0, 0, 0])


@pytest.mark.formula("demem")
@pytest.mark.parametrize(
    ("ratio", "gain", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_a_ratio_beyond_the_clip_has_no_slope_where_it_would_gain(
    ratio: float, gain: float, loss: float, slope: float
) -> None:
    now = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = clipped(now, torch.zeros(1, dtype=torch.float64), torch.tensor([gain], dtype=torch.float64), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert now.grad is not None
    assert now.grad.item() == pytest.approx(slope)


@pytest.mark.formula("demem")
def test_the_loss_of_demem_is_the_clipped_one_of_what_it_wrote_with_the_penalty_in_the_reward(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step's first weights all ratios are 1; after the weights have moved, the same continuations are learned again."""
    base, untouched, seen = load("llama"), load("llama"), dict[str, Any]()
    before, after = load("llama"), load("llama")
    settings = settings_of("demem", batch_size=2, beta=0.5)

    def run(loop: Loop) -> History:
        moved(loop)
        before.model.load_state_dict(base.model.state_dict())
        seen["first"] = float(loop.next_loss(0).total.detach())
        moved(loop)
        after.model.load_state_dict(base.model.state_dict())
        seen["second"] = float(loop.next_loss(1).total.detach())
        seen["rollouts"] = rollouts_of(loop.memory["rollouts"])
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    task = task_of(base, ASKED)
    METHODS.get("demem").unlearn(task, settings)
    asked = asked_of(task, settings, forget_stream(task, settings))
    assert [each.prompt for each in asked] == ["the dog runs", "one two"]
    assert [each.reference for each in asked] == ["in the city", "three four"]
    first = second = 0.0
    by_row = {row: [each for each in seen["rollouts"] if each.row == row] for row in (0, 1)}
    for row, own in by_row.items():
        assert len(own) == 3
        prompt, values, olds = asked[row].ids, [], []
        for each in own:
            at = slice(len(prompt) - 1, len(prompt) - 1 + len(each.tokens))
            of = lambda model, at=at, each=each, prompt=prompt: (  # noqa: E731
                logs_of(model, prompt + each.tokens)[at].gather(1, torch.tensor(each.tokens)[:, None])[:, 0]
            )
            old, reference, now = of(before.model), of(untouched.model), of(after.model)
            values.append(each.reward - 0.5 * float((old - reference).sum()))
            olds.append((old, now))
        for number, (value, (old, now)) in enumerate(zip(values, olds, strict=True)):
            gain = value - sum(values[:number] + values[number + 1 :]) / 2
            ratio = (now - old).exp()
            first -= gain / 6
            second -= float(torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()) / 6
    assert seen["first"] == pytest.approx(first, abs=1e-4)
    assert seen["second"] == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "changes", "mend"),
    [
        (
            "demem",
            {"scorer": {"kind": "keywords", "words": ["nowhere"]}, "beta": 0.0},
            "had the same reward; raise samples",
        ),
        ("ga", {"gamma": 0.0}, "give a term of it a weight above 0"),
        ("ga", {"gamma": 0.0, "max_grad_norm": None, "weight_decay": 0.1}, "give a term of it a weight above 0"),
    ],
)
def test_a_loss_without_a_slope_is_told_as_that_and_not_as_too_low_a_learning_rate(
    load: Callable[..., Any], method: str, changes: dict[str, Any], mend: str
) -> None:
    few = {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "trainable": {"kind": "all"}}
    settings = METHODS.get(method).settings(**few | GIVEN.get(method, {}) | changes)
    with pytest.raises(RecipeError, match=f"the loss had no slope at any step, .*{mend}"):
        METHODS.get(method).unlearn(task_of(load("llama")), settings)


def test_a_plain_texts_first_part_is_its_prompt(load: Callable[..., Any]) -> None:
    base = load("llama")
    task, text = task_of(base, Samples(pa.table({"text": ["the dog runs in the city"]}))), "the dog runs in the city"
    settings = settings_of("demem", prefix=0.34)
    [asked] = asked_of(task, settings, forget_stream(task, settings))
    ids = base.tokenizer(text)["input_ids"]
    assert asked.ids == ids[: int(0.34 * len(ids))]
    assert f"{asked.prompt} {asked.reference}" == text


def test_what_is_written_has_no_end_before_the_least_tokens_and_stops_behind_one(load: Callable[..., Any]) -> None:
    base = load("llama")
    with torch.no_grad():
        base.model.get_output_embeddings().weight.zero_()  # every token is as likely as another
        base.model.get_output_embeddings().weight[2] = 0.0
    task, settings = task_of(base, ASKED), settings_of("demem", tokens=60, least_tokens=3, samples=40)
    every = [each.tokens for each in writer_of(task, settings, forget_stream(task, settings)).rollouts([0], 0)]
    assert all(2 not in tokens[:3] and 2 not in tokens[:-1] for tokens in every)
    assert any(tokens[-1] == 2 and len(tokens) < 60 for tokens in every)
    assert len({tuple(tokens) for tokens in every}) == 40


@pytest.mark.parametrize(
    ("architecture", "padded"),
    [("llama", False), ("llama", True), pytest.param("gpt2", True, marks=pytest.mark.thorough)],
)
def test_what_is_written_together_is_what_is_written_prompt_by_prompt(
    load: Callable[..., Any], architecture: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after prompts of unequal length, and of a model that may not be padded."""
    base, widths = load(architecture), list[tuple[int, int]]()
    if not padded:
        monkeypatch.setattr(rollouts, "reading_of", lambda _base: Reading(False, False))
    known = drawing.left_padded

    def seen(coded: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
        ids, mask = known(coded, pad)
        widths.append((len(coded), int((mask == 0).sum())))
        return ids, mask

    monkeypatch.setattr(drawing, "left_padded", seen)
    prompts = ["the dog runs", "one two", "the city is old", "a dog", "one three two", "moon"]
    task = task_of(base, Samples(pa.table({"prompt": prompts, "completion": [" in the city"] * 6})))
    apart, together = (
        writer_of(task, settings, forget_stream(task, settings)).rollouts([4, 0, 3, 1, 2], 1)
        for settings in (settings_of("demem", batch_size=size, samples=2, tokens=5) for size in (1, 6))
    )
    assert together == apart
    assert [each.row for each in apart] == [4, 4, 0, 0, 3, 3, 1, 1, 2, 2]
    assert widths[:5] == [(2, 0)] * 5
    assert len(widths[5:]) == (1 if padded else 3)
    assert any(padding for _, padding in widths[5:]) == padded


def test_rollouts_are_read_back_and_one_that_is_cut_off_is_left_out() -> None:
    every = [Rollout(1, 2, 0.25, -0.5, [3, 4], [-1.5, -0.1]), Rollout(2, 0, 1.0, 0.0, [9], [])]
    numbers = kept(every)
    assert rollouts_of(numbers) == every
    assert rollouts_of(numbers[:-1]) == every[:1]
    assert rollouts_of([]) == []


def rewards_in(log: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in log.open()]


SHARE = f"""
import numpy as np
from spunge.evaluation.scorers.scorer import Loaded, Scorer
from spunge.recipe.scoring import ScorerSettings

def load(settings):
    \"\"\"The share of words that are good.\"\"\"
    return Loaded(lambda texts: np.array([np.mean([word in {GOOD} for word in text.split()]) for text in texts]))

SHARE = Scorer(settings=ScorerSettings, source="made up", load=load, instrument=lambda settings: {{"scorer": "share"}})
"""


QUICKLY = {"samples": 8, "learning_rate": 0.005, "steps": 24}
SLOWLY = {"explorations": 4, "samples": 32, "quantiles": 2, "labels": ["one one one one"], "entropy": 0.0, "steps": 160}


@pytest.mark.parametrize(
    ("method", "own", "rise"),
    [("demem", QUICKLY, 0.05), pytest.param("quark", SLOWLY, 0.05, marks=pytest.mark.thorough)],
)
def test_the_reward_rises(
    load: Callable[..., Any], tmp_path: Path, method: str, own: dict[str, Any], rise: float
) -> None:
    (tmp_path / "share.py").write_text(SHARE)
    words = {"scorer": f"{tmp_path}/share.py:SHARE", "wanted": "high", "beta": 0.0, "tokens": 6}
    log = tmp_path / "log.jsonl"
    METHODS.get(method).unlearn(task_of(load("llama"), ASKED, log=log), settings_of(method, **words | own))
    rewards = rewards_in(log)
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + rise


def changes_of(branch: Branch) -> dict[str, Tensor]:
    return {name: each if isinstance(each, Tensor) else each.dense() for name, each in branch.changes.items()}


@pytest.mark.parametrize("method", GIVEN)
@pytest.mark.parametrize(
    "stop", [3, pytest.param(4, marks=pytest.mark.thorough)], ids=["amid a batch's updates", "between two"]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    load: Callable[..., Any], tmp_path: Path, method: str, stop: int
) -> None:
    settings = settings_of(method, trainable={"kind": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.0})
    whole = METHODS.get(method).unlearn(task_of(load("llama")), settings)
    state = tmp_path / "state.pt"

    def halt(step: int, _steps: int, told: str = "") -> None:
        STOP.asked = STOP.asked or (step == stop and told.startswith("loss"))

    with pytest.raises(KeyboardInterrupt):
        METHODS.get(method).unlearn(task_of(load("llama"), state=state, progress=halt), settings)
    STOP.asked = False
    again = METHODS.get(method).unlearn(task_of(load("llama"), state=state), settings)
    first, second = changes_of(whole), changes_of(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_texts_that_all_have_one_reward_are_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"^unlearn\.scorer: every text that the base wrote has the reward 1, which"):
        METHODS.get("quark").unlearn(
            task_of(load("llama")), settings_of("quark", scorer={"kind": "keywords", "words": ["zebra"]})
        )


@pytest.mark.parametrize(
    ("method", "changes", "samples", "said"),
    [
        (
            "quark",
            {"labels": ["dog", "dog"]},
            PLAIN,
            r"unlearn\.labels: \['dog', 'dog'\]: two levels have the same tokens",
        ),
        ("quark", {"quantiles": 20, "labels": WORDS[:19]}, PLAIN, r"unlearn\.quantiles: 20 of 12 texts"),
        ("demem", {"tokens": 200}, PLAIN, r"unlearn\.tokens: 200: the longest prompt has"),
        ("demem", {}, Samples(pa.table({"text": ["dog"]})), r"forget: row 0 has a single token"),
        (
            "demem",
            {},
            Samples(pa.table({"prompt": [""], "completion": ["dog runs"]})),
            r"forget: row 0 has no prompt to write after",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(
    load: Callable[..., Any], method: str, changes: dict[str, Any], samples: Samples, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        METHODS.get(method).unlearn(task_of(load("gpt2"), samples), settings_of(method, **changes))


@pytest.mark.parametrize(
    ("settings", "given"), [(QuarkSettings, {"labels": ["x"]}), (DeMemSettings, {"least_tokens": 60})]
)
def test_settings_that_cannot_be_right_are_refused(settings: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"labels: 1 for 4 levels|least_tokens: 60 of at most 50"):
        settings(**given)


def test_a_delta_depends_on_the_scorer() -> None:
    inputs = METHODS.get("demem").inputs
    assert inputs is not None
    told = [inputs(settings_of("demem", scorer=scorer), ["a"], ["a"]) for scorer in ("rouge", "bleu")]
    assert told[0]["scorer"]["scorer"] == "rouge"
    assert told[0] != told[1]


def test_a_scorer_that_is_not_there_is_told_of_the_methods_setting() -> None:
    settings = settings_of("demem", scorer={"kind": "similarity", "encoder": "./nowhere"})
    with pytest.raises(RecipeError, match=r"^unlearn\.scorer"):
        METHODS.get("demem").inputs(settings, ["a"], ["a"])


def test_epochs_are_passes_over_the_samples_whatever_the_updates() -> None:
    assert DeMemSettings(epochs=2, batch_size=4, updates=3).steps_for(8) == 2 * 2 * 3
    assert DeMemSettings(steps=5, batch_size=4, updates=3).steps_for(8) == 5


def test_what_is_written_is_in_the_plan() -> None:
    assert METHODS.get("quark").writing(PLAIN, settings_of("quark"), 3) == (2 * 6 * 2, 4, 0, 0, 4 * 2)
    assert METHODS.get("quark").writing(PLAIN, settings_of("quark"), 0.5) == (2 * 3 * 2, 4, 0, 0, 4 * 2)
    assert METHODS.get("demem").writing(PLAIN, settings_of("demem"), 3) == (9 * 3, 4, 0, 0, 4 * 3)
