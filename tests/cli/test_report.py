"""`spunge report` and `spunge compare` on finished runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from commands import call


def test_report_and_compare_show_finished_runs(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    figure = "published=[{stage: merged, subject: asia, metric: accuracy, value: 0.125, source: A paper}]"
    for name, setting in (("one", figure), ("two", "merge.scale=2")):
        shutil.copytree(finished, tmp_path / name)
        assert call("run", str(recipe_file), "--set", setting, "--out", name, cwd=tmp_path).returncode == 0
    page = tmp_path / "one" / "report.html"
    page.unlink()
    ended = call("report", "one", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert page.exists()
    for said in (
        "control:joint",
        "Parts to forget",
        "Beside the paper",
        "0.125",
        "A paper",
        "Spillover",
        "report: one",
    ):
        assert said in ended.stdout
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert json.loads(call("report", "one", "--json", cwd=tmp_path).stdout) == results
    ended = call("compare", "one", "two", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0].split() == ["metric", "subject", "wanted", "base", "one", "two"]
    assert re.search(r"paired by item +two - one\n", ended.stdout), ended.stdout
    assert re.search(r"merge.scale +1.0 +2.0\n", ended.stdout)
    ended = call("compare", "one", "two", "--html", "both.html", "--format", "csv", cwd=tmp_path)
    assert ended.stdout.startswith("run,stage,made_by,metric,")
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    compared = json.loads(call("compare", "one", "two", "--stage", "control:joint", "--json", cwd=tmp_path).stdout)
    assert {row["subject"] for row in compared["rows"]} == {"asia", "europe", "retain"}
    for row in compared["rows"]:
        assert row["scores"][0] == row["scores"][1]
    results["evaluations"][0]["instrument"] = {"scorer": "another"}
    (tmp_path / "one" / "results.json").write_text(json.dumps(results))
    shutil.rmtree(tmp_path / "one" / "stamps")  # else they would not be believed
    ended = call("compare", "one", "two", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "measured with different instruments: (scorer: another) in 'one', none in 'two'" in ended.stderr


@pytest.mark.parametrize("command", [["report", "run"], ["report", "run/results.json"], ["compare", "two", "run"]])
def test_results_that_are_not_of_what_the_run_holds_are_refused_or_told(
    finished: Path, tmp_path: Path, command: list[str]
) -> None:
    shutil.copytree(finished, tmp_path / "two")
    assert call(*command, cwd=tmp_path).stderr == ""
    file = finished / "results.json"
    written = file.read_text()
    changed = json.loads(written)
    changed["rows"][0]["value"] += 0.001
    file.write_text(json.dumps(changed))
    ended = call(*command, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{str(file)!r} is damaged" in ended.stderr
    file.write_text(written)
    (finished / "stamps" / "merged.json").unlink()
    ended = call(*command, cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (0, 1)
    assert f"{command[-1]}: results.json is of before: stamps/merged.json is missing" in ended.stderr


def test_a_copy_of_results_under_another_name_is_not_paired_with_what_the_run_holds_now(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copyfile(finished / "results.json", finished / "before.json")
    ended = call("compare", "run/before.json", "run", "--json", cwd=tmp_path)
    told = json.loads(ended.stdout)
    assert told["differences"] == []
    assert any(note.startswith("nothing is paired by item") for note in told["notes"])
    ended = call("report", "run/before.json", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "'run/before.json' is not a run's results.json" in ended.stderr


def test_a_page_written_anew_is_whole_to_verify(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr("spunge.report.page.redacted", lambda text: f"{text}<!-- as another version writes it -->")
    assert call("report", "copy", cwd=tmp_path).returncode == 0
    assert "another version" in (run / "report.html").read_text()
    ended = call("verify", "copy", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.endswith(": whole\n")
