"""The model that a recipe begins from, and what values are written in."""

from typing import Any, Literal

from pydantic import Field

from spunge.recipe.block import Strict

PackedIn = Literal["4bit", "8bit"]
DeviceMap = Literal["auto"] | dict[int, str]
ModelPart = Literal["language"]


class UnlearningLayers(Strict):
    """A bottleneck after the feed-forward network of every block, h + up act(down h), which adds nothing until it is trained."""

    size: int | None = Field(None, ge=1, description="Width of the bottleneck. Default: a sixteenth of the model's.")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="act, between the two projections.")


class ModelSettings(Strict):
    path: str = Field(description="Hub id, or a folder with a checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the model while it trains and is judged. auto: the checkpoint's on a GPU, the faster of "
        "float32 and bfloat16 (measured) on a CPU; what is written in float32 is judged in float32.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    device_map: DeviceMap | None = Field(
        None,
        description="Judge on several devices. auto: all GPUs, and what they do not hold stays in the machine's memory; or the "
        "memory of each GPU by its number, such as {0: 20GiB}. Without a GPU, auto changes nothing. Of trainings rmu's "
        "alone takes notice: see [judging on several devices](scale.md#judging-on-several-devices). "
        "Default: one device holds all of it.",
    )
    part: ModelPart | None = Field(
        None,
        description="language: of a model of texts and images nothing outside its language tower and output layer is trained, and "
        "a branch that changes more is refused. Of a language model by itself, that is all of it. Default: what the method names. "
        "See [models of texts and images](rows.md#models-of-texts-and-images).",
    )
    train_in: PackedIn | None = Field(
        None,
        description="Hold the weights in 4 bits (nf4) or 8 (int8) while LoRA is trained beside them; needs `spunge[quant]`. What "
        "is learned is added to the weights as they are, and these are judged. Default: as they are. See [memory](memory.md).",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Training computes the blocks again in its backward pass in place of holding what they computed: less memory, "
        "more time, the same losses. See [memory](memory.md).",
    )
    template: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as {enable_thinking: false}: in training, judging and generation alike.",
    )
    allow_pickle: bool = Field(False, description="Accept pickled weights (.bin), which can run code when read.")
    dequantize: bool = Field(
        False,
        description="Take the values of a quantised model (fp8, MXFP4, GGUF; compressed-tensors and bitsandbytes where their "
        "packages are installed) and write what comes of it unquantised.",
    )
    unlearning_layers: UnlearningLayers | None = Field(
        None,
        description="Give the base unlearning layers, which `unlearn: {method: eul}` trains: {} or {size: 64}. What is merged "
        "has them too, and transformers loads it with trust_remote_code=True. Default: the model as it is.",
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that the model's repository carries.")


Dtype = Literal["base", "float32", "bfloat16", "float16"]
