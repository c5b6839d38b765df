"""Files come through an address whole or not at all, and once for each machine; and a whole run through one is the same run."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spunge.errors import LostError, RecipeError
from spunge.files import checksum
from spunge.recipe.loading import load_recipe
from spunge.run.executors.artifacts import Artifacts, Cache, Mark, mark_of, refuse_address
from spunge.run.executors.bringing import Bundle, Mirror, named_here, saved_files
from started import Command, content, kept, until


@pytest.fixture
def stored(tmp_path: Path) -> Artifacts:
    return Artifacts(f"file://{tmp_path}/at")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "delta.safetensors"
    file.write_bytes(os.urandom(5000))
    os.utime(file, ns=(10**18, 10**18))
    return file


def objects(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "at/objects").rglob("*") if path.is_file()]


def test_what_is_put_comes_back_with_the_same_bytes_and_time(stored: Artifacts, file: Path, tmp_path: Path) -> None:
    mark = stored.put(file)
    stored.fetch(mark, tmp_path / "back/delta")
    assert mark_of(tmp_path / "back/delta") == mark == Mark(5000, checksum(file), 10**18)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["delta"]


@pytest.mark.parametrize("harm", ["short", "damaged", "gone"])
def test_what_does_not_come_whole_is_refused_and_leaves_no_file(
    stored: Artifacts, file: Path, tmp_path: Path, harm: str
) -> None:
    mark = stored.put(file)
    held = objects(tmp_path)[0]
    match harm:
        case "short":
            held.write_bytes(held.read_bytes()[:-1])
        case "damaged":
            held.write_bytes(bytes([held.read_bytes()[0] ^ 1]) + held.read_bytes()[1:])
        case "gone":
            held.unlink()
    with pytest.raises(LostError, match=r"does not come whole"):
        stored.fetch(mark, tmp_path / "back/delta")
    assert not list((tmp_path / "back").iterdir())
    stored.put(file, mark)  # what was damaged is put anew
    stored.fetch(mark, tmp_path / "back/delta")
    assert (tmp_path / "back/delta").read_bytes() == file.read_bytes()


def test_a_download_that_comes_short_once_is_tried_again(
    stored: Artifacts, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, real, tries = stored.put(file), stored._files.get_file, []

    def short_once(source: str, target: str) -> None:
        tries.append(target)
        real(source, target)
        if len(tries) == 1:
            os.truncate(target, 100)

    monkeypatch.setattr(stored._files, "get_file", short_once)
    stored.fetch(mark, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert len(tries) == 2


def test_several_actors_of_a_machine_fetch_an_object_once(stored: Artifacts, file: Path, tmp_path: Path) -> None:
    mark, fetched = stored.put(file), []
    counting = SimpleNamespace(
        fetch=lambda mark, target: (fetched.append(mark), stored.fetch(mark, target)),
    )
    caches = [Cache(counting, tmp_path / "cache") for _ in range(4)]  # type: ignore[arg-type]
    places = [tmp_path / f"actor-{number}" / "model.safetensors" for number in range(4)]
    threads = [
        threading.Thread(target=cache.place, args=(mark, place)) for cache, place in zip(caches, places, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert {place.read_bytes() for place in places} == {file.read_bytes()}


def test_a_cache_that_was_damaged_is_fetched_anew(stored: Artifacts, file: Path, tmp_path: Path) -> None:
    mark = stored.put(file)
    held = Cache(stored, tmp_path / "cache").held(mark)
    held.write_bytes(held.read_bytes()[:100])
    assert Cache(stored, tmp_path / "cache").held(mark).read_bytes() == file.read_bytes()


def test_what_a_stage_adds_to_does_not_change_the_cache(stored: Artifacts, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("one\n")
    cache, mark = Cache(stored, tmp_path / "cache"), stored.put(log)
    cache.place(mark, tmp_path / "run/log.jsonl")
    with (tmp_path / "run/log.jsonl").open("a") as stream:
        stream.write("two\n")
    assert cache.held(mark).read_text() == "one\n"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://key:secret@host/bucket", "the address holds a password"),
        ("nowhere://bucket", "'nowhere://bucket': Protocol not known"),
        ("/plain/folder", "is no address; give one such as s3://bucket/folder"),
    ],
)
def test_an_address_that_is_none_is_refused_and_its_password_not_told(address: str, told: str) -> None:
    with pytest.raises(RecipeError, match=rf"^execution.artifacts: .*{told}") as refused:
        refuse_address(address)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_neither_rows_nor_a_model_is_refused_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    content: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model")},
        "forget": {"source": str(tmp_path / "rows.jsonl")},
        "retain": "neutral",
        "unlearn": {"method": "npo"},
    }
    named = named_here(load_recipe(content))
    assert named == ({str(tmp_path / "rows.jsonl"): "forget.source.0"}, {str(tmp_path / "model"): "model.path"})
    content["evaluate"] = [
        {"kind": "similarity", "encoder": str(tmp_path / "model"), "source": str(tmp_path / "rows.jsonl")}
    ]
    with pytest.raises(
        RecipeError, match=r"^evaluate.0.encoder: '.*' is of this machine, and execution.artifacts brings"
    ):
        named_here(load_recipe(content))


def test_a_mirror_holds_what_a_stage_needs_and_puts_what_is_new_alone(
    stored: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "node"))
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text("one\n")
    files = {"stamps/a.json": stored.put(tmp_path / "a.json"), "x/b.jsonl": stored.put(tmp_path / "b.jsonl")}
    bundle = Bundle(f"file://{tmp_path}/at", "note", files, {}, {}, ("x/state-*.pt",))
    mirror = Mirror()
    with mirror.laid_out(bundle):
        assert mirror._laid.keys() == files.keys()
        (mirror.folder / "x/b.jsonl").write_text("one\ntwo\n")
        (mirror.folder / "x/delta.json").write_text("[]")
        (mirror.folder / "x/state-1.pt").write_bytes(b"state")
        mirror.save(bundle)
    assert mirror.put_new(bundle).keys() == {"x/b.jsonl", "x/delta.json"}
    assert mirror.put_new(bundle) == {}
    assert saved_files(stored, "note").keys() == {"x/state-1.pt", "x/b.jsonl"}
    other = Mirror()  # on another node: the state that was saved, with its log
    with other.laid_out(bundle):
        assert (other.folder / "x/state-1.pt").read_bytes() == b"state"
        assert (other.folder / "x/b.jsonl").read_text() == "one\ntwo\n"
        assert not (other.folder / "x/delta.json").exists()
    with mirror.laid_out(bundle._replace(note="none")):  # what an earlier stage left goes
        assert sorted(path.name for path in mirror._files()) == ["a.json", "b.jsonl"]


# A node's Python fails on the first file that it opens of the command's machine, and says so.
FORBIDDING = """
import os, sys
forbidden = os.environ.get("SPUNGE_TEST_FORBIDDEN", "").split(":")
def hook(event, given):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.link", "os.utime"):
        for each in given[:2]:
            path = os.fsdecode(each) if isinstance(each, (str, bytes, os.PathLike)) else ""
            if any(path == one or path.startswith(one + "/") for one in forbidden if one):
                with open(os.environ["SPUNGE_TEST_OPENED"], "a") as stream:
                    stream.write(f"{event} {path}\\n")
                raise PermissionError(13, "of another machine", path)
if any(forbidden):
    open(os.environ["SPUNGE_TEST_OPENED"] + ".watched", "a").close()
    sys.addaudithook(hook)
"""


@pytest.fixture
def apart(long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes with a cache of their own, that must not open the run's folder, the rows or the model."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(FORBIDDING)
    recipe = json.loads(long[0].read_text())
    sources = [recipe["model"]["path"], recipe["forget"]["source"], recipe["retain"]["source"]]
    forbidden = ":".join([str(tmp_path / "run"), str(long[0].parent), *sources])
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})

    def node(name: str) -> Any:
        environment = {
            "SPUNGE_CACHE": str(tmp_path / name),
            "SPUNGE_TEST_FORBIDDEN": forbidden,
            "SPUNGE_TEST_OPENED": str(tmp_path / "opened"),
            "PYTHONPATH": f"{tmp_path / 'hook'}:{os.environ.get('PYTHONPATH', '')}",
        }
        return made.add_node(num_cpus=1, env_vars=environment, **small)

    made.others = [node("node-1"), node("node-2")]
    yield made
    made.shutdown()


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder's address, and that of an S3 server on this machine."""
    if request.param == "file":
        yield f"file://{tmp_path}/artifacts"
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "not-a-key",
        "AWS_SECRET_ACCESS_KEY": "nothing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="spunge")
    yield "s3://spunge/run"
    server.stop()


@pytest.mark.thorough
def test_an_object_comes_whole_through_s3_or_not_at_all(address: str, file: Path, tmp_path: Path) -> None:
    stored = Artifacts(address)
    mark = stored.put(file)
    stored.fetch(mark, tmp_path / "back")
    assert mark_of(tmp_path / "back") == mark
    stored._files.pipe_file(stored._at(mark.name), file.read_bytes()[:-1])
    with pytest.raises(LostError, match="it has 4999 bytes, not 5000"):
        stored.fetch(mark, tmp_path / "again")
    assert stored.note("x") is None
    stored.write_note("x", {"files": {"a": list(mark)}}, tmp_path / "aside")
    assert saved_files(stored, "x") == {"a": mark}
    stored.drop_note("x")
    assert stored.note("x") is None


def started(address: str, cluster: Any, recipe: Path, run: Path) -> Command:
    return Command(
        recipe, run, "execution.kind=ray", f"execution.address={cluster.address}", f"execution.artifacts={address}"
    )


def training(tmp_path: Path) -> bool:
    """Whether both nodes are at their branches' steps."""
    logs = list(tmp_path.glob("node-*/mirrors/*/branches/*/log.jsonl"))
    return len(logs) == 2 and all(len(log.read_text().splitlines()) > 3 for log in logs)


def held(tmp_path: Path, run: Path, undisturbed: Path) -> None:
    """The run has the bytes of the undisturbed one, the nodes opened no file of the command's machine, and no secret is kept."""
    assert content(run) == content(undisturbed)
    assert (tmp_path / "opened.watched").exists()
    assert not (tmp_path / "opened").exists(), (tmp_path / "opened").read_text()
    assert not any(b"nothing-secret" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.thorough
def test_without_an_address_such_nodes_refuse_their_first_stage(
    apart: Any, long: tuple[Path, Path], tmp_path: Path
) -> None:
    """So what the nodes are forbidden is forbidden."""
    command = Command(long[0], tmp_path / "run", "execution.kind=ray", f"execution.address={apart.address}")
    code, errors = command.ended(300)
    assert code != 0, errors
    assert "a node does not see" in errors
    assert str(tmp_path / "run") in (tmp_path / "opened").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_nodes_that_share_no_folder_make_the_same_run_with_a_node_killed_in_a_branch(
    address: str, apart: Any, long: tuple[Path, Path], tmp_path: Path
) -> None:
    command = started(address, apart, long[0], tmp_path / "run")
    until(lambda: training(tmp_path), 300)
    apart.remove_node(apart.others[0], allow_graceful=False)
    code, errors = command.ended(600)
    assert code == 0, errors
    assert "its node or process is gone" in errors
    held(tmp_path, tmp_path / "run", long[1])


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_a_command_that_is_killed_goes_on_from_the_states_at_the_address(
    address: str, apart: Any, long: tuple[Path, Path], tmp_path: Path
) -> None:
    command = started(address, apart, long[0], tmp_path / "run")
    until(lambda: training(tmp_path), 300)
    os.kill(command.process.pid, signal.SIGKILL)
    command.ended()
    code, errors = started(address, apart, long[0], tmp_path / "run").ended(600)
    assert code == 0, errors
    held(tmp_path, tmp_path / "run", long[1])


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_a_command_that_is_stopped_brings_the_states_into_the_run(
    address: str, apart: Any, long: tuple[Path, Path], tmp_path: Path
) -> None:
    command = started(address, apart, long[0], tmp_path / "run")
    until(lambda: training(tmp_path), 300)
    os.kill(command.process.pid, signal.SIGTERM)
    code, errors = command.ended(300)
    assert code == 128 + signal.SIGTERM, errors
    assert kept(tmp_path / "run") == {"asia", "europe"}
    assert all(log.read_text() for log in (tmp_path / "run/branches").glob("*/log.jsonl"))
    code, errors = Command(long[0], tmp_path / "run").ended(300)  # here, where the nodes left off
    assert code == 0, errors
    held(tmp_path, tmp_path / "run", long[1])
