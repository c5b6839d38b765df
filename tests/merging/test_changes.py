"""Only what a model really changed counts: the same merge from checkpoints, frozen tensors and all, as from deltas."""

import pytest
import torch

from making import delta_source, noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.merging.engine import merge
from spunge.merging.rules import AverageSettings, TiesSettings
from spunge.registry import RULES
from spunge.weights.delta import LowRank
from spunge.weights.opening import open_source
from spunge.weights.sources import AdapterSource

FROZEN = ("embed.weight", "norm.weight")
TRAINED = ("a.weight", "b.weight")


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def forms(request, tmp_path):
    """A base, and three fine-tunes that leave a part of it alone: as checkpoints, and as float32 deltas."""
    base = write_checkpoint(tmp_path / "base", weights(request.param))
    plain = read(base)
    checkpoints, deltas = [], []
    for i in range(3):
        trained = {
            name: (plain[name] + noise(40 + 10 * i + j, *plain[name].shape, size=0.05)).to(request.param)
            for j, name in enumerate(TRAINED)
        }
        checkpoints.append(open_source(write_checkpoint(tmp_path / f"m{i}", {**plain, **trained}), base))
        changes = {name: trained[name].float() - plain[name].float() for name in TRAINED}
        deltas.append(delta_source(tmp_path / f"d{i}", base, changes))
    return base, checkpoints, deltas


@pytest.mark.parametrize("scope", ["changed", "model", "tensor"])
def test_checkpoints_and_deltas_of_the_same_models_give_the_same_merge(forms, tmp_path, scope):
    base, checkpoints, deltas = forms
    chosen = TiesSettings(density=0.2, scope=scope)
    for name, sources in (("checkpoints", checkpoints), ("deltas", deltas), ("turned", checkpoints[::-1])):
        report = merge(base, sources, chosen, tmp_path / name, weights=[1, 1, 1])
        assert report.changed == list(TRAINED)
    wanted = (tmp_path / "deltas" / "model.safetensors").read_bytes()
    assert (tmp_path / "checkpoints" / "model.safetensors").read_bytes() == wanted
    assert (tmp_path / "turned" / "model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties", "della", "sce", "average", "breadcrumbs", "consensus"])
def test_every_rule_takes_checkpoints_for_the_deltas_they_are(forms, tmp_path, rule):
    base, checkpoints, deltas = forms
    chosen = RULES.get(rule).settings(rule=rule)
    merge(base, checkpoints, chosen, tmp_path / "checkpoints", weights=[1, 0.5, 2])
    merge(base, deltas, chosen, tmp_path / "deltas", weights=[1, 0.5, 2])
    assert (tmp_path / "checkpoints" / "model.safetensors").read_bytes() == (
        tmp_path / "deltas" / "model.safetensors"
    ).read_bytes()


def test_a_sparse_delta_is_the_same_model_as_the_dense_one(forms, tmp_path):
    base, checkpoints, deltas = forms
    for place, source in enumerate(checkpoints):
        merge_command(tmp_path / f"s{place}", str(base), [str(source.checkpoint.folder)], rule="average", as_delta=True)
    sparse = [open_source(tmp_path / f"s{place}", base) for place in range(3)]
    assert [source.fingerprint for source in sparse] == [source.fingerprint for source in deltas]


def test_the_density_counts_over_the_tensors_that_some_model_changed(forms, tmp_path):
    base, checkpoints, _ = forms
    merge(base, checkpoints, TiesSettings(density=0.3), tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    changes = [
        {name: read(source.checkpoint.folder)[name].float() - before[name].float() for name in TRAINED}
        for source in checkpoints
    ]
    flat = torch.stack([torch.cat([change[name].flatten() for name in TRAINED]) for change in changes])
    cuts = flat.abs().sort(dim=1, descending=True).values[:, int(0.3 * flat.shape[1]) - 1].unsqueeze(1)
    kept = flat * (flat.abs() >= cuts)
    sign = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = kept * sign > 0
    merged = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    wanted = (torch.cat([before[name].float().flatten() for name in TRAINED]) + merged).to(before["a.weight"].dtype)
    got = torch.cat([after[name].flatten() for name in TRAINED])
    assert float((got != wanted).double().mean()) < 2e-3  # sums in another order, where they lie at a rounding's edge


def test_a_model_in_a_wider_dtype_has_not_changed_what_is_equal_in_it(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    wide = {name: tensor.float() for name, tensor in weights().items()}
    wide["b.weight"] = wide["b.weight"] + 0.25
    model = open_source(write_checkpoint(tmp_path / "m", wide), base)
    assert merge(base, [model], AverageSettings(), tmp_path / "out").changed == ["b.weight"]


def test_a_change_in_the_last_entry_alone_is_a_change(tmp_path):
    tensors = {"large.weight": noise(0, 1500, 1000).bfloat16(), "other.weight": noise(1, 8)}
    base = write_checkpoint(tmp_path / "base", tensors)
    tensors["large.weight"][-1, -1] += 1
    model = open_source(write_checkpoint(tmp_path / "m", tensors), base)
    report = merge(base, [model], AverageSettings(), tmp_path / "out")
    assert report.changed == ["large.weight"]
    assert torch.equal(read(tmp_path / "out")["large.weight"], tensors["large.weight"])


def test_an_adapter_counts_where_it_changes_something(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights(torch.float32))
    trained = LowRank(noise(0, 4, 32), noise(1, 24, 4), 0.1)
    untrained = LowRank(noise(2, 4, 24), torch.zeros(32, 4), 0.1)  # as peft begins
    whole = {"embed.weight": weights(torch.float32)["embed.weight"]}  # stored beside an adapted one, unchanged
    source = AdapterSource("adapter", "ab" * 32, {"a.weight": trained, "b.weight": untrained}, whole)
    report = merge(base, [source], TiesSettings(density=0.5), tmp_path / "out")
    assert report.changed == ["a.weight"]
    assert report.tensors["a.weight"].kept == [pytest.approx(0.5, abs=0.002)]


def test_a_model_that_is_the_base_is_remarked_on(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    model = open_source(write_checkpoint(tmp_path / "same", weights()), base)
    report = merge(base, [model], TiesSettings(), tmp_path / "out")
    assert report.changed == []
    assert report.notes == ["'same' has the base's own weights"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    other = write_checkpoint(tmp_path / "other", weights(seed=9))
    with pytest.raises(RecipeError, match="or nothing of it is kept"):
        merge_command(tmp_path / "delta", str(base), [str(other)], rule="average", settings={"scale": 0}, as_delta=True)
    with pytest.raises(RecipeError, match="no model differs from the base"):
        merge_command(tmp_path / "delta", str(base), [str(tmp_path / "same")], as_delta=True)


def test_nan_that_the_base_and_a_model_share_is_refused(tmp_path):
    tensors = weights()
    tensors["b.weight"][0, 0] = float("nan")
    base = write_checkpoint(tmp_path / "base", tensors)
    model = open_source(write_checkpoint(tmp_path / "m", {**tensors, "a.weight": tensors["a.weight"] + 1}), base)
    with pytest.raises(RecipeError, match=r"^--base: tensor 'b.weight' of the base holds NaN"):
        merge(base, [model], AverageSettings(), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"^model.path: tensor 'b.weight' of the base holds NaN"):
        merge(base, [model], AverageSettings(), tmp_path / "out", setting="model.path")


def test_the_card_counts_the_tensors_that_changed(forms, tmp_path):
    base, checkpoints, _ = forms
    merge(base, checkpoints, TiesSettings(), tmp_path / "out")
    assert "changed 2 tensors" in (tmp_path / "out" / "README.md").read_text()
