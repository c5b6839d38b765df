"""mergekit's configurations: what is understood, and what is refused rather than ignored."""

import pytest
import yaml

from making import weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.merging.mergekit import read_mergekit


def plan(tmp_path, text):
    (tmp_path / "merge.yaml").write_text(text)
    return read_mergekit(tmp_path / "merge.yaml")


def config(method="ties", parameters="weight: 1", models="{model: m}", rest="base_model: b"):
    return f"{{merge_method: {method}, parameters: {{{parameters}}}, models: [{models}], {rest}}}"


def slices(*sources, method="ties", rest=""):
    return f"{{merge_method: {method}, base_model: b, slices: [{', '.join(f'{{sources: [{each}]{rest}}}' for each in sources)}]}}"


def test_mergekits_own_ties_example(tmp_path):
    found = plan(
        tmp_path,
        """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {density: [1, 1, 1], weight: 1.0}
  - model: garage-bAInd/Platypus2-13B
    parameters: {density: 0.5, weight: 0.3}
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true, lambda: 1.5}
dtype: float16
""",
    )
    assert found.base == "TheBloke/Llama-2-13B-fp16"
    assert found.models == ["psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"]
    assert found.weights == [1.0, 0.3]
    assert found.settings == {
        "rule": "ties",
        "density": [1, 0.5],
        "scope": "tensor",
        "scale": 1.5,
        "dtype": "float16",
    }
    assert found.notes == []


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce"])
def test_a_listed_base_is_not_merged_into_itself(tmp_path, method):
    text = f"{{merge_method: {method}, base_model: b, models: [{{model: b}}, {{model: m, parameters: {{weight: 1}}}}]}}"
    assert plan(tmp_path, text).models == ["m"]


def test_linear_without_a_base_takes_the_first_model_as_one(tmp_path):
    text = "{merge_method: linear, parameters: {weight: 1}, models: [{model: a}, {model: b}]}"
    found = plan(tmp_path, text)
    assert (found.base, found.models, found.weights, found.settings) == (
        "a",
        ["a", "b"],
        [1.0, 1.0],
        {"rule": "average"},
    )


@pytest.mark.parametrize("base", ["", "base_model: a"])
def test_linear_without_normalising_is_the_sum_of_the_models(tmp_path, base):
    found = plan(tmp_path, config("linear", "weight: 1, normalize: false", "{model: a}, {model: b}", base))
    assert (found.base, found.models, found.settings) == ("a", ["a", "b"], {"rule": "weighted_sum"})


@pytest.mark.parametrize("normalize", ["true", '"true"', "yes", "1"])
def test_task_arithmetic_normalised_is_a_mean(tmp_path, normalize):
    text = config("task_arithmetic", f"weight: 1, normalize: {normalize}")
    assert plan(tmp_path, text).settings == {"rule": "average"}


@pytest.mark.parametrize("written", ["0.5", ".5", "5e-1", "5.0e-1", '"0.5"', "+0.5", "5E-1", "0_0.5", "[0.5, 0.5]"])
def test_a_number_may_be_written_in_any_way(tmp_path, written):
    inner = f"{{weight: {written}, density: {written}}}"
    text = f"""
merge_method: ties
base_model: b
models: [{{model: m, parameters: {inner}}}]
parameters: {{lambda: {written}}}
"""
    found = plan(tmp_path, text)
    assert found.weights == [0.5]
    assert (found.settings["density"], found.settings["scale"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "written", ["{value: 0.3}", "[{value: 0.3}]", "[{filter: '*', value: 0.3}]", "[{value: [0.3, 0.3]}]"]
)
def test_a_parameter_that_is_the_same_everywhere_is_one_number(tmp_path, written):
    text = f"{{merge_method: slerp, base_model: a, parameters: {{t: {written}}}, models: [{{model: a}}, {{model: b}}]}}"
    assert plan(tmp_path, text).settings == {"rule": "slerp", "t": 0.3}


@pytest.mark.parametrize(
    ("method", "parameters", "settings"),
    [
        ("nuslerp", "weight: 1", {"rule": "nuslerp"}),
        ("nuslerp", "weight: 1, nuslerp_flatten: false", {"rule": "nuslerp", "by": "row"}),
        ("multislerp", "weight: 1, normalize_weights: true", {"rule": "multislerp", "of": "deltas"}),
        ("model_stock", "", {"rule": "model_stock"}),
        ("model_stock", "filter_wise: 'true'", {"rule": "model_stock", "by": "row"}),
        ("nearswap", "t: 1e-3", {"rule": "nearswap", "t": 0.001}),
        ("arcee_fusion", "", {"rule": "arcee_fusion"}),
    ],
)
def test_methods_along_spheres_are_read(tmp_path, method, parameters, settings):
    assert plan(tmp_path, config(method, parameters)).settings == settings


@pytest.mark.parametrize("method", ["karcher", "nuslerp", "multislerp"])
def test_a_mean_of_models_without_a_base_holds_the_first_model_too(tmp_path, method):
    weight = "" if method == "karcher" else ", parameters: {weight: 1}"
    found = plan(tmp_path, f"{{merge_method: {method}, models: [{{model: a{weight}}}, {{model: b{weight}}}]}}")
    assert (found.base, found.models) == ("a", ["a", "b"])
    assert found.settings == {"rule": method, "of": "models"}


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("{dtype: bfloat16}", "bfloat16"),
        ("{dtype: bfloat16, out_dtype: float32}", "float32"),
        ("{out_dtype: torch.float16}", "float16"),
        ("{}", None),
    ],
)
def test_the_written_dtype_is_mergekits(tmp_path, written, wanted):
    plain = {
        "merge_method": "task_arithmetic",
        "base_model": "b",
        "models": [{"model": "m", "parameters": {"weight": 1}}],
    }
    found = plan(tmp_path, yaml.safe_dump({**plain, **yaml.safe_load(written)}))
    assert found.settings.get("dtype") == wanted


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("{model: {path: owner/m}}", "owner/m"),
        ("{model: {path: owner/m, revision: v2}}", "owner/m@v2"),
        ("owner/m@v2", "owner/m@v2"),
        ("b+owner/lora", "owner/lora"),
        ("{model: b, lora: owner/lora}", "owner/lora"),
        ("{model: {path: b}, lora: {path: owner/lora, revision: r}}", "owner/lora@r"),
    ],
)
def test_a_model_may_be_referred_to_in_mergekits_ways(tmp_path, reference, name):
    text = config("task_arithmetic", models=f"{{model: {reference}}}", rest="base_model: {model: {path: b}}")
    found = plan(tmp_path, text)
    assert (found.base, found.models) == ("b", [name])


def test_one_slice_of_all_layers_is_the_whole_model(tmp_path):
    found = plan(
        tmp_path,
        """
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
    parameters: {t: 0.4}
merge_method: slerp
base_model: a
parameters: {t: 0.9}
tokenizer: {source: base}
dtype: bfloat16
""",
    )
    assert (found.base, found.models, found.layers) == ("a", ["b"], 32)
    assert found.settings == {"rule": "slerp", "t": 0.4, "dtype": "bfloat16"}


def test_a_folder_whose_name_holds_a_plus_is_a_folder(tmp_path):
    (tmp_path / "a+b").mkdir()
    text = f"{{merge_method: linear, parameters: {{weight: 1}}, models: [{{model: {tmp_path}/a+b}}]}}"
    assert plan(tmp_path, text).models == [f"{tmp_path}/a+b"]


def test_a_template_that_may_not_be_the_bases_is_remarked_on(tmp_path):
    text = "{merge_method: linear, parameters: {weight: 1}, models: [{model: m}], chat_template: auto}"
    assert "chat_template" in plan(tmp_path, text).notes[0]


def test_slerp_goes_from_the_base_to_the_other(tmp_path):
    text = "{merge_method: slerp, base_model: a, parameters: {t: 0.3}, models: [{model: a}, {model: b}]}"
    found = plan(tmp_path, text)
    assert (found.models, found.settings) == (["b"], {"rule": "slerp", "t": 0.3})


def test_a_parameter_without_a_value_is_mergekits_default(tmp_path):
    assert plan(tmp_path, config(parameters="weight: 1, lambda: , density: ")) == plan(tmp_path, config())


WEIGHED = "{model: m, parameters: {weight: 1, epsilon: 0.1}}, {model: n, parameters: {weight: 1}}"
HALF = "{model: m, layer_range: [0, 8]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (slices("", ""), "slices: layers cannot be picked"),
        (slices("{model: m, layer_range: [4, 8]}"), "layer_range"),
        (slices(f"{HALF}, {{model: n, layer_range: [0, 4]}}"), "layer_range"),
        (slices(HALF, rest=", residual_weight: 0"), "slices.residual_weight: not supported"),
        ("{slices: [{sources: []}], models: [{model: m}], merge_method: ties}", "either models or slices"),
        ("{merge_method: ram, models: []}", "ram is not supported; supported: ties"),
        (config("karcher", ""), "base_model: karcher takes the mean of all"),
        (config("nearswap", ""), "t: missing, and nearswap needs it"),
        (config("arcee_fusion", "", "{model: n}, {model: m}"), "arcee_fusion goes from base_model"),
        (config("model_stock", "weight: 2"), "weight: model_stock reads none"),
        (config("multislerp", "weight: 1, normalize_weights: false"), "normalize_weights: False is not supported"),
        (config("nuslerp", "weight: 1, nuslerp_row_wise: true"), "nuslerp_row_wise: True is not supported"),
        ("{merge_method: TIES, models: []}", "no rule 'TIES'; did you mean 'ties'?"),
        (slices("{model: m, layer_range: [0, x]}"), "layer_range"),
        (config("slerp", "t: "), "t: missing, and slerp needs it"),
        (config(rest=""), "base_model: missing"),
        (config(parameters=""), "weight: missing for 'm'"),
        (config(models=""), "nothing to merge"),
        (config(models="m"), "has no `model`"),
        (config(models="{model: m, weight: 1}"), "models.weight: not supported"),
        (config(models="{model: [m]}"), "give a folder or a Hub id"),
        (config(models="{model: m+l}"), "lora: 'l' stands on 'm'"),
        (config(models="{model: {model: m, lora: l}}"), "lora: 'l' stands on 'm'"),
        (config(models="{model: {model: m, override_architecture: X}}"), "override_architecture"),
        (config(rest="base_model: b+l"), "base_model: 'b' with an adapter"),
        (config(rest="base_model: b, modules: {}"), "modules: not supported"),
        (config(rest="base_model: b, mergemethod: ties"), "mergemethod: not supported; did you mean"),
        (config(parameters="weight: [0, 1]"), "weight: gradients"),
        (config(parameters="weight: [{filter: mlp, value: 1}]"), "weight: gradients"),
        (config(parameters="weight: a lot"), "weight: 'a lot' is no number"),
        (config(parameters="weight: 1, gamma: 1"), "gamma: ties has no such parameter"),
        (config(parameters="weight: 1, normalize: false"), "normalize: ties always does here"),
        (config(parameters="weight: 1, normalize: often"), "normalize: 'often'"),
        (config(parameters="weight: 1, rescale: true"), "rescale: ties always does not here"),
        (config("breadcrumbs", "weight: 1, normalize: true"), "normalize: breadcrumbs always does not"),
        (config("task_arithmetic", "weight: 1, density: 1"), "density: task_arithmetic has no such"),
        (config("linear", "weight: 1, lambda: 1"), "lambda: linear has no such parameter"),
        (config("slerp", "t: 0.5, weight: 0.5"), "weight: slerp reads none"),
        (config("slerp", "t: 0.5", "{model: n}, {model: m}"), "slerp goes from base_model"),
        (config("sce", "weight: 2"), "weight: sce reads none"),
        (config("dare_ties", "weight: 1, rescale: false"), "rescale: dare_ties always does here"),
        (config("della", "weight: 1, rescale_norm: linf"), "rescale_norm"),
        (config("della", "", WEIGHED), "epsilon: della has one for all"),
        (config(rest="base_model: b, dtype: int8"), "dtype: 'int8'"),
        (config(rest="base_model: b, chat_template: chatml"), "chat_template"),
        (config(rest="base_model: b, tokenizer: {source: union}"), "tokenizer.source"),
        (config(rest="base_model: b, tokenizer: {source: base, tokens: {a: {}}}"), "tokenizer.tokens"),
        (config(rest="base_model: b, tokenizer: base"), "tokenizer: 'base' is no mapping"),
        (config(rest="base_model: b, tokenizer_source: union"), "tokenizer_source"),
        (config(rest="base_model: b, tokenizer_source: other"), "tokenizer_source"),
        (config() + "\n---\n" + config(), "2 documents"),
        ("a: [", "not YAML"),
        ("{merge_method: slerp, slices: [{sources: 3}]}", "slices.sources: 3 is no list"),
        ('{merge_method: linear, models: [{model: "a\\0"}]}', "give a folder or a Hub id"),
        ("[]", "no merge_method"),
        ("", "no merge_method"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError) as error:
        plan(tmp_path, text)
    assert str(error.value).startswith("--mergekit: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", [{"as_delta": True}, {}])
def test_the_files_dtype_is_said_to_be_left_out_where_no_checkpoint_is_written(tmp_path, form):
    base = write_checkpoint(tmp_path / "b", weights())
    model = write_checkpoint(tmp_path / "m", {name: each + 1 for name, each in weights().items()})
    file = tmp_path / "merge.yml"
    file.write_text(
        f"{{merge_method: task_arithmetic, base_model: {base}, dtype: float16, models: [{{model: {model}, "
        "parameters: {weight: 1}}]}"
    )
    merged = merge_command(tmp_path / "out", mergekit=file, **form)
    said = [note for note in merged.notes if "dtype float16 is not read" in note]
    assert len(said) == len(form)
