"""Completions of prompts by the judged model: batched by length, with a cache of keys and values, kept as they come.

They are written to the stage's folder batch after batch, so that a killed run goes on where it stopped and all
evaluations with the same prompts and settings share one set of texts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator

from spunge.data.samples import start_once
from spunge.data.template import Template
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench
from spunge.files import append_text, fingerprint, parse_json, sealed, unsealed, write_text
from spunge.model.board import batched
from spunge.model.loading import Base
from spunge.model.padding import grouped, left_padded
from spunge.model.reading import reading_of
from spunge.recipe.block import Strict
from spunge.temporary import TemporaryFolder

Prompt = str | list[int]  # a text, or its tokens as they are to be read
TOKENS_PER_BATCH = 6144  # prompts and what is written after them, padding included


class GenerationSettings(Strict):
    """How a model completes a prompt."""

    max_new_tokens: int = Field(50, ge=1, description="Tokens of a completion, at most.")
    samples: int = Field(
        1,
        ge=1,
        description="Completions of each prompt; RealToxicityPrompts takes 25. More than 1 needs a temperature.",
    )
    temperature: float | None = Field(None, gt=0, description="Of sampling. Default: greedy decoding.")
    seed: int = Field(0, ge=0, description="Of what is sampled: with another the same model writes other completions.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of sampling.")
    repetition_penalty: float = Field(1.0, gt=0, description="Of tokens that were there before; 1: none.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="No run of so many tokens comes twice; 0: any may.")
    min_new_tokens: int = Field(0, ge=0, description="The end is not written before so many tokens.")
    chat: bool = Field(False, description="Put the prompt into the model's chat template, as the user's message.")
    max_prompt: int = Field(
        1024,
        ge=1,
        description="Tokens of a prompt; a longer one loses its start, behind the start token, as does one that leaves no room for "
        "the completion in a model with learned positions.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What writes the completions; vllm needs a GPU and the package vllm."
    )

    @model_validator(mode="after")
    def _several_differ(self) -> "GenerationSettings":
        if self.samples > 1 and self.temperature is None:
            raise ValueError("samples: greedy decoding gives the same completion every time; set temperature")
        if self.seed and self.temperature is None:
            raise ValueError("seed: greedy decoding draws nothing; set temperature, or leave seed out")
        return self


class Writes(Protocol):
    """Settings of an evaluation that lets the model write."""

    @property
    def generation(self) -> GenerationSettings:
        """How prompts are completed."""


def told(settings: Writes) -> dict[str, Any]:
    """How completions are made, as results tell it; runs are compared only where it is the same."""
    return {"generation": settings.generation.model_dump(mode="json")}


def written_tokens(settings: Writes) -> int:
    """Tokens that the model writes for each prompt, at the most."""
    return settings.generation.samples * settings.generation.max_new_tokens


def completions(base: Base, prompts: Sequence[Prompt], settings: GenerationSettings, bench: Bench) -> list[list[str]]:
    """Each prompt's completions, decoded without special tokens; a completion ends at the end token or at the limit."""
    key: dict[str, Any] = {"model": bench.model, "prompts": list(prompts), "settings": settings.model_dump(mode="json")}
    if settings.temperature is not None:
        key["seed"] = bench.seed
    file = bench.folder / f"texts-{fingerprint(key)[:16]}.jsonl"
    texts_of_row = _written(file, len(prompts))
    if len(texts_of_row) < len(prompts):
        write = _with_vllm if settings.engine == "vllm" else _with_transformers
        for rows, texts in write(base, prompts, settings, bench.seed + settings.seed, set(texts_of_row)):
            lines = []
            for row, text in zip(rows, texts, strict=True):
                if row in texts_of_row:  # of a batch that was written in part
                    continue
                texts_of_row[row] = text
                line = {"row": row, "prompt": _shown(base, prompts[row]), "texts": text}
                lines.append(json.dumps(sealed(line), ensure_ascii=False) + "\n")
            append_text(file, "".join(lines))
            bench.progress(len(texts_of_row), len(prompts))
    bench.kept.add(file)
    return [texts_of_row[index] for index in range(len(prompts))]


def _shown(base: Base, prompt: Prompt) -> str:
    """A prompt as people read it, beside its completions."""
    return prompt if isinstance(prompt, str) else str(base.tokenizer.decode(prompt, skip_special_tokens=True))


def _written(file: Path, count: int) -> dict[int, list[str]]:
    """What an earlier run wrote; a line that it could not finish, or that was changed since, is taken out of the file."""
    kept: dict[int, list[str]] = {}
    if not file.is_file():
        return kept
    whole = []
    # Not splitlines: a completion may hold other line breaks of Unicode's.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            content = unsealed(parse_json(line)) or {}
        except ValueError:
            continue
        row, texts = content.get("row"), content.get("texts")
        if type(row) is int and 0 <= row < count and isinstance(texts, list) and all(map(_is_text, texts)):
            kept[row] = texts
            whole.append(line + "\n")
    write_text(file, "".join(whole))
    return kept


def _is_text(value: object) -> bool:
    return isinstance(value, str)


Written = Iterator[tuple[list[int], list[list[str]]]]  # rows and the completions of each


def _with_transformers(
    base: Base, prompts: Sequence[Prompt], settings: GenerationSettings, seed: int, done: set[int]
) -> Written:
    coded = [prompt_ids(base, prompt, settings) for prompt in prompts]
    sizes = [len(ids) + settings.max_new_tokens for ids in coded]
    pad, ends = _special(base)
    plain = plain_generation(settings, pad, ends)
    # Batches are the same whatever is done, each with a seed of its own: a run that goes on where it stopped
    # writes what it would have written.
    budget = max(max(sizes), TOKENS_PER_BATCH // settings.samples)
    groups = grouped(sizes, budget, alike=not reading_of(base).padded)
    missing = (rows for rows in groups if not done.issuperset(rows))

    given = ToWrite(coded, pad, plain, seed)
    for rows, written in batched(base, missing, sizes, _continued, given, max(coded, key=len), "evaluate.generation"):
        owners = [coded[row] for row in rows for _ in range(settings.samples)]
        texts = [_decoded(base, ids, _until(new, ends)) for ids, new in zip(owners, written, strict=True)]
        yield list(rows), [texts[at : at + settings.samples] for at in range(0, len(texts), settings.samples)]


class ToWrite(NamedTuple):
    """Prompts in tokens, and how they are continued. plain: transformers' GenerationConfig."""

    coded: list[list[int]]
    pad: int
    plain: Any
    seed: int


def _continued(base: Base, asked: ToWrite, rows: Sequence[int]) -> list[list[int]]:
    """The tokens that follow each prompt of a batch."""
    with (
        _seeded(base, asked.seed * 1_000_003 + rows[0]),
        torch.inference_mode(),
        _whole_rows(base),
        _generating(base.model, asked.plain),
    ):
        ids, mask = left_padded([asked.coded[row] for row in rows], asked.pad)
        out = base.model.generate(input_ids=ids.to(base.device), attention_mask=mask.to(base.device))
    written: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return written


def streamed(base: Base, prompt: str, settings: GenerationSettings, hear: Callable[[str], None]) -> str:
    """One completion of a prompt; `hear` is told each piece of it as soon as its letters are certain."""
    from transformers import TextStreamer

    pieces: list[str] = []

    def told(text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        hear(text)

    pad, ends = _special(base)
    ids = torch.tensor([prompt_ids(base, prompt, settings)], device=base.device)
    telling = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    telling.on_finalized_text = told
    with (
        _seeded(base, settings.seed),
        torch.inference_mode(),
        _generating(base.model, plain_generation(settings, pad, ends)),
    ):
        base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=telling)
    return "".join(pieces)


def plain_generation(settings: GenerationSettings, pad: int, ends: Sequence[int]) -> Any:
    """What the recipe asks for and nothing else: a checkpoint's own generation_config may hold penalties, bans of repeated
    words, forced or suppressed tokens and minimum lengths, with which greedy decoding would not be greedy."""
    from transformers import GenerationConfig

    sampled = settings.temperature is not None
    chosen = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampled else {}
    if settings.no_repeat_ngram_size:
        chosen["no_repeat_ngram_size"] = settings.no_repeat_ngram_size
    if settings.min_new_tokens:
        chosen["min_new_tokens"] = settings.min_new_tokens
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.samples,
        do_sample=sampled,
        repetition_penalty=settings.repetition_penalty,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
        **chosen,
    )


@contextmanager
def _generating(model: Any, config: Any) -> Iterator[None]:
    """Inside the block, the model generates by `config` alone: transformers fills what a call leaves open from the model's own."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _with_vllm(
    base: Base, prompts: Sequence[Prompt], settings: GenerationSettings, seed: int, done: set[int]
) -> Written:
    """The judged weights, written to a folder of their own for vllm to load."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise RecipeError(
            "evaluate.generation.engine: vllm is not installed; pip install vllm, or leave engine out"
        ) from None
    with TemporaryFolder("judged") as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        engine = LLM(model=str(folder), dtype=str(base.dtype).removeprefix("torch."), seed=seed)
        parameters = SamplingParams(
            n=settings.samples,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature or 0.0,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            min_tokens=settings.min_new_tokens,
        )
        coded = [{"prompt_token_ids": prompt_ids(base, prompt, settings)} for prompt in prompts]
        outputs = engine.generate(coded, parameters)
        yield list(range(len(prompts))), [[each.text for each in output.outputs] for output in outputs]


def prompt_ids(base: Base, prompt: Prompt, settings: GenerationSettings) -> list[int]:
    """A prompt's tokens, at least one."""
    if not isinstance(prompt, str):
        ids = prompt
    elif settings.chat:
        template = Template(base.tokenizer, base.template, "evaluate.generation.chat")
        text = template.asking([{"role": "user", "content": prompt}], "evaluate.generation.chat")
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = start_once(base.tokenizer(prompt)["input_ids"], base.tokenizer)
        # Some tokenizers close every text with an end token, after which there is nothing to write.
        if len(ids) > 1 and ids[-1] == base.tokenizer.eos_token_id:
            ids = ids[:-1]
    most = settings.max_prompt
    if base.positions is not None:
        most = min(most, base.positions - settings.max_new_tokens)
        if most < 1:
            raise RecipeError(
                f"evaluate.generation.max_new_tokens: {settings.max_new_tokens}: the model has {base.positions} positions; "
                "give fewer"
            )
    return _last(list(ids), most, base.tokenizer)


def _last(ids: list[int], most: int, tokenizer: Any) -> list[int]:
    """The last `most` of a prompt's tokens behind its start token, which stays where it has one; of no tokens, one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not ids:
        return [next((int(each) for each in (bos, eos) if each is not None), 0)]
    kept = ids[-most:]
    return [bos, *kept[1:]] if len(ids) > most > 1 and ids[0] == bos else kept


def _special(base: Base) -> tuple[int, list[int]]:
    """The padding's id (masked everywhere, so any would do) and the ids that end a text."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ends = [end for end in dict.fromkeys([*listed, base.tokenizer.eos_token_id]) if end is not None]
    pad = base.tokenizer.pad_token_id
    return (ends[0] if ends else 0) if pad is None else pad, ends


def _decoded(base: Base, prompt: list[int], written: list[int]) -> str:
    """What was written, as it reads after its prompt: decoded alone, some tokenizers drop the space before the first word."""
    before = base.tokenizer.decode(prompt, skip_special_tokens=True)
    whole = base.tokenizer.decode([*prompt, *written], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(base.tokenizer.decode(written, skip_special_tokens=True))


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _whole_rows(base: Base) -> Iterator[None]:
    """Inside the block, the output layer is given contiguous states.

    transformers gives it a slice, the last position of a batch's prompts; on CPUs torch then multiplies row by row, with a copy
    of the layer's weights for each (3 of 6 seconds for 80 prompts of SmolLM2-135M).
    """
    hooks = [
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
        for head in base.heads
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _seeded(base: Base, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed % (1 << 63))
        yield
