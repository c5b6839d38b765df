"""RMU, representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218, section 4).

With M_u and M_0 the hidden states after block l of the trained model and of the base, u a fixed random unit
vector with entries of one sign, one for each part:

    loss = mean over forget tokens |M_u - c u|^2 / d  +  alpha * mean over retain tokens |M_u - M_0|^2 / d

- **Scaling.** Both terms are means over tokens *and* over the hidden size d, as in the authors' code; `alpha` refers to that. The
  paper's formula sums over d: the same ratio of the terms, so the same `alpha`, but losses d times as large. Padding enters
  neither mean. The authors' code averages over padded positions too, so its losses differ from ours where texts differ in
  length, by what the states at padded positions happen to be.
- **Trained** are the MLP output projections of blocks l-2, l-1 and l, found by name. In a mixture of experts those of every
  expert of the block: transformers 5 keeps them in one stacked parameter, the checkpoint (Mixtral, Qwen3-MoE) one matrix an
  expert, and the delta is written by the checkpoint's names. A model whose stacked matrices cannot be told apart in the
  checkpoint is refused.
- **Forget tokens** are all of a plain text's. Where an answer follows a prompt (`prompt` and `completion`, conversations), they are
  the answer's tokens and the one before each, whose states tell them; the prompt is steered no further. Of retain rows every
  token is held, prompts too.
- **Joint control:** one batch of each part in turn, each with its own u. **Branches** may stop early: `min_cosine`.

On a model without published numbers, `layer: auto` and `coefficient: auto` choose by short trials:

    spunge run demo --set unlearn.layer=auto --set unlearn.coefficient=auto
"""

from collections.abc import Mapping

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.architecture import DOWN_PROJECTIONS
from spunge.model.loading import Base
from spunge.unlearning.calls import SIDES, Call, Group
from spunge.unlearning.method import Method, Settled
from spunge.unlearning.rmu.settings import TRAINED_BLOCKS, TYPICAL_LAYER, Relative, RMUSettings, block_index
from spunge.unlearning.rmu.steering import steer
from spunge.unlearning.rmu.tuning import tune
from spunge.unlearning.trained import entries_of
from spunge.weights.checkpoint import Checkpoint


def calls(settings: RMUSettings, depth: int) -> list[Group]:
    layer = block_index(TYPICAL_LAYER if settings.layer == "auto" else settings.layer, depth)
    first = 0 if settings.trainable is not None else max(0, layer - TRAINED_BLOCKS + 1)
    compared = isinstance(settings.coefficient, Relative) or settings.min_cosine is not None
    groups = []
    for of in SIDES:
        # What the base gives starts from the trained blocks too; the first one's front is run once for both.
        base = Call(of, gradient=False, once=settings.keep_activations > 0, most=settings.keep_activations * 2**30)
        frozen = [base._replace(blocks=first)] if first else []
        beside = [base._replace(blocks=layer - first)] if of == "retain" or compared else []
        groups.append((*frozen, *beside, Call(of, blocks=layer - first + 1)))
    return groups


def stored_entries(settings: RMUSettings, base: Checkpoint) -> int:
    if settings.trainable is not None:
        return entries_of(settings.trainable, base)
    matrices = [info for info in base.tensors.values() if len(info.shape) == 2]
    sizes = [info.numel for info in matrices if any(f".{name}.weight" in info.name for name in DOWN_PROJECTIONS)]
    return sum(sorted(sizes)[-TRAINED_BLOCKS:])


def last_block(settings: RMUSettings, depth: int) -> int | None:
    # What is trained by the recipe's own choice may lie anywhere.
    return block_index(settings.layer, depth) if settings.trainable is None else None


def settle(
    base: Base, parts: Mapping[str, Samples], retain: Samples | None, settings: RMUSettings, seed: int
) -> Settled:
    if retain is None:
        raise RecipeError("retain: missing, and RMU needs it; add retain.source")
    return tune(base, parts, retain, settings, seed)


RMU = Method(
    settings=RMUSettings,
    source="Li et al. 2024, arXiv 2403.03218",
    unlearn=steer,
    calls=calls,
    needs_retain=lambda settings: True,
    stored_entries=stored_entries,
    last_block=last_block,
    settle=settle,
    version=4,
)
