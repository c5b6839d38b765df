"""A model with unlearning layers that add nothing yet (`model.unlearning_layers`): its weights, and those of the layers beside.

It lies in the user's cache, with links to the weights, so that it takes the room of the layers alone. The same model and settings
give the same bytes on every machine.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import PART, cache_folder, fingerprint, given_name, write_json, write_text, writing
from spunge.model.conversion import conversion
from spunge.model.hub import local_folder
from spunge.model.loadable import check_fit
from spunge.model.loading import load_tokenizer
from spunge.recipe.model import ModelSettings, UnlearningLayers
from spunge.weights import unlearning_layers
from spunge.weights.card import base_identifier
from spunge.weights.checkpoint import INDEX, WHOLE, Checkpoint, read_config
from spunge.weights.described import described_by
from spunge.weights.folder import NOTE, copied, description_sha256
from spunge.weights.rounding import main_dtype
from spunge.weights.unlearning_layers import INSIDE, KINDS, SUFFIX, classes_of, first_down
from spunge.weights.writing import write_tensors

VERSION = 1  # rises when the same settings give other layers
CODE = "unlearning_layers.py"
LAYERS = "unlearning_layers.safetensors"
OF_ONE = "model-without-layers.safetensors"  # what weights in one file are called: transformers would read WHOLE alone
NARROWER = 16  # how many times a layer is narrower than the model, where nothing is said
SETTING = "model.unlearning_layers"


def base_folder(settings: ModelSettings) -> Path:
    """The folder of the model that a recipe begins from: as it is given, or with unlearning layers where the recipe asks for them.

    Raises RecipeError as `local_folder`, and where a model cannot have them.
    """
    folder = local_folder(settings)
    return folder if settings.unlearning_layers is None else layered(folder, settings.unlearning_layers)


def layered(folder: Path, layers: UnlearningLayers) -> Path:
    """The folder of the same model with unlearning layers. Raises RecipeError where it cannot have them."""
    _refuse(folder)
    checkpoint = Checkpoint(folder)
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    code = Path(unlearning_layers.__file__).read_text(encoding="utf-8")
    about = [VERSION, stamps, description_sha256(folder), layers.model_dump(mode="json"), code]
    out = cache_folder() / "layered" / fingerprint(about)[:32]
    if not out.is_dir():
        with _appearing(out) as aside:
            _write(aside, folder, checkpoint, layers, code)
            check_fit(Checkpoint(aside))
            _keep_tokenizer(folder, aside)
    return out


def _refuse(folder: Path) -> None:
    if conversion(folder) is not None:
        raise RecipeError(
            f"{SETTING}: {str(folder)!r} has weights that are pickled or quantised; give a plain checkpoint (spunge merge "
            "converts one)"
        )
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if kind.endswith(SUFFIX):
        raise RecipeError(
            f"{SETTING}: {str(folder)!r} has unlearning layers; leave it out, and these are trained further"
        )
    if kind not in KINDS or "auto_map" in config:
        raise RecipeError(
            f"{SETTING}: {str(folder)!r} is of the type {kind!r}, and they are there for {', '.join(KINDS)}; leave it out, and "
            "train LoRA factors or tensors (unlearn.trainable)"
        )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that is `out` when the block ends, unless another process was there first."""
    aside = out.with_name(f"{out.name}.{os.urandom(4).hex()}{PART}")
    try:
        with writing(out, SETTING):
            aside.mkdir(parents=True)
            yield aside
            try:
                given_name(aside, out)
            except OSError:
                if not out.is_dir():
                    raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(out: Path, folder: Path, checkpoint: Checkpoint, layers: UnlearningLayers, code: str) -> None:
    for inside in copied(folder):
        (out / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / inside, out / inside)
    config = described_by(folder)
    classes = classes_of(config.model_type)
    said = {"size": layers.size or max(1, config.hidden_size // NARROWER), "activation": layers.activation}
    auto = {"AutoConfig": classes.config, "AutoModel": classes.trunk, "AutoModelForCausalLM": classes.model}
    told = {
        "model_type": classes.config.model_type,
        "architectures": [classes.model.__name__],
        "auto_map": {name: f"{Path(CODE).stem}.{kind.__name__}" for name, kind in auto.items()},
        unlearning_layers.SETTING: said,
    }
    write_json(out / "config.json", {**read_config(folder), **told})
    names = ", ".join(kind.__name__ for kind in classes)
    write_text(out / CODE, f"{code}\n\n{names} = classes_of({config.model_type!r})\n")
    write_json(out / NOTE, {"model": base_identifier(folder), "quantised": None})
    tensors = _tensors(classes.model, described_by(out), main_dtype(checkpoint))
    write_tensors(out / LAYERS, tensors, {"format": "pt"})
    for file in checkpoint.files:
        (out / _called(file)).symlink_to(file.resolve())
    own = {name: _called(info.file) for name, info in checkpoint.tensors.items()}
    sizes = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": checkpoint.nbytes + sizes},
        "weight_map": {**own, **dict.fromkeys(tensors, LAYERS)},
    }
    write_text(out / INDEX, json.dumps(index, indent=2) + "\n")


def _keep_tokenizer(folder: Path, out: Path) -> None:
    """See to it that a text has the same tokens: transformers chooses a tokenizer's class by the model's type, too.

    Raises RecipeError where it would read another tokenizer.
    """
    if not any("token" in file.name or "vocab" in file.name for file in folder.iterdir()):
        return
    plain = load_tokenizer(ModelSettings(path=str(folder)), folder)
    if _spelled(load_tokenizer(ModelSettings(path=str(out)), out)) == _spelled(plain):
        return
    plain.save_pretrained(out)
    if _spelled(load_tokenizer(ModelSettings(path=str(out)), out)) != _spelled(plain):
        raise RecipeError(
            f"{SETTING}: transformers reads another tokenizer from {str(folder)!r} where the model has unlearning layers; save it "
            "as a tokenizer.json that names its class (tokenizer_config.json), or leave them out"
        )


def _spelled(tokenizer: Any) -> list[Any]:
    """What decides which tokens a text has, and how a conversation is written."""
    how = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else [type(tokenizer).__name__, tokenizer.get_vocab()]
    )
    return [how, tokenizer.special_tokens_map, tokenizer.chat_template]


def _called(file: Path) -> str:
    return OF_ONE if file.name == WHOLE else file.name


def _tensors(kind: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the layers begin with, by their names in the model."""
    with torch.device("meta"):
        hollow = kind(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in hollow.state_dict().items():
        if f".{INSIDE}.down." in name:
            size, width = tensor.shape
            tensors[name] = first_down(size, width, generator).to(dtype)
        elif f".{INSIDE}.up." in name:
            tensors[name] = torch.zeros(tensor.shape, dtype=dtype)
    return tensors
