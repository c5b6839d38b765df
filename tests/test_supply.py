"""What is installed, and from where: constraints.txt fits pyproject.toml, and an audit that could not be done says so."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from toys import ROOT

PROJECT: dict[str, Any] = {
    "project": {
        "name": "mine",
        "dependencies": ["one>=2", "old>=1; python_version < '3.11'"],
        "optional-dependencies": {"more": ["mine[other]", "Two_b>=1"]},
    },
    "dependency-groups": {"tools": ["three"]},
    "build-system": {"requires": ["setuptools>=77"]},
}
HASH = "0" * 64
LOCKED = "".join(
    f"{line} \\\n    --hash=sha256:{HASH}\n    # via {via}\n"
    for line, via in {
        "one==2.1 ; python_full_version < '3.11'": "mine (pyproject.toml)",
        "one==3.0 ; python_full_version >= '3.11'": "mine (pyproject.toml)",
        "old==1.0 ; python_full_version < '3.11'": "mine (pyproject.toml)",
        "two-b==1.5": "mine (pyproject.toml)",
        "three==9": "mine (pyproject.toml:tools)",
        "setuptools==80": "-r -",
        "under==1": "one",
    }.items()
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """script("lock") -> the module of scripts/lock.py."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def test_constraints_that_fit_are_not_complained_about(script: Any) -> None:
    assert script("lock").problems(PROJECT, LOCKED) == []


@pytest.mark.parametrize(
    ("given", "changed", "told"),
    [
        ("two-b==1.5", "two-b==0.5", "two-b==0.5 is not what pyproject.toml admits: Two_b>=1"),
        ("three==9", "four==9", "three has 0 versions for Python 3.10 on linux"),
        ("three==9", "four==9", "four is not in pyproject.toml any more"),
        (" ; python_full_version >= '3.11'", "", "one has 2 versions for Python 3.10 on win32"),
        (
            " ; python_full_version >= '3.11'",
            " ; sys_platform == 'linux'",
            "one has 0 versions for Python 3.14 on darwin",
        ),
        (f"under==1 \\\n    --hash=sha256:{HASH}", "under==1", "under has no hash"),
        ("under==1", "under>=1", "under>=1 is no exact version"),
    ],
)
def test_each_misfit_of_constraints_is_told(script: Any, given: str, changed: str, told: str) -> None:
    assert given in LOCKED
    assert told in script("lock").problems(PROJECT, LOCKED.replace(given, changed))


def test_builds_on_a_disk_are_allowed_until_the_version_changes(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = script("lock")
    names = [f"{name}-py3-none-any.whl" for name in ("one-2.1+cpu", "one-2.1", "one-2.0+cpu", "else-2.1+cpu")]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path} /nowhere")
    pins = lock.read_pins(LOCKED)
    here = lock.on_disk(pins, {})
    assert here == {names[0]: "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert lock.on_disk(pins, here) == here
    assert lock.on_disk(lock.read_pins(LOCKED.replace("one==2.1", "one==2.2")), here) == {}


@pytest.mark.parametrize(
    ("dependencies", "code", "last"),
    [
        (
            [{"name": "A_b", "version": "1", "vulns": []}, {"name": "c", "version": "2", "vulns": []}],
            0,
            "2 of 2 packages were looked up",
        ),
        (
            [{"name": "a-b", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not found"}],
            2,
            "NOT AUDITED: c",
        ),
        ([], 2, "NOT AUDITED: a-b, c"),
    ],
)
def test_only_an_audit_of_every_package_passes(script: Any, dependencies: list[Any], code: int, last: str) -> None:
    ended, lines = script("audit").verdict({"dependencies": dependencies}, {"a-b", "c"})
    assert (ended, lines[-1]) == (code, last)


def test_a_vulnerability_is_told_with_what_mends_it_also_where_the_audit_is_incomplete(script: Any) -> None:
    found = [{"name": "a-b", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}]
    assert script("audit").verdict({"dependencies": found}, {"a-b", "c"}) == (
        1,
        ["a-b 1: PYSEC-1, mended in 1.1", "1 of 2 packages were looked up", "NOT AUDITED: c"],
    )


def test_commands_of_make_that_texts_name_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    texts = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        ROOT / ".ci" / "run",
    ]
    named = {
        (file.name, target)
        for file in texts
        for target in re.findall(
            r"(?:^ *|`)make ([a-z][\w-]*)(?![\w/-])", file.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    }
    assert len(named) > 10
    assert not {(file, target) for file, target in named if target not in targets}


def test_nothing_is_installed_without_a_hash_but_the_package_itself() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    calls = [line.strip() for line in text.splitlines() if "pip install" in line and "build/oldest" not in line]
    assert len(calls) >= 4
    for call in calls:
        assert "--require-hashes" in call or ("--no-deps --no-build-isolation --editable ." in call)
