"""The verdict says what the numbers support, and no more."""

import math

from spunge.report.scores import Interval, Shift, arranged
from spunge.report.verdict import basis, pairs, verdict
from spunge.report.wording import unisolated
from spunge.results import parse_results


def scores_of(content):
    return arranged(parse_results(content))


def said(results) -> dict[str, str]:
    findings = verdict(scores_of(results))
    plain = {f.heading: " ".join(" ".join((fact.metric, fact.text, *fact.lines)) for fact in f.facts) for f in findings}
    return {unisolated(heading): unisolated(text) for heading, text in plain.items()}


def put(results, stage, subject, value, spread=0.1, **more):
    """Other numbers for a row."""
    for row in results["rows"]:
        if (row["stage"], row["subject"]) == (stage, subject):
            row |= {"value": value, "low": value - spread, "high": value + spread} | more
    return results


def without(results, stage, subject):
    rows = [row for row in results["rows"] if (row["stage"], row["subject"]) != (stage, subject)]
    pairs = [row for row in results["differences"] if (row["stage"], row["subject"]) != (stage, subject)]
    return results | {"rows": rows, "differences": pairs}


def test_each_part_is_compared_with_the_base_and_the_control(results):
    text = said(results())["Parts to forget"]
    assert "accuracy fell on 2 of 2 (lower is wanted)." in text
    assert "Europe: fell by 0.60 [0.50 0.70], 0.90 → 0.30 [0.20 0.40]; joint control 0.30 [0.20 0.40]" in text
    assert "Mean over these parts: base 0.90, merged 0.30, joint control 0.30." in text


def test_a_change_is_claimed_where_intervals_overlap_but_the_paired_difference_is_certain(results, pair):
    """0.80 [0.70 0.90] and 0.75 [0.65 0.85] overlap; the same items fell by 0.05 [0.03 0.07]."""
    text = said(pair(results(), spread=0.02))["Subjects to be kept"]
    assert "accuracy got worse on 2 of 2. The largest loss: Africa: fell by 0.05 [0.03 0.07], 0.80 → 0.75" in text


def test_no_change_is_claimed_where_the_paired_difference_is_not_certain_though_intervals_lie_apart(results, pair):
    text = said(pair(results(), spread=0.7))["Parts to forget"]
    assert "accuracy shows no certain change on 2 of 2 (lower is wanted)." in text
    assert "Europe: no certain change (−0.60 [−1.30 +0.10]), 0.90 → 0.30" in text
    assert "fell" not in text


def test_the_largest_loss_on_what_is_kept_is_named_and_called_uncertain(results):
    text = said(results())["Subjects to be kept"]
    assert "accuracy shows no certain change on 2 of 2." in text
    assert "Africa: no certain change (−0.05 [−0.15 +0.05]), 0.80 → 0.75" in text
    assert "perplexity got worse on 1 of 1. text: rose ×1.050 [1.017 1.083], 12.00 → 12.60" in text


def test_a_lower_perplexity_is_better_and_a_lower_accuracy_worse(results, pair):
    found = put(put(results(), "merged", "text", 11.0), "merged", "facts", 0.2)
    text = said(pair(found))["Subjects to be kept"]
    assert "perplexity got better on 1 of 1." in text
    assert "accuracy got worse on 1 of 2, no certain change on 1." in text
    assert "facts: fell by 0.60" in text


def test_a_perplexity_that_rises_is_wanted_on_a_part_and_a_loss_on_what_is_kept(results, row, pair):
    found = results()
    for part in ("Europe", "Asia"):
        found["rows"] += [
            row(stage, part, "perplexity", 12.0 if stage == "base" else 30.0) for stage in found["stages"]
        ]
    text = said(pair(found))
    assert "perplexity rose on 2 of 2 (higher is wanted)." in text["Parts to forget"]
    assert "perplexity got worse on 1 of 1." in text["Subjects to be kept"]
    metric = next(metric for metric in scores_of(found).metrics if metric.name == "perplexity")
    assert metric.direction == "Wanted: higher on what is to be forgotten, lower on what is to be kept."


def test_what_should_be_near_a_value_is_better_for_being_nearer_and_not_for_having_fallen(results, row, pair):
    """AUROC of membership: 0.5 is the aim; below it the rows to forget give themselves away too."""
    after = {"near": (0.95, 0.55), "beyond": (0.95, 0.1), "far beyond": (0.6, 0.06), "same side": (0.45, 0.2)}
    found = results(parts=list(after))
    found["rows"] = [
        row(stage, part, "AUROC", value, 0.05, group="forget", wanted="near", target=0.5)
        for part, values in after.items()
        for stage, value in zip(("base", "merged"), values, strict=True)
    ]
    for each in found["rows"]:
        del each["higher_is_better"]
    found["stages"] = ["base", "merged"]
    found = pair(found, spread=0.04)
    text = said(found)["Parts to forget"]
    assert "AUROC got worse on 2 of 4, got better on 1, no certain change on 1 (near 0.5 is wanted)." in text
    assert "near: fell by 0.40 [0.36 0.44], 0.95 → 0.55" in text
    metric = scores_of(found).metrics[0]
    assert metric.direction == "Wanted: near 0.5."
    better = {each.subject.name: each.better for each in pairs(metric, "forget")}
    assert better == {"near": 1, "beyond": 0, "far beyond": -1, "same side": -1}


def test_of_many_parts_those_are_listed_that_are_forgotten_least(results, row, pair):
    """Also where most of them moved the other way."""
    names = [f"part {index}" for index in range(8)]
    found = results(parts=names)
    for index, name in enumerate(names):
        put(found, "merged", name, 0.3 if index < 2 else 0.9 + 0.01 * index)
    fact = next(fact for f in verdict(scores_of(pair(found))) for fact in f.facts if f.heading == "Parts to forget")
    assert [unisolated(line).split(":")[0] for line in fact.lines] == ["part 7", "part 6", "part 5"]


def test_what_is_wanted_no_way_is_not_called_worse_or_better(results, row, pair):
    found = parse_results(results()).content
    head = {"subject": "facts", "metric": "refused", "low": 0.0, "high": 1.0, "n": 44, "group": "keep"}
    found["rows"] += [head | {"stage": stage, "value": value} for stage, value in (("base", 0.0), ("merged", 0.5))]
    text = said(pair(found))["Subjects to be kept"]
    assert "refused rose on 1 of 1. facts: rose by 0.50" in text


def test_results_without_differences_claim_nothing(results):
    found = results()
    del found["differences"]
    everything = " ".join(said(found).values())
    assert "0.90 → 0.30 [0.20 0.40]" in everything
    assert not {"fell", "rose", "worse", "better", "lower", "higher"} & set(everything.split())
    assert "no change is claimed" in basis(scores_of(found))
    assert "no change is claimed" not in basis(scores_of(results()))


def test_small_samples_are_called_that_once(results):
    found = put(results(), "merged", "Europe", 0.3, n=4)
    told = "Small samples, of fewer than 10 items: accuracy on Europe (4). A change there may go unseen"
    assert told in basis(scores_of(found))
    assert " ".join(said(found).values()).count("Small samples") == 0
    assert "Small" not in basis(scores_of(results()))


def test_where_no_item_changed_it_is_said_with_their_number(results):
    found = results()
    for row in found["differences"]:
        row |= {"value": 0.0, "low": -0.3, "high": 0.3, "n": 12, "changed": 0}
    text = said(found)["Parts to forget"]
    assert "Europe: no item changed (n = 12), 0.90 → 0.30" in text
    for row in found["differences"]:
        del row["low"], row["high"]
    assert "Europe: no item changed (n = 12), 0.90 → 0.30" in said(found)["Parts to forget"]


def test_one_item_proves_nothing():
    assert Shift(-1.0, Interval(-1.0, -1.0), False, n=1).way == 0
    assert Shift(-1.0, Interval(-1.0, -1.0), False, n=2).way == -1


def test_a_ratio_is_certain_where_its_interval_excludes_one():
    ways = [Shift(1.0, Interval(*bounds), True, 9).way for bounds in ((0.8, 0.9), (0.9, 1.0), (0.9, 1.1), (1.1, 1.2))]
    assert ways == [-1, 0, 0, 1]
    assert Shift(0.1, Interval(0.0, 0.2), False, 9).way == 0


def test_below_chance_is_called_over_forgetting_unless_the_base_is_there_too(results, pair):
    found = put(
        put(results(), "merged", "Europe", 0.05, 0.04, below_chance=True),
        "merged",
        "Asia",
        0.05,
        0.04,
        below_chance=True,
    )
    found = pair(put(found, "base", "Asia", 0.2, below_chance=True))
    text = said(found)["Parts to forget"]
    assert "Below chance (over-forgetting) on 1: Europe." in text
    assert "0.05 [0.01 0.09], below chance (over-forgetting)" in text
    assert "below chance as 0.20 is" in text


def test_what_did_not_certainly_fall_was_not_forgotten_too_far(results, pair):
    text = said(pair(put(results(), "merged", "Europe", 0.05, below_chance=True), spread=0.9))["Parts to forget"]
    assert "over-forgetting" not in text
    assert ", below chance" in text


def test_the_end_that_makes_a_change_certain_is_not_shown_as_nothing(results, pair):
    text = said(pair(results(), spread=0.048))["Subjects to be kept"]
    assert "Africa: fell by 0.05 [0.002 0.098]" in text


def test_several_seeds_are_told_with_their_spread(results):
    found = put(results() | {"seeds": 3}, "merged", "Europe", 0.3, spread=0.1)
    next(row for row in found["rows"] if (row["stage"], row["subject"]) == ("merged", "Europe"))["spread"] = 0.04
    assert "means over 3 seeds" in basis(scores_of(found))
    assert "0.90 → 0.30 [0.20 0.40] ±0.04" in said(found)["Parts to forget"]
    assert "seeds" not in basis(scores_of(results()))


def test_the_largest_share_that_an_attack_brings_back_is_told_for_each_metric(attacked):
    text = said(attacked())["What attacks bring back"]
    assert (
        "accuracy after relearning 50 steps brings back up to 60% [40% 80%] of the accuracy that was forgotten (on Asia); "
        "joint control up to 60% [40% 80%] (on Asia)."
    ) in text
    assert (
        "5 steps brings back up to 15% [−5% 35%] of the accuracy that was forgotten (on Asia, not certainly any" in text
    )


def test_what_was_not_forgotten_for_certain_is_not_said_to_come_back(attacked, pair):
    found = pair(attacked() | {"recovered": []}, spread=0.7)
    assert (
        "steps brings back nothing, since nothing was forgotten for certain" in said(found)["What attacks bring back"]
    )
    # Forgotten for certain, and yet no share was made: that is not nothing.
    unknown = said(attacked() | {"recovered": []})["What attacks bring back"]
    assert "brings back an unknown share" in unknown


def test_a_measurement_under_attack_is_no_measurement_of_the_model(attacked):
    text = said(attacked())
    assert "relearning" not in text["Parts to forget"]


def test_the_worst_subject_is_neither_forgotten_nor_kept(results, row):
    found = results()
    for subject in ("worst", "everything", "worst of everything"):
        found["rows"] += [row("base", subject, "accuracy", 0.9), row("merged", subject, "accuracy", 0.1)]
    groups = {subject.name: subject.group for subject in scores_of(found).metrics[0].subjects}
    assert (groups["worst"], groups["worst of everything"], groups["everything"]) == ("worst", "worst", "keep")
    assert list(groups)[-2:] == ["worst", "worst of everything"]
    text = said(found)
    assert "worst:" not in text["Subjects to be kept"] + text["Parts to forget"]


def test_a_subject_whose_name_begins_like_the_worst_is_kept_like_others(results, row):
    found = results()
    found["rows"] += [row("base", "worst of times", "accuracy", 0.9)]
    assert scores_of(found).metrics[0].subjects[-1].group == "keep"


def test_a_part_that_was_not_measured_is_said_to_be_so(results):
    text = said(without(results(), "merged", "Asia"))["Parts to forget"]
    assert "fell on 1 of 1 measured" in text
    assert "Not measured on both base and merged: Asia (1)" in text


def test_a_part_that_rose_is_not_counted_as_fallen(results, pair):
    found = results()
    for row in found["rows"]:
        if row["subject"] == "Asia" and row["stage"] == "merged":
            row |= {"value": 0.95, "low": 0.85, "high": 1.0}
    text = said(pair(found, spread=0.04))["Parts to forget"]
    assert "accuracy fell on 1 of 2, rose on 1 (lower is wanted)." in text
    assert "Asia: rose by 0.05 [0.01 0.09], 0.90 → 0.95" in text


def test_of_many_parts_those_that_moved_least_are_listed(results, pair):
    found = results(parts=[f"g{index}" for index in range(9)])
    for row in found["rows"]:
        if row["subject"] == "g7" and row["stage"] == "merged":
            row |= {"value": 0.8, "low": 0.7, "high": 0.9}
    text = said(pair(found))["Parts to forget"]
    assert text.index("g7: no certain change") < text.index("g0: fell")
    assert "g5:" not in text


def test_nothing_is_claimed_about_parts_without_measurements(results):
    found = results()
    found["rows"] = [row for row in found["rows"] if row["metric"] == "perplexity"]
    assert said(found)["Parts to forget"] == "Nothing was measured on the parts to forget."


def test_differences_without_intervals_claim_nothing(results):
    found = results()
    found["differences"] = [row | {"low": None, "high": None} for row in found["differences"]]
    assert "no certain change (−0.60), 0.90 → 0.30" in said(found)["Parts to forget"]


def test_all_beside_parts_is_neither_forgotten_nor_kept(results, row):
    found = results()
    found["rows"] += [row("base", "all", "accuracy", 0.8), row("merged", "all", "accuracy", 0.1)]
    text = said(found)
    assert "all: no certain change (−0.70), 0.80 → 0.10" in text["All rows together"]
    assert "all" not in text["Subjects to be kept"].replace("overall", "")


def test_a_merge_above_its_control_is_said_to_be_higher(results, pair):
    text = said(pair(put(results(), "merged", "Asia", 0.6)))["Merged against the joint control"]
    assert (
        "accuracy is higher on 1 of 2 parts to forget, no certain difference on 1; shows no certain difference" in text
    )
    assert "Asia: higher by 0.30 [0.20 0.40], 0.60 [0.50 0.70] against 0.30" in text
    assert "Europe" not in text


def test_a_control_that_is_not_certainly_different_is_not_said_to_be(results):
    text = said(results())["Merged against the joint control"]
    assert text.startswith(
        "accuracy shows no certain difference on 2 of 2 parts to forget; shows no certain difference"
    )
    assert not {"lower", "higher", "worse", "better"} & set(text.split())


def test_an_infinite_perplexity_is_the_largest_loss(results, row):
    found = results()
    found["rows"] += [row("base", "web", "perplexity", 10.0), row("merged", "web", "perplexity", math.inf)]
    assert "The largest loss: web: no certain change, 10.00 → inf" in said(found)["Subjects to be kept"]


def test_the_subject_of_all_an_evaluations_rows_is_neither_forgotten_nor_kept(results, row):
    found = results()
    found["rows"] += [row("base", "quizzed", "accuracy", 0.8), row("merged", "quizzed", "accuracy", 0.1)]
    assert "quizzed" in said(found)["Subjects to be kept"]
    found["evaluations"][0]["overall"] = "quizzed"
    text = said(found)
    assert "quizzed: no certain change (−0.70), 0.80 → 0.10" in text["All rows together"]
    assert "quizzed" not in text["Subjects to be kept"]


def test_a_check_beside_a_metric_is_told_where_it_changed_for_certain(results, row, pair):
    def told(*values: float) -> str:
        found = results()
        for part, value in zip(("Europe", "Asia"), values, strict=True):
            for stage in ("base", "control:joint", "merged"):
                found["rows"].append(row(stage, part, "empty", value if stage == "merged" else 0.0, 0.0, side=True))
        return " ".join(said(pair(found)).values())

    assert "empty" not in told(0.0, 0.05)
    text = told(0.3, 0.05)
    assert (
        "empty rose on 1 of 2, no certain change on 1 (lower is wanted). Mean over these parts: base 0.00, merged 0.17"
        in text
    )
    assert "Europe: rose by 0.30" in text
    assert "Asia: no certain change (+0.05" not in text


def test_a_certain_fall_of_next_to_nothing_is_not_written_as_zero(results, pair):
    content = results()
    for stage, value in (("base", 2e-5), ("merged", 1e-5)):
        put(content, stage, "Asia", value, spread=0)
    text = said(pair(content, spread=2e-6))["Parts to forget"]
    assert "Asia: fell by 1.0e-05 [8.0e-06 1.2e-05]" in text
    assert "Of Asia the base showed nothing to forget." in text
