"""`spunge merge` as a function: the three forms of output, and one-line errors."""

import pytest
import torch
import yaml

from making import delta_source, noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.weights.card import base_identifier
from spunge.weights.delta import Sparse, open_delta


@pytest.fixture
def places(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    for i in range(2):
        delta_source(tmp_path / f"d{i}", base, {"a.weight": noise(i, 24, 32, size=0.01)})
    return str(base), [str(tmp_path / "d0"), str(tmp_path / "d1")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": {"density": 1.5}}, "merge.density: 1.5"),
        ({"settings": {"gamma": 1}}, "merge.gamma: no such setting; known: rule, dtype, rounding, density"),
        ({"settings": {"scope": "layer"}}, "merge.scope: 'layer'"),
        ({"settings": {"density": [0.2, 0.3]}}, "merge.density: 2 values for 1 models"),
        ({"weights": [1.0, 2.0]}, "--weight: 2 weights for 1 models"),
        ({"weights": [float("nan")]}, "--weight"),
        ({"as_adapter": 0}, "--as-adapter: 0 is no rank"),
        ({"as_adapter": 1, "as_delta": True}, "--as-delta"),
    ],
)
def test_a_wrong_call_names_the_setting(places, tmp_path, given, said):
    base, models = places
    with pytest.raises(RecipeError) as error:
        merge_command(tmp_path / "out", base, models[:1], **given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mergekit_file_gives_the_same_as_the_options(places, tmp_path):
    base, models = places
    entries = [{"model": model, "parameters": {"weight": 0.5, "density": 0.3}} for model in models]
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": base, "models": entries}))
    merge_command(tmp_path / "a", mergekit=file)
    merge_command(tmp_path / "b", base, models, settings={"density": 0.3, "scope": "tensor"}, weights=[0.5, 0.5])
    assert torch.equal(read(tmp_path / "a")["a.weight"], read(tmp_path / "b")["a.weight"])
    with pytest.raises(RecipeError, match="--mergekit"):
        merge_command(tmp_path / "c", base, models, mergekit=file)


def test_a_sparse_delta_holds_the_merge_exactly(places, tmp_path):
    base, models = places
    merge_command(tmp_path / "whole", base, models)
    made = merge_command(tmp_path / "delta", base, models, as_delta=True)
    assert made.kind == "delta"
    assert open_delta(tmp_path / "delta").tensors["a.weight"]["kind"] == "sparse"
    merge_command(tmp_path / "again", base, [str(tmp_path / "delta")], settings={"density": 1.0})
    assert torch.equal(read(tmp_path / "whole")["a.weight"], read(tmp_path / "again")["a.weight"])


@pytest.mark.parametrize("form", [{"as_delta": True}, {"as_adapter": 2}])
def test_an_adapter_or_delta_appears_whole_or_not_at_all(tiny, tmp_path, monkeypatch, form):
    import peft

    import spunge.weights.delta

    def fail(*args, **kwargs):
        raise RuntimeError("killed")

    base, out = str(tiny("llama")), tmp_path / "out"
    delta_source(tmp_path / "d", tiny("llama"), {"model.layers.1.mlp.down_proj.weight": noise(0, 32, 48)})
    models = [str(tmp_path / "d")]
    with monkeypatch.context() as patch:
        patch.setattr(spunge.weights.delta, "write_json", fail)  # the last file that either writes
        patch.setattr(peft.LoraConfig, "save_pretrained", fail)
        with pytest.raises(RuntimeError, match="killed"):
            merge_command(out, base, models, **form)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    out.mkdir()
    merge_command(out, base, models, **form)
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}


def test_sparse_is_exact_for_any_pattern():
    dense = noise(0, 7, 13) * (noise(1, 7, 13) > 0.5)
    sparse = Sparse.of(dense)
    assert torch.equal(sparse.dense(), dense)
    for start, stop in ((0, 1), (3, 9), (8, 16), (13, 77), (90, 91)):
        assert torch.equal(sparse.entries(start, stop), dense.flatten()[start:stop])


def test_the_model_card_loads_in_the_hubs_format(places, tmp_path):
    from huggingface_hub import ModelCard

    base, models = places
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nold text")
    report = merge_command(tmp_path / "out", base, models).report
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == ["base"]
    assert card.data.license == "apache-2.0"
    assert {"merge", "spunge", "ties"} <= set(card.data.tags)
    assert "old text" not in text
    assert str(tmp_path) not in text
    for source in report.sources:
        assert source.label in text
        assert source.fingerprint[:16] in text


def test_a_base_from_the_hub_is_named_by_its_id(tmp_path):
    cached = tmp_path / "models--owner--name" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert base_identifier(cached) == "owner/name"
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/other"}')
    assert base_identifier(tmp_path) == "owner/other"
