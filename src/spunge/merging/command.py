"""All the steps of `spunge merge`: open the sources, check the settings, merge, and write what was asked for."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import whole_folder
from spunge.merging.adapters import Fit, write_adapter
from spunge.merging.engine import merge
from spunge.merging.folder import refuse_own
from spunge.merging.mergekit import Plan, read_mergekit
from spunge.merging.outcome import MergeReport
from spunge.merging.values import merged_changes
from spunge.model.hub import plain_folders
from spunge.progress import SILENT, Steps, Watcher
from spunge.recipe.block import Strict
from spunge.recipe.explanation import validated
from spunge.recipe.schema import ModelSettings, RuleSettings, named
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.delta import Sparse, write_delta
from spunge.weights.opening import open_source
from spunge.weights.sources import Source


@dataclass(frozen=True)
class Merged:
    """What `spunge merge` made: a checkpoint with its report, or an adapter with how well it fits, or a delta."""

    out: Path
    kind: str  # checkpoint, adapter or delta
    report: MergeReport | None = None
    fits: list[Fit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"out": str(self.out), "kind": self.kind, "notes": self.notes}
        if self.report is not None:
            content["report"] = self.report.to_json()
        if self.fits:
            content["residual"] = {fit.name: fit.residual for fit in self.fits}
        return content


def merge_command(
    out: Path,
    base: str | None = None,
    models: Sequence[str] = (),
    *,
    rule: str | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    mergekit: Path | None = None,
    as_adapter: int | None = None,
    as_delta: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    watcher: Watcher = SILENT,
) -> Merged:
    """Merge `models` (deltas, checkpoints, adapters; folders or Hub ids) into `base`, and write `out`.

    `settings` are the rule's own (density, scale, ...), `rule` is ties by default; `mergekit` names a configuration file
    that gives all of these instead. as_adapter: write a LoRA adapter of this rank in place of a checkpoint; as_delta: a
    sparse delta, which holds the merged change exactly. allow_pickle, dequantize: take models whose weights are pickled, or
    quantised; they are converted beside `out` for the time of the merge. Raises RecipeError with one line.
    """
    plan = _plan(base, models, rule, settings or {}, weights, mergekit)
    chosen = rule_settings(plan.settings)
    if as_adapter is not None and as_delta:
        raise RecipeError("--as-delta: give either --as-adapter or --as-delta")
    if as_adapter is None and not as_delta:
        refuse_own(out, [Path(each).expanduser() for each in (plan.base, *plan.models)])
    elif unread := [name for name in ("dtype", "rounding") if name in (settings or {})]:
        raise RecipeError(f"merge.{unread[0]}: deltas and adapters are float32; leave it out")
    elif out.exists() and any(out.iterdir()):
        raise RecipeError(f"--out: {str(out)!r} exists and is not empty; give another folder")
    given = [
        ModelSettings(path=each, allow_pickle=allow_pickle, dequantize=dequantize) for each in (plan.base, *plan.models)
    ]
    with plain_folders(given, out.with_name(f".{out.name}.converted")) as (folder, *folders):
        _check_layers(plan, folder)
        labels = [Path(each).resolve().name if Path(each).is_dir() else each for each in plan.models]
        sources = [open_source(each, folder, label) for each, label in zip(folders, labels, strict=True)]
        return _write(out, folder, sources, chosen, plan, as_adapter, as_delta, watcher)


def _write(
    out: Path,
    folder: Path,
    sources: Sequence[Source],
    chosen: RuleSettings,
    plan: Plan,
    as_adapter: int | None,
    as_delta: bool,
    watcher: Watcher,
) -> Merged:
    """Merge and write in the form that was asked for."""
    watcher.begin(f"merge {len(sources)} models by {chosen.rule}")
    if as_adapter is None and not as_delta:
        report = merge(folder, sources, chosen, out, weights=plan.weights, progress=watcher.step, notes=plan.notes)
        watcher.end(f"{len(report.changed)} tensors changed")
        return Merged(out, "checkpoint", report, notes=report.notes)
    names = {name for source in sources for name in source.names}
    changes = _counted(merged_changes(folder, sources, chosen, plan.weights), len(names), watcher.step)
    merged = (
        _delta(out, folder, sources, chosen, changes)
        if as_adapter is None
        else _adapter(out, folder, changes, names, as_adapter)
    )
    watcher.end(f"{len(names)} tensors changed")
    return replace(merged, notes=[*plan.notes, *merged.notes])


def _counted(changes: Iterator[tuple[str, Tensor]], total: int, progress: Steps) -> Iterator[tuple[str, Tensor]]:
    for number, change in enumerate(changes, 1):
        yield change
        progress(number, total)


class _Merge(Strict):
    """The settings of a merge, as in a recipe."""

    merge: Annotated[SerializeAsAny[RuleSettings], named(RULES, "rule", "ties")]


def rule_settings(values: Mapping[str, Any]) -> RuleSettings:
    """A rule's settings, validated as a recipe's are. Raises RecipeError naming the first that is wrong."""
    return validated(_Merge, {"merge": dict(values)}).merge


def _plan(
    base: str | None,
    models: Sequence[str],
    rule: str | None,
    settings: Mapping[str, Any],
    weights: Sequence[float] | None,
    mergekit: Path | None,
) -> Plan:
    if mergekit is not None:
        if base or models or rule or settings or weights:
            raise RecipeError(
                "--mergekit: the file says what to merge and how; give no --base, --model or rule beside it"
            )
        return read_mergekit(mergekit)
    if not base:
        raise RecipeError("--base: missing; give the model that the others were made from")
    given = list(weights) if weights else [1.0] * len(models)
    return Plan(base, list(models), given, {"rule": rule or "ties", **settings})


def _check_layers(plan: Plan, base: Path) -> None:
    """Raises RecipeError where a mergekit file's one slice is less than the model."""
    if plan.layers is None:
        return
    config = read_config(base, "--base")
    depth = config.get("text_config", config).get("num_hidden_layers") or config.get("n_layer")
    if plan.layers != depth:
        raise RecipeError(
            f"--mergekit: layer_range: {plan.layers} layers of {depth}; layers cannot be picked, list whole models"
        )


def _adapter(out: Path, base: Path, changes: Iterator[tuple[str, Tensor]], names: Collection[str], rank: int) -> Merged:
    if rank < 1:
        raise RecipeError(f"--as-adapter: {rank} is no rank; give 1 or more")
    with whole_folder(out) as aside:
        fits = write_adapter(aside, Checkpoint(base, "--base"), changes, names, rank)
    worst = max(fits, key=lambda fit: fit.residual * fit.norm)
    notes: list[str] = []
    if (lost := _lost(fits)) > 0.1:
        notes.append(
            f"a rank-{rank} adapter loses much of this merge: {lost:.0%} of the change's norm, most of it in {worst.name} "
            f"({worst.residual:.0%} of its own); write the checkpoint, or --as-delta, which is exact"
        )
    return Merged(out, "adapter", fits=fits, notes=notes)


def _lost(fits: Sequence[Fit]) -> float:
    """The norm of all that is left out, over the norm of the whole change."""
    return math.sqrt(sum((fit.residual * fit.norm) ** 2 for fit in fits) / sum(fit.norm**2 for fit in fits))


def _delta(
    out: Path,
    base: Path,
    sources: Sequence[Source],
    settings: RuleSettings,
    changes: Iterator[tuple[str, Tensor]],
) -> Merged:
    sparse = {name: Sparse.of(delta) for name, delta in changes}
    if not sparse:
        raise RecipeError("--model: no model differs from the base; there is nothing to write")
    info = {
        "base": Checkpoint(base).fingerprint(),
        "merge": settings.model_dump(mode="json"),
        "sources": [{"label": source.label, "fingerprint": source.fingerprint} for source in sources],
    }
    with whole_folder(out) as aside:
        write_delta(aside, sparse, info)
    return Merged(out, "delta")


def summary(merged: Merged) -> list[str]:
    """What was made, in a few lines for the terminal."""
    lines = [] if merged.report is None else _report_lines(merged.report)
    if merged.fits:
        lines.append(f"{len(merged.fits)} tensors as an adapter; {_lost(merged.fits):.1%} of the change's norm is lost")
        most = sorted(merged.fits, key=lambda fit: -fit.residual * fit.norm)[:5]
        lines += [f"  {fit.name}: {fit.residual:.1%} lost" for fit in most]
    return [*lines, *(f"note: {note}" for note in merged.notes)]


def _report_lines(report: MergeReport) -> list[str]:
    """Sources, sizes and conflicts."""
    tensors = report.tensors.values()
    lines = [f"{len(report.tensors)} tensors merged by {report.rule} from {len(report.sources)} models"]
    for place, source in enumerate(report.sources):
        kept = sum(entry.kept[place] for entry in tensors) / max(1, len(report.tensors))
        before = math.sqrt(sum(entry.before[place] ** 2 for entry in tensors))
        lines.append(
            f"  {source.label}: weight {source.weight:g}, norm {before:.4g}, keeps {kept:.1%} of a tensor on average"
        )
    after = math.sqrt(sum(entry.after**2 for entry in tensors))
    conflicts = sum(entry.conflicts for entry in tensors) / max(1, len(report.tensors))
    lines.append(f"  merged: norm {after:.4g}; of the entries that several keep, {conflicts:.1%} have both signs")
    if report.written is not None:
        lines.append(f"  written in {report.written.dtype}: {report.written.arrived:.1%} of the change arrives")
    pairs = [report.cosine[i][j] for i in range(len(report.sources)) for j in range(i)]
    if pairs:
        lines.append(f"  cosine between models: {min(pairs):.3f}" + (f" to {max(pairs):.3f}" if len(pairs) > 1 else ""))
    return [*lines, f"  checked: {report.checked}"] if report.checked else lines
