"""The HTML page: whole, escaped, offline, and tolerant of what is missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spunge.errors import RecipeError
from spunge.report.page import page, write_page
from spunge.report.reading import shown, split_facts
from spunge.report.training import trained
from spunge.report.weights import merge_facts
from spunge.report.wording import name

MARKUP = '<script>alert("1")</script>'
LONG = "z" * 400
ARABIC, CHINESE = "مرحبا بالعالم", "日本語の値"
VOID = {"meta", "path", "line", "br"}


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_written_into_the_run_and_returned(tmp_path, write_run):
    file = write_page(write_run(tmp_path))
    assert file == tmp_path / "report.html"
    outline = Outline(file.read_text(encoding="utf-8"))
    assert outline.open == []
    for said in (
        "tiny",
        "rmu",
        "Europe",
        "Asia",
        "Africa",
        "fewer than split.min_rows",
        "density: 0.2",
        "21.3%",
        "torch 2.5",
    ):
        assert said in outline.text


def test_values_from_the_data_stay_text(tmp_path, write_run):
    html = page(
        write_run(tmp_path, parts=[MARKUP, f'" onload="x{LONG}'], kept=["<b>neighbour</b>", "</svg><img src=x>"])
    )
    outline = Outline(html)
    assert not {"script", "img", "b"} & {tag for tag, _ in outline.tags}
    assert not any(key.startswith("on") for _, attributes in outline.tags for key in attributes)
    assert MARKUP in outline.text
    assert "<b>neighbour</b>" in outline.text


def test_every_script_and_direction_is_shown_whole(tmp_path, write_run):
    text = Outline(page(write_run(tmp_path, parts=[ARABIC, CHINESE, LONG]))).text
    assert ARABIC in text
    assert CHINESE in text
    assert LONG in text  # short in charts and sentences, whole in the split


def test_characters_that_no_file_or_terminal_should_hold_are_replaced(tmp_path, write_run):
    html = write_page(write_run(tmp_path, parts=["a\x00b\x1b[31m\ud800\u202e", "c"])).read_text(encoding="utf-8")
    assert not {"\x00", "\x1b", "\u202e"} & set(html)
    assert "a\N{REPLACEMENT CHARACTER}b" in html


def test_what_the_rounding_lost_is_shown_where_the_merge_says_it(tmp_path, write_run):
    run = write_run(tmp_path)
    assert "arrives along its own direction" not in page(run)  # a merge of an earlier version does not know
    content = json.loads((run / "merge.json").read_text())
    content["written"] = {"dtype": "bfloat16", "rounding": "nearest", "lost": 0.873, "arrived": 0.311, "stayed": 0.86}
    content["notes"] = ["rounding to bfloat16 loses 87% of the change's norm"]
    for entry in content["tensors"].values():
        entry["lost"] = 0.912
    (run / "merge.json").write_text(json.dumps(content))
    text = Outline(page(run)).text
    for said in ("31.1% of the merged change arrives", "87.3% of its norm", "91.2%", "loses 87%"):
        assert said in text


def test_an_empty_value_has_a_name(tmp_path, write_run):
    assert name("") == "(empty)"
    assert "(empty)" in page(write_run(tmp_path, parts=["", "x"]))


def test_nothing_is_fetched_and_nothing_runs(tmp_path, write_run):
    outline = Outline(page(write_run(tmp_path)))
    policy = next(attributes["content"] for _, attributes in outline.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not any("src" in attributes for _, attributes in outline.tags)
    linked = {attributes["href"] for _, attributes in outline.tags if "href" in attributes}
    assert linked <= {"results.json", "recipe.yaml", "split.json", "merge.json", "merged"}  # beside the page


@pytest.mark.parametrize("file", ["recipe.yaml", "split.json", "results.json", "merge.json", "branches/p0/delta.json"])
def test_a_missing_file_leaves_its_section_out_and_the_page_whole(tmp_path, write_run, file):
    run = write_run(tmp_path)
    (run / file).unlink()
    assert Outline(page(run)).open == []


def test_an_empty_folder_gives_a_page_that_says_nothing_was_judged(tmp_path):
    assert "judged nothing" in page(tmp_path)


def test_an_unknown_metric_is_shown_like_any_other(tmp_path, write_run, row):
    run = write_run(tmp_path)
    results = json.loads((run / "results.json").read_text())
    results["rows"] += [row(stage, "Asia", "toxicity", 0.04, 0.01) for stage in ("base", "merged")]
    (run / "results.json").write_text(json.dumps(results))
    text = Outline(page(run)).text
    assert "toxicity" in text
    assert "0.040" in text


def test_a_recipe_that_is_no_yaml_is_shown_as_it_is(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("a: [</pre>")
    assert "a: [&lt;/pre&gt;" in page(tmp_path)


def test_the_training_table_tells_rows_steps_losses_and_size(tmp_path, write_run):
    text = Outline(page(write_run(tmp_path))).text
    for said in ("forget 1.25, retain 0.5000", "23.4 s", "2.0 KiB", "48 entries", "coefficient 51.50", "of 2 parts"):
        assert said in text


def put(run: Path, content) -> str:
    (run / "results.json").write_text(json.dumps(content))
    return page(run)


def test_what_attacks_measured_has_a_section_of_its_own(tmp_path, write_run, attacked):
    run = write_run(tmp_path)
    assert "Audits" not in page(run)
    html = put(run, attacked())
    headings = re.findall(r"<h2>(?:<bdi>)?([^<]*)", html)
    assert headings[:5] == ["Forgetting against utility", "accuracy", "perplexity", "Audits", "Spillover"]
    text = Outline(html).text
    assert "accuracy after relearning N steps" in text
    assert "60% [40% 80%]" in text
    assert "What attacks bring back" in text


def test_an_attack_that_is_no_curve_is_charted_like_any_metric(tmp_path, write_run, attacked):
    text = Outline(put(write_run(tmp_path), attacked(steps=(5,)))).text
    assert "accuracy after relearning 5 steps by subject and stage" in text


def test_spillover_is_bold_only_where_it_is_certain(tmp_path, write_run, results, pair):
    found = results()
    for row in found["rows"]:
        if (row["stage"], row["subject"]) == ("branch:p0", "Asia"):
            row["value"] = 0.88
    html = put(write_run(tmp_path), pair(found))
    cells = re.findall(r'<td class="change (\w+) (\w+)" title="[^"]*"><span class="value">([^<]*)', html)
    assert cells.count(("spill", "uncertain", "−0.02")) == 1
    assert cells.count(("spill", "certain", "−0.60")) == 1
    assert cells.count(("own", "certain", "−0.60")) == 2


def test_the_change_against_the_base_is_the_paired_one_and_bold_where_certain(tmp_path, write_run, results):
    html = put(write_run(tmp_path), results())
    assert '<span class="certain">−0.60</span><span class="interval">[−0.70 −0.50]</span>' in html
    assert '<td>−0.05<span class="interval">[−0.15 +0.05]</span>' in html


def test_what_it_was_measured_with_is_told(tmp_path, write_run, results):
    text = Outline(put(write_run(tmp_path), results())).text
    assert "scorer: tiny/scorer, revision: abc123, threshold: 0.5" in text


def test_the_papers_figures_and_over_forgetting_and_seeds_are_told(tmp_path, write_run, results):
    found = results() | {"seeds": 3}
    row = next(row for row in found["rows"] if row["stage"] == "merged")
    row |= {"below_chance": True, "chance": 0.25, "spread": 0.04}
    entry = {"stage": "merged", "subject": "Europe", "metric": "accuracy", "value": 0.254, "source": f"T {MARKUP}"}
    html = put(write_run(tmp_path), found | {"published": [entry]})
    text = Outline(html).text
    for said in ("Beside the paper", "0.254", f"T {MARKUP}", "below chance", "±0.04", "means over 3 seeds"):
        assert said in text
    assert "the dashed line is chance, 0.25" in text
    assert 'class="chance"' in html


def test_results_of_an_older_version_still_make_a_page(tmp_path, write_run, results):
    found = {key: value for key, value in results().items() if key in ("schema", "parts", "stages", "rows")}
    outline = Outline(put(write_run(tmp_path), found))
    assert outline.open == []
    assert "no change is claimed" in outline.text


def test_what_an_earlier_recipe_left_is_passed_over(tmp_path, write_run):
    run = write_run(tmp_path)
    shutil.copytree(run / "branches" / "p0", run / "branches" / "old-part")
    (run / "controls" / "joint").rename(run / "controls" / "sequential")
    (run / "recipe.yaml").write_text("controls:\n- {name: joint, train: joint}\n")
    text = Outline(page(run)).text
    assert "old-part" not in text
    assert "sequential" not in text


def test_each_training_of_a_control_has_its_line(tmp_path, write_run):
    run = write_run(tmp_path)
    shutil.copytree(run / "controls" / "joint", run / "controls" / "random" / "random-1")
    assert "random/random-1" in Outline(page(run)).text


FILES = ["results.json", "split.json", "merge.json", "branches/p0/delta.json", "controls/joint/delta.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["half", "nothing", "a list", "null", "no UTF-8", "a folder"])
def test_a_damaged_file_is_told_in_one_line_and_not_left_out(tmp_path, write_run, file, damage):
    place = write_run(tmp_path) / file
    whole = place.read_bytes()
    place.unlink()
    if damage == "a folder":
        place.mkdir()
    else:
        wrong = {"half": whole[: len(whole) // 2], "a list": b"[]", "null": b"null", "no UTF-8": b"\xff\xfe{}"}
        place.write_bytes(wrong.get(damage, b""))
    with pytest.raises(RecipeError) as error:
        page(tmp_path)
    assert repr(str(place)) in str(error.value)
    assert ("cannot be read" if damage == "a folder" else "is damaged") in str(error.value)


@pytest.mark.parametrize("file", FILES[1:4])
def test_any_value_of_another_kind_is_shown_or_told_in_one_line(tmp_path, write_run, file):
    """Of every value in turn, and never another error. (Of results.json: tests/test_results.py.)"""
    run = write_run(tmp_path)
    content = json.loads((run / file).read_text())
    told = 0
    for place in places(content):
        for wrong in ("x", 3, True, None, {}, [], [[]], [{}], {"x": 1}):
            (run / file).write_text(json.dumps(with_other(content, place, wrong)))
            try:
                shown(run / "split.json", split_facts, None)
                shown(run / "merge.json", merge_facts, None)
                trained(run / "branches", {"p0": "Europe"})
            except RecipeError as error:
                told += file.split("/")[-1] in str(error)
    assert told > 20


def places(value, place=()):
    """Every place in a JSON value, of lists the first alone; without the value itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def with_other(content, place, wrong):
    """A copy with another value in a place."""
    found = json.loads(json.dumps(content))
    target = found
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = wrong
    return found


@pytest.mark.parametrize(
    ("attribute", "shown"),
    [
        ("group", "group"),
        ('"group"', "group"),
        ('"target group"', "target group"),
        ('"a ""b"""', 'a "b"'),
        ('"a" || "b"', '"a" || "b"'),
        ('"', '"'),
        ('""', '""'),
        ("upper(topic)", "upper(topic)"),
    ],
)
def test_a_column_that_sql_has_in_quotes_is_shown_as_people_call_it(tmp_path, write_run, attribute, shown):
    run = write_run(tmp_path)
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"attribute": attribute}))
    assert f"2 parts by {shown}; merged" in Outline(page(run)).text


def test_what_the_split_says_of_rows_is_shown(tmp_path, write_run):
    run = write_run(tmp_path)
    split = json.loads((run / "split.json").read_text())
    split["parts"][0]["empty"] = 6
    (run / "split.json").write_text(json.dumps(split | {"notes": ["'a' and ' a' differ in a space alone"]}))
    text = Outline(page(run)).text
    assert "130 rows read, 3 left out by where, 7 in no part." in text
    assert "506 of them empty" in text
    assert "'a' and ' a' differ in a space alone" in text
