"""Random checkpoints of real shapes, for the benchmarks: a Llama of a given size, and copies of it that look fine-tuned."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD = 2_000_000_000  # bytes


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = True


SHAPES = {
    "toy": Shape(64, 192, 4, 4, 2, 512),
    "0.1B": Shape(512, 1536, 16, 8, 4, 100_352),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151_936),
    "1B-llama3": Shape(2048, 8192, 16, 32, 8, 128_256),
    "2B": Shape(2048, 6144, 36, 16, 8, 151_936),
    "70B": Shape(8192, 28672, 80, 64, 8, 128_256, tied=False),
    "7B": Shape(4096, 11008, 32, 32, 32, 32_000, tied=False),
    "7B-mistral": Shape(4096, 14336, 32, 32, 8, 32_000, tied=False),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as transformers' LlamaForCausalLM stores them."""
    narrow = shape.hidden // shape.heads * shape.groups
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (shape.hidden, shape.hidden)
        yield f"{at}.self_attn.k_proj.weight", (narrow, shape.hidden)
        yield f"{at}.self_attn.v_proj.weight", (narrow, shape.hidden)
        yield f"{at}.self_attn.o_proj.weight", (shape.hidden, shape.hidden)
        yield f"{at}.mlp.gate_proj.weight", (shape.inner, shape.hidden)
        yield f"{at}.mlp.up_proj.weight", (shape.inner, shape.hidden)
        yield f"{at}.mlp.down_proj.weight", (shape.hidden, shape.inner)
        yield f"{at}.input_layernorm.weight", (shape.hidden,)
        yield f"{at}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def build(
    folder: Path, shape: Shape, copy: int = 0, rms: float = 1e-3, drawn_once: bool = False, device: str = "cpu"
) -> Path:
    """Write a bf16 checkpoint: normal weights of deviation 0.02; copy > 0 adds a normal change of deviation `rms`.

    drawn_once: tensors of one shape have one draw, for benchmarks to which the values don't matter. device: where they are drawn.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, int] = {}
    number = size = 0
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for place, (name, dimensions) in enumerate(tensors(shape)):
        values = drawn[dimensions].clone() if dimensions in drawn else normal(dimensions, place, device)
        if drawn_once:
            drawn[dimensions] = values
        if copy:
            noise = torch.randn(dimensions, generator=torch.Generator().manual_seed(100_000 * copy + place))
            values = noise.mul_(rms).add_(values).bfloat16()
        if size and size + values.nbytes > SHARD:
            save_file(shard, folder / f"{number}.safetensors", metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
        shard[name], where[name] = values, number
        size += values.nbytes
    save_file(shard, folder / f"{number}.safetensors", metadata={"format": "pt"})
    names = {
        i: f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" if number else "model.safetensors"
        for i in range(number + 1)
    }
    for i, name in names.items():
        (folder / f"{i}.safetensors").rename(folder / name)
    if number:
        index = {"metadata": {}, "weight_map": {name: names[i] for name, i in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape)))
    return folder


def normal(dimensions: tuple[int, ...], seed: int, device: str = "cpu") -> torch.Tensor:
    """Drawn on a device, and given on the CPU."""
    drawn = torch.randn(dimensions, generator=torch.Generator(device).manual_seed(seed), device=device)
    return drawn.mul_(0.02).bfloat16().cpu()


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token a word, w0, w1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w2").save_pretrained(folder)


def config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
    }
