"""A run that takes long enough to be disturbed."""

import json
from pathlib import Path

import pytest

import spunge


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A recipe's file whose branches take some seconds, and the folder of an undisturbed run of it here."""
    folder = tmp_path_factory.mktemp("long")
    tiny, rows = request.getfixturevalue("tiny"), request.getfixturevalue("_toy_rows")
    recipe = {
        "model": {"path": str(tiny("llama")), "dtype": "float32"},
        "forget": {"source": str(rows["forget"])},
        "split": {"by": "topic"},
        "retain": {"source": str(rows["retain"])},
        "unlearn": {"method": "npo", "steps": 60, "batch_size": 4, "learning_rate": 1e-4},
        "controls": [],
        "evaluate": [{"kind": "perplexity", "source": str(rows["retain"]), "subject": "retain", "by": "NULL"}],
        "seed": 3,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUNGE_CACHE", str(folder / "cache"))
        spunge.run(folder / "recipe.yaml", folder / "run")
    return folder / "recipe.yaml", folder / "run"
