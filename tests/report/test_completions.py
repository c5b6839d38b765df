"""What the models wrote stands in the page side by side, as text, as far as it is kept, and the page stays small."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.report.completions import completions
from spunge.report.page import page
from spunge.results import Evaluation, Model, Results

STAGES = ("base", "control:joint", "merged")
MODELS = tuple(
    Model(stage=stage, kind=kind, name=name, train=train)  # type: ignore[arg-type]
    for stage, kind, name, train in (
        ("base", "base", "base", None),
        ("branch:a", "branch", "a", "parts"),
        ("control:random", "control", "random", "random"),
        ("control:joint", "control", "joint", "joint"),
        ("merged", "merged", "merged", "parts"),
    )
)
Write = Callable[..., Results]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write({stage: [texts of each prompt]}, ...) -> results of a run in tmp_path that judged `says` on them."""

    def write(
        texts: dict[str, list[list[str]]],
        prompts: list[str],
        scores: dict[str, list[float]] | None = None,
        subjects: dict[str, list[int]] | None = None,
        name: str = "says",
    ) -> Results:
        for stage, of_prompts in texts.items():
            folder = tmp_path / "evaluation" / stage.replace(":", "-")
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps({"row": row, "prompt": prompts[row], "texts": each}) + "\n"
                for row, each in enumerate(of_prompts)
            ]
            (folder / "texts-0123456789abcdef.jsonl").write_text("".join(lines))
            values = (scores or {}).get(stage, [0.0] * len(prompts))
            measure = {"metric": "match", "numerator": values, "denominator": [1.0] * len(prompts), "higher": "bad"}
            stored = {
                "stage": stage,
                "evaluation": name,
                "measures": [measure],
                "text_files": ["texts-0123456789abcdef.jsonl"],
            }
            (folder / f"{name:0>12}.json").write_text(json.dumps(stored))
        known: dict[str, Any] = {name: subjects or {"all": list(range(len(prompts)))}}
        (tmp_path / "evaluation" / "subjects.json").write_text(json.dumps(known))
        evaluation = Evaluation(
            name=name, kind="match", metrics=("match",), rows="0" * 12, instrument=None, settings={"generation": {}}
        )
        return Results(models=MODELS, stages=tuple(model.stage for model in MODELS), rows=(), evaluations=(evaluation,))

    return write


def test_base_joint_and_merged_stand_beside_each_other_with_prompt_and_scores(tmp_path: Path, write: Write) -> None:
    texts = {stage: [[f"{stage} one"], [f"{stage} two"]] for stage in (*STAGES, "control:random", "branch:a")}
    results = write(texts, ["first", "second"], {"base": [1.0, 0.0]}, {"x": [0], "y": [1], "all": [0, 1]})
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert [model.stage for model in told.models] == list(STAGES)
    assert told.groups == ("x", "y")
    first = told.answered[0]
    assert (first.prompt, first.subjects, first.most) == ("first", "x", True)
    assert [side.texts[0].text for side in first.sides if side] == ["base one", "control:joint one", "merged one"]
    assert [side.scores for side in first.sides if side] == [
        (("says", "match", value),) for value in ("1.00", "0.00", "0.00")
    ]


def test_changed_most_is_by_scores_first_and_then_by_words(tmp_path: Path, write: Write) -> None:
    base = [["a b c"]] * 4
    merged = [["a b c"], ["a b d"], ["x y z"], ["a b c"]]
    results = write({"base": base, "merged": merged}, ["same", "near", "far", "scored"], {"base": [0.0, 0.0, 0.0, 1.0]})
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert [line.prompt for line in told.answered] == ["scored", "far", "near", "same"]
    assert [line.most for line in told.answered] == [True, True, True, False]


def test_texts_that_were_kept_without_prompts_stand_beside_those_of_the_same_row(tmp_path: Path, write: Write) -> None:
    results = write({"base": [["before"]], "merged": [["after"]]}, ["asked"])
    file = tmp_path / "evaluation" / "base" / "texts-0123456789abcdef.jsonl"
    file.write_text(json.dumps({"row": 0, "texts": ["before"]}) + "\n")
    told = completions(tmp_path, results, "all")
    assert told is not None
    [line] = told.answered
    assert [side and side.texts[0].text for side in line.sides] == ["before", None, "after"]
    assert line.prompt == "asked"


ODD = (None, True, -1, 5, 10**400, "x", "\ud800", [], [None], {}, {"a": 1})


def changed(value: Any) -> Iterator[Any]:
    """JSON with each of its values in turn replaced by each odd one."""
    yield from ODD
    if isinstance(value, dict):
        yield from ({**value, key: other} for key, inner in value.items() for other in changed(inner))
        yield from ({other: value[other] for other in value if other != key} for key in value)
    elif isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in changed(value[0]))


def shown_or_refused(run: Path, results: Results) -> str:
    try:
        return str(completions(run, results, "all"))
    except RecipeError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", [f"{'says':0>12}.json", "texts-0123456789abcdef.jsonl", "scored-x.jsonl"])
def test_a_damaged_file_is_told_by_its_name_or_left_out(tmp_path: Path, write: Write, name: str) -> None:
    results = write({"base": [["before"], ["b"]], "merged": [["after"], ["a"]]}, ["asked", "told"])
    file, judging = (tmp_path / "evaluation" / "base" / each for each in (name, f"{'says':0>12}.json"))
    stored = json.loads(judging.read_text())
    judging.write_text(json.dumps({**stored, "text_files": [*stored["text_files"], "scored-x.jsonl"]}))
    (file.parent / "scored-x.jsonl").write_text(json.dumps({"row": 0, "text": "before", "score": 0.5}) + "\n")
    first, *others = file.read_text().split("\n")
    for odd in changed(json.loads(first)):
        file.write_text("\n".join([json.dumps(odd), *others]))
        said = shown_or_refused(tmp_path, results)
        assert said.encode()
        assert not said.startswith("refused") or file.name in said


def test_a_row_that_is_none_gets_no_other_rows_scores(tmp_path: Path, write: Write) -> None:
    results = write({"base": [["before"]], "merged": [["after"]]}, ["asked"], {"base": [1.0]})
    file = tmp_path / "evaluation" / "base" / "texts-0123456789abcdef.jsonl"
    file.write_text(json.dumps({"row": -1, "prompt": "asked", "texts": ["before"]}) + "\n")
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert [line.row for line in told.answered] == [0]


def test_a_run_of_before_that_says_no_subjects_is_shown_without_groups(tmp_path: Path, write: Write) -> None:
    results = write({"base": [["before"]], "merged": [["after"]]}, ["asked"])
    (tmp_path / "evaluation" / "subjects.json").unlink()
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert [(line.prompt, line.subjects) for line in told.answered] == [("asked", "")]


def tell_of_texts(run: Path) -> None:
    """Its results name an evaluation that generates."""
    content = json.loads((run / "results.json").read_text())
    content["evaluations"].append(
        {
            "name": "says",
            "kind": "match",
            "metrics": ["match"],
            "rows": "0",
            "instrument": None,
            "settings": {"generation": {}},
        }
    )
    (run / "results.json").write_text(json.dumps(content))


@pytest.mark.parametrize("keep", ["all", "none"])
def test_none_are_shown_where_none_are_to_be_kept_and_that_is_said(
    tmp_path: Path, write: Write, write_run: Callable[..., Path], keep: str
) -> None:
    run = write_run(tmp_path)
    write({"base": [["unmistakable"]], "merged": [["other"]]}, ["asked"])
    tell_of_texts(run)
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write(f"\nkeep_texts: {keep}\n")
    html = page(run)
    assert ("unmistakable" in html) == (keep == "all")
    assert ("No texts are kept" in html) == (keep == "none")


def test_the_page_stays_below_three_megabytes_and_says_how_many_of_how_many(
    tmp_path: Path, write: Write, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path)
    count = 160
    prompts = [f"prompt {row} " + "<&" * 2000 for row in range(count)]
    texts = {stage: [[f"{row} {stage} " + "<&" * 4000] * 5 for row in range(count)] for stage in STAGES}
    write(texts, prompts, subjects={f"group {at}": list(range(at, count, 40)) for at in range(40)})
    tell_of_texts(run)
    html = page(run)
    assert len(html.encode()) < 3_000_000
    assert f" of {count} prompts that are kept" in html
    assert len(re.findall(r'class="answer[^"]* most', html)) > 10
    assert len(re.findall(r'class="answer[^"]* drawn', html)) > 10


@pytest.mark.parametrize("content", ["", "{", '{"row": 0}', '{"row": 0, "prompt": 1, "texts": []}', "[]", "\x00"])
def test_a_damaged_line_of_texts_is_passed_over(tmp_path: Path, write: Write, content: str) -> None:
    results = write({"base": [["kept"]], "merged": [["kept too"]]}, ["asked"])
    file = tmp_path / "evaluation" / "merged" / "texts-0123456789abcdef.jsonl"
    file.write_text(f"{content}\n")
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert [side and side.texts[0].text for side in told.answered[0].sides] == ["kept", None, None]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "texts-../x.jsonl"])
def test_a_file_that_leads_out_of_the_run_is_not_read(tmp_path: Path, write: Write, name: str) -> None:
    results = write({"base": [["kept"]], "merged": [["kept"]]}, ["asked"])
    (tmp_path / "secret").write_text('{"row": 0, "prompt": "secret", "texts": ["secret"]}\n')
    file = tmp_path / "evaluation" / "base" / f"{'says':0>12}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_files": [name]}))
    told = completions(tmp_path, results, "all")
    assert told is not None
    assert told.answered[0].sides[0] is None
