"""mergekit's configurations: what is understood, and what is refused rather than ignored."""

import pytest

from spunge.errors import RecipeError
from spunge.merging.mergekit import read_mergekit


def plan(tmp_path, text):
    (tmp_path / "merge.yaml").write_text(text)
    return read_mergekit(tmp_path / "merge.yaml")


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
    assert found.settings == {"rule": "ties", "density": [1, 0.5], "scope": "tensor", "scale": 1.5}
    assert "float16" in found.notes[0]


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


def test_linear_without_normalising_is_a_sum(tmp_path):
    text = "{merge_method: linear, base_model: a, parameters: {weight: 1, normalize: false}, models: [{model: b}]}"
    assert plan(tmp_path, text).settings == {"rule": "task_arithmetic"}


def test_slerp_goes_from_the_base_to_the_other(tmp_path):
    text = "{merge_method: slerp, base_model: a, parameters: {t: 0.3}, models: [{model: a}, {model: b}]}"
    found = plan(tmp_path, text)
    assert (found.models, found.settings) == (["b"], {"rule": "slerp", "t": 0.3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{slices: [], merge_method: ties}", "slices"),
        ("{merge_method: karcher, models: []}", "no rule 'karcher'"),
        ("{merge_method: ties, models: [{model: m}]}", "base_model: missing"),
        ("{merge_method: ties, base_model: b, models: [{model: m}]}", "weight: missing"),
        ("{merge_method: ties, base_model: b, models: []}", "nothing to merge"),
        ("{merge_method: ties, base_model: b, models: [{model: m, parameters: {weight: [0, 1]}}]}", "gradients"),
        ("{merge_method: ties, base_model: b, models: [{model: m, parameters: {weight: 1, gamma: 1}}]}", "gamma"),
        ("{merge_method: ties, base_model: b, models: [{model: m+l, parameters: {weight: 1}}]}", "an adapter is a model"),
        ("{merge_method: ties, base_model: b, modules: {}}", "modules: not supported"),
        ("{merge_method: ties, base_model: b, parameters: {rescale: true, weight: 1}, models: [{model: m}]}", "rescale"),
        ("{merge_method: ties, base_model: b, parameters: {weight: 1}, models: [{model: m}], tokenizer_source: union}", "token"),
        ("a: [", "not YAML"),
        ("[]", "no merge_method"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message.replace("+", r"\+")):
        plan(tmp_path, text)
