"""Targets that fit an adapter to a base: its settings and its tensors changed. peft builds the layers."""

import functools
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

from fuzzing.mutations import as_json, change, json_file
from fuzzing.trial import Target
from spunge.weights.checkpoint import ADAPTER, Checkpoint
from spunge.weights.opening import check_source, open_source

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WEIGHTS = "adapter_model.safetensors"


@functools.cache
def _whole() -> tuple[dict[str, bytes], dict[str, Any], bytes]:
    """The base's files, an adapter's settings, and its tensors."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        model.save_pretrained(Path(folder, "base"))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for parameter in wrapped.parameters():
            parameter.data += 0.1
        wrapped.save_pretrained(Path(folder, "adapter"))
        base = {file.name: file.read_bytes() for file in Path(folder, "base").iterdir()}
        settings = json.loads(Path(folder, "adapter", ADAPTER).read_text())
        return base, settings, Path(folder, "adapter", WEIGHTS).read_bytes()


def _some_adapter(chance: random.Random) -> tuple[bytes | None, bytes | None]:
    """Changed settings, or another header over the tensors."""
    _, settings, weights = _whole()
    if chance.random() < 0.6:
        return json_file(chance, settings), None
    length = struct.unpack("<Q", weights[:8])[0]
    header = as_json(change(chance, json.loads(weights[8 : 8 + length])))
    return None, struct.pack("<Q", len(header)) + header + weights[8 + length :]


def _adapter(folder: Path, case: tuple[bytes | None, bytes | None]) -> int:
    """What is taken can be read, every entry of it finite or told."""
    files, settings, weights = _whole()
    base, own = folder / "base", folder / "adapter"
    if not base.exists():
        base.mkdir()
        for name, content in files.items():
            (base / name).write_bytes(content)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    (own / ADAPTER).write_bytes(as_json(settings) if case[0] is None else case[0])
    (own / WEIGHTS).write_bytes(weights if case[1] is None else case[1])
    plain = Checkpoint(base)
    source = open_source(own, base)
    check_source(plain, source)
    for name in source.names:
        values = plain.read(name).float().reshape(-1)
        assert source.read(name, 0, len(values), values).shape == values.shape
    return 1 << 20


TARGETS = (Target("adapter", _some_adapter, _adapter, 25),)
