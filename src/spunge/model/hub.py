"""The folder of a recipe's model: here or downloaded, and with safetensors weights; pickled ones only where they are trusted."""

from pathlib import Path

from spunge.errors import RecipeError
from spunge.files import whole_folder
from spunge.recipe.schema import ModelSettings
from spunge.weights.checkpoint import model_files
from spunge.weights.hub import fetched


def local_folder(settings: ModelSettings, setting: str = "model.path") -> Path:
    """The model's folder, downloaded if it is a Hub id. `setting` names what gave it, for errors.

    Raises RecipeError where there is none, or where its weights are pickled and the recipe does not trust them.
    """
    folder = fetched(settings.path, setting, settings.revision, pickles=settings.allow_pickle)
    files = model_files(folder, setting)
    if files.pickled and not settings.allow_pickle:
        mend = ", or set model.allow_pickle=true if you trust them" if setting == "model.path" else ""
        raise RecipeError(
            f"{setting}: {settings.path!r} has pickled weights alone ({files.files[0].name}), which can run code when read; "
            f"convert them to safetensors{mend}"
        )
    return folder


def convert_pickles(folder: Path, out: Path, settings: ModelSettings) -> None:
    """Write a model of pickled weights, with its tokenizer, as safetensors into `out`, which is absent or empty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=settings.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    with whole_folder(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
