"""Public benchmarks through lm-evaluation-harness: against our own multiple choice and against plain loops."""

import functools
import json
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation.benchmarks import BENCHMARKS, PRESETS, BenchmarksSettings, Outcome, evened
from spunge.evaluation.choices import CHOICES, ChoicesSettings
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.statistics import score
from spunge.model.offsets import Offsets, Pair, Shift
from spunge.recipe.loading import load_recipe
from toys import texts

pytest.importorskip("lm_eval")

NOTHING = pa.table({})
ACCURACY = "benchmark accuracy"
# Made up, in the fields of the harness's piqa and arc_easy.
PIQA = [
    {"goal": goal, "sol1": one, "sol2": other, "label": at % 2}
    for at, (goal, one, other) in enumerate(
        zip(texts("goals", 14), texts("ones", 14), texts("others", 14), strict=True)
    )
]
ARC = [
    {
        "id": str(at),
        "question": question,
        "choices": {"text": texts(f"options {at}", 5 if at == 0 else 4), "label": list("ABCDE")[: 5 if at == 0 else 4]},
        "answerKey": "ABCD"[at % 4],
    }
    for at, question in enumerate(texts("questions", 10))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own. All tests name this folder, so that the harness reads its index once."""
    place = tmp_path_factory.mktemp("tasks")
    colours = [
        {"q": text, "options": ["red", "blue", "green"], "right": at % 3} for at, text in enumerate(texts("q", 5))
    ]
    sizes = [{"q": text, "options": ["small", "large"], "right": at % 2} for at, text in enumerate(texts("r", 8))]
    plain = [{"text": text} for text in texts("plain", 6)]
    written = [{"q": text, "a": "paris"} for text in texts("w", 3)]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    tasks = {
        "toy_colours": (colours, choice),
        "toy_sizes": (sizes, choice),
        "toy_plain": (plain, rolling),
        "toy_written": (written, generated),
    }
    for name, (rows, config) in tasks.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}}}
        content = {"task": name, "test_split": "test", "tag": "toy_tag" if "colours" in name else [], **data, **config}
        (place / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    for name, weighs in (("toy_sized", True), ("toy_even", False)):
        rule = {"metric": "acc", "aggregation": "mean", "weight_by_size": weighs}
        content = {"group": name, "task": ["toy_colours", "toy_sizes"], "aggregate_metric_list": [rule]}
        (place / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    return place


@pytest.fixture
def local(write_rows: Callable[..., Path], folder: Path) -> dict[str, Any]:
    """Settings that run the harness's own piqa and arc_easy on rows of ours."""
    return {
        "tasks": ["piqa", {"task": "arc_easy", "shots": 0}],
        "files": {
            "piqa": str(write_rows("piqa.jsonl", PIQA)),
            "arc_easy": {"test": str(write_rows("arc.jsonl", ARC))},
        },
        "include_path": [str(folder)],
    }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("base", "a model", tmp_path / "stage", tmp_path / "stage")


def measured(base: Any, settings: dict[str, Any], bench: Bench) -> dict[str, Measure]:
    found = BENCHMARKS.measure(base, BenchmarksSettings(**settings), NOTHING, bench)
    return {str(measure.subject): measure for measure in found}


def value(measure: Measure) -> float:
    return float(measure.numerator.sum() / measure.denominator.sum())


def ours(base: Any, rows: list[dict[str, Any]], bench: Bench, normalize: Any = "characters") -> list[float]:
    """Our own evaluator on the same prompts; the harness's acc_norm divides by a candidate's characters."""
    table = pa.table({key: [row[key] for row in rows] for key in rows[0]})
    return CHOICES.measure(base, ChoicesSettings(normalize=normalize), table, bench)[0].numerator.tolist()


def piqa_rows() -> list[dict[str, Any]]:
    return [
        {"question": f"Question: {row['goal']}\nAnswer:", "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}
        for row in PIQA
    ]


def arc_rows() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Question: {row['question']}\nAnswer:",
            "choices": row["choices"]["text"],
            "answer": "ABCDE".index(row["answerKey"]),
        }
        for row in ARC
    ]


def test_the_harness_and_our_own_multiple_choice_agree_on_every_item_without_a_network(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    base = load()
    found = measured(base, local, bench)
    assert list(found) == ["piqa", "arc_easy", "average"]
    assert {measure.metric for measure in found.values()} == {ACCURACY}
    assert found["piqa"].numerator.tolist() == ours(base, piqa_rows(), bench)
    assert found["arc_easy"].numerator.tolist() == ours(base, arc_rows(), bench)
    assert 0 < value(found["piqa"]) < 1
    assert found["piqa"].chance == 0.5
    assert found["arc_easy"].chance == pytest.approx((9 / 4 + 1 / 5) / 10)


def test_the_average_is_the_plain_mean_of_the_tasks(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench
) -> None:
    found = measured(load(), local, bench)
    mean = (value(found["piqa"]) + value(found["arc_easy"])) / 2
    assert len(found["average"].numerator) == len(PIQA) + len(ARC)
    assert score([found["average"]], range(len(PIQA) + len(ARC))).value == pytest.approx(mean)
    assert found["average"].chance == pytest.approx((0.5 + found["arc_easy"].chance) / 2)  # type: ignore[operator]


def test_evened_scores_have_the_mean_of_the_means() -> None:
    assert evened([[1.0, 0.0, 0.0, 0.0], [1.0]]).mean() == pytest.approx((0.25 + 1.0) / 2)


def test_the_metric_can_be_named(load: Callable[..., Any], local: dict[str, Any], bench: Bench) -> None:
    base = load()
    plain = {**local, "tasks": [{"task": "piqa", "metric": "acc"}], "files": {"piqa": local["files"]["piqa"]}}
    assert measured(base, plain, bench)["piqa"].numerator.tolist() == ours(base, piqa_rows(), bench, "none")
    plain["tasks"][0]["metric"] = "acc_nrm"
    with pytest.raises(RecipeError, match=r"tasks\.metric: 'piqa' has no metric 'acc_nrm'; did you mean 'acc_norm'"):
        measured(base, plain, bench)


def test_overrides_with_a_local_file_do_what_files_do(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench
) -> None:
    base = load()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": local["files"]["piqa"]}}
    given = {"tasks": [{"task": "piqa", "shots": 0}], "include_path": local["include_path"]}
    found = measured(base, {**given, "overrides": {"piqa": {**data, "doc_to_text": "{{goal}} is"}}}, bench)
    rows = [{**row, "question": f"{made['goal']} is"} for row, made in zip(piqa_rows(), PIQA, strict=True)]
    assert found["piqa"].numerator.tolist() == ours(base, rows, bench)


def test_limit_takes_the_first_questions_of_each_task(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench
) -> None:
    base = load()
    local["tasks"][0] = {"task": "piqa", "limit": 3}
    found = measured(base, {**local, "limit": 6}, bench)
    assert found["piqa"].numerator.tolist() == ours(base, piqa_rows()[:3], bench)
    assert found["arc_easy"].numerator.tolist() == ours(base, arc_rows()[:6], bench)


def test_samples_are_logged_when_asked(load: Callable[..., Any], local: dict[str, Any], bench: Bench) -> None:
    measured(load(), local, bench)
    assert not list(bench.folder.glob("samples-*"))
    measured(load(), {**local, "log_samples": True}, bench)
    lines = [json.loads(line) for line in (bench.folder / "samples-piqa.jsonl").read_text().splitlines()]
    assert [line["doc"]["goal"] for line in lines] == [row["goal"] for row in PIQA]
    assert (bench.folder / "samples-arc_easy.jsonl").exists()


def test_examples_come_from_the_train_file_or_from_other_questions(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench, write_rows: Callable[..., Path]
) -> None:
    base = load(max_position_embeddings=512)
    train = str(write_rows("train.jsonl", [{**row, "goal": "small tree"} for row in PIQA]))
    by_split = {"train": train, "validation": local["files"]["piqa"]}
    shots = {"tasks": [{"task": "piqa", "shots": 2}], "include_path": local["include_path"], "log_samples": True}
    for files in (by_split, local["files"]["piqa"]):
        measured(base, {**shots, "files": {"piqa": files}}, bench)
        for line in (bench.folder / "samples-piqa.jsonl").read_text().splitlines():
            sample = json.loads(line)
            prompt = sample["arguments"][0][0]
            assert prompt.count("Answer:") == 3
            assert prompt.count("small tree") == (2 if files is by_split else 0)
            assert prompt.count(f"Question: {sample['doc']['goal']}\n") == 1


def test_tasks_of_a_folder_and_tags_are_subjects(load: Callable[..., Any], folder: Path, bench: Bench) -> None:
    base = load()
    rows = [json.loads(line) for line in (folder / "toy_colours.jsonl").read_text().splitlines()]
    asked = [{"question": row["q"], "choices": row["options"], "answer": row["right"]} for row in rows]
    for named in ("toy_colours", "toy_tag"):
        found = measured(base, {"tasks": [named], "include_path": [str(folder)]}, bench)
        assert list(found) == ["toy_colours", "average"]
        assert found["toy_colours"].numerator.tolist() == ours(base, asked, bench, "none")
        assert found["toy_colours"].chance == pytest.approx(1 / 3)


def test_a_group_is_one_subject_weighted_as_it_says(load: Callable[..., Any], folder: Path, bench: Bench) -> None:
    settings = {"tasks": ["toy_colours", "toy_sizes"], "include_path": [str(folder)]}
    base = load()
    apart = measured(base, settings, bench)
    right = [apart[name].numerator for name in ("toy_colours", "toy_sizes")]
    sized = measured(base, {**settings, "tasks": ["toy_sized"]}, bench)
    even = measured(base, {**settings, "tasks": [{"task": "toy_even", "shots": 0}]}, bench)
    assert list(sized) == ["toy_sized", "average"]
    assert value(sized["toy_sized"]) == pytest.approx(float(np.concatenate(right).mean()))
    assert value(even["toy_even"]) == pytest.approx(float(np.mean([each.mean() for each in right])))
    assert value(sized["toy_sized"]) != pytest.approx(value(even["toy_even"]))
    assert even["toy_even"].chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(RecipeError, match="'toy_colours' is measured twice"):
        measured(base, {**settings, "tasks": ["toy_colours", "toy_tag"]}, bench)


def test_a_perplexity_keeps_its_own_name_and_stays_out_of_the_average(
    load: Callable[..., Any], folder: Path, bench: Bench
) -> None:
    base = load()
    found = measured(base, {"tasks": ["toy_plain"], "include_path": [str(folder)]}, bench)
    assert list(found) == ["toy_plain"]
    measure = found["toy_plain"]
    assert (measure.metric, measure.transform, measure.higher) == ("word_perplexity", "exp", "unknown")
    loss = 0.0
    for text in texts("plain", 6):
        ids = torch.tensor([[base.tokenizer.bos_token_id, *base.tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            loss += float(base.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    words = sum(len(text.split()) for text in texts("plain", 6))
    assert score([measure], range(6)).value == pytest.approx(np.exp(loss / words), rel=1e-4)


def test_a_generated_answer_is_scored_by_exact_match(load: Callable[..., Any], folder: Path, bench: Bench) -> None:
    found = measured(load(), {"tasks": ["toy_written"], "include_path": [str(folder)], "log_samples": True}, bench)
    lines = [json.loads(line) for line in (bench.folder / "samples-toy_written.jsonl").read_text().splitlines()]
    expected = [float(line["filtered_resps"][0] == "paris") for line in lines]
    assert found["toy_written"].numerator.tolist() == expected
    assert (found["toy_written"].metric, found["toy_written"].chance) == (ACCURACY, None)


def test_model_tokenizer_and_random_numbers_are_left_as_they_were(
    load: Callable[..., Any], folder: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    base = load()
    base.model.train()
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in base.model.named_parameters()}
    sides = (base.tokenizer.padding_side, base.tokenizer.pad_token, len(base.tokenizer))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    capfd.readouterr()
    measured(base, {"tasks": ["toy_colours", "toy_written"], "include_path": [str(folder)]}, bench)
    assert capfd.readouterr() == ("", "")
    drawn = [float(torch.rand(1)), random.random(), float(np.random.rand())]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert drawn == [float(torch.rand(1)), random.random(), float(np.random.rand())]
    assert base.model.training
    assert sides == (base.tokenizer.padding_side, base.tokenizer.pad_token, len(base.tokenizer))
    for name, tensor in base.model.named_parameters():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_what_was_measured_is_not_measured_again_for_the_same_model(
    load: Callable[..., Any], folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tasks": ["toy_colours"], "include_path": [str(folder)]}
    first = measured(load(), settings, bench)
    assert measured(None, settings, bench)["toy_colours"].numerator.tolist() == first["toy_colours"].numerator.tolist()
    other = Bench("base", "another model", bench.folder, bench.folder)
    with pytest.raises(AttributeError):
        measured(None, settings, other)


def test_the_papers_ten_benchmarks_are_asked_with_its_shots(shared: Path) -> None:
    expected = {
        "arc_challenge": 25,
        "arc_easy": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "mathqa": 5,
        "piqa": 5,
        "pubmedqa": 5,
    }
    assert PRESETS["paper-10"] == expected
    printed = json.loads((shared.parent / "reference" / "paper_tables.json").read_text())["shots"]
    assert {name.removesuffix("_mc2"): shots for name, shots in expected.items()} == printed
    given = BenchmarksSettings(preset="paper-10", tasks=["wsc273", {"task": "piqa", "shots": 0}], limit=7)
    assert {entry.task: entry.shots for entry in given.benchmarks} == {**expected, "piqa": 0, "wsc273": None}


def test_the_papers_tasks_are_all_known_to_the_harness(folder: Path) -> None:
    from spunge.evaluation.benchmarks import leaves_of
    from spunge.evaluation.harness import manager_of

    settings = BenchmarksSettings(preset="paper-10")
    index = manager_of([entry.task for entry in settings.benchmarks], [str(folder)]).task_index
    leaves = {entry.task: leaves_of(entry, settings, index) for entry in settings.benchmarks}
    assert len(leaves["mmlu"]) == 57
    assert {leaf.changes["num_fewshot"] for leaf in leaves["mmlu"]} == {5}
    assert all(len(found) == 1 for name, found in leaves.items() if name != "mmlu")


def test_names_that_nobody_has_are_refused_with_a_suggestion(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench
) -> None:
    base, given = load(), {"include_path": local["include_path"]}
    with pytest.raises(RecipeError, match="lm_eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        measured(base, {**given, "tasks": ["arc_eazy"]}, bench)
    with pytest.raises(RecipeError, match=r"evaluate\.overrides: 'piqua' is none of the tasks; did you mean 'piqa'"):
        measured(base, {**local, "overrides": {"piqua": {}}}, bench)
    with pytest.raises(RecipeError, match=r"evaluate\.files: 'piqa' asks what is in its split 'validation'"):
        measured(base, {**given, "tasks": ["piqa"], "files": {"piqa": {"dev": local["files"]["piqa"]}}}, bench)
    with pytest.raises(RecipeError, match=r"evaluate\.files: no file '/none'"):
        measured(base, {**given, "tasks": ["piqa"], "files": {"piqa": "/none"}}, bench)
    with pytest.raises(RecipeError, match=r"'piqa' could not be loaded .*; offline, give its questions by files"):
        measured(base, {**given, "tasks": ["piqa"]}, bench)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give tasks, or preset"),
        ({"tasks": ["piqa", "piqa"]}, "'piqa' is named twice"),
        ({"tasks": ["piqa"], "source": "rows.jsonl"}, "brings its own questions"),
        ({"tasks": ["piqa"], "limits": 3}, "did you mean 'limit'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    toy_recipe: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    toy_recipe["evaluate"] = [{"kind": "lm_eval", **settings}]
    with pytest.raises(RecipeError, match=message):
        load_recipe(toy_recipe)


def test_what_was_measured_on_a_file_that_changed_meanwhile_is_not_kept_as_of_the_file_before(
    bench: Bench, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BenchmarksSettings(tasks=["piqa"], files={"piqa": str(write_rows("own.jsonl", PIQA))})
    meanwhile, asked = [PIQA[:5], PIQA], list[int]()

    def run(*_: Any) -> list[Outcome]:
        write_rows("own.jsonl", meanwhile.pop(0))
        asked.append(len(meanwhile))
        return [Outcome("piqa", "acc", [float(len(meanwhile))], [1.0], "known", "none", None)]

    monkeypatch.setattr("spunge.evaluation.benchmarks.run", run)
    with pytest.raises(RecipeError, match=r"^evaluate\.tasks: 'piqa': files of it changed while it was asked"):
        BENCHMARKS.measure(None, settings, NOTHING, bench)  # type: ignore[arg-type]
    write_rows("own.jsonl", PIQA)
    for _ in range(2):  # the second time it is kept
        assert BENCHMARKS.measure(None, settings, NOTHING, bench)[0].numerator.tolist() == [0.0]  # type: ignore[arg-type]
    assert asked == [1, 0]


def test_a_missing_package_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import spunge.evaluation.harness as module

    def missing(name: str) -> str:
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(RecipeError, match=r"pip install 'spunge\[judge\]'"):
        BENCHMARKS.instrument(BenchmarksSettings(tasks=["piqa"]))


def test_the_instrument_tells_the_limit_and_the_files_content(write_rows: Callable[..., Path]) -> None:
    file = write_rows("piqa.jsonl", PIQA)
    settings = BenchmarksSettings(tasks=["piqa"], files={"piqa": str(file)}, limit=4)
    before = BENCHMARKS.instrument(settings)
    assert (before["limit"], before["tasks"]) == (4, {"piqa": None})
    write_rows("piqa.jsonl", PIQA[::-1])
    assert BENCHMARKS.instrument(settings)["files"] != before["files"]


def test_a_run_reports_each_task_and_the_average(toy_recipe: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    import spunge

    toy_recipe["evaluate"] = [
        {"kind": "lm_eval", "tasks": ["toy_sizes"], "include_path": [str(folder)], "stages": ["base", "merged"]}
    ]
    toy_recipe["controls"] = []
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["stage"], row["subject"]): row for row in content["rows"]}
    assert set(rows) == {(stage, subject) for stage in ("base", "merged") for subject in ("toy_sizes", "average")}
    assert {row["metric"] for row in rows.values()} == {ACCURACY}
    assert rows["base", "average"]["value"] == rows["base", "toy_sizes"]["value"]


def paper_rows() -> dict[str, list[dict[str, Any]]]:
    """Made up, a handful for each of the paper's benchmarks in the fields that the harness reads, but MMLU's 57 subjects."""
    options = [texts(f"choice {at}", 4) for at in range(8)]
    words = texts("made", 8)
    return {
        "arc_challenge": ARC[1:8],
        "arc_easy": ARC[1:8],
        "hellaswag": [
            {"ctx_a": text, "ctx_b": "the dog", "activity_label": "Dogs", "endings": four, "label": str(at % 4)}
            for at, (text, four) in enumerate(zip(words, options, strict=True))
        ],
        "winogrande": [
            {"sentence": f"the _ runs {text}", "option1": "dog", "option2": "cat", "answer": str(1 + at % 2)}
            for at, text in enumerate(words)
        ],
        "gsm8k": [{"question": text, "answer": f"{text} #### {at}"} for at, text in enumerate(words)],
        "mathqa": [
            {"Problem": text, "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "abcde"[at % 5]}
            for at, text in enumerate(words)
        ],
        "piqa": PIQA[:8],
        "pubmedqa": [{"QUESTION": text, "CONTEXTS": [text], "final_decision": "yes"} for text in words],
        "truthfulqa_mc2": [
            {
                "question": text,
                "mc1_targets": {"choices": four, "labels": [1, 0, 0, 0]},
                "mc2_targets": {"choices": four, "labels": [1, 1, 0, 0]},
            }
            for text, four in zip(words, options, strict=True)
        ],
    }


@pytest.mark.thorough
def test_the_papers_benchmarks_run_on_local_files(
    load: Callable[..., Any], folder: Path, bench: Bench, write_rows: Callable[..., Path]
) -> None:
    base = load(max_position_embeddings=1024)
    given = paper_rows()
    splits = dict.fromkeys(("hellaswag", "winogrande", "piqa"), ("train", "validation"))
    splits["truthfulqa_mc2"] = ("validation",)
    settings = {
        "tasks": [{"task": name, "shots": min(5, PRESETS["paper-10"][name])} for name in given],
        "files": {
            name: dict.fromkeys(splits.get(name, ("train", "test")), str(write_rows(f"{name}.jsonl", rows)))
            for name, rows in given.items()
        },
        "include_path": [str(folder)],
        "limit": 2,
    }
    found = measured(base, settings, bench)
    assert set(found) == {*given, "average"}
    assert {name: len(measure.numerator) for name, measure in found.items() if name != "average"} == dict.fromkeys(
        given, 2
    )
    chances = {name: measure.chance for name, measure in found.items()}
    quarter = dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag"), 0.25)
    others = {"winogrande": 0.5, "piqa": 0.5, "mathqa": 0.2, "pubmedqa": pytest.approx(1 / 3)}
    assert chances == {**quarter, **others, "gsm8k": None, "truthfulqa_mc2": None, "average": None}
    mean = float(np.mean([value(measure) for name, measure in found.items() if name != "average"]))
    assert value(found["average"]) == pytest.approx(mean)


def test_copies_of_local_questions_go_with_the_process(
    load: Callable[..., Any], local: dict[str, Any], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache-of-datasets")
    monkeypatch.setattr("spunge.evaluation.harness._copies", functools.cache(lambda: SimpleNamespace(path=tmp_path)))
    measured(load(), local, bench)
    kept = list(tmp_path.rglob("*.arrow"))
    assert kept
    assert not [file for file in kept if "cache-of-datasets" in str(file)]


def test_the_harness_asks_a_model_that_others_shift_for_the_shifted_logits(
    load: Callable[..., Any], local: dict[str, Any], folder: Path, bench: Bench
) -> None:
    large, small, changed = load("llama"), load("gpt2"), load("gpt2")
    torch.manual_seed(0)
    for parameter in changed.model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    offsets = Offsets([Pair(changed.model, small.model)], Shift(alpha=3.0))
    shifted = replace(large, beside=tuple(offsets.models))
    plain = ours(large, piqa_rows(), bench)
    written = {"tasks": ["toy_written"], "include_path": [str(folder)], "log_samples": True}
    hook = offsets.attach(large.model)
    try:
        likeliest, own = measured(shifted, local, bench)["piqa"].numerator.tolist(), ours(shifted, piqa_rows(), bench)
        said = measured(shifted, written, replace(bench, folder=bench.folder / "shifted"))
    finally:
        hook.remove()
    assert likeliest == own != plain
    assert "toy_written" in said
