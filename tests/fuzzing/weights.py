"""Targets that read weights and what lies beside them: headers, indexes, deltas, adapters, configurations."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fuzzing.mutations import as_json, change, damage, json_file, json_files
from fuzzing.trial import Target
from spunge.errors import RecipeError
from spunge.weights.adapter_config import other_base
from spunge.weights.adapter_config import read_config as read_adapter_config
from spunge.weights.checkpoint import ADAPTER, INDEX, WHOLE, Checkpoint, model_files, read_config
from spunge.weights.delta import DESCRIPTION, LowRank, Sparse, open_delta, write_delta
from spunge.weights.delta import WEIGHTS as DELTA
from spunge.weights.folder import copied, name_of, note_of
from spunge.weights.header import read_header
from spunge.weights.quantised import quantisation
from spunge.weights.sources import DeltaSource

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}


def _framed(header: bytes, length: int | None = None, data: bytes = b"\0" * 32) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


FILES = (
    _framed(json.dumps(HEADER).encode()),
    save({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(4)}),
    _framed(b"{}", data=b""),
    _framed(b'{"__metadata__": {}}', data=b"x"),
)
LENGTHS = (None, None, None, 0, 1, 7, 2**31, 2**32 + 2, 2**63, 2**64 - 1, 100_000_001, -1)


def _safetensors(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return damage(chance, chance.choice(FILES))
    return _framed(
        json_file(chance, HEADER), chance.choice(LENGTHS), chance.choice((b"\0" * 32, b"\0" * 32, b"", b"\0" * 31))
    )


def _header(folder: Path, content: bytes) -> int:
    """The safetensors library takes what we take, and sees the same tensors."""
    file = folder / WHOLE
    file.write_bytes(content)
    infos = read_header(file)
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses it: {error}") from None
    assert names == {info.name for info in infos}
    return len(content)


def _refused_alike(folder: Path, content: bytes) -> int:
    """We take what the safetensors library takes, but for quantised entries."""
    file = folder / WHOLE
    file.write_bytes(content)
    try:
        with safe_open(file, "pt") as opened:
            list(opened.keys())
    except (SafetensorError, OSError):
        raise RecipeError("refused") from None
    try:
        read_header(file)
    except RecipeError as error:
        if not any(kind in str(error) for kind in ("stores", "surrogates")):
            raise AssertionError(f"safetensors takes it: {error}") from None
        raise
    return len(content)


INDEXED = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4,
    "hidden_size": 8,
    "text_config": {"vocab_size": 4},
    "auto_map": {"AutoModel": "modeling_mine.Mine", "AutoTokenizer": ["tok.A", None]},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "_name_or_path": "owner/name",
}


def _once(file: Path, content: bytes) -> None:
    if not file.exists():
        file.write_bytes(content)


def _index(folder: Path, content: bytes) -> int:
    own = folder / "indexed"
    own.mkdir(exist_ok=True)
    for name in ("one.safetensors", "two.safetensors"):
        _once(own / name, save({f"{name[0]}.weight": torch.ones(2, 2)}))
    (own / INDEX).write_bytes(content)
    chosen = model_files(own)
    assert all(file.parent.resolve() == own.resolve() for file in chosen.files)
    assert Checkpoint(own).tensors
    return len(content)


def _config(folder: Path, content: bytes) -> int:
    own = folder / "configured"
    own.mkdir(exist_ok=True)
    _once(own / WHOLE, FILES[1])
    (own / "config.json").write_bytes(content)
    (own / "converted.json").write_bytes(content)
    checkpoint = Checkpoint(own)
    assert isinstance(read_config(own), dict)
    assert checkpoint.tensors
    _ = (
        checkpoint.embeddings,
        checkpoint.twins,
        quantisation(checkpoint),
        list(copied(own, own / "out")),
        name_of(own),
        note_of(own),
    )
    return len(content)


CHANGES = {
    "a.weight": torch.ones(2, 3),
    "b.weight": LowRank(torch.ones(1, 3), torch.ones(2, 1), 0.5),
    "c.weight": Sparse.of(torch.eye(3)),
}


def _delta(folder: Path, case: tuple[bytes | None, bytes | None]) -> int:
    description, weights = case
    own = folder / "delta"
    if not own.exists():
        write_delta(folder / "whole", CHANGES, {"base": "0" * 64})
        own.mkdir()
    for name, content in ((DESCRIPTION, description), (DELTA, weights)):
        (own / name).write_bytes((folder / "whole" / name).read_bytes() if content is None else content)
    opened = open_delta(own)
    source = DeltaSource(opened)
    _ = source.fingerprint, source.base
    for name in source.names:
        dense = opened.dense(name)
        assert list(dense.shape) == list(source.shape(name))
        assert source.read(name, 0, dense.numel(), dense).numel() == dense.numel()
    return sum(len(content or b"") for content in case) + 4096


def _whole_delta() -> tuple[Any, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_delta(
            Path(folder), CHANGES, {"base": "0" * 64, "steps": 3, "losses": [0.5], "method": "ga", "device": "cpu"}
        )
        return json.loads((Path(folder) / DESCRIPTION).read_text()), (Path(folder) / DELTA).read_bytes()


DESCRIBED, WRITTEN = _whole_delta()


def _some_delta(chance: random.Random) -> tuple[bytes | None, bytes | None]:
    """One of the two files changed: the description, the bytes of the weights, or their header alone."""
    match chance.randrange(3):
        case 0:
            return json_file(chance, DESCRIBED), None
        case 1:
            return None, damage(chance, WRITTEN)
    length = struct.unpack("<Q", WRITTEN[:8])[0]
    header = change(chance, json.loads(WRITTEN[8 : 8 + length]))
    return None, _framed(as_json(header), data=WRITTEN[8 + length :])


ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "owner/name",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {"q": 2},
    "bias": "none",
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
}


def _adapter_config(folder: Path, case: tuple[bytes, bytes]) -> int:
    own = folder / "adapter"
    own.mkdir(exist_ok=True)
    (own / ADAPTER).write_bytes(case[0])
    (own / "config.json").write_bytes(case[1])
    config = read_adapter_config(own, "--model: 'adapter'")
    other_base(config, own, "adapter")
    return sum(map(len, case))


def _kinds() -> Iterator[dict[str, Any]]:
    for kind in ("LORA", "LOHA", "IA3", "OFT"):
        yield {**ADAPTER_CONFIG, "peft_type": kind}


def _some_adapter(chance: random.Random) -> tuple[bytes, bytes]:
    return json_file(chance, *_kinds()), json_file(chance, CONFIG) if chance.random() < 0.3 else as_json(CONFIG)


TARGETS = (
    Target("header", _safetensors, _header, 1100),
    Target("header-as-safetensors", _safetensors, _refused_alike, 500),
    Target("index", json_files(INDEXED), _index, 400),
    Target("config", json_files(CONFIG), _config, 300),
    Target("delta", _some_delta, _delta, 400),
    Target("adapter-config", _some_adapter, _adapter_config, 100),
)
