"""A recipe as a file, for the commands that take one."""

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def recipe_file(toy_recipe: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text("# A toy.\n" + yaml.safe_dump(toy_recipe))
    return file
