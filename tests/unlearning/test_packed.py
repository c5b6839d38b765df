"""LoRA beside a base that is packed in 4 or 8 bits: the delta is exactly what was trained, in the checkpoint's names and shapes."""

import copy
import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench
from spunge.model.loading import Base, load_base
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import LoRA as LoRASettings
from spunge.registry import EVALUATORS, METHODS
from spunge.run.stages.building import build
from spunge.unlearning.finetuning import teach
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.quick.products import is_adapted, product_of
from spunge.unlearning.trained import training, training_tensors
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta, write_delta
from spunge.weights.overlay import applied
from spunge.weights.packed import is_packed, unpacked
from toys import ANSWERING, ANSWERING_BOTH, WORDS, texts

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="spunge[quant]")
PLAIN = Samples(pa.table({"text": texts("a", 8)}))
KEPT = Samples(pa.table({"text": texts("other", 8)}))
PAIRS = Samples(
    pa.table({"prompt": texts("a", 8), "completion": [f" {text}" for text in texts("b", 8)], "refusal": texts("c", 8)})
)
LORA = {"kind": "lora", "rank": 4, "targets": "all-linear"}
# Without dropout of its own, and with a checkpoint that has (in, out).
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def settings_of(folder: Path, bits: Any = None, dtype: Any = "float32") -> ModelSettings:
    return ModelSettings(path=str(folder), dtype=dtype, train_in=bits)


def as_it_stands(base: Base, plain: Base) -> Base:
    """The plain model with the values that the packed one's weights stand for."""
    model = copy.deepcopy(plain.model)
    values = {path: unpacked(module) for path, module in base.model.named_modules() if is_packed(module)}
    assert values
    for path, value in values.items():
        model.get_submodule(path).weight.data = value.float().contiguous()
    return replace(plain, model=model)


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path]) -> Callable[..., tuple[Base, Base]]:
    """pair("llama", "4bit") -> a packed base, and the same with the values that it stands for; the same ones each time."""
    made: dict[tuple[str, str], tuple[Base, Base]] = {}

    def of(architecture: str, bits: str) -> tuple[Base, Base]:
        if (architecture, bits) not in made:
            folder = tiny(architecture, **(GPT2 if architecture == "gpt2" else {}))
            packed = load_base(folder, settings_of(folder, bits))
            made[architecture, bits] = packed, as_it_stands(packed, load_base(folder, settings_of(folder)))
        return made[architecture, bits]

    return of


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 13)[None]).logits.float()


def task_of(base: Base, method: str, **changes: Any) -> Task:
    return Task(
        base,
        {"a": PAIRS if method in ANSWERING else PLAIN},
        PAIRS if method in ANSWERING_BOTH else KEPT,
        {"a": 1},
        **changes,
    )


def unlearned(base: Base, method: str, progress: Any = lambda *_: None, **changes: Any) -> Branch:
    given = {"method": method, "steps": 2, "epochs": None, "batch_size": 4, "learning_rate": 0.01, "trainable": LORA}
    settings = METHODS.get(method).settings(**{**given, "max_damage": None, **changes})
    return METHODS.get(method).unlearn(task_of(base, method, progress=progress), settings)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_packed_base_has_the_checkpoints_names_and_nearly_its_outputs(
    tiny: Callable[..., Path], base_of: Callable[..., Path], tokenizer_folder: Path, architecture: str, bits: str
) -> None:
    from transformers import AutoModelForCausalLM

    from spunge.model.names import stored_names
    from spunge.model.packing import hollow, load_packed

    folder = base_of(architecture) if architecture == "mixtral" else tiny(architecture)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = stored_names(plain, Checkpoint(folder))
    loading = (AutoModelForCausalLM, folder, plain.config, torch.float32, False, torch.device("cpu"), bits)
    packed = load_packed(*loading).eval()
    assert any(map(is_packed, packed.modules()))
    found = stored_names(packed, Checkpoint(folder), hollow(AutoModelForCausalLM, plain.config, False))
    assert found == expected
    apart = (logits(packed) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < apart < 0.5


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_packed_base_computes_outside_of_training_what_it_does_in_it(
    pair: Callable[..., tuple[Base, Base]], bits: str
) -> None:
    """Else a reference would be another model than the one that is trained."""
    base, _ = pair("gpt2", bits)
    for model in (base.model, copy.deepcopy(base.model)):
        assert torch.equal(logits(model.eval()), logits(model.train()))
        model.eval()


@needs_bitsandbytes
def test_a_layer_that_is_not_the_checkpoints_is_no_tensor_of_it(tiny: Callable[..., Path]) -> None:
    from spunge.model.names import stored_names

    plain, packed = load_base(tiny(), settings_of(tiny())), load_base(tiny(), settings_of(tiny(), "4bit"))
    layer = packed.model.model.layers[1].self_attn
    layer.q_proj, layer.o_proj = layer.o_proj, layer.q_proj
    found = stored_names(packed.model, Checkpoint(tiny()), plain.model).names
    odd = {f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "o_proj")}
    assert set(plain.names) - set(found) == odd


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_beside_a_packed_base_compute_in_the_form_that_holds_the_inputs_once(
    pair: Callable[..., tuple[Base, Base]], architecture: str, bits: str
) -> None:
    base, _ = pair(architecture, bits)
    with training(base, LoRASettings(rank=4, targets="all-linear"), 0) as trained:
        adapted = [module for module in trained.model.modules() if is_adapted(module)]
        assert len(adapted) == sum(map(is_packed, base.model.modules())) > 0
        assert all("forward" in vars(module) and product_of(module) is not None for module in adapted)


ON_LLAMA = sorted(set(METHODS.builtin) - {"precomputed"})
KEYWORDS = {"kind": "keywords", "words": WORDS[::2]}
OWN: dict[str, dict[str, Any]] = {
    "quark": {"scorer": KEYWORDS, "tokens": 4, "samples": 2, "quantiles": 2, "labels": ["one"]}
}
QUICK = {"dpo", "ga", "graddiff", "npo", "rmu", "sku", "tvn"}
TRAINED = [
    *(
        pytest.param(method, "llama", bits, OWN.get(method, {}), marks=() if method in QUICK else pytest.mark.thorough)
        for method, bits in zip(ON_LLAMA, itertools.cycle(["4bit", "8bit"]), strict=False)
    ),
    ("rmu", "llama", "4bit", {"layer": 2}),
    ("rmu", "llama", "8bit", {"layer": 2}),
    ("npo", "gpt2", "4bit", {"retain_loss": "kl"}),
    ("npo", "gpt2", "8bit", {"reference": "stored"}),
]


@needs_bitsandbytes
@pytest.mark.parametrize(("method", "architecture", "bits", "changes"), TRAINED)
def test_the_weights_that_it_stands_for_and_the_delta_are_the_trained_model(
    pair: Callable[..., tuple[Base, Base]],
    tmp_path: Path,
    method: str,
    architecture: str,
    bits: str,
    changes: dict[str, Any],
) -> None:
    base, stands_for = pair(architecture, bits)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    trained = torch.empty(0)

    def progress(step: int, steps: int, note: str) -> None:
        nonlocal trained
        if step == steps:
            was_training = base.model.training
            base.model.eval()
            trained = logits(base.model)
            base.model.train(was_training)

    branch = unlearned(base, method, progress, **changes)
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
    stored = Checkpoint(base.folder).tensors
    for name, change in branch.changes.items():
        assert tuple(change.shape) == stored[name].shape
    if method in ("tvn", "sku"):  # what was learned is subtracted: laid over with its sign turned
        branch = replace(
            branch, changes={name: each._replace(scale=-each.scale) for name, each in branch.changes.items()}
        )
    write_delta(tmp_path / "delta", branch.changes, {"base": Checkpoint(base.folder).fingerprint()})
    untrained = logits(base.model)
    with applied(stands_for.parameters, open_delta(tmp_path / "delta")):
        laid = logits(stands_for.model)
    moved = (trained - untrained).norm()
    assert (laid - trained).norm() < 1e-3 * moved


@needs_bitsandbytes
def test_activations_computed_again_beside_a_packed_base_give_the_same(
    pair: Callable[..., tuple[Base, Base]],
) -> None:
    base, _ = pair("llama", "4bit")
    one, other = (unlearned(each, "npo") for each in (base, replace(base, checkpoint_activations=True)))
    for name, change in one.changes.items():
        assert torch.equal(other.changes[name].B, change.B)  # type: ignore[union-attr]


@needs_bitsandbytes
def test_teaching_beside_packed_weights_teaches(tiny: Callable[..., Path]) -> None:
    base = load_base(tiny(), settings_of(tiny(), "4bit", "bfloat16"))
    settings = TeachSettings(source="rows.jsonl", steps=2, epochs=None, learning_rate=0.01, trainable=LORA)
    branch = teach(Task(base, {"": PLAIN}, None, {"": 1}, setting="teach"), settings)
    assert all(change.B.dtype == torch.float32 and change.B.any() for change in branch.changes.values())  # type: ignore[union-attr]


@needs_bitsandbytes
def test_tensors_in_full_cannot_be_trained_beside_packed_weights(
    pair: Callable[..., tuple[Base, Base]],
) -> None:
    base, _ = pair("llama", "4bit")
    with (
        pytest.raises(
            RecipeError, match=r"^model.train_in: 4bit: LoRA alone .* set unlearn.trainable to \{kind: lora\}"
        ),
        training_tensors(base, ["model.norm.weight"]),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unlearn": {"method": "npo", "trainable": {"kind": "all"}}}, r"LoRA alone .* set unlearn.trainable"),
        ({"unlearn": {"method": "rmu"}}, r"LoRA alone .* set unlearn.trainable"),
        (
            {"unlearn": {"method": "rmu", "layer": "auto", "trainable": LORA}},
            r"unlearn.layer: auto is chosen by trials",
        ),
        ({"teach": {"source": "rows.jsonl"}}, r"LoRA alone .* set teach.trainable"),
        ({"controls": ["sequential"]}, r"the control sequential changes the weights"),
    ],
)
def test_what_cannot_be_trained_beside_packed_weights_is_refused_with_the_recipe(
    toy_recipe: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    toy_recipe["model"]["train_in"] = "4bit"
    recipe = {**toy_recipe, "unlearn": {"method": "npo"}, "controls": [], **changes}
    with pytest.raises(RecipeError, match=rf"model.train_in: 4bit: {said}"):
        load_recipe(recipe)


def test_without_bitsandbytes_packed_weights_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setattr("spunge.recipe.training.find_spec", lambda package: None)
    toy_recipe["model"]["train_in"] = "8bit"
    recipe = {**toy_recipe, "unlearn": {"method": "npo", "steps": 1}}
    with pytest.raises(RecipeError, match=r"^model.train_in: '8bit' needs bitsandbytes; pip install 'spunge\[quant\]'"):
        spunge.run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.thorough
@needs_bitsandbytes
def test_a_run_trains_beside_packed_weights_and_merges_into_and_judges_those_that_are_not(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    toy_recipe["model"]["train_in"] = "4bit"
    unlearn = {"method": "npo", "steps": 2, "batch_size": 4, "learning_rate": 0.01, "trainable": LORA}
    judged = [
        {
            "kind": "perplexity",
            "name": "texts",
            "source": toy_recipe["forget"]["source"],
            "text": "text",
            "limit": 2,
            "subject": "both",
        }
    ]
    recipe = {**toy_recipe, "unlearn": unlearn, "controls": [], "evaluate": judged}
    results = spunge.run(recipe, tmp_path / "run")
    told = json.loads(next((tmp_path / "run" / "branches").glob("*/delta.json")).read_text())
    assert told["train_in"] == "4bit"
    assert told["notes"]["base"].startswith("in 4 bits (nf4")
    merged = Checkpoint(tmp_path / "run" / "merged")
    plain = Checkpoint(Path(toy_recipe["model"]["path"]))
    assert {name: info.shape for name, info in merged.tensors.items()} == {
        name: info.shape for name, info in plain.tensors.items()
    }
    # The base's score is that of the weights as they are.
    items = build(load_recipe(recipe), tmp_path / "run").base.evaluations[0]
    base = load_base(Path(toy_recipe["model"]["path"]), settings_of(toy_recipe["model"]["path"]))
    (told_of, *_) = EVALUATORS.get("perplexity").measure(
        base, items.settings, items.table, Bench("base", "", Path(), Path())
    )
    score = next(
        row.value
        for row in results.rows
        if row.stage == "base" and row.metric == told_of.metric and row.subject == "both"
    )
    assert score == pytest.approx(float(np.exp(told_of.numerator.sum() / told_of.denominator.sum())), rel=1e-6)
    keys = [
        build(load_recipe({**recipe, "model": {**recipe["model"], "train_in": bits}}), tmp_path / "run").graph.key(name)
        for bits in (None, "4bit", "8bit")
        for name in ("branch:europe",)
    ]
    assert len(set(keys)) == 3
