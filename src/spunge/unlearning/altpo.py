"""AltPO (Mekala et al. 2024, arXiv 2409.13474): prefer another plausible answer to the one that is to be forgotten.

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * ((NLL_base - NLL)(other) - (NLL_base - NLL)(answer)))

which is DPO's with an answer of the same kind in the refusal's place, so that the model goes on to answer as it did, and says
something else. The other answers stand in a column of the forget rows; a row for each, where a prompt has several.

They are a column, `forget.refusal`, and are not sampled here: the authors ask the model for "another version of the answer with
some alternate plausible facts" and take five a prompt, beta 0.1 and alpha 1 to 5 ([their
prompts](https://github.com/molereddy/Alternate-Preference-Optimization)). No figure of the paper was measured again here.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.unlearning.calls import FORGET, descending
from spunge.unlearning.dpo import preferring
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, needs_retain
from spunge.unlearning.refusals import prompted, refuse_plain, spaced
from spunge.unlearning.trained import stored_entries


class AltPOSettings(OutputSettings):
    method: str = "altpo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")


def unlearn(task: Task, settings: AltPOSettings) -> Branch:
    """Prefer another plausible answer to the answer that is to be forgotten."""
    return preferring(task, settings, settings.beta, lambda samples: others(samples, settings, task.base.tokenizer))


def others(samples: Samples, settings: AltPOSettings, tokenizer: Any) -> Samples:
    """The samples with the answers of their column. Raises RecipeError for plain texts, and where there is no such column."""
    refuse({"": samples}, None, settings)
    given = prompted(samples, settings.method, tokenizer)
    answers = samples.table["refusal"].to_pylist()
    return samples.answered([spaced(answer, text) for answer, text in zip(answers, given, strict=True)])


def refuse(parts: Mapping[str, Samples], _retain: Samples | None, settings: AltPOSettings) -> None:
    """Raises RecipeError for plain texts, and where no column of other answers is named."""
    for samples in parts.values():
        refuse_plain(samples, settings.method)
        if "refusal" not in samples.table.column_names:
            raise RecipeError(
                "forget.refusal: missing, and altpo needs other plausible answers; name the column of the forget rows that has them"
            )


ALTPO = Method(
    settings=AltPOSettings,
    source="Mekala et al. 2024, arXiv 2409.13474",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings, (FORGET, FORGET), once=2),
    stored_entries=stored_entries,
    refuse=refuse,
    needs_retain=needs_retain,
    given=lambda samples, settings, tokenizer: {
        "to forget": samples,
        "to prefer": others(samples, settings, tokenizer),
    },
    shares=True,
)
