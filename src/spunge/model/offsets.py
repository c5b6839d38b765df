"""A large model whose logits small ones shift while it decodes. No weight of it changes.

    offset (Huang et al. 2024, arXiv 2404.11045):  large + alpha * (unlearned - small)
    dexperts (Liu et al. 2021, arXiv 2105.03023):  top_p(large) + alpha * (expert - anti-expert)
    gedi (Krause et al. 2021, arXiv 2009.06367):   large + alpha * log P(desired | text, next token)

gedi's probability is by Bayes' rule, of a small model that reads a text after one control code and after another, each with the
prior 1/2. With t tokens, the next one among them, and every token after the code counted, as in the authors' code:

    log P(desired | x) = log sigmoid(scale * (log p(x | desired) - log p(x | undesired)) / t)

Then only the tokens with P(desired) of at least tau are left, and the likeliest desired ones until they hold a mass of rho.

Of several parts there is one offset each, and they are merged as logits: by their sum, their mean, or TIES. Logits are added as
they are: log-probabilities would give the same distribution, since they differ by one number at each position.

This file needs torch and transformers alone, and a folder that a run exports holds a copy of it. In that folder:

    from offsets import load
    model, tokenizer = load(".")                # the large model, shifted wherever it is called or generates
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Shift:
    """How offsets are merged and added."""

    alpha: float = 1.0
    merge: Literal["sum", "mean", "ties"] = "sum"
    density: float = 0.2  # of ties: share of the vocabulary that each offset keeps at a position, by magnitude
    top_p: float = 1.0  # tokens outside this nucleus of the large model are never written
    # Of gedi, whose offsets are log-probabilities.
    scale: float | None = None  # of the two likelihoods; None: the offsets are differences of logits
    rho: float = 1.0  # mass that the likeliest desired tokens keep at the least; 1 keeps every token
    tau: float = 1.0  # tokens that are desired with a higher probability are kept in any case


class Pair(NamedTuple):
    """Two small models, whose difference is an offset."""

    up: Any
    down: Any


Code = tuple[int, ...]


class Classes(NamedTuple):
    """A class-conditional model (gedi), and the tokens that stand before a text of either class."""

    model: Any
    desired: Code
    undesired: Code


def pairs_of(
    kind: str, small: Any, changed: Sequence[Any], expert: Any = None, codes: Sequence[Sequence[int]] = ()
) -> list[Pair] | list[Classes]:
    """What gives the offsets. small: the small base; changed: it with what was learned or unlearned, of each part.

    kind: offset, dexperts or gedi. Of dexperts `changed` and `expert` are the base less what it learned (task-vector negation)
    from rows to forget and from rows to keep; they are turned into the models that learned it. Without an expert the small base
    is it. codes: gedi's, desired and undesired.
    """
    if kind == "offset":
        return [Pair(each, small) for each in changed]
    if kind == "gedi":
        desired, undesired = map(tuple, codes)
        return [Classes(each, desired, undesired) for each in changed]
    good = small if expert is None else turned(small, expert)
    return [Pair(good, turned(small, each)) for each in changed]


@torch.no_grad()
def turned(base: Any, changed: Any) -> Any:
    """base - (changed - base), in place of `changed`."""
    for plain, own in zip(base.parameters(), changed.parameters(), strict=True):
        own.copy_(2 * plain.float() - own.float())
    return changed


def merged(offsets: Tensor, shift: Shift) -> Tensor:  # (k, ..., v) -> (..., v)
    """Several offsets as one."""
    if shift.merge == "mean":
        return offsets.mean(dim=0)
    if shift.merge == "sum":
        return offsets.sum(dim=0)
    kept = max(1, int(shift.density * offsets.shape[-1]))
    least = offsets.abs().topk(kept, dim=-1).values[..., -1:]
    trimmed = torch.where(offsets.abs() >= least, offsets, 0.0)
    # Sum before sign: one large entry outvotes many small ones.
    agreeing = (trimmed.sign() == trimmed.sum(dim=0).sign()) & (trimmed != 0)
    return (trimmed * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:  # (..., v)
    """Logits with -inf outside the fewest likeliest tokens whose probabilities reach top_p."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    outside = probabilities.cumsum(dim=-1) - probabilities > top_p  # the one that crosses top_p stays
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def shifted(large: Tensor, offsets: Tensor, shift: Shift) -> Tensor:  # (..., v), (k, ..., w) -> (..., v) float32
    """The large model's logits with the offsets. Vocabularies may be padded to different sizes: what one of them has beyond the
    other is no token, and is left as it is; of gedi, which lowers every token, it is lowered as much as any."""
    logits = nucleus(large.float(), shift.top_p)
    width, beyond = min(logits.shape[-1], offsets.shape[-1]), logits.shape[-1] - offsets.shape[-1]
    one = merged(offsets[..., :width].float(), shift)
    if shift.scale is None:
        return torch.cat([logits[..., :width] + shift.alpha * one, logits[..., width:]], dim=-1)
    if beyond > 0:
        one = torch.cat([one, one.amin(dim=-1, keepdim=True).expand(*one.shape[:-1], beyond)], dim=-1)
    return surely(logits + shift.alpha * one, one, shift)


def surely(logits: Tensor, desired: Tensor, shift: Shift) -> Tensor:  # (..., v), (..., v) -> (..., v)
    """gedi's filter: -inf for tokens with a P(desired) below tau, but for those of the highest one, which hold rho of the mass."""
    if shift.rho >= 1:
        return logits
    ordered, order = desired.sort(dim=-1)
    below = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1) < 1 - shift.rho
    unsure = below & (ordered.exp() < shift.tau)
    return logits.masked_fill(torch.zeros_like(unsure).scatter(-1, order, unsure), -torch.inf)


class Reader(NamedTuple):
    """A small model as it reads texts: after a control code, or as they are."""

    model: Any
    code: Code | None = None


class Offsets:
    """The small models of an offset, each once. They must be on the large model's device."""

    def __init__(self, pairs: Sequence[Pair] | Sequence[Classes], shift: Shift) -> None:
        self.shift = shift
        both = [_readers(pair) for pair in pairs]
        readers = {(id(reader.model), reader.code): reader for pair in both for reader in pair}
        self.readers = list(readers.values())
        self.models: list[Any] = list({id(reader.model): reader.model for reader in self.readers}.values())
        place = {key: at for at, key in enumerate(readers)}
        self._pairs = [(place[id(up.model), up.code], place[id(down.model), down.code]) for up, down in both]

    def attach(self, large: Any) -> Any:
        """Shift the logits of `large` wherever it is called, also by `generate`. Returns the hook's handle."""
        return large.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _large: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        ids = args[0] if args else given.get("input_ids")
        mask = given.get("attention_mask")
        if isinstance(output, tuple):
            raise ValueError("offsets: the model gives no tuple; leave return_dict out")
        if ids is None or len(args) > 1 or given.get("labels") is not None:
            raise ValueError("offsets: the model takes input_ids, and other arguments by name; it gives no loss")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("offsets: the attention mask must be (batch, tokens)")
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int):
            raise ValueError("offsets: logits_to_keep must be a number")
        offsets = self._read(ids, mask, given.get("position_ids"), output.get("past_key_values"), keep)
        if offsets.shape[1:-1] != output.logits.shape[:-1]:
            raise RuntimeError("offsets: the small models give logits of other positions than the large one")
        output.logits = shifted(output.logits, offsets, self.shift)
        return output

    def _read(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any, keep: int) -> Tensor:
        """Offsets of the last `keep` positions, or of all where that is 0: (k, b, t, v).

        cache: the large model's after it has read `ids`. The small models' keys and values are layers behind its own, so that
        whatever is done to it (rows chosen, beams in another order, a copy) is done to all.
        """
        own, counts, layers = 0, [0] * len(self.readers), []
        if cache is not None:
            own, counts = self._begun(cache, ids)
            layers = cache.layers[own:]
        told: list[Tensor] = []
        kept: list[Any] = []
        for at, reader in enumerate(self.readers):
            before, layers = layers[: counts[at]], layers[counts[at] :]
            read = _logits if reader.code is None else _likelihoods
            logits, after = read(reader, ids, mask, positions, before if cache is not None else None, keep)
            told.append(logits)
            counts[at] = len(after)
            kept += after
        if cache is not None:
            cache.layers[own:] = kept
            vars(cache)["offsets"] = (own, tuple(counts))
        width = min(each.shape[-1] for each in told)
        apart = torch.stack(
            [told[up][..., :width].float() - told[down][..., :width].float() for up, down in self._pairs]
        )
        return apart if self.shift.scale is None else logsigmoid(self.shift.scale * apart)

    def _begun(self, cache: Any, ids: Tensor) -> tuple[int, list[int]]:
        """The large model's layers in a cache, and each small model's: none of theirs where it has just begun."""
        if type(cache) is not DynamicCache:
            raise RuntimeError(f"offsets: a {type(cache).__name__} has no room for other models' keys and values")
        if (known := vars(cache).get("offsets")) is not None:
            return known[0], list(known[1])
        if cache.get_seq_length() != ids.shape[1]:
            raise RuntimeError("offsets: the cache holds tokens that the small models have not read")
        return len(cache.layers), [0] * len(self.readers)


def _readers(pair: Pair | Classes) -> tuple[Reader, Reader]:
    if isinstance(pair, Pair):
        return Reader(pair.up), Reader(pair.down)
    return Reader(pair.model, pair.desired), Reader(pair.model, pair.undesired)


def _likelihoods(
    reader: Reader, ids: Tensor, mask: Tensor | None, positions: Tensor | None, before: Any, keep: int
) -> tuple[Tensor, list[Any]]:
    """As `_logits` of a reader with a code: the mean log-likelihood of the text's tokens and each next one, (b, t, v).

    The last of its layers holds, in place of keys and values, the last token's log-probabilities (b, 1, 1, v), and the text's
    summed log-likelihood and number of tokens (b, 1, 1, 2).
    """
    code = reader.code or ()
    real = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    if before:
        *before, state = before
        if state.get_seq_length() != 1:
            raise RuntimeError("offsets: tokens were taken out of a cache, and gedi cannot take back what it has read")
        read, (total, count) = ids, state.values[:, 0, 0].unbind(dim=-1)
    else:
        read, total, count = torch.cat([ids.new_tensor(code).expand(len(ids), -1), ids], dim=1), 0.0, 0.0
    if mask is not None:
        mask = pad(mask, (len(code), 0), value=1)
    if positions is not None:
        positions = positions + len(code)
        if not before:
            first = torch.arange(len(code), device=ids.device).expand(len(ids), -1)
            positions = torch.cat([first, positions.expand(len(ids), -1)], dim=1)
    logits, layers = _logits(reader, read, mask, positions, before, 0)
    logs = logits.float().log_softmax(dim=-1)
    # One place before the first token: what the code, or the last token of what was read before, says of it.
    logs = torch.cat([state.keys[:, 0], logs], dim=1) if before else logs[:, len(code) - 1 :]
    # A token is foretold by the last one before it that is no padding.
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last = pad(torch.where(real == 1, places, 0).cummax(dim=1).values, (1, 0))  # (b, 1 + t)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    own = logs[rows, last[:, :-1], ids.clamp(max=logs.shape[-1] - 1)] * real
    total = own.cumsum(dim=1) + (total[:, None] if before else 0.0)  # (b, t)
    count = real.cumsum(dim=1) + (count[:, None] if before else 0.0)
    if before is not None:
        state = DynamicLayer()
        state.lazy_initialization(logs, logs)
        state.keys = logs[rows, last[:, -1:]][:, None]
        state.values = torch.stack([total[:, -1], count[:, -1]], dim=-1)[:, None, None].to(logs.dtype)
        layers.append(state)
    means = (total[:, -keep:, None] + logs[:, 1:][:, -keep:]) / (count[:, -keep:, None] + 1)
    return means, layers


def _logits(
    reader: Reader, ids: Tensor, mask: Tensor | None, positions: Tensor | None, before: Any, keep: int
) -> tuple[Tensor, list[Any]]:
    """A small model's logits (b, t, v) of the last `keep` positions, or of all where that is 0, and its cache's layers.

    before: these, of the tokens that it has read before; None where none are kept.
    """
    model, state = reader.model, None
    if before is not None:
        state = DynamicCache(config=model.config)
        if before:
            state.layers = before
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"use_cache": state is not None, "past_key_values": state}
    if mask is not None:
        given["attention_mask"] = mask
    if "position_ids" in takes:
        if positions is None and mask is not None:
            # The large model may count positions itself, by the mask; a small one would count padding too.
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given["position_ids"] = positions
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = keep
    # What a vocabulary has beyond the tokenizer's tokens is no token; another one may have fewer of it.
    known = ids.clamp(max=model.get_input_embeddings().num_embeddings - 1)
    logits: Tensor = model(input_ids=known, **given).logits
    return logits[:, -keep:] if keep else logits, [] if state is None else state.layers


class OffsetProcessor(LogitsProcessor):  # type: ignore[misc]
    """The same for one call of `generate` of a large model that is left as it is: `logits_processor=[OffsetProcessor(...)]`.

    attention_mask: of the prompts. Give one processor to one call, without a repetition penalty: that would come before it.
    """

    def __init__(self, offsets: Offsets, attention_mask: Tensor) -> None:
        self._offsets, self._mask = offsets, attention_mask
        self._read: Tensor | None = None  # the tokens that the caches hold
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (b, t), (b, v) -> (b, v)
        rows = self._mask.repeat_interleave(input_ids.shape[0] // self._mask.shape[0], dim=0)
        mask = torch.nn.functional.pad(rows, (0, input_ids.shape[1] - rows.shape[1]), value=1)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        # Beams come in another order at each step: then all is read anew.
        goes_on = self._read is not None and torch.equal(self._read, input_ids[:, :-1])
        first = input_ids.shape[1] - 1 if goes_on else 0
        if not goes_on:
            self._cache = DynamicCache()
            vars(self._cache)["offsets"] = (0, (0,) * len(self._offsets.readers))
        offsets = self._offsets._read(input_ids[:, first:], mask, positions[:, first:], self._cache, 1)
        self._read = input_ids
        # As log-probabilities: beam search adds them up as they come from here.
        return shifted(scores, offsets[:, :, -1], self._offsets.shift).log_softmax(dim=-1)


DESCRIPTION = "offsets.json"


def read_offsets(folder: str | Path, small: str | None = None, dtype: Any = "auto", device: str = "cpu") -> Offsets:
    """The small models of an exported folder. small: where the small base is, if it has moved."""
    folder = Path(folder)
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))

    def model(where: str | Path, revision: str | None = None) -> Any:
        return _read(where, revision, dtype, device)

    # gedi's models say by themselves how likely a text is desired.
    base = None
    if about["kind"] != "gedi":
        base = model(small or about["small"]["path"], None if small else about["small"]["revision"])
    expert = model(folder / about["expert"]) if about["expert"] else None
    changed = [model(folder / name) for name in about["unlearned"]]
    pairs = pairs_of(about["kind"], base, changed, expert, about["codes"])
    return Offsets(pairs, Shift(**about["shift"]))


def _read(where: str | Path, revision: str | None, dtype: Any, device: str) -> Any:
    """A model whose code is transformers' own; one that carries code is loaded by hand, and `read_offsets` attached to it."""
    read = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype, trust_remote_code=False)
    return read.to(device).eval()


def _refuse_saving(*given: Any, **named: Any) -> None:
    raise ValueError(
        "offsets: this would save the large model alone, unshifted; copy the folder that it was loaded from"
    )


def load(
    folder: str | Path, large: str | None = None, small: str | None = None, dtype: Any = "auto", device: str = "cpu"
) -> tuple[Any, Any]:
    """The large model with the offsets of an exported folder, and its tokenizer. large, small: where they are, if they have
    moved."""
    about = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
    where, revision = large or about["large"]["path"], None if large else about["large"]["revision"]
    model = _read(where, revision, dtype, device)
    read_offsets(folder, small, dtype, device).attach(model)
    model.save_pretrained = _refuse_saving  # push_to_hub too calls it
    return model, AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
