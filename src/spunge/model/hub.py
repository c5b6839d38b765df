"""Where a model is: a folder, or a Hub id that is downloaded; pickled weights only where the recipe trusts them."""

from pathlib import Path

from spunge.errors import RecipeError
from spunge.recipe.schema import ModelSettings

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def local_folder(settings: ModelSettings) -> Path:
    """The model's folder, downloaded if it is a Hub id. Raises RecipeError for a missing one and for pickled weights."""
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        if settings.path.startswith((".", "/", "~")):
            raise RecipeError(f"model.path: no folder {settings.path!r}; give a checkpoint's folder or a Hub id")
        folder = _downloaded(settings)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if not pickles:
            raise RecipeError(f"model.path: {settings.path!r} holds no weights (no .safetensors file)")
        if not settings.allow_pickle:
            raise RecipeError(
                f"model.path: {settings.path!r} has pickled weights alone ({pickles[0]}), which can run code when read; "
                "convert them to safetensors, or set model.allow_pickle=true if you trust them"
            )
    return folder


def _downloaded(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.txt",
        "*.py" if settings.trust_remote_code else "*.json",
    ]
    if settings.allow_pickle:
        patterns.append("*.bin")
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.path: {settings.path!r} is no folder here and could not be had from the Hub ({reason})"
        ) from error


def convert_pickles(folder: Path, out: Path, settings: ModelSettings) -> None:
    """Write a model of pickled weights, with its tokenizer, as safetensors into the folder `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=settings.trust_remote_code)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code).save_pretrained(out)
