"""Rows of a recipe: where they come from, and which of their columns are texts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from spunge.recipe.block import Strict

Scalar = str | int | float | bool
NEUTRAL = "neutral"  # names the paragraphs of Wikipedia that come with the package, as a source
# What answer_end says in other spellings, which would be learned as texts.
MEANT_AS_END = {
    **dict.fromkeys(["auto", "eos", "eos_token", "true"], "auto"),
    **dict.fromkeys(["none", "null", "false"], "none"),
}


class Source(Strict):
    """Where rows come from: files, or a dataset on the Hub."""

    path: str | None = Field(
        None,
        description="A .jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather or .txt file (also packed: .gz, .zst, .bz2, .xz), a "
        "folder of them, or a glob; or `neutral`, the paragraphs of Wikipedia that come with the package.",
    )
    encoding: str | None = Field(
        None, description="Of text files, such as cp1252. Default: UTF-8, or as their byte order mark says."
    )
    delimiter: str | None = Field(None, description="Of CSV. Default: what parts the heading; a tab in .tsv.")
    hub: str | None = Field(None, description="A dataset's id on the Hub.")
    config: str | None = Field(None, description="The Hub dataset's configuration.")
    split: str = Field("train", description="The Hub dataset's split.")
    revision: str | None = Field(None, description="The Hub dataset's branch, tag or commit.")
    assign: dict[str, Scalar] = Field(
        default_factory=dict, description="Constant columns to add, such as {domain: bio}."
    )
    row_number: str | None = Field(
        None,
        min_length=1,
        description="Name of a column to add that counts the source's rows, from 0: with `row_number: row` the authors of the "
        "Hub's TOFU, of 20 rows each, are `row // 20`.",
    )

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            "".encode(encoding or "utf-8")
        except LookupError:
            raise ValueError(f"no encoding {encoding!r}; such are utf-8, utf-16, cp1252, latin-1, shift_jis") from None
        return encoding

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"'):
            raise ValueError(f'{delimiter!r} is no delimiter; give one character (a tab is "\\t" in double quotes)')
        return delimiter

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


def _listed(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_listed), Field(min_length=1)]


class Rows(Strict):
    """Rows of a source, and which of their columns are the text."""

    source: Sources | None = Field(
        None, description="File, folder, glob, {hub: ..}, or a list of them. Default: forget's."
    )
    text: str | None = Field(None, description="Column, or SQL expression, with plain text.")
    prompt: str | None = Field(
        None, description="Column, or SQL expression, with the prompt; the loss is on the completion alone."
    )
    completion: str | None = Field(None, description="Column, or SQL expression, with the completion.")
    messages: str | None = Field(
        None,
        description="Column, or SQL expression, with conversations; the loss is on the assistant's messages alone, see `learn`.",
    )
    chat: bool | None = Field(
        None,
        description="Put prompt and completion into the model's chat template, as a user's and an assistant's message. "
        "Default: no; retain and teach: as forget.",
    )
    learn: Literal["last", "all"] | None = Field(
        None,
        description="Which of a conversation's assistant messages are learned. Default: the last; retain and teach: as forget.",
    )
    answer_end: str | None = Field(
        None,
        description="What ends an answer and is learned with it, of prompts and conversations. auto: the chat template's end of "
        "turn, else the tokenizer's end token. none: nothing. Any other text: that text. Default: auto; retain and teach: as "
        "forget.",
    )
    where: str | None = Field(None, description="SQL condition that a row must meet.")
    limit: int | None = Field(None, ge=1, description="At most so many rows, drawn at random by the seed.")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        """`neutral` is short for its source; its text is in its own column, whatever forget's is called."""
        content = {"source": given} if given == NEUTRAL else given
        if (
            isinstance(content, dict)
            and content.get("source") == NEUTRAL
            and not {"text", "prompt", "messages"} & content.keys()
        ):
            return {**content, "text": "text"}
        return content

    @model_validator(mode="after")
    def _one_form(self) -> "Rows":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt + completion, messages")
        if self.chat is False and self.messages is not None:
            raise ValueError("chat: conversations always go through the chat template; leave it out")
        if self.chat and self.text is not None:
            raise ValueError(
                "chat: a plain text has no turns; give prompt and completion, or messages, or leave it out"
            )
        if self.answer_end == "":
            raise ValueError("answer_end: an empty text; give none, auto or the text that ends an answer")
        if self.answer_end is not None and self.answer_end.strip().lower() in MEANT_AS_END:
            end = MEANT_AS_END[self.answer_end.strip().lower()]
            if self.answer_end != end:
                raise ValueError(
                    f"answer_end: {self.answer_end!r} would be learned as a text; for what it says write {end}"
                )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column; empty when the recipe names none."""
        roles = {"text": self.text, "prompt": self.prompt, "completion": self.completion, "messages": self.messages}
        return {role: name for role, name in roles.items() if name}


class ForgetRows(Rows):
    source: Sources = Field(description="File, folder, glob, {hub: ..}, or a list of them.")
    refusal: str | None = Field(
        None,
        description="Column, or SQL expression, with the answer wanted in place of the completion (methods dpo, idk, idk_ap, "
        "altpo).",
    )

    @property
    def columns(self) -> dict[str, str]:
        return super().columns or {"text": "text"}
