"""What is measured again after attacks: curves where a number alone differs, and the shares that come back."""

from xml.etree import ElementTree

from spunge.report.attacks import attacks, curve_lines, panels, recovered_table
from spunge.report.reading import read_scores

SVG = "{http://www.w3.org/2000/svg}"


def test_metrics_that_differ_in_their_steps_are_one_curve_that_begins_without_an_attack(attacked):
    (attack,) = attacks(read_scores(attacked(steps=(50, 5, 10))))
    assert attack.name == "accuracy after relearning N steps"
    assert [point.at for point in attack.points] == [0, 5, 10, 50]
    assert attack.points[0].metric.name == "accuracy"


def test_one_attack_alone_is_no_curve(attacked):
    (attack,) = attacks(read_scores(attacked(steps=(5,))))
    assert attack.points == ()
    assert attack.name == "accuracy after relearning 5 steps"


def test_attacks_of_other_names_are_told_apart(attacked, row):
    found = attacked()
    found["rows"].append(row("merged", "Asia", "accuracy at 4 bits", 0.4, of="accuracy"))
    assert [attack.name for attack in attacks(read_scores(found))] == [
        "accuracy after relearning N steps",
        "accuracy at 4 bits",
    ]


def test_numbers_that_differ_in_two_places_make_no_curve(attacked, row):
    found = attacked(steps=())
    for bits, steps in ((4, 10), (8, 20), (16, 30)):
        found["rows"].append(row("merged", "Asia", f"accuracy at {bits} bits after {steps} steps", 0.4, of="accuracy"))
    (attack,) = attacks(read_scores(found))
    assert attack.points == ()
    assert len(attack.metrics) == 3


def test_a_panel_holds_a_mark_for_every_stage_and_point_where_its_number_says(attacked):
    scores = read_scores(attacked())
    (attack,) = attacks(scores)
    drawn = [ElementTree.fromstring(svg) for svg in panels(attack, scores)]
    assert len(drawn) == 2
    paths = [
        mark.find(f"{SVG}path").get("class")
        for mark in drawn[0].iter(f"{SVG}svg")
        if mark.find(f"{SVG}path") is not None
    ]
    assert sorted(paths) == sorted(["mark base", "mark control", "mark merged"] * 3)
    heights = [
        float(mark.get("y"))
        for mark in drawn[0].iter(f"{SVG}svg")
        if mark.find(f"{SVG}path[@class='mark merged']") is not None
    ]
    # 0.3, 0.33 and 0.6 on an axis from 0 to 1 that is 104 pixels high and ends at 130.
    assert heights == [round(130 - 104 * value, 1) for value in (0.3, 0.33, 0.6)]


def test_branches_and_stages_that_were_not_attacked_are_left_out_of_the_curve(attacked, row):
    found = attacked()
    found["rows"].append(row("control:random", "Asia", "accuracy", 0.4))
    scores = read_scores(found)
    lines = curve_lines(attacks(scores)[0], scores)
    assert {line.stage for line in lines} == {"base", "joint control", "merged"}
    merged = next(line for line in lines if (line.subject, line.stage) == ("Europe", "merged"))
    assert [value for value, _ in merged.values] == ["0.30", "0.33", "0.60"]


def test_the_table_of_shares_puts_the_merge_first(attacked):
    stages, lines = recovered_table(read_scores(attacked()))
    assert [stage.key for stage in stages] == ["merged", "control:joint"]
    assert lines[0] == ("accuracy after relearning 5 steps", "Europe", ("5% [−15% 25%]",) * 2)
    assert len(lines) == 4
