"""Code of others runs only where the recipe names it, and `spunge plan` says so in a line each."""

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call
from spunge.errors import RecipeError
from spunge.evaluation.scorers.classifiers import load_classifier
from spunge.evaluation.similarity import load_encoder
from spunge.model.loading import load_base
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.run.plan import plan, trusted

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


class Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.mark), "ran")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there only after code of another ran."""
    return tmp_path / "ran"


@pytest.fixture
def carrying(tiny: Callable[..., Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder brings its own Python, and a person who would say yes to whatever a library asks."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "carrying"))
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "mine.Config",
        "AutoModelForCausalLM": "mine.Model",
        "AutoModelForSequenceClassification": "mine.Model",
    }
    config |= {"model_type": "mine", "auto_map": names, "architectures": ["MineForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "mine.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_a_models_own_python_is_not_run_unless_the_recipe_says_so(
    carrying: Path, mark: Path, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    toy_recipe["model"]["path"] = str(carrying)
    (tmp_path / "recipe.yaml").write_text(json.dumps(toy_recipe))
    for command in ("plan", "run", "split"):
        arguments = [
            command,
            str(tmp_path / "recipe.yaml"),
            *(["--out", str(tmp_path / "o")] if command != "split" else []),
        ]
        call(*arguments)
        assert not mark.exists(), command


@pytest.mark.parametrize("load", ["scorer", "base"])
def test_no_judge_runs_a_models_own_python(carrying: Path, mark: Path, load: str) -> None:
    loads: dict[str, Callable[[], Any]] = {
        "scorer": lambda: load_classifier(str(carrying), None, "evaluate.scorer", "cpu"),
        "base": lambda: load_base(carrying, ModelSettings(path=str(carrying))),
    }
    with pytest.raises(RecipeError, match="carrying"):
        loads[load]()
    assert not mark.exists()


def test_no_merge_runs_a_models_own_python(carrying: Path, mark: Path, tmp_path: Path) -> None:
    call("merge", "--base", str(carrying), "--model", str(carrying), "--out", str(tmp_path / "out"))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["os.system", "mine.Module", 5, None, "sentence_transformers_of_mine.X"])
def test_an_encoder_with_modules_of_its_own_is_refused(tmp_path: Path, mark: Path, kind: object) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    (tmp_path / "encoder" / "mine.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(RecipeError, match=r"^evaluate.encoder: .* brings code of its own"):
        load_encoder(str(tmp_path / "encoder"), None, "cpu")
    assert not mark.exists()


@pytest.mark.parametrize("place", ["model", "scorer", "adapter", "state"])
def test_a_pickle_that_would_run_code_runs_none(
    tiny: Callable[..., Path], tiny_bert: Path, tmp_path: Path, mark: Path, place: str
) -> None:
    source = tiny_bert if place == "scorer" else tiny("llama")
    folder = Path(shutil.copytree(source, tmp_path / "pickled"))
    evil = pickle.dumps({"model.embed_tokens.weight": Payload(str(mark))})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(evil)
    torch.save({"x": Payload(str(mark))}, folder / "saved.bin")
    shutil.copyfile(folder / "saved.bin", folder / "pytorch_model.bin")
    if place == "model":
        with pytest.raises(RecipeError, match="pickled"):
            plan({"model": str(folder), "forget": {"source": "neutral"}, "unlearn": "ga"}, tmp_path / "run")
    elif place == "scorer":
        with pytest.raises(RecipeError, match="cannot be loaded as a text classifier"):
            load_classifier(str(folder), None, "evaluate.scorer", "cpu")
    elif place == "adapter":
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
        shutil.copyfile(folder / "saved.bin", adapter / "adapter_model.bin")
        ended = call("merge", "--base", str(source), "--model", str(adapter), "--out", str(tmp_path / "out"))
        assert ended.returncode == 2
    else:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(folder / "saved.bin", weights_only=True)
    assert not mark.exists()


def test_every_file_that_torch_reads_is_read_as_tensors_alone() -> None:
    root = Path(__file__).parent.parent.parent / "src" / "spunge"
    own = (
        root / "model" / "board.py"
    )  # what processes of one command leave each other in a folder that its user alone can open
    for file in set(root.rglob("*.py")) - {own}:
        text = file.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), file
        assert "allow_pickle=True" not in text, file
        assert "import joblib" not in text, file
        assert "pickle.load" not in text, file


def test_plan_says_in_a_line_each_what_may_run_code(toy_recipe: dict[str, Any], tmp_path: Path, mark: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom spunge.evaluation.perplexity import PERPLEXITY\nMINE = replace(PERPLEXITY)\n"
    )
    toy_recipe["model"] |= {"allow_pickle": True, "trust_remote_code": True}
    toy_recipe["evaluate"] = [
        {"kind": f"{tmp_path / 'mine.py'}:MINE", "name": "mine"},
        {"kind": "lm_eval", "tasks": ["piqa"], "include_path": [str(tmp_path)]},
    ]
    lines = trusted(load_recipe(toy_recipe))
    assert [line.partition(":")[0] for line in lines] == [
        "model.allow_pickle",
        "model.trust_remote_code",
        "evaluate.0.kind",
        "evaluate.1.include_path.0",
    ]
    assert "mine.py:MINE' is run as Python" in lines[2]
    toy_recipe["evaluate"] = toy_recipe["evaluate"][:1]
    (tmp_path / "recipe.yaml").write_text(json.dumps(toy_recipe))
    shown = call("plan", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")).stdout
    assert all(f"note: {line}\n" in shown for line in lines[:3])


def test_a_recipe_that_trusts_nothing_has_no_such_line(toy_recipe: dict[str, Any]) -> None:
    assert trusted(load_recipe(toy_recipe)) == []


def test_transformers_is_never_left_to_ask_whether_to_run_code() -> None:
    """A call without `trust_remote_code` asks whoever sits there. What a configuration was built for needs none."""
    root = Path(__file__).parent.parent.parent / "src" / "spunge"
    asked = (
        "AutoConfig.from_pretrained",
        "AutoTokenizer.from_pretrained",
        "AutoModel.from_pretrained",
        "SentenceTransformer",
    )
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(asked):
                named = {keyword.arg for keyword in node.keywords}
                assert named & {"trust_remote_code", None}, f"{file.name}:{node.lineno}"
