"""Tiny random models of each architecture, a tiny tokenizer, and the demo's real model where it is set up."""

import copy
import gc
import json
import os
import shutil

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from serving import Served, served
from toys import ARCHITECTURES, ROOT, SEEING, WORDS, rows
from variety import build

SHARED = ROOT.parent / "shared" / "data"
REAL_MODEL = ROOT / "models" / "smollm2-135m-instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where the tests marked gpu run; cpu tries the tests themselves")


def pytest_configure(config: pytest.Config) -> None:
    # With another number of threads torch adds up in another order: also in the processes that tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.fsync = lambda file: None  # no test's files have to outlive a power cut


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _known_to_stay() -> None:
    """What is imported by now stays. No later search for garbage, which `spunge` does as it frees a model, goes through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds scores of the base that another one left."""
    beside = tmp_path.with_name(f"{tmp_path.name}-cache")  # not inside: tests look at all that lies in their own folder
    monkeypatch.setenv("SPUNGE_CACHE", str(beside))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for word in [
        *WORDS,
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
        *"abcdefghijklmnopqrstuvwxyz.?!,",
    ]:
        vocabulary.setdefault(word, len(vocabulary))
    vocabulary = {word: index for word, index in vocabulary.items() if index < 128}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """tiny("llama") -> the folder of a random model of that architecture; the same one each time."""
    made: dict[str, Path] = {}

    def build(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        name = f"{architecture}-{dtype}-{sorted(changes.items())}"
        if name not in made:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

            torch.manual_seed(0)
            config = AutoConfig.for_model(architecture, **{**ARCHITECTURES.get(architecture, {}), **changes})
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
            made[name] = folder
        return made[name]

    return build


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """seeing("llava") -> the folder of a random model of texts and images, as published ones are; the same one each time."""
    made: dict[str, Path] = {}

    def build(kind: str = "llava") -> Path:
        if kind not in made:
            import transformers

            torch.manual_seed(0)
            name, settings = SEEING[kind]
            model = getattr(transformers, name)._from_config(transformers.AutoConfig.for_model(kind, **settings))
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
            for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
                (folder / file).write_text(json.dumps({"image_size": 28, "made for": kind}))
            made[kind] = folder
        return made[kind]

    return build


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """base_of("gemma3") -> the folder of a model of `variety`; the same one each time."""
    made: dict[tuple[str, str], Path] = {}

    def folder(name: str, whole: str = "") -> Path:
        if (name, whole) not in made:
            made[name, whole] = build(name, tmp_path_factory.mktemp(name), whole)
        return made[name, whole]

    return folder


@pytest.fixture(scope="session")
def load(tiny: Callable[..., Path]) -> Callable[..., Any]:
    """load("llama") -> a Base of a tiny model, in float32; the caller's own, a copy of one that was loaded once."""
    from spunge.model.loading import load_base
    from spunge.recipe.model import ModelSettings

    loaded: dict[Path, Any] = {}

    def build(architecture: str = "llama", **changes: Any) -> Any:
        folder = tiny(architecture, **changes)
        if folder not in loaded:
            loaded[folder] = load_base(folder, ModelSettings(path=str(folder), dtype="float32"))
        mine = loaded[folder]
        return replace(mine, model=copy.deepcopy(mine.model), tokenizer=copy.deepcopy(mine.tokenizer))

    return build


@pytest.fixture(scope="session")
def real_model() -> Path:
    if not (REAL_MODEL / "config.json").exists():
        pytest.skip("the demo model is not set up: run `make test`")
    return REAL_MODEL


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("shared data is not beside the repository")
    return SHARED


def _write_rows(folder: Path, name: str, content: list[dict[str, Any]]) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return file


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows("name.jsonl", rows) -> the file."""
    return partial(_write_rows, tmp_path)


@pytest.fixture(scope="session")
def _toy_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toy")
    questions = [
        {
            "topic": topic,
            "question": f"the capital of {country} is",
            "choices": ["paris", "rome", "madrid", "tokyo"],
            "answer": index,
        }
        for topic, pairs in {"europe": ["france", "italy", "spain"], "asia": ["japan"]}.items()
        for index, country in enumerate(pairs)
    ]
    contents = {"forget": rows(["europe", "asia"]), "retain": rows(["other"]), "questions": questions}
    return {name: _write_rows(folder, f"{name}.jsonl", content) for name, content in contents.items()}


def _toy_recipe(model: Path, files: dict[str, Path]) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "forget": {"source": str(files["forget"])},
        "split": {"by": "topic"},
        "retain": {"source": str(files["retain"])},
        "unlearn": {"method": "rmu", "layer": 2, "steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "merge": {"rule": "ties", "density": 0.5},
        "evaluate": [
            {"kind": "choices", "source": str(files["questions"])},
            {"kind": "perplexity", "source": str(files["retain"]), "subject": "retain", "by": "NULL"},
        ],
        "seed": 3,
    }


@pytest.fixture
def toy_recipe(tiny: Callable[..., Path], _toy_rows: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """A recipe on a tiny Llama: two topics to forget, one to retain, questions and texts to judge by.

    The recipe is the test's own; the rows' files are every test's, and stay as they are.
    """
    before = {file: file.read_bytes() for file in _toy_rows.values()}
    yield _toy_recipe(tiny("llama"), _toy_rows)
    for file, content in before.items():
        assert file.read_bytes() == content, f"{file.name} belongs to all tests: write rows of your own"


@pytest.fixture(scope="session")
def _finished(tiny: Callable[..., Path], _toy_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import spunge

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUNGE_CACHE", str(folder / "cache"))
        spunge.run(_toy_recipe(tiny("llama"), _toy_rows), folder / "run")
    return folder / "run"


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """The folder of a whole run of `toy_recipe`: a copy, so that a test may do with it what it likes."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random text classifier whose labels are unsafe and fine."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    names = {"id2label": {0: "unsafe", 1: "fine"}, "label2id": {"unsafe": 0, "fine": 1}}
    config = BertConfig(**shape, **names, num_attention_heads=4, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random sentence encoder: a BERT with mean pooling."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    inner, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("encoder")
    BertModel(BertConfig(**shape, num_attention_heads=4, initializer_range=0.5)).save_pretrained(inner)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(inner)
    module = Transformer(str(inner))
    SentenceTransformer(modules=[module, Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_nli(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """tiny_nli("neutral", "entailment") -> the folder of a random classifier with these labels."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    def build(*labels: str) -> Path:
        torch.manual_seed(0)
        shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: at for at, label in enumerate(labels)}}
        config = BertConfig(**shape, **names, num_attention_heads=4, initializer_range=0.5, max_position_embeddings=64)
        folder = tmp_path_factory.mktemp("nli")
        BertForSequenceClassification(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A chat endpoint on this machine."""
    with served() as server:
        yield server


@pytest.fixture(scope="session")
def bits_of() -> Callable[[Any], dict[str, torch.Tensor]]:
    """bits_of(model) -> a copy of its parameters and buffers."""
    return lambda model: {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium that is installed, driven by playwright."""
    from spunge.report.picture import BROWSERS

    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    if installed is None:
        pytest.skip("no browser is installed")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe() -> Callable[..., str]:
    """axe(page) -> what axe-core finds that a screen reader or a weak eye cannot use, or nothing.

    But for one rule: that a page which shows progress loads itself anew is what it is for.
    """
    driven = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed").Axe()

    def found(page: Any) -> str:
        results = driven.run(page, options={"rules": {"meta-refresh": {"enabled": False}}})
        return str(results.generate_report()) if results.violations_count else ""

    return found
