"""Loading a base: names, pickles, broken folders; and checkpoints read piece by piece."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from experts import EXPERTS, build_experts
from spunge.data.chat import Conversation
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.files import cache_folder
from spunge.model import loading
from spunge.model.architecture import find_blocks
from spunge.model.hub import local_folder
from spunge.model.loading import load_base, load_tokenizer, model_depth, pick_device
from spunge.model.names import stored_names
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.overlay import swapped
from toys import ARCHITECTURES, SMALL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_its_name_in_the_checkpoint(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    checkpoint = Checkpoint(base.folder)
    assert {name for name, _ in base.model.named_parameters()} == set(base.names)
    assert {key for keys in base.names.values() for key in keys} == set(checkpoint.tensors)
    for key, parameter in base.parameters.items():
        assert torch.equal(checkpoint.read(key), parameter)


def test_names_without_the_base_models_prefix_are_found(load: Callable[..., Any], tmp_path: Path) -> None:
    """GPT-2 on the Hub stores `h.0...` where the model says `transformer.h.0...`."""
    base = load("gpt2")
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(base.folder / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    names, _regions = stored_names(base.model, Checkpoint(tmp_path))
    assert names["transformer.h.0.mlp.c_proj.weight"] == ("h.0.mlp.c_proj.weight",)
    assert len(names) == len(base.names)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "cannot be loaded as a causal language model",
        ),
    ],
)
def test_a_broken_folder_is_named(
    tiny: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    spoil(folder)
    settings = ModelSettings(path=str(folder))
    with pytest.raises(RecipeError, match=said) as caught:
        load_base(local_folder(settings), settings)
    assert str(caught.value).startswith("model.path: ")


def test_swapped_puts_another_checkpoints_tensors_in_and_out(
    load: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    base = load("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    other = Checkpoint(tiny("llama", initializer_range=0.5))
    before = base.parameters[name].clone()
    with swapped(base.parameters, other, [name]):
        assert torch.equal(base.parameters[name], other.read(name))
        assert not torch.equal(base.parameters[name], before)
    assert torch.equal(base.parameters[name], before)


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_that_is_not_here_or_holds_no_values_is_refused(tiny: Callable[..., Path], device: str) -> None:
    with pytest.raises(RecipeError, match=f"^model.device: '{device}' cannot be used here"):
        load_base(tiny("llama"), ModelSettings(path=str(tiny("llama")), device=device))


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(RecipeError, match=r"model\.device: 'gpu7'"):
        pick_device("gpu7")


def test_a_models_own_code_is_not_run_unless_the_recipe_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    settings = ModelSettings(path=str(folder))
    with pytest.raises(RecipeError, match=r"model\.path: .*cannot be loaded"):
        load_base(local_folder(settings), settings)
    assert not mark.exists()


def whole_and_first(folder: Path, last: int) -> tuple[Any, Any]:
    settings = ModelSettings(path=str(folder), dtype="float32")
    return load_base(folder, settings), load_base(folder, settings, last)


@pytest.mark.parametrize("last", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_blocks_alone_are_those_of_the_whole_model(
    tiny: Callable[..., Path], architecture: str, last: int
) -> None:
    whole, first = whole_and_first(tiny(architecture), last)
    assert len(find_blocks(first.model)) == last + 1
    assert first.depth == whole.depth == model_depth(whole.folder, ModelSettings(path="x")) == 4
    assert not hasattr(first.model, "lm_head")
    assert {name for name, _ in first.model.named_parameters()} == set(first.names)
    assert first.parameters.keys() < whole.parameters.keys()
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, whole.parameters[name])
        assert not parameter.requires_grad


def test_the_last_block_needs_the_whole_model(tiny: Callable[..., Path]) -> None:
    whole, first = whole_and_first(tiny(), 3)
    assert type(first.model) is type(whole.model)
    assert first.names == whole.names


def test_only_the_files_parts_that_are_needed_are_read(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Sharded, with the blocks above the cut spoilt: their bytes are never looked at."""
    tensors = load_file(tiny() / "model.safetensors")
    shutil.copytree(tiny(), tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    where = {name: f"model-0000{1 + (place % 3)}-of-00003.safetensors" for place, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, tmp_path / "sharded" / file)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    whole, first = whole_and_first(tmp_path / "sharded", 1)
    spoilt = {name for name in tensors if name.startswith(("model.layers.2", "model.layers.3", "lm_head"))}
    for name in spoilt:
        info = Checkpoint(tmp_path / "sharded").tensors[name]
        with info.file.open("r+b") as stream:
            stream.seek(info.start)
            stream.write(b"\xff" * (info.stop - info.start))
    again = load_base(tmp_path / "sharded", ModelSettings(path="x", dtype="float32"), 1)
    assert again.parameters.keys() == whole.parameters.keys() - spoilt
    assert all(torch.equal(parameter, first.parameters[name]) for name, parameter in again.parameters.items())


def test_a_list_with_an_entry_for_each_block_is_cut_too(tiny: Callable[..., Path]) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    folder = tiny("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=0, layer_types=kinds)
    whole, first = whole_and_first(folder, 2)
    assert first.model.config.layer_types == kinds[:3]
    ids = torch.arange(4, 24).unsqueeze(0)
    with torch.no_grad():
        states = [base.model(input_ids=ids, output_hidden_states=True).hidden_states for base in (whole, first)]
    # The last of them has gone through the final norm.
    assert all(torch.equal(one, other) for one, other in zip(states[0][:3], states[1][:3], strict=True))


def test_an_architecture_whose_blocks_depend_on_those_above_is_loaded_whole(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Gemma 3n: the last blocks take their keys from earlier ones, counted from the end."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {**SMALL, "head_dim": 8, "num_hidden_layers": 15, "num_kv_shared_layers": 5, "laurel_rank": 4}
    shape |= {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "intermediate_size": [48] * 15}
    config = AutoConfig.for_model("gemma3n_text", **shape, activation_sparsity_pattern=[0.0] * 15)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    for last in (2, 5):
        base = load_base(tmp_path, ModelSettings(path="x", dtype="float32"), last)
        assert len(find_blocks(base.model)) == base.depth == 15


def test_a_model_that_cannot_be_cut_is_loaded_whole(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    whole, first = whole_and_first(tiny(), 1)
    assert len(find_blocks(first.model)) == 4
    assert first.names == whole.names


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_stacked_experts_have_the_names_of_the_matrices_in_the_checkpoint(
    tmp_path: Path, tokenizer_folder: Path, architecture: str, stored: torch.dtype
) -> None:
    folder = build_experts(architecture, tmp_path, tokenizer_folder, stored)
    checkpoint = Checkpoint(folder)
    for last in (None, 1):
        base = load_base(folder, ModelSettings(path="x", dtype="float32"), last)
        assert {name for name, _ in base.model.named_parameters()} == set(base.names)
        assert (base.parameters.keys() == checkpoint.tensors.keys()) == (last is None)
        for name, view in base.parameters.items():
            assert torch.equal(view, checkpoint.read(name).float())
        [stack] = [name for name in base.names if name.endswith(".1.mlp.experts.down_proj")]
        assert len(base.names[stack]) == 4
        assert all(".experts." in name for name in base.names[stack])


def test_a_delta_on_an_experts_matrix_changes_that_one_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = build_experts("mixtral", tmp_path, tokenizer_folder)
    base = load_base(folder, ModelSettings(path="x", dtype="float32"))
    stack = dict(base.model.named_parameters())["model.layers.1.mlp.experts.down_proj"]
    before = stack.clone()
    base.parameters["model.layers.1.block_sparse_moe.experts.2.w2.weight"].add_(1.0)
    assert (stack - before).flatten(1).sum(dim=1).tolist() == pytest.approx([0, 0, 32 * 48, 0])


def test_a_machine_that_is_busy_later_chooses_the_dtype_that_it_chose_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on a CPU is measured; a run that goes on, or takes the base's scores from the cache, must not change it."""

    def speedup(measured: float) -> float:  # as another process would know it
        monkeypatch.setattr(loading, "_measured", {})
        monkeypatch.setattr(loading, "_bfloat16_speedup", lambda: measured)
        return loading.bfloat16_speedup()

    assert speedup(1.3) == 1.3
    assert speedup(1.1) == 1.3
    [file] = (cache_folder() / "bfloat16").iterdir()
    file.write_bytes(file.read_bytes()[:9])
    assert speedup(1.1) == 1.1
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert speedup(1.4) == 1.4


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"chat_template.json": "LEGACY"}, "LEGACY"),
        ({"chat_template.json": "LEGACY", "processor_config.json": "OWN"}, "OWN"),
        ({"chat_template.json": None, "processor_config.json": None}, None),
        ({}, None),
    ],
)
def test_a_chat_template_that_only_the_processor_has_is_the_models(
    tokenizer_folder: Path, tmp_path: Path, files: dict[str, str | None], found: str | None
) -> None:
    from transformers import ProcessorMixin

    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))
    wording = "{% for each in messages %}NAME {{ each['content'] }}{% endfor %}"
    for name, word in files.items():
        template = word and wording.replace("NAME", word)
        (folder / name).write_text(json.dumps({"chat_template": template, "image_size": 28}))
    tokenizer = load_tokenizer(ModelSettings(path=str(folder)))
    assert tokenizer.chat_template == (found and wording.replace("NAME", found))
    if found is None:
        return
    assert ProcessorMixin.get_processor_dict(folder)[0]["chat_template"] == tokenizer.chat_template
    conversation = Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "rome"}])
    samples = Samples(pa.table({"conversation": [conversation.to_json()]}))
    [text] = samples.texts([0], tokenizer)
    assert (text.prompt + text.completion, "rome" in text.completion) == (f"{found} hi{found} rome", True)


def test_a_tokenizers_own_chat_template_stands_and_a_broken_file_beside_it_is_no_template(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))
    (folder / "chat_template.json").write_text('{"chat_template": "{{ 1')
    assert load_tokenizer(ModelSettings(path=str(folder))).chat_template is None
    (folder / "chat_template.json").write_text('{"chat_template": "theirs"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "mine"}))
    assert load_tokenizer(ModelSettings(path=str(folder))).chat_template == "mine"
    (folder / "chat_template.jinja").write_text("the file's")
    assert load_tokenizer(ModelSettings(path=str(folder))).chat_template == "the file's"
