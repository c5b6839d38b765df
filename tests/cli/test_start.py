"""`spunge list`, `init` and `env`."""

import json
from pathlib import Path

from commands import call
from spunge.recipe.decoding import DECODERS
from spunge.registry import EVALUATORS, METHODS, RULES


def test_list_prints_every_method_rule_evaluator_and_recipe() -> None:
    listed = json.loads(call("list", "--json").stdout)
    assert [entry["name"] for entry in listed["methods"]] == METHODS.names()
    assert [entry["name"] for entry in listed["rules"]] == RULES.names()
    assert [entry["name"] for entry in listed["evaluators"]] == EVALUATORS.names()
    assert [entry["name"] for entry in listed["decode"]] == list(DECODERS)
    assert "demo" in [entry["name"] for entry in listed["recipes"]]
    assert all(entry["summary"] for kind in listed.values() for entry in kind)
    text = call("list", "methods").stdout
    assert "rmu" in text
    assert "arXiv 2403.03218" in text
    assert "RULES" not in text


def test_list_alone_is_a_line_for_each_name_and_one_kind_has_its_settings_as_a_recipe_writes_them() -> None:
    listed = json.loads(call("list", "--json").stdout)
    brief = call("list").stdout
    for kind, entries in listed.items():
        for entry in entries:
            assert f"\n  {entry['name']}: {entry['summary']}" in brief
        assert kind in brief.splitlines()[-1]
    assert len(brief.splitlines()) < sum(map(len, listed.values())) + 3 * len(listed) + 3
    settings = call("list", "methods").stdout
    assert "      steps = null   " in settings
    assert "      packing = false   " in settings
    assert " = None" not in settings


def test_init_copies_a_recipe_that_runs_where_it_lands(tmp_path: Path) -> None:
    assert call("init", "demo", cwd=tmp_path).returncode == 0
    ended = call("split", "demo.yaml", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "Europe" in ended.stdout
    again = call("init", "demo", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    forbidden = call("init", "demo", "--to", "/proc/here")
    assert forbidden.returncode == 2
    assert forbidden.stderr.startswith("spunge: --to: cannot write '/proc/here/demo' (")


def test_env_names_versions_and_devices() -> None:
    versions = json.loads(call("env", "--json").stdout)
    assert {"python", "torch", "transformers", "spunge", "cpus", "gpus"} <= versions.keys()
