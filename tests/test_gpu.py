"""On a GPU everything comes out as on the CPU: training, deltas, merging, writing, scoring, and a whole run."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

import spunge
from spunge.data.samples import Encoded, Samples, collate
from spunge.evaluation.attacks.direction import ABLATE, AblateSettings
from spunge.evaluation.attacks.lens import LENS, LensSettings
from spunge.evaluation.attacks.relearning import RELEARN, RelearnSettings
from spunge.evaluation.attacks.suffix import Pair, gradient_of
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.candidates import Question, candidate_likelihoods
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.likelihood import token_logs
from spunge.evaluation.perplexity import PerplexitySettings
from spunge.evaluation.scorers.probe import pooled_states
from spunge.files import fingerprint
from spunge.merging.engine import merge
from spunge.merging.rules import AverageSettings
from spunge.model.loading import Base, load_base
from spunge.model.placing import dispatched
from spunge.progress import SILENT
from spunge.recipe.model import ModelSettings
from spunge.registry import METHODS
from spunge.results import Results
from spunge.unlearning.finetuning import finetune
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.rmu.trunk import Trunk
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Delta, open_delta, write_delta
from spunge.weights.overlay import applied, overlaid
from spunge.weights.packed import is_packed, unpacked
from spunge.weights.sources import DeltaSource
from toys import ANSWERING, ANSWERING_BOTH, WORDS, texts

pytestmark = pytest.mark.gpu

TRAINING = sorted(set(METHODS.builtin) - {"precomputed"})  # which trains nothing
WRITING = {"demem", "quark"}  # which draw texts of their own, other ones on each device
# The first gradient of rr is that of a maximum: rounding alone, of which Adam makes whole steps in its direction.
AT_A_MAXIMUM = {"rr"}
STEPS = 4
FEW = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "max_damage": None}
REWARDED = {"scorer": {"kind": "keywords", "words": WORDS[::2]}, "tokens": 4, "alpha": 1.0}
OWN: dict[str, dict[str, Any]] = {
    "rmu": {"layer": 2},
    "sku": {"answers": 2},
    "quark": {**REWARDED, "explorations": 2, "samples": 2, "quantiles": 2, "labels": ["one"]},
    "demem": {**REWARDED, "samples": 4, "updates": 1},
}
FACTORS = {"kind": "lora", "rank": 4, "dropout": 0.0, "targets": "all-linear"}
TENSORS = {"kind": "tensors", "match": ["*.1.*weight"]}
EVERYTHING = {"kind": "all"}


@pytest.fixture(scope="session")
def card(request: pytest.FixtureRequest) -> str:
    """The device."""
    device: str = request.config.getoption("--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return device


@pytest.fixture
def on(tiny: Callable[..., Path]) -> Callable[..., Base]:
    """on("cuda") -> a tiny Llama there."""

    def load(device: str, dtype: str = "float32") -> Base:
        folder = tiny("llama", dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        return load_base(folder, ModelSettings(path=str(folder), dtype=dtype, device=device))

    return load


def samples(topic: str, count: int = 10, answers: bool = False) -> Samples:
    if not answers:
        return Samples(pa.table({"text": texts(topic, count)}))
    completed = [f" {text}" for text in texts(f"{topic}, answers", count)]
    others = texts(f"{topic}, other answers", count)
    return Samples(pa.table({"prompt": texts(topic, count), "completion": completed, "refusal": others}))


def unlearn(
    base: Base, method: str, log: Path | None = None, task: Mapping[str, Any] | None = None, **changes: Any
) -> Branch:
    settings = METHODS.get(method).settings(**{"method": method, **FEW, **OWN.get(method, {}), **changes})
    parts = {"a": samples("a", answers=method in ANSWERING)}
    given = {
        "parts": parts,
        "retain": samples("other", 20, method in ANSWERING_BOTH),
        "seeds": {"a": 5},
        "log": log,
        **(task or {}),
    }
    return METHODS.get(method).unlearn(Task(base, **given), settings)


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.open()]


def dense(branch: Branch) -> dict[str, Tensor]:
    """A branch's changes in the tensors' own shapes, on the CPU."""
    return {
        name: (change if isinstance(change, Tensor) else change.dense()).cpu()
        for name, change in branch.changes.items()
    }


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert one.keys() == other.keys()
    squares = [
        ((one[name].double() - other[name].double()).square().sum(), other[name].double().square().sum())
        for name in one
    ]
    return math.sqrt(sum(float(each) for each, _ in squares) / sum(float(each) for _, each in squares))


def logits(base: Base) -> Tensor:
    """On two fixed texts, in evaluation mode, on the CPU."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [30, 20, 10, 40, 50, 60]], device=base.device)
    was_training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            return base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
    finally:
        base.model.train(was_training)


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        *((method, TENSORS) for method in TRAINING if method not in WRITING),
        ("rmu", None),
        ("npo", FACTORS),
        ("tvn", FACTORS),
        ("ga", EVERYTHING),
    ],
    ids=lambda value: value if isinstance(value, str) else (value or {"kind": "default"})["kind"],
)
def test_a_method_learns_on_the_card_what_it_learns_on_the_cpu(
    card: str, on: Callable[..., Base], bits_of: Callable[..., Any], method: str, trainable: Any, tmp_path: Path
) -> None:
    given = {} if trainable is None else {"trainable": trainable}
    base = on(card)
    before = bits_of(base.model)
    there = unlearn(base, method, tmp_path / "there", **given)
    here = unlearn(on("cpu"), method, tmp_path / "here", **given)
    # kga's losses are differences of divergences, about 1e-5 here
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=5e-3, abs=1e-7)
    assert losses(tmp_path / "there")[0] == pytest.approx(losses(tmp_path / "here")[0], rel=1e-4, abs=1e-7)
    assert method in AT_A_MAXIMUM or apart(dense(there), dense(here)) < 0.05
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {parameter.device.type for parameter in base.model.parameters()} == {torch.device(card).type}


@pytest.mark.parametrize("method", sorted(WRITING))
def test_a_method_that_writes_learns_on_the_card(
    card: str, on: Callable[..., Base], bits_of: Callable[..., Any], method: str, tmp_path: Path
) -> None:
    base = on(card)
    before = bits_of(base.model)
    branch = unlearn(base, method, tmp_path / "log", trainable=TENSORS)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "log"))
    changed = dense(branch)
    assert changed
    assert any(change.abs().max() > 0 for change in changed.values())
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("method", "trainable"), [("rmu", None), ("npo", FACTORS), ("ga", EVERYTHING)])
def test_a_delta_from_the_card_gives_on_either_device_what_was_trained(
    card: str, on: Callable[..., Base], method: str, trainable: Any, tmp_path: Path
) -> None:
    base, seen = on(card), torch.empty(0)

    def progress(step: int, steps: int, _note: str = "", /) -> None:
        nonlocal seen
        if step == steps:
            seen = logits(base)

    given = {} if trainable is None else {"trainable": trainable}
    branch = unlearn(base, method, task={"progress": progress}, **given)
    write_delta(tmp_path, branch.changes, {"base": "none"})
    assert not torch.allclose(logits(base), seen, atol=1e-3)
    for each in (base, on("cpu")):
        with applied(each.parameters, open_delta(tmp_path)):
            assert torch.allclose(logits(each), seen, atol=1e-4)


@pytest.mark.parametrize("method", ["rmu", "npo", "ga"])
def test_bfloat16_on_the_card_is_float32_up_to_rounding(
    card: str, on: Callable[..., Base], bits_of: Callable[..., Any], method: str, tmp_path: Path
) -> None:
    base = on(card, "bfloat16")
    before = bits_of(base.model)
    branch = unlearn(base, method, tmp_path / "there", **({} if method == "rmu" else {"trainable": EVERYTHING}))
    unlearn(on("cpu"), method, tmp_path / "here", **({} if method == "rmu" else {"trainable": EVERYTHING}))
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=0.05)
    changes = dense(branch)
    assert {change.dtype for change in changes.values()} == {torch.float32}
    assert all(bool(change.isfinite().all()) for change in changes.values())
    assert all(torch.equal(base.model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("method", "given"),
    [("rmu", {}), ("npo", {"trainable": {**FACTORS, "dropout": 0.2}}), ("tvn", {"trainable": EVERYTHING})],
)
def test_a_training_that_was_killed_on_the_card_goes_on_to_the_same_delta(
    card: str, on: Callable[..., Base], method: str, given: dict[str, Any], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, _steps: int, _note: str = "", /) -> None:
        if step == 3:
            raise Killed

    base, state = on(card), {"state": tmp_path / "state.pt", "save_seconds": 0.0}
    undisturbed = unlearn(base, method, **given)
    with pytest.raises(Killed):
        unlearn(base, method, task={**state, "progress": kill}, **given)
    assert (tmp_path / "state.pt").exists()
    torch.manual_seed(99)
    resumed = unlearn(base, method, task=state, **given)
    assert resumed.steps == STEPS
    # Not bit for bit: sums on a card come in any order.
    assert apart(dense(resumed), dense(undisturbed)) < (5e-3 if card != "cpu" else 1e-12)


@pytest.mark.parametrize(
    ("method", "trainable"), [("rmu", None), ("npo", {**FACTORS, "dropout": 0.2}), ("ga", EVERYTHING)]
)
def test_activations_computed_again_on_the_card_give_the_same(
    card: str, on: Callable[..., Base], method: str, trainable: Any, tmp_path: Path
) -> None:
    given = {} if trainable is None else {"trainable": trainable}
    base = on(card)
    whole = unlearn(base, method, tmp_path / "held", **given)
    again = unlearn(replace(base, checkpoint_activations=True), method, tmp_path / "again", **given)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "held"), rel=5e-3)
    assert apart(dense(again), dense(whole)) < 0.05


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "lion"])
def test_an_optimizer_of_bitsandbytes_on_the_card_goes_on_after_a_kill(
    card: str, tiny: Callable[..., Path], optimizer: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")

    class Killed(Exception):
        pass

    def kill(step: int, _steps: int, _note: str = "", /) -> None:
        if step == 3:
            raise Killed

    folder = tiny(
        "llama", hidden_size=96, num_hidden_layers=2
    )  # matrices of 4096 entries and more, whose moments are in 8 bits
    base = load_base(folder, ModelSettings(path=str(folder), dtype="float32", device=card))
    state = {"state": tmp_path / "state.pt", "save_seconds": 0.0}
    given = {"trainable": EVERYTHING, "optimizer": optimizer}
    undisturbed = unlearn(base, "tvn", **given)
    with pytest.raises(Killed):
        unlearn(base, "tvn", task={**state, "progress": kill}, **given)
    resumed = unlearn(base, "tvn", task=state, **given)
    assert resumed.steps == STEPS
    assert apart(dense(resumed), dense(undisturbed)) < 0.05


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["rmu", "npo", "sku", "tvn"])
def test_the_packed_values_and_the_delta_from_the_card_are_the_trained_model(
    card: str, tiny: Callable[..., Path], method: str, bits: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny("llama", hidden_size=64, intermediate_size=128)
    settings = ModelSettings(path=str(folder), dtype="float32", device=card)
    base, plain = load_base(folder, settings.model_copy(update={"train_in": bits})), load_base(folder, settings)
    for path, module in base.model.named_modules():
        if is_packed(module):
            plain.model.get_submodule(path).weight.data = unpacked(module).float()
    seen, before = torch.empty(0), logits(base)

    def progress(step: int, steps: int, _note: str = "", /) -> None:
        nonlocal seen
        if step == steps:
            seen = logits(base)

    branch = unlearn(base, method, task={"progress": progress}, trainable=FACTORS, learning_rate=1e-2)
    if method in ("sku", "tvn"):  # what was learned is subtracted: laid over with its sign turned
        branch = replace(
            branch, changes={name: each._replace(scale=-each.scale) for name, each in branch.changes.items()}
        )
    write_delta(tmp_path, branch.changes, {"base": "none"})
    with applied(plain.parameters, open_delta(tmp_path)):
        assert (logits(plain) - seen).norm() < (0.02 if bits == "4bit" else 0.5) * (seen - before).norm()


def test_a_batch_that_the_cards_memory_does_not_hold_is_learned_in_pieces(
    card: str, on: Callable[..., Base], request: pytest.FixtureRequest
) -> None:
    if card == "cpu":
        pytest.skip("a process's share of the memory is a card's alone")
    base, long = on(card), [" ".join(texts(f"long {row}", 12)) for row in range(512)]
    given = {"parts": {"a": Samples(pa.table({"text": long}))}}
    settings = {"trainable": TENSORS, "steps": 2, "batch_size": 256, "max_length": 120}
    torch.cuda.reset_peak_memory_stats()
    whole = unlearn(base, "ga", task=given, **settings)
    limit = 0.5 * torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0))
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    in_pieces = unlearn(base, "ga", task=given, **settings)
    assert "out of memory" not in whole.notes
    assert "out of memory" in in_pieces.notes
    assert apart(dense(in_pieces), dense(whole)) < 0.02


def test_rmus_blocks_give_on_the_card_what_transformers_gives_on_the_cpu(card: str, on: Callable[..., Base]) -> None:
    coded = [Encoded(ids, list(ids)) for ids in ([5, 6, 7, 8, 9, 10, 11], [30, 20, 10])]
    here, there = collate(coded), collate(coded, card)
    base = on(card)
    trunk = Trunk(base, 1, 2)
    with torch.no_grad():
        states = trunk.states(trunk.prefix(there)).cpu()
        told = on("cpu").model(input_ids=here.ids, attention_mask=here.mask, output_hidden_states=True)
    assert torch.allclose(states[here.mask.bool()], told.hidden_states[3][here.mask.bool()], atol=1e-5)


@pytest.mark.parametrize("method", ["npo", "undial", "graddiff"])
def test_a_stored_reference_trains_on_the_card_as_a_live_one(
    card: str, on: Callable[..., Base], method: str, tmp_path: Path
) -> None:
    given = {"trainable": TENSORS, "retain_loss": "kl"}
    live = unlearn(on(card), method, tmp_path / "live", **given)
    stored = unlearn(on(card), method, tmp_path / "stored", **given, reference="stored")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-3)
    assert apart(dense(stored), dense(live)) < 0.02


def test_deltas_of_a_base_on_the_card_merge_to_the_base_and_their_mean(
    card: str, on: Callable[..., Base], tmp_path: Path
) -> None:
    base = on(card)
    plain = Checkpoint(base.folder)
    deltas: list[Delta] = []
    for seed in (1, 2):
        branch = unlearn(base, "ga", trainable=EVERYTHING, learning_rate=1e-3 * seed)
        deltas.append(write_delta(tmp_path / str(seed), branch.changes, {"base": plain.fingerprint()}))
    merge(base.folder, [DeltaSource(delta) for delta in deltas], AverageSettings(), tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name in plain.tensors:
        mean = sum(delta.dense(name).double() for delta in deltas) / 2
        assert torch.allclose(merged.read(name).double(), plain.read(name).double() + mean, atol=1e-6), name


def test_token_likelihoods_on_the_card_are_the_cpus(card: str, on: Callable[..., Base]) -> None:
    here, there = on("cpu"), on(card)
    coded = [
        Encoded(ids, list(ids)) for text in texts("likelihoods", 12) for ids in [here.tokenizer(text)["input_ids"]]
    ]
    for one, other in zip(token_logs(there, coded, SILENT.step, 64), token_logs(here, coded, SILENT.step), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    questions = [Question(each.ids[:3], [each.ids[3:5], [5, 6, 7], [5, 9]]) for each in coded]
    for one, other in zip(
        candidate_likelihoods(there, questions, SILENT.step),
        candidate_likelihoods(here, questions, SILENT.step),
        strict=True,
    ):
        assert [each.log for each in one] == pytest.approx([each.log for each in other], abs=1e-3)


def _written(base: Base, folder: Path, **given: Any) -> list[list[str]]:
    bench = replace(Bench("base", fingerprint(str(folder)), folder, folder), seed=3)
    return completions(base, texts("prompts", 6), GenerationSettings(max_new_tokens=12, **given), bench)


def test_attacks_inside_the_model_give_on_the_card_what_they_give_on_the_cpu(
    card: str, on: Callable[..., Base]
) -> None:
    """The logit lens, a direction taken out, a suffix's gradient, relearning with all weights."""
    questions, pairs = pa.table({"text": texts("asked", 6)}), [Pair(text, " rome") for text in texts("asked", 3)]
    target = Target(PerplexitySettings(name="texts"), questions)
    bench = Bench("merged", "", Path(), Path(), forget={"a": samples("a")}, retain=samples("other"), finetune=finetune)
    relearned = RelearnSettings(trainable="all", optimizer="sgd", steps=[2], batch_size=4, learning_rate=0.01)
    found: list[list[float]] = []
    for device in (card, "cpu"):
        base = on(device)
        measures = LENS.run(base, LensSettings(block=[1, 3]), target, bench)
        measures += ABLATE.run(base, AblateSettings(block=1), target, bench)
        measures += RELEARN.run(base, relearned, target, bench)
        slope = gradient_of(base, pairs, np.array([20, 31, 44]))
        found.append([*(value for each in measures for value in each.numerator.tolist()), *(1e3 * slope).ravel()])
    assert len(found[0]) == 4 * 6 + 3 * 128
    assert found[0] == pytest.approx(found[1], rel=2e-3, abs=2e-2)


@pytest.mark.parametrize("main", ["cpu", "card"])
def test_a_model_spread_over_the_card_and_the_cpu_is_judged_as_one_on_the_cpu(
    card: str, on: Callable[..., Base], main: str, tmp_path: Path
) -> None:
    """main: cpu: the blocks compute in turn on either; card: every second one comes to the card for each forward."""
    base, target = on("cpu"), Target(PerplexitySettings(name="texts"), pa.table({"text": texts("asked", 6)}))
    bench = Bench("merged", "", Path(), Path(), forget={"a": samples("a")}, retain=samples("other"))
    questions = [Question([5, 6, number], [[7, 8, 9], [7, 10]]) for number in range(3, 9)]
    changed = {name: value + 0.02 * torch.randn(value.shape) for name, value in base.parameters.items()}

    def judged(base: Base, name: str) -> tuple[list[float], Any]:
        measures = LENS.run(base, LensSettings(block=[1, 3]), target, bench)
        measures += ABLATE.run(base, AblateSettings(block=1), target, bench)
        scores = [value for each in measures for value in each.numerator.tolist()]
        scores += [each.log for question in candidate_likelihoods(base, questions, SILENT.step) for each in question]
        scores += pooled_states(base, [Encoded(ids, ids) for ids in ([3, 4, 5], [6, 7])], [0, 3]).ravel().tolist()
        return scores, _written(base, tmp_path / name)

    number = 0 if card == "cuda" else card
    devices = {name: "cpu" for name, _ in base.model.model.named_children() if name != "layers"}
    devices = {f"model.{name}": where for name, where in devices.items()} | {"lm_head": "cpu"}
    devices |= {f"model.layers.{at}": ("cpu", number)[at % 2] for at in range(base.depth)}
    with overlaid(base.parameters, changed.items()):
        scores, written = judged(base, "whole")
        there = replace(base, device=torch.device(card if main == "card" else "cpu"))
        with dispatched(base.model, devices, there.device):
            spread = judged(there, "spread")
        assert judged(base, "after") == (scores, written)
    assert spread[0] == pytest.approx(scores, rel=2e-3, abs=2e-2)
    assert spread[1] == written


def test_a_run_whose_models_the_card_does_not_hold_gives_the_scores_of_one_that_it_holds_spread_over_both(
    card: str, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    if card == "cpu":
        pytest.skip("a device map is of GPUs")
    writing = {
        "source": toy_recipe["retain"]["source"],
        "prompt": "text",
        "by": "NULL",
        "generation": {"max_new_tokens": 4},
    }
    toy_recipe["evaluate"] += [
        {"kind": "audit", "of": "choices", "attack": "lens"},
        {"kind": "match", "unwanted": "text", "subject": "match", **writing},
    ]
    scores = []
    for device_map in (None, "auto", {0: "300KiB"}):
        toy_recipe["model"] |= {"device": card, "device_map": device_map}
        results = spunge.run(toy_recipe, tmp_path / f"run{len(scores)}")
        scores.append([each.value for each in results.rows])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert scores[2] == pytest.approx(scores[0], rel=1e-4)


def test_greedy_completions_on_the_card_are_the_cpus(card: str, on: Callable[..., Base], tmp_path: Path) -> None:
    assert _written(on(card), tmp_path / "there") == _written(on("cpu"), tmp_path / "here")


def test_sampled_completions_on_the_card_come_again_with_the_seed(
    card: str, on: Callable[..., Base], tmp_path: Path
) -> None:
    base, sampled = on(card), {"temperature": 1.0, "samples": 3}
    first = _written(base, tmp_path / "first", **sampled)
    torch.manual_seed(99)
    assert _written(base, tmp_path / "again", **sampled) == first


def _audits() -> list[dict[str, Any]]:
    quick: dict[str, dict[str, Any]] = {
        "relearn": {"steps": [0, 2], "batch_size": 4},
        "quantise": {"bits": "nf4"},
        "reword": {},
        "prefix": {"shots": 1},
        "probe": {"folds": 2},
        "lens": {"block": 1},
        "ablate": {"block": 1},
        "suffix": {"steps": 1, "candidates": 2, "items": 1},
    }
    return [{"kind": "audit", "of": "choices", "attack": {"kind": kind, **given}} for kind, given in quick.items()]


@pytest.fixture
def long_recipe(toy_recipe: dict[str, Any], tiny: Callable[..., Path], tiny_bert: Path) -> dict[str, Any]:
    """Every control, attack and kind of evaluator that needs no package of its own."""
    retain, short = toy_recipe["retain"]["source"], {"max_new_tokens": 4}
    writing = {"source": retain, "by": "NULL", "prompt": "text", "limit": 4, "generation": short}
    judges: list[dict[str, Any]] = [
        {"kind": "toxicity", "subject": "toxicity", "scorer": str(tiny_bert)},
        {"kind": "harm", "subject": "harm", "judge": str(tiny_bert)},
        {"kind": "refusal", "subject": "refusal", "scorer": str(tiny_bert), "judge": str(tiny("gpt2"))},
        {"kind": "leakage", "subject": "leakage", "leaks": "scorer", "scorer": "keywords", "k": [1]},
        {"kind": "fluency", "subject": "fluency", "judge": str(tiny("gpt2")), "judge_dtype": "float32"},
    ]
    evaluations = [*toy_recipe["evaluate"], *_audits(), *({**writing, **judge} for judge in judges)]
    membership = {"kind": "audit", "source": retain, "attack": "membership"}
    return {**toy_recipe, "controls": ["joint", "random", "sequential"], "evaluate": [*evaluations, membership]}


def test_a_whole_run_on_the_card_gives_the_cpus_scores(card: str, long_recipe: dict[str, Any], tmp_path: Path) -> None:
    results: dict[str, Results] = {}
    for device in (card, "cpu"):
        model = {**long_recipe["model"], "device": device}
        results[device] = spunge.run({**long_recipe, "model": model}, tmp_path / device)
    there, here = results[card], results["cpu"]
    assert there.device.partition(":")[0] == torch.device(card).type
    rows = [{(row.stage, row.subject, row.metric): row.value for row in each.rows} for each in (there, here)]
    assert rows[0].keys() == rows[1].keys()
    assert all(math.isfinite(value) for value in rows[0].values())
    for place, value in rows[0].items():
        if place[2] == "perplexity":
            assert value == pytest.approx(rows[1][place], rel=2e-3), place
    merged = [Checkpoint(tmp_path / device / "merged") for device in (card, "cpu")]
    base = Checkpoint(Path(long_recipe["model"]["path"]))
    changes = [{name: each.read(name) - base.read(name) for name in base.tensors} for each in merged]
    # A sign that is elected otherwise, or an entry at the threshold, changes whole entries.
    assert apart(*changes) < 0.1
    assert (
        spunge.run({**long_recipe, "model": {**long_recipe["model"], "device": card}}, tmp_path / card).rows
        == there.rows
    )


def test_two_cards_train_one_model_to_the_losses_of_one(toy_recipe: dict[str, Any], tmp_path: Path, card: str) -> None:
    if card.startswith("cuda") and torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    toy_recipe |= {"unlearn": {"method": "npo", **FEW, "trainable": EVERYTHING}, "controls": []}
    toy_recipe["model"] |= {"device": card.partition(":")[0], "dtype": "float32"}
    losses = []
    for name, execution in {"one": {"kind": "here"}, "two": {"kind": "sharded", "processes": 2}}.items():
        spunge.run({**toy_recipe, "execution": execution}, tmp_path / name)
        logs = sorted((tmp_path / name / "branches").glob("*/log.jsonl"))
        losses.append([json.loads(line)["loss"] for log in logs for line in log.read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
