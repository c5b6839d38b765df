"""What a model thinks of the right answer beside other ones: probability among options, and TOFU's truth ratio.

With p(a) = P(a | prompt)^(1/n) over the n tokens of an answer a (TOFU, arXiv 2401.06121), a paraphrase ã of the answer and wrong
answers â that are worded like it, equation 1 is

    R = (1/k) (p(â1) + ... + p(âk)) / p(ã)

Everything here takes and gives natural logarithms of p, in which no answer is too unlikely for a float.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from spunge.data.samples import Samples
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.choices import listed
from spunge.evaluation.evaluator import Measure


def among_options(answer: float, wrong: np.ndarray) -> float:
    """P^(1/n) of the answer over the sum of it and of the wrong answers'. Given are logarithms, in which a sum of zeros is none."""
    together = np.array([answer, *wrong])
    return float(np.exp(answer - np.logaddexp.reduce(together)))


def log_truth_ratio(paraphrased: float, wrong: np.ndarray, mean: Literal["arithmetic", "geometric"]) -> float:
    """log R of TOFU's equation 1, from log P^(1/n) of the paraphrased and of each perturbed answer."""
    middle = wrong.mean() if mean == "geometric" else np.logaddexp.reduce(wrong) - np.log(len(wrong))
    return float(middle - paraphrased)


def truth_measures(logs: np.ndarray) -> list[Measure]:
    """The truth ratio and the two figures that TOFU makes of it. (n,) log R.

    As its exponent R itself has a mean that no single item decides; a test of its distribution takes log R as well as R.
    """
    ones = np.ones(len(logs))
    return [
        Measure("truth ratio", logs, ones, higher="unknown", transform="exp"),
        Measure("truth ratio, nearness to 1", np.exp(-np.abs(logs)), ones, higher="unknown"),
        Measure("truth ratio, true over false", -np.expm1(np.minimum(logs, 0.0)), ones, higher="known"),
    ]


def alternatives(rows: Samples, others: Sequence[Sequence[str]]) -> Samples:
    """Each row's prompt with each of its other answers, row after row."""
    owners = [at for at, texts in enumerate(others) for _ in texts]
    texts = [text for each in others for text in each]
    if "prompt" in rows.table.column_names:
        answers: list[str] = rows.table["completion"].to_pylist()
        leads = [answer[: len(answer) - len(answer.lstrip())] for answer in answers]
        texts = [leads[at] + text.lstrip() for at, text in zip(owners, texts, strict=True)]
    return Samples(taken(rows.table, owners)).answered(texts)


def perturbed_answers(items: pa.Table, setting: str) -> list[list[str]]:
    """Each row's wrong answers. Raises RecipeError, with the row's number, where there is none or one is no text."""
    every = []
    for at, value in enumerate(items["perturbed"].to_pylist()):
        given = listed(value)
        texts = [given] if isinstance(given, str) else given
        number = Samples(items).number(at)
        if not isinstance(texts, list) or not texts:
            raise RecipeError(f"{setting}: row {number} has no wrong answer; filter it out with where")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise RecipeError(f"{setting}: row {number}: {text!r} is no answer; mend the row")
        every.append(texts)
    return every
