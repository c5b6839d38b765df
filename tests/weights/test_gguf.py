"""A GGUF file that was written is read again, by transformers: the same logits, the same tokens, the same special ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_level import TEMPLATE, bpe, whole
from picked import few
from spunge.errors import RecipeError
from spunge.weights.gguf_model import FAMILIES, opened, write_gguf
from spunge.weights.gguf_vocabulary import WAYS
from toys import SMALL

pytest.importorskip("gguf")
TEXTS = [
    "the capital of france, isn't it?",
    "Tokyo 12345\n\n  größe 東京 <|end|> it'S",
    " x\t\tone  two\r\n",
    "🚀 3.14",
]
BLOCKS = {**SMALL, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made("llama") -> a random model's folder with a tokenizer that llama.cpp has."""

    def build(family: str = "llama", way: str = "gpt-2", begins: bool = False, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        # transformers takes Qwen 3's heads to have 128 entries, whatever the file says.
        own = {"head_dim": 128} if family == "qwen3" else {}
        sizes = {**BLOCKS, "vocab_size": 384, "sliding_window": None, **own, **changes}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        with torch.no_grad():  # biases and norms that do something
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return bpe(folder, way, begins)

    return build


def write(folder: Path, out: Path, kind: str = "f32", changed: dict[str, torch.Tensor] | None = None) -> Path:
    write_gguf(out / "model.gguf", opened(folder, changed or {}), kind, "tiny")
    return out


def again(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "tied"), few([(family, tied) for family in FAMILIES for tied in (False, True)], 0, 5)
)
def test_transformers_reads_the_file_as_the_same_model(
    family: str, tied: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(family, tie_word_embeddings=tied)
    torch.testing.assert_close(logits(again(write(folder, tmp_path))), logits(plain(folder)))


@pytest.mark.parametrize(("kind", "most"), few([("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)], 2))
def test_fewer_bits_give_the_same_logits_as_near_as_they_can(
    kind: str, most: float, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made()
    before, after = logits(plain(folder)), logits(again(write(folder, tmp_path, kind)))
    assert 0 < float((after - before).norm() / before.norm()) < most


@pytest.mark.parametrize("way", few(list(WAYS), 0, 3))
def test_the_file_has_the_tokenizers_tokens_and_says_how_it_cuts(
    way: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    folder = made("qwen2" if way == "qwen2" else "llama", way, begins=way == "llama-bpe")
    own, fields = AutoTokenizer.from_pretrained(folder), GGUFReader(write(folder, tmp_path) / "model.gguf").fields
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert fields["tokenizer.ggml.pre"].contents() == way
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (way == "llama-bpe")
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert {token: read.get_vocab()[token] for token in own.get_vocab()} == own.get_vocab()
    merges = [" ".join(pair) for pair in json.loads(own.backend_tokenizer.to_str())["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[index] for index in (0, 2, 10, own.get_vocab()["<|end|>"], len(own), 383)] == [3, 3, 1, 3, 5, 5]


def test_a_text_has_the_same_tokens_when_transformers_reads_them_from_the_file(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = made("qwen2", "qwen2")
    own = AutoTokenizer.from_pretrained(folder)
    read = AutoTokenizer.from_pretrained(write(folder, tmp_path), gguf_file="model.gguf")
    for text in TEXTS:
        assert read.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)


def test_other_values_can_take_the_place_of_some(made: Callable[..., Path], tmp_path: Path) -> None:
    folder, name = made(), "model.layers.1.self_attn.k_proj.weight"
    model = plain(folder)
    value = torch.randn_like(model.get_parameter(name))
    with torch.no_grad():
        model.get_parameter(name).copy_(value)
    torch.testing.assert_close(logits(again(write(folder, tmp_path, "f32", {name: value}))), logits(model))


def test_frequencies_stretched_as_in_llama_3_1_are_kept_as_what_they_are_divided_by(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    folder = made(rope_parameters=rope)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(write(folder, tmp_path) / "model.gguf").tensors}
    frequencies = plain(folder).model.rotary_emb.inv_freq
    usual = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(usual / torch.tensor(tensors["rope_freqs.weight"]), frequencies)
    assert not torch.allclose(usual, frequencies)


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, "'gpt2' is none of llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 16}, "attends to the last 16 tokens alone"),
        ("llama", {"rope_parameters": YARN}, "rotations of the type 'yarn' are not written for llama"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu' is not written"),
        ("llama", {"attention_bias": True}, r"self_attn\.k_proj\.bias has no place in a file of llama"),
    ],
)
def test_a_model_that_a_file_would_not_hold_as_it_is_is_refused(
    family: str, changes: dict[str, Any], message: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        write(tiny(family, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer": whole({**WAYS["gpt-2"], "add_prefix_space": True})},
            "in a way that is none of gpt-2, smollm",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "in a way that is none of"),
        ({"ignore_merges": True}, "in a way that is none of"),
        ({"byte_fallback": True}, "tokenizer is SentencePiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(
    changes: dict[str, Any], message: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bpe(made(), **changes)
    with pytest.raises(RecipeError, match=message):
        write(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_values_beyond_f16_are_refused_and_nothing_is_left(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output\.weight holds values beyond what f16 can"):
        write(made(), tmp_path, "f16", {"lm_head.weight": torch.full((384, 32), 1e5)})
    assert not list(tmp_path.iterdir())
