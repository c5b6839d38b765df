"""`spunge export`: a model of a run as a file for other programs."""

from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, quiet, say
from spunge.errors import RecipeError


def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="What to write. Default: RUN-MODEL-TYPE.gguf, in this folder.")
    ] = "",
    gguf: Annotated[bool, typer.Option("--gguf", help="As GGUF, for llama.cpp and what is built on it.")] = False,
    stage: Annotated[
        str, typer.Option("--stage", help="The model: base, merged, branch:SLUG, control:NAME.")
    ] = "merged",
    kind: Annotated[
        str, typer.Option("--type", help="Of the values: f32, f16, bf16, q8_0. Default: as the model is stored.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as one file for another program.

    The file holds weights, tokenizer and chat template. Llama, Mistral, Qwen 2 and Qwen 3 with a bytes-level BPE tokenizer are
    written; others are refused.
    """
    if not gguf:
        raise RecipeError("export: add --gguf, the format that there is; RUN/merged is a checkpoint of transformers already")
    with loading():
        from spunge.files import shown_size
        from spunge.run.exporting import export_gguf

    quiet()
    exported = export_gguf(folder, file or None, stage, kind)
    if as_json:
        print_json({"file": str(exported.file), "stage": stage, "type": exported.type, "bytes": exported.bytes})
        return
    say(f"{near(exported.file)}: {stage} in {exported.type}, {shown_size(exported.bytes)}")
    if exported.type == "q8_0":
        say("fewer bits can bring back what was forgotten: the attack `quantise` measures it")
