"""What a model and its tokenizer bring to judging: generation settings of their own, few positions, closing and foreign tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spunge
from spunge.data.samples import Text, encode, encode_apart
from spunge.errors import RecipeError
from spunge.evaluation.candidates import question_of
from spunge.evaluation.choices import ChoicesSettings, all_likelihoods, all_questions, answer_index, encoded_alike
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.likelihood import likelihoods
from spunge.evaluation.perplexity import PERPLEXITY, PerplexitySettings
from spunge.model.loading import load_base
from spunge.progress import SILENT
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings

PROMPTS = ["a", "the capital of france is", "one two three four five six seven eight"]
OWN = {
    "penalty": {"repetition_penalty": 1.9},
    "ban": {"no_repeat_ngram_size": 1},
    "least": {"min_new_tokens": 6},
    "suppressed": {"suppress_tokens": list(range(4, 60))},
    "forced": {"forced_eos_token_id": 5},
    "sampled": {"do_sample": True, "temperature": 0.2, "top_k": 3},
    "beams": {"num_beams": 3},
}


def copied(folder: Path, to: Path, config: dict[str, Any]) -> Any:
    """A model with a generation_config.json of its own, as a Base."""
    shutil.copytree(folder, to)
    (to / "generation_config.json").write_text(json.dumps(config))
    return load_base(to, ModelSettings(path=str(to), dtype="float32"))


@pytest.mark.parametrize("own", OWN)
def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(tiny: Callable[..., Path], tmp_path: Path, own: str) -> None:
    """Against the argmax of transformers' own logits, token by token."""
    base = copied(tiny("llama"), tmp_path / "model", OWN[own])
    settings = GenerationSettings(max_new_tokens=6)
    written = completions(base, PROMPTS, settings, Bench("base", "x", tmp_path / "b", tmp_path / "b"))
    for prompt, [text] in zip(PROMPTS, written, strict=True):
        ids = list(base.tokenizer(prompt)["input_ids"])
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        before = base.tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert text == base.tokenizer.decode(ids, skip_special_tokens=True)[len(before) :]
    assert base.model.generation_config.to_dict().items() >= OWN[own].items()  # it is put back


def test_what_the_recipe_asks_for_is_done(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = copied(tiny("llama"), tmp_path / "model", {})
    bench = Bench("base", "x", tmp_path / "b", tmp_path / "b")
    plain = completions(base, PROMPTS, GenerationSettings(max_new_tokens=8), bench)
    penalised = completions(base, PROMPTS, GenerationSettings(max_new_tokens=8, repetition_penalty=5.0), bench)
    assert plain != penalised
    assert all(len(set(text.split())) == len(text.split()) for [text] in penalised)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_texts_are_read_within_learned_positions(
    tiny: Callable[..., Path], load: Callable[..., Any], architecture: str
) -> None:
    """Perplexity in windows of what the model can read, against transformers' own on the same windows."""
    places = 16
    sizes = {"n_positions": places} if architecture == "gpt2" else {"max_position_embeddings": places}
    base = load(architecture, **sizes)
    assert base.positions == places
    text = " ".join(["one two three four five six seven"] * 6)
    table = pa.table({"text": [text]})
    [measure] = PERPLEXITY.measure(base, PerplexitySettings(), table, Bench("base", "x", Path(), Path()))
    ids, loss = base.tokenizer(text)["input_ids"], 0.0
    for start in range(0, len(ids) - 1, places - 1):
        window = torch.tensor(ids[start : start + places])
        with torch.no_grad():
            logs = base.model(window[None]).logits[0].log_softmax(-1)
        loss -= float(logs[:-1].gather(1, window[1:, None]).sum())
    assert float(measure.numerator[0]) == pytest.approx(loss, rel=1e-5)
    assert float(measure.denominator[0]) == len(ids) - 1


def test_a_completion_that_no_position_is_left_for_is_refused(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load("gpt2", n_positions=16)
    bench = Bench("base", "x", tmp_path, tmp_path)
    with pytest.raises(RecipeError, match="the model has 16 positions"):
        completions(base, PROMPTS, GenerationSettings(max_new_tokens=16), bench)
    assert completions(base, [" ".join(PROMPTS * 9)], GenerationSettings(max_new_tokens=8), bench)


def closing(folder: Path, to: Path) -> Any:
    """A model whose tokenizer puts an end token behind every text."""
    from tokenizers import Tokenizer, processors

    shutil.copytree(folder, to)
    inner = Tokenizer.from_file(str(to / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    inner.save(str(to / "tokenizer.json"))
    return load_base(to, ModelSettings(path=str(to), dtype="float32"))


def test_candidates_are_scored_alike_shared_and_apart_and_without_a_closing_token(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    plain = load_base(tiny("llama"), ModelSettings(path=str(tiny("llama")), dtype="float32"))
    closed = closing(tiny("llama"), tmp_path / "closing")
    candidates = [" paris", " paris rome", " the big tree"]
    scores = []
    for base in (plain, closed):
        texts = [Text("the capital of france is", candidate) for candidate in candidates]
        coded = encoded_alike(texts, base.tokenizer, 99)
        assert question_of(coded) is not None
        shared = all_likelihoods(base, coded, [len(coded)], SILENT.step)
        apart = likelihoods(base, coded, SILENT.step)
        assert [each.tokens for each in shared] == [each.tokens for each in apart]
        assert [each.log for each in shared] == pytest.approx([each.log for each in apart], rel=1e-4)
        scores.append([each.log for each in shared])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_token_over_the_join_leaves_every_candidate_its_own_letters(tokenizer_folder: Path) -> None:
    """`cat` + `ch`: where a vocabulary holds one token for letters of both, question and candidate are tokenised apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("<abcdefghijklmnopqrstuvwxyz")}
    raw = Tokenizer(models.BPE({**letters, "nd": 27, "and": 28}, [("n", "d"), ("a", "nd")], unk_token="<"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<")
    texts = [Text("xa", "nd"), Text("xa", "ll")]
    coded = encoded_alike(texts, tokenizer, 99)
    assert [[token for token in each.labels if token >= 0] for each in coded] == [[27], [12, 12]]
    assert [each.ids[:2] for each in coded] == [[24, 1], [24, 1]]
    assert encode(texts[1], tokenizer, 99) == encode_apart(texts[1], tokenizer, 99)


@pytest.mark.parametrize(
    ("answers", "indices"),
    [
        (["1", "3", "4", "2"], [0, 2, 3, 1]),  # labels
        (["0", "3", "1", "2"], [0, 3, 1, 2]),  # indices in text
        ([1, 3, 0, 2], [1, 3, 0, 2]),  # numbers are indices
        (["B", "d", "x two", ["3"]], [1, 3, 2, None]),  # a letter, a candidate, and digits that nothing tells of
    ],
)
def test_digits_in_text_count_from_what_all_rows_tell(answers: list[Any], indices: list[Any]) -> None:
    choices = ["x zero", "x one", "x two", "x three"]
    rows = [{"question": "q", "choices": choices, "answer": answer} for answer in answers]
    table = pa.table({name: pa.array([json.dumps(row[name]) for row in rows]) for name in rows[0]})
    decoded = [{name: json.loads(value) for name, value in row.items()} for row in table.to_pylist()]

    class Rows:
        @staticmethod
        def to_pylist() -> list[dict[str, Any]]:
            return decoded

    if None in indices:
        with pytest.raises(RecipeError, match=r"row 3: \['3'\] may count the candidates from 0 or from 1"):
            all_questions(Rows(), ChoicesSettings())  # type: ignore[arg-type]
        return
    assert [asked.answer for asked in all_questions(Rows(), ChoicesSettings())] == indices  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "choices": ["a", None], "answer": 0},
            "an empty entry in 1 of 2 rows .first: row 2 of asked",
        ),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "row 2: candidate 1 is empty"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "row 2: 'c' is none of its 2 candidates"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "row 2: '2' is none of its 2 candidates"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "row 2 has no list of two candidates"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "is empty in 1 of 2 rows .first: row 2 of asked"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_training(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path], row: dict[str, Any], message: str
) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": type(row["answer"])(0) if row["answer"] != "c" else "a"}
    toy_recipe["evaluate"] = [{"kind": "choices", "source": str(write_rows("asked.jsonl", [good, row]))}]
    with pytest.raises(RecipeError, match=message):
        spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    assert not list((tmp_path / "run").glob("branches/*"))


def test_an_index_of_text_without_context_is_from_zero() -> None:
    assert answer_index("1", ["a", "b"], 0) == 1
    assert answer_index("1", ["a", "b"], 0, first=1) == 0


def test_an_evaluations_text_with_a_token_that_the_model_lacks_is_refused_before_training(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(tiny("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>", "<extra>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == tokenizer.convert_tokens_to_ids("<extra>")
    toy_recipe["model"]["path"] = str(folder)
    asked = write_rows("asked.jsonl", [{"text": "the sun"}, {"text": "the <extra> moon"}])
    toy_recipe["evaluate"] = [{"kind": "perplexity", "source": str(asked), "text": "text", "by": "NULL"}]
    with pytest.raises(RecipeError, match="row 2 holds the token '<extra>'"):
        spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    toy_recipe["evaluate"][0]["where"] = "text NOT LIKE '%<extra>%'"
    spunge.run(load_recipe(toy_recipe, ["controls=[]"]), tmp_path / "run")
