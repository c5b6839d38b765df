"""Every target of the fuzzer: `make test` tries some cases of each, `make fuzz` goes on."""

from fuzzing import adapters, folders, models, recipes, rows, weights
from fuzzing.trial import Target

TARGETS: dict[str, Target] = {
    target.name: target for file in (recipes, rows, weights, adapters, folders, models) for target in file.TARGETS
}
