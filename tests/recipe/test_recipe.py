"""What a recipe accepts, what it fills in, and the one line it answers with when something is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spunge.errors import RecipeError
from spunge.recipe.loading import dump_recipe, load_recipe, shipped_recipes


def refused(recipe: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("unlearn.lerning_rate=1", ["unlearn.lerning_rate", "did you mean 'learning_rate'?"]),
        ("modle.path=x", ["modle", "did you mean 'model'?"]),
        ("forget.wheer=x", ["forget.wheer", "did you mean 'where'?"]),
        ("merge.densty=0.3", ["merge.densty", "did you mean 'density'?"]),
        ("merge.density=0", ["merge.density: 0: it should be greater than 0"]),
        ("merge.density=1.5", ["merge.density: 1.5: it should be less than or equal to 1"]),
        ("unlearn.coefficient=abc", ["unlearn.coefficient: 'abc': it should be a valid number"]),
        (
            "unlearn.trainable={kind: lor}",
            ["unlearn.trainable.kind: 'lor': it should be one of 'lora', 'tensors', 'all'"],
        ),
        ("unlearn.trainable={kind: tensors, mach: [a]}", ["unlearn.trainable.mach", "did you mean 'match'?"]),
        ("split=5", ["split: 5: it should be a mapping"]),
        ("split=topic", ["split: 'topic': it should be a mapping, such as {by: topic}"]),
        ("retain=keep.jsonl", ["retain: 'keep.jsonl': it should be a mapping, such as {source: keep.jsonl}"]),
        ("retain=Neutral", ["retain: 'Neutral': write neutral"]),
        ("retain=none", ["retain: 'none': write null, or leave it out"]),
        ("controls=joint", ["controls: 'joint': it should be a list, such as [joint]"]),
        ("split.values=a", ["split.values: 'a': it should be a list, such as [a]"]),
        ("split.by=2024", ["split.by: 2024: it should be a text; in quotes it is one"]),
        ("unlearn.steps=true", ["unlearn.steps: True: it should be a number, not true or false"]),
        ("unlearn.learning_rate=true", ["unlearn.learning_rate: True: it should be a number, not true or false"]),
        ("unlearn.layer=false", ["unlearn.layer: False: it should be a number, not true or false"]),
        ("merge.density=[0.5, true]", ["merge.density: [0.5, True]: it should be a number, not true or false"]),
        ("seed=true", ["seed: True: it should be a number, not true or false"]),
        ("evaluate.0.limit=true", ["evaluate.0.limit: True: it should be a number, not true or false"]),
        ("unlearn.learning_rate=.inf", ["unlearn.learning_rate: inf: it should be a finite number"]),
        ("unlearn.learning_rate=.nan", ["unlearn.learning_rate: nan: it should be"]),
        ("merge.scale=inf", ["merge.scale: 'inf': it should be a finite number"]),
        ("merge.rule=TIES", ["merge.rule: no rule 'TIES'; did you mean 'ties'?"]),
        ("unlearn.method= RMU ", ["unlearn.method: no method 'RMU'; did you mean 'rmu'?"]),
        ("unlearn.Steps=3", ["unlearn.Steps: no such setting; did you mean 'steps'?"]),
        ("forget.source={pth: a}", ["forget.source.0.pth: no such setting; did you mean 'path'?"]),
        ("merge.rule=tise", ["merge.rule", "'tise'", "did you mean 'ties'?"]),
        ("unlearn.method=rum", ["unlearn.method", "'rum'", "did you mean 'rmu'?"]),
        ("evaluate.0.kind=choises", ["evaluate.kind", "did you mean 'choices'?"]),
        ("evaluate.9.kind=choices", ["--set", "'9'"]),
        ("evaluate.0.normalise=none", ["evaluate.0.normalise: no such setting; did you mean 'normalize'?"]),
        ("evaluate.0.limit=0", ["evaluate.0.limit: 0: it should be greater"]),
        ("evaluate.0={knid: choices}", ["evaluate.0.knid: no such setting; did you mean 'kind'?"]),
        ("evaluate.0={limit: 3}", ["evaluate.0.kind: missing; known: choices, perplexity"]),
        ("evaluate.0=5", ["evaluate.0: 5: it should be a mapping"]),
        ("unlearn={methode: rmu, steps: 3}", ["unlearn.methode: no such setting; did you mean 'method'?"]),
        ("unlearn={steps: 3}", ["unlearn.method: missing; known: rmu, tvn"]),
        ("unlearn.method=3", ["unlearn.method: 3: it should be a text; in quotes it is one"]),
        ("merge={rul: average}", ["merge.rul: no such setting; did you mean 'rule'?"]),
        (
            "controls=[{name: c, merge: {rule: ties, densty: 1}}]",
            ["controls.0.merge.densty", "did you mean 'density'?"],
        ),
        ("controls=[{name: c, merge: {rul: ties}}]", ["controls.0.merge.rul: no such setting; did you mean 'rule'?"]),
        ("evaluate.0={kind: toxicity, generation: {smaples: 2}}", ["evaluate.0.generation.smaples", "'samples'?"]),
        ("controls=5", ["controls: 5: it should be a list"]),
        ("unlearn.epochs=2", ["either epochs or steps"]),  # the toy recipe gives steps
        ("unlearn.steps=zero", ["unlearn.steps", "'zero'"]),
        ("split.unassigned=maybe", ["split.unassigned", "'maybe'"]),
        ("forget.prompt=a", ["forget", "prompt and completion go together"]),
        ("retain=null", ["retain", "needs it"]),
        ("seed", ["--set", "a.b=value"]),
        ("seed=-1", ["seed", "-1"]),
        ("controls=[jiont]", ["controls", "'jiont'"]),
        ("model.path=./nowhere", []),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend(toy_recipe: dict[str, Any], override: str, parts: list[str]) -> None:
    if not parts:
        assert load_recipe(toy_recipe, [override]).model.path == str(Path.cwd() / "nowhere")
        return
    message = refused(toy_recipe, override)
    for part in parts:
        assert part in message, message


ODD: list[Any] = [5, "odd", [None], {"odd": 5}, None]


def places(content: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every setting of a recipe, as --set names it."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield ".".join((*path, str(key)))
        yield from places(value, (*path, str(key)))


def test_no_odd_value_anywhere_is_more_than_one_line(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["controls"] = [{"name": "average", "merge": {"rule": "average"}}]
    for place in [*places(toy_recipe), "split.values", "evaluate.0.stages", "seed"]:
        for value in ODD:
            try:
                load_recipe(toy_recipe, [f"{place}={yaml.safe_dump(value, default_flow_style=True)}"])
            except RecipeError as error:
                message = str(error)
                assert "\n" not in message
                assert ": " in message, (place, value)


def test_every_default_is_written_out_and_loads_to_the_same_recipe(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(toy_recipe)
    written = yaml.safe_load(dump_recipe(recipe))
    assert written["merge"] == {"rule": "ties", "density": 0.5, "scale": 1.0, "scope": "changed"} | written["merge"]
    assert written["unlearn"]["alpha"] == 100
    assert written["split"]["unassigned"] == "drop"
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_paths_in_a_file_are_relative_to_the_file_and_in_an_override_to_the_working_directory(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_recipe["forget"]["source"] = "rows.jsonl"
    toy_recipe["unlearn"] = {"method": "whp", "anchors": "terms.yaml"}
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "recipe.yaml"
    file.write_text(yaml.safe_dump(toy_recipe))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file).forget.source[0].path == str(tmp_path / "here" / "rows.jsonl")
    assert dict(load_recipe(file).unlearn)["anchors"] == str(tmp_path / "here" / "terms.yaml")
    assert load_recipe(file, ["forget.source=there.jsonl"]).forget.source[0].path == str(tmp_path / "there.jsonl")


def test_a_list_of_sources_keeps_its_assigned_columns(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["forget"]["source"] = [{"path": "/a.jsonl", "assign": {"domain": "bio"}}, {"hub": "org/data"}, "/b.csv"]
    sources = load_recipe(toy_recipe).forget.source
    assert [source.path or source.hub for source in sources] == ["/a.jsonl", "org/data", "/b.csv"]
    assert sources[0].assign == {"domain": "bio"}
    toy_recipe["forget"]["source"] = {"path": "/a", "hub": "b"}
    assert "either path or hub" in refused(toy_recipe)


def test_a_recipe_that_is_no_mapping_or_no_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("- a\n- b\n")
    assert "must be a mapping" in refused(file)
    file.write_text("a: [\n")
    assert "not YAML" in refused(file)
    assert "no file 'dmo'" in refused("dmo")
    assert "did you mean 'demo'?" in refused("dmo")


@pytest.mark.parametrize("file", shipped_recipes(), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid(file: Path) -> None:
    recipe = load_recipe(file)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert file.read_text().startswith("# ")


def test_trust_and_pickles_are_off_unless_the_recipe_says_so(toy_recipe: dict[str, Any]) -> None:
    model = load_recipe(toy_recipe).model
    assert not model.trust_remote_code
    assert not model.allow_pickle


def test_two_evaluations_of_one_name_are_refused(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["evaluate"].append(dict(toy_recipe["evaluate"][0]))
    assert "called 'choices'" in refused(toy_recipe)


def test_a_control_is_written_as_the_merge_is_where_it_does_not_say_otherwise(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["merge"] = {"rule": "ties", "dtype": "float32", "rounding": "nearest"}
    own = {"name": "own", "merge": {"rule": "ties", "dtype": "bfloat16"}}
    toy_recipe["controls"] = ["joint", "average", {"name": "short", "merge": "consensus"}, own]
    recipe = load_recipe(toy_recipe)
    written = {each.name: (each.merge.dtype, each.merge.rounding) for each in recipe.controls if each.merge is not None}
    like_the_merge = ("float32", "nearest")
    assert written == {"average": like_the_merge, "short": like_the_merge, "own": ("bfloat16", "nearest")}
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_recipe_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes("model: x\n# Gr\xfc\xdfe\n".encode(encoding))
    assert f"is not UTF-8 (line {2 if encoding == 'cp1252' else 1}); save it as UTF-8" in refused(file)


def test_a_recipe_may_be_saved_by_windows(tmp_path: Path, toy_recipe: dict[str, Any]) -> None:
    (tmp_path / "plain.yaml").write_bytes(dump_recipe(load_recipe(toy_recipe)).encode())
    (tmp_path / "windows.yaml").write_bytes(
        dump_recipe(load_recipe(toy_recipe)).replace("\n", "\r\n").encode("utf-8-sig")
    )
    assert load_recipe(tmp_path / "windows.yaml") == load_recipe(tmp_path / "plain.yaml")


def test_spaces_around_a_set_key_are_no_part_of_it(toy_recipe: dict[str, Any]) -> None:
    assert load_recipe(toy_recipe, ["unlearn.steps = 7"]) == load_recipe(toy_recipe, ["unlearn.steps=7"])


LEAST = {"model": "owner/name", "forget": {"source": "rows.jsonl", "text": "text"}, "unlearn": {"method": "ga"}}


@pytest.mark.parametrize("override", ["model.path=" + "long" * 2500, "forget.source=~nobody-of-this-name/rows.jsonl"])
def test_a_path_that_no_system_takes_is_left_to_whoever_opens_it(override: str) -> None:
    assert override.partition("=")[2] in str(load_recipe(LEAST, [override]))


@pytest.mark.parametrize(
    "override",
    [
        "unlearn.method=~nobody-of-this-name/file.py:NAME",
        "long" * 2500 + "=1",
        "forget.text=" + "9" * 5000,
        "unknown.[=1",
        "[=1",
        "seed=.nan",
        "model.template.x=.nan",
        "model.template.x=[-.inf]",
        "seed=" + "[" * 100_000,
    ],
)
def test_whatever_is_set_is_refused_in_one_line(override: str) -> None:
    assert len(refused(LEAST, override)) < 300


def test_an_unknown_key_that_looks_like_a_part_of_an_error_is_named() -> None:
    assert refused({"float": 1}).startswith("float: no such setting")


@pytest.mark.parametrize("value", [{1, 2}, b"x", object()])
def test_what_yaml_has_no_word_for_is_refused_in_a_mapping_too(value: object) -> None:
    with pytest.raises(RecipeError, match="the mapping holds something that is no setting"):
        load_recipe({"model": value})


def test_a_mapping_that_holds_itself_is_refused() -> None:
    recipe: dict[str, object] = {}
    recipe["model"] = recipe
    with pytest.raises(RecipeError, match="holds itself"):
        load_recipe(recipe)


def test_a_file_of_rows_is_not_read_through_as_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.truncate(1 << 34)
    with pytest.raises(RecipeError, match="17179869184 bytes"):
        load_recipe(file)
