"""A paper's figures beside the run's own."""

import pytest

from spunge.report.published import published
from spunge.report.scores import arranged
from spunge.report.text import published_text
from spunge.results import parse_results


def scores_of(content):
    return arranged(parse_results(content))


@pytest.fixture
def found(results):
    entries = [
        {"stage": "merged", "subject": "Europe", "metric": "accuracy", "value": 0.254, "source": "Paper, Table 1"},
        {"stage": "branch:p1", "subject": "Mars", "metric": "accuracy", "value": 0.5, "source": "Paper, Table 2"},
        {"stage": "merged", "subject": "Europe", "metric": "toxicity", "value": 0.048, "source": "Paper, Table 3"},
    ]
    return results() | {"published": entries}


def test_ours_stands_beside_the_papers_with_the_difference(found):
    line = published(scores_of(found))[0]
    assert (line.ours, line.interval, line.paper, line.difference) == ("0.30", "[0.20 0.40]", "0.254", "+0.05")
    assert line.source == "Paper, Table 1"


def test_what_the_run_did_not_measure_is_a_dash_and_the_papers_figure_stays(found):
    for line, paper in zip(published(scores_of(found))[1:], ("0.5", "0.048"), strict=True):
        assert (line.ours, line.interval, line.paper, line.difference) == ("–", "", paper, "–")


def test_the_text_table_has_a_line_for_each_figure(found):
    lines = published_text(scores_of(found)).splitlines()
    assert lines[1].split() == ["metric", "subject", "stage", "ours", "paper", "difference", "source"]
    assert lines[2].split()[:8] == ["accuracy", "Europe", "merged", "0.30", "[0.20", "0.40]", "0.254", "+0.05"]
    assert lines[3].startswith("accuracy  Mars     branch Asia  –")


def test_without_figures_there_is_no_table(results):
    assert published_text(scores_of(results())) == ""
