"""A model that is laid over several devices to be judged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from picked import few
from spunge.data.samples import Text, encode
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.likelihood import token_logs
from spunge.model import placing
from spunge.model.architecture import find_blocks
from spunge.model.loading import Base, device_map_of, load_base
from spunge.model.placing import devices_of, dispatched, laid_out, settle_on
from spunge.progress import SILENT
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.weights.overlay import overlaid
from toys import ARCHITECTURES, texts

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny: Callable[..., Path]) -> Callable[..., Base]:
    def load(**changes: Any) -> Base:
        folder = tiny("llama", **changes)
        return load_base(folder, ModelSettings(path=str(folder), dtype="float32", device="cpu"))

    return load


def offloaded(model: Any) -> dict[str, str]:
    """Every second block and the output layer come to the CPU for each forward, as a GPU's do from the machine's memory."""
    blocks = {id(block): number for number, block in enumerate(find_blocks(model))}
    names = {name: blocks[id(each)] for name, each in model.named_modules() if id(each) in blocks}
    prefix = next(iter(names)).rsplit(".layers", 1)[0]
    others = [f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children() if name != "layers"]
    return {
        **dict.fromkeys([*others, "lm_head"], "disk"),
        **{name: ("cpu", "disk")[at % 2] for name, at in names.items()},
    }


def judged(base: Base, folder: Path) -> tuple[list[Any], list[list[str]]]:
    """Log-probabilities of texts and completions of prompts."""
    coded = [encode(Text("", text), base.tokenizer, 64) for text in texts("asia", 6)]
    bench = Bench("base", "m", folder, folder)
    folder.mkdir()
    written = completions(base, texts("europe", 5), GenerationSettings(max_new_tokens=8), bench)
    return [each.tolist() for each in token_logs(base, coded, SILENT.step)], written


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_not_held_whole_is_judged_to_the_bit_as_one_that_is(
    base: Callable[..., Base], tied: bool, tmp_path: Path
) -> None:
    model = base(tie_word_embeddings=tied)
    own = dict(model.model.named_parameters(remove_duplicate=False))
    before = {name: value.clone() for name, value in own.items()}
    changed = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.parameters.items()}
    plain = judged(model, tmp_path / "plain")
    with overlaid(model.parameters, changed.items()):
        whole = judged(model, tmp_path / "whole")
        with dispatched(model.model, offloaded(model.model), CPU):
            assert any(each.is_meta for each in model.model.parameters())
            with pytest.raises(RuntimeError, match="several devices"):
                model.parameters  # noqa: B018 - a value written there would be lost
            assert judged(model, tmp_path / "spread") == whole != plain
        assert judged(model, tmp_path / "after") == whole
    for name, value in model.model.named_parameters(remove_duplicate=False):
        assert value is own[name]
        assert torch.equal(value, before[name])
    assert judged(model, tmp_path / "again") == plain
    assert not hasattr(model.model, "hf_device_map")


def over_two(model: Any, one: torch.device, other: torch.device) -> dict[str, torch.device]:
    """The second half of the blocks, and what comes after them, on another device."""
    names = {id(each): name for name, each in model.named_modules()}
    blocks = [names[id(block)] for block in find_blocks(model)]
    parent = model.get_submodule(blocks[0].rpartition(".")[0].rpartition(".")[0])
    others = [names[id(each)] for name, each in parent.named_children() if id(find_blocks(model)) != id(each)]
    halves = {name: (one, other)[2 * at >= len(blocks)] for at, name in enumerate(blocks)}
    return {**{name: other if name.endswith(("norm", "ln_f")) else one for name in others}, **halves}


@pytest.mark.parametrize("architecture", few(ARCHITECTURES, 0))
def test_the_blocks_of_a_model_for_training_meet_no_tensor_of_another_device(
    tiny: Callable[..., Path], architecture: str
) -> None:
    """`meta` is a device whose tensors hold no values; torch refuses to let them meet the CPU's."""
    model = AutoModel.from_pretrained(tiny(architecture)).eval()
    devices = over_two(model, CPU, torch.device("meta"))
    ids = torch.ones(2, 5, dtype=torch.long)
    for name in (name for name, where in devices.items() if where.type == "meta"):
        model.get_submodule(name).to("meta")  # a parameter on the CPU cannot be given such data
    assert settle_on(model, devices) == CPU
    last = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    assert last.device.type == "meta"
    for block in find_blocks(model):
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def test_what_the_gpus_do_not_hold_is_not_trained(base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    assert laid_out(model) is model
    monkeypatch.setattr(placing, "devices_of", lambda model, device_map: {"model": 0, "lm_head": "cpu"})
    with pytest.raises(
        RecipeError, match=r"^model.device_map: auto: the GPUs do not hold the \d+ blocks .* unlearn.layer$"
    ):
        laid_out(replace(model, device_map="auto"))


def test_no_block_is_cut_in_two_and_what_the_gpus_do_not_hold_stays_in_memory(
    base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(num_hidden_layers=6).model
    size = sum(each.numel() * 4 for each in find_blocks(model)[0].parameters())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    room = {number: f"{int(2.5 * size)}B" for number in (0, 1)}
    monkeypatch.setattr(
        "accelerate.utils.get_max_memory",
        lambda given: {each: int(str(most).rstrip("B")) for each, most in given.items()},
    )
    devices = devices_of(model, room)
    assert set(devices.values()) == {0, 1, "cpu"}
    for number in range(6):
        assert len({where for name, where in devices.items() if f"layers.{number}" in name}) == 1
    with pytest.raises(RecipeError, match=r"^model.device_map: 3: there are 2 GPUs here"):
        devices_of(model, {0: "1GiB", 3: "1GiB"})


@pytest.mark.parametrize(
    ("asked", "device", "wanted"),
    [
        ("auto", "cpu", None),
        (None, "cuda", None),
        ("auto", "cuda", "auto"),
        ({0: "1GiB"}, "cuda", {0: "1GiB"}),
        ({0: "1GiB"}, "cpu", "over GPUs, and model.device is 'cpu'"),
        ("auto", "cuda:1", "over GPUs, and model.device is 'cuda:1'"),
    ],
)
def test_a_device_map_is_of_gpus_and_changes_nothing_without_one(asked: Any, device: str, wanted: Any) -> None:
    settings = ModelSettings(path="x", device_map=asked)
    if isinstance(wanted, str) and wanted != "auto":
        with pytest.raises(RecipeError, match=f"^model.device_map: .*{wanted}"):
            device_map_of(settings, torch.device(device))
    else:
        assert device_map_of(settings, torch.device(device)) == wanted


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"kind": "audit", "of": "choices", "attack": {"kind": "quantise"}}, "attack quantise"),
        ({"kind": "audit", "of": "choices", "attack": {"kind": "relearn"}}, "attack relearn"),
        ({"kind": "audit", "of": "choices", "attack": {"kind": "suffix"}}, "attack suffix"),
        ({"kind": "match", "unwanted": "text", "generation": {"engine": "vllm"}}, "engine vllm"),
    ],
)
def test_what_reads_or_changes_the_weights_is_refused_beside_a_device_map(
    toy_recipe: dict[str, Any], entry: dict[str, Any], told: str
) -> None:
    toy_recipe["evaluate"] += [{**entry, "name": "it"}]
    load_recipe(toy_recipe)
    toy_recipe["model"]["device_map"] = "auto"
    with pytest.raises(RecipeError, match=rf"model.device_map: 'it' \({told}\) needs the weights whole"):
        load_recipe(toy_recipe)


def test_a_device_map_is_refused_beside_decode(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["model"]["device_map"] = "auto"
    toy_recipe["decode"] = {"path": toy_recipe["model"]["path"], "through": "alone"}
    with pytest.raises(RecipeError, match=r"model\.device_map: beside decode"):
        load_recipe(toy_recipe)


def test_a_device_map_enters_no_key_and_a_recipe_keeps_it(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    from spunge.run.stages.building import build

    runs = []
    for asked in (None, "auto", {0: "20GiB", 1: "10GiB"}):
        recipe = load_recipe({**toy_recipe, "model": {**toy_recipe["model"], "device_map": asked}})
        assert load_recipe(recipe.model_dump(mode="json")).model.device_map == asked
        runs.append(build(recipe, tmp_path / "run").graph)
    for name in ("branch:asia", "judge:base/75f0ef4362a8"):
        assert len({graph.key(name) for graph in runs}) == 1
