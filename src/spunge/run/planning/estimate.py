"""Memory and time of a run's stages on a device, from shapes, row lengths and what calls of the model take."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from spunge.recipe.model import PackedIn
from spunge.recipe.training import Everything, LoRA, Optimizer, Selected
from spunge.run.graph import Cost
from spunge.run.planning.devices import USABLE, Device, Spread
from spunge.run.planning.skeleton import Skeleton, Texts, followed, stand_in
from spunge.run.planning.steps import Fed, Rows, Steps, fed, shared_out
from spunge.run.planning.tracing import Traced, read_traced
from spunge.unlearning.calls import Call, Group, Side, Writing

PROCESS = 600 * 2**20  # Python, torch, transformers and peft themselves
# Bytes of the machine's memory for each byte of activations: what the allocator keeps between them. In float32 a step of NPO with
# LoRA held 2.0 times the bytes of its tensors (`spunge.run.planning.tracing`), one of full training fewer (docs/planning.md).
HEAP, HEAP_FLOAT32 = 1.4, 1.7
CONTEXT = 600 * 2**20  # a GPU's driver, its libraries' workspaces, what its allocator cannot use
MERGE = 400 * 2**20  # a merge's own memory, whatever the size of the models
# Bytes of an optimizer's state for a trained entry (docs/memory.md).
STATES: dict[Optimizer, float] = {
    "adamw": 8,
    "adamw_8bit": 2.1,
    "paged_adamw_8bit": 2.1,
    "lion": 4,
    "sgd": 4,
    "rmsprop": 4,
    "sophia": 8,
}
# Of an entry's update by 8-bit AdamW on a CPU, which bitsandbytes makes of some twenty operations in float32: bytes that they read
# and write, and seconds in which a core packs the two moments again, whatever its bandwidth.
QUANTISED_BYTES = 124
QUANTISED_SECONDS = 8e-9
PACKED: dict[PackedIn, float] = {"4bit": 0.52, "8bit": 1.01}  # bytes of an entry that is packed, scales included
READ_TOKENS = 4096  # of a batch that is judged
WRITTEN_TOKENS = 6144  # of a batch that is completed
DISK = 5e8  # bytes a second that a merge reads and writes
PRODUCTS = 1e10  # float64 multiplications a second of a processor's core
LOGITS = 10  # bytes of a logit while it is judged: its own dtype, float32, and a copy


class Taken(NamedTuple):
    """What a stage takes."""

    seconds: float
    memory: float  # bytes: of the GPU's memory, or of the machine's where there is none


class Beside(NamedTuple):
    """Small models that shift the logits of what is judged."""

    skeleton: Skeleton
    models: int
    readings_each: int = 1  # of every text
    offsets: int = (
        0  # differences of two of their logits; 0: not known, and as much is taken for each model as for the large one
    )
    nucleus: bool = False  # the large one's likeliest tokens are sorted out

    @property
    def readings(self) -> int:
        return self.models * self.readings_each


@dataclass
class Estimator:
    """skeleton: of the base while it trains; judged: of what is judged. positions: tokens that the model has positions for."""

    skeleton: Skeleton
    judged: Skeleton
    device: Device
    tokenizer: Any
    positions: int | None = None
    train_in: PackedIn | None = None
    processes: int = 1  # that train one model together, each on a device of its own (execution: {kind: sharded})
    beside: Beside | None = None
    through: bool = False  # the small model is trained through the logits of what is judged
    spread: Spread | None = None  # model.device_map
    pieces: int = 1  # in which a batch is judged
    slower: float = 1.0  # measured over planned time of steps on the real model
    larger: float = 1.0  # the same of memory
    notes: set[str] = field(default_factory=set)  # what a plan tells of its figures
    _followed: dict[Any, Traced] = field(default_factory=dict)
    _counted: dict[Any, list[int]] = field(default_factory=dict)
    _fed: dict[Any, tuple[Fed, Rows]] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """Bytes that are taken before there is a model."""
        return floor_of(self.device)

    def follow(self, skeleton: Skeleton, what: LoRA | Selected | Everything | None, call: Call, texts: Texts) -> Traced:
        """What a call takes; the same one is followed once, and kept for later plans (`spunge.model.recalled`)."""
        alike = call._replace(of="forget", once=False, most=0.0)
        key = (
            id(skeleton.config),
            skeleton.dtype,
            skeleton.recomputed,
            skeleton.shared,
            repr(what) if call.gradient else "",
            alike,
            texts,
        )
        if key not in self._followed:
            self._followed[key] = self._recalled(skeleton, what, alike, texts)
        return self._followed[key]

    def _recalled(
        self, skeleton: Skeleton, what: LoRA | Selected | Everything | None, call: Call, texts: Texts
    ) -> Traced:
        traced: list[Traced] = []

        def found() -> dict[str, Any] | None:
            try:
                traced.append(_followed(skeleton, what, call, texts))
            except Exception:  # whatever an architecture's own code objects to where there are no values
                return None
            return traced[0].to_json()

        known = skeleton.recalled(["call", repr(what), call, texts], found)
        if traced:
            return traced[0]
        if known is not None:
            return read_traced(known)
        kind = skeleton.config.model_type
        self.notes.add(
            f"blocks of {kind} cannot be followed without values; those of a Llama of its sizes stand for them"
        )
        what = Everything() if isinstance(what, Selected) else what
        return _followed(stand_in(skeleton), what, call, texts)

    # ---- training

    def training(self, steps: Steps) -> Taken:
        """Of a training, its model included: of each process, where several train it together."""
        if self.processes > 1:
            self.notes.add("what the processes of a sharded training tell one another takes time that is not counted")
        steps = shared_out(steps, self.processes)
        sides = {side: self._fed_of(rows) for side, rows in steps.rows.items()}
        a_step, held = 0.0, 0.0
        for group in steps.groups:
            seconds, memory = self._group(steps, group, sides)
            a_step += seconds
            held = max(held, memory)
        trained = self.trained_entries(steps)
        seconds = self.slower * steps.count * (steps.accumulation * a_step + trained * self._update(steps.optimizer))
        # Processes that share a CPU share its cores, and give what they free back to the system.
        seconds *= 1 if self.device.gpu else self.processes
        heap = HEAP_FLOAT32 if self.skeleton.dtype == torch.float32 else HEAP
        held *= 1.0 if self.device.gpu or self.processes > 1 else heap
        memory = self.before_calls(steps) + self.larger * (held + self._kept(steps, sides))
        return Taken(seconds, memory)

    def before_calls(self, steps: Steps) -> float:
        """Bytes that a training's process holds whatever its calls take."""
        return self.larger * (self.floor + self.resident(steps) / self.processes + self.gathered(steps))

    def _update(self, optimizer: Optimizer) -> float:
        """Seconds of an optimizer's update of an entry: it reads and writes a value, a gradient and its state, and the gradients'
        norm is taken before."""
        if not self.device.gpu and optimizer in ("adamw_8bit", "paged_adamw_8bit"):
            return (4 + QUANTISED_BYTES) / self.device.fp32.bandwidth + QUANTISED_SECONDS / torch.get_num_threads()
        return (4 * 3 + 4 * 2 + 2 * STATES[optimizer]) / self.device.fp32.bandwidth

    def gathered(self, steps: Steps) -> float:
        """Bytes of what a process that holds a share of a model has whole for a time (`spunge.unlearning.shards`): the block that
        computes and the next, and what is in no block; of what is trained in full the gradient too, until that is shared out."""
        if self.processes == 1:
            return 0.0
        entries, _, inside = self._held_entries(None)
        block, width = inside / self.skeleton.depth, self.skeleton.dtype.itemsize
        in_full = isinstance(steps.what, Everything | Selected)
        outer = (entries - inside) * (8 if isinstance(steps.what, Everything) else width)
        return float(outer + block * (2 * width + (width + 4 if in_full else 0)))

    def _held_entries(self, blocks: int | None) -> list[int]:
        return self._counts(self.skeleton, ["held", blocks], lambda: self.skeleton.held_entries(blocks))

    def resident(self, steps: Steps) -> float:
        """Bytes of the model, what is trained of it, its gradients, the optimizer's state and the weights that are kept."""
        copies = 4 * (2 + steps.further + steps.keeps_good + 2 * steps.keeps_best) + STATES[steps.optimizer]
        return self.weights(steps.blocks) + copies * self.trained_entries(steps)

    def trained_entries(self, steps: Steps) -> int:
        blocks = None
        if steps.what is None:
            blocks = max(call.blocks or 0 for group in steps.groups for call in group if call.gradient)
        return self._counts(
            self.skeleton,
            ["trained", repr(steps.what), blocks],
            lambda: [self.skeleton.trained_entries(steps.what, blocks)],
        )[0]

    def _counts(self, skeleton: Skeleton, about: list[Any], find: Callable[[], list[int]]) -> list[int]:
        """Numbers of entries; they are counted once, and kept for later plans."""
        key = (id(skeleton), *about)
        if key not in self._counted:
            self._counted[key] = skeleton.recalled(about, find)
        return self._counted[key]

    def weights(self, blocks: int | None = None) -> float:
        """Bytes of the model in memory: whole, or so many blocks without an output layer."""
        width: int = self.skeleton.dtype.itemsize
        entries, packed, _ = self._held_entries(blocks)
        larger = self.judged.dtype.itemsize * self._entries(self.judged) if self.through else 0
        if self.train_in is None:
            return float(width * entries + larger)
        return float(width * (entries - packed) + PACKED[self.train_in] * packed + larger)

    def _group(self, steps: Steps, group: Group, sides: dict[Side, Fed]) -> tuple[float, float]:
        """Seconds of calls whose gradient is computed at once, and the bytes that they hold at the most."""
        seconds = held = peak = 0.0
        skeleton = replace(self.skeleton, shared=self.processes > 1)
        for call in group:
            given = sides[call.of]
            traced = self.follow(skeleton, steps.what, call, Texts(given.rows, given.tokens, given.scored))
            share = self._share_once(steps, call, given) if call.once else 1.0
            seconds += share * given.share * traced.seconds(self.device)
            if self.through:  # each is a call of the large model too, and of the small base
                texts, plain = Texts(given.rows, given.tokens, given.scored), call._replace(gradient=False)
                large, base = (
                    self.follow(self.judged, None, plain, texts),
                    self.follow(self.skeleton, None, plain, texts),
                )
                seconds += share * given.share * (large.seconds(self.device) + base.seconds(self.device))
                peak = max(peak, held + large.peak)
            peak = max(peak, held + traced.peak)
            held += traced.held if call.gradient else 0.0
        backward = [call for call in group if call.gradient]
        if len(backward) > 1:  # all are held when the first gradient is computed
            peak = max(peak, held)
        return seconds, peak

    def _share_once(self, steps: Steps, call: Call, given: Fed) -> float:
        """How often of its calls one is made whose results are kept for each text."""
        draws = steps.count * steps.accumulation * given.rows
        if call.most and not self._fits(call, given, draws):
            return 1.0
        return min(1.0, given.texts / max(1, draws))

    def _fits(self, call: Call, given: Fed, draws: int) -> bool:
        """Whether hidden states are kept: where each text is drawn about once or more, and there is room for all."""
        nbytes = 2 * given.texts * given.mean * self.skeleton.hidden * self.skeleton.dtype.itemsize
        return draws >= given.texts and nbytes <= call.most

    def _kept(self, steps: Steps, sides: dict[Side, Fed]) -> float:
        """Bytes of hidden states that are kept from step to step."""
        total = 0.0
        for side, given in sides.items():
            calls = [call for group in steps.groups for call in group if call.of == side and call.most]
            draws = steps.count * steps.accumulation * given.rows
            if calls and self._fits(calls[0], given, draws):
                total += len(calls) * given.texts * given.mean * self.skeleton.hidden * self.skeleton.dtype.itemsize
        return total

    def _fed_of(self, rows: Rows) -> Fed:
        key = (tuple(map(id, rows.samples)), tuple(rows.lengths), rows.batch, rows.packed)
        if key not in self._fed:  # the rows are kept beside, so that no others have their ids
            self._fed[key] = fed(rows, self.tokenizer, self.positions, self.device.gpu), rows
        return self._fed[key][0]

    # ---- judging

    def reading(self, tokens: float) -> Taken:
        """Of texts that are read by the model without gradient."""
        rows, length = 8, 128
        texts = Texts(rows, length, length - 1)
        traced = self.follow(self.judged, None, Call(gradient=False), texts)
        seconds = self.slower * self._called(traced, texts) * tokens / (rows * length)
        config = self.judged.config.get_text_config()
        whole = min(READ_TOKENS, 2**30 // (LOGITS * config.vocab_size))
        batch = max(256, min(whole // self.pieces, round(tokens)))
        held = self._logit() * config.vocab_size * batch + traced.peak * batch / (rows * length)
        return Taken(seconds, self.judging(held))

    def _logit(self) -> int:
        """Bytes of a place and token while texts are read: of each model's logits, of the offsets in float32, once each and once
        laid together (`spunge.model.offsets`), and of the sums and the order that are made of them."""
        if self.beside is None or not self.beside.offsets:
            return LOGITS * (1 + (self.beside.readings if self.beside else 0))
        width, offsets = self.judged.dtype.itemsize, self.beside.offsets
        summed = width + 4 * offsets + (28 if self.beside.nucleus else 16)
        return max(width * (1 + self.beside.readings) + 8 * offsets, summed)

    def writing(self, tokens: float, longest: int = 64) -> Taken:
        """Of tokens that are written one after the other, in batches. longest: tokens of a text."""
        together = WRITTEN_TOKENS // self.pieces
        at_once = max(1, together // max(64, 2 * longest))
        texts = Texts(at_once, 1, 1)
        traced = self.follow(self.judged, None, Call(gradient=False), texts)
        calls = tokens / at_once
        cache = kv_bytes(self.judged, together)
        if self.beside is not None:
            cache += self.beside.readings * kv_bytes(self.beside.skeleton, together)
        a_call = self._called(traced, texts) + cache / 2 / self.device.rates(self.judged.dtype).bandwidth
        return Taken(self.slower * calls * a_call, self.judging(2 * cache))

    def writing_first(self, writing: Writing) -> Taken:
        """Of what the base writes before a training, or the model on its way."""
        at_once = max(1, min(writing.texts, writing.at_once))
        one = self.follow(self.skeleton, None, Call(gradient=False), Texts(at_once, 1, 1)).seconds(self.device)
        peak, again = 0.0, 0.0
        if writing.again:
            texts = Texts(at_once, writing.read, 1)
            anew = self.follow(self.skeleton, None, Call(gradient=False, everywhere=True), texts)
            peak, again = anew.peak, writing.again * anew.seconds(self.device)
        seconds = self.slower * -(-writing.texts // at_once) * writing.tokens * (one + again)
        return Taken(seconds, self.larger * (self.floor + self.weights() + peak))

    def _called(self, traced: Traced, texts: Texts) -> float:
        """Seconds of a call of the judged model, and of those that shift its logits."""
        if self.beside is None:
            return traced.seconds(self.device)
        small = self.follow(self.beside.skeleton, None, Call(gradient=False), texts)
        return traced.seconds(self.device) + self.beside.readings * small.seconds(self.device)

    def judging(self, held: float) -> float:
        """Bytes of a device that judges. held: beside the weights."""
        weights, beside = self.judged_weights(), self.floor + held
        if self.spread is not None:
            share, room = weights / self.spread.devices, USABLE * self.device.memory - beside
            weights = min(share, self.spread.room, max(0.0, room))
        return beside + weights

    def judged_weights(self) -> float:
        own = float(self.judged.dtype.itemsize * self._entries(self.judged))
        if self.beside is None:
            return own
        small = self.beside.skeleton
        return own + self.beside.models * small.dtype.itemsize * self._entries(small)

    def _entries(self, skeleton: Skeleton) -> int:
        return self._counts(skeleton, ["entries"], lambda: [skeleton.entries()])[0]

    # ---- stages

    def stage(self, cost: Cost) -> Taken:
        """Of a stage: what takes most memory of its work, and the time of all of it."""
        work = [self.training(steps) for steps in (cost.steps, cost.copying) if steps is not None]
        work += [self.writing_first(each) for each in cost.first if each.texts]
        work += [self.reading(cost.tokens)] if cost.tokens else []
        work += [self.writing(cost.written)] if cost.written else []
        memory = max((each.memory for each in work), default=MERGE + PROCESS) + cost.held
        seconds = sum(each.seconds for each in work) + cost.nbytes / DISK + cost.products / PRODUCTS
        return Taken(seconds + self.watching(cost), memory)

    def watching(self, cost: Cost) -> float:
        """Seconds in which a training is measured on its way."""
        read = self.reading(cost.watched).seconds if cost.watched else 0.0
        return read + (self.writing(cost.watched_written).seconds if cost.watched_written else 0.0)

    def altered(self, **changes: Any) -> "Estimator":
        """The same with another model or another way to hold it."""
        return replace(self, _followed={}, _counted={}, _fed=self._fed, **changes)


def floor_of(device: Device) -> float:
    """Bytes that a process takes of a device's memory before there is a model."""
    return CONTEXT if device.gpu else PROCESS


def _followed(skeleton: Skeleton, what: LoRA | Selected | Everything | None, call: Call, texts: Texts) -> Traced:
    told = logging.getLogger("torch._subclasses.fake_tensor")
    before, told.disabled = told.disabled, True  # it tells what is handled here
    try:
        return followed(skeleton, what, call, texts)
    finally:
        told.disabled = before


def kv_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in all blocks."""
    config = skeleton.config.get_text_config()
    described = json.loads(config.to_json_string())
    heads = described.get("num_key_value_heads") or described.get("num_attention_heads") or config.num_attention_heads
    width = described.get("head_dim") or config.hidden_size // config.num_attention_heads
    return int(2 * skeleton.depth * heads * width * skeleton.dtype.itemsize * tokens)
