"""The harness that kills commands: a small portion of what `make soak` does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toys import ROOT


def figures(script: str, *arguments: str) -> Any:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    content = json.loads(ended.stdout)
    assert (ended.returncode, content["told"]) == (0, []), ended.stderr[-2000:]
    return content


@pytest.mark.thorough
def test_merges_that_are_killed_end_as_undisturbed_ones(tmp_path: Path) -> None:
    content = figures("soak.py", "--kills", "4", "--seed", "1", "--kinds", "folder", "--place", str(tmp_path))
    assert content["kills"] >= 4
    assert content["finished"] >= 1
    assert not list(tmp_path.iterdir())
