"""Regular expressions that would keep Python's matching busy for ever are refused in time; those that people write are not."""

import time
from pathlib import Path

import pytest

from spunge.errors import RecipeError
from spunge.weights import expressions
from spunge.weights.expressions import Expression, refuse_endless, refuse_no_expressions

NAMES = [f"model.layers.{number}.{layer}" for number in range(40) for layer in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize("text", ["(.+)+#", r"(\w|\w\w|\.)*#", "(.*.*)*#", 12 * "(.?.*)" + "#"])
@pytest.mark.parametrize("form", ["{}", r"(.*\.)?({})$"])
def test_one_that_goes_back_for_ever_is_refused_with_what_it_says(
    text: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.15)
    fine, endless = Expression("a has x", "(?:q|k)_proj"), Expression("a has y", text, form)
    refuse_no_expressions([fine, endless])
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"^a has y, a regular expression that is not done with the model's 80 names"):
        refuse_endless([fine, endless, fine], NAMES)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|gate_proj|up_proj|down_proj)))",
        r"^(?!.*visual)(?!.*merger).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
        r".*\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        "(q_proj",  # told elsewhere
    ],
    ids=["unsloth", "vision models", "plain", "none"],
)
def test_one_that_people_write_passes_on_the_names_of_a_large_model(text: str) -> None:
    names = [
        f"model.language_model.layers.{at}.mlp.experts.{each}.down_proj" for at in range(60) for each in range(128)
    ]
    refuse_endless([Expression("a has x", text, whole=True)], [*names, *NAMES])


def test_names_alone_start_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(expressions.sys, "executable", str(tmp_path / "none"))
    refuse_endless(
        [Expression("a has x", "layers.1.self_attn.q_proj"), Expression("a has x", r"lm_head\.weight")], NAMES
    )
    with pytest.raises(FileNotFoundError):
        refuse_endless([Expression("a has x", ".*proj")], NAMES)
