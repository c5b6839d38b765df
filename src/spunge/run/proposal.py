"""A recipe for a model and rows, where nobody wrote one: columns that are guessed, defaults by the model's size, an evaluation that
says of every part whether it is forgotten, and what that cost.

The defaults are our choice, not a paper's; they stand in the recipe, to be changed there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spunge.data.guessing import guessed_attribute, guessed_texts, quoted, reading_told
from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.data.split import Part, split_rows
from spunge.data.texts import text_table, unspaced
from spunge.errors import RecipeError
from spunge.model.hub import local_folder
from spunge.model.loading import load_tokenizer
from spunge.recipe.explanation import validated
from spunge.recipe.loading import apply_overrides, load_recipe
from spunge.recipe.model import ModelSettings
from spunge.recipe.rows import NEUTRAL
from spunge.recipe.schema import Recipe
from spunge.recipe.training import DescentSettings, LoRA, MethodSettings
from spunge.registry import METHODS
from spunge.run.planning.unweighted import with_shapes
from spunge.weights.checkpoint import Checkpoint, model_files

METHOD = "npo"
ROLES = ("text", "prompt", "completion", "messages")
NO_ATTRIBUTE = "none"  # in place of an attribute: one part
KEPT = "rows to keep"  # what the evaluation calls those that are held out
EVERY = 5  # of the rows to keep, each so many-th is held out of the training and judged by
FEWEST = 20  # rows to keep of which some are held out
STEPS = 50  # of a part's training, about, where its rows come 1 to 10 times
LIMIT = 200  # rows to forget that are judged, of all parts together
OWN_LIMIT = 100  # rows to keep, and plain texts
# Entries of the model up to which a factor is for, and the factor on a method's own learning rate: of LoRA, and of RMU.
RATES: dict[str, list[tuple[float, float]]] = {
    "lora": [(2e9, 3), (9e9, 2), (float("inf"), 1)],
    "rmu": [(0.5e9, 2), (2e9, 1), (float("inf"), 0.05)],
}
LENGTHS = (128, 256, 512, 1024)  # tokens of a sample
SIZED = 256  # rows that are measured for it
WHOLE = 0.95  # of them are not cut
LARGE = 3e9  # entries from which activations are computed again, and a batch is made up of two


@dataclass(frozen=True)
class Asked:
    """What a person says in place of a recipe, as the recipe has it. What is missing is guessed, or has a default."""

    model: str
    forget: Any  # a source
    texts: Mapping[str, str] = field(default_factory=dict)  # role -> column
    where: str | None = None
    by: Any = None
    retain: Any = None  # a source
    method: str = METHOD
    length: Mapping[str, float] = field(default_factory=dict)  # epochs or steps
    controls: Sequence[str] | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Proposal:
    content: dict[str, Any]  # the recipe, with paths as they were given
    remarks: dict[str, str]  # block -> why it is so, for its reader
    said: list[str]  # what was guessed, a line each
    recipe: Recipe


def propose(asked: Asked) -> Proposal:
    """A recipe of what is asked. Reads the rows and the model's headers.

    Raises RecipeError, with the option to give, where there is no sensible guess or more than one, and as the recipe would.
    """
    content = _begun(asked)
    method = METHODS.get(_method(content))
    if not method.trains:
        raise RecipeError(f"--method: {_method(content)!r} brings branches of its own, which a recipe names; write one")
    known = _without_judging(content)
    with with_shapes(known) as shaped:  # where there is a configuration and no weights
        return _proposed(asked, content, method.settings, known, (shaped or known).model)


def _proposed(
    asked: Asked, content: dict[str, Any], settings: type[MethodSettings], known: Recipe, model: ModelSettings
) -> Proposal:
    """model: the recipe's, or the one of its shapes."""
    remarks: dict[str, str] = {}
    said: list[str] = []
    query = Query(read_rows(known.forget.source, "forget.source")) if known.forget else None
    if query is None:
        raise RecipeError("--forget: missing; give the rows to forget")
    kept = query.where(known.forget.where, "forget.where") if known.forget else np.arange(query.rows)
    _name_texts(content, query, kept, model, said)
    _name_attribute(content, asked, query, kept, said)
    folder = local_folder(model)
    entries = _entries(folder)
    _name_retain(content, said)
    parts = split_rows(_without_judging(content)).parts
    remarks["model"] = f"{entries / 1e6:.3g} million weights; the training's settings below are for this size"
    if "max_lengths" not in content["unlearn"]:
        content["unlearn"].setdefault("max_length", _length(parts, load_tokenizer(model, folder)))
    _set_training(content, settings, entries, [len(part.samples) for part in parts])
    remarks["unlearn"] = "our choice for a model of this size and parts of these sizes, no paper's"
    if len(parts) == 1:
        content.setdefault("merge", {"rule": "task_arithmetic"})
        remarks["merge"] = "there is one part: its change is added to the model as it is"
    content.setdefault("controls", list(asked.controls) if asked.controls is not None else ["joint"] * (len(parts) > 1))
    content["evaluate"] = _evaluations(content, known)
    if "prompt" in content["forget"] and find_spec("rouge_score") is None:
        said.append("evaluate: ROUGE is left out, which needs rouge-score (pip install 'spunge[judge]')")
    remarks["evaluate"] = "was it forgotten, by part; were rows like those to keep kept; is plain text read as before"
    apply_overrides(content, asked.overrides)
    content = {name: content[name] for name in Recipe.model_fields if name in content}
    said.append(_training_told(content["unlearn"], entries))
    return Proposal(content, remarks, said, load_recipe(content))


@dataclass(frozen=True)
class Open:
    """What cannot be guessed of the rows: why, in one line, or nothing where it can be."""

    texts: str = ""
    attribute: str = ""
    columns: Sequence[str] = ()  # of the rows
    nested: Collection[str] = ()  # those of them that hold lists or records, as conversations are


def what_is_open(asked: Asked) -> Open:
    """What a person has to say of the rows before a recipe can be proposed. Raises RecipeError where they cannot be read."""
    content = _begun(asked)
    known = _without_judging(content)
    if known.forget is None:
        raise RecipeError("--forget: missing; give the rows to forget")
    query = Query(read_rows(known.forget.source, "forget.source"))
    schema = query.records.table.schema
    read = Open(columns=query.columns, nested={each.name for each in schema if pa.types.is_nested(each.type)})
    said: list[str] = []
    try:
        _guess_texts(content, query, said)
    except RecipeError as error:
        return replace(read, texts=str(error))
    try:
        _name_attribute(content, asked, query, query.where(known.forget.where, "forget.where"), said)
    except RecipeError as error:
        return replace(read, attribute=str(error))
    return read


def _begun(asked: Asked) -> dict[str, Any]:
    """The recipe as far as it is said, overrides included but for those of what is still to come."""
    content: dict[str, Any] = {"model": {"path": asked.model}, "forget": {"source": asked.forget, **asked.texts}}
    if asked.where is not None:
        content["forget"]["where"] = asked.where
    if asked.retain is not None:
        content["retain"] = asked.retain if asked.retain == NEUTRAL else {"source": asked.retain}
    content["unlearn"] = {"method": asked.method, **asked.length}
    if isinstance(asked.by, Mapping):
        content["split"] = {"by": dict(asked.by)}
    apply_overrides(content, [each for each in asked.overrides if not each.strip().startswith("evaluate")])
    if any(each.partition("=")[0].strip() == "unlearn" for each in asked.overrides):
        raise RecipeError("--set unlearn: with --forget its settings are given one by one, such as unlearn.method=rmu")
    return content


def _method(content: Mapping[str, Any]) -> str:
    """The method that is run: --method's, or that of --set unlearn.method, which comes last."""
    return str(content["unlearn"]["method"])


def _without_judging(content: Mapping[str, Any]) -> Recipe:
    """The recipe of the rows and their parts alone."""
    return load_recipe(
        {name: content[name] for name in ("model", "forget", "split") if name in content} | {"judge": []}
    )


def _guess_texts(content: dict[str, Any], query: Query, said: list[str]) -> dict[str, str]:
    forget = content["forget"]
    given = {role: forget[role] for role in ROLES if role in forget}
    texts = guessed_texts(query, given, "forget", "--text, --prompt and --completion, or --messages")
    if texts != given:
        said.append(f"forget: {reading_told(texts)} (guessed by the columns' names)")
    forget |= texts
    return texts


def _name_texts(content: dict[str, Any], query: Query, kept: np.ndarray, model: ModelSettings, said: list[str]) -> None:
    """The columns of the texts, and how they are put to the model."""
    forget, texts = content["forget"], _guess_texts(content, query, said)
    if "prompt" not in texts or "chat" in forget:
        return
    if load_tokenizer(model, local_folder(model)).chat_template:
        forget["chat"] = True
        said.append("forget: the model has a chat template, and prompts are put as a user's message (forget.chat)")
    elif unspaced(text_table(query, texts, "forget"), kept, "forget"):
        prompt = texts["prompt"] if query.column(texts["prompt"]) is None else quoted(texts["prompt"])
        forget["prompt"] = f"{prompt} || chr(10)"
        said.append("forget: no white space stands between prompt and completion; a line break is put there")


def _name_attribute(content: dict[str, Any], asked: Asked, query: Query, kept: np.ndarray, said: list[str]) -> None:
    split = content.setdefault("split", {})
    if asked.by == NO_ATTRIBUTE and query.column(NO_ATTRIBUTE) is None:
        content.pop("split")
    elif asked.by:
        split.setdefault("by", asked.by)
    elif "by" not in split:
        texts = {role: content["forget"][role] for role in content["forget"].keys() & {"text", "prompt", "completion"}}
        guessed = guessed_attribute(query, kept, texts)
        if guessed is None:
            content.pop("split")
            said.append("split: no column looks like an attribute; all rows are one part (--by COLUMN splits them)")
        else:
            split["by"] = guessed
            said.append(f"split: by {guessed} (guessed: few values, all words, in every row)")


def _name_retain(content: dict[str, Any], said: list[str]) -> None:
    """The rows to keep: some are held out of the training, to be judged by."""
    if "retain" not in content:
        method = METHODS.get(_method(content))
        if not method.needs_retain(validated(method.settings, content["unlearn"])):
            return
        content["retain"] = NEUTRAL
        said.append(
            "retain: no rows to keep are given; paragraphs of Wikipedia are taken (--retain FILE: rows like yours)"
        )
    retain = {"source": NEUTRAL, "text": "text"} if content["retain"] == NEUTRAL else content["retain"]
    if not isinstance(retain, dict) or "source" not in retain or "where" in retain:
        return  # it says itself which rows
    shown = {name: content[name] for name in ("model", "forget")}
    rows = load_recipe({**shown, "retain": retain, "judge": []}).retain
    if rows is None or rows.source is None:
        return
    query = Query(read_rows(rows.source, "retain.source"))
    forget = content["forget"]
    own = {role: given for role, given in forget.items() if role in ROLES}
    if not rows.columns and not all(query.has(given) for given in own.values()):
        options = "--set retain.text=COLUMN, or retain.prompt and retain.completion"
        texts = guessed_texts(query, {}, "retain", options)
        retain = {**retain, **texts}
        said.append(f"retain: {reading_told(texts)} (guessed by the columns' names)")
    if query.rows >= FEWEST:
        name = next(each for each in ("row", "row_number", "number_of_row") if query.column(each) is None)
        sources = retain["source"] if isinstance(retain["source"], list) else [retain["source"]]
        numbered = [{**({"path": each} if isinstance(each, str) else each), "row_number": name} for each in sources]
        retain = {**retain, "source": numbered if len(numbered) > 1 else numbered[0], "where": f"{name} % {EVERY} <> 0"}
        columns = {role: retain[role] for role in ROLES if role in retain} or own
        said.append(_held_out_told(query, columns))
    else:
        said.append(
            f"retain: {query.rows} rows are too few to hold some out; the judging is on the rows of the training"
        )
    content["retain"] = retain


def _held_out_told(query: Query, columns: Mapping[str, str]) -> str:
    """Which rows to keep are held out, and how many of them stand among the trained ones again, which they then do not judge."""
    held = np.arange(query.rows) % EVERY == 0
    told = f"retain: {held.sum()} of the {query.rows} rows are held out of the training, to be judged by"
    texts = query.project(columns, "retain.").columns if columns else []
    if not texts or not all(pa.types.is_string(text.type) for text in texts):
        return told  # conversations
    whole = pc.binary_join_element_wise(*texts, "\x1f")
    again = pc.is_in(whole.filter(pa.array(held)), value_set=whole.filter(pa.array(~held)), skip_nulls=True)
    count = pc.sum(again).as_py()
    return (
        f"{told}; {count} of them stand among the trained rows too: leave out rows that repeat others"
        if count
        else told
    )


def _training_told(unlearn: Mapping[str, Any], entries: int) -> str:
    """`unlearn: npo; 10 epochs, batch_size 8, learning_rate 0.001, LoRA of rank 16 (for 135 million weights; ..)`."""
    shown = [f"{unlearn[name]} {name}" for name in ("epochs", "steps") if unlearn.get(name)]
    shown += [f"{name} {unlearn[name]}" for name in ("preset", "batch_size", "learning_rate") if unlearn.get(name)]
    trained = unlearn.get("trainable")
    shown += [f"LoRA of rank {trained['rank']}"] if isinstance(trained, Mapping) and "rank" in trained else []
    settings = f"; {', '.join(shown)}" if shown else ""
    return f"unlearn: {unlearn['method']}{settings} (for {entries / 1e6:.3g} million weights; --set unlearn.NAME=VALUE changes it)"


def _length(parts: Sequence[Part], tokenizer: Any) -> int:
    """Tokens of a sample: the least of LENGTHS that cuts few of the rows, by some of each part."""
    sizes: list[int] = []
    for part in parts:
        some = range(min(len(part.samples), max(1, SIZED // len(parts))))
        texts = part.samples.texts(some, tokenizer, "forget")
        sizes += [len(tokenizer(text.prompt + text.completion)["input_ids"]) for text in texts]
    return next((length for length in LENGTHS if np.mean(np.array(sizes) < length) >= WHOLE), LENGTHS[-1])


def _set_training(content: dict[str, Any], settings: type[Any], entries: int, sizes: Sequence[int]) -> None:
    """Learning rate, batches, passes and what is trained, where the recipe does not say."""
    unlearn, fields = content["unlearn"], settings.model_fields
    if not issubclass(settings, DescentSettings):
        return
    lora = isinstance(fields["trainable"].default, LoRA)
    rates = RATES["lora" if lora else "rmu"] if lora or unlearn["method"] == "rmu" else [(float("inf"), 1.0)]
    factor = next(factor for most, factor in rates if entries <= most)
    large = entries >= LARGE
    if "preset" not in unlearn:
        unlearn.setdefault("learning_rate", float(f"{fields['learning_rate'].default * factor:.2g}"))
        unlearn.setdefault("batch_size", 4 if large else min(8, fields["batch_size"].default))
        if large:
            unlearn.setdefault("accumulation", 2)
        if lora:
            unlearn.setdefault("trainable", {"kind": "lora", "rank": 16, "targets": "all-linear", "dropout": 0})
    if fields["epochs"].default is not None and not {"epochs", "steps"} & unlearn.keys():
        rows = sorted(sizes)[len(sizes) // 2]
        unlearn["epochs"] = max(1, min(10, round(STEPS * 8 / max(1, rows))))
    elif not {"epochs", "steps"} & unlearn.keys():
        unlearn["steps"] = fields["steps"].default
    content["model"].setdefault("dtype", "auto")
    if large:
        content["model"].setdefault("checkpoint_activations", True)


def _evaluations(content: Mapping[str, Any], known: Recipe) -> list[dict[str, Any]]:
    """What says whether it worked, for every part, and what it cost."""
    forget, retain = content["forget"], content.get("retain")
    plain = "text" in forget
    answers: dict[str, Any] = {"metrics": ["probability", "extraction"]}
    if find_spec("rouge_score") is not None:
        answers = {"metrics": ["rouge", "probability", "extraction"], "words": "unicode"}
        answers["generation"] = {"max_new_tokens": 48}
    texts = {"metrics": ["exact", "extraction"]}
    judged: list[dict[str, Any]] = [
        {"kind": "memorization", "name": "forget", "group": "forget", **(texts if plain else answers), "limit": LIMIT}
    ]
    if forget.get("where"):
        judged[0]["where"] = forget["where"]
    if plain:
        measured = {name: value for name, value in judged[0].items() if name != "metrics"}
        judged.append({**measured, "kind": "perplexity", "name": "forget texts"})
    neutral = False
    if isinstance(retain, Mapping) and "source" in retain:
        columns = {role: retain[role] for role in ROLES if role in retain}
        kind = {"kind": "perplexity"} if "text" in (columns or forget) else {"kind": "memorization", **answers}
        where = str(retain.get("where", "")).replace("<>", "=")
        own = {"by": "NULL", "subject": KEPT, "group": "keep", "limit": OWN_LIMIT}
        own |= {"where": where} if where else {}
        judged.append({**kind, "name": "keep", "source": retain["source"], **columns, **own})
        neutral = _is_neutral(retain["source"])
    if not neutral:
        own = {"text": "text", "by": "NULL", "subject": "plain text", "group": "keep", "limit": OWN_LIMIT}
        judged.append({"kind": "perplexity", "name": "plain text", "source": NEUTRAL, **own})
    return judged


def _is_neutral(source: Any) -> bool:
    return source == NEUTRAL or (isinstance(source, Mapping) and source.get("path") == NEUTRAL)


def _entries(folder: Path) -> int:
    """How many weights the model has; of pickled ones about."""
    files = model_files(folder)
    if files.pickled:
        return sum(file.stat().st_size for file in files.files) // 2
    return sum(info.numel for info in Checkpoint(folder).tensors.values())
