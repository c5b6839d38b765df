"""`spunge export`: a run's model for other programs: one file, or what shifts a larger model as it decodes."""

from typing import Annotated

import typer

from spunge.cli.terminal import JsonOption, loading, near, print_json, quiet, say
from spunge.errors import RecipeError

BACK = "fewer bits can bring back what was forgotten; the attack `quantise` measures it"


def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[
        str, typer.Option("--out", help="The folder to write; with --gguf the file, by default RUN-MODEL-TYPE.gguf.")
    ] = "",
    stage: Annotated[
        str,
        typer.Option("--stage", help="A model: merged (default), branch:SLUG, control:NAME; with --gguf also base."),
    ] = "merged",
    gguf: Annotated[
        bool, typer.Option("--gguf", help="One file with weights and tokenizer, for llama.cpp and what is built on it.")
    ] = False,
    kind: Annotated[
        str, typer.Option("--type", help="With --gguf: f32, f16, bf16 or q8_0. Default: as the model is stored.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write a run's model for other programs.

    With --gguf a GGUF file: of Llama, Mistral, Qwen 2 and Qwen 3 whose tokenizer is bytes-level BPE; others are refused. Without,
    what shifts the larger model, of a recipe with `decode`. RUN/merged is a checkpoint for transformers already.
    """
    if kind and not gguf:
        raise RecipeError("--type: goes with --gguf")
    if not out and not gguf:
        raise RecipeError("--out: missing; give the folder to write, or --gguf for a GGUF file")
    with loading():
        from spunge.files import shown_size
        from spunge.run.exporting import export as export_folder
        from spunge.run.gguf_exporting import export_gguf

    quiet()
    if not gguf:
        there = export_folder(folder, out, stage)
        if as_json:
            print_json({"out": str(there)})
            return
        say(near(there))
        return
    exported = export_gguf(folder, out or None, stage, kind or "auto")
    if as_json:
        print_json({"out": str(exported.file), "stage": stage, "type": exported.type, "bytes": exported.bytes})
        return
    say(f"{near(exported.file)}: {stage} in {exported.type}, {shown_size(exported.bytes)}")
    if exported.type == "q8_0":
        say(BACK)
