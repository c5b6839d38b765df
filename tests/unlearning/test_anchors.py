"""whp's anchored terms: the translation by hand, and the tokens that are learned beside transformers' own logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.registry import METHODS
from spunge.unlearning import whp
from spunge.unlearning.anchors import read_anchors, terms_of, translated
from spunge.unlearning.method import Task
from spunge.unlearning.whp import WHPSettings, generic

ANCHORS = {"old city": "moon", "dog": "new moon"}


class Words:
    """A tokenizer of words, for tests by hand: a space belongs to the word behind it."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        pieces = text.replace(" ", "| ").replace("(", "|(|").replace("'s", "|'s").replace("ald", "|ald").split("|")
        return {"input_ids": [self.known.setdefault(each, len(self.known)) for each in pieces if each]}

    def decode(self, ids: list[int], **_options: Any) -> str:
        names = list(self.known)
        return "".join(names[each] for each in ids)


@pytest.mark.formula("whp")
def test_a_text_is_translated_term_by_term_and_each_place_knows_what_foretells_it() -> None:
    tokenizer = Words()
    ids = tokenizer("Ron saw the old city and Ronald of Ron's old city")["input_ids"]
    found = translated(ids, terms_of({"Ron": "Tom", "old city": "big new town"}, tokenizer), tokenizer)
    assert tokenizer.decode(found.ids) == "Tom saw the big new town and Ronald of Tom's big new town"
    # Ron| saw| the| old| city| and| Ron|ald| of| Ron|'s| old| city, and Tom| saw| the| big| new| town| and| Ron|ald| of| Tom|'s ..
    assert [place.at for place in found.places] == [None, 0, 1, 2, None, 5, 6, 7, 8, None, 10, None, None]
    spoken = [{tokenizer.decode([token]).strip() for token in place.spoken} for place in found.places]
    assert spoken == [set()] + [{"Tom"}] * 4 + [{"Tom", "big"}] * 8
    assert found.terms == {"Ron", "old city"}


def test_a_generic_term_that_was_spoken_loses_its_logits() -> None:
    base, copy = torch.tensor([[3.0, 2.5, 0.0]] * 2), torch.tensor([[3.0, 2.5, 9.0]] * 2)
    assert generic(base, copy, 5.0).tolist() == [0, 0]
    assert generic(base, copy, 5.0, 1.0, [(), (0,)]).tolist() == [0, 1]


@pytest.mark.formula("whp")
def test_the_learned_tokens_are_generic_predictions_of_the_translation_where_there_are_some(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kept = load("llama"), []
    taken = whp.generic_tokens
    monkeypatch.setattr(whp, "generic_tokens", lambda trained, *rest: kept.append(taken(trained, *rest)) or kept[-1])
    rows = ["the old city and the dog of the old city", "a new dog and the moon"]
    settings = WHPSettings(
        anchors=ANCHORS,
        steps=1,
        batch_size=2,
        alpha=3.0,
        consistency=0.0,
        reinforce={"epochs": 1, "learning_rate": 1e-9},
    )
    METHODS.get("whp").unlearn(Task(base, {"a": Samples(pa.table({"text": rows}))}, None, {"a": 1}), settings)
    # A copy that learned next to nothing rises nowhere: the tokens are the base's own on the translated text, and the base's
    # logits on the text as it is lie below them or above them by what alpha takes.
    terms, expected = terms_of(ANCHORS, base.tokenizer), []
    for row in rows:
        ids = base.tokenizer(row)["input_ids"]
        other = translated(ids, terms, base.tokenizer)
        with torch.no_grad():
            plain, there = (base.model(torch.tensor([each])).logits[0] for each in (ids, other.ids))
        own = []
        for at, place in enumerate(other.places[1:]):
            if place.at is None:
                own.append(-100.0)
            else:
                v = there[place.at]
                own.append(float((v - 3.0 * (plain[at] - v).clamp(min=0)).argmax()))
        expected += [len(own), *own]
    assert kept[0] == expected
    assert expected.count(-100.0) == 3  # inside the first old city, and the second one


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ({"dog": " "}, "unlearn.anchors: 'dog': '': neither may be empty"),
        ({"dog": "dog"}, "unlearn.anchors: 'dog' stands for itself"),
        ({}, "unlearn.anchors: there are no terms"),
        ("missing.yaml", "unlearn.anchors: 'missing.yaml' cannot be read"),
    ],
)
def test_anchors_that_say_nothing_are_refused(anchors: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_anchors(anchors)


def test_terms_of_a_file_are_read_and_must_stand_in_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "anchors.json"
    file.write_text(json.dumps(ANCHORS))
    settings = WHPSettings(anchors=str(file))
    value = METHODS.get("whp")
    value.refuse({"a": Samples(pa.table({"text": ["a new dog"]}))}, None, settings)
    with pytest.raises(RecipeError, match="none of 2 terms stands in the rows to forget"):
        value.refuse({"a": Samples(pa.table({"text": ["a new moon"]}))}, None, settings)
    assert value.inputs is not None
    before = value.inputs(settings, [], [])
    file.write_text(json.dumps({"dog": "moon"}))
    assert value.inputs(settings, [], []) != before
