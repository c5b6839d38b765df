"""When each stage of a run would be made, where so many are made at once: for plans."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spunge.run.graph import Graph


class Turn(NamedTuple):
    """Seconds from the beginning of the run."""

    stage: str
    start: float
    end: float


def held_together(graph: Graph[Any], taken: Sequence[Turn], memory: Mapping[str, float], at_once: int) -> float:
    """Bytes that the processes hold together at the most. memory: what each stage takes.

    A process holds the model of a stage until it is given another one. Of a stage that others help with (`Stage.shown`), all that
    have nothing to make hold the model too.

    >>> from pathlib import Path
    >>> from spunge.run.graph import Stage
    >>> graph = Graph(Path())
    >>> for name, shown in (("asia", None), ("europe", None), ("judged", lambda session: None)):
    ...     graph.add(Stage(name, name, shown=shown))
    >>> memory = {"asia": 3.0, "europe": 1.0, "judged": 2.0}
    >>> held_together(graph, [Turn("asia", 0, 1), Turn("europe", 0, 1), Turn("judged", 1, 2)], memory, 2)
    4.0
    >>> held_together(graph, [Turn("judged", 0, 2)], memory, 3)
    6.0
    """
    free, held, most = [0.0] * at_once, [0.0] * at_once, 0.0
    for turn in taken:
        idle = [place for place, until in enumerate(free) if until <= turn.start]
        place = idle[0]
        free[place], held[place] = turn.end, memory[turn.stage]
        if graph.stages[turn.stage].shown is not None:
            for other in idle[1:]:
                held[other] = memory[turn.stage]
        most = max(most, sum(held))
    return most


def turns(graph: Graph[Any], seconds: Mapping[str, float], at_once: int) -> list[Turn]:
    """The stages that are to be made, as a schedule would give them out. seconds: what each of them takes.

    >>> from pathlib import Path
    >>> from spunge.run.graph import Stage
    >>> graph = Graph(Path())
    >>> for name, needs in (("base", ()), ("asia", ("base",)), ("europe", ("base",)), ("merged", ("asia", "europe"))):
    ...     graph.add(Stage(name, name, needs=needs))
    >>> [tuple(turn) for turn in turns(graph, {"asia": 3.0, "europe": 4.0, "merged": 1.0}, at_once=2)]
    [('asia', 0.0, 3.0), ('europe', 0.0, 4.0), ('merged', 4.0, 5.0)]
    >>> [turn.start for turn in turns(graph, {"asia": 3.0, "europe": 4.0, "merged": 1.0}, at_once=1)]
    [0.0, 3.0, 7.0]
    """
    waiting, over = list(graph.stages.values()), set[str]()
    at_work: list[tuple[float, int, str]] = []
    taken: list[Turn] = []
    now = 0.0
    while waiting:
        for place, stage in enumerate(graph.stages.values()):
            if stage not in waiting or not over.issuperset((*stage.needs, *stage.after)):
                continue
            if stage.name not in seconds:
                over.add(stage.name)
            elif len(at_work) < at_once:
                taken.append(Turn(stage.name, now, now + seconds[stage.name]))
                heapq.heappush(at_work, (taken[-1].end, place, stage.name))
            else:
                continue
            waiting.remove(stage)
        if at_work:
            now, _, name = heapq.heappop(at_work)
            over.add(name)
    return taken
