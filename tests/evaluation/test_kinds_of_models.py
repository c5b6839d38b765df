"""Judging on architectures that read in ways of their own: scores and texts are those of the model run on one text alone."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spunge.data.samples import IGNORED, Encoded
from spunge.errors import RecipeError
from spunge.evaluation.attacks.direction import ablated
from spunge.evaluation.attacks.lens import read_after
from spunge.evaluation.choices import all_likelihoods
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.likelihood import likelihoods
from spunge.model.architecture import find_blocks, hidden_of
from spunge.model.loading import Base, load_base
from spunge.model.reading import Reading, reading_of
from spunge.progress import SILENT
from spunge.recipe.model import ModelSettings
from toys import ROOT

HOW = {
    "llama": Reading(True, True),
    "gpt2": Reading(True, True),
    "gemma2": Reading(True, True),  # a sliding window
    "bloom": Reading(True, False),  # takes no positions
    "mamba": Reading(True, False),  # a state in place of keys and values
    "jamba": Reading(True, False),
    "falcon_h1": Reading(True, False),  # a state beside keys and values
    "qwen3_next": Reading(True, False),
    "openai-gpt": Reading(True, False),  # no cache
    "bart": Reading(False, False),  # counts positions itself
    "kosmos-2.5": Reading(False, False),  # takes positions and leaves them out of account
    "rwkv": Reading(False, False),  # reads what is masked
}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """tiny_base("mamba") -> a random model of that kind."""
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "scripts" / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules["tiny_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)

    def load(kind: str) -> Base:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        made.tiny_model(kind).save_pretrained(folder)
        made.write_tokenizer(folder)
        return load_base(folder, ModelSettings(path=str(folder), dtype="float32"))

    return load


def alone(base: Base, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logs: torch.Tensor = (
            base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        )
    return logs


def continued(base: Base, prompt: str, count: int) -> str:
    """The greedy completion, by a forward pass of everything for each token."""
    ids = list(base.tokenizer(prompt)["input_ids"])
    before = base.tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(count):
        best = int(alone(base, ids)[-1].argmax())
        if best == base.tokenizer.eos_token_id:
            break
        ids.append(best)
    return str(base.tokenizer.decode(ids, skip_special_tokens=True)[len(before) :])


@pytest.mark.parametrize("kind", HOW)
def test_scores_and_texts_are_those_of_one_text_alone(
    tiny_base: Callable[[str], Base], tmp_path: Path, kind: str
) -> None:
    base = tiny_base(kind)
    assert reading_of(base) == HOW[kind]
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for length in (5, 23, 40):
        prompt = torch.randint(7, 250, (length,), generator=generator).tolist()
        for more in (1, 3, 3, 6):
            candidate = torch.randint(7, 250, (more,), generator=generator).tolist()
            encoded.append(Encoded(prompt + candidate, [IGNORED] * length + candidate))
    expected = []
    for text in encoded:
        logs = alone(base, text.ids)
        scored = [at for at, label in enumerate(text.labels) if label != IGNORED]
        expected.append(sum(float(logs[at - 1, text.ids[at]]) for at in scored))
    for scores in (all_likelihoods(base, encoded, [4] * 3, SILENT.step), likelihoods(base, encoded, SILENT.step)):
        assert [score.log for score in scores] == pytest.approx(expected, abs=1e-3)
    prompts = ["ab", "a longer prompt of words", "and one that is the longest of all of them by far"]
    written = completions(base, prompts, GenerationSettings(max_new_tokens=6), Bench("base", "x", tmp_path, tmp_path))
    assert [text for [text] in written] == [continued(base, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "openai-gpt", "jamba"])
@torch.no_grad()
def test_no_block_writes_along_a_direction_that_is_ablated(tiny_base: Callable[[str], Base], kind: str) -> None:
    model, ids = tiny_base(kind).model, torch.randint(7, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    seen: list[torch.Tensor] = []
    size = model.get_input_embeddings().embedding_dim
    unit = torch.nn.functional.normalize(torch.randn(size, generator=torch.Generator().manual_seed(1)), dim=0)
    with ablated(model, unit):
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, output: seen.append(hidden_of(output)))
            for block in find_blocks(model)
        ]
        changed = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(find_blocks(model))
    assert max(float((states @ unit).abs().max()) for states in seen) < 1e-5
    assert not torch.allclose(changed, plain, atol=1e-4)
    with read_after(model, len(find_blocks(model)) - 1):
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet", "paligemma"])
def test_a_model_that_sees_what_it_predicts_is_not_judged(
    tiny_base: Callable[[str], Base], tmp_path: Path, kind: str
) -> None:
    base = tiny_base(kind)
    with pytest.raises(RecipeError, match="sees the tokens after the one that it predicts, so it gives no likelihoods"):
        likelihoods(base, [Encoded([5, 6, 7], [IGNORED, 6, 7])], SILENT.step)
    with pytest.raises(RecipeError, match="sees the tokens after the one that it predicts"):
        completions(base, ["ab"], GenerationSettings(max_new_tokens=2), Bench("base", "x", tmp_path, tmp_path))


@pytest.mark.parametrize(
    "kind", ["gpt2", "opt", "gptj", "codegen", "ctrl", "mpt", "openai-gpt", "roberta", "camembert"]
)
def test_a_model_reads_as_many_tokens_as_it_has_positions(tiny_base: Callable[[str], Base], kind: str) -> None:
    base = tiny_base(kind)
    assert base.positions is not None
    assert alone(base, [5] * base.positions).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        alone(base, [5] * (base.positions + 1))
