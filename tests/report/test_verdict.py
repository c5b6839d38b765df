"""The verdict says what the numbers support, and no more."""

import math

from spunge.report.reading import read_scores
from spunge.report.scores import Cell, Interval, overlap
from spunge.report.verdict import verdict


def said(results) -> dict[str, str]:
    findings = verdict(read_scores(results))
    plain = {f.heading: " ".join(" ".join((fact.metric, fact.text, *fact.lines)) for fact in f.facts) for f in findings}
    return {heading.translate(ISOLATES): text.translate(ISOLATES) for heading, text in plain.items()}


ISOLATES = {0x2068: None, 0x2069: None}


def without(results, stage, subject):
    rows = [row for row in results["rows"] if (row["stage"], row["subject"]) != (stage, subject)]
    return results | {"rows": rows}


def test_each_part_is_compared_with_the_base_and_the_control(results):
    text = said(results())["Parts to forget"]
    assert "accuracy fell on 2 of 2" in text
    assert "do not overlap on 2 of 2" in text
    part = "0.90 [0.80 1.00] → 0.30 [0.20 0.40] (−0.60), intervals do not overlap; joint control 0.30 [0.20 0.40]"
    assert f"Europe: {part}" in text
    assert "Mean over these parts: base 0.90, merged 0.30, joint control 0.30." in text


def test_the_largest_loss_on_what_is_kept_is_named(results):
    text = said(results())["Subjects to be kept"]
    assert "accuracy lost most on Africa: 0.80 [0.70 0.90] → 0.75 [0.65 0.85] (−0.05), intervals overlap" in text
    assert "perplexity lost most on text: 12.00 [11.50 12.50] → 12.60 [12.10 13.10] (×1.05), intervals overlap" in text


def test_a_part_that_was_not_measured_is_said_to_be_so(results):
    text = said(without(results(), "merged", "Asia"))["Parts to forget"]
    assert "fell on 1 of 1 measured" in text
    assert "Not measured on both base and merged: Asia (1)" in text


def test_a_part_that_got_better_is_not_counted_as_fallen(results):
    found = results()
    for row in found["rows"]:
        if row["subject"] == "Asia" and row["stage"] == "merged":
            row |= {"value": 0.95, "low": 0.85, "high": 1.0}
    text = said(found)["Parts to forget"]
    assert "fell on 1 of 2 and rose on 1 of 2; the 95% intervals of base and merged do not overlap on 1 of 2" in text


def test_of_many_parts_those_that_moved_least_are_listed(results):
    found = results(parts=[f"g{index}" for index in range(9)])
    for row in found["rows"]:
        if row["subject"] == "g7" and row["stage"] == "merged":
            row |= {"value": 0.8, "low": 0.7, "high": 0.9}
    text = said(found)["Parts to forget"]
    assert text.index("g7: 0.90") < text.index("g0: 0.90")
    assert "g5: 0.90" not in text


def test_nothing_is_claimed_about_parts_without_measurements(results):
    found = results()
    found["rows"] = [row for row in found["rows"] if row["metric"] == "perplexity"]
    assert said(found)["Parts to forget"] == "Nothing was measured on the parts to forget."


def test_without_intervals_none_are_compared(results):
    found = results()
    found["rows"] = [row | {"low": None, "high": None} for row in found["rows"]]
    everything = " ".join(said(found).values())
    assert "no intervals were measured" in everything
    assert "overlap" not in everything


def test_all_beside_parts_is_neither_forgotten_nor_kept(results, row):
    found = results()
    found["rows"] += [row("base", "all", "accuracy", 0.8), row("merged", "all", "accuracy", 0.1)]
    text = said(found)
    assert "all: 0.80" in text["All rows together"]
    assert "all" not in text["Subjects to be kept"].replace("overall", "")


def test_a_merge_above_its_control_is_said_to_lie_above(results):
    found = results()
    for row in found["rows"]:
        if row["subject"] == "Asia" and row["stage"] == "merged":
            row |= {"value": 0.6, "low": 0.5, "high": 0.7}
    text = said(found)["Merged against the joint control"]
    assert "overlapping intervals on 1 of 2 parts to forget, merged lies above it on 1" in text


def test_an_infinite_perplexity_is_the_largest_loss(results, row):
    found = results()
    found["rows"] += [row("base", "web", "perplexity", 10.0), row("merged", "web", "perplexity", math.inf)]
    assert "lost most on web: 10.00 [9.90 10.10] → inf" in said(found)["Subjects to be kept"]


def test_intervals_that_touch_overlap():
    assert overlap(Cell(0.5, Interval(0.4, 0.6)), Cell(0.7, Interval(0.6, 0.8))) is True
    assert overlap(Cell(0.5, Interval(0.4, 0.59)), Cell(0.7, Interval(0.6, 0.8))) is False
    assert overlap(Cell(0.5), Cell(0.7, Interval(0.6, 0.8))) is None
