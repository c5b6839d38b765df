"""What trainings were measured by on their way: panels, numbers at the step that was saved, and a sentence."""

import json
import math
from xml.etree import ElementTree

import pytest

from spunge.report.page import page
from spunge.report.scores import arranged
from spunge.report.text import report_text
from spunge.report.verdict import verdict
from spunge.report.watching import curves
from spunge.results import parse_results

SVG = "{http://www.w3.org/2000/svg}"
FORGET = {"evaluation": "capitals", "metric": "accuracy", "wanted": "down"}
KEEP = {"evaluation": "plain", "metric": "perplexity", "wanted": "down", "beside": True, "subject": "text"}
CHOSEN = {"keep": "best", "asked": 0.95, "share": 0.972, "reached": True}


def curve(training, values, kept, **more):
    """A curve of a value every ten steps, whose intervals reach a tenth to each side."""
    points = [
        {"step": 10 * place, "value": value}
        | ({} if isinstance(value, str) or value is None else {"low": value - 0.1, "high": value + 0.1})
        for place, value in enumerate(values)
    ]
    name = training.partition(":")[2]
    facts = {"training": training, "name": name, "seed": 0, "subject": name, "n": 24, "rows": "a", "every": 10}
    facts |= {"points": points, "trained": 10 * (len(values) - 1), "kept": kept, "keep": "last", "seconds": 4.5}
    return facts | FORGET | more


@pytest.fixture
def watched(results):
    """Two branches and a control, with what is kept beside."""
    falls, rises = [0.9, 0.6, 0.3, 0.2], [12.0, 12.2, 12.4, 14.0]
    trainings = {"branch:Europe": 20, "branch:Asia": 10, "control:joint": 20}
    return results() | {
        "watched": [
            each
            for training, kept in trainings.items()
            for each in (curve(training, falls, kept, **CHOSEN), curve(training, rises, kept, **CHOSEN | KEEP))
        ]
    }


def shown(run, content):
    """The page of a run with these results."""
    (run / "results.json").write_text(json.dumps(content))
    return page(run)


def marks(panel):
    """Class -> height of each mark, from left to right."""
    found = [
        (float(each.get("x").rstrip("%")), float(each.get("y")), each.find(f"{SVG}path").get("class"))
        for each in ElementTree.fromstring(panel).iter(f"{SVG}svg")
        if each.find(f"{SVG}path") is not None
    ]
    return [(kind, height) for _, height, kind in sorted(found)]


def test_every_training_has_a_panel_with_a_mark_where_each_number_says(watched):
    forgotten, kept = curves(parse_results(watched))
    assert (forgotten.metric, kept.metric) == ("accuracy of capitals", "perplexity of plain")
    assert len(forgotten.panels) == len(kept.panels) == 3
    # On an axis from 0 to 1 that is 104 pixels high and ends at 130.
    heights = [round(130 - 104 * value, 1) for value in (0.9, 0.6, 0.3, 0.2)]
    kinds = ["mark measured", "mark measured", "mark own", "mark measured"]
    assert marks(forgotten.panels[0]) == list(zip(kinds, heights, strict=True))
    assert [kind for kind, _ in marks(forgotten.panels[2])][2] == "mark control"
    assert "step 20, saved: 0.30 [0.20 0.40]" in forgotten.panels[0]
    assert [line.shape for line in forgotten.legend] == ["own", "control", "measured"]


def test_the_table_has_the_numbers_at_the_start_at_the_saved_step_and_at_the_last(watched):
    forgotten, kept = curves(parse_results(watched))
    assert forgotten.lines[1][:5] == ("Asia", "0", "Asia", "24", "10 of 30")
    assert [value for value, _ in forgotten.lines[1].values] == ["0.90", "0.60", "0.20"]
    assert forgotten.lines[1].values[1] == ("0.60", "[0.50 0.70]")
    assert (forgotten.shared, kept.shared, kept.lines[0].share) == (False, True, "97.2%")


def test_what_chose_a_step_is_told_and_that_no_step_kept_enough(watched):
    watched["watched"][2] |= {"reached": False, "share": 0.9}
    results = parse_results(watched)
    [finding] = [each for each in verdict(arranged(results)) if each.heading == "Saved steps"]
    text = report_text(results)
    assert (
        "accuracy chose which step of each training was saved: of the steps that keep 95.0% of the base's perplexity on text, the "
        "one where it is lowest, measured on items that are judged nowhere." in text
    )
    assert "Europe: step 20 of 30 keeps 97.2%\n" in text
    assert "Asia: step 10 of 30 keeps 90.0%; no step keeps enough, and it keeps most\n" in text
    assert len(finding.facts[0].lines) == 3


def test_where_the_last_step_is_saved_nothing_is_said_of_a_choice(results):
    content = results() | {"watched": [curve("branch:Europe", [0.9, 0.5], 10)]}
    assert "Saved steps" not in report_text(parse_results(content))
    [forgotten] = curves(parse_results(content))
    assert "some of the judged items" in forgotten.said
    assert "Wanted: lower." in forgotten.said


def test_the_seeds_of_a_training_share_a_panel(results):
    seeds = [curve("branch:Europe", [0.9, 0.5 + 0.1 * seed], 10, seed=seed, keep="best") for seed in (0, 1)]
    found = parse_results(results() | {"watched": seeds})
    [forgotten] = curves(found)
    assert "Europe (seed 1): step 10 of 10\n" in report_text(found)
    assert len(forgotten.panels) == 1
    assert [kind for kind, _ in marks(forgotten.panels[0])] == ["mark measured"] * 2 + ["mark own"] * 2
    assert forgotten.seeded


@pytest.mark.parametrize(
    "values", [[], ["NaN", "NaN"], [0.5, "Infinity"], [0.5], [0.0, 0.0], [None, 0.3]], ids=lambda values: str(values)
)
def test_numbers_that_cannot_be_drawn_leave_the_page_whole(tmp_path, write_run, results, values):
    content = results() | {"watched": [curve("branch:Europe", values, 10 * (len(values) - 1))]}
    html = shown(write_run(tmp_path), content)
    assert "while it trained" in html
    for panel in curves(parse_results(content))[0].panels:
        drawn = [mark for mark, _ in marks(panel)]
        assert len(drawn) == sum(value is not None and not math.isnan(float(value)) for value in values)


def test_names_from_the_data_stay_text(tmp_path, write_run, results):
    hostile = '<script>alert("1")</script>'
    content = results() | {
        "watched": [curve("branch:Europe", [0.9, 0.5], 10, name=hostile, metric=hostile, evaluation=hostile)]
    }
    html = shown(write_run(tmp_path), content)
    assert hostile not in html
    assert html.count("&lt;script&gt;") >= 3
