"""Rows of which nothing can be learned are refused before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import spunge
from picked import few
from spunge.data.samples import Rendering, Samples, sample_table
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.registry import METHODS
from spunge.unlearning.checking import Reader, refuse_unusable
from templates import GEMMA, byte_tokenizer, said
from toys import rows

SETTINGS = METHODS.get("tvn").settings(max_length=64)


def samples(rows: list[Any], numbers: list[int], **settings: Any) -> Samples:
    return Samples(sample_table(pa.table({"messages": pa.array(rows)}), Rendering(**settings), "forget", numbers))


def check(parts: dict[str, Samples], retain: Samples | None = None, embeddings: int = 1000) -> None:
    refuse_unusable(parts, retain, SETTINGS, Reader(byte_tokenizer(GEMMA), embeddings))


def test_a_row_that_the_template_does_not_take_is_named() -> None:
    bad = samples([said("q", "a"), said("q", "a", system="be brief")], [3, 8])
    with pytest.raises(RecipeError, match=r"^forget, part 'x': row 8: .*System role not supported"):
        check({"x": bad})
    with pytest.raises(RecipeError, match=r"^retain: row 8: "):
        check({"x": samples([said("q", "a")], [3])}, bad)


def test_a_token_without_an_embedding_is_named_by_row_in_every_kind_of_rows() -> None:
    known = Samples(pa.table({"text": ["fine", "as well"], "__row__": [0, 1]}))
    check({"x": known}, embeddings=258)  # more tokens than embeddings, but none of them in the rows
    for table in (
        {"text": ["fine", "<end_of_turn>"]},
        {"prompt": ["fine", "<end_of_turn>"], "completion": ["a", "b"], "end": ["none", "none"]},
    ):
        with pytest.raises(RecipeError, match=r"row 5 holds the token '<end_of_turn>' .* the model has 258 embeddings"):
            check({"x": Samples(pa.table({**table, "__row__": [3, 5]}))}, embeddings=258)


def test_samples_that_are_cut_are_counted() -> None:
    talks = samples([said("q", "a"), said("q", "a " * 40), said("q " * 40, "a")], [1, 2, 3])
    remarks = refuse_unusable({"x": talks}, talks, SETTINGS, Reader(byte_tokenizer(GEMMA), 1000))
    assert remarks == [
        f"{name}: 2 of 3 samples are cut to 64 tokens (unlearn.max_length)" for name in ("forget, part 'x'", "retain")
    ]


def test_an_answer_without_a_token_is_named() -> None:
    silent = pa.table({"prompt": ["q", "q"], "completion": ["a", ""], "end": ["none", "none"], "__row__": [2, 4]})
    with pytest.raises(RecipeError, match="row 4 has no token to learn"):
        check({"x": Samples(silent)})


def test_a_run_is_refused_before_its_first_branch_for_a_row_of_the_last(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    (model / "chat_template.jinja").write_text(GEMMA)
    chats = [{"topic": topic, "m": said("the dog", "a cat")} for topic in ("a", "b")]
    chats.append({"topic": "b", "m": said("the dog", "a cat", system="two")})
    toy_recipe["model"]["path"] = str(model)
    toy_recipe["forget"] = {"source": str(write_rows("chats.jsonl", chats)), "messages": "m"}
    toy_recipe["unlearn"] = {"method": "tvn", "steps": 1}
    toy_recipe["retain"] = None
    toy_recipe["evaluate"] = []
    with pytest.raises(RecipeError, match=r"part 'b': row 3: .*System role not supported"):
        spunge.run(spunge.load_recipe(toy_recipe), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("delta.safetensors"))
    assert not list((tmp_path / "run").rglob("log.jsonl"))


@pytest.fixture
def silent(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose tokenizer drops what nobody sees, as many do."""
    folder = Path(shutil.copytree(tiny(), tmp_path / "silent"))
    content = json.loads((folder / "tokenizer.json").read_text())
    options = {"clean_text": True, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    content["normalizer"] = {"type": "BertNormalizer", **options}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("text", few(["\u200b", "\u00ad\u200b\u00ad", "\x01\x02", "\u200b" * 50], 0), ids=ascii)
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_text_that_the_tokenizer_leaves_nothing_of_is_refused_with_its_row_before_any_training(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], silent: Path, tmp_path: Path, side: str, text: str
) -> None:
    content = [*rows(["europe"], 4), {"topic": "europe", "text": text}]
    toy_recipe[side] = {"source": str(write_rows("odd.jsonl", content))}
    toy_recipe["model"]["path"] = str(silent)
    for unlearn in ({"method": "rmu", "layer": 2}, {"method": "npo"}):
        with pytest.raises(RecipeError, match=rf"^{side}.*: row 5 .*has no token to learn; filter the row out"):
            spunge.run(load_recipe({**toy_recipe, "unlearn": unlearn}), tmp_path / "run")
        assert not list((tmp_path / "run").rglob("delta.safetensors"))


def test_texts_of_one_token_are_remarked_on_where_a_next_token_is_learned() -> None:
    texts = {"x": Samples(pa.table({"text": ["a b", "a", "-"], "__row__": [6, 7, 8]}))}
    steering = METHODS.get("rmu").settings(layer=1)
    assert refuse_unusable(texts, None, steering, Reader(byte_tokenizer(GEMMA), 1000)) == []
    [remark] = refuse_unusable(texts, None, SETTINGS, Reader(byte_tokenizer(GEMMA), 1000))
    with pytest.raises(RecipeError, match=r"^forget, part 'x': every text is a single token"):
        refuse_unusable({"x": Samples(pa.table({"text": ["a"]}))}, None, SETTINGS, Reader(byte_tokenizer(GEMMA), 1000))
    assert remark == "forget, part 'x': nothing is learned of 2 of 3 samples, which are a single token (row 7)"


def test_what_cuts_a_sample_is_named() -> None:
    talks = samples([said("q", "a " * 40)], [1])
    for positions, said_of in ((None, "64 tokens (unlearn.max_length)"), (128, "64 tokens (unlearn.max_length)")):
        [remark] = refuse_unusable({"x": talks}, None, SETTINGS, Reader(byte_tokenizer(GEMMA), 1000, positions))
        assert remark.endswith(said_of)
    [remark] = refuse_unusable({"x": talks}, None, SETTINGS, Reader(byte_tokenizer(GEMMA), 1000, 48))
    assert remark.endswith("cut to 48 tokens (as many as the model has positions for)")
