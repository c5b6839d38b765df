"""Load a base model and its tokenizer, whole or its first blocks alone."""

import copy
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.copies import folder_here
from spunge.errors import RecipeError, first_line
from spunge.files import cache_folder, fingerprint, read_json, sealed, unsealed, write_json
from spunge.model.architecture import find_blocks, in_language_part
from spunge.model.board import Board
from spunge.model.memory import heap_given_back
from spunge.model.names import stored_names
from spunge.model.packing import hollow, load_packed
from spunge.model.ranks import ALONE, Ranks
from spunge.model.refusing import refused_as
from spunge.recipe.model import DeviceMap, ModelPart, ModelSettings, PackedIn
from spunge.recipe.training import refuse_without_bitsandbytes
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.described import described_by, know_layers
from spunge.weights.names import WHOLE, Region
from spunge.weights.quantised import settled

# What the matrix of learned positions is called; OPT's has two rows more than there are positions.
LEARNED_POSITIONS = (
    "wpe.weight",
    "embed_positions.weight",
    "position_embeddings.weight",
    "position_embedding.weight",
    "positions_embed.weight",
)
EMULATED = 0.1  # of a product in bfloat16, float32's share of the time: it has no such arithmetic
SLOW = 0.1  # seconds of a small product on a processor that has no arithmetic of its type: once is enough
TABLED_POSITIONS = ("gptj", "codegen", "ctrl", "mpt", "reformer")  # computed, into a table of a fixed length
AFTER_PADDING = (
    "roberta",
    "camembert",
    "data2vec-text",
    "xmod",
)  # their first position is the one after the padding's id
SEEN = re.compile(r"(image|video|audio)_token_(id|index)")  # of a configuration: in whose place an image is put


class Through(NamedTuple):
    """A larger model, and what the change of a small one's logits is multiplied by before it is added to the larger one's."""

    model: Any
    alpha: float


@dataclass(frozen=True)
class Base:
    """The base model in memory, whole or its first blocks. Whoever changes its parameters puts them back."""

    model: Any  # transformers PreTrainedModel, in evaluation mode
    tokenizer: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype
    # The model's tensor -> its names in the checkpoint: two when tied and twice stored, many when experts are stacked.
    names: Mapping[str, tuple[str, ...]]
    depth: int  # blocks of the checkpoint, however many of them are in memory
    regions: Mapping[str, Region] = field(
        default_factory=dict
    )  # a checkpoint's tensor that is part of the model's -> which
    template: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template
    positions: int | None = None  # tokens that there are positions for; None: nothing bounds them
    train_in: PackedIn | None = None  # how the linear layers are packed; then `parameters` holds no values of theirs
    checkpoint_activations: bool = False  # training holds the blocks' inputs and computes the rest again
    ranks: Ranks = (
        ALONE  # that train it together; of several, it is still on the CPU, and each will take its shards to `device`
    )
    device_map: DeviceMap | None = None  # it is in the machine's memory, to be laid over devices (`model.placing`)
    beside: tuple[Any, ...] = ()  # models that shift its logits while it is judged (`model.offsets`)
    every_place: bool = False  # what shifts them needs the logits at every place of a text (gedi)
    part: ModelPart | None = None  # which alone may be trained; None: any
    through: "Through | None" = None  # a larger model, through whose logits it is trained
    board: Board | None = None  # where other processes of this model take some of its batches

    @property
    def heads(self) -> list[nn.Module]:
        """The output layers that its logits come from."""
        return [model.get_output_embeddings() for model in (self.model, *self.beside)]

    def trainable(self, names: Iterable[str]) -> list[str]:
        """Those of the model's tensors, by name, that lie in the part that may be trained."""
        return list(names) if self.part is None else list(filter(in_language_part(self.model), names))

    def reach(self, length: int) -> int:
        """`length` tokens, or as many as the model has positions for where these are fewer."""
        return length if self.positions is None else min(length, self.positions)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The checkpoint's tensor name -> the parameter (or buffer) in memory, or the view of it that is this tensor."""
        own = self.model.state_dict(keep_vars=True)
        if any(tensor.is_meta for tensor in own.values()):  # a value written there would be lost without a word
            raise RuntimeError("a model that lies on several devices has no values of its own to read or to change")
        return {stored: view for name in self.names for stored, view in self.stored(name, own[name]).items()}

    def stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A value of a parameter's shape as the checkpoint's tensors: (experts, d, n) becomes a (d, n) for each expert."""
        return {stored: self.regions.get(stored, WHOLE).of(value) for stored in self.names[name]}

    def autocast(self) -> torch.autocast:
        """Mixed precision: trained tensors are float32, arithmetic is the model's dtype."""
        # What autocast keeps of a weight in another dtype is as large as the weight, and may be of values that it had before.
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=not self.ranks.shared
        )


def load_base(
    folder: Path,
    settings: ModelSettings,
    last: int | None = None,
    setting: str = "model.path",
    ranks: Ranks = ALONE,
) -> Base:
    """Load model and tokenizer for training and judging. Raises RecipeError when the architecture is no causal LM.

    last: the last block that is needed. Blocks above it and the output layer are then left on the disk, so that the
    model gives hidden states alone; an architecture that cannot be cut is loaded whole. setting: for errors.
    ranks: that are to train it together.
    """
    device = usable_device(settings.device)
    trust, packed_in = settings.trust_remote_code, settings.train_in
    if packed_in is not None:
        refuse_without_bitsandbytes("model.train_in", packed_in)
    with refused_as(f"{setting}: {str(folder)!r} cannot be loaded as a causal language model"):
        config = settled(described_by(folder, trust), folder)
        dtype = pick_dtype(settings.dtype, device, config)
        depth = _depth(config)
        kind, plain = class_of(config), None
        whole = last is None or last + 1 >= depth or packed_in
        model = None if last is None or whole else _first_blocks(folder, config, dtype, trust, last + 1)
        if packed_in is not None:
            plain = hollow(kind, config, trust)
            with heap_given_back():  # what is packed would leave as much room in the heap as it had unpacked
                model = load_packed(kind, folder, config, dtype, trust, device, packed_in)
        elif model is None:
            model = kind.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=trust)
        tokenizer = load_tokenizer(settings, folder, setting)
    spread = device_map_of(settings, device)
    if plain is None and not ranks.shared and spread is None:
        model.to(device)
    model.eval().requires_grad_(False)
    checkpoint = Checkpoint(folder, setting)
    names, regions = stored_names(model, checkpoint, plain)
    positions = _positions(config, checkpoint)
    return Base(
        model,
        tokenizer,
        folder,
        device,
        dtype,
        names,
        depth,
        regions,
        settings.template,
        positions,
        packed_in,
        settings.checkpoint_activations,
        ranks,
        device_map=spread,
        part=settings.part,
    )


def device_map_of(settings: ModelSettings, device: torch.device) -> DeviceMap | None:
    """The devices that a model is to be laid over. Raises RecipeError where `model.device` is one GPU alone, or none."""
    asked = settings.device_map
    if asked is None or (asked == "auto" and str(device) in ("cpu", "mps")):
        return None
    if str(device) != "cuda":
        raise RecipeError(
            f"model.device_map: {asked}: over GPUs, and model.device is {str(device)!r}; leave one of the two out"
        )
    return asked


def class_of(config: Any) -> Any:
    """How a model is loaded: as a causal language model, or where transformers has none of its kind as a vision-language model,
    which given text alone is one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = (
        type(config) not in AutoModelForCausalLM._model_mapping
        and type(config) in AutoModelForImageTextToText._model_mapping
    )
    return AutoModelForImageTextToText if known else AutoModelForCausalLM


def load_tokenizer(settings: ModelSettings, folder: Path | None = None, setting: str = "model.path") -> Any:
    """A model's tokenizer: of its checkpoint's folder where that is known, else of `model.path`, without the weights.

    Raises RecipeError where there is none that can be read.
    """
    from transformers import AutoTokenizer

    own = folder or Path(os.path.expanduser(folder_here(settings.path)))
    options = {"trust_remote_code": settings.trust_remote_code}
    with refused_as(f"{setting}: {settings.path!r} has no tokenizer that can be read"):
        where, which = (own, {}) if own.is_dir() else (settings.path, {"revision": settings.revision})
        know_layers(own)
        tokenizer = AutoTokenizer.from_pretrained(where, **which, **options)
        tokenizer("a")  # some of what it reads it believes until it is first asked
        if not tokenizer.chat_template:
            tokenizer.chat_template = _processors_template(str(where), which)
        return tokenizer


def _processors_template(where: str, which: Mapping[str, Any]) -> str | None:
    """The chat template of a model's processor: older models of texts and images keep it there, beside a tokenizer without one."""
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    for name in ("processor_config.json", "chat_template.json"):  # of two that differ, transformers takes the first
        file = cached_file(where, name, **which, **quiet)
        content = read_json(Path(file)) if file is not None else None
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, str):
            return template
    return None


def model_depth(folder: Path, settings: ModelSettings) -> int:
    """Number of decoder blocks, from the configuration alone. Raises RecipeError when it cannot be read."""
    with _of_configuration(folder):
        return _depth(_config(folder, settings))


def _of_configuration(folder: Path) -> AbstractContextManager[None]:
    return refused_as(f"model.path: {str(folder)!r} has no readable configuration")


def _config(folder: Path, settings: ModelSettings) -> Any:
    return described_by(folder, settings.trust_remote_code)


def sees(folder: Path, settings: ModelSettings) -> bool:
    """Whether a model takes more than texts, by its configuration. Raises RecipeError when it cannot be read."""
    with _of_configuration(folder):
        config = _config(folder, settings)
        return config.get_text_config() is not config


def image_tokens(folder: Path, settings: ModelSettings) -> dict[int, str]:
    """Tokens in whose place a model puts what it sees or hears, with the configuration's names for them.

    Raises RecipeError when it cannot be read.
    """
    with _of_configuration(folder):
        named = _config(folder, settings).to_dict().items()
        return {value: name for name, value in named if SEEN.fullmatch(name) and type(value) is int}


def positions_of(folder: Path, settings: ModelSettings) -> int | None:
    """Tokens that a model has learned positions for; None where positions are computed. From headers and configuration alone.

    Raises RecipeError when they cannot be read.
    """
    with _of_configuration(folder):
        return _positions(_config(folder, settings), Checkpoint(folder))


def _positions(config: Any, checkpoint: Checkpoint) -> int | None:
    """Past the end of its table of positions a model fails (GPT-2, OPT, GPT-J); past its trained length it only gets worse (RoPE,
    ALiBi)."""
    text = config.get_text_config()
    tabled = text.model_type in TABLED_POSITIONS
    if not tabled and not any(name.endswith(LEARNED_POSITIONS) for name in checkpoint.tensors):
        return None
    # By attribute, which has one name for all: GPT-2's file says n_positions.
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    most = next((int(value) for name in names if (value := getattr(text, name, None))), None)
    if most is not None and any(name in text.model_type for name in AFTER_PADDING):
        most -= 1 + (text.pad_token_id or 0)
    return most


def embeddings_of(folder: Path, settings: ModelSettings) -> int:
    """Number of tokens that the model has embeddings for, from the configuration. Raises RecipeError when it cannot be read."""
    with _of_configuration(folder):
        return _counted("vocab_size", _config(folder, settings).get_text_config().vocab_size)


def _depth(config: Any) -> int:
    return _counted("num_hidden_layers", config.get_text_config().num_hidden_layers)


def _counted(name: str, value: Any) -> int:
    if (count := int(value)) < 1:
        raise ValueError(f"its {name} is {count}")
    return count


def _first_blocks(folder: Path, config: Any, dtype: torch.dtype, trust: bool, count: int) -> Any:
    """The model without its output layer and with its first `count` blocks alone, or None where the architecture cannot be cut."""
    from transformers import AutoModel

    try:
        with _without_warnings():
            shorter = cut(config, count)
            if not _same_blocks(config, shorter, trust, count):
                return None
            model, loaded = AutoModel.from_pretrained(
                folder, config=shorter, dtype=dtype, trust_remote_code=trust, output_loading_info=True
            )
    except Exception:
        # Whatever an architecture objects to: the whole model is loaded instead, and has its own say.
        return None
    return None if loaded["missing_keys"] or loaded["mismatched_keys"] else model


def cut(config: Any, count: int) -> Any:
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


def arithmetic(folder: Path, settings: ModelSettings) -> torch.dtype:
    """What a model is loaded in by these settings. Raises RecipeError when its configuration cannot be read."""
    with _of_configuration(folder):
        return pick_dtype(settings.dtype, pick_device(settings.device), _config(folder, settings))


def pick_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise RecipeError(f"model.device: {name!r} is no device; give auto, cpu, cuda, cuda:1 or mps") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name: str) -> torch.device:
    """The device of a name, which must be here and hold values. Raises RecipeError for another."""
    device = pick_device(name)
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise RecipeError(
            f"model.device: {name!r} cannot be used here ({first_line(error)}); give auto, or a device of this machine"
        ) from error
    return device


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


_measured: dict[str, float] = {}


def bfloat16_speedup() -> float:
    """float32's time over bfloat16's for a matrix product of a small model's shape, measured once on a machine (about 50 ms).

    Kept in the cache folder: measured again on a busy machine, it may lead to another dtype in the middle of a run.
    """
    if "speedup" not in _measured:
        _measured["speedup"] = _kept_speedup()
    return _measured["speedup"]


def _kept_speedup() -> float:
    machine = {"torch": str(torch.__version__), "processor": torch.backends.cpu.get_cpu_capability()}
    file = cache_folder() / "bfloat16" / f"{fingerprint(machine)[:16]}.json"
    with suppress(OSError):
        kept = unsealed(read_json(file))
        if kept is not None:
            return float(kept["speedup"])
    measured = _bfloat16_speedup()
    with suppress(OSError, RecipeError):  # where the cache cannot be written, nothing is kept
        write_json(file, sealed({"speedup": measured}))
    return measured


def know_bfloat16_speedup(measured: float) -> None:
    """Take what another process measured: all processes of a run are to choose the same dtype."""
    _measured["speedup"] = measured


def _bfloat16_speedup() -> float:
    def seconds(dtype: torch.dtype, rows: int) -> float:
        left, right = torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - started)
            if taken[-1] > SLOW:
                break
        return min(taken)

    # A processor that works bfloat16 out of other types takes a hundred times as long: a few rows tell.
    ratio = 1.0
    for rows in (8, 256):
        ratio = seconds(torch.float32, rows) / seconds(torch.bfloat16, rows)
        if ratio < EMULATED:
            break
    return ratio
