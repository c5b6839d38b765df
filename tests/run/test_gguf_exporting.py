"""A run's models as GGUF files: each stage's own values, and what is refused before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spunge
from byte_level import bpe
from commands import call
from spunge.errors import RecipeError
from spunge.run import gguf_exporting
from spunge.run.asking import Asking
from spunge.run.gguf_exporting import export_gguf
from spunge.weights.gguf_model import Model

pytest.importorskip("gguf")


@pytest.fixture
def wrote(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """The models that were to be written, by the name in the file. The tiny run's tokenizer is none of llama.cpp's."""
    models: dict[str, Model] = {}

    def write(file: Path, model: Model, kind: str, name: str) -> str:
        file.write_text(kind)
        models[name] = model
        return kind

    monkeypatch.setattr(gguf_exporting, "write_gguf", write)
    return models


@pytest.mark.parametrize("stage", ["merged", "base", "control:joint"])
def test_the_values_are_those_of_the_stage_that_is_judged(
    stage: str, finished: Path, wrote: dict[str, Model], tmp_path: Path
) -> None:
    export_gguf(finished, tmp_path / "it.gguf", stage)
    (model,) = wrote.values()
    asking = Asking(finished, [stage])
    shown = asking._session.show(None if stage == "base" else asking.models[0])
    for name in model.stored:
        torch.testing.assert_close(model.read(name), shown.parameters[name].to(model.read(name).dtype), rtol=0, atol=0)
    asking.close()


def test_the_file_is_named_after_the_run_the_stage_and_the_type(
    finished: Path, wrote: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = export_gguf(finished, stage="control:joint", kind="q8_0")
    assert exported.file == Path(f"{finished.name}-control-joint-q8_0.gguf")
    assert exported.file.read_text() == "q8_0"
    assert export_gguf(finished).type == "f32"  # as it is stored
    with pytest.raises(RecipeError, match=r"--out: .* is there; give another, or remove it"):
        export_gguf(finished)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stage": "branch:none"}, "--stage: 'branch:none' is no model of this run; finished are base, "),
        ({"kind": "q4_k"}, "--type: 'q4_k' is none of auto, f32, f16, bf16, q8_0"),
        ({}, "tokenizer is WordPiece; only bytes-level BPE is written"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    given: dict[str, Any], message: str, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        export_gguf(finished, tmp_path / "out" / "it.gguf", **given)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "--out: missing; give the folder to write, or --gguf"), (["--type", "f16"], "--type: goes with")],
)
def test_without_the_format_the_command_says_what_is_missing(options: list[str], message: str, finished: Path) -> None:
    ended = call("export", str(finished), *options)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_a_run_that_shifts_a_larger_model_as_it_decodes_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = SimpleNamespace(decode=object())
    monkeypatch.setattr(gguf_exporting, "run_recipe", lambda _: recipe)
    with pytest.raises(RecipeError, match="unlearned while a larger model decodes, which a GGUF file cannot hold"):
        export_gguf(finished)


@pytest.mark.thorough
def test_the_command_writes_the_merged_model_as_transformers_reads_it_again(
    tiny: Callable[..., Path], toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bpe(Path(shutil.copytree(tiny("llama", vocab_size=384, num_hidden_layers=2), tmp_path / "base")))
    unlearn = {"method": "npo", "steps": 2, "batch_size": 2, "learning_rate": 0.01}
    spunge.run({**toy_recipe, "model": {"path": str(base)}, "unlearn": unlearn, "evaluate": []}, tmp_path / "run")
    ended = call("export", str(tmp_path / "run"), "--gguf", "--out", str(tmp_path / "out/model.gguf"), "--type", "q8_0")
    assert ended.returncode == 0, ended.stderr
    assert "merged in q8_0" in ended.stdout
    assert "can bring back what was forgotten" in ended.stdout
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)(ids).logits
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
        assert float((read(ids).logits - kept).norm() / kept.norm()) < 0.03
    own, tokenizer = (
        AutoTokenizer.from_pretrained(folder, **more)
        for folder, more in ((base, {}), (tmp_path / "out", {"gguf_file": "model.gguf"}))
    )
    assert tokenizer.encode("the capital of France", add_special_tokens=False) == own.encode("the capital of France")
