"""AltPO (Mekala et al. 2024, arXiv 2409.13474): prefer another plausible answer to the one that is to be forgotten.

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * ((NLL_base - NLL)(other) - (NLL_base - NLL)(answer)))

which is DPO's with an answer of the same kind in the refusal's place, so that the model goes on to answer as it did, and says
something else. The other answers stand in a column of the forget rows, `forget.refusal`, a row for each where a prompt has
several.

Without that column the base writes them before training, as `alternatives` says: asked in the authors' words for Llama 2, through
its chat template where it has one, cut at "Question:" or "Q:", drawn at temperature 1, five a prompt ([their
code](https://github.com/molereddy/Alternate-Preference-Optimization)). Each pass over the samples takes the next answer, so the
authors' pass over five answers is five passes here. A draw that is empty or the answer to forget is drawn again, up to ten times;
theirs keeps it. A base that does not follow instructions is better given a column.
`execution: {kind: sharded}` needs the column. The authors take beta 0.1 and alpha 1 to 5. No figure of the paper was measured again
here.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.unlearning.alternatives import Alternatives, alternatives
from spunge.unlearning.batches import Stream
from spunge.unlearning.calls import FORGET, Group, Writing, descending, learned_rows
from spunge.unlearning.dpo import preferring
from spunge.unlearning.feed import forget_stream, total_steps
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, needs_retain
from spunge.unlearning.refusals import prompted, refuse_plain, spaced
from spunge.unlearning.trained import stored_entries

REFUSAL = "refusal"  # the samples' column of other answers


class AltPOSettings(OutputSettings):
    method: str = "altpo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")
    alternatives: Alternatives | None = Field(
        None,
        description="How the base writes other answers. Default: a column, forget.refusal, has them; where there is none, the base "
        "writes them as {} says.",
    )


def unlearn(task: Task, settings: AltPOSettings) -> Branch:
    """Prefer another plausible answer to the answer that is to be forgotten."""
    refuse(task.parts, task.retain, settings)
    forget = forget_stream(task, settings)
    if REFUSAL in forget.samples.table.column_names:
        given = [forget.replaced(others(forget.samples, settings, task.base.tokenizer))]
    else:
        given = sampled(task, settings, forget)
    return preferring(task, settings, settings.beta, forget, given)


def sampled(task: Task, settings: AltPOSettings, forget: Stream) -> list[Stream]:
    """Streams of the samples with answers that the base writes: one for each pass over them, at the most `count`. Rows that no
    step learns have none."""
    how, texts = settings.alternatives or Alternatives(), prompted(forget.samples, settings.method, task.base.tokenizer)
    steps = total_steps(task, settings)
    passes, learned = -(-steps * settings.accumulation // forget.batches), forget.learned(steps)
    streams = []
    for answers in alternatives(task, forget.samples, how, min(how.count, passes), settings.method, learned):
        every = [text.completion for text in texts]
        for row, answer in zip(learned, answers, strict=True):
            every[row] = spaced(answer, texts[row])
        streams.append(forget.replaced(forget.samples.answered(every), learned))
    return streams


def others(samples: Samples, settings: AltPOSettings, tokenizer: Any) -> Samples:
    """The samples with the answers of their column. Raises RecipeError for plain texts."""
    given = prompted(samples, settings.method, tokenizer)
    answers = samples.table[REFUSAL].to_pylist()
    return samples.answered([spaced(answer, text) for answer, text in zip(answers, given, strict=True)])


def shown(samples: Samples, settings: AltPOSettings, tokenizer: Any) -> Mapping[str, Samples]:
    """What it is given of a part's samples, as far as that is known before the base has written."""
    refuse_plain(samples, settings.method)
    there = REFUSAL in samples.table.column_names
    return {"to forget": samples} | ({"to prefer": others(samples, settings, tokenizer)} if there else {})


def refuse(parts: Mapping[str, Samples], _retain: Samples | None, settings: AltPOSettings) -> None:
    """Raises RecipeError for plain texts, and where other answers are given in two ways."""
    for samples in parts.values():
        refuse_plain(samples, settings.method)
        if settings.alternatives is not None and REFUSAL in samples.table.column_names:
            raise RecipeError(
                "unlearn.alternatives: forget.refusal names a column of other answers already; leave one of the two out"
            )


def calls(settings: AltPOSettings, _depth: int) -> list[Group]:
    how = settings.alternatives
    return descending(settings, (FORGET, FORGET), once=2 if how is None else 1 + how.count)


def writing(samples: Samples, settings: AltPOSettings, passes: float) -> Writing:
    if REFUSAL in samples.table.column_names:
        return Writing()
    how = settings.alternatives or Alternatives()
    return Writing(learned_rows(samples, passes) * min(how.count, math.ceil(passes)), how.tokens)


ALTPO = Method(
    settings=AltPOSettings,
    source="Mekala et al. 2024, arXiv 2409.13474",
    unlearn=unlearn,
    calls=calls,
    writing=writing,
    stored_entries=stored_entries,
    refuse=refuse,
    needs_retain=needs_retain,
    given=shown,
    shares=True,
)
