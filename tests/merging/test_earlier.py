"""What stands at --out: the same merge is left, another one stays unless it may go, and nothing else is ever touched."""

import json
import os
import shutil

import pytest

from making import delta_source, noise
from spunge.errors import RecipeError
from spunge.merging.command import merge_command

FORMS = [{}, {"as_delta": True}, {"as_adapter": 2}]
CHANGED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def call(tiny, tmp_path):
    """call(form, **more): merge one delta into a tiny model, to tmp_path / "out"."""
    base = tiny("llama")
    delta_source(tmp_path / "d", base, {CHANGED: noise(0, 32, 48, size=0.01)})

    def merge(form, **more):
        return merge_command(tmp_path / "out", str(base), [str(tmp_path / "d")], **{**form, **more})

    return merge


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_merge_again_is_left_as_it_is_and_told_alike(call, tmp_path, form):
    first = call(form)
    written, stamp = contents(tmp_path / "out"), (tmp_path / "out" / "merge.json").stat().st_mtime_ns
    assert call(form).to_json() == first.to_json()
    assert call(form, replace=True).to_json() == first.to_json()
    assert contents(tmp_path / "out") == written
    assert (tmp_path / "out" / "merge.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_a_merge_into_a_base_that_was_described_otherwise_since_is_another_where_it_copies_that(
    tiny, tmp_path, form, file
):
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    delta_source(tmp_path / "d", base, {CHANGED: noise(0, 32, 48, size=0.01)})

    def merge(**more):
        return merge_command(tmp_path / "out", str(base), [str(tmp_path / "d")], **{**form, **more})

    merge()
    (base / file).write_text('{"eos_token_id": [2, 7]}')
    if form:
        merge()
        return
    with pytest.raises(RecipeError, match="holds another merge; give another folder, or --replace"):
        merge()
    merge(replace=True)
    assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_another_merge_is_replaced_only_where_that_is_said(call, tmp_path, form, other):
    call(form)
    before = contents(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"--out: .* holds another merge; give another folder, or --replace"):
        call(other, settings={"scale": 2.0})
    assert contents(tmp_path / "out") == before
    call(other, settings={"scale": 2.0}, replace=True)
    after = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    call(other, settings={"scale": 2.0})
    assert contents(tmp_path / "out") == after  # nothing of the earlier one is left
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_no_merge_wrote_is_never_replaced(call, tmp_path, form, replace):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="no merge wrote it"):
        call(form, replace=replace)
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("form", FORMS)
def test_missing_weights_are_made_again_and_changed_ones_stay(call, tmp_path, form):
    call(form)
    whole = contents(tmp_path / "out")
    weights = next((tmp_path / "out").glob("*.safetensors"))
    weights.unlink()
    call(form)
    assert contents(tmp_path / "out") == whole
    with weights.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(RecipeError, match="were changed since"):
        call(form)
    call(form, replace=True)
    assert contents(tmp_path / "out") == whole


def test_a_damaged_report_is_not_taken_for_this_merge(call, tmp_path):
    call({})
    (tmp_path / "out" / "merge.json").write_text("{")
    with pytest.raises(RecipeError, match="holds another merge"):
        call({})
    call({}, replace=True)


def test_a_merge_that_another_process_finished_meanwhile_is_not_replaced(call, tmp_path, monkeypatch):
    from spunge.merging import engine

    call({})
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    monkeypatch.setattr(engine, "earlier", lambda out, key, replace: None)  # it was not there when this one looked
    with pytest.raises(RecipeError, match="holds another merge"):
        call({}, settings={"scale": 2.0})
    assert contents(tmp_path / "out") == contents(tmp_path / "kept")


@pytest.mark.parametrize(("form", "key"), [(FORMS[0], "tensors"), (FORMS[1], "kind"), (FORMS[2], "norm")])
def test_a_report_that_lacks_something_is_told_as_damaged_and_replaced_where_that_is_said(call, tmp_path, form, key):
    call(form)
    whole = contents(tmp_path / "out")
    report = json.loads(whole["merge.json"])
    del report[key]
    (tmp_path / "out" / "merge.json").write_text(json.dumps(report))
    with pytest.raises(RecipeError, match=r"merge\.json is damaged; give --replace"):
        call(form)
    call(form, replace=True)
    assert contents(tmp_path / "out") == whole
