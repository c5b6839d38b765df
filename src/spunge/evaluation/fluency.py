"""Fluency of generations: perplexity of the judged model's completions, given their prompts, under another model.

The SPUNGE paper's measure beside toxicity (arXiv 2406.11780, section 4: Llama-2-13b judges): exp of the mean negative
log-likelihood per token over all completions. The judge reads decoded text with its own tokenizer, and only the tokens
of completions count. An empty completion has none; see toxicity's `empty` for their share.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from spunge.data.samples import Text, encode
from spunge.evaluation.evaluator import Bench, Evaluator, Judges, Measure
from spunge.evaluation.generation import GenerationSettings, completions, told, written_tokens
from spunge.evaluation.likelihood import likelihoods
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.model.hub import judges_folder
from spunge.model.loading import Base, load_base
from spunge.recipe.block import Place
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.model import ModelSettings


class FluencySettings(EvaluatorSettings):
    kind: str = "fluency"
    prompt: str = Field("prompt", description="Column or SQL expression: the text to complete.")
    judge: Annotated[str, Place("model")] = Field(
        description="Causal language model that judges the completions: folder or Hub id."
    )
    judge_revision: str | None = Field(None, description="Branch, tag or commit of the judge on the Hub.")
    judge_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="As model.dtype, of the judge.")
    generation: GenerationSettings = Field(default=GenerationSettings(), description="How prompts are completed.")
    max_length: int = Field(
        1024, ge=2, description="The judge's tokens of prompt and completion; a longer prompt loses its start."
    )


def columns(settings: FluencySettings, forget: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": settings.prompt}


def instrument(settings: FluencySettings) -> dict[str, Any]:
    """The judge and what tells its weights from others."""
    return {
        "judge": settings.judge,
        "revision": fingerprint_of(settings.judge, settings.judge_revision, "evaluate.judge"),
        **told(settings),
    }


def measure(base: Base, settings: FluencySettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Perplexity of completions under a judge."""
    prompts: list[str] = items["prompt"].to_pylist()
    written = completions(base, prompts, settings.generation, bench)
    judge = load_judge(settings.judge, settings.judge_revision, settings.judge_dtype, base, bench.judges)
    # An answer to a chat message does not go on where the message ends.
    between = "\n" if settings.generation.chat else ""
    said = [(row, text) for row, texts in enumerate(written) for text in texts if text]
    coded = [
        encode(Text(prompts[row] + between, text), judge.tokenizer, judge.reach(settings.max_length))
        for row, text in said
    ]
    loss, tokens = np.zeros(len(prompts)), np.zeros(len(prompts))
    for (row, _), likelihood in zip(said, likelihoods(judge, coded, bench.progress), strict=True):
        loss[row] -= likelihood.log
        tokens[row] += likelihood.tokens
    return [Measure("completion perplexity", loss, tokens, higher="bad", transform="exp")]


def load_judge(
    path: str, revision: str | None, dtype: Literal["auto", "float32", "bfloat16"], base: Base, judges: Judges
) -> Base:
    """A causal language model that judges, on the judged model's device; loaded once. Raises RecipeError."""
    settings = ModelSettings(path=path, revision=revision, dtype=dtype, device=str(base.device))

    def load() -> Base:
        return load_base(judges_folder(settings, "evaluate.judge"), settings, setting="evaluate.judge")

    return judges.get(("causal", path, revision, dtype, str(base.device)), load)


FLUENCY = Evaluator(
    settings=FluencySettings,
    source="arXiv 2406.11780, section 4",
    measure=measure,
    columns=columns,
    metrics=lambda settings, items: {"completion perplexity": "bad"},
    instrument=instrument,
    written_tokens=written_tokens,
)
