"""A checkpoint as a GGUF file, the format of llama.cpp, by the classes of the package `gguf`.

Written are the models of which a file was loaded again, by transformers and by llama.cpp, with the same logits: Llama, Mistral,
Qwen 2 and 3. Others are refused: llama.cpp's own convert_hf_to_gguf.py knows many more.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import written
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.gguf_vocabulary import vocabulary
from spunge.weights.quantised import quantisation

KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # torch's name -> --type
TYPES = ("auto", *KINDS.values(), "q8_0")
BLOCK = 32  # entries that share a scale in q8_0
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRICES = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj".split()
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Shape:
    """What a family of models is in GGUF. rotated: its queries and keys lie otherwise there. biases, norms: what a block has beside
    the matrices and norms of every family. llama3: whether its rotations may be stretched as Llama 3.1's are."""

    name: str
    rotated: bool = False
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    llama3: bool = False


FAMILIES = {
    "llama": Shape("llama", rotated=True, llama3=True),
    "mistral": Shape("llama", rotated=True),
    "qwen2": Shape("qwen2", biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "qwen3": Shape("qwen3", norms=("self_attn.q_norm", "self_attn.k_norm")),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint with other values for some of its tensors."""

    checkpoint: Checkpoint
    config: Any  # of transformers
    shape: Shape
    changed: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.checkpoint.read(name)

    @property
    def stored(self) -> list[str]:
        """Names of what is stored, less what old checkpoints kept of the rotations and transformers does not read."""
        return [name for name in self.checkpoint.tensors if not name.endswith("rotary_emb.inv_freq")]

    @property
    def head_size(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def kind(self) -> str:
        """The dtype of the embeddings, as --type says it."""
        own = self.changed.get(EMBEDDINGS)
        dtype = self.checkpoint.tensors[EMBEDDINGS].dtype if own is None else own.dtype
        return KINDS[str(dtype).removeprefix("torch.")]


def opened(folder: Path, changed: Mapping[str, Tensor]) -> Model:
    """A model that can be written. Raises RecipeError for one that a file would not hold as it is."""
    from transformers import AutoConfig

    kind = read_config(folder, "--gguf").get("model_type")
    if kind not in FAMILIES:
        raise RecipeError(
            f"--gguf: {kind!r} is none of {', '.join(FAMILIES)}, of which files were tried; take llama.cpp's convert_hf_to_gguf.py"
        )
    checkpoint = Checkpoint(folder, "--gguf")
    if how := quantisation(checkpoint):
        raise RecipeError(f"--gguf: the model is quantised ({how}); only plain weights are written")
    model = Model(checkpoint, AutoConfig.from_pretrained(folder, trust_remote_code=False), FAMILIES[kind], changed)
    _refuse_config(model)
    _refuse_tensors(model)
    return model


def _refuse_config(model: Model) -> None:
    config, rope = model.config, model.config.rope_parameters
    stretched = rope["rope_type"]
    if stretched != "default" and not (stretched == "llama3" and model.shape.llama3):
        raise RecipeError(f"--gguf: rotations of the type {stretched!r} are not written for {model.config.model_type}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise RecipeError("--gguf: rotations of a part of each head are not written")
    if config.hidden_act != "silu":
        raise RecipeError(f"--gguf: the activation {config.hidden_act!r} is not written, only silu")
    sliding = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if sliding and (window := getattr(config, "sliding_window", None)) and window < config.max_position_embeddings:
        raise RecipeError(
            f"--gguf: the model attends to the last {window} tokens alone, which llama.cpp does not do for {config.model_type}"
        )


def _refuse_tensors(model: Model) -> None:
    """Every tensor has its place in a file of that kind, and none is missing."""
    names, blocks = set(model.stored), range(model.config.num_hidden_layers)
    within = [*MATRICES, *NORMS, *model.shape.norms]
    expected = {f"model.layers.{block}.{module}.weight" for block in blocks for module in within}
    expected |= {f"model.layers.{block}.{module}.bias" for block in blocks for module in model.shape.biases}
    expected |= {EMBEDDINGS, "model.norm.weight"}
    if not model.config.tie_word_embeddings:
        expected.add(HEAD)
    odd = sorted(names - expected - {HEAD}) + sorted(expected - names)
    if odd:
        what = "has no place in" if odd[0] in names else "is missing for"
        raise RecipeError(f"--gguf: the tensor {odd[0]} {what} a file of {model.config.model_type}")


def write_gguf(file: Path, model: Model, kind: str, name: str) -> str:
    """Write the file, whole or not at all, tensor by tensor. kind: one of TYPES; norms and biases stay in float32.

    Gives the type that it has. Raises RecipeError for a tokenizer that llama.cpp has not, and for values that the type cannot hold.
    """
    import gguf

    kind = model.kind if kind == "auto" else kind
    vocab = vocabulary(model.checkpoint.folder, model.checkpoint.tensors[EMBEDDINGS].shape[0])
    with written(file) as aside:
        writer = gguf.GGUFWriter(aside, model.shape.name)
        try:
            _describe(writer, model, kind, name)
            vocab.add_to(writer)
            for key, tensor, type_ in _tensors(model, kind, hollow=True):
                shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), type_)
                writer.add_tensor_info(key, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=type_)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key, tensor, type_ in _tensors(model, kind):
                writer.write_tensor_data(_bytes(key, tensor, type_))
        finally:
            writer.close()
    return kind


def _describe(writer: Any, model: Model, kind: str, name: str) -> None:
    import gguf

    config, rope = model.config, model.config.rope_parameters
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(model.head_size)
    writer.add_vocab_size(model.checkpoint.tensors[EMBEDDINGS].shape[0])


def _tensors(model: Model, kind: str, hollow: bool = False) -> Iterator[tuple[str, Tensor, Any]]:
    """GGUF's name, the values as they lie there, and the type, one by one. hollow: on the meta device, shapes alone."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.shape.name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    if (factors := _stretching(model)) is not None:
        yield "rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32
    for name in model.stored:
        info = model.checkpoint.tensors[name]
        if name == HEAD and model.config.tie_word_embeddings:
            if not hollow and not torch.equal(model.read(HEAD).float(), model.read(EMBEDDINGS).float()):
                raise RecipeError(f"--gguf: {HEAD} is tied to the embeddings but stored with other values")
            continue
        tensor = torch.empty(info.shape, device="meta") if hollow else model.read(name)
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        count = next((count for module, count in heads.items() if f"{module}.weight" in name), None)
        if model.shape.rotated and count is not None and not hollow:
            # transformers rotates entry i with i + half, llama.cpp neighbours.
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        own = kind.upper() if len(info.shape) > 1 else "F32"
        if own == "Q8_0" and info.shape[-1] % BLOCK:
            own = "F16"
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor, gguf.GGMLQuantizationType[own]


def _stretching(model: Model) -> Tensor | None:  # (head_size / 2,)
    """What the frequencies are divided by where they are stretched, as transformers' own function has them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, rope = model.config, model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    size = model.head_size
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: Tensor = plain / stretched
    return factors


def _bytes(key: str, tensor: Tensor, type_: Any) -> np.ndarray[Any, Any]:
    import gguf

    values = tensor.float().contiguous()
    if type_.name == "F16" and bool((values.abs() > torch.finfo(torch.float16).max).any()):
        raise RecipeError(f"--type: {key} holds values beyond what f16 can; give bf16 or f32")
    return np.ascontiguousarray(gguf.quantize(values.numpy(), type_)).view(np.uint8)
