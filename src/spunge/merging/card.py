"""The model card of a merge: README.md in the Hub's format, with what it was made from, how, and what came out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spunge import __version__
from spunge.errors import printable
from spunge.merging.outcome import MergeReport
from spunge.weights.card import base_identifier, inherited, loading, markdown
from spunge.weights.folder import TAUGHT, name_of


def merge_card(report: MergeReport, base: Path) -> str:
    """Markdown with a YAML head (https://huggingface.co/docs/hub/model-cards)."""
    name = base_identifier(base)
    head: dict[str, Any] = {
        "base_model": [name],
        "library_name": "transformers",
        "tags": ["merge", "spunge", report.rule],
    }
    head.update(inherited(base))
    lines = "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {markdown(report.base)}, merged",
            "",
            f"spunge {__version__} merged {len(report.sources)} "
            f"{'model' if len(report.sources) == 1 else 'models'} into {markdown(name)} with the rule `{report.rule}`.",
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
            *(line for said in loading(base) for line in ("", said)),
            *(line for note in report.notes for line in ("", f"Note: {markdown(note)}.")),
            "",
        ]
    )
    return printable(lines, keep="\n")


def taught_card(base: Path, told: Mapping[str, Any]) -> str:
    """The card of a model that a run taught: the given one, fine-tuned. told: what its teaching.json says."""
    name = base_identifier(base)
    head = {"base_model": [name], "library_name": "transformers", "tags": ["spunge"], **inherited(base)}
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""),
        *(f"# {markdown(name_of(base))}, taught", ""),
        f"spunge {__version__} fine-tuned {markdown(name)} on {told['rows']} rows, {told['steps']} steps, so that they can be "
        f"unlearned; `{TAUGHT}` says how.",
    ]
    return printable("\n".join([*lines, ""]), keep="\n")


def _rows(report: MergeReport) -> list[str]:
    lines = []
    for place, source in enumerate(report.sources):
        norm = math.sqrt(sum(entry.before[place] ** 2 for entry in report.tensors.values()))
        lines.append(f"| {markdown(source.label)} | {source.weight:g} | `{source.fingerprint[:16]}` | {norm:.4g} |")
    return lines
