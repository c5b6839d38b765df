"""The card that a run's merged model is published with: the Hub's format, with its scores, what they mean and what they don't.

https://huggingface.co/docs/hub/model-cards#evaluation-results: `model-index` holds the merged model's scores, so that the Hub
shows them beside the model. The table of the text has the base and the joint run beside it.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from spunge import __version__
from spunge.errors import RecipeError, printable
from spunge.report.export import markdown_table
from spunge.report.scores import Metric, Scores, Subject, arranged
from spunge.results import Model, Results
from spunge.weights.card import base_identifier, inherited, loading, markdown
from spunge.weights.folder import name_of

STAGE = "merged"
BESIDE = {"base": "base", "control:joint": "joint, unsplit", STAGE: STAGE}  # stages of the table, and their names there
LIMITS = """\
- Unlearning makes a model unlikely to say what it was trained away from. It is no proof that the knowledge is gone: fine-tuning,
  other prompts, other languages or access to the weights can bring it back.
- The scores hold for the rows that they were measured on, with the intervals given. Other questions about the same subjects may
  be answered.
- What was to be kept was measured on a few sets; other abilities may have suffered.
- It is meant for research on unlearning, and for use where the base may be used. Judge it on your own rows first."""


def run_card(results: Results, base: Path | None, repository: str) -> str:
    """Markdown with a YAML head. base: the base's folder, where it is on this machine. Raises RecipeError for a run without a
    merged model."""
    merged = next((model for model in results.models if model.stage == STAGE), None)
    if merged is None:
        raise RecipeError(f"{str(results.folder)!r} has no merged model that was judged; `spunge run` goes on with it")
    name = base_name(merged, base)
    scores = arranged(results)
    head: dict[str, Any] = {
        **({"base_model": name, "base_model_relation": "finetune"} if "/" in name else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "spunge", *filter(None, (merged.method, merged.rule))],
        **(inherited(base) if base is not None else {}),
        "model-index": [{"name": repository.rpartition("/")[2], "results": list(_measured(scores))}],
    }
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""),
        *(f"# {markdown(name_of(Path(name)))}, unlearned", ""),
        f"[spunge](https://arxiv.org/abs/2406.11780) {__version__} made this model forget, in {len(results.parts)} "
        f"{'part' if len(results.parts) == 1 else 'parts'}, each unlearned on its own from {markdown(name)} by `{merged.method}` "
        f"and all of them merged by `{merged.rule}`.",
        "",
        *("## Scores", "", *_table(scores), ""),
        "In brackets the 95 % interval. `wanted` says which way is good.",
        *("", "## Limits", "", LIMITS, "", *_attacked(results)),
        *(line for said in (loading(base) if base is not None else ()) for line in (said, "")),
        *("## How it was made", "", "```yaml", yaml.safe_dump(made_with(merged), sort_keys=False).strip(), "```", ""),
        *(f"- {what}: `{value}`" for what, value in _versions(results, merged)),
    ]
    return printable("\n".join([*lines, ""]), keep="\n")


def base_name(merged: Model, base: Path | None) -> str:
    """The base's Hub id, or its folder's name; never a path of this machine."""
    if base is not None:
        return base_identifier(base)
    given = merged.base or "the base"
    return given if given.count("/") == 1 and not given.startswith((".", "/", "~")) else name_of(Path(given))


def made_with(merged: Model) -> dict[str, Any]:
    """The settings that the model was made with, without those that name files."""
    settings = {"method": merged.method, **_without_files(merged.settings or {})}
    merge = {
        "rule": merged.rule,
        "density": merged.density,
        "scale": merged.scale,
        **_without_files(merged.merge or {}),
    }
    return {"unlearn": settings, "merge": {key: value for key, value in merge.items() if value is not None}}


def _without_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            kept[key] = _without_files(value)
        elif not (isinstance(value, str) and ("/" in value or "\\" in value)) and value is not None:
            kept[key] = list(value) if isinstance(value, list | tuple) else value
    return kept


def _subjects(metric: Metric) -> Iterator[Subject]:
    """Those that sum a metric up: the worst part, and what is no part of the split; every one where these are all."""
    whole = [subject for subject in metric.subjects if subject.branch is None]
    yield from whole or metric.subjects


def _measured(scores: Scores) -> Iterator[dict[str, Any]]:
    """Entries of `model-index`: a score of the merged model each."""
    for metric in scores.metrics:
        for subject in _subjects(metric):
            row = metric.row(STAGE, subject.name)
            if row is None or not math.isfinite(row.value):
                continue
            entry = {"type": metric.name, "value": row.value, "name": f"{metric.name}, {subject.name}"}
            if row.low is not None and row.high is not None:
                entry["args"] = {"low": row.low, "high": row.high, "n": row.n}
            yield {
                "task": {"type": "text-generation"},
                "dataset": {"type": "other", "name": subject.name},
                "metrics": [{key: value for key, value in entry.items() if value is not None}],
            }


def _table(scores: Scores) -> Iterator[str]:
    there = {model.stage for model in scores.models}
    return markdown_table(scores.metrics, {stage: told for stage, told in BESIDE.items() if stage in there}, _subjects)


def _attacked(results: Results) -> Iterator[str]:
    """What attacks bring back of what this model forgot."""
    own = [share for share in results.recovered if share.stage == STAGE]
    if own:
        most = max(own, key=lambda share: share.value)
        yield (
            f"Of the attacks that were tried on it, the strongest ({markdown(most.metric)}, {markdown(most.subject)}) brings back "
            f"{100 * most.value:.0f}% of what was forgotten."
        )
        yield ""


def _versions(results: Results, merged: Model) -> Iterator[tuple[str, str]]:
    if merged.base_fingerprint:
        yield "fingerprint of the base's weights (`spunge verify` finds it again)", merged.base_fingerprint
    if merged.seeds:
        yield "seed", ", ".join(map(str, merged.seeds))
    yield "versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())
