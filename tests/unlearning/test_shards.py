"""Several processes train one model together: what one process would come to, each with a share of the memory."""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from experts import EXPERTS, build_experts
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.ranks import Ranks
from spunge.recipe.training import Everything, MethodSettings
from spunge.registry import METHODS
from spunge.run.executors.sharded import SINCE
from spunge.stopping import STOP
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.shards import drop_unreached
from spunge.unlearning.states import stored_state
from spunge.unlearning.trained import training
from together import together
from toys import ANSWERING, ANSWERING_BOTH, ARCHITECTURES, texts

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < SINCE,
    reason=f"sharded training needs torch {SINCE[0]}.{SINCE[1]}",
)

STEPS = 4
LORA = {"trainable": {"kind": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.0}}
ALL = {"trainable": {"kind": "all"}}
SOME = {"trainable": {"kind": "tensors", "match": ["*.1.*weight"]}}
HEAD = {"trainable": {"kind": "tensors", "match": ["*lm_head*", "*norm*"]}}
SHARED = [name for name in METHODS.builtin if METHODS.get(name).shares]
OWN: dict[str, dict[str, Any]] = {
    "tvn": {"strength": 0.5},
    "sku": {"strength": 0.5, "answers": 2},
    # The divergence's gradient is nothing but rounding at the first step, and AdamW makes whole steps of it.
    "llmu": {"retain_loss": "nll"},
}
# Architectures with dropout of their own, without it.
STILL = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}
CLOSE = 2e-2  # of the change; Adam makes whole steps of gradients that are rounding alone, which differs by processor

Ran = tuple[dict[str, np.ndarray], list[dict[str, float]]]


def samples(topic: str = "a", count: int = 11, answers: bool = False) -> Samples:
    if not answers:
        return Samples(pa.table({"text": texts(topic, count)}))
    completions = [f" {text}" for text in texts(f"{topic}, answers", count)]
    others = texts(f"{topic}, other answers", count)
    return Samples(pa.table({"prompt": texts(topic, count), "completion": completions, "refusal": others}))


def settings_of(method: str, **changes: Any) -> MethodSettings:
    few = {"steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "max_damage": None}
    return METHODS.get(method).settings(**{"method": method, **few, **OWN.get(method, {}), **changes})


def dense(branch: Branch) -> dict[str, np.ndarray]:
    """A branch's changes, in the tensors' own shapes."""
    whole = {name: each if isinstance(each, torch.Tensor) else each.dense() for name, each in branch.changes.items()}
    return {name: value.numpy() for name, value in whole.items()}


def unlearned(base: Any, method: str, folder: Path, **changes: Any) -> Ran:
    """A branch's changes, and its log."""
    log = folder / f"{base.ranks.count}.jsonl"
    # 11 and 21 rows: the last batch of an epoch has fewer rows than others, and one process fewer than another.
    parts = {"a": samples(answers=method in ANSWERING)}
    retain = samples("other", 21, method in ANSWERING_BOTH)
    task = Task(base, parts, retain, {"a": 97}, log=log if base.ranks.main else None)
    branch = METHODS.get(method).unlearn(task, settings_of(method, **changes))
    lines = [json.loads(line) for line in log.read_text().splitlines()] if base.ranks.main else []
    return dense(branch), lines


def shared(base: Any, ranks: Ranks) -> Any:
    return replace(base, model=copy.deepcopy(base.model), ranks=ranks)


def assert_alike(one: Ran, several: Ran) -> None:
    for mine, theirs in zip(one[1], several[1], strict=True):
        assert mine.keys() == theirs.keys()
        terms = mine.keys() - {"seconds"}
        assert [theirs[term] for term in terms] == pytest.approx([mine[term] for term in terms], rel=1e-3, abs=1e-5)
    assert one[0].keys() == several[0].keys()
    apart = math.sqrt(sum(float(np.square(one[0][name] - several[0][name]).sum()) for name in one[0]))
    length = math.sqrt(sum(float(np.square(value).sum()) for value in one[0].values()))
    assert apart < CLOSE * length


def compare(base: Any, count: int, tries: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Each of some trainings, by one process and by so many."""
    one = [unlearned(shared(base, Ranks()), method, folder, **changes) for method, changes in tries]

    def call(ranks: Ranks) -> list[Ran]:
        return [unlearned(shared(base, ranks), method, folder, **changes) for method, changes in tries]

    main, *others = together(count, call)
    for alone, several in zip(one, main, strict=True):
        assert_alike(alone, several)
    assert all(not changes for other in others for changes, _ in other), "the main process alone has what changed"


def test_two_processes_come_to_the_losses_and_the_delta_of_one(load: Callable[..., Any], tmp_path: Path) -> None:
    kl = {"retain_loss": "kl", "accumulation": 2, "steps": 2, **ALL}
    # The base's likelihoods are asked for first: the model is called without its adapter before it is called with it.
    compare(load("llama"), 2, [("npo", kl), ("npo", {**LORA, "steps": 2})], tmp_path)


def test_a_parameter_that_no_loss_reaches_stays_as_it_is_in_two_processes_too(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    """An optimizer skips what has no gradient; a gradient of zeros would let weight decay change it."""
    base = load("llama")
    model = copy.deepcopy(base.model)
    model.spare = torch.nn.Parameter(torch.ones(4, 6))
    model.model.layers[1].spare = torch.nn.Parameter(torch.ones(6))
    names = {**base.names, "spare": ("spare",), "model.layers.1.spare": ("model.layers.1.spare",)}
    decaying = {**ALL, "weight_decay": 0.5, "steps": 2}
    compare(replace(base, model=model, names=names), 2, [("ga", decaying)], tmp_path)


def test_what_one_process_alone_reaches_has_its_gradient_in_all(load: Callable[..., Any]) -> None:
    base = load("llama")
    model = copy.deepcopy(base.model)
    model.some, model.none = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    given = replace(base, model=model, names={**base.names, "some": ("some",), "none": ("none",)})

    def call(ranks: Ranks) -> list[Any]:
        mine = shared(given, ranks)
        with training(mine, Everything(), 0) as trained:
            ids = torch.arange(3, 15)[None]
            for _ in range(2):  # what an earlier backward pass reached counts, until the gradient is taken away
                loss = mine.model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss + mine.model.some.sum() if ranks.rank else loss).backward()
            drop_unreached(trained.parameters, ranks)
            named = dict(zip(dict(mine.model.named_parameters()), trained.parameters, strict=True))
            assert all(each.grad is not None for name, each in named.items() if name != "none")
            return [named["some"].grad.tolist(), named["none"].grad]

    assert together(2, call) == [[[1.0, 1.0], None]] * 2  # twice 1 in one of two processes


@pytest.mark.thorough
@pytest.mark.parametrize("method", SHARED)
def test_every_method_comes_to_the_same_in_two_processes(load: Callable[..., Any], tmp_path: Path, method: str) -> None:
    compare(load("llama"), 2, [(method, way) for way in (LORA, ALL, SOME, HEAD)], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"optimizer": {"sam": 0.1}, "gru": 0.8}, {"optimizer": "sophia"}], ids=str)
def test_what_changes_the_steps_comes_to_the_same_in_two_processes(
    load: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    compare(load("llama"), 2, [("npo", {**way, **changes}) for way in (LORA, ALL)], tmp_path)


@pytest.mark.thorough
def test_four_processes_come_to_the_same_where_some_have_no_row_of_a_batch(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    stored = {"reference": "stored", "retain_loss": "kl"}
    tries = [("npo", ALL), ("undial", {**LORA, **stored}), ("undial", {**ALL, **stored}), ("npo", {**LORA, "steps": 8})]
    compare(load("llama"), 4, [(method, {"batch_size": 5, **changes}) for method, changes in tries], tmp_path)


@pytest.mark.thorough
def test_packed_texts_and_activations_computed_again_come_to_the_same(load: Callable[..., Any], tmp_path: Path) -> None:
    again = replace(load("llama"), checkpoint_activations=True)
    packed = {"packing": True, "max_length": 16, "retain_loss": "kl"}
    compare(again, 2, [("npo", {**ALL, **packed}), ("undial", {**LORA, **packed})], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
def test_two_processes_come_to_the_same_on_every_architecture(
    load: Callable[..., Any], tokenizer_folder: Path, tmp_path: Path, architecture: str
) -> None:
    from spunge.model.loading import load_base
    from spunge.recipe.model import ModelSettings

    if architecture in ARCHITECTURES:
        base = load(architecture, **STILL.get(architecture, {}))
    else:
        folder = build_experts(architecture, tmp_path / "base", tokenizer_folder)
        base = load_base(folder, ModelSettings(path=str(folder), dtype="float32"))
    compare(base, 2, [("npo", LORA), ("npo", ALL)], tmp_path)


def test_each_process_holds_its_share_of_weights_gradients_and_moments_alone(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    base = load("llama")
    entries = sum(parameter.numel() for parameter in base.model.parameters())

    def call(ranks: Ranks) -> list[int]:
        mine = shared(base, ranks)
        with training(mine, Everything(), 0) as trained:
            optimizer = torch.optim.AdamW(trained.parameters)
            ids = torch.arange(3, 15)[None]
            mine.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert all(parameter.grad is None for parameter in mine.model.parameters())
            optimizer.step()
            held = [parameter.to_local() for parameter in mine.model.parameters()]
            moments = [each for state in optimizer.state.values() for each in state.values() if each.ndim]
            gradients = [each.grad for each in trained.parameters]
            return [sum(each.numel() for each in kind) for kind in (held, gradients, moments)]

    told = together(3, call)
    assert [sum(kind) for kind in zip(*told, strict=True)] == [entries, entries, 2 * entries]
    assert max(max(kind) / sum(kind) for kind in zip(*told, strict=True)) < 1.1 / 3


def test_a_stop_that_one_process_is_asked_for_stops_all_and_they_go_on_exactly(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    base = load("llama")
    dropping = {**LORA, "trainable": {**LORA["trainable"], "dropout": 0.2}, "alpha": 0}

    def unlearn(ranks: Ranks, state: Path | None, stop_at: int) -> dict[str, np.ndarray]:
        def stop(done: int, _total: int, _note: str = "") -> None:
            STOP.asked = STOP.asked or (done == stop_at and ranks.rank == 1)

        mine = shared(base, ranks)
        task = Task(mine, {"a": samples()}, samples("other", 21), {"a": 97}, state=state, progress=stop)
        return dense(METHODS.get("npo").unlearn(task, settings_of("npo", **dropping)))

    def call(ranks: Ranks) -> Any:
        state = tmp_path / "state-abc.pt"
        undisturbed = unlearn(ranks, None, 0)
        with pytest.raises(KeyboardInterrupt):
            unlearn(ranks, state, 2)
        STOP.asked = False
        kept = sorted(file.name for file in tmp_path.glob("state-*"))
        with pytest.raises(RecipeError) as alone:
            stored_state(state, Ranks())
        with pytest.raises(RecipeError) as more:
            stored_state(state, Ranks(ranks.rank, 3))
        return undisturbed, unlearn(ranks, state, 0), kept, str(alone.value), str(more.value)

    main, _ = together(2, call)
    undisturbed, went_on, kept, alone, more = main
    assert kept == ["state-abc.2-0.pt", "state-abc.2-1.pt", "state-abc.pt"]
    assert all(np.array_equal(undisturbed[name], went_on[name]) for name in undisturbed)
    for line in (alone, more):
        assert line.startswith("execution: this training was begun by 2 processes, and goes on with as many; set ")
        assert "{kind: sharded, processes: 2}" in line


def test_a_loss_that_is_no_number_in_one_process_ends_all_alike(load: Callable[..., Any]) -> None:
    base = load("llama")

    def call(ranks: Ranks) -> str:
        mine = shared(base, ranks)
        task = Task(mine, {"a": samples()}, samples("other", 21), {"a": 97})
        with pytest.raises(RecipeError) as raised:
            METHODS.get("ga").unlearn(task, settings_of("ga", learning_rate=1e30, max_grad_norm=None, **ALL))
        return str(raised.value)

    first, second = together(2, call)
    assert first == second
    assert re.match(r"unlearn.learning_rate: 1e\+30: the loss became (nan|-?inf) at step 2 ", first), first
