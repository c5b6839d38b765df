"""Small tokenizers of the kinds that llama.cpp has: bytes-level BPE."""

import json
from pathlib import Path
from typing import Any

from spunge.weights.gguf_vocabulary import WAYS, WHOLE_WORDS
from toys import WORDS

TEMPLATE = "{% for m in messages %}<|end|>{{ m['content'] }}{% endfor %}"


def bpe(folder: Path, way: str = "gpt-2", begins: bool = False, **changes: Any) -> Path:
    """A tokenizer of bytes-level BPE, learned from a few words, beside a model."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    content = {**json.loads(inner.to_str()), "pre_tokenizer": whole(WAYS[way])}
    inner = Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(_alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS), "12 123 1234 isn't it's", "  two\n\n  one"] * 3, trainer)
    inner.decoder = decoders.ByteLevel()
    content = json.loads(inner.to_str())
    content["model"]["ignore_merges"] = way == WHOLE_WORDS
    if begins:
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    for key, value in changes.items():
        (content["model"] if key in content["model"] else content)[key] = value
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def whole(cutting: Any) -> Any:
    """A way to cut as tokenizer.json has it, with what changes no token."""
    if isinstance(cutting, list):
        return [whole(inner) for inner in cutting]
    if not isinstance(cutting, dict):
        return cutting
    offsets = {"trim_offsets": True} if cutting.get("type") == "ByteLevel" else {}
    return {**{key: whole(value) for key, value in cutting.items()}, **offsets}


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())
