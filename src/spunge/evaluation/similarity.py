"""Similarity: how near a model's answers to normal prompts are to the base's, and to reference answers, in meaning.

SKU's measure of what was kept (arXiv 2402.10058, section 4: semantic similarity to the original model's answers): cosine
of sentence embeddings (Reimers & Gurevych 2019, arXiv 1908.10084). The base's answers are kept beside its scores.
"""

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.query import ROW
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.generation import GenerationSettings, completions, told, written_tokens
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.files import fingerprint, is_inside, parse_json, read_json, write_text
from spunge.model.loading import Base
from spunge.recipe.block import Place
from spunge.recipe.evaluating import ITEM_SETTINGS, EvaluatorSettings
from spunge.results import Higher

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


class SimilaritySettings(EvaluatorSettings):
    kind: str = "similarity"
    prompt: str = Field("prompt", description="Column or SQL expression: the prompt to answer.")
    reference: str | None = Field(
        None, description="Column or SQL expression: an answer to compare with, beside the base's."
    )
    encoder: Annotated[str, Place("model")] = Field(
        ENCODER, description="Sentence-transformers model that embeds the answers: folder or Hub id."
    )
    encoder_revision: str | None = Field(None, description="Branch, tag or commit of the encoder on the Hub.")
    generation: GenerationSettings = Field(default=GenerationSettings(), description="How prompts are answered.")

    @model_validator(mode="after")
    def _base_is_judged(self) -> "SimilaritySettings":
        if self.stages is not None and not any(fnmatchcase("base", pattern) for pattern in self.stages):
            raise ValueError("stages: similarity compares with the base's answers; add base")
        return self


def columns(settings: SimilaritySettings, forget: Mapping[str, str]) -> dict[str, str]:
    reference = {"reference": settings.reference} if settings.reference else {}
    return {"prompt": settings.prompt, **reference}


def instrument(settings: SimilaritySettings) -> dict[str, Any]:
    """The encoder and what tells its weights from others."""
    revision = fingerprint_of(settings.encoder, settings.encoder_revision, "evaluate.encoder")
    return {"encoder": settings.encoder, "revision": revision, **told(settings)}


def measure(base: Base, settings: SimilaritySettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Cosine similarity of a model's answers to the base's answers, and to reference answers."""
    encoder = bench.judges.get(
        ("encoder", settings.encoder, settings.encoder_revision, str(base.device)),
        lambda: load_encoder(settings.encoder, settings.encoder_revision, str(base.device)),
    )
    kept = bench.base_folder / f"texts-base-answers-{_key(settings, items)}.jsonl"
    is_base = bench.stage == "base" and not bench.attacked
    of_base = [] if is_base else read_answers(kept)
    written = completions(base, items["prompt"].to_pylist(), settings.generation, bench)
    wanted = {"similarity to base": of_base or written}
    if settings.reference:
        references = [str(text) for text in items["reference"].to_pylist()]
        wanted["similarity to reference"] = [[text] * settings.generation.samples for text in references]
    cosines = similarities(encoder, written, list(wanted.values()))
    if is_base:
        _keep(kept, written)
        bench.kept.add(kept)
    ones = np.ones(len(written))
    return [Measure(metric, values, ones, higher="known") for metric, values in zip(wanted, cosines, strict=True)]


def check_items(settings: SimilaritySettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError where the encoder cannot be had."""
    refuse_encoder(settings.encoder, "evaluate.encoder")


def metrics(settings: SimilaritySettings, items: pa.Table) -> dict[str, Higher]:
    one: dict[str, Higher] = {"similarity to base": "known"}
    return one | {"similarity to reference": "known"} if settings.reference else one


def similarities(
    encoder: Any, written: Sequence[Sequence[str]], others: Sequence[Sequence[Sequence[str]]]
) -> list[np.ndarray]:
    """For each of `others`, (n,) in [-1, 1]: the mean over an item's samples of the cosine between the two texts of that
    place. Each different text is embedded once; its embedding is cut where the encoder's own limit is."""
    texts = list(dict.fromkeys(text for answers in [written, *others] for each in answers for text in each))
    vectors = np.asarray(encoder.encode(texts, show_progress_bar=False, convert_to_numpy=True), dtype=np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    row_of = {text: at for at, text in enumerate(texts)}
    return [
        np.array(
            [
                np.mean([vectors[row_of[a]] @ vectors[row_of[b]] for a, b in zip(mine, theirs, strict=True)])
                for mine, theirs in zip(written, answers, strict=True)
            ]
        )
        for answers in others
    ]


def load_encoder(path: str, revision: str | None, device: str | None, setting: str = "evaluate.encoder") -> Any:
    """A SentenceTransformer. Raises RecipeError when the package is missing or the model cannot be loaded."""
    refuse_encoder(path, setting)
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(os.path.expanduser(path), revision=revision, device=device, trust_remote_code=False)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"{setting}: {path!r} cannot be loaded as a sentence encoder: {first}") from error


def refuse_encoder(path: str, setting: str) -> None:
    """Raises RecipeError where the package is missing, and for a folder that is not there or brings code of its own."""
    if find_spec("sentence_transformers") is None:
        raise RecipeError(f"{setting}: sentence-transformers is not installed; pip install 'spunge[judge]'")
    if path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise RecipeError(f"{setting}: no folder {path!r}; give a sentence-transformers model's folder or Hub id")
    _refuse_code(Path(os.path.expanduser(path)), path, setting)


def _refuse_code(folder: Path, path: str, setting: str) -> None:
    """Raises RecipeError for an encoder of modules that are not the package's: of a folder it would run the Python there."""
    modules = read_json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise RecipeError(
                f"{setting}: {path!r} brings code of its own ({kind!r} in modules.json), which is not run; give an encoder "
                "of sentence-transformers' modules"
            )
        if module.get("path") and not is_inside(module["path"]):
            raise RecipeError(f"{setting}: {path!r}: modules.json names {module['path']!r}, outside of the folder")


def read_answers(file: Path) -> list[list[str]]:
    """The base's answers, kept when it was judged. Raises RecipeError when it was not."""
    try:
        # Not splitlines: an answer may hold other line ends, such as U+2028, which JSON leaves as they are.
        return [
            [str(text) for text in parse_json(line)["texts"]]
            for line in file.read_text(encoding="utf-8").split("\n")
            if line
        ]
    except (ValueError, LookupError, TypeError):
        raise RecipeError(
            f"evaluate: the base's answers in {str(file)!r} are damaged; remove the file, and the base is judged again"
        ) from None
    except FileNotFoundError:
        raise RecipeError(
            f"evaluate.stages: similarity compares with the base's answers, and there are none in {str(file.parent)!r}; "
            "judge the base too (add base to stages)"
        ) from None


def _keep(file: Path, written: Sequence[Sequence[str]]) -> None:
    lines = [json.dumps({"row": row, "texts": list(texts)}, ensure_ascii=False) for row, texts in enumerate(written)]
    write_text(file, "\n".join(lines) + "\n")


def _key(settings: SimilaritySettings, items: pa.Table) -> str:
    """The same for every stage, and for other runs of the same evaluation, which may take the base's answers over."""
    content = items.select([name for name in items.column_names if name != ROW]).to_pydict()
    asked = settings.model_dump(mode="json", exclude=set(ITEM_SETTINGS))
    return fingerprint({"items": content, "settings": asked})[:16]


SIMILARITY = Evaluator(
    settings=SimilaritySettings,
    source="Liu et al. 2024, arXiv 2402.10058, section 4",
    measure=measure,
    columns=columns,
    metrics=metrics,
    instrument=instrument,
    check_items=check_items,
    written_tokens=written_tokens,
    compares_texts=True,
    version=2,  # under an attack the base is compared with what it wrote before it
)
