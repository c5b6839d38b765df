"""What is written of a merge: its dtype, what rounding loses of it and says, and the same values for what is judged in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from making import delta_source, noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.command import merge_command, summary
from spunge.merging.engine import merge
from spunge.merging.outcome import Written, rounding_notes
from spunge.merging.rules import TaskArithmeticSettings, TiesSettings
from spunge.merging.values import merged_values
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.overlay import as_written, moves, overlaid
from spunge.weights.rounding import Storage

SMALL = 2e-4  # of a weight of deviation 1, whose bfloat16 step is about 0.004
HALVES = [torch.bfloat16, torch.float16]


def changed(tmp_path, dtype=torch.bfloat16, size=SMALL, shards=1):
    """A base, and a delta of about `size` times its weights on two of its tensors."""
    base = write_checkpoint(tmp_path / "base", weights(dtype), shards, torch_dtype=str(dtype).removeprefix("torch."))
    changes = {name: noise(i, *weights()[name].shape, size=size) for i, name in enumerate(("a.weight", "b.weight"))}
    return base, delta_source(tmp_path / "delta", base, changes), changes


def sums(base, changes):
    """base + changes, float64, on the changed tensors."""
    return {name: read(base)[name].double() + change.double() for name, change in changes.items()}


def lost(base, out, changes):
    """Norm of written less wanted, over the norm of the change, in float64; and the share that arrives along the change."""
    wanted, got, before = sums(base, changes), read(out), read(base)
    error = sum(float((got[name].double() - wanted[name]).square().sum()) for name in changes)
    along = sum(
        float(((got[name].double() - before[name].double()) * change.double()).sum())
        for name, change in changes.items()
    )
    whole = sum(float(change.double().square().sum()) for change in changes.values())
    return (error / whole) ** 0.5, along / whole


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [SMALL, 1e-2])
def test_the_report_says_what_rounding_loses(tmp_path, dtype, rounding, size):
    base, source, changes = changed(tmp_path, dtype, size)
    report = merge(base, [source], TaskArithmeticSettings(rounding=rounding), tmp_path / "out")
    error, along = lost(base, tmp_path / "out", changes)
    assert report.written.lost == pytest.approx(error, rel=1e-3)
    assert report.written.arrived == pytest.approx(along, rel=1e-3)
    assert report.written.rounding == rounding
    after, before = read(tmp_path / "out"), read(base)
    stayed = {name: float((after[name] == before[name]).double().mean()) for name in changes}
    assert {name: entry.stayed for name, entry in report.tensors.items()} == pytest.approx(stayed, rel=1e-3)
    stored = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert stored["written"] == vars(report.written)


def test_a_change_below_half_a_step_survives_by_default(tmp_path):
    base, source, changes = changed(tmp_path)
    report = merge(base, [source], TaskArithmeticSettings(), tmp_path / "out")
    assert report.written.rounding == "stochastic"
    assert lost(base, tmp_path / "out", changes)[1] == pytest.approx(1, abs=0.35)  # 1,536 entries: a sum over few
    assert read(tmp_path / "out")["a.weight"].dtype == torch.bfloat16
    assert "at random" in report.notes[0]
    merge(base, [source], TaskArithmeticSettings(rounding="nearest"), tmp_path / "nearest")
    assert lost(base, tmp_path / "nearest", changes)[1] < 0.4


@pytest.mark.parametrize(
    ("rounding", "lost", "arrived", "said"),
    [
        ("stochastic", 2.75, 1.0, "so 100% of it arrives"),
        ("stochastic", 0.05, 1.0, ""),
        ("stochastic", 9.0, 0.4, "rounded at random 40% of it arrives, and what is written is not what was merged"),
        (
            "nearest",
            0.83,
            0.449,
            "55% of the change is lost in rounding to bfloat16, and 68% of the changed entries stay",
        ),
        ("nearest", 0.3, 0.95, ""),
    ],
)
def test_a_note_on_rounding_says_whether_the_change_is_lost_and_what_to_do(rounding, lost, arrived, said):
    notes = rounding_notes(Written("bfloat16", rounding, lost, arrived, 0.68))
    assert len(notes) == bool(said)
    assert all(said in note and "float32" in note and "275%" not in note for note in notes)


def test_a_random_rounding_keeps_the_mean_of_many_entries(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.full((600, 500), 0.7).bfloat16()})
    source = delta_source(tmp_path / "delta", base, {"a.weight": torch.full((600, 500), 3e-5)})
    merge(base, [source], TaskArithmeticSettings(), tmp_path / "out")
    change = read(tmp_path / "out")["a.weight"].double() - read(base)["a.weight"].double()
    assert float(change.mean()) == pytest.approx(3e-5, rel=0.06)  # four standard errors


def test_a_change_of_many_steps_is_rounded_to_the_nearest_by_default(tmp_path):
    base, source, changes = changed(tmp_path, size=0.5)
    report = merge(base, [source], TaskArithmeticSettings(), tmp_path / "out")
    assert report.written.rounding == "nearest"
    assert report.notes == []
    for name, wanted in sums(base, changes).items():
        assert torch.equal(read(tmp_path / "out")[name], wanted.float().bfloat16())


def test_what_nearest_loses_is_a_note_in_the_output_and_the_card(tmp_path):
    base, _, _ = changed(tmp_path)
    made = merge_command(
        tmp_path / "out", str(base), [str(tmp_path / "delta")], settings={"rounding": "nearest", "density": 1}
    )
    told = "\n".join(summary(made))
    assert "is lost in rounding to bfloat16" in told
    assert "entries stay as the base has them" in told
    assert "is lost in rounding to bfloat16" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shards", [1, 3])
def test_float32_writes_the_merge_whole(tmp_path, dtype, shards):
    base, source, changes = changed(tmp_path, dtype, shards=shards)
    report = merge(base, [source], TaskArithmeticSettings(dtype="float32"), tmp_path / "out")
    before, after, wanted = read(base), read(tmp_path / "out"), sums(base, changes)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], wanted[name].float() if name in changes else tensor.float())
    assert report.written.lost < 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in after.values())


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_transformers_loads_what_was_written_in_its_dtype(tiny, tmp_path, wanted):
    from transformers import AutoModelForCausalLM

    base = tiny("llama", torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    source = delta_source(tmp_path / "delta", base, {name: noise(0, 32, 48, size=1e-3)})
    merge(base, [source], TaskArithmeticSettings(dtype=wanted, rounding="nearest"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, wanted)
    stored = read(base)
    for key, parameter in model.named_parameters():
        plain = stored[key].float() + (noise(0, 32, 48, size=1e-3) if key == name else 0)
        assert torch.equal(parameter.detach(), plain.to(getattr(torch, wanted)))


def test_tensors_that_the_base_keeps_in_float32_stay_so_in_a_16_bit_merge(tmp_path):
    tensors = {**weights(torch.bfloat16), "router.bias": noise(7, 64)}
    base = write_checkpoint(tmp_path / "base", tensors)
    source = delta_source(tmp_path / "d", base, {"router.bias": noise(8, 64, size=1e-5), "a.weight": noise(9, 24, 32)})
    merge(base, [source], TaskArithmeticSettings(dtype="float16"), tmp_path / "out")
    after = read(tmp_path / "out")
    assert torch.equal(after["router.bias"], tensors["router.bias"] + noise(8, 64, size=1e-5))
    assert {str(after[name].dtype) for name in weights()} == {"torch.float16"}


def test_a_base_too_large_for_the_dtype_is_refused(tmp_path):
    tensors = {**weights(torch.bfloat16), "norm.weight": torch.full((32,), 1e6).bfloat16()}
    base = write_checkpoint(tmp_path / "base", tensors)
    source = delta_source(tmp_path / "d", base, {"a.weight": noise(9, 24, 32)})
    with pytest.raises(RecipeError, match=r"merge.dtype: tensor 'norm.weight' .* float16"):
        merge(base, [source], TaskArithmeticSettings(dtype="float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_of_the_weight_file_and_the_config_survive_a_change_of_dtype(tmp_path):
    base, source, _ = changed(tmp_path)
    save_file(read(base), base / "model.safetensors", metadata={"format": "pt", "note": "ours"})
    config = {"model_type": "toy", "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "depth": 2}}
    (base / "config.json").write_text(json.dumps(config))
    source = delta_source(tmp_path / "d2", base, {"a.weight": noise(9, 24, 32)})
    merge(base, [source], TaskArithmeticSettings(dtype="float32"), tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ours"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {"model_type": "toy", "dtype": "float32", "text_config": {"torch_dtype": "float32", "depth": 2}}
    assert written == wanted


COMBINATIONS = [
    (torch.bfloat16, {"rounding": "nearest"}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"dtype": "float32"}),
    (torch.float16, {"rounding": "stochastic"}),
    (torch.float32, {}),
    (torch.float32, {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("dtype", "values"), COMBINATIONS)
@pytest.mark.parametrize("rule", ["ties", "dare_ties", "average"])
def test_the_values_for_judging_in_memory_are_those_of_the_written_file(tmp_path, dtype, values, rule):
    base, source, _ = changed(tmp_path, dtype)
    other = delta_source(tmp_path / "other", base, {"a.weight": LowRank(noise(4, 4, 32), noise(5, 24, 4), SMALL)})
    chosen = RULES.get(rule).settings(rule=rule, **values)
    merge(base, [source, other], chosen, tmp_path / "out")
    found = dict(merged_values(base, [source, other], chosen))
    for name, tensor in read(tmp_path / "out").items():
        assert torch.equal(found.get(name, read(base)[name]), tensor)
        assert found.get(name, tensor).dtype == tensor.dtype


@pytest.mark.parametrize(("dtype", "values"), COMBINATIONS)
def test_a_branch_is_judged_with_the_values_of_its_written_file(tmp_path, dtype, values):
    base, source, _ = changed(tmp_path, dtype)
    chosen = TaskArithmeticSettings(**values)
    merge(base, [source], chosen, tmp_path / "out")
    found = dict(as_written(Checkpoint(base), [source.delta], Storage(chosen.dtype, chosen.rounding)))
    for name, tensor in read(tmp_path / "out").items():
        assert torch.equal(found.get(name, read(base)[name]), tensor)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(torch.bfloat16, {}), (torch.bfloat16, {"dtype": "float32"}), (torch.float32, {"dtype": "bfloat16"})],
)
def test_a_model_in_float32_is_judged_as_transformers_loads_the_written_file(tiny, tmp_path, dtype, values):
    from transformers import AutoModelForCausalLM

    base = tiny("llama", dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    source = delta_source(tmp_path / "delta", base, {name: noise(0, 32, 48, size=1e-5)})
    chosen = TaskArithmeticSettings(**values)
    merge(base, [source], chosen, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = {key: parameter.data for key, parameter in model.named_parameters()}
    before = {key: value.clone() for key, value in parameters.items()}
    with overlaid(parameters, as_written(Checkpoint(base), [source.delta], Storage(chosen.dtype, chosen.rounding))):
        for key, parameter in written.named_parameters():
            assert torch.equal(parameter.detach(), parameters[key])
    assert all(torch.equal(before[key], value) for key, value in parameters.items())


def test_deltas_laid_one_over_the_other_are_rounded_once(tmp_path):
    base, source, changes = changed(tmp_path)
    deltas = [source.delta] * 40  # each a small part of a step
    found = dict(as_written(Checkpoint(base), deltas, Storage("base", "nearest")))
    for name, change in changes.items():
        total = read(base)[name].float()
        for _ in deltas:
            total = total + change
        assert torch.equal(found[name], total.bfloat16())


def test_values_laid_over_go_when_what_gives_them_fails(tmp_path):
    parameters = {"a": noise(0, 3), "b": noise(1, 3)}
    before = {name: value.clone() for name, value in parameters.items()}

    def values():
        yield "a", torch.zeros(3)
        raise RuntimeError

    with pytest.raises(RuntimeError), overlaid(parameters, values()):
        pass
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("rounding", "dtype", "moved"), [("nearest", "base", False), ("auto", "base", True), ("nearest", "float32", True)]
)
def test_a_delta_that_is_lost_in_rounding_moves_nothing(tmp_path, rounding, dtype, moved):
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.full((60, 50), 0.7).bfloat16()})
    source = delta_source(tmp_path / "delta", base, {"a.weight": torch.full((60, 50), 3e-5)})
    assert moves(Checkpoint(base), source.delta, Storage(dtype, rounding)) is moved


@pytest.mark.parametrize("form", [{"as_delta": True}, {"as_adapter": 2}])
@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"rounding": "nearest"}])
def test_a_dtype_for_a_delta_or_an_adapter_is_refused(tmp_path, form, settings):
    base, _, _ = changed(tmp_path)
    with pytest.raises(RecipeError, match=f"merge.{next(iter(settings))}"):
        merge_command(tmp_path / "out", str(base), [str(tmp_path / "delta")], settings=settings, **form)


def test_one_model_of_another_dtype_in_full_is_that_model(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    own = {name: tensor.float() + noise(i, *tensor.shape) for i, (name, tensor) in enumerate(weights().items())}
    model = write_checkpoint(tmp_path / "m", own)
    merge_command(tmp_path / "out", str(base), [str(model)], settings={"density": 1, "dtype": "float32"})
    assert all(torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], own[name]) for name in own)


def test_a_report_of_the_first_format_is_still_read(tmp_path):
    from spunge.merging.outcome import MergeReport

    base, source, _ = changed(tmp_path)
    content = merge(base, [source], TiesSettings(), tmp_path / "out").to_json()
    older = {key: value for key, value in content.items() if key != "written"}
    older["tensors"] = {
        name: {key: entry[key] for key in ("kept", "conflicts", "before", "after")}
        for name, entry in content["tensors"].items()
    }
    report = MergeReport.from_json({**older, "format": 1})
    assert report.written is None
    assert report.changed == ["a.weight", "b.weight"]
