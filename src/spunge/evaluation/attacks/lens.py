"""The logit lens: what would the model say after a block in the middle, before the later ones have had their say?

The hidden states after a block go straight through the last norm and the output layer, and the evaluation is measured again.
What only the last blocks hide stands there still. (nostalgebraist 2020, "interpreting GPT: the logit lens"; on models that were
edited to forget: Patil et al. 2023, arXiv 2309.17410, section 4.)

    - {kind: audit, of: capitals, attack: {kind: lens, block: [0.5, 0.75, 0.9]}}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import Field

from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.hidden import Index, Share, block_numbers
from spunge.evaluation.attacks.target import Target, share_of
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.architecture import find_blocks, hidden_of, noted, with_hidden
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings


class LensSettings(AttackSettings):
    kind: str = "lens"
    block: Index | Share | list[Index | Share] = Field(
        [0.5, 0.75, 0.9],
        description="Block whose output is read: its number from 0, or a share of the depth such as 0.5; or several.",
    )


def run(base: Base, attack: LensSettings, target: Target, bench: Bench) -> list[Measure]:
    """Let the model answer from the hidden states of a block in the middle and measure again.

    Every metric of the evaluation, for each block.
    """
    blocks = block_numbers(attack.block, base.depth)
    measures: list[Measure] = []
    for number, block in enumerate(blocks):
        with read_after(base.model, block):
            one_round = replace(bench, progress=share_of(bench.progress, number, len(blocks)))
            found = target.measured(base, one_round, ["lens", block])
        measures += [target.again(each, "by the logit lens", ", block {}", at=block, unit="block") for each in found]
    return measures


@contextmanager
def read_after(model: Any, block: int) -> Iterator[None]:
    """Inside the block, the model's last block gives what the one of this number gave."""
    with noted(model, [block]) as seen:

        def give(_module: Any, _inputs: Any, output: Any) -> Any:
            return with_hidden(output, seen.pop(block).to(hidden_of(output).device))

        hook = find_blocks(model)[-1].register_forward_hook(give)
        try:
            yield
        finally:
            hook.remove()


LENS = Attack(settings=LensSettings, source="nostalgebraist 2020; Patil et al. 2023, arXiv 2309.17410", run=run)
