"""Load a base model and find its parts on any decoder-only architecture: its blocks, its projections, its tensors' names."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spunge.checkpoints import Checkpoint
from spunge.recipe import ModelSettings
from spunge.registry import RecipeError

# The projection that writes an MLP's result back to the residual stream, as the architectures call it.
DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "mlp.dense_out")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Base:
    """The base model in memory. Whoever changes its parameters puts them back."""

    model: Any  # transformers PreTrainedModel, in evaluation mode
    tokenizer: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype
    names: Mapping[
        str, tuple[str, ...]
    ]  # the model's parameter -> its names in the checkpoint (two when tied twice stored)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The checkpoint's tensor name -> the parameter in memory."""
        own = dict(self.model.named_parameters())
        return {stored: own[name] for name, all_stored in self.names.items() for stored in all_stored}

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


def load_base(folder: Path, settings: ModelSettings) -> Base:
    """Load model and tokenizer for training and judging. Raises RecipeError when the architecture is no causal LM."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = pick_device(settings.device)
    trust = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        dtype = pick_dtype(settings.dtype, device, config)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.path: {str(folder)!r} cannot be loaded as a causal language model: {first}"
        ) from error
    model.to(device).eval().requires_grad_(False)
    return Base(model, tokenizer, folder, device, dtype, checkpoint_names(model, Checkpoint(folder)))


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


def bfloat16_speedup() -> float:
    """float32's time over bfloat16's for a matrix product of a small model's shape, measured here (about 50 ms)."""

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
    """The model's parameter names -> the checkpoint's. Some differ by the base model's prefix (GPT-2, OPT).

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


def down_projection(block: nn.Module) -> tuple[str, nn.Parameter]:
    """The weight of a block's MLP output projection and its name within the block, found by name, never by position."""
    parameters = dict(block.named_parameters())
    for name in DOWN_PROJECTIONS:
        if (weight := parameters.get(f"{name}.weight")) is not None:
            return f"{name}.weight", weight
    raise RecipeError(
        f"unlearn: no MLP output projection in {type(block).__name__} (looked for {', '.join(DOWN_PROJECTIONS)}); "
        "name the tensors in unlearn.trainable"
    )


@contextmanager
def swapped(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: list[str]) -> Iterator[None]:
    """Inside the block, the named parameters hold another checkpoint's values; after it, their own again."""
    kept = {name: parameters[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(checkpoint.read(name))
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                parameters[name].copy_(before)
