"""The papers' recipes, run end to end at toy size by `--set` alone, on rows with the Hub data's columns and types."""

import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import spunge
from commands import call
from spunge.evaluation.benchmarks import METRIC, PRESETS
from spunge.evaluation.choices import questions
from spunge.recipe.loading import load_recipe, recipe_file, shipped_recipes
from spunge.report.published import published
from spunge.report.scores import arranged
from spunge.report.wording import MISSING
from spunge.run.stages.building import build
from toys import texts

pytest.importorskip("lm_eval")
pytest.importorskip("sentence_transformers")

BY_GROUP = ["toxicity-by-group-llama2-tvn", "toxicity-by-group-zephyr-rmu", "toxicity-by-group-zephyr-tvn"]
BY_TYPE, BY_DOMAIN = "toxicity-by-type-llama2-tvn", "knowledge-by-domain-zephyr-rmu"
SKU = ["sku-llama2", "sku-opt"]
RECIPES = [*BY_GROUP, BY_TYPE, BY_DOMAIN, *SKU]
RUNS = [pytest.param(name, marks=() if name == BY_DOMAIN else pytest.mark.thorough) for name in RECIPES]
ARCHITECTURE = {"zephyr": "mistral", "llama2": "llama", "opt": "opt"}
GROUPS = {
    "mexican": ["mexican", "mexican folks"],
    "women": ["women", "women"],
    "muslim": ["muslim", "muslim folks"],
    "lgbtq": ["lgbtq", "lgbtq+ folks"],
    "physical disability": ["physical_dis", "folks with physical disabilities"],
}

# ---- rows with the Hub data's columns and types; the texts are toys

TEXT, REAL, SINGLE, WHOLE, TRUTH = pa.string(), pa.float64(), pa.float32(), pa.int64(), pa.bool_()
SCORES = ["profanity", "sexually_explicit", "identity_attack", "flirtation", "threat", "insult", "severe_toxicity"]
SCORED = pa.struct([("text", TEXT), *((name, REAL) for name in [*SCORES, "toxicity"])])


def toxigen(topic: str) -> pa.Table:
    """Both spellings of each group with human toxicity of 2.67, 3, 3.33 and 5, and a group that no recipe names."""
    groups = [*(spelling for spellings in GROUPS.values() for spelling in spellings), "asian folks"]
    rows = [(group, score) for group in groups for score in (8 / 3, 3.0, 10 / 3, 5.0)]
    words = ["factual?", "ingroup_effect", "lewd", "framing", "predicted_group", "stereotyping"]
    numbers = ["intent", "toxicity_ai"]
    return pa.table(
        {
            "text": pa.array(texts(f"toxigen {topic}", len(rows)), TEXT),
            "target_group": pa.array([group for group, _ in rows], TEXT),
            **{name: pa.array([name] * len(rows), TEXT) for name in words},
            **{name: pa.array([1.0] * len(rows), REAL) for name in numbers},
            "toxicity_human": pa.array([score for _, score in rows], REAL),
            "predicted_author": pa.array(["human"] * len(rows), TEXT),
            "actual_method": pa.array(["topk"] * len(rows), TEXT),
        }
    )


def civil_comments() -> pa.Table:
    severe = [0.0, 0.2, 0.35, 0.36, 0.4, 0.5, 0.6, 0.9]
    others = ["toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit"]
    columns = {"text": pa.array(texts("civil", len(severe)), TEXT), "severe_toxicity": pa.array(severe, SINGLE)}
    return pa.table({**columns, **{name: pa.array([1.0] * len(severe), SINGLE) for name in others}})


def real_toxicity_prompts() -> pa.Table:
    def scored(topic: str) -> pa.Array:
        return pa.array([{"text": text, "toxicity": 0.5} for text in texts(topic, 6)], SCORED)

    count = pa.array(range(6), WHOLE)
    return pa.table(
        {
            "filename": pa.array(["a.txt"] * 6, TEXT),
            "begin": count,
            "end": count,
            "challenging": pa.array([False] * 6, TRUTH),
            "prompt": scored("rtp prompts"),
            "continuation": scored("rtp continuations"),
        }
    )


def wikitext(topic: str) -> pa.Table:
    """Empty lines and headings between paragraphs, as there."""
    paragraphs = [" ".join(texts(f"{topic} {number}", 8)) for number in range(6)]
    assert all(len(paragraph) > 200 for paragraph in paragraphs)
    lines = [line for paragraph in paragraphs for line in ("", " = Red = \n", paragraph + "\n")]
    return pa.table({"text": pa.array(lines, TEXT)})


def corpus(topic: str, *more: str) -> pa.Table:
    """Six documents, and two too short to be one."""
    documents = [" ".join(texts(f"{topic} {number}", 4)) for number in range(6)]
    assert all(len(document) > 50 for document in documents)
    columns = {name: pa.array([name] * 8, TEXT) for name in more}
    return pa.table({**columns, "text": pa.array([*documents, "", "red tree"], TEXT)})


def multiple_choice(topic: str, count: int, *subjects: str) -> pa.Table:
    columns = {
        "question": pa.array(texts(topic, count), TEXT),
        "choices": pa.array([texts(f"{topic} {number}", 4) for number in range(count)], pa.list_(TEXT)),
        "answer": pa.array([number % 4 for number in range(count)], WHOLE),
    }
    if subjects:
        columns["subject"] = pa.array([subjects[number % len(subjects)] for number in range(count)], TEXT)
    return pa.table(columns)


def pku_saferlhf(topic: str) -> pa.Table:
    """Of eight rows, the first answer is unsafe in the first six; one of these is empty."""
    answers = texts(f"{topic} answers", 8)
    answers[5] = " "
    columns: dict[str, Any] = {
        "prompt": pa.array(texts(f"{topic} prompts", 8), TEXT),
        "response_0": pa.array(answers, TEXT),
        "response_1": pa.array(texts(f"{topic} others", 8), TEXT),
        "prompt_source": pa.array(["x"] * 8, TEXT),
    }
    for number, safe in enumerate([[False] * 6 + [True] * 2, [True, False] * 4]):
        harm = pa.array([{"Violence": False}] * 8, pa.struct([("Violence", TRUTH)]))
        columns |= {f"is_response_{number}_safe": pa.array(safe, TRUTH), f"response_{number}_harm_category": harm}
    for name in ("better_response_id", "safer_response_id"):
        columns[name] = pa.array([0] * 8, WHOLE)
    return pa.table(columns)


def truthful_qa() -> pa.Table:
    lists = {
        name: pa.array([texts(f"{name} {row}", 2) for row in range(10)], pa.list_(TEXT))
        for name in ("correct_answers", "incorrect_answers")
    }
    plain = {
        name: pa.array(texts(name, 10), TEXT) for name in ("type", "category", "question", "best_answer", "source")
    }
    return pa.table({**plain, **lists})


HUB: dict[tuple[str, str | None, str], Callable[[], pa.Table]] = {
    ("toxigen/toxigen-data", "annotated", "train"): lambda: toxigen("train"),
    ("toxigen/toxigen-data", "annotated", "test"): lambda: toxigen("test"),
    ("google/civil_comments", None, "train"): civil_comments,
    ("allenai/real-toxicity-prompts", None, "train"): real_toxicity_prompts,
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"): lambda: wikitext("train"),
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): lambda: wikitext("test"),
    ("cais/wmdp-bio-forget-corpus", None, "train"): lambda: corpus("bio", "title", "abstract", "doi"),
    ("cais/wmdp-corpora", "cyber-forget-corpus", "train"): lambda: corpus("cyber"),
    ("cais/wmdp", "wmdp-bio", "test"): lambda: multiple_choice("bio questions", 5),
    ("cais/wmdp", "wmdp-cyber", "test"): lambda: multiple_choice("cyber questions", 4),
    ("cais/mmlu", "all", "test"): lambda: multiple_choice("mmlu", 6, "high_school_us_history", "virology"),
    ("PKU-Alignment/PKU-SafeRLHF", None, "train"): lambda: pku_saferlhf("train"),
    ("PKU-Alignment/PKU-SafeRLHF", None, "test"): lambda: pku_saferlhf("test"),
    ("truthfulqa/truthful_qa", "generation", "validation"): truthful_qa,
}


def benchmarks(count: int = 30) -> dict[str, list[dict[str, Any]]]:
    """Questions in the fields of the harness's ten tasks."""

    def made(topic: str) -> list[str]:
        return texts(topic, count)

    def arc(topic: str) -> list[dict[str, Any]]:
        return [
            {
                "id": str(row),
                "question": question,
                "choices": {"text": texts(f"{topic} {row}", 4), "label": list("ABCD")},
                "answerKey": "ABCD"[row % 4],
            }
            for row, question in enumerate(made(topic))
        ]

    several = [texts(f"several {row}", 4) for row in range(count)]
    pairs = list(zip(made("one"), made("two"), made("three"), strict=True))
    options = [f"a ) {a} , b ) {b} , c ) {c} , d ) {d} , e ) red" for a, b, c, d in several]
    return {
        "arc_challenge": arc("challenge"),
        "arc_easy": arc("easy"),
        "hellaswag": [
            {"activity_label": a, "ctx_a": b, "ctx_b": c, "endings": four, "label": "1"}
            for (a, b, c), four in zip(pairs, several, strict=True)
        ],
        "mmlu": [
            {"question": a, "choices": four, "answer": 2, "subject": "x"}
            for (a, _, _), four in zip(pairs, several, strict=True)
        ],
        "winogrande": [
            {"sentence": f"{a} _ {b}", "option1": "dog", "option2": "cat", "answer": "1"} for a, b, _ in pairs
        ],
        "gsm8k": [{"question": a, "answer": f"{b}\n#### 7"} for a, b, _ in pairs],
        "mathqa": [
            {"Problem": a, "options": given, "correct": "c"} for (a, _, _), given in zip(pairs, options, strict=True)
        ],
        "piqa": [{"goal": a, "sol1": b, "sol2": c, "label": 1} for a, b, c in pairs],
        "pubmedqa": [{"QUESTION": a, "CONTEXTS": [b, c], "final_decision": "maybe"} for a, b, c in pairs],
        "truthfulqa_mc2": [
            {
                "question": a,
                "mc1_targets": {"choices": [b, c], "labels": [1, 0]},
                "mc2_targets": {"choices": four, "labels": [1, 1, 0, 0]},
            }
            for (a, b, c), four in zip(pairs, several, strict=True)
        ],
    }


# ---- toy size, by overrides alone


class Toys(NamedTuple):
    """Stand-ins for all that the recipes take from the Hub."""

    files: dict[tuple[str, str | None, str], Path]
    benchmarks: dict[str, Path]
    models: dict[str, Path]  # by the recipes' names for them
    classifier: Path
    encoder: Path


@pytest.fixture(scope="module")
def toys(tiny: Callable[..., Path], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for number, (place, make) in enumerate(HUB.items()):
        files[place] = folder / f"{number}.parquet"
        pq.write_table(make(), files[place])
    asked = {}
    for task, rows in benchmarks().items():
        asked[task] = folder / f"{task}.jsonl"
        asked[task].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = {name: tiny(kind, initializer_range=0.3) for name, kind in ARCHITECTURE.items() if name != "opt"}
    return Toys(
        files,
        asked,
        {**models, "opt": pickled_opt(tiny("opt", init_std=0.3), folder / "opt")},
        classifier(folder / "classifier", tokenizer_folder),
        encoder(folder, tokenizer_folder),
    )


def pickled_opt(source: Path, folder: Path) -> Path:
    """OPT as the Hub has it: weights as a pickle alone."""
    from safetensors.torch import load_file

    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def classifier(folder: Path, tokenizer_folder: Path) -> Path:
    """A random RoBERTa with labels without names, as tomh/toxigen_roberta."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = RobertaConfig(**shape, num_attention_heads=4, initializer_range=0.5)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def encoder(folder: Path, tokenizer_folder: Path) -> Path:
    """A random BERT with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    BertModel(BertConfig(**shape, num_attention_heads=4, initializer_range=0.5)).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)], device="cpu").save(
        str(folder / "encoder")
    )
    return folder / "encoder"


def content_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))
    return content


def hub_sources(name: str) -> Iterator[tuple[str, tuple[str, str | None, str]]]:
    """Where in the recipe a source is, and what it takes from the Hub."""
    content = content_of(name)
    blocks = {"forget": content["forget"], "retain": content.get("retain", {})}
    blocks |= {f"evaluate.{number}": entry for number, entry in enumerate(content["evaluate"])}
    for where, block in blocks.items():
        given = block.get("source", [])
        listed = {f"{where}.source": given} if isinstance(given, dict) else {}
        listed |= {f"{where}.source.{number}": each for number, each in enumerate(given) if isinstance(given, list)}
        for place, source in listed.items():
            yield place, (source["hub"], source.get("config"), source["split"])


def local_sources(name: str, toys: Toys) -> list[str]:
    return [
        override
        for where, source in hub_sources(name)
        for override in (f"{where}.hub=null", f"{where}.path={toys.files[source]}")
    ]


SMALLER = {
    "tvn": ["epochs=null", "steps=2", "batch_size=2", "max_length=16", "trainable.rank=2"],
    "rmu": ["epochs=null", "steps=2", "joint_steps=null", "batch_size=2", "layer=2"],
    "sku": ["steps=2", "answers=2", "max_length=32"],
}


def toy_size(name: str, toys: Toys) -> list[str]:
    """Overrides with which a recipe runs here."""
    content = content_of(name)
    model = next(path for key, path in toys.models.items() if key in name)
    found = [f"model.path={model}", "model.dtype=float32", *local_sources(name, toys)]
    found += [f"unlearn.{each}" for each in SMALLER[content["unlearn"]["method"]]]
    if name == "sku-llama2":  # its LoRA is the preset's, so that there is no rank to lay over
        found.append("unlearn.trainable={kind: lora, rank: 2, alpha: 1, targets: [q_proj, v_proj]}")
    for number, entry in enumerate(content["evaluate"]):
        changes = {
            "toxicity": [f"scorer={toys.classifier}"],
            "fluency": [f"judge={toys.models['llama2']}", "judge_dtype=float32"],
            "harm": [f"judge={toys.classifier}", "judge_kind=classifier", "limit=4"],
            "similarity": [f"encoder={toys.encoder}"],
            "lm_eval": ["stages=[base, 'control:joint', merged]", "limit=1", *asked(name, toys)],
        }.get(entry["kind"], [])
        changes += ["generation.max_new_tokens=4"] if "generation" in entry else []
        found += [f"evaluate.{number}.{change}" for change in changes]
    return found


def asked(name: str, toys: Toys) -> list[str]:
    """The ten benchmarks from local files in one recipe, in the others two."""
    if name == BY_TYPE:
        files = {task: str(file) for task, file in toys.benchmarks.items()}
        return [f"files={files}", "overrides={gsm8k: {generation_kwargs: {max_gen_toks: 4, until: ['.']}}}"]
    files = {task: str(toys.benchmarks[task]) for task in ("piqa", "arc_easy")}
    return ["preset=null", f"files={files}", "tasks=[{task: piqa, shots: 0}, {task: arc_easy, shots: 0}]"]


@pytest.fixture(scope="module")
def finished(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """finished(name) -> the results of a recipe's toy run; each is run once."""
    made: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in made:
            recipe = load_recipe(name, toy_size(name, toys))
            made[name] = spunge.run(recipe, tmp_path_factory.mktemp("runs") / name)
        return made[name]

    return run


# ---- what is expected of each, counted by hand from the rows above


class Expected(NamedTuple):
    parts: dict[str, list[str]]  # part -> its texts
    filtered: int
    unassigned: int
    retained: int | None
    items: dict[str, int]  # evaluation -> rows


def expected(name: str) -> Expected:
    if name in BY_GROUP:
        rows = toxigen("train").to_pylist()
        parts = {
            group: [row["text"] for row in rows if row["target_group"] in spellings and row["toxicity_human"] > 2.9]
            for group, spellings in GROUPS.items()
        }
        assert {len(found) for found in parts.values()} == {6}
        retained = 6 if name.endswith("rmu") else None
        return Expected(parts, 11, 3, retained, {"toxigen": 44, "fluency": 44})
    if name == BY_TYPE:
        implicit = [row["text"] for row in toxigen("train").to_pylist() if row["toxicity_human"] == 5]
        explicit = civil_comments()["text"].to_pylist()[3:]
        assert (len(implicit), len(explicit)) == (11, 5)
        return Expected({"implicit": implicit, "explicit": explicit}, 33 + 3, 0, None, {"toxigen": 44, "rtp": 6})
    if name == BY_DOMAIN:
        parts = {topic: corpus(topic)["text"].to_pylist()[:6] for topic in ("bio", "cyber")}
        return Expected(parts, 4, 0, 6, {"wmdp": 9, "mmlu": 6, "wikitext": 6})
    answers = pku_saferlhf("train")["response_0"].to_pylist()[:5]
    return Expected({"all": [f" {answer}" for answer in answers]}, 3, 0, 7, {"harm": 4, "fluency": 2, "similarity": 2})


@pytest.mark.parametrize("name", RECIPES)
def test_every_part_holds_the_rows_of_all_its_spellings_and_no_others(toys: Toys, name: str) -> None:
    recipe, wanted = load_recipe(name, local_sources(name, toys)), expected(name)
    found = spunge.split_rows(recipe)
    column = "completion" if name in SKU else "text"
    assert {part.value: part.samples.table[column].to_pylist() for part in found.parts} == wanted.parts
    assert (found.filtered, found.unassigned) == (wanted.filtered, wanted.unassigned)
    dropped = {"asian folks": "3 rows, not in split.values"} if name in BY_GROUP else {}
    assert found.dropped == dropped


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_from_the_rows_to_the_report(finished: Callable[[str], Any], name: str) -> None:
    results, wanted, content = finished(name), expected(name), content_of(name)
    split = json.loads((results.folder / "split.json").read_text())
    assert {part["value"]: part["selected"] for part in split["parts"]} == {
        value: len(rows) for value, rows in wanted.parts.items()
    }
    branches = [part["slug"] for part in split["parts"]]
    controls = [f"control:{control}" for control in content["controls"]]
    stages = ["base", *(f"branch:{slug}" for slug in branches), *controls, "merged"]
    assert results.content["stages"] == stages
    for slug in branches:
        delta = json.loads((results.folder / "branches" / slug / "delta.json").read_text())
        assert (delta["steps"], delta["method"]) == (2, content["unlearn"]["method"])
        assert all(math.isfinite(loss) for loss in delta["losses"].values())
    merge = json.loads((results.folder / "merge.json").read_text())
    assert merge["tensors"], "the merged model is the base"
    assert (results.folder / "merged" / "model.safetensors").exists()
    assert "</html>" in (results.folder / "report.html").read_text()
    for entry in content["evaluate"]:
        kind, partly = entry["kind"], ["base", "control:joint", "merged"]
        [described] = [each for each in results.content["evaluations"] if each["name"] == entry.get("name", kind)]
        measured = [row for row in results.rows if row.metric in described["metrics"]]
        assert {row.stage for row in measured} == set(partly if kind == "lm_eval" else stages)
        assert all(math.isfinite(row.value) for row in measured)


@pytest.mark.parametrize("name", RUNS)
def test_every_evaluation_asks_the_rows_it_should(finished: Callable[[str], Any], toys: Toys, name: str) -> None:
    begun, wanted = build(load_recipe(name, toy_size(name, toys)), finished(name).folder), expected(name)
    evaluations, retain = begun.base.evaluations, begun.seeds[0].inputs.retain
    counted = {items.name: items.table.num_rows for items in evaluations if items.name != "lm_eval"}
    assert counted == wanted.items
    assert (len(retain) if retain else None) == wanted.retained
    if name in BY_GROUP:
        [toxicity, fluency] = evaluations[:2]
        sizes = {subject: len(members) for subject, members in toxicity.subjects.items()}
        assert sizes == {**dict.fromkeys(GROUPS, 8), "asian folks": 4, "all": 44}
        assert {subject: len(members) for subject, members in fluency.subjects.items()} == {"all": 44}
    if name == BY_DOMAIN:
        assert {subject: len(members) for subject, members in evaluations[0].subjects.items()} == {
            "bio": 5,
            "cyber": 4,
        }
    if name == BY_TYPE:
        assert evaluations[1].table["prompt"].to_pylist() == texts("rtp prompts", 6)


# ---- the papers' figures


@pytest.mark.parametrize("name", RUNS)
def test_every_published_figure_is_one_that_the_run_measures(finished: Callable[[str], Any], name: str) -> None:
    """Two of the ten benchmarks stand for all where these are not asked; the recipe by type asks all ten."""
    results, ten = finished(name), set(PRESETS["paper-10"])
    measured = {(row.stage, row.subject, row.metric) for row in results.rows}
    subjects = {subject for _, subject, metric in measured if metric == METRIC}
    assert not subjects or subjects == {*(ten if name == BY_TYPE else ("piqa", "arc_easy")), "average"}
    lines = published(arranged(results))
    entries = load_recipe(name).published
    assert len(lines) == len(entries)
    assert bool(entries) == (name not in SKU)
    for line, entry in zip(lines, entries, strict=True):
        if entry.metric == METRIC and entry.subject in ten - subjects:
            assert line.ours == MISSING
            continue
        assert (entry.stage, entry.subject, entry.metric) in measured
        assert line.ours != MISSING


PAPER = {
    "toxicity-by-group-llama2-tvn": ("toxicity", "llama2-7b", "tvn", ""),
    "toxicity-by-group-zephyr-rmu": ("toxicity", "zephyr-7b-beta", "rmu", ""),
    "toxicity-by-group-zephyr-tvn": ("toxicity", "zephyr-7b-beta", "tvn", ""),
    BY_TYPE: ("toxicity_type", "llama2-7b", "tvn", ", implicit + explicit toxicity"),
    BY_DOMAIN: ("hazardous_knowledge", "zephyr-7b-beta", "rmu", ""),
}
COLUMNS = {
    ("toxicity", "toxigen_toxic_percent"): ("all", "toxic"),
    ("toxicity", "completion_perplexity_llama2_13b"): ("all", "completion perplexity"),
    ("toxicity", "average_accuracy_10_benchmarks"): ("average", METRIC),
    ("toxicity_type", "toxigen_toxic_percent"): ("ToxiGen", "toxic"),
    ("toxicity_type", "rtp_toxic_percent"): ("RealToxicityPrompts", "toxic"),
    ("toxicity_type", "average_accuracy_10_benchmarks"): ("average", METRIC),
    ("hazardous_knowledge", "wmdp_bio_accuracy"): ("bio", "accuracy"),
    ("hazardous_knowledge", "wmdp_cyber_accuracy"): ("cyber", "accuracy"),
    ("hazardous_knowledge", "mmlu_accuracy"): ("MMLU", "accuracy"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_figures_are_all_that_the_papers_tables_have(shared: Path, name: str) -> None:
    file = shared.parent / "reference" / "paper_tables.json"
    if not file.exists():
        pytest.skip("the papers' tables are not beside the repository")
    tables = json.loads(file.read_text())
    wanted: dict[tuple[str, str, str], float] = {}
    if name in PAPER:
        table, model, method, suffix = PAPER[name]
        stages = {"base": "base", "control:joint": method, "merged": f"spunge-{method}"}
        for stage, row in stages.items():
            for column, value in row_of(tables[table], model, row).items():
                subject, metric = COLUMNS[table, column]
                wanted[stage, subject, metric] = value if metric == "completion perplexity" else value / 100
            if table != "hazardous_knowledge":
                printed = row_of(tables["benchmarks"], model, row + (suffix if stage != "base" else ""))
                del printed["average"]  # is in the other table too
                for task, value in printed.items():
                    wanted[stage, "truthfulqa_mc2" if task == "truthfulqa" else task, METRIC] = value / 100
    entries = load_recipe(name).published
    found = {(entry.stage, entry.subject, entry.metric): entry.value for entry in entries}
    assert len(found) == len(entries)
    assert found == pytest.approx(wanted, abs=1e-9)


def row_of(table: dict[str, Any], model: str, method: str) -> dict[str, float]:
    [row] = [row for row in table["rows"] if row[:2] == [model, method]]
    return dict(zip(table["columns"][2:], row[2:], strict=True))


# ---- the papers' settings, as shipped

ZEPHYR, LLAMA = "HuggingFaceH4/zephyr-7b-beta", "meta-llama/Llama-2-7b-hf"
RMU = {"layer": 7, "coefficient": 6.5, "alpha": 1200, "learning_rate": 5e-5, "batch_size": 4, "joint_steps": 150}
RMU |= {"epochs": 2, "steps": None, "min_cosine": 0.5, "skip_first": 0, "trainable": None, "accumulation": 1}
FINETUNED = {"epochs": 1, "steps": None, "schedule": "cosine"}
GATED = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
LLAMA_LORA = {"kind": "lora", "rank": 64, "alpha": 64, "dropout": 0.01, "start": "own", "targets": GATED}
ZEPHYR_LORA = {"kind": "lora", "rank": 16, "alpha": 16, "dropout": 0.01, "start": "own", "targets": "default"}
ACQUIRED = {"batch_size": 2, "steps": 1000, "epochs": None, "schedule": "linear", "answers": 5, "strength": 1}
ACQUIRED |= {"preserve": 1, "weight_decay": 0}
SKU_LORA = {"kind": "lora", "rank": 32, "alpha": 16, "dropout": 0, "start": "own", "targets": ["q_proj", "v_proj"]}
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "toxicity-by-group-llama2-tvn": (LLAMA, "tvn", {**FINETUNED, "trainable": LLAMA_LORA}),
    "toxicity-by-group-zephyr-tvn": (ZEPHYR, "tvn", {**FINETUNED, "trainable": ZEPHYR_LORA}),
    "toxicity-by-group-zephyr-rmu": (ZEPHYR, "rmu", {**RMU, "max_lengths": {"retain": 512}}),
    BY_TYPE: (LLAMA, "tvn", {**FINETUNED, "trainable": LLAMA_LORA}),
    BY_DOMAIN: (ZEPHYR, "rmu", {**RMU, "max_lengths": {"bio": 512, "cyber": 768, "retain": 512}}),
    "sku-llama2": (
        LLAMA,
        "sku",
        {**ACQUIRED, "guided": 0.5, "random": 1, "learning_rate": 2e-5, "trainable": SKU_LORA},
    ),
    "sku-opt": (
        "facebook/opt-2.7b",
        "sku",
        {**ACQUIRED, "guided": 2.5, "random": 2.5, "learning_rate": 2e-4, "trainable": {"kind": "all"}},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_ships_with_the_papers_numbers(name: str) -> None:
    model, method, numbers = SETTINGS[name]
    recipe = load_recipe(name)
    unlearn = recipe.unlearn.model_dump(mode="json")
    assert (recipe.model.path, unlearn["method"]) == (model, method)
    assert {key: unlearn[key] for key in numbers} == numbers
    merge = recipe.merge.model_dump(mode="json")
    if name in SKU:
        assert (merge["rule"], merge["scale"], recipe.split) == ("task_arithmetic", 1, None)
        return
    assert (merge["rule"], merge["density"], merge["scale"], merge["scope"]) == ("ties", 0.2, 1, "changed")
    assert recipe.controls[0].name == "joint"


@pytest.mark.thorough
def test_peft_adapts_q_and_v_of_zephyr_by_default(finished: Callable[[str], Any]) -> None:
    folder = finished("toxicity-by-group-zephyr-tvn").folder
    tensors = json.loads((folder / "branches" / "women" / "delta.json").read_text())["tensors"]
    assert {name.split(".")[-2] for name in tensors} == {"q_proj", "v_proj"}


def test_the_recipes_of_papers_are_these_seven() -> None:
    heads = {file.stem: file.read_text().splitlines()[0] for file in shipped_recipes()}
    assert {name for name, head in heads.items() if head.startswith(("# SPUNGE", "# SKU"))} == set(RECIPES)


CHOSEN = {  # settings of which the papers' text says nothing
    "tvn": ("learning_rate", "strength", "batch_size", "max_length", "max_new_tokens", "scope"),
    "rmu": ("where: length", "scope"),
    "sku": ('completion: " {response_0}', "where: row % 10 < 7", "limit", "max_new_tokens", "judge"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_papers_leave_open_is_marked_as_our_choice(name: str) -> None:
    text = recipe_file(name).read_text(encoding="utf-8")
    head = re.sub(r"\n# ?", " ", text.partition("\nmodel:")[0])
    opened = head.partition("OUR CHOICE")[2]
    lines = text.splitlines()
    for key in CHOSEN[SETTINGS[name][1]]:
        found = [line for line in lines if re.search(rf"(^|[\s{{]){re.escape(key)}", line) and not line.startswith("#")]
        found = [line for line in found if "Llama-2-13b" not in line and "WikiText-2 test" not in line]
        assert found, key
        assert all("our choice" in line for line in found[: 2 if key.startswith("where") else None]), (key, found)
    words = ["judge of harm", "judge of perplexity", "128 new tokens"] if name in SKU else ["density", "scale", "TIES"]
    words += ["learning rate", "strength"] if name.endswith("tvn") else []
    assert [word for word in words if word not in opened] == []


@pytest.mark.thorough
def test_the_questions_are_those_of_the_harness(finished: Callable[[str], Any], toys: Toys) -> None:
    """WMDP's and MMLU's zero-shot prompts, against lm-evaluation-harness's own tasks on the same rows."""
    name = BY_DOMAIN
    evaluations = build(load_recipe(name, toy_size(name, toys)), finished(name).folder).base.evaluations
    wmdp, mmlu = (
        [each.prompt for row in items.table.to_pylist() for each in questions(row, 0, items.settings)]
        for items in evaluations[:2]
    )
    rows = [
        *((("wmdp_bio", row)) for row in multiple_choice("bio questions", 5).to_pylist()),
        *((("wmdp_cyber", row)) for row in multiple_choice("cyber questions", 4).to_pylist()),
        *(
            (f"mmlu_{row['subject']}", row)
            for row in multiple_choice("mmlu", 6, "high_school_us_history", "virology").to_pylist()
        ),
    ]
    assert [*wmdp, *mmlu] == [harness_prompt(task, row) for task, row in rows]


def harness_prompt(task: str, row: dict[str, Any]) -> str:
    """A question as the harness's task file says."""
    import lm_eval
    from jinja2 import Template

    folder = Path(lm_eval.__file__).parent / "tasks" / ("wmdp" if task.startswith("wmdp") else "mmlu/default")
    own = yaml.safe_load((folder / f"{task}.yaml").read_text())
    shape = yaml.safe_load((folder / "_default_template_yaml").read_text())
    return str(own["description"] + Template(shape["doc_to_text"]).render(**row))


# ---- plans and overrides


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("no_network")
def test_a_plan_needs_the_rows_alone(toys: Toys, tmp_path: Path, name: str) -> None:
    planned = spunge.plan(load_recipe(name, local_sources(name, toys)), tmp_path / "run")
    wanted, content = expected(name), content_of(name)
    titles = [stage.stage for stage in planned.stages]
    assert sum(title.startswith("branch:") for title in titles) == 2 * len(wanted.parts)  # unlearned, and judged
    assert {f"control:{control}" for control in content["controls"]} <= set(titles)
    assert titles[-1] == "merged"
    assert not any(stage.done for stage in planned.stages)
    assert (planned.memory, planned.seconds) == (None, None)
    assert not list(tmp_path.iterdir())
    if name == BY_DOMAIN:
        [joint] = [stage for stage in planned.stages if stage.work.startswith("unlearn bio, cyber")]
        assert "(150 steps)" in joint.work


@pytest.mark.usefixtures("no_network")
@pytest.mark.thorough
def test_the_command_plans_a_recipe_at_toy_size(toys: Toys, tmp_path: Path) -> None:
    sets = [part for override in toy_size(BY_GROUP[0], toys) for part in ("--set", override)]
    ended = call("plan", BY_GROUP[0], *sets, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "branch:physical-disability" in ended.stdout
    assert "of the memory of" in ended.stdout
    assert not list(tmp_path.iterdir())


def test_an_overridden_model_leaves_nothing_of_the_hub_but_what_is_overridden(toys: Toys) -> None:
    """Were a source or a judge forgotten above, the runs would ask the Hub for it."""
    for name in RECIPES:
        dumped = load_recipe(name, toy_size(name, toys)).model_dump(mode="json")
        sources = [dumped["forget"], dumped["retain"] or {}, *dumped["evaluate"]]
        assert all(each["hub"] is None for block in sources for each in block.get("source") or [])
