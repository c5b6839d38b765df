"""Targets that read what a run or a merge left in its folder, and what lies in the shared cache."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.mutations import any_value, as_json, change, changed, damage, json_file, json_files
from fuzzing.trial import Target
from spunge.data.rows import find_files
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Measure, Rated
from spunge.evaluation.generation import _written
from spunge.evaluation.scorers.probe import read_description
from spunge.evaluation.similarity import read_answers
from spunge.files import is_inside, sealed
from spunge.merging.earlier import earlier
from spunge.merging.outcome import MergeReport
from spunge.report.page import page
from spunge.results import parse_results, read_results
from spunge.run.judge import cached_scores
from spunge.run.measured import Measured, from_json, read_measured, to_json
from spunge.run.stamps import Stamp, read_stamp, stamp_file, stamps_in, store_stamp
from spunge.run.texts import _noted, _sampled
from spunge.run.train import read_choice, undecided
from spunge.unlearning.rmu.settings import RMUSettings

ABOUT = {"subject": "a", "metric": "accuracy", "value": 0.5}
ROW = {**ABOUT, "stage": "base", "low": 0.4, "high": 0.6, "n": 3, "wanted": "up"}
MERGED = {**ROW, "stage": "merged", "value": 0.2, "low": 0.1, "high": 0.3, "group": "forget"}
DIFFERENCE = {**ABOUT, "stage": "merged", "against": "base", "kind": "difference"}
EVALUATION = {
    "name": "e",
    "kind": "choices",
    "metrics": ["accuracy"],
    "rows": "ab",
    "instrument": None,
    "settings": {"x": 1},
}
RESULTS = {
    "schema": 1,
    "spunge": "1",
    "attribute": "topic",
    "parts": [{"value": "a", "slug": "a"}],
    "stages": ["base", "merged"],
    "models": [
        {"stage": "base", "kind": "base", "name": "base"},
        {"stage": "merged", "kind": "merged", "name": "merged"},
    ],
    "versions": {"torch": "2"},
    "rows": [{**ROW, "group": "forget"}, MERGED],
    "differences": [DIFFERENCE],
    "evaluations": [EVALUATION],
    "seconds": 3.5,
    "seeds": 1,
}
OLDER = {
    "rows": [ROW, {**ROW, "stage": "branch:a", "metric": "after 10 steps", "of": "accuracy"}],
    "parts": RESULTS["parts"],
}


def _results(folder: Path, content: Any) -> int:
    """What is read is written to the same again."""
    results = parse_results(content)
    again = parse_results(json.loads(json.dumps(results.content)))
    assert repr(again.rows) == repr(results.rows)
    return 1 << 14


def _results_file(folder: Path, content: bytes) -> int:
    (folder / "results.json").write_bytes(content)
    read_results(folder)
    return len(content)


STAMP = Stamp("branch:a", "0" * 64, {"model": "x", "stage base": "1"}, {}, 1.5)
STAMPED = {
    "format": 1,
    "stage": "branch:a",
    "key": "0" * 64,
    "inputs": {"model": "x"},
    "files": {"branches/a/delta.json": {"size": 3, "xxh3": "0" * 32, "byproduct": False}},
    "seconds": 1.5,
    "dropped": ["x.jsonl"],
}


def _some_stamp(chance: random.Random) -> bytes:
    """Damaged, or whole and of something else."""
    if chance.random() < 0.3:
        return damage(chance, as_json(sealed(STAMPED)))
    content = change(chance, STAMPED)
    return as_json(sealed(content) if isinstance(content, dict) and _can_be_sealed(content) else content)


def _can_be_sealed(content: Any) -> bool:
    try:
        sealed(content)
    except (UnicodeEncodeError, ValueError):
        return False
    return True


def _stamp(folder: Path, content: bytes) -> int:
    file = stamp_file(folder, "branch:a")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    stamp = read_stamp(folder, "branch:a")
    assert list(stamps_in(folder)) == ([] if stamp is None else [stamp])
    if stamp is None:
        raise RecipeError("not vouched for")
    assert stamp.size >= 0
    assert f"{stamp.seconds:.1f}"
    if "\\ud" in json.dumps(asdict(stamp)):
        return len(content)  # halves of characters, which no program writes
    store_stamp(folder / "again", stamp)
    assert read_stamp(folder / "again", "branch:a") == stamp
    return len(content)


RUN = {
    "recipe.yaml": b"model: {path: owner/name}\nforget: {source: x.jsonl}\n",
    "results.json": as_json(RESULTS),
    "split.json": as_json(
        {
            "attribute": "topic",
            "rows": 4,
            "filtered": 0,
            "unassigned": 1,
            "parts": [{"value": "a", "slug": "a", "rows": 3, "empty": 0, "selected": 3, "sha256": "00"}],
            "dropped": {"b": "too few"},
            "notes": ["n"],
        }
    ),
    "branches/a/delta.json": as_json(
        {
            "parts": [{"value": "a", "rows": 3}],
            "steps": 3,
            "losses": {"forget": 0.5},
            "notes": {"layer": 2},
            "seconds": 1.5,
            "tensors": {"x": {"kind": "dense", "shape": [2, 2]}},
        }
    ),
}
MERGE = {
    "format": 2,
    "rule": "ties",
    "settings": {"density": 0.2},
    "base": "b",
    "sources": [{"label": "a", "fingerprint": "ab", "weight": 1.0}],
    "cosine": [[1.0]],
    "notes": [],
    "written": None,
    "checked": "",
    "files": {"model.safetensors": 4},
    "tensors": {"x": {"kept": [0.2], "conflicts": 0.0, "before": [1.0], "after": 0.5}},
    "key": "k",
}
RUN["merge.json"] = as_json(MERGE)


def _some_run(chance: random.Random) -> dict[str, bytes]:
    name = chance.choice([*RUN])
    content = RUN[name]
    changed = json_file(chance, json.loads(content)) if name.endswith(".json") else damage(chance, content)
    return {**RUN, name: changed}


def _page(folder: Path, files: dict[str, bytes]) -> int:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    html = page(folder)
    assert "</html>" in html
    return sum(map(len, files.values())) + (1 << 20)


def _merged(folder: Path, content: bytes) -> int:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    (out / "merge.json").write_bytes(content)
    (out / "model.safetensors").write_bytes(b"1234")
    report = earlier(out, "k", replace=False)
    if report is not None:
        try:
            told = MergeReport.from_json(report)
        except ValueError:
            raise RecipeError("refused by whoever reads it") from None
        assert MergeReport.from_json(told.to_json()) == told or "nan" in repr(told)
    return len(content)


TEXTS = [as_json(sealed({"row": row, "texts": ["a", "b"]})).decode() for row in range(3)]


def _some_texts(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return damage(chance, "\n".join(TEXTS).encode())
    lines = [
        sealed({"row": any_value(chance), "texts": ["a"]})
        if chance.random() < 0.5
        else sealed({"row": 1, "texts": ["a"]})
    ]
    return b"\n".join(as_json(line) for line in lines if _can_be_sealed(line))


def _texts(folder: Path, content: bytes) -> int:
    file = folder / "texts.jsonl"
    file.write_bytes(content)
    kept = _written(file, 3)
    assert all(row in range(3) and all(isinstance(text, str) for text in texts) for row, texts in kept.items())
    assert _written(file, 3) == kept
    _sampled(content.decode("utf-8", "replace").split("\n"))
    return len(content)


def _answers(folder: Path, content: bytes) -> int:
    file = folder / "answers.jsonl"
    file.write_bytes(content)
    read_answers(file)
    return len(content)


def _notes(folder: Path, content: bytes) -> int:
    (folder / "cached-rows.json").write_bytes(content)
    _noted(folder)
    (folder / "probe.json").write_bytes(content)
    read_description(str(folder))
    return len(content)


STATE = {"_data_files": [{"filename": "data-0.arrow"}], "_split": "train"}


def _some_state(chance: random.Random) -> tuple[bytes, bytes]:
    splits = {"splits": ["train"]}
    return json_file(chance, STATE), json_file(chance, splits) if chance.random() < 0.3 else as_json(splits)


def _saved(folder: Path, case: tuple[bytes, bytes]) -> int:
    own = folder / "saved" / "train"
    own.mkdir(parents=True, exist_ok=True)
    (own / "data-0.arrow").write_bytes(b"")
    (own / "state.json").write_bytes(case[0])
    (own.parent / "dataset_dict.json").write_bytes(case[1])
    files = find_files(str(own.parent), "forget.source")
    assert all(own.parent in file.parents for file in files)
    return sum(map(len, case))


MEASURED = to_json(
    "base",
    "e",
    Measured(
        [Measure("accuracy", np.array([1.0, 0.0]), np.ones(2), higher="good", chance=0.5, subject="a")],
        [Rated(0.5, 0.1, 0.9, 2)],
        "cpu",
        "float32",
    ),
)


def _measured(folder: Path, content: bytes) -> int:
    """What is read is written to the same again."""
    file = folder / "measured.json"
    file.write_bytes(content)
    measured = read_measured(file)
    again = from_json(json.loads(json.dumps(to_json("base", "e", measured))))
    assert repr(again) == repr(measured)
    return len(content)


CACHED = {"key": "k", "files": {"texts.jsonl": "0" * 32}, "content": MEASURED, "dropped": False}


def _some_cached(chance: random.Random) -> bytes:
    """Damaged, or whole and of something else."""
    content = change(chance, CACHED)
    if chance.random() < 0.3 or not isinstance(content, dict) or not _can_be_sealed(content):
        return damage(chance, as_json(sealed(CACHED)))
    return as_json(sealed(content))


def _cached(folder: Path, content: bytes) -> int:
    (folder / "scores.json").write_bytes(content)
    stored = cached_scores(folder, "k")
    if stored is None:
        raise RecipeError("judged again")
    assert from_json(stored.content)
    assert all(is_inside(name) for name in stored.files)
    return len(content)


CHOSEN: Any = RMUSettings.model_validate({"method": "rmu", "steps": 3, "layer": "auto"})
SETTLED = {
    "settings": RMUSettings(steps=3, layer=2, coefficient=10.0).model_dump(mode="json"),
    "notes": {"layer": 2},
    "measured": [{"layer": 2}],
}


def _settled(folder: Path, content: bytes) -> int:
    """What is taken leaves nothing open."""
    (folder / "settled.json").write_bytes(content)
    chosen = read_choice(folder / "settled.json", CHOSEN)
    assert not undecided(chosen.settings)
    return len(content)


TARGETS = (
    Target("measured", json_files(MEASURED), _measured, 500),
    Target("base-cache", _some_cached, _cached, 300),
    Target("settled", json_files(SETTLED), _settled, 300),
    Target("results", changed(RESULTS, OLDER), _results, 2000),
    Target("results-file", json_files(RESULTS, OLDER), _results_file, 300),
    Target("stamp", _some_stamp, _stamp, 600),
    Target("page", _some_run, _page, 30),
    Target("merge-report", json_files(MERGE), _merged, 500),
    Target("texts", _some_texts, _texts, 100),
    Target("answers", _some_texts, _answers, 300),
    Target("probe", json_files({"blocks": [1], "model": "m", "max_length": 3}, ["ab"]), _notes, 300),
    Target("saved-dataset", _some_state, _saved, 300),
)
