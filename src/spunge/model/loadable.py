"""Whether transformers loads a checkpoint's tensors into the model of its configuration, found out without reading them.

transformers' own loader runs on tensors of the right names, dtypes and shapes that hold nothing (torch's meta device): its
renames, its stacked experts and its tied weights count as they count in a real loading.

    python -c "from pathlib import Path; from spunge.model.loadable import fit; from spunge.weights.described import described_by
from spunge.weights.checkpoint import Checkpoint;
    print(fit(Checkpoint(Path('FOLDER'))))"
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spunge.errors import RecipeError, first_line
from spunge.model.recalled import recalled
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.described import described_by
from spunge.weights.matching import COMPUTED
from spunge.weights.quantised import SCALE, settled
from spunge.weights.wrapping import wrappers


@dataclass(frozen=True)
class Fit:
    """What transformers finds in a checkpoint. `architecture`: the class that it was loaded as; None: it could not be tried."""

    architecture: str | None
    reason: str = ""  # why it could not be tried
    dtype: torch.dtype | None = None  # that the configuration names, in which it is loaded unless another is asked for
    missing: tuple[str, ...] = ()  # parameters that transformers would fill at random
    mismatched: tuple[str, ...] = ()  # parameters whose tensors have other shapes
    integers: tuple[str, ...] = ()  # parameters whose tensors are integers
    unread: tuple[str, ...] = ()  # tensors that no parameter takes

    @property
    def notes(self) -> list[str]:
        """What is to be said of a checkpoint that loads."""
        odd = [name for name in self.unread if not COMPUTED.search(name)]
        shown = ", ".join(repr(name) for name in odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        return [f"the model reads no {shown} of the base's files: copied as they are"] if odd else []


def fit(checkpoint: Checkpoint) -> Fit:
    """Try a checkpoint on its config.json. Nothing of the checkpoint's own code is run.

    The same names, dtypes and shapes on the same config.json are tried once (`spunge.model.recalled`).
    """
    tried: list[Fit] = []

    def found() -> dict[str, Any] | None:
        tried.append(_tried(checkpoint))
        # What could not be tried may be tried another day, with another package beside.
        return None if tried[0].architecture is None else _written(tried[0])

    known = recalled(["fit", _asked(checkpoint)], found)
    return tried[0] if tried or known is None else _read(known)


def _asked(checkpoint: Checkpoint) -> list[Any]:
    """All of a checkpoint that a try depends on."""
    described = checkpoint.folder / "config.json"
    stored = sorted([info.name, list(info.shape), str(info.dtype)] for info in checkpoint.tensors.values())
    return [described.read_bytes().hex() if described.is_file() else None, stored]


def _written(fit: Fit) -> dict[str, Any]:
    return {**asdict(fit), "dtype": None if fit.dtype is None else str(fit.dtype).removeprefix("torch.")}


def _read(known: dict[str, Any]) -> Fit:
    names = {name: tuple(known[name]) for name in ("missing", "mismatched", "integers", "unread")}
    dtype = None if known["dtype"] is None else getattr(torch, known["dtype"])
    return Fit(known["architecture"], known["reason"], dtype, **names)


def _tried(checkpoint: Checkpoint) -> Fit:
    if not (checkpoint.folder / "config.json").is_file():
        return Fit(None, "there is no config.json")
    with quiet():
        try:
            own = described_by(checkpoint.folder)
        except Exception as error:
            # A model type that transformers does not know, or an entry that its class refuses.
            return Fit(None, first_line(error))
        config = settled(own, checkpoint.folder)
        kind = class_of(config)
        if kind is None:
            return Fit(None, f"transformers has no class for {config.model_type!r} that generates")
        stored = checkpoint.tensors.values()
        hollow = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in stored}
        try:
            model, loaded = kind.from_pretrained(
                None,
                config=config,
                state_dict=hollow,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            # Whatever an architecture objects to on the meta device; a real loading may do better.
            return Fit(None, first_line(error))
    mismatched = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in loaded["mismatched_keys"])
    missing = sorted(set(loaded["missing_keys"]) - set(mismatched))
    whole = {info.name for info in stored if not info.dtype.is_floating_point and not info.dtype.is_complex}
    integers = sorted(name for name, _ in model.named_parameters() if name in whole)
    unread = tuple(sorted(loaded["unexpected_keys"]))
    return Fit(kind.__name__, "", _dtype_of(config), tuple(missing), tuple(mismatched), tuple(integers), unread)


def check_fit(checkpoint: Checkpoint) -> Fit:
    """The same. Raises RecipeError, with the checkpoint's setting, where tensors lack or have other shapes than the
    configuration's, and where weights have scales that the model does not read."""
    fits = fit(checkpoint)
    where = f"{checkpoint.setting}: {str(checkpoint.folder)!r}"
    if fits.mismatched:
        raise RecipeError(
            f"{where} does not fit its config.json: {fits.mismatched[0]!r} has another shape in the weights"
            f"{_more(fits.mismatched)}; take config.json and weights of one model"
        )
    if fits.integers:
        raise RecipeError(
            f"{where} stores {fits.integers[0]!r} as integers{_more(fits.integers)}: it is quantised; give the unquantised model"
        )
    if fits.missing:
        wrapped = wrappers(checkpoint.tensors)
        hint = f"the names in it bear {wrapped}: save the model inside" if wrapped else "download the model again"
        raise RecipeError(
            f"{where} lacks {fits.missing[0]!r}, which its config.json asks for{_more(fits.missing)}: transformers would "
            f"fill it at random; {hint}"
        )
    if scales := _scales(checkpoint.tensors, fits.unread):
        raise RecipeError(
            f"{where} holds {scales[0]!r}{_more(scales)}, a scale that the model does not read: its weights are not those stored; "
            "give the unquantised model, or take the scales out of the file where they are left over"
        )
    return fits


def _scales(stored: Collection[str], unread: Sequence[str]) -> tuple[str, ...]:
    """Unread tensors that by their names scale a weight that is read."""
    scales = [name for name in unread if SCALE.search(name.rpartition(".")[2])]
    read = set(stored) - set(unread)
    return tuple(name for name in scales if {name.rpartition(".")[0], f"{name.rpartition('.')[0]}.weight"} & read)


def _dtype_of(config: Any) -> torch.dtype | None:
    said = config.dtype or config.get_text_config().dtype
    return said if isinstance(said, torch.dtype) else None


def class_of(config: Any) -> Any:
    """The class that the configuration names, as far as transformers has it; else that of its causal language models."""
    import transformers

    for name in config.architectures or ():
        if (kind := getattr(transformers, str(name), None)) is not None:
            return kind
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _more(names: tuple[str, ...]) -> str:
    return f", as {len(names) - 1} more" if len(names) > 1 else ""


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar and lists what it misses; here that is the answer, not a warning."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
