"""Where a model, a delta or an adapter is: a folder here, or an id on the Hub, whose files are downloaded once.

The only place that downloads weights. What is downloaded is what transformers would load from the folder, beside the small
files: not the repository's other formats, back-ups and `consolidated*`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from spunge.copies import folder_here
from spunge.errors import RecipeError
from spunge.files import parse_json
from spunge.weights.checkpoint import INDEX, PICKLED, PICKLED_INDEX, WHOLE

# Code is downloaded, and run only where model.trust_remote_code says so.
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.md", "LICENSE*", "*.py")
WEIGHTS = (WHOLE, "adapter_model.safetensors", "delta.safetensors")
_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@]+))?")


def fetched(
    where: "str | Path", setting: str, revision: str | None = None, *, pickles: bool = False, only: Sequence[str] = ()
) -> Path:
    """The folder itself, or that of a Hub id (`owner/name`, `owner/name@revision`) in the Hub's cache.

    setting: the recipe's key or the option, for errors. pickles: take pickled weights where there are no others.
    only: these files and no others. Raises RecipeError, one line.
    """
    folder = Path(os.path.expanduser(folder_here(str(where))))
    if str(where) and os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise RecipeError(f"{setting}: {str(where)!r} is a file; give the folder that it lies in")
    match = _ID.fullmatch(str(where))
    if match is None or str(where).startswith((".", "/", "~")):
        raise RecipeError(f"{setting}: no folder {str(where)!r}; give a folder, or a Hub id such as owner/name")
    if revision and match["revision"] not in (None, revision):
        raise RecipeError(f"{setting}: {str(where)!r} names another revision than {revision!r}; give one of them")
    wanted = revision or match["revision"]
    snapshot = _snapshot(match["id"], wanted, only or (*SMALL, *WEIGHTS), setting)
    if not only and (more := _named_weights(snapshot, pickles)):
        snapshot = _snapshot(
            match["id"], snapshot.name, (*SMALL, *WEIGHTS, *more), setting
        )  # the cache names it by its commit
    return snapshot


def _snapshot(identifier: str, revision: str | None, patterns: Sequence[str], setting: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        # Whatever the library raises, of the network, the disk or the id: it is told in its first line.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(
            f"{setting}: {identifier!r} cannot be fetched from the Hub, and is no folder here ({reason})"
        ) from error


def _named_weights(folder: Path, pickles: bool) -> list[str]:
    """The files of weights that the downloaded configuration or index names; those of WEIGHTS are here already."""
    named = _json(folder / "config.json").get("transformers_weights")
    if named is None and (folder / WHOLE).is_file():
        return []
    for index in (INDEX, PICKLED_INDEX) if named is None else (str(named),):
        if os.path.isfile(folder / index) and index.endswith(".index.json") and (pickles or index != PICKLED_INDEX):
            shards = _json(folder / index).get("weight_map")
            return sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else []
    if named is not None:
        return [str(named)]
    return [PICKLED] if pickles else []


def _json(file: Path) -> dict[str, object]:
    """What is damaged here is told by whoever opens the folder."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
