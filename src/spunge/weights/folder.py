"""What lies beside the weights in a model's folder, and goes with them: configuration, tokenizer, templates, code, licence.

transformers, peft, vLLM and spunge itself decide by a file's name what a folder is, so that files which would make a copy
something else stay behind: other weights and their indexes, adapters, deltas, and what says how a model was quantised.
"""

from collections.abc import Iterator
from pathlib import Path

from spunge.files import read_json

NOTE = "converted.json"  # in a folder into which pickled or quantised weights were converted

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx"),
    *(".onnx_data", ".npz", ".npy", ".tflite", ".ot", ".mlmodel", ".distcp", ".part", ".incomplete", ".lock"),
)
OWN = ("merge.json", "delta.json", "journal.jsonl", NOTE)  # of spunge's own folders
STAY = (
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "trainer_state.json",
)


def copied(folder: Path, out: Path) -> Iterator[Path]:
    """The files that a copy of a model's folder takes over, relative to it. `out`, where it lies inside, is not."""
    out = out.resolve()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        name = path.name.lower()
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file() or out in path.resolve().parents:
            continue
        if name.endswith(WEIGHTS) or name in OWN or name in STAY or (".index" in name and name.endswith(".json")):
            continue
        yield inside


def name_of(folder: Path) -> str:
    """A model's name: its folder's, or that of the model that the folder was converted from."""
    note = read_json(folder / NOTE)
    return str(note["model"]) if isinstance(note, dict) and note.get("model") else folder.resolve().name


def note_of(folder: Path) -> str | None:
    """What is to be said of a model that was quantised."""
    note = read_json(folder / NOTE)
    if not isinstance(note, dict) or not note.get("quantised"):
        return None
    return f"{name_of(folder)!r} is quantised ({note['quantised']}): its values were taken, and what is written is not quantised"
