"""The graph of stages: keys, states, what is made again and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from spunge.files import write_text
from spunge.run.graph import Graph, Made, NotMadeError, Stage, changed
from spunge.run.stamps import marks_of


class Bench:
    """Makes stages and remembers which."""

    def __init__(self) -> None:
        self.made: list[str] = []


def stage(graph: Graph[Bench], name: str, content: dict[str, Any], **rest: Any) -> Stage[Bench]:
    """A stage that writes its inputs into NAME.txt."""
    file = graph.folder / f"{name}.txt"

    def make(bench: Bench) -> Made:
        bench.made.append(name)
        write_text(file, json.dumps(content))
        return Made([file])

    return Stage(name, f"make {name}", inputs=lambda: content, files=(file.name,), make=make, **rest)


def chain(folder: Path, **content: Any) -> Graph[Bench]:
    """first -> second, and apart from them other."""
    graph: Graph[Bench] = Graph(folder)
    graph.add(stage(graph, "first", {"a": content.get("a", 1)}))
    graph.add(stage(graph, "second", {"b": content.get("b", 1)}, needs=("first",)))
    graph.add(stage(graph, "other", {"c": content.get("c", 1)}))
    return graph


def carried_out(graph: Graph[Bench]) -> list[str]:
    bench = Bench()
    for each in graph.to_do():
        assert each.make is not None
        graph.vouch(each.name, marks_of(graph.folder, each.make(bench).files), 1.0)
    return bench.made


def test_stages_are_made_in_order_and_once(tmp_path: Path) -> None:
    assert carried_out(chain(tmp_path)) == ["first", "second", "other"]
    assert carried_out(chain(tmp_path)) == []


@pytest.mark.parametrize(
    ("edit", "again"), [({"a": 2}, ["first", "second"]), ({"b": 2}, ["second"]), ({"c": 2}, ["other"])]
)
def test_what_depends_on_an_edit_is_made_again_and_nothing_else(
    tmp_path: Path, edit: dict[str, int], again: list[str]
) -> None:
    carried_out(chain(tmp_path))
    assert carried_out(chain(tmp_path, **edit)) == again


def test_a_stale_stage_says_which_input_changed(tmp_path: Path) -> None:
    carried_out(chain(tmp_path))
    graph = chain(tmp_path, a=2)
    assert graph.state("first")[:2] == ("stale", "a was 1, is 2")
    assert graph.state("second")[:2] == ("stale", "stage 'make first' changed")
    assert graph.state("other").kind == "done"


@pytest.mark.parametrize(("inputs", "told"), [(3, "a2 was 0, is 1"), (4, "1 more"), (30, "27 more")])
def test_of_many_changed_inputs_three_are_told_and_the_others_counted(tmp_path: Path, inputs: int, told: str) -> None:
    for value in (0, 1):
        graph: Graph[Bench] = Graph(tmp_path)
        graph.add(stage(graph, "wide", {f"a{number}": value for number in range(inputs)}))
        why = graph.state("wide").why
        carried_out(graph)
    assert why.split("; ")[:3] == [f"a{number} was 0, is 1" for number in range(3)]
    assert why.split("; ")[-1] == told


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, ["b is new"]),
        ({"a": 1, "b": 2}, {"b": 2}, ["a is gone"]),
        ({"a": "0" * 64}, {"a": "1" * 64}, ["a changed"]),
        ({"a": "x" * 90}, {"a": "y"}, [f"a was '{'x' * 36}..., is 'y'"]),
        ({"a": 1, "stage b": 1}, {"a": 2, "stage b": 2}, ["a was 1, is 2"]),
    ],
)
def test_changes_are_told_by_name(before: dict[str, Any], now: dict[str, Any], told: list[str]) -> None:
    assert list(changed(before, now)) == told


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "deleted", "a folder"])
def test_a_damaged_file_is_told_and_makes_its_stage_alone_again(tmp_path: Path, damage: str) -> None:
    carried_out(chain(tmp_path))
    file = tmp_path / "first.txt"
    data = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "deleted":
        file.write_bytes({"cut": data[:3], "flipped": data[:-2] + b"9}", "emptied": b""}[damage])
    graph = chain(tmp_path)
    assert graph.state("first").kind == "damaged"
    assert graph.state("first").why.startswith("first.txt ")
    assert graph.state("second").kind == "done"


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"format": 1}', b"\xff"])
def test_a_damaged_stamp_vouches_for_nothing(tmp_path: Path, content: bytes) -> None:
    carried_out(chain(tmp_path))
    (tmp_path / "stamps" / "second.json").write_bytes(content)
    assert chain(tmp_path).state("second").kind == "missing"
    assert carried_out(chain(tmp_path)) == ["second"]


def test_every_byte_of_a_stamp_counts(tmp_path: Path) -> None:
    """Whichever byte is changed, the stamp is no more believed, or says the same."""
    carried_out(chain(tmp_path))
    file = tmp_path / "stamps" / "second.json"
    data = file.read_bytes()
    said = chain(tmp_path).state("second").stamp
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        state = chain(tmp_path).state("second")
        assert state.kind == "missing" or state.stamp == said, at


def test_a_key_that_waits_for_a_stage_is_unknown_until_then(tmp_path: Path) -> None:
    graph: Graph[Bench] = Graph(tmp_path)
    graph.add(stage(graph, "choice", {"x": 1}))

    def inputs() -> dict[str, Any]:
        if not graph.state("choice").done:
            raise NotMadeError("the choice")
        return {"chosen": (tmp_path / "choice.txt").read_text()}

    made = stage(graph, "user", {})
    graph.add(Stage("user", "user", after=("choice",), inputs=inputs, make=made.make))
    with pytest.raises(NotMadeError):
        graph.key("user")
    assert carried_out(graph) == ["choice", "user"]
    assert graph.state("user").done


def test_what_only_comes_after_another_has_a_key_of_its_own(tmp_path: Path) -> None:
    graph: Graph[Bench] = Graph(tmp_path)
    graph.add(stage(graph, "first", {}))
    graph.add(stage(graph, "later", {"z": 1}, after=("first",)))
    assert "stage first" not in graph.inputs("later")


def test_a_stage_cannot_need_what_is_not_there(tmp_path: Path) -> None:
    graph: Graph[Bench] = Graph(tmp_path)
    with pytest.raises(KeyError):
        graph.add(stage(graph, "second", {}, needs=("first",)))


def test_a_damaged_byproduct_makes_nothing_again(tmp_path: Path) -> None:
    graph: Graph[Bench] = Graph(tmp_path)
    log = tmp_path / "log.txt"
    write_text(log, "1\n2\n")
    write_text(tmp_path / "a.txt", "a")
    graph.add(Stage("a", "a", make=lambda bench: Made([tmp_path / "a.txt"], byproducts=[log])))
    graph.vouch("a", marks_of(tmp_path, [tmp_path / "a.txt"], byproducts=[log]), 1.0)
    log.write_text("1\n")
    assert graph.state("a").done
