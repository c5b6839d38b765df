"""`spunge merge`: models that exist already, merged into their base."""

from pathlib import Path
from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, quiet, say


def merge(
    out: Annotated[str, typer.Option("--out", help="The folder to write.")],
    base: Annotated[str, typer.Option("--base", help="The model the others were made from: a folder or Hub id.")] = "",
    model: Annotated[
        list[str], typer.Option("--model", help="A delta, checkpoint or LoRA adapter: a folder or Hub id. Repeat.")
    ] = [],  # noqa: B006
    weight: Annotated[list[float], typer.Option("--weight", help="One per model, in their order. Default: 1.")] = [],  # noqa: B006
    rule: Annotated[str, typer.Option("--rule", help="Merge rule (spunge list rules). Default: ties.")] = "",
    density: Annotated[float | None, typer.Option("--density", help="Share of entries kept per model.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="λ: the merged change is multiplied by this.")] = None,
    scope: Annotated[str, typer.Option("--scope", help="What the density counts over: changed, model or tensor.")] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", help="What to write: base (default), float32, bfloat16, float16.")
    ] = "",
    settings: Annotated[list[str], typer.Option("--set", help="Another setting of the rule: name=value. Repeat.")] = [],  # noqa: B006
    mergekit: Annotated[str, typer.Option("--mergekit", help="A mergekit configuration, in place of the above.")] = "",
    as_adapter: Annotated[int | None, typer.Option("--as-adapter", help="Write a LoRA adapter of this rank.")] = None,
    as_delta: Annotated[
        bool, typer.Option("--as-delta", help="Write a sparse delta, which is exact and small.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Take pickled weights (.bin), which can run code when read.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Take the values of quantised models, and write them unquantised.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Another merge at --out may be replaced.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge deltas, checkpoints and LoRA adapters into a base. An interrupted merge goes on where it stopped."""
    with loading():
        from spunge.merging.command import merge_command, summary
        from spunge.progress import Terminal
        from spunge.recipe.loading import apply_overrides

    given = {"density": density, "scale": scale, "scope": scope or None, "dtype": dtype or None}
    chosen = {key: value for key, value in given.items() if value is not None}
    apply_overrides({"merge": chosen}, [f"merge.{pair.removeprefix('merge.')}" for pair in settings])
    watcher = Terminal()
    quiet()
    try:
        merged = merge_command(
            Path(out),
            base or None,
            model,
            rule=rule or None,
            settings=chosen,
            weights=weight or None,
            mergekit=Path(mergekit) if mergekit else None,
            as_adapter=as_adapter,
            as_delta=as_delta,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            replace=replace,
            watcher=watcher,
        )
    finally:
        watcher.close()
    if as_json:
        print_json(merged.to_json())
        return
    say("\n".join([*summary(merged), near(merged.out)]))
