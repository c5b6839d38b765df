"""A merged folder is loaded by transformers to what was merged, whatever lies in the base's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from making import noise
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.merging.engine import merge
from spunge.merging.folder import check_folder
from spunge.merging.rules import AverageSettings
from spunge.weights.checkpoint import INDEX, WHOLE, Checkpoint
from spunge.weights.opening import open_source

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder: Path, seed: int = 0, shards: bool = False) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY, initializer_range=0.5))
    model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not getattr(model, "_hf_peft_config_loaded", False)
    return model.state_dict()


def merged(base: Path, out: Path, other: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors as transformers loads them, and they are the other model's: an average of one is that one."""
    report = merge(base, [open_source(other, base)], AverageSettings(), out, replace=True)
    assert (
        report.checked
        == f"transformers loads the {len(Checkpoint(out).tensors)} merged and copied tensors as LlamaForCausalLM"
    )
    tensors = loaded(out)
    for name, tensor in loaded(other).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)
    return tensors


def stale_index(folder: Path) -> None:
    for file in save(folder.with_name("older"), seed=5, shards=True).glob("model*"):
        (folder / file.name).write_bytes(file.read_bytes())


def pickled_index(folder: Path) -> None:
    torch.save(load_file(save(folder.with_name("older"), seed=5) / WHOLE), folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')


def adapters_weights(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder / "lora")
    (folder / "adapter_model.safetensors").write_bytes((folder / "lora" / "adapter_model.safetensors").read_bytes())


def write(name: str, content: str = "{}") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


LITTER: dict[str, Callable[[Path], Any]] = {
    "an older model's index and shards": stale_index,
    "pickled weights and their index": pickled_index,
    "an index of a variant": write("model.safetensors.index.fp16.json", '{"weight_map": {"a": "b"}}'),
    "an adapter's weights, and an adapter in a folder": adapters_weights,
    "a consolidated file": lambda folder: save_file({"tok": torch.ones(2)}, folder / "consolidated.safetensors"),
    "a description of a delta": write("delta.json", '{"format": 1, "tensors": {}}'),
    "what another tool quantised": write("quantize_config.json", '{"bits": 4}'),
    "a merge's report": write("merge.json", '{"key": 1}'),
    "a file of optimizer states": lambda folder: (folder / "optimizer.pt").write_bytes(b"x"),
}


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("litter", LITTER)
def test_nothing_in_the_bases_folder_stands_in_the_way_of_the_merge(tmp_path: Path, litter: str, shards: bool) -> None:
    base = save(tmp_path / "base", shards=shards)
    if not (shards and litter.startswith("an older")):  # that would be the model's own index
        LITTER[litter](base)
    other = save(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    merged(base, out, other)
    weights = {file.name for file in out.rglob("*") if file.name.endswith((".safetensors", ".bin", ".pt"))}
    assert weights == {file.name for file in Checkpoint(base).files}
    assert (out / INDEX).exists() == shards
    assert not list(out.rglob("adapter_config.json"))


def test_what_goes_with_a_model_is_copied(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    kept = [
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "LICENSE",
        "preprocessor_config.json",
    ]
    kept += ["additional_chat_templates/tools.jinja", "generation_config.json", "config.json", "tekken.json"]
    code = {
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}',
        "tokenization_mine.py": "from .pieces import split\nfrom .parts.inner import all\nFILES = {'words': 'my_words.dat'}",
        "pieces.py": "import .deeper\n",
        "deeper.py": "",
        "parts/inner.py": "from .next import one",
        "parts/next.py": "",
        "my_words.dat": "a b c",
    }
    for name, text in code.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    for name in (kept := [*kept, *code]):
        (base / name).parent.mkdir(exist_ok=True)
        if not (base / name).exists():
            (base / name).write_text(name)
    merged(base, tmp_path / "out", other)
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


OF_A_RUN = [
    "latest",
    "zero_to_fp32.py",
    "global_step500/mp_rank_00_model_states.pt",
    "trainer_state.json",
    "optimizer.pt",
]
OF_A_RUN += [
    "rng_state.pth",
    "rng_state_0.pth",
    "scheduler.pt",
    "training_args.bin",
    "events.out.tfevents.1.host",
    "train.log",
]
OF_A_RUN += ["runs/Nov26/events.out.tfevents.1.host", "all_results.json", "train_results.json", "wandb/run/config.yaml"]
OF_A_RUN += [
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "train.py",
    "axolotl.yaml",
    "tokenizer.pt",
]
OF_A_RUN += [
    "mergekit_config.yml",
    "eval/results.json",
    "debug.txt",
    "dataset.jsonl",
    "adapter_config.json.bak",
    ".hidden.jinja",
]


def test_what_a_training_run_left_is_not_copied(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    for name in OF_A_RUN:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    merged(base, tmp_path / "out", other)
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there == {"config.json", "generation_config.json", "model.safetensors", "merge.json", "README.md"}


@pytest.mark.parametrize("index", ["as it is", "without metadata", "with another map"])
def test_the_index_names_each_tensor_in_the_file_that_holds_it(tmp_path: Path, index: str) -> None:
    base, other = save(tmp_path / "base", shards=True), save(tmp_path / "other", seed=1)
    content = json.loads((base / INDEX).read_text())
    files = sorted({*content["weight_map"].values()})
    if index == "without metadata":
        del content["metadata"]
    elif index == "with another map":
        content["weight_map"] = {f"no.tensor.{number}": file for number, file in enumerate(files)}
    (base / INDEX).write_text(json.dumps(content))
    merged(base, tmp_path / "out", other)
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    held = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert written["weight_map"] == held
    sizes = [tensor.nbytes for file in files for tensor in load_file(tmp_path / "out" / file).values()]
    assert written["metadata"]["total_size"] == sum(sizes)


def test_shards_in_a_folder_of_their_own_are_written_into_one(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base", shards=True), save(tmp_path / "other", seed=1)
    content = json.loads((base / INDEX).read_text())
    files = sorted({*content["weight_map"].values()})
    (base / "weights").mkdir()
    for number, file in enumerate(files):  # two folders may hold files of the same name
        (base / "weights" / str(number)).mkdir()
        (base / file).rename(base / "weights" / str(number) / "model.safetensors")
    places = {file: f"weights/{number}/model.safetensors" for number, file in enumerate(files)}
    content["weight_map"] = {name: places[file] for name, file in content["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(content))
    merged(base, tmp_path / "out", other)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == content["weight_map"]


def test_of_a_name_that_two_shards_hold_the_copy_that_transformers_loads_is_merged(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base", shards=True), save(tmp_path / "other", seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    for file in Checkpoint(base).files:
        save_file({**load_file(file), name: noise(1, 24, 16)}, file, metadata={"format": "pt"})
    merged(base, tmp_path / "out", other)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"][name] == Checkpoint(base).files[-1].name


def test_a_folder_that_transformers_would_load_otherwise_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", shards=True)
    wanted = Checkpoint(folder).tensors
    assert "LlamaForCausalLM" in check_folder(folder, folder, wanted)
    same_names = (save(tmp_path / "other", seed=1) / WHOLE).read_bytes()
    for content in (same_names, b""):
        (folder / WHOLE).write_bytes(content)
        with pytest.raises(RecipeError, match=r"^--out: "):
            check_folder(folder, folder, wanted)
    (folder / WHOLE).unlink()
    with pytest.raises(RecipeError, match=r"would not be loaded as it was merged: 'model\.norm\.weight' would be"):
        check_folder(folder, folder, {**wanted, "model.norm.weight": wanted["lm_head.weight"]})


def test_a_configuration_that_has_the_tensors_rounded_on_loading_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert loaded(folder)["lm_head.weight"].dtype == torch.bfloat16
    said = check_folder(folder, folder, Checkpoint(folder).tensors)
    assert said.endswith("in bfloat16 as config.json says; that rounds them, for they are stored in float32")


def test_a_base_that_does_not_fit_its_configuration_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    for folder in (base, other):
        tensors = load_file(folder / WHOLE)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"^--base: .* lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        merge(base, [open_source(other, base)], AverageSettings(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_links_in_the_bases_folder_are_copied_as_files_and_nothing_is_written_through_them(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (WHOLE, "config.json", "generation_config.json"):
        (base / name).rename(outside / name)
        (base / name).symlink_to(outside / name)
    (base / "linked").symlink_to(outside, target_is_directory=True)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    merged(base, tmp_path / "out", other)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_link_for_a_folder_keeps_being_one(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    merged(base, tmp_path / "out", other)
    third = open_source(save(tmp_path / "third", seed=2), base)
    merge(base, [third], AverageSettings(), tmp_path / "out", replace=True)
    assert (tmp_path / "out").is_symlink()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"out"}


def test_a_merge_into_a_folder_of_its_base_does_not_copy_the_one_before(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    for seed in (1, 2):
        merged(base, base / "merged", save(tmp_path / f"other-{seed}", seed=seed))
        assert not (base / "merged" / "merged").exists()
    assert other.exists()


@pytest.mark.parametrize("place", ["base", "other", "."])
def test_a_folder_that_the_merge_reads_is_not_replaced(tmp_path: Path, place: str) -> None:
    base, other = save(tmp_path / "base"), save(tmp_path / "other", seed=1)
    for folder in (base, other, tmp_path):
        (folder / "merge.json").write_text("{}")  # as an earlier merge would have left it
    with pytest.raises(RecipeError, match=r"--out: .* which the merge reads"):
        merge_command(tmp_path / place, str(base), [str(other)])
    assert (base / WHOLE).exists()
    assert (other / WHOLE).exists()
