"""Targets that read recipes: files, `--set`, mappings, YAML alone, mergekit's configurations."""

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fuzzing.mutations import ODD_TEXTS, ODD_VALUES, TOKENS, WORD, any_text, change, changed, damage
from fuzzing.trial import Target
from spunge.errors import RecipeError
from spunge.merging.mergekit import read_mergekit
from spunge.recipe.loading import apply_overrides, dump_recipe, load_recipe
from spunge.recipe.spelling import read_yaml, write_yaml, yaml_fault

SMALL = {
    "model": {"path": "owner/name", "template": {"enable_thinking": False}},
    "forget": {"source": [{"path": "rows.jsonl", "assign": {"domain": "bio"}}], "text": "text", "limit": 10},
    "split": {"by": "topic", "values": {"a": ["a", "A"], "b": ["b"]}},
    "unlearn": {"method": "ga", "learning_rate": 0.001, "steps": 3},
    "merge": {"rule": "ties", "density": 0.5},
    "controls": ["joint", {"name": "x", "train": "parts", "merge": "average"}],
    "evaluate": [{"kind": "perplexity", "name": "p", "source": "rows.jsonl", "text": "text"}],
    "seed": 1,
}
TEXT = b"""model: owner/name
forget: {source: rows.jsonl, text: &t text}
split: {by: topic, values: {007: [a, NO], b: [1.50]}}
unlearn:
  method: ga   # a comment
  steps: 3
evaluate:
- {kind: perplexity, source: rows.jsonl, text: *t}
"""
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
)
MERGE_BOMB = "\n".join(
    ["a0: &a0 {k: 1}"]
    + [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, 12)]
)
YAMLS = (
    TEXT,
    BOMB.encode(),
    MERGE_BOMB.encode(),
    b"a: &a [*a]",
    b"&a {b: *a}",
    b"!!set {a, b}",
    b"!!binary YQ==",
    b"!!timestamp 2024-99-99",
    b"!!int abc",
    b"!!bool abc",
    b"!!float abc",
    b"!!omap [a: 1]",
    b"!!pairs [a: 1, b]",
    b"? [a, b]\n: 1",
    b"? {a: 1}\n: 1",
    b"{1: a, 1.0: b, true: c, null: d}",
    b"a: [.nan, .inf, 0b1, 0x_, 0b_, 1_0, 007, +.5, 1e400]",
    b'"\\ud800\\0\\x1b": |\n  text\n',
)
MERGEKIT = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "one", "parameters": {"weight": 1.0, "density": "0.5"}},
        {
            "model": {"model": {"path": "base", "revision": "x"}, "lora": {"path": "two"}},
            "parameters": {"weight": [1, 1]},
        },
    ],
    "parameters": {"normalize": True, "lambda": 1.0, "int8_mask": True},
    "dtype": "bfloat16",
    "tokenizer": {"source": "base"},
}
SLICES = {
    "merge_method": "slerp",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}, {"model": "b", "layer_range": [0, 4]}]}],
    "base_model": "a",
    "parameters": {"t": [{"filter": "*", "value": 0.5}]},
}


def same(one: Any, other: Any) -> bool:
    """Equal, where NaN equals NaN and true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def _yaml(folder: Path, text: str) -> int:
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: {yaml_fault(error)}") from None
    again = read_yaml(write_yaml(value))
    assert same(again, value), f"{value!r} is read back as {again!r}"
    return len(text)


def _recipe(folder: Path, content: bytes) -> int:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    _loads_again(load_recipe(file), folder)
    return len(content)


def _loads_again(recipe: Any, folder: Path) -> None:
    """What a run writes into its folder is the same recipe."""
    file = folder / "dumped.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def _mapping(folder: Path, content: Any) -> int:
    if not isinstance(content, dict):
        raise RecipeError("no mapping")
    _loads_again(load_recipe(content), folder)
    return 1 << 14


def _override(folder: Path, override: str) -> int:
    content = read_yaml(_SMALL_TEXT) if "<<" in override else copy.deepcopy(SMALL)
    apply_overrides(content, [override])
    return len(override)


def _set(folder: Path, override: str) -> int:
    _loads_again(load_recipe(SMALL, [override]), folder)
    return len(override)


def _mergekit(folder: Path, content: bytes) -> int:
    file = folder / "mergekit.yaml"
    file.write_bytes(content)
    plan = read_mergekit(file)
    assert plan.models
    assert len(plan.models) == len(plan.weights)
    return len(content)


_SMALL_TEXT = write_yaml(SMALL)
_STEPS = ("model", "path", "forget", "source", "0", "1", "-1", "assign", "split", "values", "unlearn", "steps", "seed")
_SETTINGS = (
    "model.path", "model.dtype", "forget.text", "forget.limit", "forget.source.0.assign", "forget.where", "split.by",
    "split.values", "unlearn.steps", "unlearn.learning_rate", "unlearn.trainable.match", "merge.density", "controls",
    "evaluate.0.by", "name", "seeds",
)  # fmt: skip
_PIECES = (
    *ODD_TEXTS,
    *(content.decode() for content in YAMLS[3:]),
    *(token.decode("utf-8", "surrogateescape") for token in TOKENS),
    *map(repr, ODD_VALUES),
)


def _assignment(chance: random.Random) -> str:
    if chance.random() < 0.3:
        return f"{chance.choice(_SETTINGS)}={chance.choice(_PIECES)}"
    steps = [chance.choice(_STEPS) if chance.random() < 0.7 else _word(chance) for _ in range(chance.randint(1, 4))]
    return ".".join(steps) + chance.choice(("=", "=", "=", "", " = ", "==")) + chance.choice((*_PIECES, _word(chance)))


def _word(chance: random.Random) -> str:
    return chance.choice(ODD_TEXTS) if chance.random() < 0.5 else any_text(chance)


def _text(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return damage(chance, chance.choice(YAMLS)).decode("utf-8", "surrogateescape")
    return " ".join(chance.choice(_PIECES) for _ in range(chance.randint(1, 3)))


def _flat(value: Any) -> bytes:
    try:
        return yaml.dump(value, Dumper=yaml.SafeDumper).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return repr(value).encode("utf-8", "surrogatepass")


def _file(chance: random.Random, documents: Sequence[Any], texts: Sequence[bytes]) -> bytes:
    return (
        _flat(change(chance, chance.choice(documents)))
        if chance.random() < 0.6
        else damage(chance, chance.choice(texts))
    )


TARGETS = (
    Target("yaml", _text, _yaml, 300),
    Target("set", _assignment, _override, 3000),
    Target("set-in-recipe", _assignment, _set, 30),
    Target("recipe-file", lambda chance: _file(chance, [SMALL], [TEXT, *YAMLS]), _recipe, 40),
    Target("recipe-mapping", changed(SMALL, {**SMALL, WORD: 1}, {**SMALL, 1: 2}), _mapping, 40),
    Target("mergekit", lambda chance: _file(chance, [MERGEKIT, SLICES], [_flat(MERGEKIT), *YAMLS]), _mergekit, 200),
)
