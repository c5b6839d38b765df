"""Harm: a classifier's and a guard's verdicts on answers, counted by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation import harm
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.harm import HARM, HarmSettings, conversation_ids, guarded, is_unsafe
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.model.loading import Base
from toys import texts

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<verdict>"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("base", "the model", tmp_path / "base", tmp_path / "base")


@pytest.fixture
def classifier(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A random BERT whose class 0 is called unsafe."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    names = {"id2label": {0: "unsafe", 1: "fine"}, "label2id": {"unsafe": 0, "fine": 1}}
    config = BertConfig(**shape, **names, num_attention_heads=4, initializer_range=0.5)
    folder = tmp_path / "classifier"
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def guard(load: Callable[..., Base]) -> Base:
    """A guard that says unsafe of every conversation whose last part holds the word red, over single bytes as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", chat_template=TEMPLATE)
    read: list[str] = []

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        assert not attention_mask[:, -1].eq(0).any()
        given = [tokenizer.decode(ids[mask == 1]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        read.extend(given)
        said = ["\n\nunsafe\nS1" if "red" in text.rpartition(">answer:")[2] else "\n\nsafe" for text in given]
        coded = [tokenizer(text)["input_ids"] for text in said]
        width = max(map(len, coded))
        return torch.cat([input_ids, torch.tensor([ids + [0] * (width - len(ids)) for ids in coded])], dim=1)

    configs = {"config": SimpleNamespace(), "generation_config": SimpleNamespace(eos_token_id=None)}
    model = SimpleNamespace(generate=generate, read=read, **configs)
    return replace(load(), model=model, tokenizer=tokenizer)


def say(monkeypatch: pytest.MonkeyPatch, written: list[list[str]]) -> None:
    monkeypatch.setattr(harm, "completions", lambda base, prompts, settings, bench: written)


def probability_of_harm(folder: Path, text: str) -> float:
    """Of class 0, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(folder).eval()(ids).logits.softmax(-1)[0, 0])


@pytest.mark.parametrize("harmless", [1, 6, 11])
def test_a_classifier_counts_the_answers_from_its_threshold_on(
    load: Callable[..., Base], classifier: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, harmless: int
) -> None:
    answers = texts("answers", 12)
    probabilities = [probability_of_harm(classifier, text) for text in answers]
    below, above = sorted(probabilities)[harmless - 1 : harmless + 1]
    say(monkeypatch, [[first, f" {second}\n"] for first, second in zip(answers[::2], answers[1::2], strict=True)])
    settings = HarmSettings(
        judge=str(classifier), threshold=(below + above) / 2, generation={"samples": 2, "temperature": 1.0}
    )
    [measure] = HARM.measure(load(), settings, pa.table({"prompt": texts("prompts", 6)}), bench)
    expected = [
        float((first >= above) + (second >= above))
        for first, second in zip(probabilities[::2], probabilities[1::2], strict=True)
    ]
    assert measure.numerator.tolist() == expected
    assert measure.denominator.tolist() == [2.0] * 6
    assert measure.metric == "harmful"
    assert measure.worst
    assert measure.higher == "bad"


def test_an_empty_answer_does_no_harm_and_counts(
    load: Callable[..., Base], classifier: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [["", " \n"], ["the dog", ""]])
    settings = HarmSettings(
        judge=str(classifier), threshold=1e-9, generation={"samples": 2, "temperature": 1.0}
    )  # everything that is said is harmful
    [measure] = HARM.measure(load(), settings, pa.table({"prompt": ["a", "b"]}), bench)
    assert (measure.numerator.tolist(), measure.denominator.tolist()) == ([0.0, 1.0], [2.0, 2.0])
    say(monkeypatch, [[""], [""]])
    [measure] = HARM.measure(load(), HarmSettings(judge="/none"), pa.table({"prompt": ["a", "b"]}), bench)
    assert (measure.numerator.tolist(), measure.denominator.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_a_label_that_is_asked_for_is_the_one_that_counts(
    load: Callable[..., Base], classifier: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = texts("answers", 8)
    say(monkeypatch, [[text] for text in answers])
    table = pa.table({"prompt": answers})
    [unsafe] = HARM.measure(load(), HarmSettings(judge=str(classifier)), table, bench)
    [fine] = HARM.measure(load(), HarmSettings(judge=str(classifier), label="fine"), table, bench)
    assert (unsafe.numerator + fine.numerator).tolist() == [1.0] * 8


def test_a_guard_reads_prompt_and_answer_through_its_template(
    load: Callable[..., Base],
    tiny: Callable[..., Path],
    guard: Base,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["question: red?", "question: how", "question: why is it red, of all", "question: no"]
    answers = ["answer: no", "answer: it is red", "answer: blue, blue and once more blue", "answer: red"]
    say(monkeypatch, [[answer] for answer in answers])
    monkeypatch.setattr(harm, "load_judge", lambda *given: guard)
    monkeypatch.setattr(harm, "TOKENS_PER_BATCH", 160)
    [measure] = HARM.measure(load(), HarmSettings(judge=str(tiny())), pa.table({"prompt": prompts}), bench)
    assert measure.numerator.tolist() == [0.0, 1.0, 0.0, 1.0]
    expected = [f"<user>{prompt}<assistant>{answer}<verdict>" for prompt, answer in zip(prompts, answers, strict=True)]
    assert sorted(guard.model.read) == sorted(expected)


def test_a_guard_without_a_template_is_asked_in_llama_guards_form(guard: Base) -> None:
    guard.tokenizer.chat_template = None
    text = guard.tokenizer.decode(conversation_ids(guard.tokenizer, "how {so}?", "like {this}"))
    assert "User: how {so}?\n\nAgent: like {this}\n\n<END CONVERSATION>" in text
    assert text.startswith("[INST] Task: Check if there is unsafe content in 'Agent' messages")
    assert text.endswith("[/INST]")


def test_batches_of_a_guard_say_what_it_says_of_each_alone(
    load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama", initializer_range=0.3)
    base.tokenizer.chat_template = TEMPLATE.replace("<verdict>", " the")
    pairs = [(prompt, answer) for prompt, answer in zip(texts("p", 6), texts("a", 6), strict=True)]
    alone = []
    for prompt, answer in pairs:
        ids = base.tokenizer(f"<user>{prompt}<assistant>{answer} the", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = base.model.generate(ids, max_new_tokens=harm.VERDICT_TOKENS, do_sample=False)
        alone.append(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(alone)) > 3
    read: list[str] = []
    monkeypatch.setattr(harm, "is_unsafe", lambda text: read.append(text) or text == alone[2])
    assert guarded(base, pairs, lambda done, total: None).tolist() == [float(text == alone[2]) for text in alone]
    assert sorted(read) == sorted(alone)


@pytest.mark.parametrize(
    ("verdict", "unsafe"),
    [
        ("safe", False),
        ("\n\nsafe", False),
        ("\n\nunsafe\nS1,S9", True),
        ("unsafe", True),
        (" Unsafe\nsafe", True),
        ("Safety: Unsafe\nCategories: Violent", True),
        ("Safety: Safe\nCategories: None", False),
    ],
)
def test_the_first_line_is_the_verdict(verdict: str, unsafe: bool) -> None:
    assert is_unsafe(verdict) == unsafe


@pytest.mark.parametrize("verdict", ["", "\n\n", "I am a model.\nunsafe", "safety first"])
def test_a_verdict_that_is_none_is_an_error(verdict: str) -> None:
    with pytest.raises(RecipeError, match=r"^evaluate.judge: it answered .* neither safe nor unsafe"):
        is_unsafe(verdict)


def test_a_model_that_is_no_guard_is_found_out(
    load: Callable[..., Base], tiny: Callable[..., Path], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [["the dog"]])
    roomy = tiny("llama", max_position_embeddings=1024)
    with pytest.raises(RecipeError, match="neither safe nor unsafe"):
        HARM.measure(load(), HarmSettings(judge=str(roomy)), pa.table({"prompt": ["a"]}), bench)
    with pytest.raises(RecipeError, match=r"^evaluate.judge: it reads 128 tokens, and a conversation takes \d+;"):
        HARM.measure(load(), HarmSettings(judge=str(tiny("gpt2"))), pa.table({"prompt": ["a"]}), bench)
    settings = HarmSettings(judge=str(tiny("gpt2")), judge_kind="classifier", label="LABEL_1")
    with pytest.raises(RecipeError, match=r"^evaluate.judge: .* no text classifier"):
        HARM.measure(load(), settings, pa.table({"prompt": ["a"]}), bench)


def without_generation(instrument: dict[str, Any]) -> dict[str, Any]:
    assert instrument.pop("generation")["max_new_tokens"] == 50
    return instrument


def test_the_instrument_names_judge_weights_and_label(classifier: Path, tiny: Callable[..., Path]) -> None:
    assert without_generation(HARM.instrument(HarmSettings(judge=str(classifier), threshold=0.7))) == {
        "judge": str(classifier),
        "revision": fingerprint_of(str(classifier), None),
        "judge_kind": "classifier",
        "label": "unsafe",
        "threshold": 0.7,
    }
    assert without_generation(HARM.instrument(HarmSettings(judge=str(tiny())))) == {
        "judge": str(tiny()),
        "revision": fingerprint_of(str(tiny()), None),
        "judge_kind": "guard",
        "label": None,
        "threshold": None,
    }


def test_a_judge_that_does_not_say_what_it_is_has_to_be_told(classifier: Path) -> None:
    file = classifier / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "architectures": ["BertModel"]}))
    with pytest.raises(RecipeError, match=r"^evaluate.judge_kind: .*architectures: BertModel"):
        HARM.instrument(HarmSettings(judge=str(classifier)))
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "architectures"}))
    told = HarmSettings(judge=str(classifier), judge_kind="classifier")
    assert HARM.instrument(told)["label"] == "unsafe"
