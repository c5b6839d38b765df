"""TensorBoard.

track: tensorboard
tensorboard --logdir runs
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from pydantic import Field

from spunge.recipe.tracking import TrackSettings
from spunge.run.trackers.tracker import Tracked, Tracker, key

FOLDER = "tensorboard"


class TensorBoardSettings(TrackSettings):
    kind: Literal["tensorboard"] = Field("tensorboard", description="Event files in RUN/tensorboard.")


class Events(NamedTuple):
    writer: Any  # torch's SummaryWriter

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(key(group, name), value, step)


@contextmanager
def log(settings: TensorBoardSettings, run: Tracked) -> Iterator[Events]:
    """Event files in RUN/tensorboard, which TensorBoard shows."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / FOLDER))
    try:
        writer.add_text("recipe", f"```json\n{json.dumps(run.recipe, indent=2)}\n```")
        yield Events(writer)
    finally:
        writer.close()


TENSORBOARD = Tracker(TensorBoardSettings, "torch.utils.tensorboard", "tensorboard", "tensorboard", log)
