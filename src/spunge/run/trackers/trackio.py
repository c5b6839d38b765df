"""Trackio.

track: {kind: trackio, project: spunge}
It writes to this machine; TRACKIO_SPACE_ID and HF_TOKEN of the environment name a Space of the Hub.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from pydantic import Field

from spunge.recipe.tracking import TrackSettings
from spunge.run.trackers.tracker import Tracked, Tracker, key


class TrackioSettings(TrackSettings):
    kind: Literal["trackio"] = Field(
        "trackio", description="Trackio, which writes to this machine where nothing else is set."
    )
    project: str = Field("spunge", min_length=1, description="Where the run is listed.")


class Sent(NamedTuple):
    run: Any  # trackio's

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        self.run.log({key(group, name): value for name, value in values.items()}, step=step)


@contextmanager
def log(settings: TrackioSettings, run: Tracked) -> Iterator[Sent]:
    """Trackio: a database on this machine, or a Space of the Hub."""
    import trackio

    begun = trackio.init(project=settings.project, name=run.name, config=dict(run.recipe))
    try:
        yield Sent(begun)
    finally:
        begun.finish()


TRACKIO = Tracker(TrackioSettings, "trackio", "trackio", "trackio", log)
