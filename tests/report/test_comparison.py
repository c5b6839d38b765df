"""Runs beside each other, where what measured them is the same."""

import json
import re
from pathlib import Path

import pytest

from spunge.errors import RecipeError
from spunge.report.comparison import compare


@pytest.fixture
def write(tmp_path):
    """write("name", results) -> a run's folder."""

    def run(name: str, content) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        return tmp_path / name

    return run


def told(content, which, **changes):
    """With other facts about an evaluation."""
    entries = [entry | changes if entry["name"] == which else entry for entry in content["evaluations"]]
    return content | {"evaluations": entries}


def test_each_run_has_a_column_and_each_subject_a_line(write, results):
    second = results()
    for row in second["rows"]:
        if (row["stage"], row["subject"]) == ("merged", "Europe"):
            row |= {"value": 0.4, "low": 0.3, "high": 0.5}
    lines = compare([write("one", results()), write("two", second)]).text().splitlines()
    assert lines[0].split() == ["metric", "subject", "wanted", "one", "two"]
    assert re.split(" {2,}", lines[1]) == ["accuracy", "Europe", "down", "0.30 [0.20 0.40]", "0.40 [0.30 0.50]"]
    assert [line.split()[1] for line in lines[1:]] == ["Europe", "Asia", "Africa", "facts", "text"]


def test_another_stage_may_be_compared(write, results):
    found = compare([write("one", results()), write("two", results())], "base").to_json()
    assert found["stage"] == "base"
    assert found["runs"] == ["one", "two"]
    assert found["rows"][0] == {
        "metric": "accuracy",
        "subject": "Europe",
        "wanted": "down",
        "scores": [{"value": 0.9, "low": 0.8, "high": 1.0, "n": 44}] * 2,
    }


def test_a_stage_that_a_run_lacks_is_refused(write, results):
    runs = [write("one", results()), write("two", results())]
    with pytest.raises(
        RecipeError, match=r"'one' has no stage 'control:jiont'; did you mean 'control:joint'\?; it has base"
    ):
        compare(runs, "control:jiont")


@pytest.mark.parametrize("key", ["scorer", "revision", "threshold"])
def test_another_instrument_is_refused_and_both_are_named(write, results, key):
    other = {"scorer": "tiny/scorer", "revision": "abc123", "threshold": 0.5} | {key: "other"}
    runs = [write("one", results()), write("two", told(results(), "quiz", instrument=other))]
    with pytest.raises(RecipeError) as error:
        compare(runs)
    text = str(error.value)
    assert "'accuracy' of the evaluation 'quiz' was measured with different instruments" in text
    assert "(scorer: tiny/scorer, revision: abc123, threshold: 0.5) in 'one'" in text
    assert f"{key}: other" in text


def test_other_items_are_refused_and_the_message_says_so(write, results):
    runs = [write("one", results()), write("two", told(results(), "prose", rows="r9"))]
    with pytest.raises(RecipeError, match="'perplexity' of the evaluation 'prose' was measured on items that differ"):
        compare(runs)


def test_the_third_run_is_checked_too(write, results):
    runs = [write("one", results()), write("two", results()), write("three", told(results(), "quiz", rows="r9"))]
    with pytest.raises(RecipeError, match="between 'one' and 'three'"):
        compare(runs)


def test_an_evaluation_of_another_name_is_refused_unless_it_is_the_same(write, results):
    renamed = told(results(), "quiz", name="exam")
    assert compare([write("one", results()), write("two", renamed)])
    other = told(renamed, "exam", instrument=None)
    with pytest.raises(RecipeError, match="evaluation 'quiz' and 'exam' was measured with different instruments"):
        compare([write("three", results()), write("four", other)])


def test_what_one_run_alone_measured_is_a_dash_for_the_other(write, results):
    second = results()
    second["rows"] = [row for row in second["rows"] if row["metric"] == "accuracy"]
    # Of a metric that only one of them has, instruments are nobody's matter.
    second = told(second, "prose", metrics=[], rows="r9")
    lines = compare([write("one", results()), write("two", second)]).text().splitlines()
    assert lines[-1].split() == ["perplexity", "text", "down", "12.60", "[12.10", "13.10]", "–"]


def test_a_run_that_does_not_say_what_measured_it_is_refused(write, results):
    old = results()
    del old["evaluations"]
    with pytest.raises(RecipeError, match="'two' does not say what 'accuracy' was measured with"):
        compare([write("one", results()), write("two", old)])


def test_a_folder_without_results_and_a_single_run_are_refused(write, results, tmp_path):
    one = write("one", results())
    with pytest.raises(RecipeError, match=r"holds no results\.json"):
        compare([one, tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="give two or more"):
        compare([one])


def test_folders_of_one_name_are_told_apart_by_their_paths(write, results):
    runs = [write("a/run", results()), write("b/run", results())]
    assert [run.name for run in compare(runs).runs] == [str(run) for run in runs]


def test_the_digits_are_those_that_all_runs_together_ask_for(write, results, row):
    small = results() | {"rows": [row("merged", "Europe", "accuracy", 0.04, 0.01)]}
    line = compare([write("one", results()), write("two", small)]).text().splitlines()[1]
    assert re.split(" {2,}", line)[3:] == ["0.30 [0.20 0.40]", "0.04 [0.03 0.05]"]


def test_what_was_set_otherwise_is_said_under_the_table_and_in_json(write, results):
    settings = {"normalize": "tokens", "generation": {"samples": 1, "chat": False}}
    other = {"normalize": "characters", "generation": {"samples": 2, "chat": False}}
    runs = [
        write("one", told(results(), "quiz", settings=settings)),
        write("two", told(results(), "quiz", settings=other)),
    ]
    found = compare(runs)
    said = (
        "the evaluation 'quiz' is set otherwise in 'one' and in 'two': normalize 'tokens' and 'characters'; "
        "generation.samples 1 and 2"
    )
    assert found.text().splitlines()[-2:] == ["", f"note: {said}"]
    assert found.to_json()["notes"] == [said]


def test_the_same_settings_and_those_of_older_files_are_not_worth_a_note(write, results):
    same = told(results(), "quiz", settings={"normalize": "tokens"})
    assert compare([write("one", same), write("two", same), write("three", results())]).notes() == []


def test_numbers_that_json_has_no_word_for_are_named_in_the_comparison_too(write, results, row):
    endless = results() | {"rows": [row("merged", "text", "perplexity", float("inf"), 0.0)]}
    found = compare([write("one", endless), write("two", results())]).to_json()
    [line] = [line for line in found["rows"] if line["metric"] == "perplexity"]
    assert line["scores"][0]["value"] == "Infinity"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
