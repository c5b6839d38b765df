"""Where the stages of a run are made. No result depends on it: it enters no key and is no part of RUN/recipe.yaml."""

from pydantic import Field

from spunge.recipe.block import Strict


class ExecutionSettings(Strict):
    kind: str = Field(description="Name of the executor (`spunge list executors`).")
