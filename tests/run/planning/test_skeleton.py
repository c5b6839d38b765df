"""What calls of a model take, followed without values: against real models, counted by hand, and depth by depth."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from spunge.recipe.training import Everything, LoRA, Selected
from spunge.run.planning import devices
from spunge.run.planning.devices import CARDS, Device, Rates, device_of
from spunge.run.planning.estimate import Estimator, kv_bytes
from spunge.run.planning.skeleton import Skeleton, Texts, _training, followed
from spunge.run.planning.tracing import Operation, Traced, Tracing
from spunge.unlearning.calls import FORGET, Call
from toys import ARCHITECTURES, SMALL

SIZES = json.loads((Path(__file__).parents[3] / "benchmarks" / "sizes.json").read_text(encoding="utf-8"))
TEXTS = Texts(rows=2, tokens=16, scored=15)


def config_of(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**ARCHITECTURES.get(kind, SMALL), **changes})


def skeleton(
    kind: str = "llama", dtype: torch.dtype = torch.float32, recomputed: bool = False, **changes: Any
) -> Skeleton:
    return Skeleton(config_of(kind, **changes), dtype, recomputed=recomputed)


@pytest.mark.parametrize("name", SIZES)
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = dict(SIZES[name])
    published, kind = shape.pop("entries"), shape.pop("model_type")
    assert Skeleton(config_of(kind, **shape), torch.bfloat16).entries() == published


def test_lora_trains_rank_times_what_each_adapted_layer_reads_and_writes() -> None:
    hidden, inner, groups = 32, 48, 16
    layers = [(hidden, hidden)] * 2 + [(hidden, groups)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    by_hand = 4 * 7 * sum(read + written for read, written in layers)
    assert skeleton().trained_entries(LoRA(rank=7, targets="all-linear")) == by_hand


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "qwen3_moe"])
def test_lora_is_counted_as_peft_makes_it(kind: str) -> None:
    mixture = {
        **SMALL,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    }
    asked = skeleton(kind, **mixture) if kind == "qwen3_moe" else skeleton(kind)
    targets: Any = ["down_proj", "q_proj"] if kind == "qwen3_moe" else "all-linear"
    what = LoRA(rank=3, targets=targets, dropout=0.0)
    with _training(asked, asked.model(), what) as wrapped:
        made = sum(each.numel() for each in wrapped.parameters() if each.requires_grad)
    assert made == asked.trained_entries(what) > 0


def test_what_is_trained_is_counted_whole_chosen_and_by_the_blocks_output_projections() -> None:
    model = skeleton().model()
    assert skeleton().trained_entries(Everything()) == sum(each.numel() for each in model.parameters())
    assert skeleton().trained_entries(Selected(match=["*.up_proj.weight"])) == 4 * 32 * 48
    assert skeleton().trained_entries(None, blocks=3) == 3 * 32 * 48


def test_a_product_is_counted_by_its_operations_and_its_bytes_and_what_is_freed_is_not_held() -> None:
    left, right = torch.ones(8, 32), torch.ones(32, 16)
    with Tracing() as tracing:
        product = left @ right
        tracing.mark()
        del product
        product = torch.zeros(8)
    [(each, times)] = [(each, times) for each, times in tracing.traced.operations.items() if each.flops]
    assert (each.flops, each.nbytes, times) == (2 * 8 * 32 * 16, 4 * (8 * 32 + 32 * 16 + 8 * 16), 1)
    assert (tracing.traced.held, tracing.traced.peak) == (4 * 8 * 16, 4 * 8 * 16)
    assert tracing.live == product.nbytes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_what_is_held_is_what_autograd_saves_in_a_real_model(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    from spunge.unlearning.quick.swapping import quickened

    model = AutoModelForCausalLM.from_config(config_of(kind)).train()
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(2, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), quickened(model):
        states = model.base_model(input_ids=ids, use_cache=False)[0]
        (states.float() - torch.zeros(states.shape)).square().mean(-1).sum()
    traced = followed(skeleton(kind), Everything(), Call(blocks=4), TEXTS)
    # Beside what is saved, what is still at hand lives: the last states, the mask.
    assert 0.99 * sum(saved.values()) <= traced.held < 1.15 * sum(saved.values())


@pytest.mark.thorough
@pytest.mark.parametrize("call", [FORGET, Call(gradient=False)], ids=["gradient", "none"])
def test_a_deep_model_takes_what_two_shallow_ones_say(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    deep = skeleton(num_hidden_layers=6)
    said = followed(deep, LoRA(), call, TEXTS)
    monkeypatch.setattr("spunge.run.planning.skeleton.HIGH", 6)
    whole = followed(deep, LoRA(), call, TEXTS)
    assert said.operations == whole.operations
    assert (said.held, said.peak) == pytest.approx((whole.held, whole.peak), rel=0.01)


def test_blocks_that_are_computed_again_hold_less_and_compute_more() -> None:
    plain, again = (followed(skeleton(recomputed=recomputed), LoRA(), FORGET, TEXTS) for recomputed in (False, True))
    assert again.held < plain.held / 2
    device = CARDS["h100"]
    assert plain.seconds(device) < again.seconds(device) < 2 * plain.seconds(device)


@pytest.mark.thorough
def test_a_vocabulary_adds_a_piece_of_logits_to_what_is_held_and_never_all() -> None:
    small, large = (
        followed(skeleton(vocab_size=size), LoRA(), FORGET, Texts(4, 128, 127)).peak for size in (128, 100_000)
    )
    whole = 4 * 4 * 127 * 100_000
    assert 0 < large - small < whole / 2


def test_of_a_model_that_is_only_read_nothing_is_held_from_block_to_block() -> None:
    """Nor are weights held a second time: a model of bfloat16 is judged as it is."""
    shallow, deep = (
        followed(skeleton(dtype=torch.bfloat16, num_hidden_layers=blocks), None, Call(gradient=False), TEXTS).peak
        for blocks in (2, 12)
    )
    assert deep == shallow


def test_keys_and_values_take_the_bytes_that_transformers_cache_takes() -> None:
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    cache = AutoModelForCausalLM.from_config(config)(
        torch.zeros(1, 9, dtype=torch.long), use_cache=True
    ).past_key_values
    real = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
    assert kv_bytes(Skeleton(config, torch.float32), 9) == real == 2 * 4 * 2 * 8 * 4 * 9


def test_for_blocks_that_look_at_values_a_llama_stands_and_that_is_told() -> None:
    size = skeleton("mixtral", num_local_experts=4, num_experts_per_tok=2)
    estimator = Estimator(size, size, CARDS["h100"], None)
    traced = estimator.follow(size, Everything(), FORGET, TEXTS)
    assert traced.peak > 0
    assert any("mixtral" in note for note in estimator.notes)


@pytest.mark.thorough
def test_models_are_followed_without_memory_of_their_size() -> None:
    shape = {name: value for name, value in SIZES["Llama-3.1-405B"].items() if name not in ("entries", "model_type")}
    traced = followed(Skeleton(config_of("llama", **shape), torch.bfloat16), LoRA(), FORGET, TEXTS)
    assert traced.held > 1e8


def test_an_operation_has_the_rates_of_its_type() -> None:
    device = Device("by hand", 1, bf16=Rates(10.0, 5.0, 2.0), fp32=Rates(4.0, 1.0, 3.0), call=0.5, source="")
    taken = {
        Operation(20, 0, torch.bfloat16): 2.0,
        Operation(20, 0, torch.float32): 5.0,
        Operation(20, 0, torch.bfloat16, attends=True): 4.0,
        Operation(20, 0, torch.float32, attends=True): 20.0,
        Operation(1, 6, torch.bfloat16): 3.0,
        Operation(1, 6, torch.float32): 2.0,
        Operation(0, 0, torch.float32): 0.5,
    }
    for operation, seconds in taken.items():
        assert Traced(Counter([operation, operation])).seconds(device) == 2 * seconds


def test_a_processor_is_measured_in_each_type_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    devices._processor.cache_clear()
    measured = device_of("cpu", cpu)
    devices._processor.cache_clear()
    monkeypatch.setattr(devices, "_measured_processor", lambda: pytest.fail("it is remembered"))
    assert device_of("cpu", cpu) == measured
    devices._processor.cache_clear()
    assert all(rate > 0 for rates in (measured.bf16, measured.fp32) for rate in rates)
    assert isinstance(measured.fp32, Rates)
