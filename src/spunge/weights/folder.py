"""What lies beside the weights in a model's folder, and goes with them: configuration, tokenizer, templates, code, licence.

One rule says what a copy takes: the files that describe a model, known by their names, the code that an `auto_map` names with the
modules that it imports, and what this code calls by name. Whatever else lies there stays behind: other weights, adapters, what a
training run left (optimizer states, DeepSpeed's `latest` and `zero_to_fp32.py`, logs), what says how a model was quantised.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spunge.files import read_json

NOTE = "converted.json"  # in a folder into which pickled or quantised weights were converted
TAUGHT = "teaching.json"  # in that of a model that a run taught

DESCRIBING = (
    *("config.json", "generation_config.json", "*processor_config.json"),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "tekken.json",
        "emoji.json",
    ),
    *("*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "bpe.codes", "dict.txt"),  # of tokenizers, too
    *("*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
)
DOCUMENTS = ("readme.md", "license*", "licence*", "copying*", "notice*", "use_policy*")
GENERATION = "generation_config.json"
# What of it is said by whoever lets the model write, or changes nothing that is written.
IDLE = (
    *(
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
    ),
    *(
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "transformers_version",
        "_from_model_config",
    ),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)
# Of a model's folder, beside its weights: what results depend on. In this order first, by which finished runs are known.
KNOWN_FIRST = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".part", ".lock", ".index.json")  # whatever they are called


def copied(folder: Path, out: Path | None = None) -> Iterator[Path]:
    """The files that a copy of a model's folder takes over, relative to it. `out`, where it lies inside, is not."""
    code = _code(folder)
    called = {
        name
        for file in code
        for name in re.findall(r"[\"']([\w.-]+)[\"']", (folder / file).read_text("utf-8", "replace"))
    }
    for path in sorted(
        (*folder.glob("*"), *folder.glob("additional_chat_templates/*"), *(folder / file for file in code))
    ):
        inside = path.relative_to(folder)
        name = inside.as_posix().lower()
        described = any(fnmatchcase(name, pattern) for pattern in (*DESCRIBING, *DOCUMENTS))
        known = described or name in called or str(inside) in called
        if not path.is_file() or (out is not None and out.resolve() in path.resolve().parents):
            continue
        if inside in code or (known and not name.endswith(WEIGHTS) and not name.startswith(".") and name != NOTE):
            yield inside


def description(folder: Path) -> Iterator[bytes]:
    """What results depend on of the files beside a model's weights, to be hashed: the names and bytes of those that a copy takes
    over, but for what people read, and of a generation's configuration what is obeyed: end tokens, where they are not
    config.json's, and penalties and the like, which are obeyed by lm_eval alone."""
    first = [file for pattern in KNOWN_FIRST for file in sorted(folder.glob(pattern)) if file.is_file()]
    others = [folder / inside for inside in copied(folder) if not _is_document(inside) and inside.name != GENERATION]
    for file in dict.fromkeys([*first, *others]):
        yield file.relative_to(folder).as_posix().encode() + file.read_bytes()
    generation = read_json(folder / GENERATION)
    if isinstance(generation, dict):
        ends = _ends(generation)
        if ends != _ends(read_json(folder / "config.json")):
            yield repr(ends).encode()
        if obeyed := {name: value for name, value in generation.items() if name not in IDLE and value is not None}:
            yield json.dumps(obeyed, sort_keys=True).encode()


def description_sha256(folder: Path) -> str:
    """Fingerprint of `description`."""
    return hashlib.sha256(b"".join(description(folder))).hexdigest()


def _is_document(inside: Path) -> bool:
    return any(fnmatchcase(inside.name.lower(), pattern) for pattern in DOCUMENTS)


def _ends(configuration: Any) -> list[Any]:
    """The end tokens that a configuration names."""
    named = configuration.get("eos_token_id") if isinstance(configuration, dict) else None
    return named if isinstance(named, list) else [named]


def _code(folder: Path) -> set[Path]:
    """The modules that some `auto_map` of the folder names, and those that they import, relative to it."""
    from transformers.dynamic_module_utils import get_relative_imports

    contents = [read_json(file) for file in sorted(folder.glob("*.json")) if not file.name.endswith(".index.json")]
    maps = [content["auto_map"] for content in contents if isinstance(content, dict) and "auto_map" in content]
    waiting = [module for each in maps if isinstance(each, dict) for module in _modules(list(each.values()))]
    files: set[Path] = set()
    while waiting:
        file = Path(*waiting.pop().split(".")).with_suffix(".py")
        if file not in files and os.path.isfile(folder / file):
            files.add(file)
            inside = ".".join(file.parts[:-1])
            waiting += [
                f"{inside}.{name}".strip(".")
                for name in get_relative_imports(folder / file)
                if re.fullmatch(r"[\w.]+", name)
            ]
    return files


def _modules(values: list[Any]) -> Iterator[str]:
    """Of "modeling_mine.MyModel", the module; classes of other repositories ("owner/name--modeling_mine.MyModel") are not here."""
    for value in values:
        if isinstance(value, list):
            yield from _modules(value)
        elif isinstance(value, str) and re.fullmatch(r"[\w-]+(\.[\w-]+)+", value) and "--" not in value:
            yield value.rpartition(".")[0]


def name_of(folder: Path) -> str:
    """A model's name: its folder's, or that of the model that the folder was converted or taught from."""
    notes = [note for file in (TAUGHT, NOTE) if isinstance(note := read_json(folder / file), dict)]
    return next((str(note["model"]) for note in notes if note.get("model")), folder.resolve().name)


def note_of(folder: Path) -> str | None:
    """What is to be said of a model that was quantised, or that a run taught."""
    told = read_json(folder / TAUGHT)
    if isinstance(told, dict) and "rows" in told:
        return f"the base is {name_of(folder)!r} after it was taught {told['rows']} rows ({TAUGHT} in its folder)"
    note = read_json(folder / NOTE)
    if not isinstance(note, dict) or not note.get("quantised"):
        return None
    return f"{name_of(folder)!r} is quantised ({note['quantised']}): its values were taken, and what is written is not quantised"
