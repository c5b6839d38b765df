"""Which files are a model, and what a damaged file is told as. transformers' own loading and safetensors' own reader decide."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from making import noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.files import cache_folder
from spunge.weights.checkpoint import INDEX, WHOLE, Checkpoint, model_files
from spunge.weights.header import DTYPES, read_header

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder: Path, seed: int = 0, shards: bool = False) -> Path:
    """A tiny Llama whose weights the seed decides, whole or in shards."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY, initializer_range=0.5))
    model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder as transformers loads them."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_as_transformers(folder: Path) -> None:
    """Every tensor is the one that transformers loads."""
    checkpoint, expected = Checkpoint(folder), loaded(folder)
    assert set(expected) <= set(checkpoint.tensors)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


def add_older_shards(folder: Path) -> None:
    for file in save(folder.with_name("older"), seed=5, shards=True).glob("model*"):
        shutil.copy(file, folder / file.name)


def add(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copy(save(folder.with_name("other"), seed=5) / WHOLE, folder / name)


def add_pickle(folder: Path) -> None:
    torch.save(load_file(save(folder.with_name("other"), seed=5) / WHOLE), folder / "pytorch_model.bin")


def add_index_alone(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"gone.weight": "gone.safetensors"}}))


def add_subfolder(folder: Path) -> None:
    save(folder / "checkpoint-500", seed=5)


def add_training_state(folder: Path) -> None:
    save_file({"state.exp_avg": torch.ones(4)}, folder / "optimizer.safetensors")
    (folder / "optimizer.pt").write_bytes(b"x")


STRAYS: dict[str, Callable[[Path], Any]] = {
    "older shards and their index": add_older_shards,
    "an index whose shards are gone": add_index_alone,
    "a backup": add("model_old.safetensors"),
    "a variant": add("model.fp16.safetensors"),
    "a consolidated file": add("consolidated.safetensors"),
    "a stray shard": add("model-00007-of-00009.safetensors"),
    "a name that sorts first": add("a.safetensors"),
    "pickled weights": add_pickle,
    "a subfolder": add_subfolder,
    "a training state": add_training_state,
    "a broken index of pickled weights": lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{"),
    "files of other formats": lambda folder: [(folder / f"model.{end}").write_bytes(b"x") for end in ("h5", "onnx")],
}


OWN = {"older shards and their index", "an index whose shards are gone"}  # beside shards, the model's own index


@pytest.mark.parametrize(
    ("stray", "shards"),
    [(stray, shards) for stray in STRAYS for shards in (False, True) if not (shards and stray in OWN)],
)
def test_what_lies_beside_a_model_is_left_out_of_account_as_transformers_leaves_it(
    tmp_path: Path, stray: str, shards: bool
) -> None:
    folder = save(tmp_path / "model", shards=shards)
    before = Checkpoint(folder).fingerprint()
    STRAYS[stray](folder)
    assert Checkpoint(folder).fingerprint() == before
    same_as_transformers(folder)


def test_of_a_name_that_two_shards_hold_the_last_copy_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", shards=True)
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    own = folder / index["weight_map"][name]
    for other in sorted({*index["weight_map"].values()} - {own.name}):
        content = load_file(folder / other)
        save_file({**content, name: noise(1, 24, 16)}, folder / other, metadata={"format": "pt"})
    same_as_transformers(folder)


def test_all_of_a_shard_is_the_models_whatever_the_index_says_of_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", shards=True)
    index = json.loads((folder / INDEX).read_text())
    files = sorted({*index["weight_map"].values()})
    index["weight_map"] = {f"no.such.tensor.{number}": file for number, file in enumerate(reversed(files))}
    (folder / INDEX).write_text(json.dumps(index))
    same_as_transformers(folder)


def test_shards_in_a_folder_of_their_own_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", shards=True)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "weights").mkdir()
    for file in folder.glob("model-*"):
        file.rename(folder / "weights" / file.name)
    same_as_transformers(folder)


def test_weights_that_the_configuration_names_come_first(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    shutil.copy(save(tmp_path / "other", seed=5) / WHOLE, folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    same_as_transformers(folder)


def test_links_are_followed_as_the_hubs_cache_needs_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / WHOLE).rename(tmp_path / "blob")
    (folder / WHOLE).symlink_to(tmp_path / "blob")
    same_as_transformers(folder)


def test_an_adapter_beside_a_model_is_refused_since_transformers_applies_it(tmp_path: Path) -> None:
    import peft

    folder = save(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder)
    assert any("lora_A" in name for name in loaded(folder))
    with pytest.raises(RecipeError, match=r"^--base: .*adapter_config\.json.*lays it over"):
        model_files(folder, "--base")


def write_index(content: Any) -> Callable[[Path], Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / INDEX).write_text(text)


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, "holds no weights"),
    "a variant alone": (lambda folder: (folder / "model.fp16.safetensors").touch(), r"model\.fp16\.safetensors"),
    "a pickle": (lambda folder: (folder / "pytorch_model.bin").touch(), r"pickled weights alone \(pytorch_model\.bin\)"),
    "a GGUF file": (lambda folder: (folder / "m.Q4_K_M.gguf").touch(), r"m\.Q4_K_M\.gguf.*quantised"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "a folder in it": (lambda folder: (save(folder / "inner")), "its folder 'inner' does"),
    "a distributed checkpoint": (
        lambda folder: (folder / "shard-00001-model-00001-of-00002.safetensors").touch(),
        "distributed checkpoint",
    ),
    "a folder for a file": (lambda folder: (folder / WHOLE).mkdir(), "holds no weights"),
    "a broken link": (lambda folder: (folder / WHOLE).symlink_to(folder / "gone"), "holds no weights"),
    "an index that is no JSON": (write_index("{"), r"model\.safetensors\.index\.json in .* cannot be read"),
    "an index that is a list": (write_index([]), "holds no JSON object"),
    "an index of metadata alone": (write_index({"metadata": {"total_size": 4}}), "no weight_map"),
    "an index of nothing": (write_index({"weight_map": {}}), "names no file"),
    "an index of numbers": (write_index({"weight_map": {"a": 1}}), "no weight_map"),
    "an index of a missing shard": (write_index({"weight_map": {"a": "m-1.safetensors"}}), "m-1.safetensors is named by"),
    "an index that leaves the folder": (write_index({"weight_map": {"a": "../m.safetensors"}}), "no file of its folder"),
    "an index of an absolute path": (write_index({"weight_map": {"a": "/m.safetensors"}}), "no file of its folder"),
    "a configuration that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json in"),
    "a configuration that leaves the folder": (
        lambda folder: (folder / "config.json").write_text('{"transformers_weights": "../m.safetensors"}'),
        "config.json names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_folder_without_a_readable_model_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, said = UNREADABLE[case]
    (tmp_path / "model").mkdir()
    spoil(tmp_path / "model")
    with pytest.raises(RecipeError, match=said) as caught:
        _ = Checkpoint(tmp_path / "model", "--base").tensors
    assert str(caught.value).startswith("--base: ")
    assert "\n" not in str(caught.value)


def written(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, of which `length` says how long it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    plain = (list(each) if isinstance(each, tuple) else each for each in (dtype, shape, offsets))
    return dict(zip(("dtype", "shape", "data_offsets"), plain, strict=True))


GOOD = json.dumps(entry())
DAMAGED: dict[str, tuple[Any, bytes]] = {
    "a negative length": ({"a": entry(shape=(-2,))}, b"x" * 8),
    "a shape that is no list": ({"a": entry(shape=2)}, b"x" * 8),
    "a shape of fractions": ({"a": entry(shape=(2.0,))}, b"x" * 8),
    "a shape of truth values": ({"a": entry(shape=(True, 2))}, b"x" * 8),
    "a shape that overflows": ({"a": entry(shape=(1 << 62, 1 << 62, 4))}, b"x" * 8),
    "a length beyond 64 bits": ({"a": entry(shape=(1 << 70,))}, b"x" * 8),
    "a number of 5000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"x" * 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"x" * 8),
    "an entry that is a list": ({"a": []}, b""),
    "an entry that is nothing": ({"a": None}, b""),
    "one offset": ({"a": entry(offsets=(8,))}, b"x" * 8),
    "offsets in the wrong order": ({"a": entry(offsets=(8, 0))}, b"x" * 8),
    "negative offsets": ({"a": entry(offsets=(-8, 0))}, b"x" * 8),
    "offsets beyond the file": ({"a": entry()}, b"x" * 4),
    "two tensors over each other": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12),
    "two tensors in one place": ({"a": entry(), "b": entry()}, b"x" * 8),
    "a gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"x" * 20),
    "a gap before the first": ({"a": entry(offsets=(4, 12))}, b"x" * 12),
    "bytes that belong to no tensor": ({"a": entry()}, b"x" * 9),
    "a size that is not the shape's": ({"a": entry(shape=(3,))}, b"x" * 8),
    "an unknown dtype": ({"a": entry(dtype="F13")}, b"x" * 8),
    "a dtype that is no word": ({"a": entry(dtype=["F32"])}, b"x" * 8),
    "a list": ([], b""),
    "no JSON": (b"{'a': 1}", b""),
    "nothing": (b"", b""),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16-le"), b"x" * 8),
    "bytes that are no text": (b'{"\xff": 1}', b""),
    "half a character": (b'{"\\ud800": ' + GOOD.encode() + b"}", b"x" * 8),
    "brackets without end": (b"{" + b'"a":{' * 20_000, b""),
    "metadata that is a list": ({"__metadata__": []}, b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_in_one_line_where_safetensors_refuses_it(tmp_path: Path, case: str) -> None:
    file = written(tmp_path / WHOLE, *DAMAGED[case])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(RecipeError) as caught:
        read_header(file, "--base")
    assert str(caught.value).startswith(f"--base: {WHOLE} ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_name_that_comes_twice_is_refused_though_safetensors_takes_the_last(tmp_path: Path) -> None:
    file = written(tmp_path / WHOLE, f'{{"a":{GOOD},"a":{GOOD}}}'.encode(), b"x" * 8)
    with pytest.raises(RecipeError, match="'a' comes twice"):
        read_header(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 200), values=st.binary(min_size=1, max_size=4), cut=st.integers(0, 3))
def test_a_file_with_a_few_wrong_bytes_is_read_where_safetensors_reads_it_and_else_refused(
    tmp_path: Path, position: int, values: bytes, cut: int
) -> None:
    header = {"alpha": entry(), "other": entry("BF16", (2, 2), (8, 16)), "__metadata__": {"format": "pt"}}
    content = bytearray(written(tmp_path / WHOLE, header, b"x" * 16).read_bytes())
    content[position : position + len(values)] = values
    (tmp_path / WHOLE).write_bytes(content[: len(content) - cut])
    try:
        with safe_open(tmp_path / WHOLE, "pt") as stream:
            expected = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError:
        expected = None
    try:
        infos: Any = {info.name: info.shape for info in read_header(tmp_path / WHOLE)}
    except RecipeError:
        infos = None
    assert infos == expected


@pytest.mark.parametrize("length", [9, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_length_that_lies_takes_no_memory(tmp_path: Path, length: int) -> None:
    file = written(tmp_path / WHOLE, b"{}", length=length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecipeError, match=r"model\.safetensors is truncated or no safetensors file"):
        read_header(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_length_that_lies_within_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    file = written(tmp_path / WHOLE, b"{}", length=1 << 34)
    with file.open("r+b") as stream:
        stream.truncate(1 << 35)  # a sparse file: it takes no room on the disk
    with pytest.raises(RecipeError, match="truncated or no safetensors file"):
        read_header(file)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_that_torch_has_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    data = bytes(1 if dtype == "BOOL" else value for value in range(6 * size))
    header = {"a": entry(dtype, (2, 3), (0, 6 * size)), "none": entry(dtype, (0, 5), (6 * size, 6 * size))}
    file = written(tmp_path / WHOLE, header, data)
    checkpoint = Checkpoint(tmp_path)
    assert {info.name for info in read_header(file)} == {"a", "none"}
    assert checkpoint.read("a").dtype == DTYPES[dtype]
    assert checkpoint.read("a").view(torch.uint8).numpy().tobytes() == data
    assert checkpoint.read("none").shape == (0, 5)
    with safe_open(file, "pt") as stream:
        assert stream.get_tensor("a").dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_entries_of_less_than_a_byte_are_told_as_quantised(tmp_path: Path, dtype: str) -> None:
    file = written(tmp_path / WHOLE, {"a": entry(dtype, (8,), (0, 4 if dtype == "F4" else 6))}, b"x" * 6)
    with pytest.raises(RecipeError, match=r"model\.safetensors stores 'a' as F\d\S*: a quantised checkpoint"):
        read_header(file)


def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RecipeError, match="git lfs pull"):
        read_header(tmp_path / WHOLE)


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    content = (save(tmp_path / "model") / WHOLE).read_bytes()
    for cut in (4, 200, len(content) - 10):
        (tmp_path / WHOLE).write_bytes(content[:cut])
        with pytest.raises(RecipeError, match=r"model\.safetensors is truncated"):
            _ = Checkpoint(tmp_path).tensors


def test_the_fingerprint_depends_on_content_and_not_on_sharding(tmp_path: Path) -> None:
    one, two, other = save(tmp_path / "one"), save(tmp_path / "two", shards=True), save(tmp_path / "other", seed=1)
    assert len(Checkpoint(two).files) > 2
    assert Checkpoint(one).fingerprint() == Checkpoint(two).fingerprint() != Checkpoint(other).fingerprint()
    assert read(one).keys() == Checkpoint(two).tensors.keys()


@pytest.mark.parametrize(
    "damage", ["", "another file of one size and time", "a cache that is no text", "a cache cut short"]
)
def test_a_remembered_fingerprint_is_that_of_the_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10_000_000_000)  # ten seconds after all that is written here
    folder = write_checkpoint(tmp_path / "model", weights())
    other = write_checkpoint(tmp_path / "other", weights(seed=5))
    before, right = Checkpoint(folder).fingerprint(), Checkpoint(other).fingerprint()
    cached = sorted((cache_folder() / "fingerprints").iterdir())
    if damage == "another file of one size and time":
        stamp = (folder / "model.safetensors").stat()
        shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
        os.utime(folder / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert Checkpoint(folder).fingerprint() == right
        return
    for file in cached if damage else ():
        file.write_bytes(b"\xff" * 64 if damage == "a cache that is no text" else file.read_bytes()[:30])
    assert Checkpoint(folder).fingerprint() == before


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    whole = torch.randn(7, 5).bfloat16()
    save_file({"w": whole, "s": torch.tensor(3.0)}, tmp_path / WHOLE)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("w", slice(2, 5)), whole[2:5])
    assert torch.equal(checkpoint.read("w"), whole)
    assert checkpoint.read("s").item() == 3.0


def test_metadata_that_are_null_are_none_as_the_safetensors_library_takes_them(tmp_path: Path) -> None:
    file = written(tmp_path / WHOLE, {"a": entry(), "__metadata__": None}, b"x" * 8)
    with safe_open(file, "pt") as opened:
        assert list(opened.keys()) == [info.name for info in read_header(file)]


def test_a_name_that_no_system_takes_is_told_as_missing(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 10_000 + ".safetensors"}}))
    with pytest.raises(RecipeError, match="missing from"):
        model_files(tmp_path)


@pytest.mark.parametrize("differs_at", [None, 0, 8, 1999])
def test_a_tied_output_layer_is_told_without_two_whole_embeddings_in_memory(tmp_path, monkeypatch, differs_at):
    """Of a 70B they are 4.2 GB."""
    tensors = {"embed.weight": torch.ones(2000, 3), "head.weight": torch.ones(2000, 3)}
    if differs_at is not None:
        tensors["head.weight"][differs_at, 1] = 2.0
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2000}))
    read, rows = Checkpoint.read, []

    def watched(self, name, some=None):
        found = read(self, name, some)
        rows.append(len(found))
        return found

    monkeypatch.setattr(Checkpoint, "read", watched)
    assert Checkpoint(tmp_path).twins == ({} if differs_at is not None else {"head.weight": "embed.weight"})
    assert max(rows) <= 1024
