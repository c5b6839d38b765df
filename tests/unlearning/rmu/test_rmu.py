"""RMU against a plain transcription of its paper: two whole models, whole forward passes."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import spunge
from experts import EXPERTS, build_experts
from spunge.data.samples import IGNORED, Batch, Encoded, Samples, collate, encode
from spunge.errors import RecipeError
from spunge.model.architecture import down_projections, find_blocks
from spunge.model.loading import load_base
from spunge.model.placing import settle_on
from spunge.progress import Silent
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.recipe.model import ModelSettings
from spunge.run.stages.building import lineups
from spunge.unlearning.batches import Stream, interleaved
from spunge.unlearning.method import Task
from spunge.unlearning.rmu.rmu import RMU
from spunge.unlearning.rmu.settings import PRESETS, Relative, RMUSettings, block_index
from spunge.unlearning.rmu.steering import counted, direction, steered, target, token_mean
from spunge.unlearning.rmu.trunk import Trunk
from spunge.unlearning.rmu.tuning import Trial, best, divided
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.overlay import applied
from toys import ARCHITECTURES, texts

FORGET = Samples(pa.table({"text": texts("forget", 10)}))
RETAIN = Samples(pa.table({"text": texts("retain", 15)}))


def hidden(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    out = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True, use_cache=False)
    states: torch.Tensor = out.hidden_states[layer + 1]
    return states


def transcription(base: Any, settings: RMUSettings, layer: int, seed: int) -> dict[str, torch.Tensor]:
    """The algorithm as printed, on a copy of the model: returns the trained tensors' changes."""
    updated, frozen = copy.deepcopy(base.model), base.model
    updated.requires_grad_(False)
    named = dict(updated.named_parameters())
    trained = {
        name: named[name]
        for name in named
        if any(f".{b}." in name and "down_proj" in name for b in range(layer - 2, layer + 1))
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    u = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    u = u / torch.linalg.vector_norm(u)
    forget, retain = (Stream(samples, base, settings.batch_size, 256, seed) for samples in (FORGET, RETAIN))
    for _ in range(settings.steps or 0):
        batch, held = next(forget), next(retain)
        loss = torch.zeros(())
        for which, weight in ((batch, 1.0), (held, settings.alpha)):
            after = hidden(updated, which, layer)
            with torch.no_grad():
                before = hidden(frozen, which, layer)
            total, count = torch.zeros(()), 0
            for row in range(which.ids.shape[0]):
                for place in range(int(which.mask[row].sum())):
                    if isinstance(settings.coefficient, float):
                        goal = settings.coefficient * u
                    elif place == 0:
                        continue
                    else:
                        goal = settings.coefficient.relative * before[row, place].norm() * u
                    aim = goal if which is batch else before[row, place]
                    total = total + ((after[row, place] - aim) ** 2).sum() / 32
                    count += 1
            loss = loss + weight * total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    originals = dict(frozen.named_parameters())
    return {name: (parameter - originals[name]).detach() for name, parameter in trained.items()}


@pytest.mark.formula("rmu")
@pytest.mark.parametrize("coefficient", [6.5, {"relative": 5.0}])
def test_rmu_trains_the_same_weights_as_a_plain_transcription(load: Callable[..., Any], coefficient: Any) -> None:
    base = load("llama")
    settings = RMUSettings(layer=2, coefficient=coefficient, steps=5, batch_size=4, learning_rate=1e-3, alpha=10.0)
    branch = RMU.unlearn(Task(base, {"a": FORGET}, RETAIN, {"a": 7}), settings)
    expected = transcription(base, settings, 2, 7)
    assert branch.changes.keys() == expected.keys()
    for name, change in expected.items():
        found = branch.changes[name]
        assert isinstance(found, torch.Tensor)
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(found, change, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_trunk_whose_blocks_have_devices_of_their_own_is_trained_to_the_same_bits(
    load: Callable[..., Any], keep: float
) -> None:
    """`cpu` and `cpu:0` are one device with two names: what comes to each block is brought there."""
    settings = RMUSettings(layer=2, steps=3, batch_size=4, alpha=10.0, keep_activations=keep)

    def trained(base: Any) -> dict[str, Any]:
        return dict(RMU.unlearn(Task(base, {"a": FORGET}, RETAIN, {"a": 7}, kept={}), settings).changes)

    whole, base = trained(load("llama")), load("llama")
    names = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu:0", "lm_head": "cpu:0"}
    names |= {f"model.layers.{at}": ("cpu", "cpu", "cpu:0", "cpu:0")[at] for at in range(base.depth)}
    settle_on(base.model, {name: torch.device(where) for name, where in names.items()})
    assert all(block._forward_pre_hooks for block in find_blocks(base.model))
    spread = trained(base)
    assert spread.keys() == whole.keys()
    assert all(torch.equal(spread[name], change) for name, change in whole.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_split_forward_pass_gives_the_models_own_hidden_states(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    batch = collate([encode(text, base.tokenizer, 32) for text in FORGET.texts(range(5), base.tokenizer)])
    for first, last in ((0, 2), (1, 2), (2, 2)):
        trunk = Trunk(base, first, last)
        with torch.no_grad():
            found, expected = trunk.states(trunk.prefix(batch)), hidden(base.model, batch, last)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert all("forward" not in vars(block) for block in find_blocks(base.model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_comes_before_the_first_trained_tensor_is_run_once(load: Callable[..., Any], architecture: str) -> None:
    """The attention of the first trained block runs once for two sets of weights, and each gives its own states."""
    base = load(architecture)
    batch = collate([encode(text, base.tokenizer, 32) for text in FORGET.texts(range(5), base.tokenizer)])
    blocks = find_blocks(base.model)
    [(inner, weight)] = down_projections(blocks[1]).items()
    name = next(name for name, parameter in base.model.named_parameters() if parameter is weight)
    plain, shared = Trunk(base, 1, 2), Trunk(base, 1, 2, [name])
    other = [{inner: weight + 0.1}, {}]
    calls: list[int] = []
    attention = next(module for key, module in blocks[1].named_children() if "att" in key)
    with torch.no_grad():
        expected = [plain.states(plain.prefix(batch), weights) for weights in (other, None)]
        entered = shared.prefix(batch)
        hook = attention.register_forward_hook(lambda *_: calls.append(1))
        attention.forward, original = (
            (lambda *args, **kw: (calls.append(2), original(*args, **kw))[1]),
            attention.forward,
        )
        found = [shared.states(entered, weights) for weights in (other, None)]
        hook.remove()
    assert calls.count(2) == 1
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert not torch.equal(*found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_found_by_structure_and_projections_by_name(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    blocks = find_blocks(base.model)
    assert len(blocks) == 4
    [(name, weight)] = down_projections(blocks[1]).items()
    assert name.endswith("weight")
    assert sorted(weight.shape)[0] == 32
    assert any(weight is parameter for parameter in base.model.parameters())


def test_of_a_prompt_and_its_answer_the_answer_is_steered_and_the_token_that_tells_it() -> None:
    dropped = IGNORED
    batch = collate(
        [
            Encoded([5, 6, 7, 8, 9], [dropped, dropped, dropped, 8, 9]),  # prompt and answer
            Encoded([1, 6, 7, 8], [dropped, 6, 7, 8]),  # a text after a start token
            Encoded([6, 7, 8, 2], [6, 7, 8, dropped]),  # a text that the tokenizer closes
            Encoded([5, 6, 7, 8, 9, 4], [dropped, dropped, 7, dropped, dropped, 4]),  # two answers
            Encoded([5, 6, 7, 8], [dropped, dropped, 7, dropped]),  # what follows the end of turn
        ]
    )
    assert steered(batch, RMUSettings(skip_first=0)).tolist() == [
        [0, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 1],
        [0, 1, 1, 0, 0, 0],
    ]
    # A first token is left out of plain texts as before; retain rows count whole.
    assert steered(batch, RMUSettings(skip_first=1))[1].tolist() == [0, 1, 1, 1, 0, 0]
    assert counted(batch, RMUSettings(skip_first=0))[0].tolist() == [1, 1, 1, 1, 1, 0]


def test_padding_does_not_enter_the_loss() -> None:
    batch = Batch(
        torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.ones(2, 3, dtype=torch.long)
    )
    difference = torch.tensor([[[9.0, 9.0], [1.0, 3.0], [2.0, 0.0]], [[4.0, 0.0], [99.0, 99.0], [99.0, 99.0]]])
    published = RMUSettings(coefficient=6.5)
    # By hand: squares summed over 4 tokens, (81 + 81) + (1 + 9) + 4 + 16 = 192, over 4 tokens and 2 dimensions.
    assert token_mean(difference, counted(batch, published)).item() == pytest.approx(192 / 8)
    # Relative: the first token is left out, but a text of one token keeps it: 10 + 4 + 16 = 30 over 3 tokens.
    assert token_mean(difference, counted(batch, RMUSettings())).item() == pytest.approx(30 / 6)


def test_the_direction_is_one_unit_vector_per_seed_with_entries_of_one_sign() -> None:
    u = direction(64, 5)
    assert torch.equal(u, direction(64, 5))
    assert not torch.equal(u, direction(64, 6))
    assert u.norm().item() == pytest.approx(1)
    assert (u >= 0).all()


@pytest.mark.formula("rmu")
def test_the_target_is_a_fixed_or_a_relative_length() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    u = torch.tensor([0.6, 0.8])
    fixed = target(before, u, RMUSettings(coefficient=6.5)).norm(dim=-1)
    relative = target(before, u, RMUSettings(coefficient={"relative": 5})).norm(dim=-1)
    torch.testing.assert_close(fixed, torch.tensor([[6.5, 6.5]]))
    torch.testing.assert_close(relative, torch.tensor([[25.0, 5.0]]))


def test_the_layer_is_an_index_or_a_share_of_the_depth() -> None:
    assert block_index(7, 32) == 7
    assert block_index(0, 4) == 0
    assert block_index(0.22, 32) == 7
    assert block_index(RMUSettings().layer, 30) == 7
    with pytest.raises(RecipeError, match=r"unlearn\.layer: 32: the model has 32 blocks"):
        block_index(32, 32)


def test_the_joint_run_takes_one_batch_of_each_part_in_turn() -> None:
    assert interleaved({"bio": 3, "cyber": 3}) == ["bio", "cyber"] * 3
    assert interleaved({"bio": 4, "cyber": 2}).count("bio") == 4
    assert interleaved({"bio": 4, "cyber": 2})[:3].count("cyber") == 1


def test_each_part_of_the_joint_run_has_its_branchs_batches_and_direction(load: Callable[..., Any]) -> None:
    """With a retain weight of 0 and two parts that are the same, a joint run of n + n steps is a branch of 2n steps
    only if both use the same direction; with seeds of their own they differ."""
    base = load()
    settings = RMUSettings(layer=2, steps=3, batch_size=4, alpha=0.0)
    same = RMU.unlearn(Task(base, {"a": FORGET, "b": FORGET}, RETAIN, {"a": 1, "b": 1}), settings)
    other = RMU.unlearn(Task(base, {"a": FORGET, "b": FORGET}, RETAIN, {"a": 1, "b": 2}), settings)
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.allclose(torch.as_tensor(same.changes[name]), torch.as_tensor(other.changes[name]))


def test_a_preset_fills_in_what_is_not_given() -> None:
    zephyr = RMUSettings(preset="zephyr-7b")
    assert (zephyr.layer, zephyr.coefficient, zephyr.alpha) == (7, 6.5, 1200)
    assert (zephyr.learning_rate, zephyr.batch_size, zephyr.skip_first, zephyr.min_cosine) == (5e-5, 4, 0, 0.5)
    assert [zephyr.length_of(part) for part in ("bio", "cyber", "retain", "other")] == [512, 768, 512, 512]
    # Two passes over each part on its own, 150 batches for both together.
    assert zephyr.steps_of({"bio": 200}) == {"bio": 100}
    assert zephyr.steps_of({"bio": 200, "cyber": 100}) == {"bio": 75, "cyber": 75}
    mixtral = RMUSettings(preset="mixtral-8x7b")
    assert (mixtral.layer, mixtral.coefficient, mixtral.alpha, mixtral.learning_rate) == (7, 300, 1600, 5e-5)
    reference = RMUSettings(preset="reference")
    assert (reference.layer, reference.coefficient, reference.alpha, reference.min_cosine) == (7, 20, 100, None)
    assert reference.steps_of({"bio": 9}) == {"bio": 80}
    assert reference.steps_of({"bio": 9, "cyber": 9}) == {"bio": 40, "cyber": 40}


def test_an_explicit_setting_wins_over_the_presets() -> None:
    own = RMUSettings(preset="zephyr-7b", coefficient={"relative": 3}, alpha=7, min_cosine=None)
    assert (own.coefficient, own.alpha, own.min_cosine, own.layer) == (Relative(relative=3), 7, None, 7)
    assert (own.epochs, own.steps) == (2, None)
    counted_in_steps = RMUSettings(preset="zephyr-7b", steps=10, max_length=64)
    assert (counted_in_steps.epochs, counted_in_steps.steps) == (None, 10)
    assert counted_in_steps.length_of("cyber") == 64


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_with_a_preset_reloads_to_the_same(toy_recipe: dict[str, Any], tmp_path: Path, preset: str) -> None:
    toy_recipe["unlearn"] = {"method": "rmu", "preset": preset, "layer": 2}
    recipe = load_recipe(toy_recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert dump_recipe(load_recipe(tmp_path / "recipe.yaml")) == dump_recipe(recipe)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("preset=zephyr", r"unlearn\.preset: 'zephyr'"),
        ("layer=-1", r"unlearn\.layer: -1"),
        ("layer=atuo", r"unlearn\.layer: 'atuo'"),
    ],
)
def test_a_wrong_preset_or_layer_is_named(toy_recipe: dict[str, Any], setting: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(toy_recipe, [f"unlearn.{setting}"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_blocks_alone_give_the_very_delta_of_the_whole_model(
    tiny: Callable[..., Path], architecture: str
) -> None:
    settings = RMUSettings(layer=0.5, steps=4, batch_size=4, learning_rate=1e-2)
    folder = tiny(architecture)
    bases = [
        load_base(folder, ModelSettings(path=str(folder), dtype="float32"), last)
        for last in (None, RMU.last_block(settings, 4))
    ]
    assert [len(find_blocks(base.model)) for base in bases] == [4, 3]
    whole, first = (RMU.unlearn(Task(base, {"a": FORGET}, RETAIN, {"a": 7}), settings).changes for base in bases)
    assert whole.keys() == first.keys()
    for name, change in whole.items():
        assert torch.equal(torch.as_tensor(change), torch.as_tensor(first[name]))
        assert torch.as_tensor(change).any()


def test_tensors_of_the_recipes_own_choice_need_the_whole_model() -> None:
    assert RMU.last_block(RMUSettings(layer=2), 4) == 2
    assert RMU.last_block(RMUSettings(layer=2, trainable={"kind": "all"}), 4) is None


class Recorder(Silent):
    """The loads and stages of a run in their order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, title: str) -> None:
        self.seen.append(title)


def watched(toy_recipe: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[Any]:
    watcher = Recorder()

    def load(folder: Path, settings: Any, last: int | None = None, **more: Any) -> Any:
        watcher.seen.append(last)
        return load_base(folder, settings, last, **more)

    monkeypatch.setattr("spunge.run.session.load_base", load)
    spunge.run(load_recipe(toy_recipe, overrides), out, watcher)
    return watcher.seen


@pytest.mark.thorough
def test_a_run_trains_on_the_first_blocks_and_loads_the_rest_to_judge(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(toy_recipe, tmp_path / "run", monkeypatch, "unlearn.layer=1")
    assert [each for each in seen if not isinstance(each, str)] == [1, None]
    assert seen.index("unlearn branch:asia") < seen.index(1) < seen.index("unlearn branch:europe")
    assert seen.index("merge") < seen.index(None)
    monkeypatch.setattr("spunge.unlearning.rmu.rmu.RMU", replace(RMU, last_block=None))
    seen = watched(toy_recipe, tmp_path / "whole", monkeypatch, "unlearn.layer=1")
    assert [each for each in seen if not isinstance(each, str)] == [None]
    for job in ("branches/europe", "branches/asia", "controls/joint"):
        first, whole = (open_delta(tmp_path / name / job).stored for name in ("run", "whole"))
        assert first.fingerprint() == whole.fingerprint()
    first, whole = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("run", "whole"))
    assert first == whole


@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_mixture_of_experts_runs_from_recipe_to_report(
    toy_recipe: dict[str, Any], tmp_path: Path, tokenizer_folder: Path, architecture: str
) -> None:
    folder = build_experts(architecture, tmp_path / "model", tokenizer_folder)
    results = spunge.run(load_recipe(toy_recipe, [f"model.path={folder}"]), tmp_path / "run")
    # Three blocks of four experts each.
    assert len(open_delta(tmp_path / "run" / "branches" / "asia").tensors) == 12
    base, merged = Checkpoint(folder), Checkpoint(tmp_path / "run" / "merged")
    assert base.tensors.keys() == merged.tensors.keys()
    different = {name for name in base.tensors if not torch.equal(base.read(name), merged.read(name))}
    assert len(different) == 12
    assert all("experts" in name and ("w2" in name or "down_proj" in name) for name in different)
    assert results.value("merged", "retain", "perplexity") != results.value("base", "retain", "perplexity")


def test_a_branch_that_was_killed_goes_on_to_the_same_delta(load: Callable[..., Any], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, steps: int, note: str) -> None:
        if step == 5:
            raise Killed

    def task(name: str, progress: Any = None) -> Task:
        extra = {"progress": progress} if progress else {}
        parts, seeds = {"a": FORGET, "b": FORGET}, {"a": 1, "b": 2}
        return Task(load(), parts, RETAIN, seeds, tmp_path / f"{name}.jsonl", tmp_path / f"{name}.pt", 0.0, **extra)

    settings = RMUSettings(layer=2, steps=5, batch_size=4, learning_rate=1e-2, schedule="cosine")
    unbroken = RMU.unlearn(task("unbroken"), settings)
    with pytest.raises(Killed):
        RMU.unlearn(task("broken", kill), settings)
    assert torch.load(tmp_path / "broken.pt", weights_only=True)["step"] == 4
    steps: list[int] = []
    resumed = RMU.unlearn(task("broken", lambda step, *_: steps.append(step)), settings)
    assert steps == [5, 6, 7, 8, 9, 10]
    assert resumed.losses == unbroken.losses
    assert all(
        torch.equal(torch.as_tensor(unbroken.changes[name]), torch.as_tensor(change))
        for name, change in resumed.changes.items()
    )
    lines = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("unbroken", "broken")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


AUTO = ("unlearn.layer=auto", "unlearn.coefficient=auto")


@pytest.mark.thorough
def test_auto_is_chosen_once_for_all_branches_and_controls(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(toy_recipe, tmp_path / "run", monkeypatch, *AUTO)
    assert seen.count("choose unlearn.layer, coefficient") == 1
    assert seen.index("choose unlearn.layer, coefficient") < seen.index("unlearn branch:asia")
    settled = json.loads((tmp_path / "run" / "settled.json").read_text())
    picked = settled["settings"]
    assert picked["layer"] in (1, 2)
    assert picked["coefficient"]["relative"] in (2, 5, 10)
    trials = [each for each in settled["measured"] if "forget" in each]
    assert [each["layer"] for each in trials[:2]] == [1, 2]
    assert len(trials) == 4
    assert [each["block"] for each in settled["measured"] if "block" in each] == [0, 1, 2, 3]
    for job in ("branches/europe", "branches/asia", "controls/joint"):
        info = json.loads((tmp_path / "run" / job / "delta.json").read_text())
        assert info["settings"] == picked
        assert info["notes"] == settled["notes"]
    assert "trials of" in (tmp_path / "run" / "report.html").read_text()
    # What is done is not done again; a branch that is trained later has the same choice.
    assert watched(toy_recipe, tmp_path / "run", monkeypatch, *AUTO)[-1] == "fingerprint the base"
    (tmp_path / "run" / "stamps" / "branch" / "asia.json").unlink()
    seen = watched(toy_recipe, tmp_path / "run", monkeypatch, *AUTO)
    assert [each for each in seen[2:] if isinstance(each, str)] == ["unlearn branch:asia"]
    assert [each for each in seen if not isinstance(each, str)] == [picked["layer"]]


@pytest.mark.thorough
def test_the_same_recipe_settles_the_same(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    def settle(name: str) -> Any:
        [line] = lineups(load_recipe(toy_recipe, AUTO), tmp_path / name)
        inputs = line.inputs
        base = load_base(inputs.base.folder, inputs.recipe.model)
        before = {name: tensor.clone() for name, tensor in base.parameters.items()}
        parts = {part.value: part.samples for part in inputs.parts.parts}
        found = RMU.settle(base, parts, inputs.retain, inputs.recipe.unlearn, 3)
        assert all(torch.equal(before[name], tensor) for name, tensor in base.parameters.items())
        measured = [{key: value for key, value in each.items() if key != "seconds"} for each in found.measured]
        return found.settings, found.notes, measured

    assert settle("one") == settle("two")


@pytest.mark.thorough
def test_auto_leaves_what_is_given_as_it_is(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    spunge.run(load_recipe(toy_recipe, ["unlearn.layer=auto", "unlearn.coefficient=4.5"]), tmp_path / "layer")
    settled = json.loads((tmp_path / "layer" / "settled.json").read_text())
    assert settled["settings"]["coefficient"] == 4.5
    assert {each["coefficient"] for each in settled["measured"] if "forget" in each} == {4.5}
    spunge.run(load_recipe(toy_recipe, ["unlearn.coefficient=auto"]), tmp_path / "coefficient")
    settled = json.loads((tmp_path / "coefficient" / "settled.json").read_text())
    assert {each["layer"] for each in settled["measured"] if "forget" in each} == {2} == {settled["settings"]["layer"]}


def test_auto_outside_a_run_says_so(load: Callable[..., Any]) -> None:
    for setting in ("layer", "coefficient"):
        settings = RMUSettings(**{"layer": 2, "steps": 1, setting: "auto"})
        with pytest.raises(RecipeError, match=rf"unlearn\.{setting}: .*once for a whole run"):
            RMU.unlearn(Task(load(), {"a": FORGET}, RETAIN, {"a": 1}), settings)


def test_of_the_mild_trials_the_one_that_forgets_most_is_picked() -> None:
    trials = [Trial(5, 1.0, 0.5, 0.0, 0), Trial(7, 1.0, 2.0, 0.1, 0), Trial(10, 1.0, 9.0, 0.11, 0)]
    assert best(trials).layer == 7
    harmful = [Trial(5, 1.0, 3.0, 0.4, 0), Trial(7, 1.0, 1.0, 0.2, 0), Trial(9, 1.0, 0.0, math.inf, 0)]
    assert best(harmful).layer == 7
    with pytest.raises(RecipeError, match="every trial went wrong"):
        best(harmful[2:])


def test_trials_are_judged_by_rows_that_they_do_not_train_on() -> None:
    parts = {name: Samples(pa.table({"text": texts(name, count)})) for name, count in (("a", 100), ("b", 20))}
    rows = divided(parts, Samples(pa.table({"text": texts("c", 200)})), 0)
    assert [len(samples) for samples in rows.judged_parts] == [16, 16]
    assert len(rows.parts["a"]) == 84
    assert not set(rows.judged_parts[0].table["text"].to_pylist()) & set(rows.parts["a"].table["text"].to_pylist())
    assert len(rows.parts["b"]) == 20
    assert len(rows.retain) == 168


def test_changes_in_memory_are_laid_over_the_base_and_taken_off(load: Callable[..., Any]) -> None:
    base = load()
    name = "model.layers.1.mlp.down_proj.weight"
    before = base.parameters[name].clone()
    with applied(base.parameters, {name: torch.ones_like(before)}):
        torch.testing.assert_close(base.parameters[name], before + 1)
    assert torch.equal(base.parameters[name], before)


def test_a_branch_stops_once_the_cosine_is_low(load: Callable[..., Any]) -> None:
    settings = RMUSettings(layer=2, steps=200, batch_size=10, learning_rate=0.02, alpha=0.0, min_cosine=0.9)
    branch = RMU.unlearn(Task(load(), {"a": FORGET}, RETAIN, {"a": 1}), settings)
    assert 4 <= branch.steps < 200
    assert branch.stopped is not None
    assert "below 0.9" in branch.stopped
