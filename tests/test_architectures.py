"""A sample of docs/architectures.md: odd architectures still do what the table says, and nothing in it fails."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from picked import few
from toys import ROOT

TABLE = json.loads((ROOT / "docs" / "architectures.json").read_text())
SAMPLE = {
    "falcon": "linear layers of a class of its own",
    "openai-gpt": "blocks that give lists",
    "youtu": "the padding token's embedding is cleared on loading",
    "qwen3_vl_moe": "experts that loading turns round, inside a vision-language model",
    "zaya": "blocks that cannot be run one by one",
    "mamba": "no MLP, and a projection that LoRA cannot take",
    "hrm_text": "projections that loading cuts up",
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("architectures", Path(ROOT, "scripts", "architectures.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", few(SAMPLE, 0, 2, 4))
def test_an_odd_architecture_does_what_the_table_says(script: Any, kind: str) -> None:
    assert script.tried(kind) == TABLE[kind]


def test_no_architecture_of_the_table_fails() -> None:
    failing = {kind: row for kind, row in TABLE.items() if any(cell.startswith("fails") for cell in row.values())}
    assert not failing
    assert len([row for row in TABLE.values() if "built" not in row]) >= 150


def test_the_page_is_made_of_the_table(script: Any) -> None:
    import transformers

    page = (ROOT / "docs" / "architectures.md").read_text()
    if f"transformers {transformers.__version__}" in page:
        assert page == script.page(TABLE)
