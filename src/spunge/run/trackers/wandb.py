"""Weights & Biases.

track: {kind: wandb, project: spunge}
WANDB_MODE=offline writes to RUN/wandb and contacts nobody.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from pydantic import Field

from spunge.recipe.tracking import TrackSettings
from spunge.run.trackers.tracker import Tracked, Tracker, key


class WandbSettings(TrackSettings):
    kind: Literal["wandb"] = Field(
        "wandb", description="Weights & Biases; the key is WANDB_API_KEY of the environment."
    )
    project: str = Field("spunge", min_length=1, description="Where the run is listed.")


class Sent(NamedTuple):
    run: Any  # wandb's

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        # Each training has steps of its own; wandb's only rise.
        own = key(group, "step")
        named = {key(group, name): value for name, value in values.items()}
        for name in named:
            self.run.define_metric(name, step_metric=own)
        self.run.log({own: step, **named})


@contextmanager
def log(settings: WandbSettings, run: Tracked) -> Iterator[Sent]:
    """Weights & Biases, or its offline mode (WANDB_MODE)."""
    import wandb

    begun = wandb.init(project=settings.project, name=run.name, config=dict(run.recipe), dir=str(run.folder))
    try:
        yield Sent(begun)
    finally:
        begun.finish()


WANDB = Tracker(WandbSettings, "wandb", "wandb", "wandb", log)
