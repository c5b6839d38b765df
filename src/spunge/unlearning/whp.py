"""Who's Harry Potter (Eldan and Russinovich 2023, arXiv 2310.02238, equation 1): learn what a model says that never read the text.

A copy is trained further on the forget samples (the reinforced model). What rises there is what the text itself teaches, so

    v_generic = v_base - alpha * ReLU(v_reinforced - v_base)          logits, at each learned place

and the base is fine-tuned on the likeliest token of v_generic in the label's place: the NLL of these tokens, their mean.

With `anchors` v_base is what the base says of the text whose anchored terms are replaced by generic ones (Hogwarts: a school),
brought back to the text's own places; v_reinforced is of the text as it is. A term's second occurrence in a text is not learned,
nor are the places inside a term, and after a term the first tokens of what stands for it have `consistency` less. Without anchors
names that the model knows well stay likelier than in the paper. The paper lowers those logits by an amount that we do not know, and
says no more of how tokens are brought back: 5, and leaving out the places inside a term, are ours. The paper's dictionary came from
GPT-4; here it is the recipe's, a file's, or what a chat model of your choice answers (`ask`).

The generic tokens are kept in the branch's state. No retain rows. alpha
5 and the epochs (3 for the copy, 2 for the model) were written down from memory of the paper. They were looked for again in
November 2026 and no source for them was found (the paper's text was not within reach, and no code of its authors was found);
take them as ours, like the learning rates, which are for LoRA. No figure of the paper was measured again here.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import IGNORED, Batch, Encoded, Samples, collate
from spunge.errors import RecipeError
from spunge.model.memory import halved
from spunge.progress import Steps
from spunge.recipe.block import Place
from spunge.recipe.training import LoRA, Trainable
from spunge.unlearning.anchors import SETTING, Translated, read_anchors, terms_of, translated
from spunge.unlearning.batches import Stream, learned_tokens, share
from spunge.unlearning.copies import Further, further_steps, trained_further
from spunge.unlearning.feed import forget_stream, total_steps
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Asking, Branch, Method, Task, Told
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.scored import outputs
from spunge.unlearning.terms import AskSettings, ask, sent, standing
from spunge.unlearning.terms import inputs as asking_inputs
from spunge.unlearning.trained import Trained, evaluation_mode, stored_entries, training, training_mode


class WHPSettings(TrainingSettings):
    method: str = "whp"
    alpha: float = Field(5.0, gt=0, description="How far what rose by reinforcing is pushed down.")
    reinforce: Further = Field(
        default=Further(), description="Training of the copy that shows what is to be forgotten."
    )
    anchors: Annotated[str, Place("file")] | dict[str, str] | None = Field(
        None,
        description="Terms that the texts to forget alone say, and a generic term for each, as {Hogwarts: a school}; or a YAML or "
        "JSON file of them. Default: no term is replaced.",
    )
    consistency: float = Field(
        5.0,
        ge=0,
        description="With anchors: what the first tokens of a generic term lose of their logits once its term stands in the text.",
    )
    ask: AskSettings | None = Field(
        None,
        description="An OpenAI-compatible endpoint that is asked for the terms: the texts to forget are sent to it. What anchors "
        "says of a term stands. Default: nobody is asked.",
    )
    trainable: Trainable = Field(default=LoRA(), description="What is trained, of the copy and of the model.")
    epochs: float | None = Field(2.0, gt=0, description="Passes over each part's samples. Give this or steps.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")

    @model_validator(mode="after")
    def _sample_by_sample(self) -> "WHPSettings":
        if self.packing:
            raise ValueError("packing: whp keeps the tokens to learn sample by sample; set it to false")
        return self


def unlearn(task: Task, settings: WHPSettings) -> Branch:
    """Learn generic tokens in the forget samples' place: those that do not rise where a copy learns the samples further."""
    if settings.ask is not None:
        raise RecipeError(
            f"{task.setting}.ask: nobody was asked for terms before this training; give anchors in its place"
        )
    stream = forget_stream(task, settings)
    begun = task.state is not None and task.state.exists()  # then the tokens are in the state
    tokens = [] if begun else reinforced(task, settings, stream)
    with training(task.base, settings.trainable, task.seed, common=task.common) as trained:
        rows: list[list[int]] = []

        def next_loss(_number: int) -> Loss:
            if not rows:  # the loop has taken up the state by now
                rows.extend(rows_of(tokens))
            batch = next(stream)
            batch = relabelled(batch, rows)
            loss = outputs(trained.model, batch).mean()
            return Loss(loss * share(batch, learned_tokens), {})

        as_saved = partial(trained.as_saved, 1.0)
        steps = total_steps(task, settings)
        loop = Loop(
            task, settings, trained.parameters, next_loss, steps, [stream], memory={"tokens": tokens}, as_saved=as_saved
        )
        with training_mode(trained.model):
            history = loop.run()
        return Branch(
            trained.changes(1.0), history.steps, history.losses, history.stopped, history.notes, history.watched
        )


def reinforced(task: Task, settings: WHPSettings, stream: Stream) -> list[float]:
    """The generic tokens of all samples, one after the other, each sample's number of them before it: 0 where no step learns it.

    Raises RecipeError where the copy's training goes wrong.
    """
    steps = total_steps(task, settings)
    with trained_further(task, settings, settings.reinforce, "reinforce", "reinforcing", steps) as trained:
        return generic_tokens(trained, stream, settings, task)


def generic_tokens(trained: Trained, stream: Stream, settings: WHPSettings, task: Task) -> list[float]:
    """As `reinforced` gives them, of the copy as it is. Raises RecipeError where the memory does not hold one sample."""

    tokenizer = task.base.tokenizer
    terms = terms_of(read_anchors(settings.anchors), tokenizer)

    def chosen(rows: Sequence[int]) -> list[list[float]]:
        batch = stream.batch(rows)
        texts = [translated(each.ids, terms, tokenizer) for each in stream.encoded(rows)]
        other, wanted, spoken = foretold(batch, texts, task.base.positions)
        base, copy = base_outputs(trained, other), outputs(trained.model, batch)
        states = copy.states[wanted]
        tokens = torch.full_like(copy.labels, IGNORED)
        tokens[wanted] = torch.cat(
            [
                generic(
                    base.logits_of(base.states[places]),
                    copy.logits_of(states[places]),
                    settings.alpha,
                    settings.consistency,
                    spoken[places],
                )
                for places in base.places()
            ]
        )
        return [tokens[copy.rows == place].tolist() for place in range(copy.samples)]

    size, setting, steps = settings.batch_size, f"{task.setting}.max_length", total_steps(task, settings)
    learned, found = stream.learned(steps), dict[int, list[float]]()
    groups = (learned[start : start + size] for start in range(0, len(learned), size))
    with torch.no_grad(), evaluation_mode(trained.model), task.base.autocast():
        for rows, each in halved(groups, stream.longest, chosen, setting):
            found |= zip(rows, each, strict=True)
            task.progress(0, steps, f"generic tokens, {len(found)} of {len(learned)} samples")
    every = (found.get(row, []) for row in range(stream.count))
    return [value for own in every for value in (len(own), *own)]


def foretold(
    batch: Batch, texts: Sequence[Translated], positions: int | None
) -> tuple[Batch, Tensor, list[tuple[int, ...]]]:
    """Of learned tokens, n in a batch: the translations' batch, whose k learned places foretell k of them; which these are, (n,)
    bool; and what was spoken before each of the k."""
    coded, wanted, spoken = [], [], []
    for labels, text in zip(batch.labels.tolist(), texts, strict=True):
        ids = text.ids if positions is None else text.ids[:positions]
        own = [IGNORED] * len(ids)
        for label, place in list(zip(labels, text.places, strict=False))[1:]:
            if label == IGNORED:
                continue
            there = place.at is not None and place.at + 1 < len(ids)
            wanted.append(there)
            if place.at is not None and there:
                own[place.at + 1] = ids[place.at + 1]
                spoken.append(place.spoken)
        coded.append(Encoded(ids, own))
    device = batch.ids.device
    return collate(coded, device), torch.tensor(wanted, dtype=torch.bool, device=device), spoken


def generic(
    base: Tensor,
    reinforced: Tensor,
    alpha: float,
    consistency: float = 0.0,
    spoken: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Logits (k, v), (k, v) -> the likeliest token of v_generic at each place, (k,). spoken: tokens that lose `consistency`."""
    logits = base - alpha * (reinforced - base).clamp(min=0)
    for place, tokens in enumerate(spoken):
        logits[place, list(tokens)] -= consistency
    return logits.argmax(-1)


def rows_of(tokens: list[float]) -> list[list[int]]:
    """Each sample's tokens."""
    rows, at = [], 0
    while at < len(tokens):
        stop = at + 1 + int(tokens[at])
        rows.append([int(token) for token in tokens[at + 1 : stop]])
        at = stop
    return rows


def relabelled(batch: Batch, rows: list[list[int]]) -> Batch:
    """The batch with other tokens to learn at the same places, and those of its step; IGNORED where none is."""
    labels = batch.labels.clone()
    wanted = labels[:, 1:] != IGNORED
    labels[:, 1:][wanted] = torch.tensor(
        [token for row in batch.rows for token in rows[row]], dtype=labels.dtype, device=labels.device
    )
    return batch._replace(labels=labels, step=tuple(relabelled(each, rows) for each in batch.step))


def refuse(parts: Mapping[str, Samples], _retain: Samples | None, settings: WHPSettings) -> None:
    """Raises RecipeError for terms of which none stands in the rows."""
    anchors = read_anchors(settings.anchors)
    if settings.ask is not None:
        return  # its terms stand in the rows, or there are none and asking says so
    if anchors and not any(term in text for samples in parts.values() for text in samples.words() for term in anchors):
        raise RecipeError(
            f"{SETTING}: none of {len(anchors)} terms stands in the rows to forget; give terms as they are written"
        )


def inputs(settings: WHPSettings, _values: Sequence[str], _every: Sequence[str]) -> Mapping[str, Any]:
    """A file of terms may change."""
    return read_anchors(settings.anchors) if isinstance(settings.anchors, str) else {}


def answered(settings: WHPSettings, content: Any, parts: Mapping[str, Samples]) -> WHPSettings:
    """With the terms that stand in some rows: the recipe's own, and those that were asked for. Raises ValueError for no terms."""
    if not isinstance(content, Mapping):
        raise ValueError("no terms")
    try:
        asked = read_anchors(content) if content else {}
    except RecipeError as error:
        raise ValueError(str(error)) from None
    terms = standing({**asked, **read_anchors(settings.anchors)}, parts)
    return settings.model_copy(update={"anchors": terms or None, "ask": None})


def asked_of(settings: WHPSettings) -> AskSettings:
    assert settings.ask is not None
    return settings.ask


def told(parts: Mapping[str, Samples], settings: WHPSettings, progress: Steps) -> Told:
    """The terms of the parts' rows, from the endpoint."""
    found = ask(parts, asked_of(settings), progress)
    counts = {
        "dropped": sum(found.told["dropped"].values()),
        "translated in several ways": len(found.told["conflicts"]),
    }
    more = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return Told(found.terms, found.told, f"{len(found.terms)} terms of {found.told['passages']} passages{more}")


WHP = Method(
    settings=WHPSettings,
    source="Eldan and Russinovich 2023, arXiv 2310.02238",
    unlearn=unlearn,
    copying=lambda settings, rows, retain: further_steps(settings, settings.reinforce, rows),
    stored_entries=stored_entries,
    refuse=refuse,
    inputs=inputs,
    asking=Asking(
        name="anchors",
        wanted=lambda settings: settings.ask is not None,
        inputs=lambda parts, settings: asking_inputs(parts, asked_of(settings)),
        sent=lambda parts, settings: sent(parts, asked_of(settings)),
        ask=told,
        settled=answered,
    ),
)
