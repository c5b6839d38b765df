"""What the models of a run answer is what transformers' own generation gives for their folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation.generation import GenerationSettings
from spunge.run.asking import Asking
from variety import loaded

PROMPT = "tokyo france italy"
BRIEF = GenerationSettings(max_new_tokens=12)


def greedy(folder: Path, prompt: str) -> str:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), loaded(folder, "AutoModelForCausalLM")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_each_models_answer_is_its_folders_own_and_comes_in_pieces(finished: Path, tiny: Callable[..., Path]) -> None:
    asking, pieces = Asking(finished), []
    assert asking.names == ["base", "control:joint", "merged"]
    base, _joint, merged = asking.models
    first = asking.answer(base, PROMPT, BRIEF)
    assert first.strip() == greedy(tiny("llama"), PROMPT).strip()
    after = asking.answer(merged, PROMPT, BRIEF, pieces.append)
    assert after.strip() == greedy(finished / "merged", PROMPT).strip()
    assert "".join(pieces) == after
    assert len(pieces) > 1
    assert asking.answer(base, PROMPT, BRIEF) == first  # nothing of the merged model is left over the base
    asking.close()


def test_what_is_drawn_depends_on_the_seed_alone(finished: Path) -> None:
    asking = Asking(finished, ["base"])
    drawn = [
        asking.answer(asking.models[0], PROMPT, BRIEF.model_copy(update={"temperature": 2.0, "seed": seed}))
        for seed in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    asking.close()


def test_a_model_that_is_not_there_is_refused_with_those_that_are(finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"'branch:none' is no model of this run; finished are base, .*merged"):
        Asking(finished, ["branch:none"])
    (finished / "merged" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="--stage: 'merged' is not finished; finished are base"):
        Asking(finished, ["merged"])
    assert Asking(finished).names == ["base", "control:joint"]
    with pytest.raises(RecipeError, match=r"holds no recipe\.yaml"):
        Asking(finished.parent)
