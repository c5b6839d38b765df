"""Is there room on the disk for what a run is still to make? Asked before any of it is made, and again before each stage."""

from collections.abc import Sequence

from spunge.files import require_space
from spunge.merging.copying import shares_blocks
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run
from spunge.weights.checkpoint import Checkpoint


def refuse_full(begun: Run, stages: Sequence[Stage[Session]], what: str) -> None:
    """Raises RecipeError where the disk does not hold what some stages write; nothing is asked of a base still to be converted."""
    if not begun.base.untaught.is_dir():
        stages = [stage for stage in stages if stage.name == "conversion"]
    costs = [(stage, stage.takes) for stage in stages]
    kept = sum(max(0.0, cost.kept - _there(begun, stage)) for stage, cost in costs)
    require_space(begun.graph.folder, kept + max((cost.passing for _, cost in costs), default=0.0), what)


def _there(begun: Run, stage: Stage[Session]) -> float:
    """Bytes of a stage that need no room: what it replaces, what a merge goes on from, and one that shares the base's blocks."""
    folder, state = begun.graph.folder, begun.graph.state(stage.name)
    replaced = state.stamp.size if state.stamp else 0
    if stage.name != "merged" and not stage.name.endswith(":merged"):
        return replaced
    if begun.recipe.merge.dtype == "base" and shares_blocks(Checkpoint(begun.base.untaught), folder):
        return float("inf")
    asides = [aside for pattern in stage.passing for aside in folder.glob(pattern)]
    return replaced + sum(file.stat().st_blocks * 512 for aside in asides for file in aside.rglob("*"))
