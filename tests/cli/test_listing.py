"""What `spunge list` and the recipe reference say of each choice."""

import sys
from importlib.metadata import EntryPoint
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
