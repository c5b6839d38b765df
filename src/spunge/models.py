"""Load a base model, whole or its first blocks, and find its parts on any decoder-only architecture: its blocks, its
projections, its tensors' names."""

import copy
import functools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spunge import attention
from spunge.checkpoints import Checkpoint
from spunge.deltas import restored
from spunge.experts import Place, stacked_places
from spunge.recipe import ModelSettings
from spunge.registry import RecipeError

# The projection that writes an MLP's result back to the residual stream, as the architectures call it.
DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "mlp.dense_out")
# The same of a mixture of experts: all experts in one tensor, one tensor each, and the expert that every token takes.
EXPERT_PROJECTIONS = (
    "*.experts.down_proj",
    "*.experts.*.down_proj.weight",
    "*.experts.*.w2.weight",
    "*.shared_expert.down_proj.weight",
    "*.shared_experts.down_proj.weight",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Base:
    """The base model in memory, whole or its first blocks. Whoever changes its parameters puts them back."""

    model: Any  # transformers PreTrainedModel, in evaluation mode
    tokenizer: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype
    # The model's parameter -> its names in the checkpoint: two when tied and twice stored, many when experts are stacked.
    names: Mapping[str, tuple[str, ...]]
    depth: int  # blocks of the checkpoint, however many of them are in memory
    places: Mapping[str, Place] = field(default_factory=dict)  # checkpoint tensor -> where in its parameter it lies

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The checkpoint's tensor name -> the parameter in memory, or the view of it that is this tensor."""
        own = dict(self.model.named_parameters())
        return {stored: view for name in self.names for stored, view in self.stored(name, own[name]).items()}

    def stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A value of a parameter's shape as the checkpoint's tensors: (experts, d, n) becomes a (d, n) for each expert."""
        return {stored: value[self.places[stored]] if stored in self.places else value for stored in self.names[name]}

    def autocast(self) -> torch.autocast:
        """Mixed precision: trained tensors are float32, arithmetic is the model's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def local_folder(settings: ModelSettings) -> Path:
    """The model's folder, downloaded if it is a Hub id. Raises RecipeError for a missing one and for pickled weights."""
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        if settings.path.startswith((".", "/", "~")):
            raise RecipeError(f"model.path: no folder {settings.path!r}; give a checkpoint's folder or a Hub id")
        folder = _downloaded(settings)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if not pickles:
            raise RecipeError(f"model.path: {settings.path!r} holds no weights (no .safetensors file)")
        if not settings.allow_pickle:
            raise RecipeError(
                f"model.path: {settings.path!r} has pickled weights alone ({pickles[0]}), which can run code when read; "
                "convert them to safetensors, or set model.allow_pickle=true if you trust them"
            )
    return folder


def _downloaded(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.txt",
        "*.py" if settings.trust_remote_code else "*.json",
    ]
    if settings.allow_pickle:
        patterns.append("*.bin")
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.path: {settings.path!r} is no folder here and could not be had from the Hub ({reason})"
        ) from error


def unpickled(folder: Path, out: Path, settings: ModelSettings) -> Path:
    """A folder with safetensors weights: `folder` itself, or a conversion of its pickled weights written to `out`."""
    if any(folder.glob("*.safetensors")):
        return folder
    if not (out / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        aside = out.with_name(out.name + ".part")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=settings.trust_remote_code)
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code).save_pretrained(aside)
        os.replace(aside, out)
    return out


def load_base(folder: Path, settings: ModelSettings, last: int | None = None) -> Base:
    """Load model and tokenizer for training and judging. Raises RecipeError when the architecture is no causal LM.

    last: the last block that is needed. Blocks above it and the output layer are then left on the disk, so that the
    model gives hidden states alone; an architecture that cannot be cut is loaded whole.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = pick_device(settings.device)
    trust = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        dtype = pick_dtype(settings.dtype, device, config)
        depth = _depth(config)
        model = None if last is None or last + 1 >= depth else _first_blocks(folder, config, dtype, trust, last + 1)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.path: {str(folder)!r} cannot be loaded as a causal language model: {first}"
        ) from error
    model.to(device).eval().requires_grad_(False)
    attention.speed_up(model, device, dtype)
    checkpoint = Checkpoint(folder)
    places = stacked_places(model, checkpoint)
    names = checkpoint_names(model, checkpoint)
    names |= {name: tuple(inner) for name, inner in places.items()}
    flat = {stored: place for inner in places.values() for stored, place in inner.items()}
    return Base(model, tokenizer, folder, device, dtype, names, depth, flat)


def model_depth(folder: Path, settings: ModelSettings) -> int:
    """Number of decoder blocks, from the configuration alone. Raises RecipeError when it cannot be read."""
    from transformers import AutoConfig

    try:
        return _depth(AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code))
    except (ValueError, OSError) as error:
        raise RecipeError(f"model.path: {str(folder)!r} has no readable configuration: {error}") from error


def _depth(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _first_blocks(folder: Path, config: Any, dtype: torch.dtype, trust: bool, count: int) -> Any:
    """The model without its output layer and with its first `count` blocks alone, or None where that is not to be had."""
    from transformers import AutoModel

    try:
        with _without_warnings():
            shorter = _cut(config, count)
            if not _same_blocks(config, shorter, trust, count):
                return None
            model, loaded = AutoModel.from_pretrained(
                folder, config=shorter, dtype=dtype, trust_remote_code=trust, output_loading_info=True
            )
    except Exception:
        # Whatever an architecture objects to: the whole model is loaded instead, and has its own say.
        return None
    return None if loaded["missing_keys"] or loaded["mismatched_keys"] else model


def _cut(config: Any, count: int) -> Any:
    """The configuration of the first `count` blocks: the depth, and every list with an entry for each block."""
    shorter = copy.deepcopy(config)
    text, depth = shorter.get_text_config(), _depth(config)
    lists = {key: value for key, value in vars(text).items() if isinstance(value, list) and len(value) == depth}
    text.num_hidden_layers = count
    for key, value in lists.items():
        setattr(text, key, value[:count])
    return shorter


def _same_blocks(config: Any, shorter: Any, trust: bool, count: int) -> bool:
    """Whether the first blocks are the same in the whole model and the cut one: modules, shapes and plain attributes.

    Not so where a block's make-up depends on its distance from the end (Gemma 3n shares keys among the last blocks).
    """
    from transformers import AutoModel

    with torch.device("meta"):
        whole, part = (AutoModel.from_config(each, trust_remote_code=trust) for each in (config, shorter))
    pairs = zip(find_blocks(whole), find_blocks(part), strict=False)
    return len(find_blocks(part)) == count and all(_outline(block) == _outline(other) for block, other in pairs)


def _outline(block: nn.Module) -> list[Any]:
    plain = (bool, int, float, str, type(None))
    return [
        *((name, tensor.shape) for name, tensor in block.state_dict().items()),
        *(
            (name, type(module), {key: value for key, value in vars(module).items() if isinstance(value, plain)})
            for name, module in block.named_modules()
        ),
    ]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers lists every tensor of the checkpoint that a cut model has no use for."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def pick_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise RecipeError(f"model.device: {name!r} is no device; give auto, cpu, cuda, cuda:1 or mps") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto` takes the checkpoint's dtype on a GPU and the faster of float32 and bfloat16 on a CPU."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cpu":
        return torch.bfloat16 if bfloat16_speedup() > 1.2 else torch.float32
    stored = getattr(config, "dtype", None)
    reduced = stored in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if reduced and (device.type != "cuda" or torch.cuda.is_bf16_supported()) else torch.float32


@functools.cache
def bfloat16_speedup() -> float:
    """float32's time over bfloat16's for a matrix product of a small model's shape, measured here once (about 50 ms)."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - started)
        return min(taken)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def checkpoint_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The model's parameter names -> the checkpoint's. Some differ by the base model's prefix (GPT-2, OPT; a cut model).

    A tied tensor that the checkpoint stores twice has two names. Parameters the checkpoint lacks are left out.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    names = {}
    for name, parameter in model.named_parameters():
        candidates = dict.fromkeys(
            spelling
            for alias in aliases[id(parameter)]
            for spelling in (alias, alias.removeprefix(prefix), prefix + alias)
        )
        stored = tuple(spelling for spelling in candidates if spelling in checkpoint.tensors)
        if stored:
            names[name] = stored
    names.update(_names_by_content(model, checkpoint, names))
    if not names:
        raise RecipeError(f"model.path: no tensor in {str(checkpoint.folder)!r} bears a name of the model's parameters")
    return names


def _names_by_content(
    model: nn.Module, checkpoint: Checkpoint, known: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Names for parameters that transformers renamed on loading (GPT-NeoX's embed_out): the one unclaimed tensor that
    holds the same values."""
    claimed = {spelling for stored in known.values() for spelling in stored}
    unclaimed = [info for info in checkpoint.tensors.values() if info.name not in claimed]
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        if name in known:
            continue
        same = [
            info.name
            for info in unclaimed
            if info.shape == tuple(parameter.shape)
            and torch.equal(checkpoint.read(info.name).to(parameter.dtype), parameter.detach().cpu())
        ]
        if len(same) == 1:
            found[name] = (same[0],)
    return found


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, found by structure: the list of modules as long as the model is deep that holds most parameters."""
    depth = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise RecipeError(f"model.path: no list of {depth} blocks found in {type(model).__name__}")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def down_projections(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a block's MLP output projections by their names in the block, found by name, never by position.

    One tensor in a dense block; in a mixture of experts those of all experts. Raises RecipeError where there is none.
    """
    parameters = dict(block.named_parameters())
    for name in DOWN_PROJECTIONS:
        if (weight := parameters.get(f"{name}.weight")) is not None:
            return {f"{name}.weight": weight}
    experts = {
        name: weight
        for name, weight in parameters.items()
        if any(fnmatchcase(name, pattern) for pattern in EXPERT_PROJECTIONS)
    }
    if not experts:
        raise RecipeError(
            f"unlearn: no MLP output projection in {type(block).__name__} (looked for {', '.join(DOWN_PROJECTIONS)} and "
            "experts' down_proj and w2); name the tensors in unlearn.trainable"
        )
    return experts


@contextmanager
def swapped(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: list[str]) -> Iterator[None]:
    """Inside the block, the named parameters hold another checkpoint's values; after it, their own again."""
    with restored(parameters, names):
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(checkpoint.read(name))
        yield
