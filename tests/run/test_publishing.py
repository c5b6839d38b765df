"""What goes to the Hub: the merged model, a card that the Hub's own parser reads, no path of this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from spunge.cli.push import push
from spunge.errors import RecipeError
from spunge.results import read_results
from spunge.run.publishing import package, send


class Hub:
    """What was asked of it."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.sent: dict[str, bytes] = {}

    def create_repo(self, repository: str, **settings: Any) -> None:
        if self.error is not None:
            raise self.error
        self.created[repository] = settings

    def create_commit(self, repository: str, operations: Any, commit_message: str) -> Any:
        for each in operations:
            with each.as_file() as stream:
                self.sent[each.path_in_repo] = stream.read()
        return type("Commit", (), {"commit_url": f"https://hub/{repository}/commit/1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def card_of(folder: Path, **settings: Any) -> str:
    own = package(folder, "me/forgetful", **settings).files["README.md"]
    assert isinstance(own, bytes)
    return own.decode()


def test_the_hubs_own_parser_finds_the_merged_models_scores_in_the_card(finished: Path) -> None:
    data = ModelCard(card_of(finished)).data
    results = read_results(finished)
    own = {(row.metric, row.subject): row for row in results.rows if row.stage == "merged"}
    assert data.eval_results
    for each in data.eval_results:
        row = own[each.metric_type, each.dataset_name]
        assert each.metric_value == row.value
        assert each.metric_args == {"low": row.low, "high": row.high, "n": row.n}
    merged = next(model for model in results.models if model.stage == "merged")
    assert {"unlearning", "spunge", merged.method, merged.rule} <= set(data.tags)
    assert data.library_name == "transformers"


def test_the_card_says_what_was_done_what_it_scores_and_what_it_does_not_prove(finished: Path) -> None:
    text = card_of(finished)
    results = read_results(finished)
    assert f"in {len(results.parts)} parts" in text
    own = {(row.metric, row.subject): row.value for row in results.rows if row.stage == "merged"}
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "wanted" not in line]
    assert lines
    for metric, subject, *_, last in lines:
        assert float(last.split(" ")[0]) == pytest.approx(own[metric.removeprefix("| "), subject], abs=0.006, rel=0.01)
    assert "## Limits" in text
    made = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    merged = next(model for model in results.models if model.stage == "merged")
    assert made["unlearn"]["method"] == merged.method
    assert made["merge"]["rule"] == merged.rule
    assert merged.base_fingerprint is not None
    assert merged.base_fingerprint in text


def test_nothing_that_is_sent_holds_a_path_of_this_machine(finished: Path, tiny: Callable[..., Path]) -> None:
    what = package(finished, "me/forgetful")
    assert set(what.files) >= {"README.md", "config.json", "model.safetensors", "results.json"} - {"merge.json"}
    for name, file in what.files.items():
        content = file if isinstance(file, bytes) else file.read_bytes()
        for path in (finished, finished.parent, tiny("llama").parent):
            assert str(path).encode() not in content, name
    told = json.loads(what.files["results.json"])  # type: ignore[arg-type]
    assert {model["base"] for model in told["models"]} == {tiny("llama").name}
    assert "results.json" not in package(finished, "me/forgetful", scores=False).files


def test_a_hub_id_in_the_bases_configuration_is_named_as_the_base(
    finished: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.weights.card.read_config", lambda _: {"_name_or_path": "org/small"})
    assert ModelCard(card_of(finished)).data.base_model == "org/small"
    monkeypatch.setattr("spunge.weights.card.read_config", lambda _: {"_name_or_path": str(tiny("llama"))})
    assert ModelCard(card_of(finished)).data.base_model is None  # a folder is no model of the Hub's


def test_it_is_sent_when_asked_private_and_in_one_commit(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(str(finished), "me/forgetful")
    said = capsys.readouterr().out
    assert not hub.created
    assert "would be sent to me/forgetful, private if it is new; --send sends it" in said
    assert "the card and the scores name" in said
    push(str(finished), "me/forgetful", send=True)
    assert hub.created == {"me/forgetful": {"private": True, "exist_ok": True}}
    assert hub.sent["model.safetensors"] == (finished / "merged" / "model.safetensors").read_bytes()
    assert hub.sent["README.md"].decode() == card_of(finished)
    assert "sent: https://hub/me/forgetful/commit/1" in capsys.readouterr().out


def test_a_folder_that_merge_wrote_is_sent_as_it_is(finished: Path, hub: Hub) -> None:
    send(package(finished / "merged", "me/other"), public=True)
    assert hub.created["me/other"]["private"] is False
    assert hub.sent.keys() == {file.name for file in (finished / "merged").iterdir()}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no"), "no token for the Hub; give `hf auth login`"),
        (HFValidationError("too many slashes"), "'me/forgetful' is no name of a repository"),
        (ConnectionError("no route"), r"the Hub cannot be reached \(no route\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(finished: Path, hub: Hub, error: Exception, message: str) -> None:
    hub.error = error
    with pytest.raises(RecipeError, match=message):
        send(package(finished, "me/forgetful"), public=False)


def test_what_is_not_whole_is_not_sent(finished: Path, tmp_path: Path) -> None:
    with (finished / "merged" / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(RecipeError, match="holds no finished merged model"):
        package(finished, "me/forgetful")
    with pytest.raises(RecipeError, match="is no run's folder, and holds no model"):
        package(tmp_path, "me/forgetful")
