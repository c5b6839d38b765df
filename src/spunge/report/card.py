"""The model card of a merge: README.md in the Hub's format, with what it was made from and how."""

from pathlib import Path
from typing import Any

import yaml

from spunge.merging.outcome import MergeReport


def merge_card(report: MergeReport, base: Path) -> str:
    """Markdown with a YAML head (https://huggingface.co/docs/hub/model-cards)."""
    head: dict[str, Any] = {"base_model": [report.base], "library_name": "transformers", "tags": ["merge", "spunge"]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {report.base}, merged", ""]
    lines += [f"Made by spunge with the rule `{report.rule}` from:", ""]
    lines += [
        f"- `{source.label}`, weight {source.weight:g}, fingerprint `{source.fingerprint[:16]}`"
        for source in report.sources
    ]
    return "\n".join([*lines, "", "```yaml", yaml.safe_dump(report.settings, sort_keys=False).strip(), "```", ""])
