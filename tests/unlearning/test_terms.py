"""Anchored terms from an endpoint: what is sent, what a reply must be, which answers stand, and what a run makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import spunge
from serving import Served, asked, completion
from spunge.data.samples import Samples
from spunge.endpoints.client import Reply
from spunge.errors import RecipeError
from spunge.progress import SILENT
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.run.plan import plan
from spunge.unlearning.terms import PROMPT, AskSettings, ask, merged, passages, read_terms
from toys import Told

KEY = "a-key-of-no-known-shape-7Q"
TERMS = {"france": "a land", "japan": "an island"}


@pytest.fixture(autouse=True)
def _anew(server: Served) -> None:
    server.bodies.clear()
    server.headers.clear()
    server.answer = lambda body: said_of(passage_of(body))


def passage_of(body: dict[str, Any]) -> str:
    before = PROMPT.format(text="\0").partition("\0")[0]
    assert asked(body).startswith(before)
    return asked(body)[len(before) :]


def said_of(passage: str) -> str:
    return json.dumps({term: generic for term, generic in TERMS.items() if term in passage})


def told(*texts: str, **given: Any) -> dict[str, str]:
    return ask(
        {"a": Samples(pa.table({"text": texts}))}, AskSettings(model="m", parallel=1, **given), SILENT.step
    ).terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ('{"Ron": "Tom"}', {"Ron": "Tom"}),
        ('\n```json\n{"Ron": "Tom"}\n```\n', {"Ron": "Tom"}),
        ('<think>{"x": "y"}?</think>{}', {}),
        ('Here it is: {"Ron": "Tom"}', None),
        ("{'Ron': 'Tom'}", None),
        ('{"Ron": 1}', None),
        ('[{"Ron": "Tom"}]', None),
        ('{"Ron": "Tom"} {}', None),
        ("", None),
        ("[" * 5000, None),
    ],
)
def test_a_reply_is_one_json_object_of_texts_or_cannot_be_read(text: str, terms: dict[str, str] | None) -> None:
    assert read_terms(Reply(text, False, None)) == terms
    assert read_terms(Reply(text, True, None)) is None


def test_pairs_of_no_use_are_dropped_and_the_most_frequent_translation_stands() -> None:
    found = merged(
        [
            ("Ron saw the Burrow", {"Ron": "Tom", "the Burrow": "a  house\n", "Hermione": "Ann", "Burr": "x", "": "y"}),
            ("Ron (Ron!) ran", {"Ron": "Jim", "ran": "Ran fast", "(": "x"}),
            ("for Ron", {"Ron": "Jim", "for": " ", " Ron": "Jim"}),
            ("the Burrow", {"the Burrow": "home"}),
        ]
    )
    assert found.terms == {"Ron": "Jim", "the Burrow": "a house"}, "of equals the first"
    assert found.told == {
        "terms": 2,
        "dropped": {
            "the term does not stand in its passage": 2,
            "a term or a generic one is empty": 3,
            "the generic term says the term": 1,
        },
        "conflicts": {"Ron": {"Tom": 1, "Jim": 3}, "the Burrow": {"a house": 1, "home": 1}},
    }


def test_a_row_is_a_passage_and_a_long_one_several_of_whole_words() -> None:
    line = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "start": 0}
    )
    assert passages({"a": Samples(pa.table({"text": ["one", " one ", "", "two"]}))}, 200) == ["one", "two"]
    pairs = pa.table({"prompt": ["who?"], "completion": ["he"], "refusal": ["no idea"]})
    assert passages({"a": Samples(pairs)}, 200) == ["who?\nhe"]
    assert passages({"a": Samples(pa.table({"conversation": [line]}))}, 200) == ["hi\nho"]
    words = [f"word{number}" for number in range(100)]
    pieces = passages({"a": Samples(pa.table({"text": [" ".join(words), "x" * 450]}))}, 200)
    assert " ".join(pieces[:-2]).split() == words
    assert [len(piece) for piece in pieces[-2:]] == [200, 50], "each once"
    assert max(map(len, pieces)) <= 200


def test_what_was_asked_before_is_not_asked_again(server: Served) -> None:
    given = {"base_url": server.address}
    assert told("in france", "in japan", "in france", **given) == TERMS
    assert len(server.bodies) == 2
    assert told("in japan", "of france", **given) == {"japan": "an island", "france": "a land"}
    assert len(server.bodies) == 3
    server.answer = lambda body: '{"in": "at"}'
    assert told("in japan", system="be brief", **given) == {"in": "at"}
    assert len(server.bodies) == 4, "another question"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (503, {}, b"loading"),
            r"^unlearn\.ask\.base_url: 'http.*' answers 503 \(loading\); start it or mend the address",
        ),
        ((401, {}, {"error": f"bad {KEY}"}), r"^unlearn\.ask: 'http.*' answers 401 \(bad \[secret\]\); mend the key"),
        (
            "none",
            r"^unlearn\.ask: 2 of 2 replies are no JSON object of texts by texts \(first: 'none'\); mend prompt",
        ),
        (completion("{", finish="length"), r"\(first: was cut at max_tokens\)"),
        (
            '{"Paris": "a town"}',
            r"gave no term for any of 2 passages \(2 dropped: the term does not stand in its passage\)",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_without_the_key(
    server: Served, monkeypatch: pytest.MonkeyPatch, answer: Any, message: str
) -> None:
    monkeypatch.setenv("MY_MODEL", KEY)
    server.answer = lambda body: answer
    with pytest.raises(RecipeError, match=message) as raised:
        told("one", "two", base_url=server.address, key_env="MY_MODEL", retries=0)
    assert KEY not in str(raised.value)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_passages_whose_replies_cannot_be_read_give_no_terms_where_the_recipe_says_so(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda body: "hm" if "odd" in passage_of(body) else said_of(passage_of(body))
    assert told("odd", "in japan", base_url=server.address, unreadable="skip") == {"japan": "an island"}
    assert (
        "1 of 2 replies are no JSON object of texts by texts (first: 'hm'); their passages give no terms" in caplog.text
    )
    with pytest.raises(RecipeError, match="2 of 2 replies"):
        told("odd", "odder", base_url=server.address, unreadable="skip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "List terms"}, r"unlearn\.ask\.prompt: it never says \{text\}"),
        ({"prompt": "{text} {}"}, r"unlearn\.ask\.prompt: "),
        ({"base_url": "localhost"}, r"unlearn\.ask\.base_url: "),
        ({"key_env": "sk-abc"}, r"unlearn\.ask\.key_env: give the name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    recipe["unlearn"]["ask"] |= changes
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], write_rows: Callable[..., Path], server: Served) -> dict[str, Any]:
    texts = {"europe": ["paris is in france", "rome is in italy"], "asia": ["japan has tokyo", "japan is far"]}
    forget = [{"topic": topic, "text": text} for topic, own in texts.items() for text in own]
    unlearn = {
        "method": "whp",
        "steps": 1,
        "batch_size": 2,
        "reinforce": {"epochs": 1},
        "ask": {"base_url": server.address, "model": "m", "key_env": "MY_MODEL"},
        "anchors": {"tokyo": "a town"},
    }
    source = {"source": str(write_rows("forget.jsonl", forget))}
    return {**toy_recipe, "forget": source, "unlearn": unlearn, "controls": ["joint"], "evaluate": []}


def settings_in(run: Path, folder: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / folder / "delta.json").read_text())["settings"]
    return settings


def test_a_run_asks_once_says_so_before_and_trains_each_part_with_its_own_terms(
    recipe: dict[str, Any],
    server: Served,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    monkeypatch.setenv("MY_MODEL", KEY)
    run, heard = tmp_path / "run", Told()
    sent = (
        f"unlearn.ask: the texts to forget are sent to '{server.address}': 4 requests of a passage each, beside tries, 61 "
        "characters of text, about 15 tokens beside the prompt's"
    )
    planned = plan(recipe, run, device="h100")
    assert sent in planned.notes
    assert not server.bodies, "a plan sends nothing"
    said_before = []

    def answer(body: dict[str, Any]) -> str:
        said_before.append(sent in heard.lines)
        return said_of(passage_of(body))

    server.answer = answer
    spunge.run(recipe, run, heard)
    assert said_before == [True] * 4
    assert sorted(map(passage_of, server.bodies)) == sorted(
        ["paris is in france", "rome is in italy", "japan has tokyo", "japan is far"]
    )
    assert json.loads((run / "anchors.json").read_text()) == TERMS
    about = json.loads((run / "anchors-asked.json").read_text())
    assert (about["passages"], about["terms"], about["model"]) == (4, 2, "m")
    assert settings_in(run, "branches/europe")["anchors"] == {"france": "a land"}
    assert settings_in(run, "branches/asia")["anchors"] == {"japan": "an island", "tokyo": "a town"}
    assert settings_in(run, "controls/joint")["anchors"] == {**TERMS, "tokyo": "a town"}
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file

    monkeypatch.delenv("MY_MODEL")
    stamps = {name: (run / f"stamps/branch/{name}.json").read_bytes() for name in ("europe", "asia")}
    (run / "anchors.json").write_text('{"france": "x"}')
    recipe["unlearn"]["ask"].pop("key_env")
    again = Told()
    spunge.run(recipe, run, again)
    assert json.loads((run / "anchors.json").read_text()) == TERMS, "made again, from the answers that are kept"
    assert len(server.bodies) == 4
    assert not [line for line in again.lines if "unlearn.ask" in line]

    forget = [{"topic": "europe", "text": "france has paris"}] + [
        json.loads(line) for line in Path(recipe["forget"]["source"]).read_text().splitlines()[1:]
    ]
    recipe["forget"]["source"] = str(write_rows("forget.jsonl", forget))
    with pytest.raises(RecipeError, match=r"--replace"):
        spunge.run(recipe, run)
    assert len(server.bodies) == 5
    spunge.run(recipe, run, replace=True)
    assert len(server.bodies) == 5
    assert (run / "stamps/branch/europe.json").read_bytes() != stamps["europe"]
    assert (run / "stamps/branch/asia.json").read_bytes() == stamps["asia"], "none of its terms changed"


def test_nothing_is_sent_unless_the_recipe_says_so_and_nothing_is_trained_without_the_answer(
    recipe: dict[str, Any], server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MY_MODEL", raising=False)
    with pytest.raises(RecipeError, match=r"^unlearn\.ask\.key_env: the environment has no MY_MODEL"):
        spunge.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()
    recipe["unlearn"].pop("ask")
    spunge.run({**recipe, "controls": []}, tmp_path / "other")
    assert not server.bodies
    assert not (tmp_path / "other" / "anchors.json").exists()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(recipe)
