"""What works on which architecture: every language model of transformers, tiny and random, is tried and the table written.

python scripts/architectures.py                    # those not in docs/architectures.json yet; then docs/architectures.md
python scripts/architectures.py --again [KIND ...]  # all of them anew, or some
python scripts/architectures.py --part 1/4          # a quarter of them

Tried of each: load, RMU, LoRA (TVN with its defaults), full (TVN on every tensor),
merge (full checkpoints and deltas; the merged folder loads to base + change) and the merge as an adapter (peft loads it over
the base). A cell is `yes`, `refused` with the line that a user sees, or `fails` with the error.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pyarrow as pa
import torch
from tiny_models import tiny_model, write_tokenizer
from torch import Tensor

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.merging.engine import merge
from spunge.merging.rules import TaskArithmeticSettings
from spunge.model.loading import Base, load_base
from spunge.recipe.model import ModelSettings
from spunge.registry import METHODS
from spunge.unlearning.method import Task
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Delta, write_delta
from spunge.weights.opening import open_source
from spunge.weights.overlay import applied

DOCS = Path(__file__).parent.parent / "docs"
STEPS = ["load", "rmu", "lora", "full", "merge", "adapter"]
SECONDS = 120  # for one architecture
IDS = torch.arange(3, 27)[None]
Row = dict[str, str]


class WrongError(Exception):
    """The result is another than it must be."""


def kinds() -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    names = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    return list(dict.fromkeys(names))


def tried(kind: str) -> Row:
    """One row of the table; {"built": why not} where transformers builds no such model tiny."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "base"
        try:
            with _limited():
                model = tiny_model(kind)
                model.save_pretrained(folder)
                write_tokenizer(folder)
                again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
                _require_close({"logits": _logits(again)}, {"logits": _logits(model)}, "loaded again as it was saved")
        except Exception as error:
            return {"built": _line(error).removeprefix("ValueError: ")}
        return {"class": type(model).__name__, **_steps(folder, Path(place))}


def _steps(folder: Path, place: Path) -> Row:
    row: Row = {}
    deltas: dict[str, Delta] = {}
    base: Base | None = None

    def attempt(step: str, work: Callable[[], None]) -> None:
        try:
            with _limited():
                work()
            row[step] = "yes"
        except RecipeError as error:
            row[step] = f"refused: {str(error).replace(str(place), '').replace(str(folder.parent), '')}"
        except Exception as error:
            row[step] = f"fails: {_line(error)}"

    def load() -> None:
        nonlocal base
        base = load_base(folder, ModelSettings(path=str(folder), dtype="float32"))
        if not bool(torch.isfinite(_logits(base.model)).all()):
            raise WrongError("the logits are not finite")

    def unlearn(name: str, method: str, **settings: Any) -> Callable[[], None]:
        def work() -> None:
            if base is None:
                raise RecipeError("it is not loaded")
            before = _logits(base.model)
            chosen = METHODS.get(method)
            task = Task(base, {"a": _samples(3)}, _samples(60), {"a": 1})
            values = {"method": method, "steps": 2, "batch_size": 2, "learning_rate": 0.01, **settings}
            branch = chosen.unlearn(task, chosen.settings(**values))
            deltas[name] = write_delta(place / name, branch.changes, {"base": Checkpoint(folder).fingerprint()})
            if not torch.equal(_logits(base.model), before):
                raise WrongError("the base was not put back")
            with applied(base.parameters, deltas[name]):
                if torch.equal(_logits(base.model), before):
                    raise WrongError("the delta changes nothing")

        return work

    attempt("load", load)
    attempt("rmu", unlearn("rmu", "rmu", layer=1))
    attempt("lora", unlearn("lora", "tvn"))
    attempt("full", unlearn("full", "tvn", trainable={"kind": "all"}))
    attempt("merge", lambda: _merge(base, folder, place, deltas))
    attempt("adapter", lambda: _adapter(base, folder, place, deltas))
    return row


def _merge(base: Base | None, folder: Path, place: Path, deltas: dict[str, Delta]) -> None:
    """Half of a delta, and half of a full checkpoint that transformers saved."""
    if base is None:
        raise RecipeError("it is not loaded")
    tuned = place / "tuned"
    shutil.copytree(folder, tuned)
    model = type(base.model).from_pretrained(folder)
    for number, parameter in enumerate(model.parameters()):
        noise = torch.Generator().manual_seed(number)
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(tuned)
    half = {name: value + 0.5 * (model.state_dict()[name] - value) for name, value in base.model.state_dict().items()}
    model.load_state_dict(half)
    right = {"tuned": _logits(model)}
    if "full" in deltas:
        with applied(base.parameters, deltas["full"], 0.5):
            right["full"] = _logits(base.model)
    for name, logits in right.items():
        out = place / f"merged-{name}"
        merge(folder, [open_source(place / name, folder)], TaskArithmeticSettings(scale=0.5), out)
        got = _logits(load_base(out, ModelSettings(path=str(out), dtype="float32")).model)
        _require_close({"logits": got}, {"logits": logits}, "half way to the other model")


def _adapter(base: Base | None, folder: Path, place: Path, deltas: dict[str, Delta]) -> None:
    """The LoRA branch as an adapter, over the base by peft; of a merge of rank 16 at the most nothing is lost."""
    import peft

    if base is None or "lora" not in deltas:
        raise RecipeError("there is no LoRA branch")
    out = place / "adapter"
    merge_command(out, str(folder), [str(place / "lora")], rule="task_arithmetic", as_adapter=32)
    with applied(base.parameters, deltas["lora"]):
        right = _logits(base.model)
    model = load_base(folder, ModelSettings(path=str(folder), dtype="float32")).model
    _require_close(
        {"logits": _logits(peft.PeftModel.from_pretrained(model, out).eval())}, {"logits": right}, "base + delta"
    )


def _require_close(got: dict[str, Tensor], right: dict[str, Tensor], what: str) -> None:
    for name, tensor in right.items():
        if name not in got or not torch.allclose(got[name].float(), tensor.float(), atol=1e-4, rtol=1e-3):
            raise WrongError(f"{name} is not {what}")


def _samples(start: int) -> Samples:
    texts = [" ".join(f"w{3 + (start + row * 7 + word * 3) % 120}" for word in range(12)) for row in range(6)]
    return Samples(pa.table({"text": texts}))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits[..., 3:]  # some architectures clear the padding token's embedding when they are loaded


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def page(rows: dict[str, Row]) -> str:
    """docs/architectures.md."""
    import transformers

    built = {kind: row for kind, row in sorted(rows.items()) if "built" not in row}
    lines: list[str] = []
    table = []
    for kind, row in built.items():
        cells = []
        for step in STEPS:
            word, _, reason = row[step].partition(": ")
            if reason:
                if reason not in lines:
                    lines.append(reason)
                word = f"{word} [{lines.index(reason) + 1}]"
            cells.append(word)
        table.append(f"| `{kind}` | {row['class']} | {' | '.join(cells)} |")
    whole = sum(all(row[step] == "yes" for step in STEPS) for row in built.values())
    failing = sum(any(row[step].startswith("fails") for step in STEPS) for row in built.values())
    left = [f"- `{kind}`: {row['built']}" for kind, row in sorted(rows.items()) if "built" in row]
    return "\n".join(
        [
            "# Architectures",
            "",
            (__doc__ or "").split("\n\n")[2].replace("\n", " "),
            "",
            f"`python scripts/architectures.py`, with transformers {transformers.__version__}: of {len(rows)} kinds of language "
            f"model {len(built)} can be built tiny; on {whole} everything works, on {failing} something fails.",
            "",
            "| model_type | class | load | RMU | LoRA | full | merge | as adapter |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *table,
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(lines, 1)),
            "",
            "## Not built",
            "",
            *left,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--again", action="store_true", help="try those that are in the table already")
    parser.add_argument("--part", default="1/1", help="which of how many parts")
    given = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)
    file = DOCS / "architectures.json"
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    number, of = (int(each) for each in given.part.split("/"))
    for kind in (given.kinds or kinds())[number - 1 :: of]:
        if given.again or kind not in rows:
            rows[kind] = tried(kind)
            print(
                kind,
                *(f"{step}: {rows[kind][step]}" for step in STEPS if rows[kind].get(step, "yes") != "yes"),
                flush=True,
            )
            file.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    (DOCS / "architectures.md").write_text(page(rows))


if __name__ == "__main__":
    main()
