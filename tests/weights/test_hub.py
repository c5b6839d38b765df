"""What is downloaded for an id on the Hub, by a stand-in for its client that holds a repository's files. No network."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from spunge.errors import RecipeError
from spunge.weights.checkpoint import INDEX, model_files
from spunge.weights.hub import fetched

COMMIT = "0123456789abcdef" * 2 + "01234567"
BESIDE = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md", "LICENSE", "code.py"]
OTHERS = ["consolidated.safetensors", "model.fp16.safetensors", "original/consolidated.00.pth", "onnx/model.onnx"]
OTHERS += ["tf_model.h5", "flax_model.msgpack", "optimizer.pt", "model.gguf", "inner/model.safetensors", "picture.png"]

Hub = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """hub({name: content}): a repository of these files. Returns the list of the calls that the client gets."""

    def build(files: dict[str, str] | Iterable[str]) -> list[dict[str, Any]]:
        contents = files if isinstance(files, dict) else dict.fromkeys(files, "{}")
        calls: list[dict[str, Any]] = []

        def snapshot_download(identifier: str, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append({"id": identifier, "revision": revision, "patterns": allow_patterns})
            folder = tmp_path / "snapshots" / COMMIT
            for name in filter_repo_objects(contents, allow_patterns=allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(contents[name])
            folder.mkdir(parents=True, exist_ok=True)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return build


def index(*shards: str) -> str:
    return json.dumps({"weight_map": {f"t{number}": shard for number, shard in enumerate(shards)}})


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


REPOSITORIES: dict[str, tuple[dict[str, str], set[str]]] = {
    "one file": ({"model.safetensors": ""}, {"model.safetensors"}),
    "shards": (
        {INDEX: index("model-1-of-2.safetensors", "model-2-of-2.safetensors"), "model-1-of-2.safetensors": "",
         "model-2-of-2.safetensors": "", "model-3-of-3.safetensors": ""},
        {INDEX, "model-1-of-2.safetensors", "model-2-of-2.safetensors"},
    ),
    "shards by other names": (
        {INDEX: index("pytorch_model-1.safetensors", "w/b.safetensors"), "pytorch_model-1.safetensors": "",
         "w/b.safetensors": ""},
        {INDEX, "pytorch_model-1.safetensors", "w/b.safetensors"},
    ),
    "one file beside an older index": (
        {"model.safetensors": "", INDEX: index("model-1-of-1.safetensors"), "model-1-of-1.safetensors": ""},
        {"model.safetensors", INDEX},
    ),
    "weights that the configuration names": (
        {"config.json": '{"transformers_weights": "mine.safetensors"}', "mine.safetensors": "", "model.safetensors": ""},
        {"mine.safetensors", "model.safetensors"},
    ),
    "safetensors beside pickles": (
        {"model.safetensors": "", "pytorch_model.bin": "", "pytorch_model-1.bin": ""}, {"model.safetensors"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pickles", [False, True])
@pytest.mark.parametrize("repository", REPOSITORIES)
def test_what_transformers_would_load_is_downloaded_and_no_other_weights(
    hub: Hub, repository: str, pickles: bool
) -> None:
    files, wanted = REPOSITORIES[repository]
    hub({**dict.fromkeys([*BESIDE, *OTHERS], "{}"), **files})
    folder = fetched("owner/name", "--base", pickles=pickles)
    assert names(folder) == {*BESIDE, *wanted}
    assert {file.relative_to(folder).as_posix() for file in model_files(folder).files} <= wanted


@pytest.mark.parametrize("shards", [[], ["pytorch_model-1.bin", "pytorch_model-2.bin"]], ids=["one file", "shards"])
def test_pickled_weights_are_downloaded_where_they_are_asked_for_and_there_are_no_others(
    hub: Hub, shards: list[str]
) -> None:
    pickled = {"pytorch_model.bin.index.json": index(*shards), **dict.fromkeys(shards, "")}
    hub({**dict.fromkeys(BESIDE, "{}"), **(pickled if shards else {"pytorch_model.bin": ""}), "optimizer.bin": ""})
    assert not any(name.endswith(".bin") for name in names(fetched("owner/name", "--base")))
    folder = fetched("owner/name", "--base", pickles=True)
    assert {name for name in names(folder) if name.endswith(".bin")} == set(shards or ["pytorch_model.bin"])


@pytest.mark.parametrize("kind", ["adapter_config.json adapter_model.safetensors", "delta.json delta.safetensors"])
def test_an_adapter_or_a_delta_is_downloaded_too(hub: Hub, kind: str) -> None:
    hub([*kind.split(), "adapter_model.bin", "checkpoint-5/adapter_model.safetensors"])
    assert names(fetched("owner/name", "--model")) == set(kind.split())


def test_a_second_step_asks_for_the_very_commit_of_the_first(hub: Hub) -> None:
    calls = hub({"config.json": "{}", INDEX: index("a.safetensors"), "a.safetensors": ""})
    fetched("owner/name@main", "--base")
    assert [call["revision"] for call in calls] == ["main", COMMIT]


@pytest.mark.parametrize(
    ("place", "revision", "asked"),
    [("owner/name", None, None), ("owner/name@v2", None, "v2"), ("owner/name", "v2", "v2"), ("gpt2", "v2", "v2"),
     ("owner/name@refs/pr/1", None, "refs/pr/1"), ("owner/name@v2", "v2", "v2")],
)  # fmt: skip
def test_a_revision_is_told_in_the_id_or_beside_it(
    hub: Hub, place: str, revision: str | None, asked: str | None
) -> None:
    calls = hub(["model.safetensors"])
    fetched(place, "--base", revision)
    assert (calls[0]["id"], calls[0]["revision"]) == (place.partition("@")[0], asked)


def test_one_file_alone_is_downloaded_where_no_more_is_asked_for(hub: Hub) -> None:
    calls = hub([*BESIDE, "model.safetensors"])
    assert names(fetched("owner/name", "evaluate.judge", only=("config.json",))) == {"config.json"}
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("./nowhere", "no folder './nowhere'"),
        ("/no/such/folder", "no folder"),
        ("a/b/c", "no folder 'a/b/c'; give a folder, or a Hub id such as owner/name"),
        ("owner/na me", "no folder"),
        ("", "no folder"),
        ("owner/name@", "no folder"),
    ],
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_asking_the_hub(hub: Hub, place: str, said: str) -> None:
    calls = hub(["model.safetensors"])
    with pytest.raises(RecipeError, match=said) as caught:
        fetched(place, "--model")
    assert str(caught.value).startswith("--model: ")
    assert calls == []


def test_a_file_is_refused_with_its_folder_as_the_mend(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RecipeError, match="is a file; give the folder that it lies in"):
        fetched(tmp_path / "model.safetensors", "--base")


def test_two_revisions_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model\.path: 'owner/name@a' names another revision than 'b'"):
        fetched("owner/name@a", "model.path", "b")


def test_what_the_hub_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("401 Client Error.\nCannot access gated repo")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        RecipeError, match=r"^--base: 'owner/name' cannot be fetched from the Hub.*\(401 Client Error\.\)$"
    ):
        fetched("owner/name", "--base")
