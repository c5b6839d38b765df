"""What a run tells others of, such as TensorBoard. No result depends on it: it enters no key and is no part of RUN/recipe.yaml."""

from pydantic import Field

from spunge.recipe.block import Strict


class TrackSettings(Strict):
    kind: str = Field(description="Name of the tracker (`spunge list trackers`).")
