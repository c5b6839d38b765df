"""Radars, the trade-off's front, heat maps and curves of losses show the numbers that they are drawn from."""

import json
import math
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spunge.errors import printable
from spunge.report import radar
from spunge.report.heat import heat
from spunge.report.losses import losses
from spunge.report.making import making
from spunge.report.page import page
from spunge.report.scores import Scores, arranged
from spunge.report.tradeoff import trade_off
from spunge.results import Results, parse_results

PARTS = ("Europe", "Asia", "Africa", "Oceania", "<b>\x1b[1m")


@pytest.fixture
def scores(results: Any) -> Callable[..., Scores]:
    """scores({(stage, subject): value}) -> those of a run over PARTS with these values."""

    def make(values: dict[tuple[str, str], float]) -> Scores:
        content = results(PARTS, ("facts",))
        for row in content["rows"]:
            row["value"] = values.get((row["stage"], row["subject"]), row["value"])
        return arranged(parse_results(content))

    return make


def test_a_ring_lies_as_far_out_on_each_spoke_as_its_score_is_of_the_axis(scores: Any) -> None:
    values = dict(zip(PARTS, (0.1, 0.9, 0.5, 0.0, 1.0), strict=True))
    known = scores({("merged", part): value for part, value in values.items()})
    [svg] = radar.radars(known.metric("accuracy"), known)
    ring = next(each for each in ElementTree.fromstring(svg).iter() if each.get("class") == "ring merged")
    points = [tuple(map(float, pair.split())) for pair in ring.attrib["d"].strip("MZ").split("L")]
    out = [math.hypot(x - radar.WIDTH / 2, y - (radar.HEIGHT / 2 + 8)) / radar.RADIUS for x, y in points]
    assert out == pytest.approx(list(values.values()), abs=0.002)


def test_a_group_of_two_has_no_radar(results: Any) -> None:
    known = arranged(parse_results(results(("Europe", "Asia"), ("facts",))))
    metric = known.metric("accuracy")
    assert metric is not None
    assert radar.radars(metric, known) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_stage_beats(scores: Any, seed: int) -> None:
    draw = random.Random(seed)
    stages = ["base", *(f"branch:p{at}" for at in range(5)), "control:joint", "merged"]
    forgotten, kept = {}, {}
    for stage in stages:
        forgotten[stage], kept[stage] = round(draw.random(), 1), round(draw.random(), 1)
    values = {(stage, part): forgotten[stage] for stage in stages for part in PARTS}
    known = scores(values | {(stage, "facts"): kept[stage] for stage in stages})
    told = trade_off(known)
    assert told is not None
    better = {
        one: [
            other
            for other in stages
            if forgotten[other] <= forgotten[one]
            and kept[other] >= kept[one]
            and (forgotten[other], kept[other]) != (forgotten[one], kept[one])
        ]
        for one in stages
    }
    front = [stage for stage in stages if not better[stage]]
    labels = {model.stage: model.label for model in known.models}
    assert list(told.front) == [printable(labels[stage]) for stage in front]
    assert "\x1b" not in told.svg


def test_a_block_has_the_norm_of_all_its_tensors_and_a_cell_the_mean_of_the_branches() -> None:
    entry = {"kept": [0.2, 0.4], "conflicts": 0.1, "before": [1.0, 1.0]}
    told = heat(
        {
            "tensors": {
                "model.layers.3.mlp.down_proj.weight": {**entry, "after": 3.0},
                "model.layers.3.self_attn.q_proj.weight": {**entry, "after": 4.0},
                "model.layers.11.mlp.experts.0.w1.weight": {**entry, "after": 6.0},
                "model.layers.11.mlp.experts.7.w1.weight": {**entry, "after": 8.0},
                "lm_head.weight": {**entry, "after": 100.0},
            },
            "sources": [{"label": "a"}, {"label": "b"}],
        }
    )
    assert [(bar.block, bar.shown, bar.share) for bar in told.bars] == [("3", "5.00", 50), ("11", "10.00", 100)]
    norms, kept, conflicts, branches = told.maps
    assert norms.heads == ("mlp.down_proj", "self_attn.q_proj", "mlp experts w1")
    assert [cell and cell.shown for cell in norms.lines[1][1]] == [None, None, "10.00"]
    assert kept.lines[0][1][0] == ("30.0%", 100)
    assert conflicts.lines[0][1][0] == ("10.0%", 100)
    assert branches.heads == ("a", "b")
    assert [cell and cell.shown for cell in branches.lines[0][1]] == ["1.41", "1.41"]


def test_tensors_of_no_block_have_no_map() -> None:
    assert heat({"tensors": {"lm_head.weight": {"after": 1.0}}}) == heat({}) == ((), ())


def test_a_curve_has_every_step_once_and_passes_over_what_is_no_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 4.0), (2, 3.0), (2, 2.0), (3, 1.0))]
    (tmp_path / "a" / "log.jsonl").write_text(
        "\n".join([*lines, '{"step": 4, "lo', "[]", '{"step": 5, "loss": "NaN"}'])
    )
    [svg] = losses({tmp_path / "a": "<Asia>", tmp_path / "b": "not there"})
    assert len(re.findall('class="whisker measured"', svg)) == 2
    assert "loss 4.00 at step 1, 1.00 at step 3" in svg
    assert "<Asia>" not in svg


def test_a_long_log_is_drawn_in_few_points(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 5001)]
    (tmp_path / "a" / "log.jsonl").write_text("\n".join(lines))
    [svg] = losses({tmp_path / "a": "a"})
    assert len(svg) < 20_000


def test_the_command_names_the_recipe_whatever_the_folder_is_called(tmp_path: Path) -> None:
    run = tmp_path / "a run; $(rm -rf) 'x'"
    run.mkdir()
    words = shlex.split(making(run, Results(rows=()), None).command)
    assert words == ["spunge", "run", "recipe.yaml", "--out", f"../{run.name}-again"]


def test_measures_that_are_zero_everywhere_are_folded_away(tmp_path: Path, write_run: Any) -> None:
    run = write_run(tmp_path)
    content = json.loads((run / "results.json").read_text())
    zeros = [
        {**row, "metric": "empty", "value": 0.0, "low": 0.0, "high": 0.0}
        for row in content["rows"]
        if row["metric"] == "accuracy"
    ]
    content["rows"] += zeros
    (run / "results.json").write_text(json.dumps(content))
    html = page(run)
    assert "Zero everywhere" in html
    assert "<h2><bdi>empty</bdi></h2>" not in html
    assert html.count("<summary><bdi>empty</bdi></summary>") == 1


@pytest.mark.thorough
def test_a_page_of_very_many_branches_leaves_out_their_scores_and_says_so(tmp_path: Path, write_run: Any) -> None:
    run = write_run(tmp_path, [f"part {at}" for at in range(100)])
    html = page(run)
    assert len(html.encode()) < 3_000_000
    assert "branches' own scores are left out" in html


def test_the_front_is_drawn_by_a_measure_that_is_not_zero_for_all(results: Any) -> None:
    content = results()
    zeros = [
        dict(row, metric="recall", value=0.0, low=0.0, high=0.1)
        for row in content["rows"]
        if row["metric"] == "accuracy"
    ]
    drawn = trade_off(arranged(parse_results(content | {"rows": zeros + content["rows"]})))
    assert drawn is not None
    assert "recall" not in drawn.said


@pytest.mark.parametrize("odd", ["10" * 200, "1e999", "NaN", "-1", "0", "true", '"x"', "[]", "null"])
def test_a_damaged_log_keeps_no_page_from_being_made(tmp_path: Path, odd: str) -> None:
    for line in (f'{{"step": 2, "loss": {odd}}}', f'{{"step": {odd}, "loss": 1.0}}', odd):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
        assert all("nan" not in svg and "inf" not in svg for svg in losses({tmp_path: "a"}))
