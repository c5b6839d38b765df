"""Runs beside each other, where what measured them is the same."""

import json
import re
from pathlib import Path

import pytest

from spunge.errors import RecipeError
from spunge.report.compared import comparison_csv, comparison_page, comparison_text
from spunge.report.comparison import Comparison, Paired, compare
from spunge.results import Difference


@pytest.fixture
def write(tmp_path):
    """write("name", results) -> a run's folder."""

    def run(name: str, content) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        return tmp_path / name

    return run


def scores_of(found: Comparison) -> list[str]:
    """The lines of the first table."""
    return comparison_text(found).partition("\n\n")[0].splitlines()


def made(content, **more):
    """With what each model was made from and by."""
    models = []
    for stage in content["stages"]:
        kind, _, name = stage.partition(":")
        kind = kind if kind in ("base", "branch", "control", "merged") else "other"
        models.append({"stage": stage, "kind": kind, "name": name or stage, **(more if kind != "base" else {})})
    rows = [{**row, "group": "forget" if row["subject"] in ("Europe", "Asia") else "keep"} for row in content["rows"]]
    return content | {"models": models, "rows": rows}


def told(content, which, **changes):
    """With other facts about an evaluation."""
    entries = [entry | changes if entry["name"] == which else entry for entry in content["evaluations"]]
    return content | {"evaluations": entries}


def test_each_run_has_a_column_and_each_subject_a_line(write, results):
    second = results()
    for row in second["rows"]:
        if (row["stage"], row["subject"]) == ("merged", "Europe"):
            row |= {"value": 0.4, "low": 0.3, "high": 0.5}
    lines = scores_of(compare([write("one", results()), write("two", second)]))
    assert lines[0].split() == ["metric", "subject", "wanted", "base", "one", "two"]
    assert re.split(" {2,}", lines[2]) == [
        "accuracy",
        "Europe",
        "down",
        "0.90 [0.80 1.00]",
        "0.30 [0.20 0.40]",
        "0.40 [0.30 0.50]",
    ]
    assert [line.split()[1] for line in lines[2:]] == ["Europe", "Asia", "Africa", "facts", "text"]


def test_another_stage_may_be_compared(write, results):
    found = compare([write("one", results()), write("two", results())], "base").to_json()
    assert found["stage"] == "base"
    assert found["runs"] == ["one", "two"]
    assert found["rows"][0] == {
        "metric": "accuracy",
        "subject": "Europe",
        "wanted": "down",
        "base": {"value": 0.9, "low": 0.8, "high": 1.0, "n": 44},
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
    mine = {"scorer": "tiny/scorer", "revision": "abc123", "threshold": 0.5}[key]
    assert f": ({key}: {mine}) in 'one', ({key}: other) in 'two'; judge both" in text


def test_other_items_are_refused_and_the_message_says_so(write, results):
    runs = [write("one", results()), write("two", told(results(), "prose", rows="r9"))]
    with pytest.raises(RecipeError, match="'perplexity' of the evaluation 'prose' was measured on items that differ"):
        compare(runs)


def test_a_subject_of_one_name_that_holds_other_items_is_refused(write, results):
    def run(name, members, called="quiz"):
        folder = write(name, told(results(), "quiz", name=called))
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "subjects.json").write_text(json.dumps({called: {"Europe": members, name: [7]}}))
        return folder

    first, same, renamed = run("a", [0, 1]), run("b", [1, 0]), run("c", [0, 1], "questions")
    compare([first, same, renamed, write("older", results())])
    for other in (run("d", [0, 2]), run("e", [0]), run("f", [0, 2], "questions")):
        with pytest.raises(RecipeError, match=r"'Europe' of the evaluation 'quiz' holds other items in 'a' \(2\) than"):
            compare([first, other])


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
    lines = scores_of(compare([write("one", results()), write("two", second)]))
    assert re.split(" {2,}", lines[-1])[4:] == ["12.60 [12.10 13.10]", "–"]


def test_a_run_that_does_not_say_what_measured_it_is_refused(write, results):
    old = results()
    del old["evaluations"]
    with pytest.raises(RecipeError, match="'two' does not say what 'accuracy' was measured with"):
        compare([write("one", results()), write("two", old)])


def test_a_run_that_was_judged_by_nothing_is_refused(write, results):
    unjudged = results() | {"rows": []}
    with pytest.raises(RecipeError, match="'two' has no scores, for its recipe judges nothing"):
        compare([write("one", results()), write("two", unjudged)])


def test_a_folder_without_results_and_a_single_run_are_refused(write, results, tmp_path):
    one = write("one", results())
    with pytest.raises(RecipeError, match=r"holds no results\.json"):
        compare([one, tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="give two or more"):
        compare([one])


def test_a_run_s_results_file_stands_for_its_folder(write, results):
    runs = [write("one", results()), write("two", results())]
    for run, steps in zip(runs, (80, 40), strict=True):
        (run / "recipe.yaml").write_text(f"unlearn: {{steps: {steps}}}\n")
    assert compare([run / "results.json" for run in runs]).to_json() == compare(runs).to_json()


def test_a_copy_of_results_under_another_name_is_not_taken_for_those_beside_it(write, results):
    """Neither for the scores nor for what the run's folder holds by now."""
    run, before = write("one", results()), results()
    before["rows"][0]["value"] += 0.01
    (run / "before.json").write_text(json.dumps(before))
    (run / "recipe.yaml").write_text("unlearn: {steps: 80}\n")
    found = compare([run / "before.json", run])
    first, second = (each.results.rows[0].value for each in found.runs)
    assert first == pytest.approx(second + 0.01)
    assert [one.name for one in found.runs] == ["before.json", "one"]
    assert [line.values for line in found.settings] == [(None, "80")]


def test_folders_of_one_name_are_told_apart_by_their_paths(write, results):
    runs = [write("a/run", results()), write("b/run", results())]
    assert [run.name for run in compare(runs).runs] == [str(run) for run in runs]


def test_the_digits_are_those_that_all_runs_together_ask_for(write, results, row):
    small = results() | {"rows": [row("merged", "Europe", "accuracy", 0.04, 0.01)]}
    line = scores_of(compare([write("one", results()), write("two", small)]))[2]
    assert re.split(" {2,}", line)[4:] == ["0.30 [0.20 0.40]", "0.04 [0.03 0.05]"]


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
    assert f"\nnote: {said}\n" in comparison_text(found)
    assert found.to_json()["notes"][-1] == said


def test_the_same_settings_and_those_of_older_files_are_not_worth_a_note(write, results):
    same = told(results(), "quiz", settings={"normalize": "tokens"})
    notes = compare([write("one", same), write("two", same), write("three", results())]).notes()
    assert not [note for note in notes if "set otherwise" in note]


def test_numbers_that_json_has_no_word_for_are_named_in_the_comparison_too(write, results, row):
    endless = results() | {"rows": [row("merged", "text", "perplexity", float("inf"), 0.0)]}
    found = compare([write("one", endless), write("two", results())]).to_json()
    [line] = [line for line in found["rows"] if line["metric"] == "perplexity"]
    assert line["scores"][0]["value"] == "Infinity"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


ORDERS = "=HYPERLINK(1) <script>x</script> \x1b[31m\u202e"


def test_runs_of_another_base_are_refused_and_both_are_named(write, results):
    one, two = (
        made(results(), base=name, base_fingerprint=mark * 32) for name, mark in (("tiny/a", "a"), ("tiny/b", "b"))
    )
    with pytest.raises(
        RecipeError, match=r"other bases, 'one' from 'tiny/a' \(a{12}\) and 'two' from 'tiny/b' \(b{12}\)"
    ):
        compare([write("one", one), write("two", two)])


def test_one_base_under_two_names_is_one_base_and_where_it_is_not_told_that_is_said(write, results):
    one, two = (made(results(), base=name, base_fingerprint="a" * 32) for name in ("tiny/a", "copy/of/a"))
    assert compare([write("one", one), write("two", two)]).notes() == []
    [note] = compare([write("three", one), write("four", results())]).notes()
    assert note.endswith("of an older version, by: 'four'")


def test_scores_of_the_same_base_that_differ_are_noted(write, results):
    one, two = (made(results(), base="tiny/a", base_fingerprint="a" * 32) for _ in range(2))
    two["rows"] = [
        row | ({"value": 0.8} if row["stage"] == "base" and row["subject"] == "Asia" else {}) for row in two["rows"]
    ]
    [note] = compare([write("one", one), write("two", two)]).notes()
    assert "1 scores of the base differ between 'one' and 'two' (the first: accuracy on Asia)" in note


def test_each_runs_heading_says_how_its_model_was_made(write, results):
    more = {"method": "npo", "rule": "ties", "density": 0.2, "scale": 0.5}
    found = compare([write("one", made(results(), **more)), write("two", made(results(), **(more | {"scale": 2.0})))])
    assert found.headings == ["npo, ties, density 0.2, scale 0.5", "npo, ties, density 0.2, scale 2"]
    assert "npo, ties, density 0.2, scale 2" in scores_of(found)[1]
    assert "npo, ties, density 0.2, scale 2" in comparison_page(found)


def test_only_what_differs_between_the_recipes_is_listed(write, results):
    runs = [write("one", results()), write("two", results())]
    recipe = "model: {path: m}\nunlearn: {method: npo, steps: %d}\nevaluate: [%s{kind: choices, limit: %d}]\n"
    for run, values in zip(runs, [(10, "", 5), (20, "{kind: harm, limit: 9}, ", 5)], strict=True):
        (run / "recipe.yaml").write_text(recipe % values)
    found = compare(runs)
    assert [(each.name, each.values) for each in found.settings] == [
        ("unlearn.steps", ("10", "20")),
        ("evaluate.harm", (None, "given")),
    ]
    (runs[0] / "recipe.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml' cannot be read"):
        compare(runs)


def test_the_front_holds_the_models_that_no_other_one_beats(write, results):
    better, other = (made(results()) for _ in range(2))
    for row in better["rows"]:
        if row["stage"] == "merged":
            row["value"] = 0.1 if row["group"] == "forget" else 0.79
    drawn = compare([write("one", better), write("two", other)]).front()
    assert drawn is not None
    assert (drawn.forget.metric, drawn.forget.way, drawn.keep.subjects) == ("accuracy", "lower", ("Africa", "facts"))
    on = {(point.model.label, round(point.forgotten, 3), round(point.kept, 3)) for point in drawn.points if point.front}
    assert on == {("base", 0.9, 0.8), ("one", 0.1, 0.79)}
    assert len(drawn.points) == 5


def paired(found: Comparison, **bounds: float) -> Comparison:
    difference = Difference(
        stage="two", against="", subject="Asia", metric="accuracy", kind="difference", value=-0.25, n=44, **bounds
    )
    return found._replace(paired=(Paired(1, difference),))


def test_differences_paired_by_item_are_shown_everywhere_and_bold_only_where_they_are_certain(write, results):
    found = compare([write("one", results()), write("two", results())])
    assert "paired by item" not in comparison_text(found)
    for bounds, bold in (({"low": -0.4, "high": -0.1}, True), ({"low": -0.4, "high": 0.1}, False)):
        shown = paired(found, **bounds)
        assert re.search(r"accuracy +Asia +−0.25 \[−0.40 [−+]0.10\]", comparison_text(shown))
        assert ('<span class="certain">−0.25</span>' in comparison_page(shown)) is bold
        assert shown.to_json()["differences"][0]["value"] == -0.25


def test_pandas_reads_the_csv_and_no_cell_is_a_formula(write, results):
    import io

    pandas = pytest.importorskip("pandas")
    second = made(results(parts=(ORDERS, "Asia")))
    found = paired(compare([write("one", made(results())), write("=two", second)]), low=-0.4, high=-0.1)
    text = comparison_csv(found)
    table = pandas.read_csv(io.StringIO(text))
    row = table[(table.run == "'=two") & (table.subject == "Asia") & (table.metric == "accuracy")].iloc[0]
    assert (row.value, row.low, row.n, row.difference) == (0.3, pytest.approx(0.2), 44, -0.25)
    assert table[table.stage == "base"].value.max() == 12.0
    assert not re.search(r"(^|,)\"?[=+@]", text)
    assert not {"\x1b", "\u202e"} & set(text)


def test_what_stands_in_a_run_is_text_on_the_page_and_in_the_terminal(write, results):
    runs = [write(name, made(results(parts=(ORDERS, "Asia")), method=ORDERS)) for name in ("<b>one", "two")]
    (runs[0] / "recipe.yaml").write_text(f"note: {json.dumps(ORDERS)}\n")
    found = compare(runs)
    page = comparison_page(found)
    assert "<script" not in page
    assert "<b>" not in page
    assert "default-src 'none'" in page
    for shown in (page, comparison_text(found)):
        assert not {"\x1b", "\u202e"} & set(shown)
