"""Targets that read what lies beside a model's weights through transformers: configurations, tokenizers, chat templates."""

import functools
import json
import random
import tempfile
from pathlib import Path

import torch

from fuzzing.mutations import as_json, change, damage, json_file
from fuzzing.trial import Target
from spunge.data.chat import Conversation, read_conversation
from spunge.data.template import Template, render
from spunge.errors import RecipeError
from spunge.model.loading import arithmetic, embeddings_of, load_base, load_tokenizer, model_depth, positions_of
from spunge.recipe.model import ModelSettings
from templates import CHATML, GEMMA, LLAMA_3, byte_tokenizer

CONVERSATION = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
PIECES = ("{%", "%}", "{{", "}}", "{% for m in messages %}", "{% endfor %}", "{{ messages[9].content }}", "{{ x.__class__ }}",
          "{% set messages = 3 %}", "{{ 1 / 0 }}", "{{ raise_exception(messages) }}", "{% generation %}", "{{ 9 ** 99 }}",
          "{{ strftime_now(3) }}", "{% include 'x' %}", "{{ messages | tojson(indent='a') }}", "{{ 'a' * 10 }}")  # fmt: skip


@functools.cache
def _whole() -> dict[str, bytes]:
    """The files of a tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer(CHATML)
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _described(chance: random.Random) -> dict[str, bytes]:
    name = chance.choice((CONFIG, CONFIG, GENERATION))
    return {name: json_file(chance, json.loads(_whole()[name]))}


def _tokenized(chance: random.Random) -> dict[str, bytes]:
    """One of the tokenizer's files changed; a template by edits, or by what templates are made of."""
    name = chance.choice((TOKENIZER, TOKENIZER_CONFIG, TEMPLATE))
    if name != TEMPLATE:
        document = json.loads(_whole()[name])
        if (
            name == TOKENIZER and chance.random() < 0.7
        ):  # the vocabulary is most of the file, and a change there says little
            kept = document["model"].pop("vocab")
            document = change(chance, document)
            if isinstance(document, dict) and isinstance(document.get("model"), dict):
                document["model"].setdefault("vocab", kept)
            return {name: as_json(document)}
        return {name: json_file(chance, document)}
    text = chance.choice((CHATML, LLAMA_3, GEMMA)).encode()
    if chance.random() < 0.5:
        return {name: damage(chance, text)}
    at = chance.randint(0, len(text))
    return {name: text[:at] + chance.choice(PIECES).encode() + text[at:]}


def _model(folder: Path, changed: dict[str, bytes]) -> Path:
    own = folder / "model"
    own.mkdir(exist_ok=True)
    for name, content in (_whole() | changed).items():
        (own / name).write_bytes(content)
    return own


def _configuration(folder: Path, changed: dict[str, bytes]) -> int:
    """What `plan` and the checks before a training ask of a configuration."""
    own = _model(folder, changed)
    settings = ModelSettings(path=str(own), device="cpu")
    assert model_depth(own, settings) >= 0
    assert embeddings_of(own, settings) >= 0
    assert (positions_of(own, settings) or 1) > 0
    assert arithmetic(own, settings).is_floating_point
    return 1 << 20


def _loaded(folder: Path, changed: dict[str, bytes]) -> int:
    """A model that is taken gives finite numbers."""
    own = _model(folder, changed)
    base = load_base(own, ModelSettings(path=str(own), device="cpu", dtype="float32"))
    ids = torch.tensor([[1, 2, 3]])
    try:
        logits = base.model(input_ids=ids).logits
    except (ValueError, IndexError, RuntimeError, TypeError):
        raise RecipeError("a forward pass says so") from None
    assert logits.shape[:2] == (1, 3)
    return 1 << 22


def _tokenizer(folder: Path, changed: dict[str, bytes]) -> int:
    """A tokenizer that is taken gives numbers, and its template text, or an error in one line."""
    own = _model(folder, changed)
    tokenizer = load_tokenizer(ModelSettings(path=str(own)))
    assert all(type(number) is int for number in tokenizer("a text").input_ids)
    template = Template(tokenizer, {}, "forget.messages")
    rendered = render(Conversation(read_conversation(CONVERSATION, "row 1")), template, "row 1")
    assert all(0 <= start <= stop <= len(rendered.text) for start, stop in rendered.scored)
    return 1 << 20


TARGETS = (
    Target("configuration", _described, _configuration, 100),
    Target("model", _described, _loaded, 30),
    Target("tokenizer", _tokenized, _tokenizer, 120),
)
