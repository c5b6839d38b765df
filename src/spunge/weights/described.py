"""transformers' reading of a config.json that others wrote, before a model is built of it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spunge.files import read_json
from spunge.weights.importing import import_models
from spunge.weights.unlearning_layers import KINDS, SUFFIX, classes_of

MOST_BLOCKS = (
    2000  # the deepest that people train have some hundred; each takes milliseconds to build, even without memory
)
_DEPTH = re.compile(r"(^|_)(layers?|blocks|depth)$")


def know_layers(folder: Path | str) -> None:
    """Let transformers know the classes of a model in a folder that has unlearning layers: no code of the folder is run for it."""
    said = read_json(Path(folder) / "config.json")
    kind = said.get("model_type") if isinstance(said, dict) else None
    if isinstance(kind, str) and kind.endswith(SUFFIX) and kind.removesuffix(SUFFIX) in KINDS:
        classes_of(kind.removesuffix(SUFFIX))


def described_by(folder: Path | str, trust_remote_code: bool = False, **options: Any) -> Any:
    """The configuration of the model in a folder. Raises what transformers raises, and ValueError for a depth that no model has:
    building one would not end."""
    import_models()
    from transformers import AutoConfig

    know_layers(folder)
    # Left open, transformers asks whoever sits there whether to run the code that the folder carries.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    for name, value in _numbers(config.to_dict()):
        if _DEPTH.search(name) and abs(value) > MOST_BLOCKS:
            raise ValueError(f"its {name} is {value}, and no model has more than {MOST_BLOCKS}")
    return config


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) is int:
            yield str(name), value
