"""What a run unlearned while a model decodes, as a folder that transformers loads by hand: the small models that were unlearned,
where the others are, how logits are shifted, and the code that does it."""

from dataclasses import replace
from pathlib import Path

from spunge.errors import RecipeError
from spunge.files import copied, whole_folder, write_json, write_text
from spunge.merging.engine import merge
from spunge.model import offsets
from spunge.recipe.decoding import Decode, shift_of
from spunge.recipe.model import ModelSettings
from spunge.registry import RULES
from spunge.run.decoding import ALONE
from spunge.run.models import EXPERT, Model, delta_sources
from spunge.run.stages.building import Run, build
from spunge.run.stages.naming import stage_of
from spunge.run.status import run_recipe
from spunge.unlearning.gedi import GeDiSettings, codes_of

CODE = "offsets.py"
CARD = """\
# {large}, unlearned while it decodes

The weights of `{large}` are as they were. Small models shift its logits: {formula}, where small is `{small}`.
{merged}
```python
from offsets import load

model, tokenizer = load(".")  # shifted wherever it is called or generates
```

`OffsetProcessor` of `offsets.py` does the same for one call of `generate`. Where the models have moved:
`load(".", large=..., small=...)`.

## Limits

- The model is only as safe as the server that applies the offset. Who has the weights of `{large}` has all that it knew.
- The small models are held in memory beside the large one, and each reads every token.
- Relearning, quantisation, pruning and probes are attacks on weights. They were not tried, since no weight of the large model
  changed.
"""

FORMULAS = {
    "offset": "large + {alpha:g} * (unlearned - small)",
    "dexperts": "top_p(large) + {alpha:g} * (expert - anti-expert), which learned the rows to keep and those to forget",
    "gedi": "large + {alpha:g} * log P(desired | text, next token), of a class-conditional model that reads it after two codes",
}


def export(folder: str | Path, out: str | Path, stage: str = "merged") -> Path:
    """Write a finished model of a run that decodes to the folder `out`. Raises RecipeError where there is none."""
    folder, out = Path(folder).resolve(), Path(out)
    recipe = run_recipe(folder)
    if (decode := recipe.decode) is None:
        raise RecipeError(
            f"{str(folder)!r} changed weights; its model is {str(folder / 'merged')!r}, which transformers loads as it is "
            "(--gguf writes it for llama.cpp)"
        )
    run = build(recipe, folder)
    model, unlearn = _finished(run, stage), recipe.unlearn
    # Those that it was judged by: of the small model's own tokenizer.
    codes = codes_of(unlearn, run.base.tokenizer) if isinstance(unlearn, GeDiSettings) else ()
    small = ModelSettings(path=str(run.base.folder)) if run.base.conversion else recipe.model
    with whole_folder(out) as aside:
        names, expert = [], None
        if model.expert is not None:
            expert = EXPERT
            _write(run, replace(model, trainings=(model.expert,), **ALONE), aside / EXPERT)
        for number, each in enumerate(model.shifting, 1):
            _write(run, each, aside / f"unlearned-{number}")
            names.append(f"unlearned-{number}")
        copied(Path(offsets.__file__), aside / CODE)
        write_json(
            aside / offsets.DESCRIPTION,
            {
                "kind": decode.kind,
                "large": {"path": decode.path, "revision": decode.revision},
                "small": {"path": small.path, "revision": small.revision},
                "unlearned": names,
                "expert": expert,
                "codes": codes,
                "shift": shift_of(decode, unlearn, names),
            },
        )
        write_text(aside / "README.md", _card(decode, small.path, len(names)))
    return out


def _finished(run: Run, name: str) -> Model:
    """A model of the first seed. Raises RecipeError where it is not there or not finished."""
    models = {model.name: model for model in run.seeds[0].models if model.trainings}
    done = [each for each, model in models.items() if all(run.graph.state(stage).done for stage in _stages(model))]
    if name not in done:
        what = "is not finished" if name in models else "is no model that was unlearned"
        raise RecipeError(f"--stage: {name!r} {what}; finished are {', '.join(done) or 'none'}")
    return models[name]


def _stages(model: Model) -> list[str]:
    """Those whose files are exported."""
    return [stage_of(model, ""), *([model.expert.name] if model.expert is not None else [])]


def _write(run: Run, model: Model, out: Path) -> None:
    """A small model as a checkpoint."""
    rule, base = model.merge, run.base.folder
    if rule is None:
        if len(model.trainings) > 1:
            raise RecipeError(f"--stage: {model.name!r} was unlearned in a row, which is not exported; give another")
        added = {"rule": "task_arithmetic", "dtype": model.storage.dtype, "rounding": model.storage.rounding}
        rule = RULES.get("task_arithmetic").settings.model_validate(added)
    merge(base, delta_sources(model.trainings), rule, out, setting="model.path")


def _card(decode: Decode, small: str, count: int) -> str:
    merged = f"There are {count} unlearned ones, one for each part, and their offsets are merged as logits ({decode.merge}).\n"
    shown = (Path(path).name if path.startswith(("/", ".", "~")) else path for path in (decode.path, small))
    large, small = shown
    return CARD.format(
        large=large,
        small=small,
        formula=FORMULAS[decode.kind].format(alpha=decode.alpha),
        merged=merged if count > 1 else "",
    )
