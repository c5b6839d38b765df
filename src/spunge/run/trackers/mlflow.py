"""MLflow.

track: {kind: mlflow, experiment: spunge}
MLFLOW_TRACKING_URI says where, such as http://localhost:5000.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from pydantic import Field

from spunge.errors import RecipeError
from spunge.recipe.tracking import TrackSettings
from spunge.run.trackers.tracker import Tracked, Tracker, key

WHERE = "MLFLOW_TRACKING_URI"


class MLflowSettings(TrackSettings):
    kind: Literal["mlflow"] = Field(
        "mlflow", description="MLflow; the server is MLFLOW_TRACKING_URI of the environment."
    )
    experiment: str = Field("spunge", min_length=1, description="Where the run is listed.")


class Sent(NamedTuple):
    client: Any  # MlflowClient
    run: str

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(key(group, name), value, now, step) for name, value in values.items()])


@contextmanager
def log(settings: MLflowSettings, run: Tracked) -> Iterator[Sent]:
    """The MLflow that MLFLOW_TRACKING_URI of the environment names."""
    from mlflow.tracking import MlflowClient

    if not (where := os.environ.get(WHERE)):
        raise RecipeError(
            f"track: mlflow: {WHERE} of the environment does not say where; set it, such as to http://localhost:5000"
        )
    client = MlflowClient(tracking_uri=where)
    known = client.get_experiment_by_name(settings.experiment)
    experiment = known.experiment_id if known else client.create_experiment(settings.experiment)
    begun = client.create_run(experiment, run_name=run.name).info.run_id
    ended = "FAILED"
    try:
        client.log_dict(begun, dict(run.recipe), "recipe.json")
        yield Sent(client, begun)
        ended = "FINISHED"
    finally:
        client.set_terminated(begun, ended)


MLFLOW = Tracker(MLflowSettings, "mlflow", "mlflow", "mlflow", log)
