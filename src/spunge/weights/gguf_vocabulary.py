"""A tokenizer as llama.cpp knows it: bytes-level BPE, whose ways of cutting a text into words have names there.

llama.cpp has no general tokenizer. A file names one of its own ways (`tokenizer.ggml.pre`), so only a tokenizer that cuts as one of
those does is written; another would give other tokens without a word.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, one_line
from spunge.temporary import TemporaryFolder

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
ITS_WORDS = {**BYTES, "use_regex": True}  # the words of GPT-2


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": f"{CONTRACTIONS}|{WORDS}|{digits}|{REST}"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


# llama.cpp's name -> how such a tokenizer.json cuts a text. Source: llama.cpp's conversion/base.py, src/llama-vocab.cpp.
WAYS = {
    "gpt-2": ITS_WORDS,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, ITS_WORDS]},
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
WHOLE_WORDS = "llama-bpe"  # there a word that is a token is never cut (`ignore_merges`)


@dataclass(frozen=True)
class Vocabulary:
    """tokens: by id. kinds: of each, a number of gguf.TokenType. begins, ends: whether a text gets such a token by itself."""

    way: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    begins: bool
    ends: bool
    tokenizer: Any

    def add_to(self, writer: Any) -> None:
        """Into a gguf.GGUFWriter: tokens, merges, special tokens and the chat template."""
        import gguf

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.way)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        with TemporaryFolder("vocabulary") as aside:
            self.tokenizer.save_pretrained(aside)
            special = gguf.SpecialVocab(str(aside), load_merges=True, n_vocab=len(self.tokens))
        # What gguf reads out of the post-processor is a guess; this was tried on a text.
        special.add_special_token = {"bos": self.begins, "eos": self.ends}
        special.add_to_gguf(writer, quiet=True)


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model whose embeddings have so many rows. Raises RecipeError for one that llama.cpp has not."""
    import gguf
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(one_line(f"--gguf: {str(folder)!r} has no tokenizer that can be read ({error})")) from None
    if not tokenizer.is_fast:
        raise RecipeError("--gguf: the model's tokenizer has no tokenizer.json, and its words cannot be compared")
    way = _way(json.loads(tokenizer.backend_tokenizer.to_str()))
    added = tokenizer.added_tokens_decoder
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise RecipeError(f"--gguf: the tokenizer has {max(known) + 1} tokens and the model embeddings for {rows}")
    eaters = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
    if eaters:
        raise RecipeError(
            one_line(f"--gguf: the token {eaters[0]!r} takes in the spaces beside it, which llama.cpp cannot do")
        )
    kinds = []
    for index in range(rows):
        if index not in known:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            kinds.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    begins, ends = _around(tokenizer)
    tokens = tuple(known.get(index, f"[PAD{index}]") for index in range(rows))
    return Vocabulary(way, tokens, tuple(int(kind) for kind in kinds), begins, ends, tokenizer)


def _way(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts a text. Raises RecipeError where it has none."""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") or model["type"] == "Unigram" else model["type"]
        raise RecipeError(
            f"--gguf: the model's tokenizer is {kind}; only bytes-level BPE is written. Take llama.cpp's convert_hf_to_gguf.py"
        )
    before = _without_offsets(content.get("pre_tokenizer"))
    way = next((name for name, known in WAYS.items() if before == known), None)
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    normalizer = (content.get("normalizer") or {}).get("type")
    composes = normalizer == "NFC" and way == "qwen2"  # as every Qwen does; llama.cpp leaves it out
    if (
        way is None
        or odd
        or not (normalizer is None or composes)
        or model.get("ignore_merges", False) != (way == WHOLE_WORDS)
    ):
        raise RecipeError(
            f"--gguf: the model's tokenizer cuts texts in a way that is none of {', '.join(WAYS)}; "
            "take llama.cpp's convert_hf_to_gguf.py"
        )
    return way


def _without_offsets(value: Any) -> Any:
    """A part of tokenizer.json less what changes no token."""
    if isinstance(value, dict):
        return {key: _without_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
    return [_without_offsets(inner) for inner in value] if isinstance(value, list) else value


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a token at its start, and one at its end. Raises RecipeError for any other than those of the model."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    begins, ends = whole[:1] == [tokenizer.bos_token_id], whole[-1:] == [tokenizer.eos_token_id]
    expected = [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends
    if whole != expected:
        raise RecipeError(
            "--gguf: the tokenizer puts other tokens around a text than that of its start and that of its end"
        )
    return begins, ends
