"""Ablation of a direction: does what was forgotten come back once the model can no longer refuse?

The direction is the difference of means, r = mean of h(x) over prompts that the model is to refuse less mean of h(x) over others,
made a unit vector, where h is the residual stream after a block at a prompt's last token. It is then projected out of everything
that is written to the residual stream, x - (x . r) r, at every block and token. (Arditi et al. 2024, "Refusal in language models is
mediated by a single direction", arXiv 2406.11717, section 2; against models that have unlearned: Łucki et al. 2024, arXiv
2409.18025.) By default the forget rows' prompts stand against the retain rows'.

    - {kind: audit, of: capitals, attack: ablate}
    - {kind: audit, of: capitals, attack: {kind: ablate, on: source, refused: harmful}, source: prompts.jsonl}
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from spunge.data.samples import Samples, Text, encode, table_sha256, union
from spunge.data.split import draw, seed_for
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.hidden import Index, Share, block_numbers
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.scorers.probe import pooled_states
from spunge.model.architecture import find_blocks, hidden_of, with_hidden
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe

NO_RETAIN = "evaluate.attack.on: the recipe has no retain rows; add retain.source, or set it to source"
LENGTH = 512  # tokens of a prompt


class AblateSettings(AttackSettings):
    kind: str = "ablate"
    on: Literal["forget", "source"] = Field(
        "forget", description="Whose difference it is: forget rows against retain rows, or the audit's own source."
    )
    prompt: str = Field("prompt", description="Column or SQL expression of the source: a prompt.")
    refused: str = Field(
        "refused", description="Column or SQL condition of the source: whether it is one that the model is to refuse."
    )
    samples: int = Field(64, ge=1, description="At most so many prompts of each side, drawn at random.")
    block: Index | Share = Field(
        0.6, description="Block after which the difference is taken: its number from 0, or a share of the depth."
    )


def run(base: Base, attack: AblateSettings, target: Target, bench: Bench) -> list[Measure]:
    """Project the direction of refusal out of the residual stream and measure again.

    Every metric of the evaluation. Raises RecipeError where the two sides do not differ.
    """
    [block] = block_numbers(attack.block, base.depth)
    sides = [coded(base, texts) for texts in chosen(attack, target, bench, base)]
    refused, others = (pooled_states(base, side, [block], last=True).astype(np.float64).mean(axis=0) for side in sides)
    difference = refused - others
    size = float(np.linalg.norm(difference))
    if not np.isfinite(size) or size <= 1e-6 * float(np.linalg.norm(others)):
        raise RecipeError(
            f"evaluate.attack.block: after block {block} the prompts of both sides have the same mean; choose another block"
        )
    with ablated(base.model, torch.from_numpy(difference / size)):
        change = ["ablate", attack.model_dump(mode="json"), (difference / size).tolist()]
        measures = target.measured(base, bench, change)
    return [target.again(measure, "without the direction of refusal") for measure in measures]


def chosen(attack: AblateSettings, target: Target, bench: Bench, base: Base) -> list[list[Text]]:
    """The prompts to be refused, and the others."""
    if attack.on == "source":
        assert target.rows is not None
        prompts, refused = (target.rows[name].to_pylist() for name in ("prompt", "refused"))
        sides = [
            [Text("", str(each)) for each, no in zip(prompts, refused, strict=True) if no == side]
            for side in (True, False)
        ]
    else:
        if bench.retain is None:
            raise RecipeError(NO_RETAIN)
        sides = [prompts_of(samples, base) for samples in (union(bench.forget), bench.retain)]
    return [
        [side[row] for row in draw(np.arange(len(side)), attack.samples, seed_for(bench.seed, "ablate", name))]
        for side, name in zip(sides, ("refused", "others"), strict=True)
    ]


def prompts_of(samples: Samples, base: Base) -> list[Text]:
    """The prompts of rows; plain texts are their own."""
    texts = samples.texts(range(len(samples)), base.tokenizer, "evaluate.attack")
    return [Text("", text.prompt or text.completion, templated=text.templated) for text in texts]


def coded(base: Base, texts: Sequence[Text]) -> list[Any]:
    return [encode(text, base.tokenizer, base.reach(LENGTH)) for text in texts]


@contextmanager
def ablated(model: Any, direction: Tensor) -> Iterator[None]:
    """Inside the block, nothing that is written to the residual stream has a part along a unit vector (d,).

    The same as taking the direction out of the weights of the embeddings and of every projection that writes to the stream, without
    touching them.
    """

    def without(states: Tensor) -> Tensor:
        unit = direction.to(states.device, torch.float32)
        wide = states.float()
        return (wide - (wide @ unit)[..., None] * unit).to(states.dtype)

    hooks = []
    try:
        for block in find_blocks(model):
            hooks.append(block.register_forward_pre_hook(_before(without), with_kwargs=True))
            hooks.append(block.register_forward_hook(_after(without)))
            for child in block.children():
                if "Attention" in type(child).__name__:
                    hooks.append(child.register_forward_hook(_after(without)))
                elif "Norm" in type(child).__name__:  # what is read between attention and MLP
                    hooks.append(child.register_forward_pre_hook(_before(without), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": change(named["hidden_states"])}

    return hook


def _after(change: Callable[[Tensor], Tensor]) -> Any:
    return lambda _module, _inputs, output: with_hidden(output, change(hidden_of(output)))


def columns(attack: AblateSettings, _forget: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": attack.prompt, "refused": f"CAST({attack.refused} AS BOOLEAN)"}


def instrument(attack: AblateSettings, rows: pa.Table | None) -> dict[str, Any]:
    """The prompts' content, which is read from a file of the audit's own. Raises RecipeError for a source that has but one side."""
    if (rows is not None) != (attack.on == "source"):
        raise RecipeError(
            "evaluate.attack.on: source goes with rows of the audit's own (evaluate.source); give both or neither"
        )
    if rows is None:
        return {}
    sides = set(rows["refused"].to_pylist())
    if sides != {True, False}:
        raise RecipeError(
            f"evaluate.attack.refused: {attack.refused!r} is {' and '.join(sorted(map(repr, sides))) or 'nothing'} in the source; "
            "the difference needs prompts of both kinds, True and False"
        )
    return {"prompts": table_sha256(rows)}


def check(attack: AblateSettings, _other: EvaluatorSettings | None, recipe: Recipe) -> None:
    if attack.on == "forget" and recipe.retain is None:
        raise RecipeError(NO_RETAIN)


ABLATE = Attack(
    settings=AblateSettings,
    source="Arditi et al. 2024, arXiv 2406.11717; Łucki et al. 2024, arXiv 2409.18025",
    run=run,
    reads=frozenset({"source", "where", "limit"}),
    rows="prompts, and which of them the model is to refuse",
    columns=columns,
    instrument=instrument,
    check=check,
)
