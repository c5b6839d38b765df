"""Unlearning while a larger model decodes: what whole runs judge, export and refuse."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spunge
from commands import call
from picked import few
from spunge.errors import RecipeError
from spunge.recipe.decoding import BY_TEXT
from spunge.recipe.loading import load_recipe
from spunge.registry import ATTACKS
from spunge.results import read_results
from spunge.run.asking import Asking
from spunge.run.exporting import export
from spunge.run.inputs import BaseInputs
from spunge.run.planning.assembling import estimator_of
from spunge.run.planning.devices import device_of
from spunge.run.publishing import package
from spunge.weights.delta import open_delta
from toys import Told

NEW, ALPHA = 6, 8.0


@pytest.fixture(scope="module")
def large(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another width, learned positions, a padded vocabulary, and opinions."""
    folder = tiny("gpt2", n_embd=48, vocab_size=136)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tall = tmp_path_factory.mktemp("large")
    model.save_pretrained(tall)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tall)
    return tall


@pytest.fixture
def decoding(toy_recipe: dict[str, Any], large: Path) -> dict[str, Any]:
    """The toy recipe, whose small model shifts a larger one; it is judged by texts that it reads and writes."""
    questions, texts = toy_recipe["evaluate"]
    written = {"unwanted": "question", "prompt": "question", "generation": {"max_new_tokens": NEW}}
    answers = {"kind": "match", "source": questions["source"], "by": "NULL", "subject": "answers", **written}
    unlearn = {**toy_recipe["unlearn"], "steps": 8, "learning_rate": 0.3, "max_damage": 1e9}
    recipe = {**toy_recipe, "unlearn": unlearn, "evaluate": [questions, texts, answers]}
    return {**recipe, "decode": {"path": str(large), "alpha": ALPHA, "through": "alone"}}


TVN = {"method": "tvn", "steps": 6, "batch_size": 4, "learning_rate": 0.02, "trainable": {"kind": "all"}}
EXPERTS = {"kind": "dexperts", "path": "x"}
GEDI = {"kind": "gedi", "path": "x"}
ALONE = {"path": "x", "through": "alone"}
NPO = {"method": "npo", "steps": 2, "batch_size": 4, "learning_rate": 0.01}
CLASSES = TVN | {"method": "gedi", "desired": "moon", "undesired": "dog", "scale": 2.0}


def large_alone(decoding: dict[str, Any]) -> dict[str, Any]:
    """The block that names the large model, for another kind."""
    return {"path": decoding["decode"]["path"], "alpha": ALPHA}


def read(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@torch.no_grad()
def perplexity(texts: list[str], folder: Path, logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """exp of the mean NLL of every token after a text's first, by logits that are asked for text by text."""
    tokenizer, losses = AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        losses += [torch.nn.functional.cross_entropy(logits(ids)[0, :-1].double(), ids[0, 1:], reduction="none")]
    return float(torch.cat(losses).mean().exp())


def code_in(folder: Path) -> Any:
    """The module that an exported folder holds."""
    file = folder / "offsets.py"
    assert "import spunge" not in (text := file.read_text())
    assert "from spunge" not in text
    spec = importlib.util.spec_from_file_location("exported_offsets", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("merge", few(["mean", "weights"]))
def test_what_is_judged_is_the_large_model_shifted_and_what_is_exported_writes_the_same(
    decoding: dict[str, Any], large: Path, tmp_path: Path, merge: str
) -> None:
    decoding["decode"]["merge"] = merge
    decoding["controls"] = []
    if merge != "weights":
        del decoding["merge"]
    results = spunge.run(decoding, tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out")
    about = json.loads((out / "offsets.json").read_text())
    base, small = read(large), read(about["small"]["path"])
    unlearned = [read(out / name) for name in about["unlearned"]]
    assert len(unlearned) == (1 if merge == "weights" else 2)

    def shifted(ids: torch.Tensor) -> torch.Tensor:
        offset = sum(each(ids).logits - small(ids).logits for each in unlearned) / len(unlearned)
        logits: torch.Tensor = base(ids).logits.clone()
        logits[..., :128] += ALPHA * offset
        return logits

    file = Path(decoding["evaluate"][1]["source"])
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    told = {stage: results.value(stage, "retain", "perplexity") for stage in ("base", "merged")}
    assert told["base"] == pytest.approx(perplexity(texts, large, lambda ids: base(ids).logits), rel=1e-4)
    assert told["merged"] == pytest.approx(perplexity(texts, large, shifted), rel=1e-3)
    assert told["merged"] != pytest.approx(told["base"], rel=0.01)
    [kept] = (tmp_path / "run" / "evaluation" / "merged").glob("texts-*.jsonl")
    judged = [json.loads(line) for line in kept.read_text().splitlines()]
    model, tokenizer = code_in(out).load(out)
    for each in judged:
        ids = tokenizer(each["prompt"], return_tensors="pt")
        greedy = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        before, whole = (
            tokenizer.decode(row, skip_special_tokens=True)
            for row in (ids["input_ids"][0], model.generate(**ids, **greedy)[0])
        )
        assert whole == before + each["texts"][0]
    [plain] = (tmp_path / "run" / "evaluation" / "base").glob("texts-*.jsonl")
    assert [json.loads(line)["texts"] for line in plain.read_text().splitlines()] != [each["texts"] for each in judged]


@pytest.mark.parametrize("merge", few(["mean", "weights"]))
def test_dexperts_add_what_fine_tuning_on_rows_to_keep_and_to_forget_makes_of_the_small_model(
    decoding: dict[str, Any], large: Path, tmp_path: Path, merge: str
) -> None:
    """The experts that are judged are the small model plus what tvn learned: their logits are added in float64 here."""
    decoding["decode"] = large_alone(decoding) | {
        "kind": "dexperts",
        "alpha": 2.0,
        "top_p": 1.0,
        "merge": merge,
    }
    decoding |= {"unlearn": TVN, "controls": [], "evaluate": decoding["evaluate"][1:2]}
    del decoding["merge"]
    if merge == "weights":
        decoding["merge"] = {"rule": "average"}
    results = spunge.run(decoding, tmp_path / "run")
    small = read(decoding["model"]["path"])

    def learned(*folders: str) -> Any:
        model = read(decoding["model"]["path"])
        own = dict(model.named_parameters())
        for folder in folders:
            delta = open_delta(tmp_path / "run" / folder)
            for name in delta.tensors:
                own[name].data -= delta.dense(name).reshape(own[name].shape) / len(folders)
        return model

    branches = ["branches/asia", "branches/europe"]
    antis = [learned(*branches)] if merge == "weights" else [learned(branch) for branch in branches]
    base, expert = read(large), learned("expert")

    def shifted(ids: torch.Tensor) -> torch.Tensor:
        offset = sum(expert(ids).logits - anti(ids).logits for anti in antis) / len(antis)
        logits: torch.Tensor = base(ids).logits.clone()
        logits[..., :128] += 2.0 * offset
        return logits

    texts = [json.loads(line)["text"] for line in Path(decoding["evaluate"][0]["source"]).read_text().splitlines()]
    told = results.value("merged", "retain", "perplexity")
    assert told == pytest.approx(perplexity(texts, large, shifted), rel=1e-3)
    # What it was trained on is likelier to the expert, and less likely to the merged model than to the large one.
    assert perplexity(texts, large, lambda ids: expert(ids).logits) < perplexity(
        texts, large, lambda ids: small(ids).logits
    )
    out = export(tmp_path / "run", tmp_path / "out")
    model, _ = code_in(out).load(out)
    assert perplexity(texts, large, lambda ids: model(ids).logits) == pytest.approx(told, rel=1e-3)


@pytest.mark.parametrize("merge", few(["mean", "weights"]))
def test_gedi_judges_by_bayes_rule_of_its_class_conditional_models(
    decoding: dict[str, Any], large: Path, tmp_path: Path, merge: str
) -> None:
    """P(desired | text) of the models that were trained, in float64, from what the export holds."""
    decoding["decode"] = large_alone(decoding) | {
        "kind": "gedi",
        "alpha": 20.0,
        "rho": 1.0,
        "merge": merge,
    }
    decoding |= {"unlearn": CLASSES, "controls": [], "evaluate": decoding["evaluate"][1:2]}
    del decoding["merge"]
    if merge == "weights":
        decoding["merge"] = {"rule": "average"}
    results = spunge.run(decoding, tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(large)
    codes = [tokenizer(CLASSES[name], add_special_tokens=False)["input_ids"] for name in ("desired", "undesired")]
    models = [read(folder) for folder in sorted(out.glob("unlearned-*"))]
    assert len(models) == (1 if merge == "weights" else 2)
    base = read(large)

    def shifted(ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        logits: torch.Tensor = base(ids).logits.double()
        offset = torch.zeros(length, 128, dtype=torch.float64)
        for model in models:
            joint = []
            for code in codes:
                logs = model(torch.cat([torch.tensor([code]), ids], dim=1)).logits[0, len(code) - 1 :].double()
                logs = logs.log_softmax(-1)
                read_so_far = logs[:length].gather(1, ids.T)[:, 0].cumsum(0)
                joint.append((read_so_far[:, None] + logs[1:]) / torch.arange(2, length + 2)[:, None])
            desired, undesired = (2.0 * each for each in joint)
            offset += (desired - torch.logaddexp(desired, undesired)) / len(models)
        padding = offset.amin(-1, keepdim=True).expand(-1, 8)
        return logits + 20.0 * torch.cat([offset, padding], dim=-1)

    texts = [json.loads(line)["text"] for line in Path(decoding["evaluate"][0]["source"]).read_text().splitlines()]
    told = results.value("merged", "retain", "perplexity")
    plain = perplexity(texts, large, lambda ids: base(ids).logits)
    assert told == pytest.approx(perplexity(texts, large, shifted), rel=1e-3)
    assert told != pytest.approx(plain, rel=0.05)
    model, _ = code_in(out).load(out)
    assert perplexity(texts, large, lambda ids: model(ids).logits) == pytest.approx(told, rel=1e-3)
    merged = next(each for each in results.models if each.stage == "merged")
    assert merged.decode is not None
    assert (merged.decode.kind, merged.decode.rho) == ("gedi", 1.0)


def test_a_model_that_is_shifted_by_its_own_change_scores_as_if_its_weights_had_changed(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """With the small model for the large one and alpha 1 the sum is the unlearned model, whatever is asked of it."""
    decode = {"path": toy_recipe["model"]["path"], "alpha": 1.0, "through": "alone"}
    shifted, plain = spunge.run({**toy_recipe, "decode": decode}, tmp_path / "decoded"), read_results(finished)
    assert [(row.stage, row.subject, row.metric) for row in shifted.rows] == [
        (row.stage, row.subject, row.metric) for row in plain.rows
    ]
    for row, other in zip(shifted.rows, plain.rows, strict=True):
        assert row.value == pytest.approx(other.value, rel=1e-4)
    assert len({row.value for row in plain.rows if row.metric == "perplexity"}) > 3


@pytest.mark.thorough
def test_an_expert_that_is_made_anew_is_judged_anew(decoding: dict[str, Any], tmp_path: Path) -> None:
    decoding["decode"] = large_alone(decoding) | {
        "kind": "dexperts",
        "alpha": 4.0,
        "merge": "sum",
        "top_p": 0.6,
    }
    decoding |= {"unlearn": TVN, "controls": [], "evaluate": decoding["evaluate"][2:]}
    del decoding["merge"]
    spunge.run(decoding, tmp_path / "run")
    decoding["decode"]["expert"] = "small"
    told = Told()
    spunge.run(decoding, tmp_path / "run", told)
    assert {line.partition(":")[0] for line in told.judged} == {"judge branch", "judge merged"}
    kept = sorted((tmp_path / "run" / "evaluation" / "merged").glob("texts-*.jsonl"))
    assert len(kept) == 2
    assert not any(line.startswith("unlearn") for line in told.lines)


def test_another_alpha_is_judged_anew_and_nothing_is_trained_or_asked_of_the_base(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    decoding |= {"controls": [], "evaluate": decoding["evaluate"][1:2]}
    before = spunge.run(decoding, tmp_path / "run")
    told = Told()
    decoding["decode"]["alpha"] = 1.0
    after = spunge.run(decoding, tmp_path / "run", told)
    assert {line.partition(":")[0] for line in told.judged} == {"judge branch", "judge merged"}
    assert not any(line.startswith(("unlearn", "merge")) for line in told.lines)
    assert before.value("merged", "retain", "perplexity") != after.value("merged", "retain", "perplexity")
    merged = next(model for model in read_results(tmp_path / "run").models if model.stage == "merged")
    assert merged.decode is not None
    assert (merged.decode.alpha, merged.decode.merge) == (1.0, None)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "while it decodes (offset)" in page
    asking = Asking(tmp_path / "run", ["merged"])
    assert asking.names == ["merged"]
    with pytest.raises(RecipeError, match="unlearned while decoding, and a small model alone has not the scores"):
        package(tmp_path / "run", "me/it")


def test_a_training_through_the_sum_depends_on_alpha_and_on_the_large_model(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    decoding |= {"controls": [], "evaluate": decoding["evaluate"][1:2], "unlearn": NPO}
    decoding["decode"] |= {"through": "sum", "alpha": 1.0}
    through = spunge.run(decoding, tmp_path / "through")
    merged = next(model for model in through.models if model.stage == "merged")
    assert merged.decode is not None
    assert merged.decode.through == "sum"
    with pytest.raises(RecipeError, match=r"no longer fit \(branch:asia: decode.alpha was 1.0, is 0.5"):
        spunge.run({**decoding, "decode": decoding["decode"] | {"alpha": 0.5}}, tmp_path / "through")
    alone = spunge.run({**decoding, "decode": decoding["decode"] | {"through": "alone"}}, tmp_path / "alone")
    values = [each.value("merged", "retain", "perplexity") for each in (through, alone)]
    assert values[0] != pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teach": {"source": "rows.jsonl", "epochs": 1}}, "teach: beside decode the small model alone"),
        ({"calibrate": {"evaluation": "perplexity", "metric": "perplexity"}}, "calibrate: beside decode"),
        ({"watch": {"evaluation": "perplexity", "metric": "perplexity", "every": 1}}, "watch: beside decode"),
        ({"decode": ALONE | {"density": 0.5}}, "decode.density: merge 'weights' keeps every entry"),
        ({"decode": ALONE | {"merge": "ties"}}, "merge: decode.merge 'ties' merges logits"),
        ({"decode": {"path": "x", "alpha": 0}}, "decode.alpha: 0"),
        (
            {"decode": {"path": "x", "kind": "offst"}},
            "decode.kind: 'offst': it should be one of 'offset', 'dexperts', 'gedi'",
        ),
        ({"decode": {"path": "x", "top_p": 0.5}}, "decode.top_p: no such setting"),
        ({"decode": {"path": "x"}}, "decode.through: sum: 'rmu' is not trained on logits alone"),
        (
            {"decode": {"path": "x"}, "unlearn": NPO, "controls": ["sequential"]},
            "decode.through: sum: sequential starts from a model that is not the small base",
        ),
        (
            {"decode": {"path": "x"}, "unlearn": NPO, "execution": {"kind": "sharded", "processes": 2}},
            "decode.through: sum: processes that train one model together",
        ),
        ({"decode": EXPERTS}, "unlearn.method: 'rmu': the experts of dexperts are what tvn learns"),
        ({"decode": EXPERTS, "unlearn": TVN | {"strength": 2}}, "unlearn.method: 'tvn': .* with a strength of 1"),
        ({"decode": EXPERTS, "unlearn": TVN, "retain": None}, "retain: missing; the expert of dexperts is fine-tuned"),
        ({"decode": EXPERTS, "unlearn": TVN}, "decode.top_p: 0.9: 'choices' scores texts"),
        (
            {"decode": EXPERTS, "unlearn": TVN, "controls": ["sequential"]},
            "controls: anti-experts are not trained in a row",
        ),
        ({"decode": GEDI}, "unlearn.method: 'rmu': what decodes by gedi is a class-conditional model"),
        (
            {"unlearn": CLASSES},
            "unlearn.method: 'gedi': its model tells texts to forget from others and forgets nothing",
        ),
        ({"unlearn": CLASSES, "decode": None}, "unlearn.method: 'gedi': its model tells texts to forget from others"),
        ({"decode": GEDI | {"rho": 1}, "unlearn": CLASSES, "retain": None}, "retain: missing"),
        ({"decode": GEDI, "unlearn": CLASSES}, "decode.rho: 0.2: 'choices' scores texts, and the tokens"),
        (
            {"decode": GEDI, "unlearn": CLASSES, "controls": ["sequential"]},
            "controls: class-conditional models are not trained in a row",
        ),
        ({"attack": "relearn"}, "evaluate.attack: 'relearn choices': relearn needs a model's weights or states"),
        ({"scores": ["loss", "gradient"]}, "evaluate.scores: 'membership': gradient is of one model's weights"),
        ({"engine": "vllm"}, "evaluate.generation.engine: 'match': vllm cannot shift logits"),
    ],
)
def test_what_needs_weights_that_change_is_refused(
    decoding: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    source = decoding["evaluate"][0]["source"]
    match changes:
        case {"attack": kind}:
            decoding["evaluate"].append({"kind": "audit", "attack": kind, "of": "choices"})
        case {"scores": scores}:
            membership = {"kind": "membership", "source": source, "text": "question", "non_members": source}
            decoding["evaluate"].append({**membership, "scores": scores})
        case {"engine": engine}:
            decoding["evaluate"][2]["generation"]["engine"] = engine
        case _:
            decoding |= changes
    with pytest.raises(RecipeError, match=message):
        load_recipe(decoding)


@pytest.mark.parametrize("attack", sorted(set(ATTACKS.builtin) - set(BY_TEXT)))
def test_every_attack_on_weights_or_states_is_refused_in_one_line(decoding: dict[str, Any], attack: str) -> None:
    # Membership is no attack on another evaluation, and reads rows of its own.
    unseen = {"source": decoding["evaluate"][0]["source"]}
    decoding["evaluate"].append(
        {"kind": "audit", "attack": attack, **(unseen if attack == "membership" else {"of": "choices"})}
    )
    with pytest.raises(RecipeError, match=f"{attack} needs a model's weights or states") as refused:
        load_recipe(decoding)
    assert "\n" not in str(refused.value)


def test_a_large_model_with_other_tokens_is_refused_before_anything_is_trained(
    decoding: dict[str, Any], large: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    read(large).save_pretrained(other)
    tokenizer = json.loads((large / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["france"], vocabulary["italy"] = vocabulary["italy"], vocabulary["france"]
    for name in ("tokenizer_config.json",):
        (other / name).write_bytes((large / name).read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    decoding["decode"]["path"] = str(other)
    told = Told()
    with pytest.raises(RecipeError, match=r"decode.path: .* has another vocabulary than model.path"):
        spunge.run(decoding, tmp_path / "run", told)
    assert not any(line.startswith("unlearn") for line in told.lines)


def test_a_plan_counts_the_large_model_and_those_beside_it(
    decoding: dict[str, Any], large: Path, tmp_path: Path
) -> None:
    small, tall = (
        sum(each.numel() for each in read(path).parameters()) * 4 for path in (decoding["model"]["path"], large)
    )
    card = device_of("h100", torch.device("cpu"))

    def judged() -> float:
        return estimator_of(BaseInputs(load_recipe(decoding), tmp_path / "run"), card).judged_weights()

    assert judged() == tall + 2 * small
    del decoding["merge"]
    decoding["decode"]["merge"] = "sum"
    assert judged() == tall + 3 * small
    decoding["unlearn"] = CLASSES
    decoding["decode"] = large_alone(decoding) | {"kind": "gedi", "rho": 1.0, "merge": "sum"}
    assert judged() == tall + 2 * small  # a model for each part, which needs no other beside it
    decoding["unlearn"], decoding["decode"] = NPO, {"path": str(large)}
    trained = estimator_of(BaseInputs(load_recipe(decoding), tmp_path / "run"), card).weights()
    assert trained == tall + small  # through the large model's logits


def test_an_adapter_or_delta_of_the_small_model_is_judged_as_a_shift_and_a_checkpoint_by_itself(
    decoding: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    small = decoding["model"]["path"]
    given = [
        {"name": "delta", "path": str(finished / "branches" / "asia")},
        {"name": "whole", "path": str(finished / "merged")},
    ]
    decoding |= {"judge": given, "controls": [], "evaluate": decoding["evaluate"][1:2]}
    results = spunge.run(decoding, tmp_path / "decoded")
    told = {model.name: model.decode for model in results.models if model.kind == "model"}
    assert told["delta"] is not None
    assert told["whole"] is None
    texts = [json.loads(line)["text"] for line in Path(decoding["evaluate"][0]["source"]).read_text().splitlines()]
    whole, base = read(finished / "merged"), read(decoding["decode"]["path"])
    plain, own = read(small), read(small)
    delta = open_delta(finished / "branches" / "asia")
    for name in delta.tensors:
        dict(own.named_parameters())[name].data += delta.dense(name)

    def shifted(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = base(ids).logits.clone()
        logits[..., :128] += ALPHA * (own(ids).logits - plain(ids).logits)
        return logits

    for stage, logits in (("model:delta", shifted), ("model:whole", lambda ids: whole(ids).logits)):
        expected = perplexity(texts, finished / "merged", logits)
        assert results.value(stage, "retain", "perplexity") == pytest.approx(expected, rel=1e-3)
    decoding["decode"] = large_alone(decoding) | {"kind": "dexperts", "top_p": 1.0}
    decoding["unlearn"] = TVN
    with pytest.raises(
        RecipeError, match=r"judge.0.path: .* changes the small model, and dexperts takes what its own trainings"
    ):
        spunge.run(decoding, tmp_path / "experts")


@pytest.mark.thorough
def test_the_recipe_of_the_docs_runs_as_it_stands(
    decoding: dict[str, Any], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows and settings, on tiny models in place of the two that it names."""
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, rows in re.findall(r"cat > (\w+\.jsonl) <<'ROWS'\n(.*?)ROWS\n", page, re.DOTALL):
        Path(name).write_text(rows)
    recipe = re.search(r"```yaml\n# decoded.yaml\n(.*?)```", page, re.DOTALL)
    assert recipe is not None
    content = recipe[1].replace("HuggingFaceTB/SmolLM2-135M-Instruct", decoding["model"]["path"])
    Path("decoded.yaml").write_text(content.replace("HuggingFaceTB/SmolLM2-1.7B-Instruct", str(large)))
    ended = call("run", "decoded.yaml", "--out", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "model:  the large one, shifted: `spunge export run --out FOLDER` writes what was judged" in ended.stdout
    results = read_results(tmp_path / "run")
    assert {row.subject for row in results.rows if row.stage == "merged"} >= {"asia", "europe", "kept"}


def test_a_run_that_changed_weights_has_nothing_to_export(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="changed weights; its model is"):
        export(finished, tmp_path / "out")
