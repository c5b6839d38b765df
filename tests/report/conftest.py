"""Made-up results and run folders, as functions that tests ask for by name."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml


def _row(stage: str, subject: str, metric: str, value: float, spread: float = 0.1, **more: Any) -> dict[str, Any]:
    higher = metric != "perplexity"
    bounds = {"low": value - spread, "high": value + spread, "n": 44}
    return (
        {"stage": stage, "subject": subject, "metric": metric, "value": value, "higher_is_better": higher}
        | bounds
        | more
    )


def _pair(results: dict[str, Any], spread: float = 0.1) -> dict[str, Any]:
    """With differences as the rows have them: every stage against the base, and merged against each control."""
    known = {(row["stage"], row["subject"], row["metric"]): row for row in results["rows"]}
    stages = dict.fromkeys(stage for stage, _, _ in known)
    pairs = [(stage, "base") for stage in stages if stage != "base"]
    pairs += [("merged", stage) for stage in stages if stage.startswith("control:")]
    found = []
    for stage, against in pairs:
        for (_, subject, metric), row in [item for item in known.items() if item[0][0] == stage]:
            other = known.get((against, subject, metric))
            if other is None or row["value"] is None or other["value"] is None:
                continue
            ratio = metric == "perplexity"
            value = row["value"] / other["value"] if ratio else row["value"] - other["value"]
            half = spread / 3 if ratio else spread
            bounds = {"low": value - half, "high": value + half, "n": 44}
            head = {"stage": stage, "against": against, "subject": subject, "metric": metric}
            found.append(head | {"kind": "ratio" if ratio else "difference", "value": value} | bounds)
    return results | {"differences": found}


def _results(
    parts: Sequence[str] = ("Europe", "Asia"),
    kept: Sequence[str] = ("Africa", "facts"),
    attribute: str | None = "continent",
) -> dict[str, Any]:
    """Parts fall from 0.9 to 0.3 in the merge, what is kept from 0.8 to 0.75; perplexity rises from 12 to 12.6.

    Of paired differences those of parts and of perplexity are certain.
    """
    slugs = [f"p{index}" for index in range(len(parts))]
    stages = ["base", *(f"branch:{slug}" for slug in slugs), "control:joint", "merged"]
    rows = [_row(stage, part, "accuracy", 0.9 if stage == "base" else 0.3) for part in parts for stage in stages]
    rows += [_row(stage, name, "accuracy", 0.8 if stage == "base" else 0.75) for name in kept for stage in stages]
    rows += [_row(stage, "text", "perplexity", 12.0 if stage == "base" else 12.6, spread=0.5) for stage in stages]
    named = [{"value": part, "slug": slug} for part, slug in zip(parts, slugs, strict=True)]
    versions = {"python": "3.11", "torch": "2.5"}
    head = {
        "schema": 1,
        "spunge": "0.1.0",
        "attribute": attribute,
        "parts": named,
        "stages": stages,
        "versions": versions,
    }
    instrument = {"scorer": "tiny/scorer", "revision": "abc123", "threshold": 0.5}
    evaluations = [
        {"name": "quiz", "kind": "choices", "metrics": ["accuracy"], "rows": "r1", "instrument": instrument},
        {"name": "prose", "kind": "perplexity", "metrics": ["perplexity"], "rows": "r2", "instrument": None},
    ]
    rest = {"device": "cpu", "dtype": "bfloat16", "seconds": 201.5, "evaluations": evaluations, "seeds": 1}
    return _pair({**head, **rest, "rows": rows})


def _attacked(steps: Sequence[int] = (5, 50)) -> dict[str, Any]:
    """Results with a relearning attack: after `steps`, the more the more of what was forgotten is back."""
    found = _results()
    for count in steps:
        metric, back = f"accuracy after relearning {count} steps", count / 100
        for stage in ("base", "control:joint", "merged"):
            for part in ("Europe", "Asia"):
                value = 0.9 if stage == "base" else 0.3 + 0.6 * back
                found["rows"].append(_row(stage, part, metric, value, of="accuracy"))
                if stage != "base":
                    share = back + (0.1 if part == "Asia" else 0)
                    place = {"stage": stage, "subject": part, "metric": metric, "of": "accuracy", "n": 44}
                    entry = place | {"value": share, "low": share - 0.2, "high": share + 0.2}
                    found.setdefault("recovered", []).append(entry)
    return found


def _write_run(run: Path, parts: Sequence[str] = ("Europe", "Asia"), kept: Sequence[str] = ("Africa", "facts")) -> Path:
    """A whole run folder, with files as the pipeline leaves them."""
    found = _results(parts, kept)
    full = [part | {"rows": 50, "selected": 40, "sha256": "ab" * 32} for part in found["parts"]]
    split = {"attribute": "continent", "parts": full, "rows": 130, "filtered": 3, "unassigned": 7}
    tensors = {"model.layers.5.mlp.down_proj.weight": {"kind": "dense", "shape": [8, 6]}}
    _write(run / "results.json", found)
    _write(run / "split.json", split | {"dropped": {"Oceania": "2 rows, fewer than split.min_rows 10"}})
    for place in [*(f"branches/{part['slug']}" for part in full), "controls/joint"]:
        mine = [part for part in full if place.endswith(f"/{part['slug']}")] or full
        trained = [{"value": part["value"], "rows": part["selected"], "sha256": part["sha256"]} for part in mine]
        losses = {"forget": 1.25, "retain": 0.5}
        info = {"format": 1, "base": "cd" * 32, "method": "rmu", "settings": {}, "parts": trained, "seeds": {}}
        _write(
            run / place / "delta.json",
            info
            | {
                "steps": 80,
                "stopped": None,
                "notes": {"coefficient": 51.5},
                "losses": losses,
                "seconds": 23.4,
                "tensors": tensors,
            },
        )
        (run / place / "delta.safetensors").write_bytes(bytes(2048))
    entry = {"kept": [0.2, 0.19], "conflicts": 0.213, "before": [1.0, 2.0], "after": 1.5}
    merge = {
        "format": 1,
        "rule": "ties",
        "settings": {"rule": "ties", "density": 0.2},
        "base": "tiny",
        "notes": [],
        "key": "k",
    }
    sources = [{"label": part["slug"], "fingerprint": "ef" * 32, "weight": 1.0} for part in full]
    _write(
        run / "merge.json",
        merge | {"sources": sources, "cosine": [[1.0, 0.1], [0.1, 1.0]], "tensors": dict.fromkeys(tensors, entry)},
    )
    recipe = {"model": {"path": "/models/tiny"}, "unlearn": {"method": "rmu"}, "split": {"values": list(parts)}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return run


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    return _row


@pytest.fixture
def results() -> Callable[..., dict[str, Any]]:
    return _results


@pytest.fixture
def pair() -> Callable[..., dict[str, Any]]:
    return _pair


@pytest.fixture
def attacked() -> Callable[..., dict[str, Any]]:
    return _attacked


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return _write_run
