"""The stages that judge: one evaluation of one model each.

What is kept are the items' measurements (RUN/evaluation/MODEL/), so that statistics are made anew without judging again.
The base's are kept across runs too, in the cache folder, under the key of all that they depend on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from spunge.data.items import Items
from spunge.data.query import ROW
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Limits, Measure
from spunge.files import cache_folder, checksum, copied, fingerprint, is_inside, read_json, sealed, unsealed, write_json
from spunge.model.loading import Base, embeddings_of, image_tokens, load_tokenizer, pick_device, positions_of
from spunge.recipe.decoding import shift_of
from spunge.recipe.evaluating import ITEM_SETTINGS, measured_again
from spunge.recipe.model import ModelSettings
from spunge.registry import EVALUATORS
from spunge.run.graph import Made, NotMadeError
from spunge.run.inputs import BaseInputs
from spunge.run.keys import flattened
from spunge.run.measured import Measured, from_json, to_json
from spunge.run.models import Lineup, Model
from spunge.run.named import missing
from spunge.run.session import Session
from spunge.unlearning.checking import refuse_token
from spunge.unlearning.finetuning import finetune
from spunge.weights.rounding import Storage


@dataclass(frozen=True)
class Judging:
    """One evaluation of one model. `folder`: of the model's measurements; `base_folder`: of the base's."""

    model: Model
    items: Items
    lineup: Lineup
    folder: Path
    base_folder: Path

    @property
    def file(self) -> Path:
        return self.folder / measures_file(self.items.name)


def measures_file(evaluation: str) -> str:
    """An evaluation may be called anything, its file may not."""
    return f"{fingerprint(evaluation)[:12]}.json"


def evaluation_folder(folder: Path, model: str) -> Path:
    return folder / "evaluation" / model.replace(":", "-")


def judging_inputs(judging: Judging) -> dict[str, Any]:
    """What the measurements depend on beside the model."""
    items, lineup, model = judging.items, judging.lineup, judging.model
    content = evaluation_inputs(items, lineup.inputs.base)
    if model.trainings and model.merge is None:  # judged as it would be written
        content |= flattened("merge", model.storage._asdict())
    content |= _arithmetic(lineup) | decoded(model, lineup.inputs.base)
    of = measured_again(items.settings)
    if of is not None:
        inner = next(other for other in lineup.inputs.base.evaluations if other.name == of)
        content["of"] = fingerprint(evaluation_inputs(inner, lineup.inputs.base))
    if of is not None or EVALUATORS.get(items.settings.kind).uses_samples:
        content |= {f"part {part.value}": part.samples.sha256 for part in lineup.inputs.parts.parts}
        content["retain rows"] = lineup.inputs.retain.sha256 if lineup.inputs.retain else None
    return content


def model_key(judging: Judging, key: str, expert: str | None = None) -> str:
    """What a model's texts are known by. key: its stage's, which says neither the arithmetic nor, where it is a training's, what
    the model would be written in. expert: that of the training beside it."""
    model, about = judging.model, _arithmetic(judging.lineup) | decoded(judging.model, judging.lineup.inputs.base)
    if model.trainings and model.merge is None and model.storage != Storage():
        about |= model.storage._asdict()
    if expert is not None:
        about["expert"] = expert
    return fingerprint([key, about]) if about else key


def decoded(model: Model, base: BaseInputs) -> dict[str, Any]:
    """What a model's scores depend on where its logits shift those of a larger one."""
    decode = base.recipe.decode
    if decode is None or (model.given is not None and (not model.given.here or model.given.whole)):
        return {}
    if not base.large_here:
        raise NotMadeError(f"{decode.path!r} to be downloaded")
    about: dict[str, Any] = {"decode.model": base.large_key}
    if model.name == "base":
        return about
    shift = shift_of(decode, base.recipe.unlearn, model.shifting)
    return about | flattened("decode", {"kind": decode.kind, **shift, "apart": model.apart})


def _arithmetic(lineup: Lineup) -> dict[str, Any]:
    """What models are judged in, where it is not what the recipe says."""
    dtype = lineup.inputs.base.judged.dtype
    return {} if dtype == lineup.inputs.recipe.model.dtype else {"arithmetic": dtype}


def evaluation_inputs(items: Items, base: BaseInputs) -> dict[str, Any]:
    return {
        **flattened("evaluate", items.settings.model_dump(mode="json", exclude=set(ITEM_SETTINGS))),
        "items": items.sha256,
        "evaluator's version": EVALUATORS.version(items.settings.kind),
        **flattened("instrument", base.instruments[items.name]),
    }


def judge(judging: Judging, key: str, model_key: str, session: Session) -> Made:
    """Measure a model; those of the base, and of models beside it, are taken from the cache where another run left them."""
    if judging.model.shared and (taken := _from_cache(judging, key)):
        return Made(taken, "from the cache")
    inputs, items = judging.lineup.inputs, judging.items
    bench = bench_of(judging.lineup, judging.model.name, model_key, judging.folder, judging.base_folder, session)
    base = replace(shown(judging, session), board=session.board)
    measures = EVALUATORS.get(items.settings.kind).measure(base, items.settings, items.table, bench)
    _refuse_changed(items, inputs.base)
    dtype = str(base.dtype).removeprefix("torch.")
    kept = sorted(bench.kept)
    texts = tuple(file.name for file in kept)
    content = to_json(judging.model.name, items.name, Measured(measures, bench.rated, str(base.device), dtype, texts))
    write_json(judging.file, content)
    if judging.model.shared:
        _to_cache(
            _cached(key, inputs.recipe.model),
            key,
            content,
            kept if judging.lineup.inputs.recipe.keep_texts == "all" else [],
            dropped=bool(kept),
        )
    outcome = f"{items.table.num_rows} items" if items.table.num_rows else f"{len(measures)} measures"
    return Made([judging.file, *kept], outcome)


def _refuse_changed(items: Items, base: BaseInputs) -> None:
    """Raises RecipeError where files that were read as it was measured are no longer those that the key was made of."""
    evaluator = EVALUATORS.get(items.settings.kind)
    if not evaluator.rereads or evaluator.instrument is None:
        return
    if evaluator.instrument(items.settings) != base.instruments[items.name]:
        raise RecipeError(
            f"evaluate.{items.name}: its rows or files changed while the run was at work; give the same command again"
        )


def shown(judging: Judging, session: Session) -> Base:
    """The model that is judged, in memory."""
    return session.show(None if judging.model.name == "base" else judging.model)


def bench_of(lineup: Lineup, stage: str, model_key: str, folder: Path, base_folder: Path, session: Session) -> Bench:
    """What an evaluator has at hand for a model."""
    inputs = lineup.inputs
    return Bench(
        stage=stage,
        model=model_key,
        folder=folder,
        base_folder=base_folder,
        judges=session.judges,
        forget={part.value: part.samples for part in inputs.parts.parts},
        retain=inputs.retain,
        settings_of={other.name: other.settings for other in inputs.base.evaluations},
        finetune=finetune,
        progress=session.step,
    )


def measured_by(measures: Sequence[Measure], metric: str, items: Items, setting: str) -> Measure:
    """The measure of a metric over all items. setting: the block that names it. Raises RecipeError where there is none."""
    for measure in measures:
        if measure.metric == metric and measure.subject is None:
            return measure
    known = [measure.metric for measure in measures if measure.subject is None]
    why = missing("measures no", metric, known, "measures")
    raise RecipeError(f"{setting}.metric: the evaluation {items.name!r} {why}")


def refuse_items(evaluations: Iterable[Items], base: BaseInputs) -> None:
    """Raises RecipeError for items that cannot be measured, before anything is trained. The same items are looked at once."""
    model = base.recipe.model
    differing = {(items.name, items.sha256): items for items in evaluations}
    if not differing:
        return
    given = base.untaught if base.untaught.is_dir() else base.given
    if base.conversion is not None and base.conversion.gguf and given == base.given:
        return  # its tokenizer and its configuration are in the file that is still to be converted
    positions = None if base.conversion and given == base.given else positions_of(base.untaught, model)
    embeddings = embeddings_of(given, model)
    if base.recipe.decode is not None:
        embeddings = min(embeddings, embeddings_of(base.large, base.large_settings))
        both = [each for each in (positions, positions_of(base.large, base.large_settings)) if each is not None]
        positions = min(both, default=None)
    limits = Limits(base.tokenizer if given == base.given else load_tokenizer(model, given), embeddings, positions)
    seen = image_tokens(given, model)
    if base.recipe.decode is not None:
        seen |= image_tokens(base.large, base.large_settings)
    for items in differing.values():
        EVALUATORS.get(items.settings.kind).check_items(items.settings, items.table, limits)
        refuse_tokens(items, limits, seen)


def refuse_tokens(items: Items, limits: Limits, seen: Mapping[int, str]) -> None:
    """Raises RecipeError for a text with a token that the model has no embedding for, or in whose place it puts an image.

    seen: these tokens, with the configuration's names for them.
    """
    if max(limits.tokenizer.get_vocab().values(), default=0) < limits.embeddings and not seen:
        return
    count = items.table.num_rows
    numbers = items.table[ROW].to_pylist() if ROW in items.table.column_names else range(count)
    for column in items.table.column_names:
        for row, value in zip(numbers, items.table[column].to_pylist(), strict=True):
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            for ids in limits.tokenizer(texts)["input_ids"] if texts else ():
                refuse_token(ids, limits.tokenizer, limits.embeddings, seen, f"evaluate.{items.name}: row {row}")


def compared(judging: Judging) -> list[str]:
    """The evaluations, itself or the one that it measures again, that compare what a model writes with what the base wrote."""
    names = (judging.items.name, measured_again(judging.items.settings))
    evaluations = [other for other in judging.lineup.inputs.base.evaluations if other.name in names]
    return [each.name for each in evaluations if EVALUATORS.get(each.settings.kind).compares_texts]


def _cached(key: str, model: ModelSettings) -> Path:
    """Where the base's measurements are kept: apart for each machine and version that may give other last bits."""
    import torch
    import transformers

    device = pick_device(model.device)
    made_with = {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    return cache_folder() / "base" / f"{key[:32]}-{fingerprint(made_with)[:8]}"


def _from_cache(judging: Judging, key: str) -> list[Path]:
    """Take the base's measurements, and the texts that were made for them, from an earlier run: all of them whole, or none."""
    folder = _cached(key, judging.lineup.inputs.recipe.model)
    stored = cached_scores(folder, key)
    if stored is None:
        return []
    if stored.dropped and (judging.lineup.inputs.recipe.keep_texts != "none" or compared(judging)):
        return []
    try:
        if any(checksum(folder / name) != mark for name, mark in stored.files.items()):
            return []
    except OSError:
        return []
    taken = [copied(folder / name, judging.folder / name) for name in stored.files]
    write_json(judging.file, {**stored.content, "evaluation": judging.items.name})
    return [judging.file, *taken]


class CachedScores(BaseModel):
    """The base's measurements in the cache: `content` as a judging's file holds them, and the checksums of texts beside them."""

    key: str
    files: dict[str, str]
    content: dict[str, Any]
    dropped: bool = False  # texts were made for them that are not kept


def cached_scores(folder: Path, key: str) -> CachedScores | None:
    """None for what is not whole, of another key, or not written by a judging."""
    try:
        stored = CachedScores.model_validate(unsealed(read_json(folder / "scores.json")), strict=True)
        from_json(stored.content)
    except ValueError:
        return None
    return stored if stored.key == key and all(map(is_inside, stored.files)) else None


def _to_cache(folder: Path, key: str, content: dict[str, Any], kept: Iterable[Path], dropped: bool) -> None:
    """Keep the base's measurements for other runs. Where the cache cannot be written, nothing is kept.

    dropped: texts were made for them that are not kept.
    """
    try:
        marks = {file.name: checksum(copied(file, folder / file.name)) for file in kept}
        dropped = dropped and not marks
        write_json(folder / "scores.json", sealed({"key": key, "files": marks, "content": content, "dropped": dropped}))
    except (OSError, RecipeError):
        return


def drop_cached_texts(key: str) -> bool:
    """Remove the texts that the cache keeps of a judging of the base. Its measurements stay. Whether there were any."""
    if not re.fullmatch(r"[0-9a-f]{64}", key):
        return False  # a stamp that another hand wrote
    removed = False
    for folder in (cache_folder() / "base").glob(f"{key[:32]}-*"):
        texts = [file for file in folder.glob("*") if file.name != "scores.json"]
        stored = unsealed(read_json(folder / "scores.json"))
        if texts and stored is not None:
            write_json(folder / "scores.json", sealed({**stored, "files": {}, "dropped": True}))
        for file in texts:
            file.unlink(missing_ok=True)
        removed = removed or bool(texts)
    return removed
