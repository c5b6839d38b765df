"""What is left of a small change in a 16-bit checkpoint, by how it is rounded: float32 output, nearest, at random, scaled.

    python benchmarks/rounding.py --model models/smollm2-135m-instruct            # about 6 minutes of one core

NPO unlearns the demo's two continents for a few steps, and TIES merges the branches, with the defaults of both. Each form is
laid over the base, computed in float32, and set against the merge in float32: the mean NLL of a token on texts to forget and on
plain texts, and the mean KL divergence from the float32 merge.

The scaled forms are the alternatives that are not in the product. survivors: what nearest leaves, times the factor by which its
part along the change is the change's own; change: the change times the factor by which that holds after nearest.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import spunge
from spunge.merging.rules import TiesSettings
from spunge.merging.values import merged_changes
from spunge.weights.delta import open_delta
from spunge.weights.overlay import overlaid
from spunge.weights.rounding import draws, rounded
from spunge.weights.sources import DeltaSource

DEMO = Path(spunge.__file__).parent / "recipes" / "demo"
DTYPE = torch.bfloat16
Form = Callable[[str, Tensor, Tensor], Tensor]  # (name, base, change) -> what is written, float32


class Read(NamedTuple):
    """A model's log-probabilities of every next token of a text, (n, vocabulary), and the tokens, (n,)."""

    log: Tensor
    tokens: Tensor


def nearest(name: str, base: Tensor, change: Tensor) -> Tensor:
    return (base + change).to(DTYPE).float()


def stochastic(name: str, base: Tensor, change: Tensor) -> Tensor:
    return rounded((base + change).flatten(), DTYPE, draws(name, 0, base.numel())).float().reshape(base.shape)


def survivors(name: str, base: Tensor, change: Tensor) -> Tensor:
    left = nearest(name, base, change) - base
    along = float((left * change).sum())
    return nearest(name, base, left * (float((change * change).sum()) / along if along else 1.0))


def scaled_change(name: str, base: Tensor, change: Tensor) -> Tensor:
    low, high = 1.0, 64.0
    for _ in range(20):
        factor = (low * high) ** 0.5
        along = float(((nearest(name, base, factor * change) - base) * change).sum())
        low, high = (factor, high) if along < float((change * change).sum()) else (low, factor)
    return nearest(name, base, high * change)


FORMS: Mapping[str, Form] = {
    "base": lambda name, base, change: base,
    "float32": lambda name, base, change: base + change,
    "nearest": nearest,
    "stochastic": stochastic,
    "survivors scaled": survivors,
    "change scaled": scaled_change,
}


def merged(model: Path, steps: int, work: Path) -> dict[str, Tensor]:
    """The merged delta of two NPO branches."""
    unlearn = f"unlearn={{method: npo, steps: {steps}}}"
    recipe = spunge.load_recipe(
        "demo", [f"model.path={model}", "model.dtype=float32", unlearn, "controls=[]", "evaluate=[]"]
    )
    spunge.run(recipe, work)
    sources = [DeltaSource(open_delta(folder)) for folder in sorted((work / "branches").iterdir())]
    return dict(merged_changes(model, sources, TiesSettings()))


def texts(file: str, count: int) -> list[str]:
    rows = [json.loads(line)["text"] for line in (DEMO / file).read_text(encoding="utf-8").splitlines()]
    return rows[:: len(rows) // count][:count]


@torch.no_grad()
def read(model: torch.nn.Module, ids: list[Tensor]) -> Iterator[Read]:
    for row in ids:
        yield Read(torch.log_softmax(model(row[None]).logits[0, :-1], dim=-1), row[1:])


def nll(texts_read: list[Read]) -> float:
    return float(torch.cat([-each.log.gather(1, each.tokens[:, None]) for each in texts_read]).mean())


def divergence(wanted: list[Read], got: list[Read]) -> float:
    pairs = zip(wanted, got, strict=True)
    return float(torch.cat([(one.log.exp() * (one.log - other.log)).sum(dim=1) for one, other in pairs]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, help="The run's folder, kept; one that is there is used.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        changes = merged(given.model.resolve(), given.steps, given.work or Path(folder) / "run")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = {
        name: [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts(f"{name}.jsonl", count)]
        for name, count in (("forget", 48), ("plain", 16))
    }
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    wanted: dict[str, list[Read]] = {}
    print("form               arrived  off   stayed  NLL forget  NLL plain  KL forget  KL plain")
    for form, write in FORMS.items():
        values = {name: write(name, parameters[name], change) for name, change in changes.items()}
        written = {name: value - parameters[name] for name, value in values.items()}
        whole = sum(float(change.square().sum()) for change in changes.values())
        along = sum(float((written[name] * change).sum()) for name, change in changes.items()) / whole
        off = (sum(float((written[name] - change).square().sum()) for name, change in changes.items()) / whole) ** 0.5
        moved = sum(int((change != 0).sum()) for change in changes.values())
        stayed = sum(int(((change != 0) & (written[name] == 0)).sum()) for name, change in changes.items()) / moved
        with overlaid(parameters, values.items()):
            found = {name: list(read(model, rows)) for name, rows in ids.items()}
        wanted = found if form == "float32" else wanted
        losses = "  ".join(f"{nll(each):9.4f}" for each in found.values())
        apart = "  ".join(f"{divergence(wanted[name], each):9.5f}" for name, each in found.items()) if wanted else ""
        print(f"{form:17}  {along:6.1%}  {off:4.0%}  {stayed:6.1%}  {losses}  {apart}", flush=True)


main()
