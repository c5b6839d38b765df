"""results.json: what is written is valid and read back as it was; older files are read; anything else is told as that."""

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spunge
from spunge.errors import RecipeError
from spunge.results import (
    Difference,
    Evaluation,
    Model,
    Part,
    Published,
    Recovered,
    Results,
    Row,
    parse_results,
    read_results,
    write_results,
)
from toys import ROOT

VALID = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "results.schema.json").read_text()))
TEXTS = st.text(max_size=8)
REALS = st.floats()
MAYBE = st.none() | REALS
COUNTS = st.none() | st.integers(0, 10**6)
MODELS = (
    Model(stage="base", kind="base", name="base"),
    Model(stage="branch:p", kind="branch", name="p: \x1b"),
    Model(
        stage="merged",
        kind="merged",
        name="merged",
        base="org/model",
        base_fingerprint="f" * 64,
        train="parts",
        parts=("p",),
        method="npo",
        settings={"beta": 0.1, "trainable": {"kind": "lora"}},
        rule="ties",
        density=0.2,
        scale=1.0,
        merge={"dtype": "base"},
        seeds=(0, 1),
    ),
)
ROWS = st.builds(
    Row,
    stage=st.sampled_from([model.stage for model in MODELS]),
    subject=TEXTS,
    metric=TEXTS,
    value=REALS,
    low=MAYBE,
    high=MAYBE,
    n=COUNTS,
    wanted=st.sampled_from([None, "up", "down"]),
    chance=MAYBE,
    below_chance=st.none() | st.booleans(),
    spread=MAYBE,
    of=st.none() | TEXTS,
    side=st.booleans(),
    evaluation=st.none() | TEXTS,
    group=st.sampled_from(["forget", "together", "keep", "worst"]),
    worst_of=st.none() | TEXTS,
    attack=st.none() | TEXTS,
    label=st.none() | TEXTS,
    curve=st.none() | TEXTS,
    at=MAYBE,
    unit=st.none() | TEXTS,
)
INSTRUMENTS = st.none() | st.dictionaries(
    TEXTS, TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)


def whole(rows: list[Row], number: float = 0.5, instrument: Any = None) -> Results:
    """Results with something everywhere."""
    place: dict[str, Any] = {"stage": "merged", "subject": "p", "metric": "m", "value": number}
    bounds: dict[str, Any] = {"low": number, "high": number, "n": 3}
    return Results(
        spunge="0",
        parts=(Part(value="p", slug="p"),),
        stages=tuple(model.stage for model in MODELS),
        models=MODELS,
        versions={"python": "3"},
        seconds=number,
        peak_memory=2**40,
        rows=tuple({(row.stage, row.subject, row.metric): row for row in rows}.values()),
        differences=(Difference(against="base", kind="ratio", wanted="up", **place, **bounds),),
        recovered=(Recovered(of="m", **place, **bounds),),
        evaluations=(
            Evaluation(name="e", kind="k", metrics=("m",), rows="r", settings=instrument, instrument=instrument),
        ),
        published=(Published(source="A paper", **place),),
    )


ONE = Row(stage="merged", subject="p", metric="m", value=0.5, low=0.4, high=0.6, n=4, wanted="down", group="forget")


def test_the_example_with_pandas_stacks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in docs/results-json.md; two runs that differ in their merge."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "results-json.md").read_text(encoding="utf-8"), re.DOTALL
    )
    [example] = [block for block in blocks if "pandas" in block]
    for name, rule, scale in (("ties", "ties", 2.0), ("average", "average", 1.0)):
        models = (
            MODELS[0],
            replace(MODELS[2], method="rmu", settings={"layer": 7}, rule=rule, scale=scale, seeds=(0, 1)),
        )
        rows = (replace(ONE, value=scale / 4), replace(ONE, subject="other", group="keep"))
        write_results(Results(rows=rows, models=models, stages=("base", "merged"), folder=tmp_path / "runs" / name))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"spunge": spunge}
    *lines, last = example.strip().splitlines()
    exec("\n".join(lines), names)
    assert (len(names["runs"]), set(names["runs"].method)) == (4, {"rmu"})
    shown = eval(last, names)
    assert shown.to_dict() == {("average", 1.0): {("m", "p"): 0.25}, ("ties", 2.0): {("m", "p"): 0.5}}


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROWS, max_size=4), number=REALS, instrument=INSTRUMENTS)
def test_what_is_written_is_valid_and_read_back_as_it_was(rows: list[Row], number: float, instrument: Any) -> None:
    results = whole(rows, number, instrument)
    text = json.dumps(results.content, allow_nan=False)
    VALID.validate(json.loads(text))
    again = parse_results(json.loads(text))
    assert repr(again) == repr(results)  # of numbers that are not even equal to themselves


def test_a_file_is_written_into_the_runs_folder_and_read_from_there_or_by_its_own_name(tmp_path: Path) -> None:
    content = whole([ONE]).content
    write_results(Results(**{**vars(whole([ONE])), "folder": tmp_path}))
    assert json.loads((tmp_path / "results.json").read_text()) == content
    for place in (tmp_path, str(tmp_path), tmp_path / "results.json"):
        results = read_results(place)
        assert (results.folder, results.content) == (tmp_path, content)
    assert results.value("merged", "p", "m") == 0.5
    with pytest.raises(KeyError):
        results.value("base", "p", "m")


def test_what_is_not_known_of_a_row_is_left_out_and_no_number_of_json_is_made_up() -> None:
    [row] = whole(
        [
            Row(
                stage="base",
                subject="s",
                metric="m",
                value=math.nan,
                high=math.inf,
                group="keep",
            )
        ]
    ).content["rows"]
    assert row == {
        "stage": "base",
        "subject": "s",
        "metric": "m",
        "value": "NaN",
        "high": "Infinity",
        "group": "keep",
    }


# ---- what is no results file


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


CONTENT = whole([ONE]).content
# The same as an older version wrote it.
OLDER = {key: value for key, value in CONTENT.items() if key != "models"}
OLDER = {**OLDER, "rows": [{key: value for key, value in row.items() if key != "group"} for row in CONTENT["rows"]]}
WRONG: list[Any] = ["x", 3, True, -0.5, {}, [], {"x": 1}, ["x"], [[]], [{}], 10**400]


def told_or_read(content: Any) -> tuple[str, dict[str, Any]]:
    try:
        return "", parse_results(content, "RUN/results.json").content
    except RecipeError as error:
        return str(error), {}


@pytest.mark.parametrize("content", [CONTENT, OLDER], ids=["today's", "older"])
def test_a_value_of_another_kind_anywhere_is_told_with_the_files_name_or_means_the_same(content: Any) -> None:
    """Of every value in turn: never another error, and never results that hold something else than the file."""
    told = 0
    for place in places(content):
        for wrong in WRONG:
            damaged = copy.deepcopy({"it": content})
            target: Any = damaged
            for key in ("it", *place)[:-1]:
                target = target[key]
            target[("it", *place)[-1]] = copy.deepcopy(wrong)
            said, kept = told_or_read(damaged["it"])
            told += bool(said)
            assert not said or ("'RUN/results.json'" in said and "\n" not in said)
            for key, value in damaged["it"].items() if kept else ():
                assert kept[key] == value or (content is OLDER and key in ("rows", "stages")), (place, wrong)
    assert told > 300


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "it is not JSON"),
        (lambda text: b"", "it is not JSON"),
        (lambda text: b"\xff\xfe{}", "it is not JSON"),
        (lambda text: text[:-40] + b"\x00" * 40, "it is not JSON"),
        (lambda text: b"[" * 10**5, "it is not JSON"),
        (lambda text: b"null", "it has no rows"),
        (lambda text: b"[]", "it has no rows"),
        (lambda text: b"{}", "it has no rows"),
        (lambda text: text.replace(b'"value": 0.5', b'"value": "0.5"', 1), "rows.0.value: '0.5' is no number"),
        (
            lambda text: text.replace(b'"wanted": "down"', b'"wanted": "sideways"', 1),
            "rows.0.wanted",
        ),
        (lambda text: text.replace(b'"subject": "p",', b"", 1), "rows.0.subject: missing"),
        (lambda text: text.replace(b'"forget"', b'"forgotten"', 1), "rows.0.group"),
        (
            lambda text: text.replace(b'"merged",\n      "subject"', b'"m",\n "subject"'),
            "rows.0: 'm' is none of its models",
        ),
        (lambda text: text.replace(b'"stage": "base"', b'"stage": "bass"'), "stages and models name different ones"),
        (lambda text: text.replace(b'"schema": 1', b'"schema": 2'), "has schema 2"),
    ],
)
def test_a_damaged_file_is_called_that_in_one_line_with_its_name(tmp_path: Path, damage: Any, said: str) -> None:
    write_results(Results(**{**vars(whole([ONE])), "folder": tmp_path}))
    file = tmp_path / "results.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RecipeError) as error:
        read_results(tmp_path)
    assert said in str(error.value)
    assert repr(str(file)) in str(error.value)
    assert "damaged" in str(error.value) or "schema" in said
    assert "holds no results" not in str(error.value)


def test_every_cut_of_a_file_is_damage(tmp_path: Path) -> None:
    write_results(Results(**{**vars(whole([ONE])), "folder": tmp_path}))
    file = tmp_path / "results.json"
    text = file.read_bytes()
    for length in range(0, len(text) - 1, 7):
        file.write_bytes(text[:length])
        with pytest.raises(RecipeError, match="is damaged: it is not JSON"):
            read_results(tmp_path)


def test_a_missing_file_is_missing_and_a_folder_in_its_place_cannot_be_read(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RecipeError, match=r"holds no results\.json; give the folder of a finished run"):
            read_results(place)
    (tmp_path / "results.json").mkdir()
    with pytest.raises(RecipeError, match=r"results\.json' cannot be read"):
        read_results(tmp_path)


def test_a_score_that_stands_there_twice_is_damage() -> None:
    content = whole([ONE]).content
    content["rows"] *= 2
    with pytest.raises(RecipeError, match=r"rows\.1: 'm' on 'p' at 'merged' again"):
        parse_results(content)


# ---- files of older versions


def old_row(stage: str, subject: str, metric: str, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "subject": subject, "metric": metric, "value": 0.5, "higher_is_better": True, **more}


def test_rows_alone_suffice_and_stages_are_told_by_their_names() -> None:
    rows = [old_row(stage, "x", "m") for stage in ("base", "branch:a", "control:joint", "merged", "mine", "control:")]
    results = parse_results({"rows": rows})
    assert results.stages == ("base", "branch:a", "control:joint", "merged", "mine", "control:")
    kinds = [(model.kind, model.name) for model in results.models]
    assert kinds == [
        ("base", "base"),
        ("branch", "a"),
        ("control", "joint"),
        ("merged", "merged"),
        ("other", "mine"),
        ("other", "control:"),
    ]
    assert {row.group for row in results.rows} == {"keep"}


def groups_of(content: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {row.subject: (row.group, row.worst_of) for row in parse_results(content).rows}


def test_subjects_of_an_older_file_are_grouped_by_parts_and_names() -> None:
    parts = [{"value": "Europe", "slug": "europe"}, {"value": "Asia", "slug": "asia"}]
    subjects = ("all", "Europe", "worst", "Africa", "everything", "worst of everything", "worst of times")
    rows = [old_row("merged", subject, "m") for subject in subjects]
    entry = {"name": "e", "kind": "k", "metrics": ["m"], "rows": "r", "instrument": None, "overall": "everything"}
    content = {"attribute": "continent", "parts": parts, "stages": ["merged"], "rows": rows, "evaluations": [entry]}
    assert groups_of(content) == {
        "all": ("together", None),
        "Europe": ("forget", None),
        "worst": ("worst", "all"),
        "Africa": ("keep", None),
        "everything": ("together", None),
        "worst of everything": ("worst", "everything"),
        "worst of times": ("keep", None),
    }
    whole_run = {"attribute": None, "parts": [{"value": "all", "slug": "all"}], "rows": rows[:1] + rows[3:4]}
    assert groups_of(whole_run) == {"all": ("together", None), "Africa": ("keep", None)}


def test_metrics_of_an_older_file_are_a_curve_where_one_number_alone_differs() -> None:
    names = [f"m after relearning on 8 rows, {steps} steps" for steps in (0, 2.5, 40)]
    names += [
        "m at 4 bits, 1 steps",
        "m at 8 bits, 2 steps",
        "m of a probe, block 3",
        "m of a probe, block 5",
        "m alone 1",
    ]
    results = parse_results({"rows": [old_row("base", "x", name, of="m") for name in names]})
    relearned = "m after relearning on 8 rows, N steps"
    assert [(row.curve, row.at, row.unit) for row in results.rows] == [
        (relearned, 0.0, "steps"),
        (relearned, 2.5, "steps"),
        (relearned, 40.0, "steps"),
        (None, None, None),
        (None, None, None),
        ("m of a probe, block N", 3.0, None),
        ("m of a probe, block N", 5.0, None),
        (None, None, None),
    ]
    plain = parse_results({"rows": [old_row("base", "x", name) for name in names]})
    assert {row.curve for row in plain.rows} == {None}


@pytest.mark.parametrize(
    ("metric", "better", "expected"),
    [
        # On what is to be forgotten and on what is to be kept; then all rows together.
        ("accuracy", True, ("down", "up", None)),
        ("perplexity", False, ("up", "down", None)),
        ("word_perplexity", False, ("up", "down", None)),
        ("toxic", False, ("down", "down", "down")),
        ("completion perplexity", False, ("down", "down", "down")),
    ],
)
def test_a_file_that_knew_no_direction_by_rows_has_the_way_that_is_good_on_each_group(
    metric: str, better: bool, expected: tuple[str | None, ...]
) -> None:
    facts = {"metric": metric, "higher_is_better": better}
    attacked = {"metric": "under attack", "of": metric, "higher_is_better": better}
    groups = {"part": "forget", "other": "keep", "all": "together"}
    rows = [
        old_row("merged", subject, **each, group=group)
        for subject, group in groups.items()
        for each in (facts, attacked)
    ]
    models = [{"stage": "merged", "kind": "merged", "name": "merged"}]
    found = parse_results({"rows": rows, "models": models, "stages": ["merged"]}).rows
    assert [row.wanted for row in found if row.of is None] == list(expected)
    assert [row.wanted for row in found if row.of] == list(expected)


def test_a_direction_that_is_none_is_told_in_an_older_file_too() -> None:
    with pytest.raises(RecipeError, match=r"rows\.0\.wanted"):
        parse_results({"rows": [old_row("base", "x", "m", higher_is_better=1)]})


def test_numbers_that_older_files_hold_as_bare_words_are_read(tmp_path: Path) -> None:
    text = json.dumps({"rows": [old_row("base", "x", "m", low=-math.inf, high=math.nan)]})
    assert "-Infinity" in text
    (tmp_path / "results.json").write_text(text)
    [row] = read_results(tmp_path).rows
    assert row.low == -math.inf
    assert row.high is not None
    assert math.isnan(row.high)
    [null] = parse_results({"rows": [old_row("base", "x", "m") | {"value": None}]}).rows
    assert math.isnan(null.value)
