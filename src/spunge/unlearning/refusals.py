"""The answers that DPO and IDK want in place of those to forget: a column of the forget rows, or a list of templates."""

import zlib
from typing import Any

from pydantic import Field

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.unlearning.outputs import OutputSettings

REFUSALS = [
    "I don't know.",
    "I'm not sure.",
    "I have no information about that.",
    "I can't answer that.",
    "That is beyond what I know.",
    "I don't have an answer to that question.",
    "I'm afraid I don't know.",
    "I haven't learned about that.",
    "I'm not able to say.",
    "I have no knowledge of this.",
    "Sorry, I can't help with that.",
    "I couldn't tell you.",
    "That's not something I know about.",
    "I'm unable to answer this question.",
    "I wish I knew, but I don't.",
    "No idea, I'm sorry.",
]


class RefusalSettings(OutputSettings):
    """Of methods that learn an answer to prefer. The forget rows need prompts: prompt + completion, or messages."""

    refusals: list[str] | None = Field(
        None,
        min_length=1,
        description="Answers to draw from, one a sample. Default: forget.refusal's column where the recipe names one, else "
        'a list of sixteen, such as "I don\'t know."',
    )


def refused(samples: Samples, settings: RefusalSettings, tokenizer: Any) -> Samples:
    """The samples with their answers replaced. A prompt has the same refusal in its branch and in the joint control.

    Raises RecipeError for plain texts, which have no prompt to refuse.
    """
    if samples.plain:
        raise RecipeError(
            f"forget: method {settings.method!r} answers prompts, and the rows are plain texts; "
            "give forget.prompt and forget.completion, or forget.messages"
        )
    given = samples.texts(range(len(samples)), tokenizer)
    if settings.refusals is None and "refusal" in samples.table.column_names:
        answers = samples.table["refusal"].to_pylist()
    else:
        choices = settings.refusals or REFUSALS
        answers = [choices[zlib.crc32(text.prompt.encode()) % len(choices)] for text in given]
    # A space before a completion is the completion's; a template spaces its messages itself.
    spaces = [" " if text.completion[:1] == " " and not text.templated else "" for text in given]
    return samples.answered([space + answer for space, answer in zip(spaces, answers, strict=True)])
