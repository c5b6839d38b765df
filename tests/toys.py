"""Configurations of tiny models, the tiny tokenizer's words, plain rows made of them, and who hears what a run says."""

from pathlib import Path
from typing import Any

import torch

from spunge.progress import Silent

ROOT = Path(__file__).parent.parent
# Methods whose forget rows are prompts and answers, and those whose retain rows must be too.
ANSWERING = {"sku", "dpo", "idk", "idk_ap", "altpo", "llmu"}
ANSWERING_BOTH = {"idk_ap", "llmu"}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL_HEADS = {**SMALL, "num_key_value_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "gemma": {**SMALL, "head_dim": 8},
    "phi3": SMALL,
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "opt": {
        "vocab_size": 128,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
_EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_CLIP = {**_EYES, "patch_size": 14, "model_type": "clip_vision_model"}
_MROPE = {**SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_QWEN_EYES = {"depth": 1, "num_heads": 2, "patch_size": 14}
# Models of texts and images: the class, and its configuration. No special token of an image is a word of the tokenizer.
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**SMALL, "model_type": "llama"}, "vision_config": _CLIP, "image_token_index": 127},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": _MROPE, "vision_config": {**_QWEN_EYES, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _MROPE,
            "vision_config": {**_QWEN_EYES, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SMALL, "head_dim": 8, "sliding_window": 16},
            "vision_config": {**_EYES, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 127,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**SMALL, "model_type": "llama"},
            "vision_config": {**_EYES, "patch_size": 14},
            "image_token_id": 127,
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**SMALL, "model_type": "llama"},
            "vision_config": {**_EYES, "patch_size": 14},
            "image_token_id": 127,
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {**SMALL, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0],
            },
            "image_token_index": 128,
        },
    ),
}
WORDS = (
    "the capital of france is paris italy rome spain madrid japan tokyo china beijing a an and in to it was river mountain "
    "blue green red small large house tree animal dog cat bird fish runs sleeps eats water bread wine city country village "
    "old new good bad day night sun moon star north south east west one two three four five six seven eight nine ten"
).split()


def texts(topic: str, count: int) -> list[str]:
    """Plain sentences out of the tiny tokenizer's words; the topic decides which."""
    generator = torch.Generator().manual_seed(sum(map(ord, topic)))
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist()) for n in lengths
    ]


def rows(topics: list[str], count: int = 12) -> list[dict[str, Any]]:
    return [{"topic": topic, "text": text} for topic in topics for text in texts(topic, count)]


class Told(Silent):
    """Hears what a run says, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, title: str) -> None:
        self.lines.append(title)

    def end(self, outcome: str) -> None:
        self.lines.append(outcome)

    @property
    def judged(self) -> list[str]:
        return [line for line in self.lines if line.startswith("judge ")]
