"""The recipes of TOFU, MUSE and RWKU, run end to end at toy size by `--set` alone, on rows with the Hub data's columns."""

import json
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import spunge
from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.recipe.loading import load_recipe, recipe_file
from spunge.recipe.rows import Source
from spunge.report.published import published
from spunge.report.scores import arranged
from spunge.report.wording import MISSING
from toys import ROOT, texts

TOFU, NEWS, BOOKS, RWKU = "locuslab/TOFU", "muse-bench/MUSE-News", "muse-bench/MUSE-Books", "jinzhuoran/RWKU"
RECIPES = ["tofu-by-author", "muse-news", "muse-books", "rwku"]
RUNS = [pytest.param(name, marks=() if name == "muse-books" else pytest.mark.thorough) for name in RECIPES]
PEOPLE = ["Stephen King", "Confucius", "Somebody Else"]


def answers(topic: str, count: int, *more: str) -> pa.Table:
    columns = {name: texts(f"{topic} {name}", count) for name in ("question", "answer", *more)}
    return pa.table(columns)


def with_wrong(table: pa.Table) -> pa.Table:
    wrong = [texts(f"wrong {row}", 3) for row in range(table.num_rows)]
    return table.append_column("perturbed_answer", pa.array(wrong, pa.list_(pa.string())))


def plain(topic: str, count: int, sentences: int = 1) -> pa.Table:
    lines = texts(topic, count * sentences)
    return pa.table({"text": [" ".join(lines[row * sentences : (row + 1) * sentences]) for row in range(count)]})


def verbatim(topic: str) -> pa.Table:
    return pa.table({"prompt": texts(f"{topic} prompt", 6), "gt": [f" {text}" for text in texts(f"{topic} gt", 6)]})


def about_people(topic: str) -> pa.Table:
    probes = {"subject": PEOPLE * 2, "query": texts(f"{topic} query", 6), "answer": texts(f"{topic} answer", 6)}
    return pa.table({**probes, "level": ["2"] * 6})


def muse(corpus: str, articles: int, sentences: int) -> dict[tuple[str, str, str], pa.Table]:
    return {
        (corpus, "raw", "forget"): plain(f"{corpus} forget", articles, sentences),
        (corpus, "raw", "retain1"): plain(f"{corpus} retain", 8, sentences),
        (corpus, "knowmem", "forget_qa"): answers(f"{corpus} knowmem", 6),
        (corpus, "knowmem", "retain_qa"): answers(f"{corpus} retain", 6),
        (corpus, "verbmem", "forget"): verbatim(corpus),
        (corpus, "privleak", "forget"): plain(f"{corpus} member", 8),
        (corpus, "privleak", "holdout"): plain(f"{corpus} unseen", 8),
    }


HUB: dict[tuple[str, str, str], pa.Table] = {
    (TOFU, "full", "train"): answers("tofu", 80),
    (TOFU, "forget10_perturbed", "train"): with_wrong(answers("tofu", 40, "paraphrased_answer")),
    (TOFU, "retain_perturbed", "train"): with_wrong(answers("kept", 8, "paraphrased_answer")),
    (TOFU, "real_authors_perturbed", "train"): with_wrong(answers("authors", 8)),
    (TOFU, "world_facts_perturbed", "train"): with_wrong(answers("facts", 8)),
    **muse(NEWS, 8, 1),
    **muse(BOOKS, 2, 12),
    (RWKU, "train_positive_llama3", "train"): pa.table({"subject": PEOPLE * 4, "text": texts("people", 12)}),
    **{(RWKU, f"forget_level{level}", "test"): about_people(f"level {level}") for level in (1, 2, 3)},
    **{(RWKU, f"neighbor_level{level}", "test"): about_people(f"neighbours {level}") for level in (1, 2)},
}
# Of fewer rows than the benchmark has: which are to be forgotten, and what the parts are then.
FEWER = {
    "tofu-by-author": ["forget.where=row >= 40", "retain.where=row < 40", "evaluate.0.by=2 + row // 20"],
    "muse-news": ["split.by=row // 2"],
    "muse-books": ["unlearn.steps=2"],
    "rwku": ["split.values=[Stephen King, Confucius]"],
}
PARTS = {
    "tofu-by-author": {"2": 20, "3": 20},
    "muse-news": dict.fromkeys("0123", 2),
    "muse-books": {"0": 1, "1": 1},
    "rwku": {"Stephen King": 4, "Confucius": 4},
}


def content_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))
    return content


def hub_sources(name: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Where in the recipe a source is, and what it takes from the Hub."""
    content = content_of(name)
    blocks = {"forget": content["forget"], "retain": content.get("retain", {})}
    blocks |= {f"evaluate.{number}": entry for number, entry in enumerate(content["evaluate"])}
    for where, block in blocks.items():
        for key in ("source", "non_members"):
            if key in block:
                yield f"{where}.{key}", tuple(block[key][each] for each in ("hub", "config", "split"))


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """finished(name) -> the results of a recipe's toy run; each is run once."""
    folder, made = tmp_path_factory.mktemp("hub"), {}

    def run(name: str) -> Any:
        if name not in made:
            made[name] = spunge.run(
                load_recipe(name, toy_size(name, folder, tiny)), tmp_path_factory.mktemp("runs") / name
            )
        return made[name]

    return run


def toy_size(name: str, folder: Path, tiny: Callable[..., Path]) -> list[str]:
    found = [f"model.path={tiny('llama', initializer_range=0.3)}", "model.dtype=float32", *FEWER[name]]
    for number, (where, place) in enumerate(hub_sources(name)):
        file = folder / f"{name}-{number}.parquet"
        pq.write_table(HUB[place], file)
        found += [f"{where}.hub=null", f"{where}.path={file}"]
    content = content_of(name)
    if "reference" in content:
        found.append(f"reference.path={tiny('llama', initializer_range=0.25)}")
    if name != "muse-books":
        found += ["unlearn.epochs=null", "unlearn.steps=2"]
    found += ["unlearn.batch_size=2", "unlearn.accumulation=1", "unlearn.max_length=48"]
    for number, entry in enumerate(content["evaluate"]):
        found += [f"evaluate.{number}.limit=8"]
        found += [f"evaluate.{number}.generation.max_new_tokens=4"] if "generation" in entry else []
        found += [f"evaluate.{number}.max_length=48"] if "max_length" in entry else []
    return found


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_from_the_rows_to_the_report(finished: Callable[[str], Any], name: str) -> None:
    results, content = finished(name), content_of(name)
    split = json.loads((results.folder / "split.json").read_text())
    assert {part["value"]: part["selected"] for part in split["parts"]} == PARTS[name]
    references = [f"reference:{content['reference']['name']}"] if "reference" in content else []
    judged = {"base", *references, *(f"control:{control}" for control in content["controls"]), "merged"}
    for entry in content["evaluate"]:
        [described] = [each for each in results.evaluations if each.name == entry["name"]]
        rows = [row for row in results.rows if row.evaluation == described.name]
        assert {row.stage for row in rows} == judged
        assert all(math.isfinite(row.value) for row in rows)
    for name_of_aggregate in content.get("aggregates", {}):
        assert [row for row in results.rows if row.evaluation == name_of_aggregate]
    assert "</html>" in (results.folder / "report.html").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_every_published_figure_is_one_that_the_run_measures(finished: Callable[[str], Any], name: str) -> None:
    lines, entries = published(arranged(finished(name))), load_recipe(name).published
    assert len(lines) == len(entries) == {"tofu-by-author": 8, "rwku": 0}.get(name, 11)
    assert [line for line in lines if line.ours == MISSING] == []


@pytest.mark.parametrize("name", RUNS)
def test_what_is_to_be_forgotten_is_wanted_down_and_what_is_kept_up(finished: Callable[[str], Any], name: str) -> None:
    wanted = {(row.subject, row.metric): row.wanted for row in finished(name).rows if row.stage == "merged"}
    expected = {
        "tofu-by-author": {
            ("2", "ROUGE-L recall"): "down",
            ("forget10", "ROUGE-L recall"): "down",
            ("retain", "ROUGE-L recall"): "up",
        },
        "rwku": {("Confucius", "ROUGE-L recall"): "down", ("questions on neighbours", "ROUGE-L recall"): "up"},
    }.get(
        name,
        {
            ("KnowMem", "ROUGE-L F1"): "down",
            ("utility", "ROUGE-L F1"): "up",
            ("privacy", "AUROC of min-40%"): "near",
            ("all", "PrivLeak"): "near",
        },
    )
    assert {key: wanted[key] for key in expected} == expected


def test_the_hubs_rows_give_the_authors_by_their_number(shared: Path) -> None:
    """TOFU's rows are 20 an author, in order: `row // 20` is what the column of the local rows says."""
    files = {name: shared / "tofu" / name for name in ("full.jsonl", "forget10_perturbed.jsonl")}
    recipe = content_of("tofu-by-author")
    asked = {"full.jsonl": recipe["split"]["by"], "forget10_perturbed.jsonl": recipe["evaluate"][0]["by"]}
    for name, by in asked.items():
        query = Query(read_rows([Source(path=str(files[name]), row_number="number")], "x"))
        told = query.values(by.replace("row", "number"), "x")["value"].to_pylist()
        assert told == [str(author) for author in query.records.table["author"].to_pylist()]


def test_the_small_recipe_has_the_settings_of_our_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    experiment = import_module("tofu").settings(Path("tofu"))
    assert experiment["model"]["path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert content_of("tofu-small") == experiment
