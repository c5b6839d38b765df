"""What a recipe says of an endpoint, and the request that is made of it."""

import re
import string
from typing import Any

from pydantic import Field, JsonValue, field_validator

from spunge.recipe.block import Strict
from spunge.recipe.patterns import ADDRESS


class EndpointSettings(Strict):
    base_url: str = Field(
        pattern=ADDRESS,
        description="Address of the endpoint, such as http://localhost:8000/v1, without credentials.",
    )
    model: str = Field(min_length=1, description="What the endpoint calls the model.")
    prompt: str = Field(description="What is asked.")
    system: str | None = Field(None, description="A system message before it.")
    max_tokens: int = Field(1024, ge=1, description="Tokens of a reply.")
    temperature: float | None = Field(0.0, ge=0, description="Of the model's sampling; null leaves it to the endpoint.")
    request: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="More fields of the request, such as {seed: 1}; null takes one out, such as {max_tokens: null}.",
    )
    key_env: str | None = Field(
        None, description="Name of the variable of the environment that holds the key, such as OPENAI_API_KEY."
    )
    timeout: float = Field(60.0, gt=0, description="Seconds that a reply may take.")
    retries: int = Field(
        5,
        ge=0,
        description="Further tries where the endpoint is busy, slow or away, after 1, 2, 4, ... s, or as long as it asks.",
    )
    parallel: int = Field(4, ge=1, le=256, description="Requests at a time.")
    per_minute: float | None = Field(None, gt=0, description="Requests a minute, at most.")
    max_calls: int | None = Field(
        None,
        ge=1,
        description="Requests of one `spunge run`, at most, tries included; what is in the cache is not asked.",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="No request once the endpoint has counted so many tokens in one `spunge run`."
    )

    @field_validator("key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError(
                "give the name of a variable in capitals, such as OPENAI_API_KEY, and never the key itself"
            )
        return name


def fields_of(template: str) -> set[str]:
    """The names in braces. Raises ValueError for a template that does more than name fields."""
    names = set()
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not name.isidentifier():
            raise ValueError(f"{{{name}}}: give the name of a field alone; {{{{ and }}}} stand for braces")
        names.add(name)
    return names


def request_of(settings: EndpointSettings, **fields: str) -> dict[str, Any]:
    """The body of a request: the prompt with its fields filled in."""
    asked = settings.prompt.format_map(fields)
    asked = asked.encode("utf-8", "replace").decode()  # no half of a surrogate pair can be sent
    system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    body = {
        "model": settings.model,
        "messages": [*system, {"role": "user", "content": asked}],
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        **settings.request,
    }
    return {name: value for name, value in body.items() if value is not None}
