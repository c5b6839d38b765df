"""Quantised checkpoints in a merge: refused before anything is written, or merged by the values that they stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantising
from spunge.errors import RecipeError
from spunge.merging.command import Merged, merge_command
from spunge.weights.checkpoint import WHOLE, Checkpoint
from spunge.weights.delta import write_delta


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a fine-tune of it, plain and in fp8: `plain-base`, `plain-model`, `fp8-base`, `fp8-model`."""
    root = tmp_path_factory.mktemp("quantised")
    quantising.model("llama", root / "plain-base")
    shutil.copytree(root / "plain-base", root / "plain-model")
    torch.manual_seed(1)
    tensors = load_file(root / "plain-base" / WHOLE)
    tuned = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(tuned, root / "plain-model" / WHOLE, metadata={"format": "pt"})
    for name in ("base", "model"):
        quantising.quantise(root / f"plain-{name}", root / f"fp8-{name}")
    return root


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_of_8_bit_floats_without_scales_is_refused_and_a_model_of_them_merged(
    places: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    shutil.copytree(places / "plain-model", tmp_path / "narrow")
    tensors = load_file(places / "plain-model" / WHOLE)
    tensors = {name: tensor.to(dtype) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "narrow" / WHOLE, metadata={"format": "pt"})
    shutil.copytree(places / "plain-base", tmp_path / "base")
    with pytest.raises(RecipeError, match=r"^--base: .*'lm_head.weight' as float8_e\dm.*save it again"):
        merge_command(tmp_path / "out", str(tmp_path / "narrow"), [str(tmp_path / "base")], rule="average")
    assert not (tmp_path / "out").exists()
    merge_command(tmp_path / "out", str(tmp_path / "base"), [str(tmp_path / "narrow")], rule="average")
    got = load_file(tmp_path / "out" / WHOLE)
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in tensors.items())


PAIRS = [("fp8-base", "plain-model"), ("plain-base", "fp8-model"), ("fp8-base", "fp8-model")]


def merged(places: Path, out: Path, base: str, model: str, **values: Any) -> Merged:
    return merge_command(
        out, str(places / base), [str(places / model)], rule="task_arithmetic", settings={"scale": 0.5}, **values
    )


@pytest.mark.parametrize(("base", "model"), PAIRS)
@pytest.mark.parametrize("said", [True, False], ids=["its configuration says so", "its tensors alone"])
def test_a_quantised_checkpoint_is_refused_before_anything_is_written(
    places: Path, tmp_path: Path, base: str, model: str, said: bool
) -> None:
    for name in (base, model):
        shutil.copytree(places / name, tmp_path / "given" / name)
        if not said:
            config = json.loads((tmp_path / "given" / name / "config.json").read_text())
            config.pop("quantization_config", None)
            (tmp_path / "given" / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "to").mkdir()
    for form in ({}, {"as_delta": True}, {"as_adapter": 2}):
        with pytest.raises(
            RecipeError, match=r"^--(base|model): .* is quantised \(fp8.*give the unquantised model"
        ) as caught:
            merged(tmp_path / "given", tmp_path / "to" / "out", base, model, **form)
        assert ("--dequantize" in str(caught.value)) == said
        assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize(("base", "model"), PAIRS)
def test_where_it_is_asked_for_the_values_of_a_quantised_checkpoint_are_merged(
    places: Path, tmp_path: Path, base: str, model: str
) -> None:
    done = merged(places, tmp_path / "out", base, model, dequantize=True)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(places / name, dtype=torch.bfloat16).state_dict()
        for name in (base, model)
    )
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in got.items():
        expected = before[name].double() + 0.5 * (after[name].double() - before[name].double())
        assert float((tensor.double() - expected).norm() / expected.norm()) < 3e-3, name  # bfloat16's rounding
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    noted = [note for note in done.notes if "is quantised (fp8, says its config.json): its values were taken" in note]
    assert len(noted) == [base, model].count("fp8-base") + [base, model].count("fp8-model")
    assert set(noted) <= set(json.loads((tmp_path / "out" / "merge.json").read_text())["notes"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {base}, merged" in card
    assert card.count("is quantised") == len(noted)


def test_a_delta_of_a_dequantised_base_fits_that_base_again(places: Path, tmp_path: Path) -> None:
    merged(places, tmp_path / "delta", "fp8-base", "plain-model", dequantize=True, as_delta=True)
    again = merge_command(
        tmp_path / "again", str(places / "fp8-base"), [str(tmp_path / "delta")], rule="average", dequantize=True
    )
    assert again.report is not None
    merged(places, tmp_path / "once", "fp8-base", "plain-model", dequantize=True)
    assert Checkpoint(tmp_path / "again").fingerprint() == Checkpoint(tmp_path / "once").fingerprint()


def test_an_interrupted_conversion_leaves_nothing(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spunge.model.conversion._convert", fail)
    with pytest.raises(KeyboardInterrupt):
        merged(places, tmp_path / "out", "fp8-base", "plain-model", dequantize=True)
    assert list(tmp_path.iterdir()) == []


def test_a_delta_that_holds_integers_is_refused(places: Path, tmp_path: Path) -> None:
    base = Checkpoint(places / "plain-base")
    write_delta(tmp_path / "d", {"model.norm.weight": torch.ones(64)}, {"base": base.fingerprint()})
    save_file({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, tmp_path / "d" / "delta.safetensors")
    with pytest.raises(RecipeError, match=r"^--model: .*stored as torch\.int8"):
        merge_command(tmp_path / "out", str(base.folder), [str(tmp_path / "d")])


def test_pickled_checkpoints_are_merged_where_that_is_allowed(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "plain-model", tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / WHOLE), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / WHOLE).unlink()
    for name in ("plain-base", "plain-model"):
        (tmp_path / name).symlink_to(places / name)
    with pytest.raises(RecipeError, match=r"^--model: .*pickled weights alone.*--allow-pickle"):
        merged(tmp_path, tmp_path / "out", "plain-base", "pickled")
    merged(tmp_path, tmp_path / "out", "plain-base", "pickled", allow_pickle=True)
    merged(tmp_path, tmp_path / "once", "plain-base", "plain-model")
    assert Checkpoint(tmp_path / "out").fingerprint() == Checkpoint(tmp_path / "once").fingerprint()
