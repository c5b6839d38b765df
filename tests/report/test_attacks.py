"""What is measured again after attacks: curves where a number alone differs, and the shares that come back."""

from xml.etree import ElementTree

from spunge.report.attacks import curve_lines, families, panels, recovered_table
from spunge.report.scores import arranged
from spunge.results import parse_results


def scores_of(content):
    return arranged(parse_results(content))


SVG = "{http://www.w3.org/2000/svg}"


def test_metrics_that_differ_in_their_steps_are_one_curve_that_begins_without_an_attack(attacked):
    (attack,) = families(scores_of(attacked(steps=(50, 5, 10))))
    assert attack.name == "accuracy after relearning N steps"
    assert [point.at for point in attack.points] == [0, 5, 10, 50]
    assert attack.points[0].metric.name == "accuracy"


def test_one_attack_alone_is_no_curve(attacked):
    (attack,) = families(scores_of(attacked(steps=(5,))))
    assert attack.points == ()
    assert attack.name == "accuracy after relearning 5 steps"


def test_attacks_of_other_names_are_told_apart(attacked, row):
    found = attacked()
    found["rows"].append(row("merged", "Asia", "accuracy at 4 bits", 0.4, of="accuracy"))
    assert [attack.name for attack in families(scores_of(found))] == [
        "accuracy after relearning N steps",
        "accuracy at 4 bits",
    ]


def test_numbers_that_differ_in_two_places_make_no_curve(attacked, row):
    found = attacked(steps=())
    for bits, steps in ((4, 10), (8, 20), (16, 30)):
        found["rows"].append(row("merged", "Asia", f"accuracy at {bits} bits after {steps} steps", 0.4, of="accuracy"))
    attacks = families(scores_of(found))
    assert [(attack.name, attack.points) for attack in attacks] == [
        ("accuracy at 4 bits after 10 steps", ()),
        ("accuracy at 8 bits after 20 steps", ()),
        ("accuracy at 16 bits after 30 steps", ()),
    ]


def typed(found, *facts):
    """As a file of this version: for each mapping of facts, a metric of its own on Asia in the merged model."""
    content = parse_results(found).content
    head = {"stage": "merged", "subject": "Asia", "value": 0.4, "wanted": "down", "group": "forget"}
    return content | {"rows": content["rows"] + [head | {"of": "accuracy"} | each for each in facts]}


def test_metrics_are_a_curve_because_their_fields_say_so_whatever_their_names(results):
    facts = [{"metric": name, "curve": "worn down", "at": at, "unit": "steps"} for name, at in (("x", 9), ("7", 2))]
    (attack,) = families(scores_of(typed(results(), *facts)))
    assert attack.name == "worn down"
    assert [(point.at, point.metric.name) for point in attack.points] == [(0, "accuracy"), (2, "7"), (9, "x")]


def test_names_that_differ_in_a_number_make_no_curve_where_the_fields_do_not(results):
    attacks = families(scores_of(typed(results(), *({"metric": f"accuracy, crushed {n} steps"} for n in (1, 2, 3)))))
    assert [len(attack.metrics) for attack in attacks] == [1, 1, 1]
    assert not any(attack.points for attack in attacks)


def test_a_curve_over_blocks_has_no_point_without_an_attack(results):
    facts = [{"metric": f"probe {block}", "curve": "probe N", "at": block, "unit": "block"} for block in (1, 2, 3)]
    (attack,) = families(scores_of(typed(results(), *facts)))
    assert [point.at for point in attack.points] == [1, 2, 3]


def test_a_panel_holds_a_mark_for_every_stage_and_point_where_its_number_says(attacked):
    scores = scores_of(attacked())
    (attack,) = families(scores)
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
    scores = scores_of(found)
    lines = curve_lines(families(scores)[0], scores)
    assert {line.model for line in lines} == {"base", "joint control", "merged"}
    merged = next(line for line in lines if (line.subject, line.model) == ("Europe", "merged"))
    assert [value for value, _ in merged.values] == ["0.30", "0.33", "0.60"]


def test_the_table_of_shares_puts_the_merge_first(attacked):
    models, lines = recovered_table(scores_of(attacked()))
    assert [model.stage for model in models] == ["merged", "control:joint"]
    assert lines[0] == ("accuracy after relearning 5 steps", "Europe", ("5% [−15% 25%]",) * 2)
    assert len(lines) == 4
