"""The answers that DPO, IDK and IDK+AP want in place of those to forget: a column of the forget rows, or a list of templates."""

import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from spunge.data.samples import Samples, Text
from spunge.errors import RecipeError
from spunge.recipe.training import MethodSettings
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


def refused(samples: Samples, settings: RefusalSettings, tokenizer: Any, rows: str = "forget") -> Samples:
    """The samples with their answers replaced. A prompt has the same refusal in its branch and in the joint control.

    rows: which of the recipe's rows these are, for errors. Raises RecipeError for plain texts, which have no prompt to refuse.
    """
    given = prompted(samples, settings.method, tokenizer, rows)
    if settings.refusals is None and "refusal" in samples.table.column_names:
        answers = samples.table["refusal"].to_pylist()
    else:
        choices = settings.refusals or REFUSALS
        answers = [choices[zlib.crc32(text.prompt.encode()) % len(choices)] for text in given]
    return samples.answered([spaced(answer, text) for answer, text in zip(answers, given, strict=True)])


def prompted(samples: Samples, method: str, tokenizer: Any, rows: str = "forget") -> list[Text]:
    """The samples as prompts and completions. Raises RecipeError for plain texts, which have no prompt to answer otherwise."""
    refuse_plain(samples, method, rows)
    return samples.texts(range(len(samples)), tokenizer)


def refuse_plain(samples: Samples, method: str, rows: str = "forget") -> None:
    """Raises RecipeError for plain texts. rows: which of the recipe's rows these are."""
    if samples.plain:
        raise RecipeError(
            f"{rows}: method {method!r} answers prompts, and the rows are plain texts; "
            f"give {rows}.prompt and {rows}.completion, or {rows}.messages"
        )


def refuse_plain_parts(parts: Mapping[str, Samples], _retain: Samples | None, settings: MethodSettings) -> None:
    """The same of all parts."""
    for samples in parts.values():
        refuse_plain(samples, settings.method)


def spaced(answer: str, text: Text) -> str:
    """Another answer as it stands in a text's place. A space before a completion is the completion's; a template spaces its
    messages itself."""
    return f" {answer}" if text.completion[:1] == " " and not text.templated else answer
