"""When each stage would be made: by hand for small graphs, and never more at once than is said."""

import random
from pathlib import Path
from typing import Any

import pytest

from spunge.recipe.loading import load_recipe
from spunge.run.graph import Graph, Stage
from spunge.run.stages.building import build
from spunge.run.turns import turns


def drawn(seed: int) -> tuple[Graph[Any], dict[str, float]]:
    graph, chance = Graph[Any](Path()), random.Random(seed)
    for number in range(20):
        needs = tuple(f"s{each}" for each in range(number) if chance.random() < 0.15)
        graph.add(Stage(f"s{number}", "", needs=needs))
    return graph, {name: chance.uniform(1, 9) for name in graph.stages if chance.random() < 0.8}


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_no_stage_has_its_turn_before_what_it_needs_and_no_more_than_so_many_have_it_at_once(at_once: int) -> None:
    for seed in range(20):
        graph, seconds = drawn(seed)
        taken = {turn.stage: turn for turn in turns(graph, seconds, at_once)}
        assert taken.keys() == seconds.keys()
        assert all(turn.end - turn.start == pytest.approx(seconds[turn.stage]) for turn in taken.values())
        for name, turn in taken.items():
            needed = [taken[need].end for need in graph.stages[name].needs if need in taken]
            assert turn.start >= max(needed, default=0.0)
            assert sum(other.start <= turn.start < other.end for other in taken.values()) <= at_once
        last = max((turn.end for turn in taken.values()), default=0.0)
        assert last <= sum(seconds.values()) + 1e-9
        if at_once == 1:
            assert last == pytest.approx(sum(seconds.values()))


def test_branches_are_made_at_once_and_so_are_evaluations_of_different_models(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    graph = build(load_recipe(toy_recipe), tmp_path / "run").graph
    seconds = {name: 1.0 for name, stage in graph.stages.items() if stage.make is not None and not stage.light}
    begins = {turn.stage: turn.start for turn in turns(graph, seconds, 100)}
    assert begins["branch:asia"] == begins["branch:europe"] == begins["control:joint"]
    judged: dict[str, list[float]] = {}
    for name, start in begins.items():
        if name.startswith("judge:"):
            judged.setdefault(name.partition("/")[0], []).append(start)
    assert len(judged) > 2
    assert set(judged["judge:merged"]) & set(judged["judge:control:joint"])
    assert all(starts == sorted(set(starts)) for starts in judged.values())  # those of one model follow each other
