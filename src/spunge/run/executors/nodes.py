"""A Ray cluster: being connected to it, and what its nodes have."""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import Field

from spunge.errors import RecipeError, first_line
from spunge.model.loading import pick_device
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.model import ModelSettings

NAMESPACE = "spunge"


class RaySettings(ExecutionSettings):
    kind: Literal["ray"] = Field("ray", description="A Ray cluster; needs `spunge[ray]` here and on its nodes.")
    address: str = Field("auto", description="Of the cluster. auto: the one that this machine is a node of.")
    resources: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="Of a node, for each stage: {gpu: 1}, {cpu: 4}, or names of the cluster's own. Default: one GPU where a node "
        "has one and model.device is not cpu, else one CPU.",
    )
    artifacts: str | None = Field(
        None,
        description="An address that the nodes and this machine reach, as fsspec writes it (s3://bucket/folder, file:///folder): "
        "what stages need and make is brought through it. Default: none; all nodes see the run's folder, the rows and the model.",
    )
    retries: int = Field(3, ge=0, description="How often a stage is taken up again whose node or process is gone.")


@contextmanager
def connected(settings: RaySettings) -> Iterator[None]:
    """Inside the block this process is connected to the cluster. Raises RecipeError where there is no Ray, or no cluster."""
    try:
        import ray
    except ImportError:
        raise RecipeError("execution.kind: ray: needs Ray; pip install 'spunge[ray]'") from None
    if ray.is_initialized():  # by the program that this one is part of
        yield
        return
    heeded = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(settings.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"execution.address: {settings.address!r}: no Ray cluster answers ({first_line(error)}); start one with `ray start "
            "--head`, or give its address"
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, heard in heeded.items():
            signal.signal(number, heard)  # Ray sets its own, which ends the process
    try:
        yield
    finally:
        ray.shutdown()


def needed(settings: RaySettings, model: ModelSettings, nodes: list[Mapping[str, float]]) -> dict[str, float]:
    """What a stage takes of a node, in Ray's names."""
    if settings.resources is not None:
        known = {"cpu": "CPU", "gpu": "GPU"}
        return {known.get(name.lower(), name): amount for name, amount in settings.resources.items()}
    cards = any(node.get("GPU", 0) >= 1 for node in nodes)
    return (
        {"GPU": 1.0} if cards and (model.device == "auto" or pick_device(model.device).type == "cuda") else {"CPU": 1.0}
    )


def places(needs: Mapping[str, float], nodes: list[Mapping[str, float]]) -> int:
    """How many stages the nodes have room for at once.

    >>> places({"GPU": 1.0, "CPU": 4.0}, [{"GPU": 2.0, "CPU": 32.0}, {"GPU": 8.0, "CPU": 16.0}, {"CPU": 64.0}])
    6
    """
    return sum(int(min(node.get(name, 0.0) / amount for name, amount in needs.items())) for node in nodes)


def nodes_of() -> list[Mapping[str, float]]:
    """What each node of the cluster has, that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def at_once(settings: RaySettings, model: ModelSettings) -> int:
    """Raises RecipeError where no node of the cluster has what a stage takes."""
    with connected(settings):
        nodes = nodes_of()
        needs = needed(settings, model, nodes)
        if not (count := places(needs, nodes)):
            most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in needs}
            raise RecipeError(
                f"execution.resources: {needs}: no node of the {len(nodes)} has so much (at the most {most}); ask for less"
            )
        return count
