"""What `spunge list` and the recipe reference say of each choice."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from spunge import registry
from spunge.cli.listing import KINDS, NAMING, REGISTRIES, listing, listing_text
from toys import ROOT

REFERENCE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def entry(kind: str, name: str) -> dict[str, Any]:
    [only] = [each for each in listing(kind) if each["name"] == name]
    return only


def test_every_registry_is_listed_and_stands_in_the_reference() -> None:
    assert set(REGISTRIES) == set(NAMING) == set(KINDS) - {"decode", "recipes"}
    assert {each for each in vars(registry).values() if isinstance(each, registry.Registry)} == set(REGISTRIES.values())
    for kind, values in REGISTRIES.items():
        assert [each["name"] for each in listing(kind)] == values.names()
        for name in values.builtin:
            assert f": {name}\n" in REFERENCE, (kind, name)


def test_a_second_listing_asks_nothing_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    first = listing("trackers")
    monkeypatch.setattr(registry.Registry, "get", None)
    assert listing("trackers") == first


@pytest.mark.thorough
def test_what_is_kept_of_a_listing_is_what_the_code_says_and_asks_no_code_again(tmp_path: Path) -> None:
    program = (
        "import sys; from spunge.cli import listing; told = {kind: listing.listing(kind) for kind in listing.KINDS}\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pyarrow', 'bitsandbytes'} & set(sys.modules)\n"
        "own = {kind: [listing._listed(name, kind) for name in values.builtin] for kind, values in listing.REGISTRIES.items()}\n"
        "assert all(told[kind][: len(each)] == each for kind, each in own.items()); print(sorted(heavy))"
    )
    environment = {**os.environ, "SPUNGE_CACHE": str(tmp_path)}
    first, again = (
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert "torch" in first
    assert again.strip() == "[]"


def test_a_setting_tells_what_the_blocks_inside_accept() -> None:
    trainable = entry("methods", "tvn")["settings"]["trainable"]
    assert trainable["type"] == "{kind: lora} | {kind: tensors} | {kind: all}"
    assert list(trainable["blocks"]["{kind: lora}"]) == ["kind", "rank", "alpha", "dropout", "start", "targets"]
    text = listing_text({"methods": listing("methods")})
    assert "          {kind: lora}: rank, alpha, dropout, start, targets" in text
    for block in ("trainable: `{kind: lora}`", "trainable: `{kind: tensors}`", "trainable: `{kind: all}`", "tasks: `{"):
        assert f"\n## {block}" in REFERENCE


def test_a_setting_that_many_methods_share_stands_once_in_the_reference() -> None:
    for setting in (
        "accumulation",
        "retain_order",
        "packing",
        "max_damage",
        "gru",
        "refusals",
        "stages",
        "bits",
    ):
        assert REFERENCE.count(f"| `{setting}` |") == 1, setting


def test_an_attack_tells_what_it_asks_of_its_audit() -> None:
    assert entry("evaluators", "audit")["settings"]["attack"]["type"] == "NAME | {kind: NAME, ..}"
    assert (entry("attacks", "quantise")["of"], entry("attacks", "quantise")["reads"]) == (True, [])
    assert (entry("attacks", "membership")["of"], entry("attacks", "membership")["reads"]) == (
        False,
        ["limit", "source", "subject", "where"],
    )


def test_a_package_that_cannot_be_imported_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", "no_such_module:RULE", "spunge.rules")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    rules = listing("rules")
    assert len(rules) == len(REGISTRIES["rules"].builtin) + 1
    assert "cannot be imported" in rules[-1]["summary"]
    assert "no_such_module" in listing_text({"rules": rules})
    assert "no_such_module" not in sys.modules
