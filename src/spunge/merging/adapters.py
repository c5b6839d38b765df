"""PEFT LoRA adapters as branches: read in the space of the weights, never factor by factor."""

from pathlib import Path

from spunge.checkpoints import Checkpoint
from spunge.merging.sources import AdapterSource


def open_adapter(folder: Path, base: Checkpoint, label: str) -> AdapterSource:
    raise NotImplementedError
