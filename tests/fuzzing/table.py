"""Every target of the fuzzer: `make test` tries some cases of each, `make fuzz` goes on."""

from fuzzing import recipes, rows, weights
from fuzzing.trial import Target

TARGETS: dict[str, Target] = {target.name: target for target in (*recipes.TARGETS, *rows.TARGETS, *weights.TARGETS)}
