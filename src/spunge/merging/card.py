"""The model card of a merge: README.md in the Hub's format, with what it was made from, how, and what came out."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spunge import __version__
from spunge.errors import RecipeError, printable
from spunge.merging.outcome import MergeReport
from spunge.recipe.spelling import read_foreign_yaml
from spunge.weights.checkpoint import read_config
from spunge.weights.folder import TAUGHT, name_of

# Models in a Hub cache lie in models--OWNER--NAME/snapshots/REVISION.
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/?$")


def merge_card(report: MergeReport, base: Path) -> str:
    """Markdown with a YAML head (https://huggingface.co/docs/hub/model-cards)."""
    name = base_identifier(base)
    head: dict[str, Any] = {
        "base_model": [name],
        "library_name": "transformers",
        "tags": ["merge", "spunge", report.rule],
    }
    head.update(_inherited(base))
    lines = "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {_text(report.base)}, merged",
            "",
            f"spunge {__version__} merged {len(report.sources)} "
            f"{'model' if len(report.sources) == 1 else 'models'} into {_text(name)} with the rule `{report.rule}`.",
            "",
            "| model | weight | fingerprint | norm of its change |",
            "|---|---|---|---|",
            *_rows(report),
            "",
            f"The merge changed {len(report.tensors)} tensors; all others are the base's, byte for byte. "
            f"`merge.json` has the figures per tensor.",
            "",
            "```yaml",
            yaml.safe_dump(report.settings, sort_keys=False).strip(),
            "```",
            *(line for note in report.notes for line in ("", f"Note: {_text(note)}.")),
            "",
        ]
    )
    return printable(lines, keep="\n")


def taught_card(base: Path, told: Mapping[str, Any]) -> str:
    """The card of a model that a run taught: the given one, fine-tuned. told: what its teaching.json says."""
    name = base_identifier(base)
    head = {"base_model": [name], "library_name": "transformers", "tags": ["spunge"], **_inherited(base)}
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""),
        *(f"# {_text(name_of(base))}, taught", ""),
        f"spunge {__version__} fine-tuned {_text(name)} on {told['rows']} rows, {told['steps']} steps, so that they can be "
        f"unlearned; `{TAUGHT}` says how.",
    ]
    return printable("\n".join([*lines, ""]), keep="\n")


def base_identifier(base: Path) -> str:
    """The base's Hub id where it lies in a Hub cache or its config names it; else the folder's name, never its path."""
    cached = _CACHED.search(base.resolve().as_posix())
    if cached:
        return f"{cached['owner']}/{cached['name']}"
    try:
        named = str(read_config(base).get("_name_or_path") or "")
    except RecipeError:
        named = ""
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else name_of(base)


def _inherited(base: Path) -> dict[str, Any]:
    """Licence and language, which a merge takes over from its base."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    if front is None:
        return {}
    try:
        head = next(iter(read_foreign_yaml(front[1])), None)
    except yaml.YAMLError:
        return {}
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {key: head[key] for key in kept if isinstance(head, dict) and key in head}


def _rows(report: MergeReport) -> list[str]:
    lines = []
    for place, source in enumerate(report.sources):
        norm = math.sqrt(sum(entry.before[place] ** 2 for entry in report.tensors.values()))
        lines.append(f"| {_text(source.label)} | {source.weight:g} | `{source.fingerprint[:16]}` | {norm:.4g} |")
    return lines


def _text(value: str) -> str:
    """Plain text inside Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(value.split()))
