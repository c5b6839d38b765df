"""All the steps of `spunge merge`: open the sources, check the settings, merge, and write what was asked for."""

import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import whole_folder, write_json
from spunge.merging.adapters import Fit, write_adapter
from spunge.merging.earlier import DAMAGED, REPORT, claimed, earlier, merge_key, weight_files
from spunge.merging.engine import merge
from spunge.merging.folder import refuse_own
from spunge.merging.mergekit import Plan, read_mergekit
from spunge.merging.outcome import MergeReport, reports_of
from spunge.merging.values import merged_changes
from spunge.model.hub import plain_folders
from spunge.progress import SILENT, Steps, Watcher
from spunge.recipe.block import Strict
from spunge.recipe.explanation import validated
from spunge.recipe.merging import RuleSettings
from spunge.recipe.model import ModelSettings
from spunge.recipe.named import named
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.delta import Sparse, write_delta
from spunge.weights.folder import name_of
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
            content["norm"] = {fit.name: fit.norm for fit in self.fits}
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
    replace: bool = False,
    watcher: Watcher = SILENT,
) -> Merged:
    """Merge `models` (deltas, checkpoints, adapters; folders or Hub ids) into `base`, and write `out`.

    `settings` are the rule's own (density, scale, ...), `rule` is ties by default; `mergekit` names a configuration file
    that gives all of these instead. as_adapter: write a LoRA adapter of this rank in place of a checkpoint; as_delta: a
    sparse delta, which holds the merged change exactly. allow_pickle, dequantize: take models whose weights are pickled, or
    quantised; they are converted beside `out` for the time of the merge. Raises RecipeError with one line.
    """
    plan = _plan(base, models, rule, settings or {}, weights, mergekit)
    if as_adapter is not None and as_delta:
        raise RecipeError("--as-delta: give either --as-adapter or --as-delta")
    if as_adapter is not None or as_delta:
        plan = _without_dtype(plan, mergekit)
    chosen = rule_settings(plan.settings)
    refuse_own(out, [Path(os.path.expanduser(each)) for each in (plan.base, *plan.models)])
    plain = as_adapter is None and not as_delta
    if unread := [name for name in ("dtype", "rounding") if not plain and name in (settings or {})]:
        raise RecipeError(f"merge.{unread[0]}: deltas and adapters are float32; leave it out")
    if as_adapter is not None and as_adapter < 1:
        raise RecipeError(f"--as-adapter: {as_adapter} is no rank; give 1 or more")
    given = [
        ModelSettings(path=each, allow_pickle=allow_pickle, dequantize=dequantize) for each in (plan.base, *plan.models)
    ]
    with plain_folders(given, out.with_name(f".{out.name}.converted")) as (folder, *folders):
        _check_layers(plan, folder)
        labels = [Path(each).resolve().name if os.path.isdir(each) else each for each in plan.models]
        sources = [open_source(each, folder, label) for each, label in zip(folders, labels, strict=True)]
        watcher.begin(f"merge {len(sources)} models by {chosen.rule}")
        if not plain:
            return _change(out, folder, sources, chosen, plan, as_adapter, replace, watcher)
        progress, notes = watcher.step, plan.notes
        report = merge(
            folder, sources, chosen, out, weights=plan.weights, progress=progress, notes=notes, replace=replace
        )
        watcher.end(f"{len(report.changed)} tensors changed")
        return Merged(out, "checkpoint", report, notes=report.notes)


def _change(
    out: Path,
    folder: Path,
    sources: Sequence[Source],
    chosen: RuleSettings,
    plan: Plan,
    rank: int | None,
    replace: bool,
    watcher: Watcher,
) -> Merged:
    """The merged change alone, as a delta or an adapter, with a merge.json beside it."""
    form = "delta" if rank is None else f"adapter of rank {rank}"
    key = merge_key(Checkpoint(folder), sources, plan.weights, chosen, form)
    about = {
        "format": 2,
        "key": key,
        "base": name_of(folder),
        "settings": chosen.model_dump(mode="json"),
        "sources": [vars(each) for each in reports_of(sources, plan.weights)],
    }
    with claimed(out):
        if (content := earlier(out, key, replace)) is not None:
            try:
                return _read(out, content)
            except (LookupError, TypeError, ValueError, AttributeError):
                if not replace:
                    raise RecipeError(DAMAGED) from None
        names = {name for source in sources for name in source.names}
        changes = _counted(merged_changes(folder, sources, chosen, plan.weights), len(names), watcher.step)
        with whole_folder(out, replace=True) as aside:
            merged = (
                _delta(aside, folder, sources, chosen, changes)
                if rank is None
                else _adapter(aside, folder, changes, names, rank)
            )
            merged = dataclasses.replace(merged, out=out, notes=[*plan.notes, *merged.notes])
            told = {key: value for key, value in merged.to_json().items() if key != "out"}
            write_json(aside / REPORT, {**about, **told, "files": weight_files(aside)})
    watcher.end(f"{len(names)} tensors changed")
    return merged


def _read(out: Path, content: Mapping[str, Any]) -> Merged:
    """The delta or adapter that an earlier call wrote. What it raises for another content is Python's."""
    fits = [
        Fit(name, float(residual), float(content["norm"][name]))
        for name, residual in content.get("residual", {}).items()
    ]
    return Merged(out, str(content["kind"]), fits=fits, notes=[str(note) for note in content["notes"]])


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


def _without_dtype(plan: Plan, mergekit: Path | None) -> Plan:
    """A mergekit file's dtype is of a checkpoint: where none is written it is said to be left out."""
    if mergekit is None or "dtype" not in plan.settings:
        return plan
    settings = {key: value for key, value in plan.settings.items() if key != "dtype"}
    note = f"the file's dtype {plan.settings['dtype']} is not read: deltas and adapters are float32"
    return dataclasses.replace(plan, settings=settings, notes=[*plan.notes, note])


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
    fits = write_adapter(out, Checkpoint(base, "--base"), changes, names, rank)
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
    if not any(change.values.numel() for change in sparse.values()):
        raise RecipeError(
            "--model: no model differs from the base, or nothing of it is kept; there is nothing to write"
        )
    info = {
        "base": Checkpoint(base).fingerprint(),
        "merge": settings.model_dump(mode="json"),
        "sources": [{"label": source.label, "fingerprint": source.fingerprint} for source in sources],
    }
    write_delta(out, sparse, info)
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
