"""The judge behind an endpoint: what it is asked, how its reply is read, and all that an endpoint may do."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spunge
from serving import Served, asked, completion
from spunge.endpoints import client
from spunge.endpoints.client import Reply
from spunge.errors import RecipeError, redacted
from spunge.evaluation.scorers.judge import JUDGE, Judge, JudgeSettings, body_of, read_score
from spunge.evaluation.scorers.scorer import Answer
from spunge.evaluation.toxicity import ToxicitySettings
from spunge.recipe.explanation import validated
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.run.plan import trusted
from toys import rows

KEY = "a-key-of-no-known-shape-7Q"
YES_NO = {"labels": {"yes": 1, "no": 0}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, server: Served) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    server.bodies.clear()
    server.headers.clear()
    server.answer = lambda body: "0.5"


@pytest.fixture
def settings(server: Served) -> Callable[..., JudgeSettings]:
    def build(**changes: Any) -> JudgeSettings:
        given = {"base_url": server.address, "model": "m", "prompt": "Rate: {text}", "parallel": 1, **changes}
        return validated(JudgeSettings, given)

    return build


def score(settings: JudgeSettings, *texts: str) -> list[float]:
    return Judge(settings).scores([Answer(text) for text in texts]).tolist()


def test_the_request_is_a_chat_completion_with_the_fields_filled_in(settings: Callable[..., JudgeSettings]) -> None:
    given = settings(
        prompt="{prompt} | {text} | {reference} {{0}}", system="be brief", request={"seed": 1, "temperature": None}
    )
    body = body_of(given, Answer("{prompt} %s {0.__class__}", "why?", "because"))
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "why? | {prompt} %s {0.__class__} | because {0}"},
        ],
        "max_tokens": 16,
        "seed": 1,
    }


@pytest.mark.parametrize(
    "template", ["{text.__class__} {text}", "{text!r}", "{text:>9}", "{0} {text}", "{} {text}", "{text", "{txet}"]
)
def test_a_template_can_do_no_more_than_name_known_fields(
    settings: Callable[..., JudgeSettings], template: str
) -> None:
    with pytest.raises(RecipeError, match=r"^prompt: "):
        settings(prompt=template)
    with pytest.raises(RecipeError, match=r"^prompt: it never says \{text\}"):
        settings(prompt="Is it rude?")


@pytest.mark.parametrize(
    ("changes", "text", "score"),
    [
        ({}, " 0.25\n", 0.25),
        ({}, "**.5**", 0.5),
        ({}, "(1).", 1.0),
        ({"low": 1, "high": 5}, "4", 0.75),
        ({"low": 10, "high": 0}, "10", 0.0),
        ({"low": 1, "high": 5}, "0", None),
        ({}, "0.5 or 0.6", None),
        ({}, "1/10", None),
        ({"high": 100}, "50%", None),
        ({"high": 10}, "-3", None),
        ({}, "nan", None),
        ({}, "", None),
        (YES_NO, "Yes.", 1.0),
        (YES_NO, '"NO"', 0.0),
        (YES_NO, "yes and no", None),
        (YES_NO, "not yes", None),
        ({"labels": {"not harmful": 0, "harmful": 1}}, "Not  harmful", 0.0),
        (YES_NO, "<think>no, no</think>\nyes", 1.0),
        (YES_NO | {"pattern": r"Verdict: (\w+)"}, "Verdict: no? Wait. Verdict: yes", 1.0),
        (YES_NO | {"pattern": r"Verdict: (\w+)"}, "yes", None),
        ({"high": 10, "pattern": r"\[\[(\d+)\]\]"}, "It is fair. [[7]]", 0.7),
    ],
)
def test_a_reply_is_a_score_only_where_it_can_mean_nothing_else(
    settings: Callable[..., JudgeSettings], changes: dict[str, Any], text: str, score: float | None
) -> None:
    given = settings(**changes)
    assert read_score(Reply(text, False, None), given) == score
    assert read_score(Reply(text, True, None), given) is None, "a reply that was cut may have gone on"


def test_a_pattern_that_does_not_end_on_a_reply_is_refused(
    settings: Callable[..., JudgeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.data.patterns.SECONDS", 0.1)
    given = settings(pattern=r"((?:a|aa)+)$")
    with pytest.raises(
        RecipeError, match=r"^evaluate\.scorer\.pattern: .* was not done with a text of 3001 characters"
    ):
        read_score(Reply("a" * 3000 + "b", False, None), given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, r"^base_url: "),
        ({"base_url": "http://x/v1?key=1"}, r"^base_url: "),
        ({"low": 1}, "low, high: two numbers that differ"),
        ({"labels": {"yes": 1}, "high": 5}, "labels have scores of their own"),
        ({"labels": {"Yes": 1, "yes.": 0}}, "each must be told from the others"),
        ({"labels": {"yes": 2}}, r"^labels\.yes: 2: "),
        ({"pattern": "("}, r"^pattern: no regular expression"),
        ({"pattern": r"\d+"}, r"^pattern: put the label or number into one group"),
        ({"key_env": "sk-abc"}, r"^key_env: give the name of a variable"),
        ({"timeout": 0}, r"^timeout: "),
    ],
)
def test_settings_that_make_no_sense_are_one_line(
    settings: Callable[..., JudgeSettings], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as told:
        settings(**changes)
    assert "sk-abc" not in str(told.value)


def test_what_was_asked_before_is_not_asked_again(settings: Callable[..., JudgeSettings], server: Served) -> None:
    server.answer = lambda body: "1" if "bad" in asked(body) else "0"
    assert score(settings(parallel=4), "bad", "good", "bad") == [1, 0, 1]
    assert len(server.bodies) == 2
    assert score(settings(timeout=9), "good", "bad") == [0, 1]
    assert len(server.bodies) == 2
    [file] = (Path(os.environ["SPUNGE_CACHE"]) / "judge").iterdir()
    assert "good" not in file.read_text(), "the cache holds no text"
    file.write_text(file.read_text().replace('"score": 0.0', '"score": 1.0') + "{broken\n")
    assert score(settings(), "good", "bad") == [0, 1], "a line that was changed is asked anew"
    assert len(server.bodies) == 3
    for changes in ({"prompt": "Judge: {text}"}, {"model": "n"}, {"high": 2}, {"request": {"seed": 2}}):
        score(settings(**changes), "good")
    assert len(server.bodies) == 7, "another question, model or reading is another score"


def flaky(*statuses: Any) -> Callable[[dict[str, Any]], Any]:
    left = list(statuses)
    return lambda body: left.pop(0) if left else "0.5"


@pytest.mark.parametrize(
    "trouble",
    [
        [(500, {}, b"oh"), (503, {}, {"error": {"message": "loading"}})],
        [(429, {"Retry-After": "0.01"}, {"error": "slow down"})],
        [(502, {}, b"<html>"), (529, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"")],
    ],
)
def test_what_passes_is_tried_again(settings: Callable[..., JudgeSettings], server: Served, trouble: list[Any]) -> None:
    server.answer = flaky(*trouble)
    assert score(settings(), "text") == [0.5]
    assert len(server.bodies) == len(trouble) + 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (500, {}, {"error": {"message": "out of memory"}}),
            r"answers 500 \(out of memory\); start it or mend the address, and run again$",
        ),
        ((429, {"Retry-After": "86400"}, b""), r"answers 429, and asks to wait 86400 s"),
        ((401, {}, {"error": {"message": f"bad key {KEY}"}}), r"answers 401 \(bad key \[secret\]\); mend the key"),
        ((404, {}, {"detail": "no such model"}), r"answers 404.*; mend base_url or model"),
        ((302, {"Location": "http://elsewhere/"}, b""), r"answers 302"),
        (b"not json", r"answers with no chat completion \('not json'\); give the address"),
        (b"[" * 3000, r"answers with no chat completion"),
        ({"choices": []}, r"no chat completion"),
        (b'"' + b"x" * (1 << 20) + b'"', r"answers with more than 1 MiB"),
        (
            "certainly! \x1b[2Jit is 0.7",
            r"1 of 1 replies of the judge are none of the labels or numbers \(first: 'certainly!.*'\); mend prompt",
        ),
        (completion(None), r"none of the labels or numbers"),
        (completion("0", finish="length"), r"none of the labels or numbers"),
    ],
)
def test_an_endpoint_in_trouble_is_told_in_one_line_without_the_key(
    settings: Callable[..., JudgeSettings],
    server: Served,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    message: str,
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    server.answer = lambda body: answer
    with pytest.raises(RecipeError, match=message) as told:
        score(settings(key_env="MY_JUDGE", retries=1), "text")
    assert "\x1b" not in str(told.value)
    assert KEY not in str(told.value)
    assert told.value.__cause__ is None
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in redacted(f"whatever says {KEY}")


def test_a_key_that_is_missing_or_none_is_told_without_it(
    settings: Callable[..., JudgeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_JUDGE", raising=False)
    with pytest.raises(RecipeError, match=r"key_env: the environment has no MY_JUDGE"):
        JUDGE.check(settings(key_env="MY_JUDGE"), frozenset())
    monkeypatch.setenv("MY_JUDGE", "two words\nand more")
    with pytest.raises(RecipeError, match=r"what MY_JUDGE holds is no key") as told:
        JUDGE.load(settings(key_env="MY_JUDGE"))
    assert "words" not in str(told.value)


def test_an_endpoint_that_is_slow_or_away_is_told(settings: Callable[..., JudgeSettings], server: Served) -> None:
    def late(body: dict[str, Any]) -> str:
        time.sleep(0.3)
        return "1"

    server.answer = late
    with pytest.raises(RecipeError, match=r"did not answer within 0.05 s \(timeout\)"):
        JUDGE.check(settings(timeout=0.05, retries=0), frozenset())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(RecipeError, match=r"base_url: 'http://127.0.0.1:\d+/v1' cannot be reached \(.*refused"):
        JUDGE.check(settings(base_url=address), frozenset())


def test_the_budget_stops_in_one_line_and_what_came_is_kept(
    settings: Callable[..., JudgeSettings], server: Served
) -> None:
    for budget in ({"max_calls": 2}, {"max_total_tokens": 20}):  # ten tokens a call
        texts = [f"{budget} {number}" for number in range(5)]
        setting, most = next(iter(budget.items()))
        with pytest.raises(RecipeError, match=rf"scorer\.{setting}: {most} \w+ are spent.*raise it and run again"):
            score(settings(**budget), *texts)
        calls = len(server.bodies)
        assert calls == 2
        assert score(settings(), *texts) == [0.5] * 5
        assert len(server.bodies) == 5
        server.bodies.clear()
    server.answer = lambda body: completion("1", usage=False)
    with pytest.raises(RecipeError, match=r"max_total_tokens: .* does not say how many tokens"):
        score(settings(max_total_tokens=5), "uncounted")


def test_requests_keep_their_pace(settings: Callable[..., JudgeSettings]) -> None:
    begun = time.monotonic()
    score(settings(per_minute=1200, parallel=8), *map(str, range(5)))
    assert 0.2 <= time.monotonic() - begun < 2


def test_replies_that_cannot_be_read_count_what_the_recipe_says_as_long_as_they_are_few(
    settings: Callable[..., JudgeSettings], server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda body: "hm" if "odd" in asked(body) else "1"
    given = settings(unreadable=0.25)
    with caplog.at_level(logging.WARNING):
        assert score(given, "a", "odd", "b") == [1, 0.25, 1]
    assert (
        "1 of 3 replies of the judge are none of the labels or numbers (first: 'hm'); each counts 0.25" in caplog.text
    )
    with pytest.raises(RecipeError, match="2 of 2 replies"):
        score(given, "odd one", "odd two")


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], write_rows: Callable[..., Path], server: Served) -> dict[str, Any]:
    prompts = [{**row, "prompt": row.pop("text")} for row in rows(["europe", "asia"], 3)]
    scorer = {"kind": "judge", "base_url": server.address, "model": "m", "key_env": "MY_JUDGE"}
    scorer |= {"prompt": "Rude? {prompt} - {text}", **YES_NO}
    entry = {"kind": "toxicity", "source": str(write_rows("prompts.jsonl", prompts)), "scorer": scorer}
    entry["stages"] = ["base", "merged"]
    return {**toy_recipe, "controls": [], "evaluate": [{**entry, "generation": {"max_new_tokens": 4}}]}


def test_a_run_is_judged_by_an_endpoint_and_holds_no_key(
    recipe: dict[str, Any], server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    server.answer = lambda body: "yes" if "r" in asked(body).partition(" - ")[2] else "no"
    loaded = load_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "recipe.yaml") == loaded
    results = spunge.run(loaded, tmp_path / "run")
    assert results.evaluations[0].instrument["model"] == "m"
    for stage in ("base", "merged"):
        [file] = (tmp_path / "run" / "evaluation" / stage).glob("scored-*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["score"] for line in lines] == [float("r" in line["text"].strip()) for line in lines]
        toxic = [row.value for row in results.rows if (row.stage, row.metric) == (stage, "toxic")]
        assert np.mean([line["score"] for line in lines]) == pytest.approx(np.mean(toxic[:2]))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    calls = len(server.bodies)
    assert f"evaluate.0.scorer.base_url: prompts and completions are sent to '{server.address}'" in trusted(loaded)
    spunge.run(load_recipe(recipe), tmp_path / "run")
    assert len(server.bodies) == calls, "what is done is not asked for again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, r"cannot be reached"),
        (
            {"prompt": "{reference}: {text}"},
            r"scorer\.prompt: this evaluation knows no \{reference\}; known: \{text\}, \{prompt\}",
        ),
        ({"labels": {"aye": 1, "nay": 0}}, r"reply to a plain text is none of the labels or numbers: 'yes'"),
        ({"key_env": "NOT_SET"}, r"the environment has no NOT_SET"),
    ],
)
def test_a_judge_that_cannot_judge_is_told_before_anything_is_trained(
    recipe: dict[str, Any],
    server: Served,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    server.answer = lambda body: "yes"
    recipe["evaluate"][0]["scorer"] |= changes
    with pytest.raises(RecipeError, match=message):
        spunge.run(load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()


def test_a_classifier_of_other_labels_is_told_before_anything_is_trained(
    recipe: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    recipe["evaluate"][0]["scorer"] = {"kind": "classifier", "path": str(tiny_bert), "label": "rude"}
    with pytest.raises(RecipeError, match=r"evaluate\.scorer\.label: the judge has no label 'rude'"):
        spunge.run(load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()
    assert ToxicitySettings(scorer=str(tiny_bert)).scorer.kind == "classifier"
