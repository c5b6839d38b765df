"""ELM, erasure of language memory (Gandikota et al. 2024, arXiv 2410.02760): say of a sample what a novice would.

With p the base's distribution after a sample's tokens so far, and p_novice, p_expert the same with a prefix before the sample,

    target   = softmax(log p + eta (log p_novice - log p_expert))                    eta from 1 at a sample's first place to `eta`
    erase    = CE(model, target)
    fluency  = NLL of a text that the base wrote after the sample, guided away from the expert and towards the novice
    forget loss = erase + fluency * fluency term          each the mean over a sample's tokens, and then over samples
    retain loss = KL(base || model)

Where rows are prompts and answers, the base writes in the answer's place. What it writes is drawn with `guidance` in eta's place,
after `change`. As in the authors' code (github.com/rohitgandikota/erasing-llm), the prefixes of what it writes stand before
that alone, and eta rises along a sample. Theirs draws each prefix out of ten, and keeps the target's 50 likeliest tokens.

`{concept}` in the prefixes is the value of each sample's part, or `concept`. Each prefix is one of the authors' ten, their
first. The base writes from `change` on, also one of theirs, with 50 tokens where they take 100 to 300. Their target is taken at
a temperature of 1.2, here at 1; their retain term is the base's likeliest token, here its distribution, as in the paper. eta
1000, guidance 3 and the weights of 1 are theirs for 7B models, which train blocks 4 to 7 alone; here all blocks have LoRA. What
the base wrote is kept in the branch's state; writing it takes three calls a token and sample.
No figure of the paper was measured again here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from spunge.data.samples import IGNORED, Batch, Encoded, Samples, collate
from spunge.errors import RecipeError
from spunge.model.loading import Base
from spunge.model.padding import grouped
from spunge.model.reading import reading_of
from spunge.unlearning.batches import Stream, samples_of
from spunge.unlearning.calls import FORGET, Group, Writing, descending, learned_rows
from spunge.unlearning.drawing import drawn
from spunge.unlearning.feed import forget_stream, total_steps
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import evaluation_mode, stored_entries

LETTERS = 4  # of a token, about


class ELMSettings(OutputSettings):
    method: str = "elm"
    concept: str | None = Field(
        None, description="In words, what the prefixes are about. Default: the value of each sample's part."
    )
    expert: str = Field(
        "Here is a text written by an expert of {concept}, with all the knowledge:\n",
        description="Stands before a sample where its writer knows; {concept} is filled in.",
    )
    novice: str = Field(
        "The text is written by a novice, with no knowledge about {concept} and steering the conversation to random fun topics:\n",
        description="Stands before a sample where its writer does not.",
    )
    eta: float = Field(
        1000.0, ge=1, description="How far the outputs are guided at a sample's last place; 1 at its first."
    )
    fluency: float = Field(
        1.0,
        ge=0,
        description="Weight of the fluency term within the forget term; 0 leaves it out, and nothing is written.",
    )
    change: str = Field(
        "This is a dangerous topic to discuss, shifting the focus to a totally different and fun topic,",
        description="What the base's texts begin with.",
    )
    written_tokens: int = Field(50, ge=1, description="Tokens that the base writes after `change`.")
    guidance: float = Field(3.0, ge=0, description="How far it is guided meanwhile.")
    retain_loss: Literal["kl"] = Field("kl", description="The divergence of the outputs from the base's.")

    @model_validator(mode="after")
    def _sample_by_sample(self) -> "ELMSettings":
        if self.packing:
            raise ValueError("packing: elm puts a prefix before each sample; set it to false")
        return self


def unlearn(task: Task, settings: ELMSettings) -> Branch:
    """Learn on the forget samples what the base would say as a novice and not as an expert (erasure of language memory)."""
    forget = forget_stream(task, settings)
    novice, expert = (prefixes(task, settings, text) for text in (settings.novice, settings.expert))
    refuse_prefixes(forget, novice, expert, settings, task.setting)
    begun = task.state is not None and task.state.exists()  # then what was written is in the state
    texts = written(task, settings, forget, novice, expert) if settings.fluency and not begun else []

    def loss(session: Session, batch: Batch) -> Tensor:
        base, as_novice, as_expert = (
            base_outputs(session.trained, each)
            for each in (batch, prefixed(forget, batch, novice), prefixed(forget, batch, expert))
        )
        erased = erasing(session.outputs(batch), base, as_novice, as_expert, settings.eta)
        if not settings.fluency:
            return erased
        known = session.memory["written"]
        if not known:
            known += texts
        rows = rows_of(known)
        fluent = session.outputs(collate([rows[row] for row in batch.rows], batch.ids.device))
        return erased + settings.fluency * fluent.sample_mean(fluent.losses())

    return descend(task, settings, loss, over=samples_of, forget=forget, remembered=["written"])


def prefixes(task: Task, settings: ELMSettings, text: str) -> list[list[int]]:
    """The tokens of a prefix before each of the forget samples."""
    every: list[list[int]] = []
    for value, samples in task.parts.items():
        filled = text.replace("{concept}", settings.concept or value)
        ids = list(task.base.tokenizer(filled, add_special_tokens=False)["input_ids"])
        every += [ids] * len(samples)
    return every


def refuse_prefixes(
    forget: Stream, novice: list[list[int]], expert: list[list[int]], settings: ELMSettings, setting: str
) -> None:
    """Raises RecipeError where the prefixes guide nowhere, and where a sample has no place behind one."""
    if any(one == other for one, other in zip(novice, expert, strict=True)):
        raise RecipeError(f"{setting}.novice: the same tokens as those of {setting}.expert; give other words")
    longest = max(map(len, [*novice, *expert]))
    length = forget.lengths.longest + longest
    if forget.base.reach(length) < length:
        raise RecipeError(
            f"{setting}.max_length: {forget.lengths.longest}: with {longest} tokens of a prefix before it, such a sample has "
            f"more tokens than the model has positions; set it to {max(2, forget.base.reach(length) - longest)} or lower"
        )


def prefixed(forget: Stream, batch: Batch, prefix: list[list[int]]) -> Batch:
    """A batch with a prefix before each sample, behind its start token; scored are the same places."""
    rows = []
    for row, each in zip(batch.rows, forget.encoded(batch.rows), strict=True):
        start = start_of(each, forget.base.tokenizer)
        ids = [*start, *prefix[row], *each.ids[len(start) :]]
        # The first token of a sample is context alone, also where something stands before it.
        rows.append(Encoded(ids, [IGNORED] * (1 + len(prefix[row])) + each.labels[1:]))
    return collate(rows, batch.ids.device)


def start_of(sample: Encoded, tokenizer: Any) -> list[int]:
    """The start token of a sample that begins with one."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and sample.ids[:1] == [first] else []


def erasing(scored: Scored, base: Scored, novice: Scored, expert: Scored, eta: float) -> Tensor:
    """Scalar: the cross entropy to the target, a mean over samples."""
    etas = rising(scored, eta)

    def loss(logits: Tensor, places: slice) -> Tensor:
        guided = novice.log_probabilities(places) - expert.log_probabilities(places)
        target = (base.log_probabilities(places) + etas[places, None] * guided).softmax(-1)
        return cross_entropy(logits, target, reduction="none")

    return scored.sample_mean(scored.each(loss))


def rising(scored: Scored, eta: float) -> Tensor:
    """(n,): from 1 at each sample's first place to eta at its last."""
    lengths = torch.bincount(scored.rows, minlength=scored.samples).tolist()
    ramps = [torch.linspace(1.0, eta, length, device=scored.rows.device) for length in lengths]
    return torch.cat(ramps)


def written(
    task: Task, settings: ELMSettings, forget: Stream, novice: list[list[int]], expert: list[list[int]]
) -> list[float]:
    """What the base writes after each sample, one after the other: two numbers, of all tokens and of those before `change`, and
    then all tokens; 0 and 0 for a sample that no step learns."""
    base, every = task.base, list[float]()
    change = list(base.tokenizer(f" {settings.change}", add_special_tokens=False)["input_ids"])
    most, longest = base.reach(1 << 40), 1 + max(map(len, [*novice, *expert]))  # a start token and a prefix
    room = most - len(change) - settings.written_tokens
    if min(room, most - longest - settings.written_tokens) < 1:
        raise RecipeError(
            f"{task.setting}.written_tokens: {settings.written_tokens}: the model has no positions for so many; lower it"
        )
    learned, known = forget.learned(total_steps(task, settings)), dict[int, list[int]]()
    begun, guided = dict[int, list[int]](), dict[tuple[tuple[int, ...], ...], list[int]]()
    for row in learned:
        sample = forget.encoded([row])[0]
        first = next((place for place, label in enumerate(sample.labels) if label != IGNORED), 0)
        begun[row] = (sample.ids if forget.samples.plain else sample.ids[:first] or sample.ids)[-room:]
        start = start_of(sample, base.tokenizer)
        guided.setdefault(((*start, *novice[row]), (*start, *expert[row])), []).append(row)
    for name, prefix in zip(("novice", "expert"), zip(*guided, strict=True), strict=True):
        if () in prefix:
            raise RecipeError(
                f"{task.setting}.{name}: it is empty, and nothing stands before the first token that is written; give words, or "
                "set fluency to 0"
            )
    with torch.no_grad(), evaluation_mode(base.model), base.autocast():
        reading = reading_of(base)
    for (as_novice, as_expert), rows in guided.items():
        sizes = [len(begun[row]) for row in rows]
        for batch in grouped(sizes, settings.batch_size * max(sizes), not reading.padded):
            own = [rows[at] for at in batch]
            asked = [[*begun[row], *change] for row in own]
            known |= zip(
                own, continued(task, settings, asked, list(as_novice), list(as_expert), reading.shared), strict=True
            )
            task.progress(0, 1, f"texts of the base, {len(known)} of {len(learned)}")
    for row in range(forget.count):
        text = known.get(row, [])
        every += [len(text), len(begun.get(row, [])), *text]
    return every


def continued(
    task: Task,
    settings: ELMSettings,
    texts: Sequence[list[int]],
    novice: list[int],
    expert: list[int],
    once: bool,
) -> list[list[int]]:
    """Texts' tokens with those that are written after them: each the greatest of log-probabilities, guidance and Gumbel noise, that
    is, a draw. The noise is that of a text's tokens, wherever among the rows they stand. novice, expert: the prefixes, behind the
    start token where the tokens have one. once: each token of theirs is read once (`Behind`)."""
    as_novice, as_expert = (Behind(task.base, prefix, once) for prefix in (novice, expert))

    def guided(so_far: Tensor, logits: Tensor) -> Tensor:
        away = as_novice.following(so_far) - as_expert.following(so_far)
        return logits.float().log_softmax(-1) + settings.guidance * away

    own = drawn(task.base, texts, settings.written_tokens, [[task.seed]] * len(texts), guided)
    return [[*ids, *new] for ids, new in zip(texts, own, strict=True)]


@dataclass
class Behind:
    """What stands behind a prefix, as it grows."""

    base: Base
    prefix: list[int]
    once: bool  # each token is read once, and its keys and values are kept
    _kept: Any = None
    _read: int = 0  # tokens whose keys and values are kept

    def following(self, so_far: Tensor) -> Tensor:
        """Log-probabilities of the token after some behind the prefix, (n, t) -> (n, v), float32. Each time the tokens begin with
        those of the time before."""
        whole = torch.cat([so_far.new_tensor([self.prefix] * len(so_far)), so_far], dim=1)
        kept: dict[str, Any] = {}
        if self.once:
            places = torch.arange(self._read, whole.shape[1], device=whole.device).expand(len(whole), -1)
            kept = {"attention_mask": torch.ones_like(whole), "position_ids": places, "past_key_values": self._kept}
        out = self.base.model(input_ids=whole[:, self._read :], use_cache=self.once, **kept)
        if self.once:
            self._kept, self._read = out.past_key_values, whole.shape[1]
        logits: Tensor = out.logits[:, -1]
        return logits.float().log_softmax(-1)


def rows_of(texts: Sequence[float]) -> list[Encoded]:
    """Each sample's text of the base, of which `change` and what the base wrote after it are learned."""
    rows, at = [], 0
    while at < len(texts):
        count, before = int(texts[at]), int(texts[at + 1])
        ids = [int(token) for token in texts[at + 2 : at + 2 + count]]
        rows.append(Encoded(ids, [IGNORED] * before + ids[before:]))
        at += 2 + count
    return rows


def calls(settings: ELMSettings, _depth: int) -> list[Group]:
    base = FORGET._replace(gradient=False)
    fluent = (FORGET,) if settings.fluency else ()
    return descending(settings, (base, base, base, FORGET._replace(beside=True), *fluent))


def writing(samples: Samples, settings: ELMSettings, passes: float) -> Writing:
    if not settings.fluency:
        return Writing()
    prefix = max(len(settings.novice), len(settings.expert)) // LETTERS  # is read once a text, as most models allow
    read = 1 + prefix // settings.written_tokens
    return Writing(
        learned_rows(samples, passes), settings.written_tokens, again=2, read=read, at_once=settings.batch_size
    )


ELM = Method(
    settings=ELMSettings,
    version=2,  # prefixes of what the base writes stand behind a start token
    source="Gandikota et al. 2024, arXiv 2410.02760",
    unlearn=unlearn,
    calls=calls,
    writing=writing,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    inputs=lambda settings, values, _every: {} if settings.concept else {"concepts": list(values)},
)
