"""Names and the values behind them: of a file, of a package, of something else."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from spunge import registry
from spunge.errors import RecipeError
from spunge.recipe.block import Place
from spunge.recipe.explanation import validated
from spunge.recipe.loading import marks_of
from spunge.registry import ATTACKS, ATTRIBUTES, EVALUATORS, EXECUTORS, METHODS, RULES, SCORERS, TRACKERS

ALL: dict[str, Any] = {
    "methods": METHODS,
    "rules": RULES,
    "evaluators": EVALUATORS,
    "attacks": ATTACKS,
    "scorers": SCORERS,
    "attributes": ATTRIBUTES,
    "executors": EXECUTORS,
    "trackers": TRACKERS,
}
NAMING = {
    "methods": "method",
    "rules": "rule",
    "evaluators": "kind",
    "attacks": "kind",
    "scorers": "kind",
    "attributes": "kind",
    "executors": "kind",
    "trackers": "kind",
}
# What a value's settings cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    "sql": {"sql": "topic"},
    "precomputed": {"branches": {"asia": "adapters/asia"}},
    "fluency": {"judge": "some/model"},
    "harm": {"judge": "some/model"},
    "match": {"unwanted": "answer"},
    "evaluators/membership": {"member": "seen"},
    "lm_eval": {"tasks": ["piqa"]},
    "scorers/classifier": {"path": "some/model"},
    "attributes/classifier": {"classifier": "some/model"},
    "attributes/keywords": {"keywords": {"a": ["one"], "b": ["two"]}},
    "clusters": {"clusters": 2},
    "zero_shot": {"zero_shot": ["one", "two"]},
    "scorers/probe": {"path": "some/folder"},
    "judge": {"base_url": "http://localhost:8000/v1", "model": "m", "prompt": "{text}"},
    "audit": {"attack": {"kind": "probe", "block": [1, 0.5]}, "of": "capitals"},
}
VALUES = [(kind, name) for kind, registry in ALL.items() for name in registry.builtin]
OWN = "from dataclasses import replace\nfrom spunge.unlearning.ga import GA\n"


@pytest.mark.parametrize("kind", ALL)
def test_every_value_is_of_its_registrys_kind_and_says_what_it_is(kind: str) -> None:
    for name, value in ALL[kind].items():
        assert value.summary.endswith("."), name
        assert "\n" not in value.summary
        assert value.source, name
        assert isinstance(value.version, int)
        assert ALL[kind].version(name) == str(value.version)


def test_every_place_that_a_setting_may_hold_is_found_where_recipes_are_read() -> None:
    marked = [
        (f"{name}.{setting}", info)
        for kind, name in VALUES
        for setting, info in ALL[kind].get(name).settings.model_fields.items()
        if "Place(" in repr((info.annotation, info.metadata))
    ]
    assert {"whp.anchors", "refusal.judge", "clusters.model", "leakage.scorer"} <= {name for name, _ in marked}
    for name, info in marked:
        assert any(isinstance(mark, Place) for mark in marks_of(info, "./here")), name


@pytest.mark.parametrize(("kind", "name"), VALUES)
def test_settings_are_written_out_read_back_and_refuse_what_they_do_not_know(kind: str, name: str) -> None:
    settings, given = (
        ALL[kind].get(name).settings,
        {NAMING[kind]: name, **NEEDED.get(name, NEEDED.get(f"{kind}/{name}", {}))},
    )
    made = validated(settings, given)
    assert dict(made)[NAMING[kind]] == name
    written = made.model_dump(mode="json")
    again = validated(settings, json.loads(json.dumps(written)))
    assert again == made
    assert again.model_dump(mode="json") == written
    with pytest.raises(RecipeError, match=r"^no_such_thing: no such setting"):
        validated(settings, {**given, "no_such_thing": 1})
    assert [field for field, info in settings.model_fields.items() if not info.description] in ([], [NAMING[kind]])


def test_a_file_is_read_as_it_is_now_and_its_version_is_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", False)  # Python's loader would take compiled code of the same second
    file = tmp_path / "own.py"
    versions, sources = [], []
    for source in ("one", "two", "one"):
        file.write_text(f'{OWN}OWN = replace(GA, source="{source}")\n')
        sources.append(METHODS.get(f"{file}:OWN").source)
        versions.append(METHODS.version(f"{file}:OWN"))
    assert sources == ["one", "two", "one"]
    assert versions[0] == versions[2] != versions[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("OWN = print", r"'.*own\.py:OWN' is no method; it must be a value made by Method\(\.\.\.\)"),
        ("class OWN: ...", "is no method"),
        ("from spunge.evaluation.choices import CHOICES as OWN", "is no method"),
        ("ONW = 1", "has no 'OWN'; did you mean 'ONW'"),
        ("import nothing_like_it", "cannot be imported .ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("OWN = (", "cannot be imported .SyntaxError"),
        ("1 / 0", "cannot be imported .ZeroDivisionError"),
    ],
)
def test_a_file_without_the_value_is_told_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(content + "\n")
    for _ in range(2):  # nothing of a failed import is left
        with pytest.raises(RecipeError, match=rf"^unlearn\.method: .*{said}") as raised:
            METHODS.get(f"{file}:OWN")
        assert "\n" not in str(raised.value)


def test_names_that_nobody_has_are_told_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"^unlearn\.method: no method 'rmuu'; did you mean 'rmu'\?"):
        METHODS.get("rmuu")
    with pytest.raises(RecipeError, match=r"^merge\.rule: no file 'nowhere\.py'; give path/to/file\.py:NAME"):
        RULES.version("nowhere.py:OWN")


def test_packages_add_names_but_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "added_methods.py").write_text(f'{OWN}OWN = replace(GA, source="theirs", version=7)\n')
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("theirs", "added_methods:OWN", "spunge.methods"),
        EntryPoint("npo", "added_methods:OWN", "spunge.methods"),
        EntryPoint("broken", "no_such_module:OWN", "spunge.methods"),
    ]

    def installed(group: str) -> list[Any]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", installed)
    assert METHODS.names() == [*METHODS.builtin, "theirs", "broken"]
    assert (METHODS.get("theirs").source, METHODS.version("theirs")) == ("theirs", "7")
    assert METHODS.get("npo").source != "theirs"
    with pytest.raises(RecipeError, match="'broken' of the package no_such_module:OWN cannot be imported"):
        METHODS.get("broken")
