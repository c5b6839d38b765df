"""Perplexity: exp of the mean negative log-likelihood per token over all texts (Jelinek et al. 1977).

A text longer than `max_length` is read in windows, each token scored once. With a prompt, its tokens are context alone.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from spunge.data.samples import Encoded, Samples, encode
from spunge.errors import RecipeError
from spunge.evaluation.columns import sample_columns
from spunge.evaluation.evaluator import Bench, Evaluator, Measure
from spunge.evaluation.likelihood import likelihoods
from spunge.model.loading import Base
from spunge.recipe.evaluating import EvaluatorSettings


class PerplexitySettings(EvaluatorSettings):
    kind: str = "perplexity"
    text: str | None = Field(None, description="Column or SQL expression with the text. Default: forget's columns.")
    prompt: str | None = Field(
        None, description="Column or SQL expression: context that is not scored; goes with completion."
    )
    completion: str | None = Field(None, description="Column or SQL expression: what is scored after the prompt.")
    messages: str | None = Field(
        None,
        description="Column with conversations; scored are the assistant's messages that forget's rows would learn.",
    )
    max_length: int = Field(1024, ge=2, description="Tokens of a window.")


def columns(settings: PerplexitySettings, forget: Mapping[str, str]) -> dict[str, str]:
    return sample_columns(settings, forget, "evaluate.perplexity")


def measure(base: Base, settings: PerplexitySettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Perplexity of the model on texts."""
    texts = Samples(items).texts(range(items.num_rows), base.tokenizer, "evaluate.perplexity")
    windows: list[Encoded] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        for window in windows_of(encode(text, base.tokenizer, 1 << 30), base.reach(settings.max_length)):
            windows.append(window)
            owner.append(number)
    loss, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    for number, likelihood in zip(owner, likelihoods(base, windows, bench.progress), strict=True):
        loss[number] -= likelihood.log
        tokens[number] += likelihood.tokens
    if not tokens.all():
        raise RecipeError(
            f"evaluate.perplexity: {int((tokens == 0).sum())} texts have no token to score "
            f"(first: row {int(np.argmin(tokens))}); filter them out with where"
        )
    return [Measure("perplexity", loss, tokens, higher="unknown", transform="exp")]


def windows_of(text: Encoded, size: int) -> list[Encoded]:
    """Pieces of at most `size` tokens. Each after the first begins with the last token before it, as context alone."""
    windows = [Encoded(text.ids[:size], text.labels[:size])]
    for start in range(size - 1, len(text.ids) - 1, size - 1):
        windows.append(Encoded(text.ids[start : start + size], text.labels[start : start + size]))
    return windows


PERPLEXITY = Evaluator(
    settings=PerplexitySettings,
    source="Jelinek et al. 1977",
    measure=measure,
    columns=columns,
    metrics=lambda settings, items: {"perplexity": "unknown"},
)
